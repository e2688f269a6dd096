"""Write settings.md from the help that `AlphaEditConfig` and the presets carry: python docs/settings.py"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.presets import presets


OUTPUT = Path(__file__).with_name("settings.md")

PAGE = """# Settings

Written by `python docs/settings.py` from the help in `src/hf_alphaedit/config.py` and from the presets in `configs/`.

`AlphaEditor(..., config=...)` takes an `AlphaEditConfig`, a mapping, a preset's name, or a JSON file. Without one,
the preset is found by the shape of the model; if there is none, the layers are derived from the depth, and a
warning says so. On the command line it is `--config`, and `--set NAME=VALUE` changes a single setting. `paper()` on a
config, or `--paper`, gives the published procedure on its layers and with its learning rate. `hf-alphaedit tune`
searches settings for a model by measurement.

| setting | type | default | in `paper()` | meaning |
| --- | --- | --- | --- | --- |
{settings}

## Presets

"Verified" means that this project measured them, with the command given. "Published" means that they were taken from
the named source and not measured here. A preset for many edits is only taken by its name (`config="..."`,
`--config ...`).

| preset | status | source | settings |
| --- | --- | --- | --- |
{presets}
"""


def page() -> str:
    """The text of settings.md."""
    default, paper = AlphaEditConfig(), AlphaEditConfig().paper()
    hints, settings = get_type_hints(AlphaEditConfig), []
    for item in dataclasses.fields(AlphaEditConfig):
        values = [f"`{getattr(config, item.name)!r}`" for config in (default, paper)]
        changed = values[1] if values[1] != values[0] else ""
        kind = _type_name(hints[item.name], str(item.type))
        settings.append(_row(f"`{item.name}`", kind, values[0], changed, item.metadata["help"]))
    rows = [
        _row(f"`{preset.name}`", preset.status, preset.source,
             ", ".join(f"{name} {_plain(value)}" for name, value in preset.settings.items()))
        for preset in presets()
    ]  # fmt: skip
    return PAGE.format(settings="\n".join(settings), presets="\n".join(rows))


def _type_name(hint: Any, written: str) -> str:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return ", ".join(f"`{choice!r}`" for choice in choices) or f"`{written}`"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    OUTPUT.write_text(page(), encoding="utf-8")
