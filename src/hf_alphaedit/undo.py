"""Take edits back: whole batches bit for bit, single edits by solving again or by editing again from the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from hf_alphaedit.algorithm.update import solve_update
from hf_alphaedit.batches import Batch, past_keys
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import StateError
from hf_alphaedit.requests import EditRequest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

Root = Callable[[Tensor], Tensor]  # k -> F^½ k on rows

# The settings that decide the filter of the key spectrum and with it F^½.
FILTER_SETTINGS = ("projection", "threshold_rule", "energy_share", "absolute_threshold", "soft_weight", "l2")


def undo(editor: AlphaEditor, batches: int = 1) -> None:
    """Take back the last `batches` batches. The weights are then what they were before them, bit for bit.

    Raises:
        StateError: `batches` is less than 1, or more than there are.
    """
    done = len(editor.history.batches)
    if not 1 <= batches <= done:
        raise StateError(f"can't undo {batches} batches: there are {done}")
    editor.write_batches(editor.history.batches[: done - batches])


def undo_all(editor: AlphaEditor) -> None:
    """Take back everything: the weights are then the base model's, bit for bit."""
    editor.write_batches([])


def remove(editor: AlphaEditor, which: EditRequest | int, *, replay: bool = False) -> None:
    """Take out one edit and keep all others.

    Without `replay`, its batch and all later ones are solved again from the stored keys and residuals without it.
    What is exact: each weight's update is the solution of the paper's equation 14 for the keys and residuals that
    are left, and after removing the last edit the base model is back bit for bit. What is not: the keys and
    residuals of the remaining edits were measured while the removed one was in place (in later layers and later
    batches), and they are kept as they are; and only the mean of an edit's keys over its contexts is stored, so
    batches that were solved for each of them (`context_keys` other than "mean") are solved for the means. The
    difference is small where the edits have little to do with each other.

    With `replay`, the remaining requests are edited again from the base model, batch by batch, with the settings of
    each batch: the result is that of never having asked for the removed one.

    Args:
        editor: its weights and history are changed; on any failure both are as before.
        which: the request, or its index among all edits (negative counts from the end).
        replay: edit again instead of solving again.

    Raises:
        StateError: there is no such edit or several, or what is needed to solve or replay isn't stored.
    """
    number, row = _locate(editor.history.batches, which)
    if replay:
        _replay_without(editor, number, row)
    else:
        editor.write_batches(_resolved_without(editor, number, row))


def _locate(batches: Sequence[Batch], which: EditRequest | int) -> tuple[int, int]:
    """The batch, and the place in it, of one edit."""
    places = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch))]
    if isinstance(which, int):
        if not -len(places) <= which < len(places):
            raise StateError(f"there is no edit {which}: {len(places)} edits have been made")
        return places[which]
    known = [(number, row, r) for number, batch in enumerate(batches) for row, r in enumerate(batch.requests)]
    found = [places.index((number, row)) for number, row, request in known if request == which]
    if len(found) == 1:
        return places[found[0]]
    if found:
        raise StateError(f"{which} was edited {len(found)} times; give one of the indices {found}")
    withheld = sum(batch.withheld for batch in batches)
    hint = f"; the texts of {withheld} edits were withheld: give the index" if withheld else ""
    raise StateError(f"{which} is not among the {len(places)} edits{hint}")


def without_row(batch: Batch, row: int) -> Batch | None:
    """The batch without one of its requests; None if none is left. The factors are left for a new solve."""
    if len(batch) == 1:
        return None
    keep = [index for index in range(len(batch)) if index != row]

    def kept(values: tuple) -> tuple:
        return tuple(values[index] for index in keep) if values else ()

    return replace(
        batch,
        requests=kept(batch.requests),
        outcomes=kept(batch.outcomes),
        withheld=batch.withheld - 1 if batch.withheld else 0,
        keys={site: keys[keep] for site, keys in batch.keys.items()},
        updates={
            site: replace(u, inputs=u.inputs[keep], outputs=u.outputs[keep]) for site, u in batch.updates.items()
        },
    )


def solved_again(batch: Batch, earlier: Sequence[Batch], roots: Mapping[str, Root]) -> Batch:
    """The batch with its updates solved anew from its keys and residuals, after the batches `earlier`."""
    updates = {}
    for site, update in batch.updates.items():
        past = past_keys(earlier, site, batch.requests) if batch.settings.get("use_history", True) else None
        updates[site] = solve_update(
            batch.keys[site], past, update.outputs, roots[site], past_weight=batch.settings.get("history_weight", 1.0)
        )
    return replace(batch, updates=updates)


def _resolved_without(editor: AlphaEditor, number: int, row: int) -> list[Batch]:
    batches = editor.history.batches
    settings = editor.config.to_dict()
    for index, batch in enumerate(batches[number:], start=number):
        different = [name for name in FILTER_SETTINGS if batch.settings.get(name, settings[name]) != settings[name]]
        if different:
            raise StateError(
                f"batch {index} was solved with other settings of {different} than the editor has now; "
                "set them as they were, or remove with replay=True"
            )
        rows = {len(update.inputs) for update in batch.updates.values()} | {len(keys) for keys in batch.keys.values()}
        if set(batch.keys) != set(batch.updates) or rows != {len(batch)}:
            raise StateError(
                f"batch {index} has no key for each of its edits at each site (a pack without keys, or experts that "
                "share edits), so it can't be solved again; remove with replay=True"
            )
    kept = list(batches[:number])
    roots = {name: spectral_filter.root for name, spectral_filter in editor.filters().items()}
    for batch in [without_row(batches[number], row), *batches[number + 1 :]]:
        if batch is not None:
            kept.append(solved_again(batch, kept, roots))
    return kept


def _replay_without(editor: AlphaEditor, number: int, row: int) -> None:
    before, config = list(editor.history.batches), editor.config
    withheld = [index for index, batch in enumerate(before) if batch.withheld]
    if withheld:
        raise StateError(f"the requests of batches {withheld} were withheld from the file, so they can't be replayed")
    remaining = [without_row(batch, row) if index == number else batch for index, batch in enumerate(before)]
    try:
        editor.write_batches([])
        for batch in remaining:
            if batch is not None:
                editor.reconfigure(AlphaEditConfig.from_dict(dict(batch.settings)))
                editor.apply_edits(batch.requests, preflight=False)
    except BaseException:
        editor.write_batches(before)
        raise
    finally:
        editor.reconfigure(config)
