"""The command line: `hf-alphaedit COMMAND`, a thin layer over `AlphaEditor`."""

from __future__ import annotations

from hf_alphaedit.cli.app import app
from hf_alphaedit.cli.editing import edit, repair, stats, undo
from hf_alphaedit.cli.keeping import export, info, push
from hf_alphaedit.cli.measuring import check, evaluate, trace, tune


__all__ = ["app"]

for command in (edit, stats, check, evaluate, trace, tune, repair, undo, export, info, push):
    app.command()(command)
