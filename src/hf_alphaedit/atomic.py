"""The weights as a function of the history, and blocks that leave them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor


def write_weights(editor: AlphaEditor) -> None:
    """Give every site the weight that follows from the history."""
    for site in editor.sites():
        if site.name in editor.history.base_weights:
            site.write(editor.history.weight(site.name, device=site.device))


@contextmanager
def all_or_nothing(editor: AlphaEditor) -> Iterator[None]:
    """Put weights and history back as they were if the block fails, whatever the reason.

    That is possible because a weight is computed from the base weight and the history, not from the weight before.
    """
    history = editor.history
    batches, contexts, known = list(history.batches), history.contexts, set(history.base_weights)
    history.remember_base(editor.sites())
    try:
        yield
    except BaseException:
        history.batches[:], history.contexts = batches, contexts
        write_weights(editor)
        for name in set(history.base_weights) - known:
            del history.base_weights[name]
        raise


@contextmanager
def unedited(editor: AlphaEditor) -> Iterator[None]:
    """The base model's weights inside the block; the edited ones again on exit."""
    batches = list(editor.history.batches)
    try:
        if batches:
            editor.write_batches([])
        yield
    finally:
        if batches:
            editor.write_batches(batches)
