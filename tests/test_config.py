"""Settings: their JSON form, what is refused, and the published procedure."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hf_alphaedit.config import CONFIG_NAME, FORMAT_VERSION, AlphaEditConfig
from hf_alphaedit.errors import ConfigError


# One value other than the default for every setting.
OTHER: dict[str, Any] = {
    "layers": (1, 4, 7), "target_module": "model.layers.{}.mlp.down_proj", "value_steps": 3, "learning_rate": 0.25,
    "adam_betas": (0.5, 0.75), "contexts_in_turn": False,
    "clamp_factor": 2.0, "kl_factor": 0.0, "weight_decay": 0.0, "stop_loss": 0.0, "stop_at_argmax": True,
    "forward_dtype": "bfloat16", "context_templates": ("Yes. {}", "中. {}"), "contexts_per_word": 2,
    "context_length": 7,
    "context_special_tokens": True, "context_gaps": 0.5, "context_asides": False, "context_keys": "mean",
    "projection": "soft_inside_hard",
    "threshold_rule": "absolute", "energy_share": 0.9, "absolute_threshold": 1e-3, "soft_weight": 15000.0,
    "l2": 10.0, "use_history": False, "history_weight": 10.0, "tokens_per_dimension": 3, "sequence_length": 64,
    "cache_targets": False, "corpus": "3 texts", "corpus_tokens": 99, "source": "a test",
}  # fmt: skip


def test_every_setting_has_a_help_text_and_a_default() -> None:
    for item in dataclasses.fields(AlphaEditConfig):
        assert len(item.metadata["help"]) > 15
        assert item.default is not dataclasses.MISSING
    names = {item.name for item in dataclasses.fields(AlphaEditConfig)}
    assert OTHER.keys() == names
    assert all(getattr(AlphaEditConfig(), name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("config", [AlphaEditConfig(), AlphaEditConfig(**OTHER)], ids=["defaults", "other"])
def test_json_round_trip(config: AlphaEditConfig, tmp_path: Path) -> None:
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == CONFIG_NAME
    assert AlphaEditConfig.from_json_file(path) == AlphaEditConfig.from_json_file(path.parent) == config
    text = path.read_text(encoding="utf-8")
    values = json.loads(text)
    assert values.pop("format_version") == FORMAT_VERSION
    assert values == config.to_dict()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_plain_json_types_are_enough() -> None:
    config = AlphaEditConfig.from_dict({"l2": 10, "layers": [4, 5], "context_templates": ["So. {}"]})
    assert config.l2 == 10.0
    assert isinstance(config.l2, float)
    assert config.layers == (4, 5)
    assert config.context_templates == ("So. {}",)
    assert hash(config) == hash(config.replace())


def test_values_given_are_not_changed() -> None:
    values = {"format_version": 1, "layers": [1]}
    AlphaEditConfig.from_dict(values)
    assert values == {"format_version": 1, "layers": [1]}


def test_a_typing_mistake_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['learning_rat'\].*learning_rate"):
        AlphaEditConfig.from_dict({"learning_rat": 0.1})
    with pytest.raises(ConfigError, match="unknown"):
        AlphaEditConfig().replace(lambda_=1)


def test_settings_of_a_newer_format_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    newer = {"format_version": FORMAT_VERSION + 1, "l2": 3.0, "from_the_future": [1]}
    with caplog.at_level(logging.WARNING):
        assert AlphaEditConfig.from_dict(newer) == AlphaEditConfig(l2=3.0)
    assert "from_the_future" in caplog.text
    assert "upgrade" in caplog.text
    with pytest.raises(ConfigError, match="from_the_future"):
        AlphaEditConfig.from_dict(newer, strict=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", ()), ("layers", (3, 2)), ("layers", (2, 2)), ("layers", ("1",)), ("layers", 5), ("layers", (1.0,)),
        ("layers", (True,)), ("target_module", "model.layers.0.mlp"), ("target_module", "{}.{}"), ("target_module", 3),
        ("value_steps", 0), ("value_steps", 2.0), ("value_steps", True), ("value_steps", "3"),
        ("contexts_per_word", 0),
        ("learning_rate", 0), ("learning_rate", -1.0), ("learning_rate", float("nan")), ("learning_rate", "fast"),
        ("adam_betas", (0.5,)), ("adam_betas", (0.5, 1.0)), ("adam_betas", (-0.1, 0.9)), ("adam_betas", 0.9),
        ("clamp_factor", 0.0), ("clamp_factor", float("inf")), ("kl_factor", -0.1), ("kl_factor", float("nan")),
        ("weight_decay", -1), ("stop_loss", -0.1), ("stop_at_argmax", 1), ("forward_dtype", "float8"),
        ("context_templates", ("no place",)), ("context_templates", ("{} and {}",)), ("context_templates", "{}"),
        ("context_length", 0), ("context_keys", "both"), ("projection", "strong"), ("threshold_rule", None),
        ("energy_share", 0), ("energy_share", 1.0), ("absolute_threshold", 0.0), ("soft_weight", 0.0),
        ("l2", 0.0), ("l2", True), ("tokens_per_dimension", 0), ("sequence_length", 0), ("cache_targets", None),
        ("source", None),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        AlphaEditConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    offending = value[0] if name in ("layers", "context_templates") and isinstance(value, tuple) and value else value
    assert repr(value) in message or repr(offending) in message
    assert "must be" in message


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AlphaEditConfig().l2 = 3.0  # type: ignore[misc]


def test_the_paper_mode_is_the_published_procedure() -> None:
    config = AlphaEditConfig(layers=(4, 5, 6), target_module="h.{}", learning_rate=0.1, energy_share=0.5).paper()
    published = {
        "projection": "hard", "threshold_rule": "absolute", "absolute_threshold": 2e-2, "l2": 10.0,
        "use_history": True, "clamp_factor": 0.75, "kl_factor": 0.0625, "weight_decay": 0.5, "stop_loss": 5e-2,
        "stop_at_argmax": False, "context_templates": None, "contexts_per_word": 1, "context_length": 10,
        "context_special_tokens": True, "context_gaps": 0.0, "context_asides": False, "context_keys": "mean",
        "contexts_in_turn": False, "forward_dtype": "model",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    assert (config.layers, config.target_module, config.learning_rate) == ((4, 5, 6), "h.{}", 0.1)
    assert "paper" in config.source
    assert config.value_steps >= 20


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "list"), ('"l2"', "str"), ('{"l2": "x"}', "l2='x'")]
)
def test_a_file_that_holds_no_settings(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        AlphaEditConfig.from_json_file(path)
    with pytest.raises(FileNotFoundError):
        AlphaEditConfig.from_json_file(tmp_path / "missing.json")


def test_paper_mode_searches_as_published() -> None:
    paper = AlphaEditConfig(value_steps=40, adam_betas=(0.5, 0.9)).paper()
    assert (paper.value_steps, paper.adam_betas) == (25, (0.9, 0.999))
