"""Make edits again that the model no longer says, in place of the earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_alphaedit.batches import requests_in_force
from hf_alphaedit.errors import ConfigError, StateError
from hf_alphaedit.evaluation.scoring import score
from hf_alphaedit.report import EditReport
from hf_alphaedit.requests import EditRequest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor


def lost_edits(editor: AlphaEditor) -> list[EditRequest]:
    """The edits that the model doesn't predict token by token: faded since, or never made whole.

    Asked are the requests' own prompts, in memory only; each once, as it was asked for last.

    Returns:
        The requests, oldest first.

    Raises:
        StateError: the text of an edit was withheld from the file that the history was read from.
    """
    batches = editor.history.batches
    if withheld := sum(batch.withheld for batch in batches):
        raise StateError(
            f"the texts of {withheld} edits were withheld from the file, so the model can't be asked them"
        )
    requests = requests_in_force(batches)
    results = score(editor.model, editor.tokenizer, [(request.text, request.target_new) for request in requests])
    return [request for request, result in zip(requests, results, strict=True) if not result.exact]


def repair(editor: AlphaEditor, *, rounds: int = 1, **options: Any) -> list[EditReport]:
    """Edit again what is lost, until nothing is or `rounds` are over; each round is a call of `apply_edits`.

    A soft constraint or a large ridge makes an edit in part, and later ones take some of it away. Where that was too
    much, a second edit supplies what is missing, which does less to the model than making every edit stronger from the
    start (docs/results.md).

    Args:
        editor: its weights and history are changed.
        rounds: at most so many.
        options: of `AlphaEditor.apply_edits`.

    Returns:
        The reports of the rounds that were needed.

    Raises:
        ConfigError: `rounds` is less than 1.
        StateError: as `lost_edits`.
    """
    if rounds < 1:
        raise ConfigError(f"rounds={rounds} must be at least 1")
    reports = []
    while len(reports) < rounds and (lost := lost_edits(editor)):
        reports.append(editor.apply_edits(lost, **options))
    return reports
