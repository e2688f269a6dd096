"""In which form a family's rows can be resumed with a delta, found out by trying."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from hf_alphaedit.errors import EditingError, UnsupportedModelError
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.beginnings import agree, most_shifted
from hf_alphaedit.models.encoding import EncodedRequest, TokenRow
from hf_alphaedit.models.forward import align_rows, resume_rows, whole_logits
from hf_alphaedit.models.packed import Group, PackedRows, resume_packed, sees_everything
from hf_alphaedit.models.rows import AlignedRows, RowForm, prediction_positions
from hf_alphaedit.target_rows import all_rows


logger = logging.getLogger(__name__)


def row_form(architecture: Architecture, requests: Sequence[EncodedRequest], layer: int) -> RowForm:
    """The fastest form in which rows give the logits of a whole pass when they are resumed at `layer`.

    Compared in the model's own dtype, on two rows of one context, or of one request, whose subjects end last and
    first: they are shifted against each other the most, which some families' positions can't stand.

    Raises:
        EditingError: the model's logits are not finite.
        UnsupportedModelError: no form gives the logits of the whole pass.
    """
    rows, groups = _most_different(requests)
    reference = whole_logits(architecture, rows)
    if not torch.isfinite(reference).all():
        raise EditingError("the model's logits are not finite; its weights are damaged, or need dtype='float32'")
    for cached, forms in (True, (RowForm.PACKED, RowForm.PADDED)), (False, (RowForm.WHOLE,)):
        aligned, _ = align_rows(architecture, rows, layer, cached=cached, groups=groups)
        for form in forms:
            if form is RowForm.PACKED and not _may_be_packed(architecture, requests, aligned):
                continue
            found = _resumed(architecture, aligned, rows, layer, form)
            if found is not None and agree(found, reference):
                return form
    raise UnsupportedModelError(
        f"{type(architecture.model).__name__} gives other logits when its blocks from "
        f"{architecture.resume_block(layer)} on run from stored hidden states; its blocks depend on more than that"
    )


def _most_different(requests: Sequence[EncodedRequest]) -> tuple[list[TokenRow], list[int]]:
    """Two rows and their groups: those whose subjects end last and first, of one context if there are two requests."""
    if len(requests) == 1:
        return most_shifted(all_rows(requests)), [0, 1]
    return most_shifted([request.rows[-1] for request in requests]), [0, 0]


def _may_be_packed(architecture: Architecture, requests: Sequence[EncodedRequest], aligned: AlignedRows) -> bool:
    """Whether two rows can tell: what has other states may mix a line's tokens, and some rows may pass a window."""
    return bool(aligned.attention_keys) and sees_everything(
        architecture, max(len(row.token_ids) for row in all_rows(requests))
    )


@torch.no_grad()
def _resumed(
    architecture: Architecture, aligned: AlignedRows, rows: Sequence[TokenRow], layer: int, form: RowForm
) -> Tensor | None:
    """The logits at the rows' predictions, resumed with a delta of zero; None if they can't be in this form."""
    nothing = torch.zeros(len(rows), architecture.hidden_size, device=aligned.subject.device)
    positions = prediction_positions(rows, aligned.subject)
    try:
        if form is RowForm.PACKED:
            packed = PackedRows.of([Group.of(aligned.select(torch.tensor([index]))) for index in range(len(rows))])
            return resume_packed(architecture, packed, layer, nothing, positions)
        return resume_rows(architecture, aligned, layer, nothing, positions)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        if should_reduce_batch_size(error):
            raise
        logger.info("%s can't resume rows %s (%s)", type(architecture.model).__name__, form.value, error)
        return None
