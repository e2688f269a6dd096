"""The settings that ship: usable, honest about their source, and found by a model's shape."""

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree

import pytest
from tiny import tiny_model
from transformers import AutoConfig, PreTrainedModel

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import ConfigError
from hf_alphaedit.presets import Preset, config_for, derived_layers, presets


ROOT = Path(__file__).parents[1]
SHIPPED = presets()
BY_SHAPE = [preset for preset in SHIPPED if preset.shape]
EXPECTED = {
    "gpt2-xl",
    "gpt-j-6b",
    "llama-3-8b",
    "llama-3.1-8b",
    "qwen2.5-7b",
    "mistral-7b",
    "phi-1.5",
    "smollm2-135m",
    "gemma-3-270m",
}


class Shaped:
    """A model that has nothing but a config: presets look at no more, and a real one of that size takes minutes."""

    def __init__(self, preset: Preset, **changes: object) -> None:
        self.config = AutoConfig.for_model(**{**preset.shape, **changes})


def test_the_models_people_ask_for_have_presets() -> None:
    assert {preset.name for preset in SHIPPED} >= EXPECTED
    assert {path.stem for path in (ROOT / "configs").glob("*.json")} == {preset.name for preset in SHIPPED}


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda preset: preset.name)
def test_preset_is_usable_and_says_where_it_comes_from(preset: Preset) -> None:
    config = preset.config()
    assert config.layers is not None
    # One that is taken by its name alone is for a model that another one is found for by shape.
    depth = next(other.shape["num_hidden_layers"] for other in BY_SHAPE if other.models == preset.models)
    assert max(config.layers) < depth
    assert preset.status in ("verified", "published", "tuned")
    assert preset.name in config.source
    assert preset.status in config.source
    assert preset.models
    assert all("/" in model for model in preset.models)
    if preset.status == "published":
        assert "not measured" in preset.source or "published" in preset.source or "EasyEdit" in preset.source
    else:
        assert preset.source.startswith(("python ", "make ", "hf-alphaedit ")), "the command that shows it"


@pytest.mark.parametrize("preset", BY_SHAPE, ids=lambda preset: preset.name)
def test_preset_is_found_by_shape(preset: Preset) -> None:
    assert config_for(Shaped(preset)) == preset.config()


@pytest.mark.parametrize("preset", BY_SHAPE, ids=lambda preset: preset.name)
def test_the_name_of_a_model_decides_nothing(preset: Preset) -> None:
    renamed = Shaped(preset)
    renamed.config.name_or_path = "gpt2-xl"
    assert config_for(renamed) == preset.config()
    model = tiny_model("llama")
    model.config.name_or_path = preset.models[0]
    assert config_for(model).source != preset.config().source


def test_no_two_presets_claim_one_model() -> None:
    for preset in BY_SHAPE:
        config = Shaped(preset).config
        claims = [
            other.name for other in BY_SHAPE if all(getattr(config, k, None) == v for k, v in other.shape.items())
        ]
        assert claims == [preset.name]


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda preset: preset.name)
def test_preset_is_found_by_name(preset: Preset) -> None:
    assert config_for(tiny_model("llama"), preset.name) == preset.config()


def test_the_text_model_of_a_multimodal_one_is_looked_at() -> None:
    preset = next(preset for preset in SHIPPED if preset.name == "llama-3-8b")
    text = AutoConfig.for_model(**preset.shape)
    model = Shaped(preset)
    model.config = AutoConfig.for_model("llava", text_config=text)
    assert config_for(model) == preset.config()


def test_layers_are_derived_where_no_preset_fits(caplog: pytest.LogCaptureFixture) -> None:
    model: PreTrainedModel = tiny_model("llama", num_hidden_layers=12)
    with caplog.at_level(logging.WARNING):
        config = config_for(model)
    assert config.layers == (2, 3, 4, 5)
    assert "not measured" in caplog.text
    assert "derived" in config.source
    caplog.clear()
    assert config_for(model, {"l2": 2.0}).layers == (2, 3, 4, 5)
    assert config_for(model, {"layers": [1]}).layers == (1,)


@pytest.mark.parametrize("depth", range(1, 100))
def test_derived_layers_exist(depth: int) -> None:
    layers = derived_layers(depth)
    assert 1 <= len(layers) <= 5
    assert layers == tuple(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] < depth


def test_settings_come_in_any_form(tmp_path: Path) -> None:
    model, config = tiny_model("llama"), AlphaEditConfig(layers=(1, 2), l2=3.0)
    path = config.save_pretrained(tmp_path)
    for form in (config, config.to_dict(), {"layers": [1, 2], "l2": 3}, path, str(path), tmp_path):
        assert config_for(model, form) == config
    preset = {
        "status": "tuned",
        "source": "hf-alphaedit tune x",
        "models": ["a/b"],
        "shape": {},
        "settings": {"l2": 3},
    }
    (tmp_path / "mine.json").write_text(json.dumps(preset))
    mine = config_for(model, tmp_path / "mine.json")
    assert mine.l2 == 3.0
    assert "preset mine, tuned" in mine.source


@pytest.mark.parametrize("config", ["gpt2-xxl", Path("no/such/file.json")])
def test_what_is_neither_file_nor_preset(config: str | Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor a preset.*gpt2-xl"):
        config_for(tiny_model("llama"), config)


def test_mistakes_in_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="lambda"):
        config_for(tiny_model("llama"), {"lambda": 3})


def test_the_wheel_has_the_presets(tmp_path: Path) -> None:
    project = tmp_path / "project"
    copytree(
        ROOT / "src", project / "src", ignore=lambda _, names: {n for n in names if n.endswith((".egg-info", "__"))}
    )
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, tmp_path], cwd=project, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"hf_alphaedit/configs/{preset.name}.json" for preset in SHIPPED} <= set(names)
    assert {"hf_alphaedit/py.typed", "hf_alphaedit/model_card.md"} <= set(names)
    assert not [name for name in names if not name.startswith("hf_alphaedit")]
