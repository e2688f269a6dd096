"""What `AlphaEditor.save_pretrained` writes: a plain checkpoint, and beside it what continues and undoes the edits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_alphaedit.card import write_card
from hf_alphaedit.errors import UnsupportedModelError
from hf_alphaedit.models.quantised import QuantisedSite
from hf_alphaedit.processes import Processes


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor


def save_editor(editor: AlphaEditor, directory: Path, *, include_requests: bool, **save_kwargs: Any) -> None:
    """Write the model, the tokenizer, `alphaedit_config.json`, `alphaedit_history.safetensors` and the card.

    The history is written last: a directory that holds one is complete.

    Args:
        editor: is not changed.
        directory: is made if it doesn't exist.
        include_requests: with False no text of a request is in any file.
        save_kwargs: passed to the model's `save_pretrained`.

    Raises:
        UnsupportedModelError: an edit is kept beside a quantised weight, where a checkpoint has no place for it.
    """
    require_checkpoint(editor, edited=bool(editor.history.batches))
    is_main = Processes.current().is_main
    editor.model.save_pretrained(directory, **save_kwargs)
    if is_main:
        editor.tokenizer.save_pretrained(directory)
        editor.config.save_pretrained(directory)
        write_card(editor, directory, include_requests=include_requests)
    editor.history.save(directory, include_requests=include_requests, is_main_process=is_main, sites=editor.sites())


def require_checkpoint(editor: AlphaEditor, *, edited: bool = True) -> None:
    """Raise `UnsupportedModelError` where the model can't be a plain checkpoint once it is edited."""
    beside = [site.name for site in editor.sites() if isinstance(site, QuantisedSite)]
    if beside and edited:
        raise UnsupportedModelError(
            f"the edits of {beside} are kept beside weights packed in 4 bits, which a checkpoint can't hold; write "
            "them as an adapter with export_lora, or as an edit pack with save_edits"
        )
