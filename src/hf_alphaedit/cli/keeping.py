"""Commands about what is kept: saved edits, other forms of them, what a directory holds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_alphaedit.cli.app import show
from hf_alphaedit.cli.loading import loads_model
from hf_alphaedit.errors import StateError


if TYPE_CHECKING:
    from hf_alphaedit.cli.loading import Load
    from hf_alphaedit.editor import AlphaEditor
    from hf_alphaedit.history import History


class Form(StrEnum):
    """What `export` can write."""

    LORA = "lora"
    PACK = "pack"
    CHECKPOINT = "checkpoint"


class Engine(StrEnum):
    """Programs that run LoRA adapters of fixed ranks only."""

    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"


Withhold = Annotated[bool, typer.Option("--withhold-requests", help="Write no text of a request into any file.")]


def save(editor: AlphaEditor, directory: Path, *, include_requests: bool) -> None:
    """Save an editor, also over the files that its model was loaded from.

    Those may still be mapped into memory, so new files are written beside them and then put in their place.
    """
    if not directory.exists():
        editor.save_pretrained(directory, include_requests=include_requests)
        return
    from hf_alphaedit.card import CARD_NAME

    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
        staging = Path(temporary) / directory.resolve().name  # the card's code loads from this name
        staging.mkdir()
        if (directory / CARD_NAME).is_file():
            shutil.copy(directory / CARD_NAME, staging)  # what people wrote in it stays
        editor.save_pretrained(staging, include_requests=include_requests)
        # The history comes last: with it the directory is complete.
        for file in sorted(staging.iterdir(), key=lambda path: path.name.startswith("alphaedit")):
            os.replace(file, directory / file.name)


@loads_model
def export(
    load: Load,
    directory: Annotated[Path, typer.Argument(help="Where to write.")],
    *,
    form: Annotated[Form, typer.Option("--as", help="LoRA adapter for PEFT, pack of edits, or whole checkpoint.")],
    max_rank: Annotated[int | None, typer.Option(min=1, help="LoRA: cut to this rank, and report the error.")] = None,
    engine: Annotated[
        Engine | None, typer.Option("--for", help="LoRA: pad the rank to one that this program takes.")
    ] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Pack: keys too, so that later edits leave these alone.")
    ] = False,
    withhold_requests: Withhold = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write the edits of a saved model in another form."""
    editor = load()
    if form is Form.LORA:
        from hf_alphaedit.lora import VLLM_RANKS

        ranks = {None: None, Engine.VLLM: VLLM_RANKS, Engine.LLAMA_CPP: range(1, 1 + len(editor.history))}[engine]
        show(editor.export_lora(directory, max_rank=max_rank, allowed_ranks=ranks), json)
    elif form is Form.PACK:
        show(editor.save_edits(directory, include_requests=not withhold_requests, include_keys=keys), json)
    else:
        save(editor, directory, include_requests=not withhold_requests)


@loads_model
def push(
    load: Load,
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, made if it doesn't exist.")],
    *,
    private: Annotated[bool | None, typer.Option(help="For a new repository.")] = None,
    to_revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Default: says how many facts were edited.")] = None,
    withhold_requests: Withhold = False,
) -> None:
    """Upload a saved edited model to the Hub, with a model card made from its history."""
    address = load().push_to_hub(
        repo_id,
        private=private,
        revision=to_revision,
        create_pr=create_pr,
        commit_message=commit_message,
        include_requests=not withhold_requests,
    )
    typer.echo(address)


@dataclass(frozen=True)
class Contents:
    """The edits in a directory or repository: where they come from and, batch by batch, what they are."""

    base_model: str | None
    base_revision: str | None
    batches: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**vars(self), "batches": list(self.batches)}

    def __str__(self) -> str:
        revision = f" at {self.base_revision}" if self.base_revision else ""
        edits = sum(batch["edits"] for batch in self.batches)
        lines = [f"{edits} edits in {len(self.batches)} batches of {self.base_model or 'an unnamed model'}{revision}"]
        index = 0
        for number, batch in enumerate(self.batches):
            lines.append(f"batch {number}: {batch['edits']} edits, {batch['created']}, {', '.join(batch['sites'])}")
            for place, request in enumerate(batch["requests"]):
                text = request["prompt"].replace("{}", request["subject"])
                later = "" if place in batch["in_force"] else " (made again later)"
                lines.append(f"  {index}: {text} → {request['target_new']}{later}")
                index += 1
            if batch["withheld"]:
                lines.append(f"  {index} to {index + batch['withheld'] - 1}: texts withheld")
                index += batch["withheld"]
        return "\n".join(lines)


def info(
    model: Annotated[str, typer.Argument(help="Directory or Hub repository with edits, or with a pack of them.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, settings included, instead of text.")] = False,
) -> None:
    """Show which edits a directory or repository holds, without loading the model."""
    from hf_alphaedit.history import HISTORY_NAME, History
    from hf_alphaedit.pack import PACK_NAME, read_pack
    from hf_alphaedit.repository import local_copy

    hub = {} if revision is None else {"revision": revision}
    if (path := local_copy(model, HISTORY_NAME, **hub)) is not None:
        history = History.load(path)
    elif (path := local_copy(model, PACK_NAME, **hub)) is not None:
        history, _ = read_pack(path)
    else:
        raise StateError(f"{model} holds neither {HISTORY_NAME} nor {PACK_NAME}: it has no edits of this library")
    show(_contents(history), json)


def _contents(history: History) -> Contents:
    from hf_alphaedit.batches import in_force

    batches = tuple(
        {
            "edits": len(batch),
            "created": batch.created,
            "sites": sorted(batch.updates),
            "requests": [request.to_dict() for request in batch.requests],
            "withheld": batch.withheld,
            "in_force": places,
            "settings": dict(batch.settings),
        }
        for batch, places in zip(history.batches, in_force(history.batches), strict=True)
    )
    return Contents(history.base_model, history.base_revision, batches)
