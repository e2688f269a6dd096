"""Settings shipped for known models, found by the model's shape rather than its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import ConfigError


logger = logging.getLogger(__name__)

DERIVED_LAYERS = 5


@dataclass(frozen=True)
class Preset:
    """Settings for one model.

    Attributes:
        name: file name without its ending.
        status: 'verified' (measured by this project), 'published' (taken from a source, not measured here) or 'tuned'
            (found by `tune`).
        source: the command that verified them, or where they were published.
        models: Hub ids they are meant for.
        shape: entries of the model's text config that must be equal for the preset to apply by itself; empty for one
            that is only taken by its name.
        settings: fields of `AlphaEditConfig`.
        evidence: what was measured with them, where `tune` found them.
    """

    name: str
    status: str
    source: str
    models: tuple[str, ...]
    shape: Mapping[str, Any]
    settings: Mapping[str, Any]
    evidence: Mapping[str, Any] | None = None

    def config(self) -> AlphaEditConfig:
        """The settings as an `AlphaEditConfig`."""
        return AlphaEditConfig.from_dict(
            {**self.settings, "source": f"preset {self.name}, {self.status}"}, strict=True
        )


def presets() -> list[Preset]:
    """All shipped presets, by name."""
    folder = files("hf_alphaedit") / "configs"
    found = []
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json"):
            found.append(_preset(file.name, json.loads(file.read_text(encoding="utf-8"))))
    return found


def config_for(
    model: PreTrainedModel, config: AlphaEditConfig | Mapping[str, Any] | str | Path | None = None
) -> AlphaEditConfig:
    """The settings for `model`, with `layers` filled in.

    Args:
        model: its config's shape decides where nothing else does.
        config: settings, a mapping of them, a preset's name, the path of a JSON file or of a folder with one; None
            takes the preset for the model's shape, else derives the layers from its depth and says so in the log.

    Raises:
        ConfigError: there is no such preset or file, or it holds unusable settings.
    """
    if isinstance(config, AlphaEditConfig):
        chosen = config
    elif isinstance(config, Mapping):
        chosen = AlphaEditConfig.from_dict(dict(config), strict=True)
    elif config is not None:
        chosen = _named(config)
    else:
        text_config = model.config.get_text_config(decoder=True)
        matching = [
            preset
            for preset in presets()
            if preset.shape and all(getattr(text_config, name, None) == value for name, value in preset.shape.items())
        ]
        chosen = matching[0].config() if matching else AlphaEditConfig()
    if chosen.layers is None:
        layers = derived_layers(model.config.get_text_config(decoder=True).num_hidden_layers)
        logger.warning("no preset fits this model; layers %s are derived from its depth, not measured", list(layers))
        chosen = chosen.replace(layers=layers, source=f"{chosen.source}; layers derived from the depth")
    return chosen


def derived_layers(depth: int) -> tuple[int, ...]:
    """Up to five layers from a sixth of the depth on, where the published choices lie."""
    first = min(depth // 6, max(depth - 1, 0))
    count = max(1, min(DERIVED_LAYERS, depth // 3))
    return tuple(range(first, min(first + count, depth)))


def _named(config: str | Path) -> AlphaEditConfig:
    known = {preset.name: preset for preset in presets()}
    if str(config) in known:
        return known[str(config)].config()
    if Path(config).is_file() and (preset := _read_preset(Path(config))):
        return preset.config()
    if Path(config).exists():
        return AlphaEditConfig.from_json_file(config)
    raise ConfigError(f"config={str(config)!r} is neither a file nor a preset; the presets are {sorted(known)}")


def _preset(file_name: str, values: dict[str, Any]) -> Preset:
    fields: dict[str, Any] = {**values, "name": file_name.removesuffix(".json"), "models": tuple(values["models"])}
    return Preset(**fields)


def _read_preset(path: Path) -> Preset | None:
    """The preset in a file that `tune` wrote; None if the file is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return _preset(path.name, values) if isinstance(values, dict) and "settings" in values else None
