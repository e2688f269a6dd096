"""MODEL and the options that load it, the same for every command that needs the model in memory."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import ConfigError


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

    Load = Callable[[], AlphaEditor]

Model = Annotated[str, typer.Argument(help="Hub id or directory; edits that were saved with it are continued.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Dtype = Annotated[str | None, typer.Option(help="Dtype to load the weights in, e.g. bfloat16; default: as stored.")]
DeviceMap = Annotated[str | None, typer.Option(help="Placement, e.g. auto, cpu or cuda:0; default: one device.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Config = Annotated[
    str | None,
    typer.Option(help="Preset, JSON file or directory with settings; default: as saved, or the model's preset."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one setting, e.g. l2=10 or layers=4,5,6. Repeatable."),
]
Paper = Annotated[bool, typer.Option("--paper", help="Follow the published procedure step for step.")]
SHARED = {
    "model": Model,
    "revision": Revision,
    "dtype": Dtype,
    "device_map": DeviceMap,
    "trust_remote_code": TrustRemoteCode,
    "config": Config,
    "settings": Settings,
    "paper": Paper,
}


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """The command with MODEL and the loading options before its own.

    Its first parameter becomes a function that loads the editor, so that a command can check its own options first:
    they cost nothing, and loading may take minutes.
    """

    @wraps(command)
    def with_model(
        model: str,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        trust_remote_code: bool = False,
        config: str | None = None,
        settings: list[str] | None = None,
        paper: bool = False,
        **own: Any,
    ) -> None:
        changes = parsed_settings(settings or [])
        given = {"revision": revision, "dtype": dtype, "device_map": device_map, "config": config}
        options = {name: value for name, value in given.items() if value is not None}
        load = partial(open_editor, model, changes, paper, trust_remote_code=trust_remote_code, **options)
        command(load, **own)

    # The annotations are looked up here, where their names are known, not where typer reads them.
    hints = {**get_type_hints(command, localns={"Load": Any}, include_extras=True), **SHARED}
    first, *shared = inspect.signature(with_model, follow_wrapped=False).parameters.values()
    own = list(inspect.signature(command).parameters.values())[1:]
    arguments = [item for item in own if item.kind is item.POSITIONAL_OR_KEYWORD]
    options = [item for item in own if item.kind is item.KEYWORD_ONLY]
    parameters = [item.replace(annotation=hints[item.name]) for item in (first, *arguments, *options, *shared[:-1])]
    with_model.__signature__ = inspect.Signature(parameters)  # ty: ignore[missing-attribute]
    with_model.__annotations__ = {item.name: item.annotation for item in parameters}
    return with_model


def open_editor(model: str, changes: dict[str, Any], paper: bool, **options: Any) -> AlphaEditor:
    """Load the model and its earlier edits, and change its settings."""
    from hf_alphaedit.editor import AlphaEditor

    editor = AlphaEditor.from_pretrained(model, **options)
    config = editor.config.paper() if paper else editor.config
    editor.reconfigure(config.replace(**changes))
    history = editor.history  # settings may have moved the edits to other layers, which an edited model can't follow
    history.check(
        base_fingerprint=history.base_fingerprint, tokenizer_fingerprint=history.tokenizer_fingerprint,
        sites=editor.sites(),
    )  # fmt: skip
    return editor


def parsed_settings(assignments: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as settings; lists may be written with commas.

    Raises:
        ConfigError: a text has no `=`, or there is no such setting.
    """
    known = AlphaEditConfig().to_dict()
    result = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--set {assignment!r} must be NAME=VALUE with one of the settings {sorted(known)}")
        value = parsed_value(text)
        several = "tuple" in AlphaEditConfig.__annotations__[name] and value is not None
        result[name] = [value] if several and not isinstance(value, list) else value
    return result


def parsed_value(text: str) -> Any:
    """A value as JSON, a list of them with commas between, or the text itself."""
    for candidate in (text, f"[{text}]" if "," in text else text):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return {"none": None, "None": None}.get(text, text)
