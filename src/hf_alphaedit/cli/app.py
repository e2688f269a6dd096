"""The application: its help, its errors and its output."""

from __future__ import annotations

import json
from typing import Any, Protocol

import typer
from typer.core import TyperGroup

from hf_alphaedit import __version__
from hf_alphaedit.errors import AlphaEditError, GateError


class Printable(Protocol):
    """A report: `str()` gives a table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        ...


class Commands(TyperGroup):
    """Prints the errors that a user can do something about as one line, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (AlphaEditError, OSError, ModuleNotFoundError) as error:
            if isinstance(error, GateError) and error.report is not None:
                typer.echo(str(error.report))
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="hf-alphaedit",
    help="Change facts in transformers language models with AlphaEdit, and keep a plain checkpoint.",
    epilog="The progress goes to standard error and the results to standard output.",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    """What can stand before a command."""


def show(report: Printable, as_json: bool) -> None:
    """Print a report to standard output, as a table or as JSON."""
    typer.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if as_json else str(report))
