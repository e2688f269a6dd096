"""Every setting of the method in one frozen dataclass, with its JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_alphaedit.errors import ConfigError


logger = logging.getLogger(__name__)

CONFIG_NAME = "alphaedit_config.json"
FORMAT_VERSION = 1

Projection = Literal["hard", "soft", "soft_inside_hard", "none"]
ThresholdRule = Literal["energy", "absolute"]
ContextKeys = Literal["with_subject", "separate", "mean"]
ForwardDtype = Literal["auto", "model", "float32", "bfloat16"]


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig:
    """Settings of one sequence of edits. The defaults are the `recommended` mode; see `paper` for the other one.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names the field and the value.
    """

    # Where to edit
    layers: tuple[int, ...] | None = setting(None, "decoder layers to edit; None lets the architecture decide")
    target_module: str | None = setting(
        None, "path of the down-projection with {} for the layer, e.g. 'model.layers.{}.mlp.down_proj'; None finds it"
    )

    # Targets: the search of the paper's equation 3
    value_steps: int = setting(25, "forward passes of the target search; the last one makes no update")
    learning_rate: float = setting(0.5, "Adam's learning rate for the target search")
    adam_betas: tuple[float, float] = setting(
        (0.7, 0.9), "decay of Adam's two averages in the target search; published: 0.9 and 0.999"
    )
    clamp_factor: float = setting(0.75, "largest norm of delta, relative to the norm of the vector it is added to")
    kl_factor: float = setting(0.0625, "weight of the KL term that keeps '<subject> is a' as it was")
    weight_decay: float = setting(0.5, "weight of ‖delta‖ / ‖value‖² in the loss")
    stop_loss: float = setting(5e-2, "a request is finished when its loss falls below this")
    stop_at_argmax: bool = setting(False, "a request is also finished once its target is the argmax in every row")
    contexts_in_turn: bool = setting(
        True, "each step of the target search sees the bare prompt and one context in turn; published: all contexts"
    )
    forward_dtype: ForwardDtype = setting(
        "auto",
        "dtype of matrix products in the target search; 'auto' takes bfloat16 where the device is faster with it",
    )

    # Context templates
    context_templates: tuple[str, ...] | None = setting(
        None,
        "fixed contexts with one {} each, beside the bare prompt; None samples them from the model. Keys are "
        "those of the first five",
    )
    contexts_per_word: int = setting(
        1,
        "contexts sampled for each of five first words; with more of them the target search takes longer and reaches "
        "more wordings, while keys stay those of the first five",
    )
    context_length: int = setting(10, "tokens of a sampled context, its first word and the BOS token included")
    context_special_tokens: bool = setting(False, "keep the text of special tokens in sampled contexts, as published")
    context_gaps: float = setting(
        0.0, "share of the prompt's words that each context's row leaves out, so that less hangs on the wording"
    )
    context_asides: bool = setting(
        True, "in every second context, let the text of another one stand in brackets behind the subject"
    )
    context_keys: ContextKeys = setting(
        "with_subject",
        "keys that are solved for: each context's and those of the subject alone behind it, each context's, or, as "
        "published, their mean",
    )

    # Projection and update
    projection: Projection = setting("hard", "which filter of the key spectrum protects the model's knowledge")
    threshold_rule: ThresholdRule = setting("energy", "how the null space of a hard projection is bounded")
    energy_share: float = setting(
        0.30,
        "share of the key energy, massive activations apart, that the editable null space may hold (rule 'energy')",
    )
    absolute_threshold: float = setting(2e-2, "largest eigenvalue counted as null space (rule 'absolute')")
    soft_weight: float = setting(100.0, "weight alpha of the second moment in a soft constraint")
    l2: float = setting(1.0, "ridge term lambda of the update")
    use_history: bool = setting(True, "protect the keys of earlier batches")
    history_weight: float = setting(
        1.0, "how much a change at an earlier key counts beside one at a new key; raise it with l2, which weakens both"
    )

    # Second moments
    tokens_per_dimension: int = setting(10, "corpus tokens for each dimension of the key")
    sequence_length: int = setting(512, "tokens of one packed corpus sequence")
    corpus: str | None = setting(
        None, "identity of the text that was used; filled in, so that later edits use the same"
    )
    corpus_tokens: int | None = setting(None, "tokens of that text that were asked for; filled in")

    cache_targets: bool = setting(True, "keep computed targets on disk, keyed by everything they depend on")
    source: str = setting("defaults", "where these settings come from")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _checked(item.name, getattr(self, item.name), hints[item.name]))
        _require(
            self.layers is None or len(set(self.layers)) == len(self.layers) > 0, "layers", self.layers, "distinct"
        )
        _require(self.layers is None or tuple(sorted(self.layers)) == self.layers, "layers", self.layers, "ascending")
        _require(self.target_module is None or self.target_module.count("{}") == 1, "target_module",
                 self.target_module, "a path with exactly one {} for the layer")  # fmt: skip
        counts = "value_steps", "contexts_per_word", "context_length", "tokens_per_dimension", "sequence_length"
        for name in counts:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "clamp_factor", "l2", "history_weight", "soft_weight", "absolute_threshold"):
            _require(0 < getattr(self, name) < float("inf"), name, getattr(self, name), "positive and finite")
        for name in ("kl_factor", "weight_decay", "stop_loss"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "zero or more, and finite")
        _require(all(0 <= beta < 1 for beta in self.adam_betas), "adam_betas", self.adam_betas, "from 0 to below 1")
        _require(0 < self.energy_share < 1, "energy_share", self.energy_share, "between 0 and 1")
        _require(0 <= self.context_gaps < 1, "context_gaps", self.context_gaps, "from 0 to below 1")
        for template in self.context_templates or ():
            _require(template.count("{}") == 1, "context_templates", template, "a text with exactly one {}")

    def replace(self, **changes: Any) -> AlphaEditConfig:
        """A copy with some settings changed.

        Args:
            changes: field names and their new values.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type or out of range.
        """
        return type(self).from_dict({**self.to_dict(), **changes}, strict=True)

    def paper(self) -> AlphaEditConfig:
        """The published procedure, step for step, on this config's layers and learning rate.

        25 forward passes of all contexts, Adam's usual betas, absolute threshold 2e-2, L2 10, hard projection, all
        rows in the model's dtype, special tokens kept in the sampled contexts, 100 tokens per dimension. Source: the
        AlphaEdit paper (ICLR 2025), sections 3 and 4, and its first code release.
        """
        return self.replace(
            projection="hard", threshold_rule="absolute", absolute_threshold=2e-2, l2=10.0, use_history=True,
            history_weight=1.0, value_steps=25, adam_betas=(0.9, 0.999), clamp_factor=0.75, kl_factor=0.0625,
            weight_decay=0.5, stop_loss=5e-2, stop_at_argmax=False, contexts_in_turn=False, forward_dtype="model",
            context_templates=None, contexts_per_word=1, context_length=10, context_special_tokens=True,
            context_gaps=0.0, context_asides=False, context_keys="mean", tokens_per_dimension=100,
            source=f"paper mode of: {self.source}",
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; tuples become lists."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, strict: bool = False) -> AlphaEditConfig:
        """The inverse of `to_dict`.

        Args:
            values: field names and plain JSON values; `format_version` may be among them. Not changed.
            strict: refuse unknown names in any case. Otherwise those in a file of a newer format are dropped with a
                warning.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type or out of range.
        """
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown and (strict or version <= FORMAT_VERSION):
            raise ConfigError(f"unknown setting(s) {unknown}; the known ones are {sorted(known)}")
        if unknown:
            logger.warning(
                "settings %s were written by a newer hf_alphaedit and are ignored; upgrade to use them", unknown
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `alphaedit_config.json` and return its path.

        Args:
            directory: is made if it doesn't exist.
        """
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format_version": FORMAT_VERSION, **self.to_dict()}, indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_json_file(cls, path: str | Path) -> AlphaEditConfig:
        """Read what `save_pretrained` wrote.

        Args:
            path: the file, or a directory that holds `alphaedit_config.json`.

        Raises:
            ConfigError: the file is no JSON object, or holds unusable settings.
            OSError: it can't be read.
        """
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON ({error}); write it with save_pretrained") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not an object of settings")
        return cls.from_dict(values)


def _require(condition: bool, name: str, value: Any, requirement: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r} must be {requirement}")


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (lists to tuples, int to float), or `ConfigError`."""
    if get_origin(hint) is Literal:
        _require(value in get_args(hint), name, value, f"one of {get_args(hint)}")
        return value
    options = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    if get_origin(wanted) is tuple:
        item = get_args(wanted)[0]
        _require(isinstance(value, (list, tuple)), name, value, f"a sequence of {item.__name__}")
        length = len(get_args(wanted))
        _require(get_args(wanted)[-1] is Ellipsis or len(value) == length, name, value, f"{length} values")
        return tuple(_checked(name, element, item) for element in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)), name, value,
             f"of type {wanted.__name__}")  # fmt: skip
    return value
