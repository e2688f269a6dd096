"""The rows of the target search, run once and kept, and the loss of a delta on the rows whose turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_alphaedit.algorithm.objective import TargetLoss, target_loss
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import EncodedRequest, TokenRow
from hf_alphaedit.models.forward import align_rows, resume_rows
from hf_alphaedit.models.packed import Group, PackedRows, resume_packed
from hf_alphaedit.models.rows import AlignedRows, RowForm, prediction_positions


@dataclass(eq=False)
class StoredRows:
    """All rows of some requests, run once and ready to be resumed.

    Attributes:
        requests: n encoded requests.
        rows: their rows, request by request: the bare prompt, one per context, and '<subject> is a'.
        row_request: (B,) index of each row's request.
        row_place: (B,) index of each row among those of its request.
        aligned: the stored states of the rows.
        packed: whether steps run them without padding.
        initial: (n, h) float32, the values before the edit, from the bare rows.
        groups: rows made ready to be packed, by their places; see `group`.
    """

    requests: Sequence[EncodedRequest]
    rows: list[TokenRow]
    row_request: Tensor
    row_place: Tensor
    aligned: AlignedRows
    packed: bool
    initial: Tensor
    groups: dict[tuple[int, ...], tuple[Tensor, Group]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, architecture: Architecture, requests: Sequence[EncodedRequest], layer: int, form: RowForm
    ) -> StoredRows:
        """Run the rows once; `form` is how they are to be resumed (see `row_form`)."""
        rows = all_rows(requests)
        counts = torch.tensor([len(request.rows) + 1 for request in requests])
        row_request = torch.arange(len(requests)).repeat_interleave(counts)
        bare = counts.cumsum(0) - counts  # (n,)
        row_place = torch.arange(len(rows)) - bare[row_request]
        # Rows of one context begin with the same tokens.
        cached, groups = form is not RowForm.WHOLE, row_place.tolist()
        aligned, values = align_rows(architecture, rows, layer, cached=cached, groups=groups)
        initial = values[bare.to(values.device)].float()
        return cls(requests, rows, row_request, row_place, aligned, form is RowForm.PACKED, initial)

    def members(self, places: Sequence[int], active: Tensor) -> Tensor:
        """(b,) indices of the rows at these places of the requests `active` (m,)."""
        wanted = torch.isin(self.row_place, torch.tensor(places)) & torch.isin(self.row_request, active)  # (B,)
        return wanted.nonzero()[:, 0]

    def group(self, places: Sequence[int], members: Tensor) -> Group:
        """The rows `members`, all that are left at these places, ready to be packed; made once for all turns."""
        made = self.groups.get(tuple(places))
        if made is None or not torch.equal(made[0], members):
            made = self.groups[tuple(places)] = members, Group.of(self.aligned.select(members))
        return made[1]


def all_rows(requests: Sequence[EncodedRequest]) -> list[TokenRow]:
    """Every row of every request, '<subject> is a' last."""
    return [row for request in requests for row in (*request.rows, request.essence)]


def turns_of(contexts: int, in_turn: bool) -> list[list[int]]:
    """Which rows of a request each step looks at, by their places; the steps go round.

    Args:
        contexts: rows of a request, the bare prompt's included and '<subject> is a' not.
        in_turn: one context at a time, beside the bare prompt and '<subject> is a'; otherwise all rows at every step.
    """
    essence = contexts
    if not in_turn or contexts < 3:
        return [[*range(contexts), essence]]
    return [[0, context, essence] for context in range(1, contexts)]


def rows_per_step(request: EncodedRequest, config: AlphaEditConfig) -> int:
    """How many rows of a request one step of the search runs."""
    return len(turns_of(len(request.rows), config.contexts_in_turn)[0])


class RowLoss:
    """The loss of some requests as a function of delta, each time on the rows whose turn it is.

    The mean over all contexts is what is to be minimised. Going through them in turn gives the same targets within
    what the choice of contexts changes anyway (docs/results.md), for less than half of the work.
    """

    def __init__(
        self, architecture: Architecture, rows: StoredRows, layer: int, norm: Tensor, config: AlphaEditConfig
    ) -> None:
        """`rows` are those of requests with the same number of contexts; `norm` (n,) is that of their values."""
        self.architecture, self.layer, self.norm, self.config = architecture, layer, norm, config
        self.rows, self.places = rows, turns_of(len(rows.requests[0].rows), config.contexts_in_turn)
        self.turns: dict[int, _Turn] = {}  # made when it is their turn, without what is finished by then
        self.step = 0
        self.reference: Tensor | None = None

    def __call__(self, delta: Tensor, active: Tensor) -> TargetLoss:
        """Loss of the requests `active` (m,) with `delta` (m, h); what is left out once is left out for good."""
        index = self.step % len(self.places)
        self.step += 1
        if index not in self.turns:
            self.turns[index] = _Turn(self.rows, self.places[index], active.cpu())
        turn = self.turns[index]
        turn.keep(active)
        logits = turn.logits(self.architecture, self.layer, delta).to(delta.device)  # (p, vocabulary)
        token_logits, subject_logits = logits.split([len(turn.labels), len(active)])
        if self.reference is None:  # the first look is at a delta of zero
            self.reference = subject_logits.detach().float().log_softmax(-1)
        return target_loss(
            token_logits, turn.labels, turn.token_request, turn.token_weight, subject_logits,
            self.reference[active], delta, self.norm[active], self.config.kl_factor, self.config.weight_decay,
        )  # fmt: skip


class _Turn:
    """The rows of one turn, what they are to predict, and where; rows of finished requests are dropped."""

    def __init__(self, stored: StoredRows, places: Sequence[int], active: Tensor) -> None:
        """`places` are those of the turn's rows within their requests, which are `active` (m,)."""
        self.stored = stored
        # Where rows are packed, those alike in length together: bare prompts, prompts in contexts, '<subject> is a'.
        kinds = (places[:1], places[1:-1], places[-1:]) if stored.packed else (places,)
        self.kinds = [kind for kind in kinds if kind]
        self._take(active)

    def logits(self, architecture: Architecture, layer: int, delta: Tensor) -> Tensor:
        """Logits (p, vocabulary) at `positions`, with `delta` (m, h) of the requests that are left."""
        delta = delta[self.local_request]  # (b, h)
        if isinstance(self.resumed, PackedRows):
            return resume_packed(architecture, self.resumed, layer, delta, self.positions)
        return resume_rows(architecture, self.resumed, layer, delta, self.positions)

    def keep(self, active: Tensor) -> None:
        """Drop the rows of all requests but `active`."""
        if len(active) < len(self.active):
            self._take(active.cpu())

    def _take(self, active: Tensor) -> None:
        """The rows of the requests `active` (m,), kind by kind."""
        stored, self.active = self.stored, active
        parts = [stored.members(kind, active) for kind in self.kinds]
        members = torch.cat(parts)  # (b,)
        device, rows = stored.initial.device, [stored.rows[index] for index in members.tolist()]
        row_request = stored.row_request[members]  # (b,)
        local = {int(original): index for index, original in enumerate(active)}
        looks = row_request.bincount() - 1  # rows of each request that predict its target
        labels, token_request, token_weight, is_essence = [], [], [], []
        for row, original in zip(rows, row_request.tolist(), strict=True):
            request = stored.requests[original]
            essence = row is request.essence
            count = 1 if essence else len(request.target)
            labels += [0] if essence else request.target
            token_request += [local[original]] * count
            token_weight += [1 / (int(looks[original]) * count)] * count
            is_essence += [essence] * count
        if stored.packed:
            groups = [stored.group(kind, part) for kind, part in zip(self.kinds, parts, strict=True)]
            self.resumed = PackedRows.of(groups)
        else:  # all rows share the stored states instead of copying them
            self.resumed = stored.aligned if len(members) == len(stored.rows) else stored.aligned.select(members)
        # Positions of target tokens first, then one per request: splitting logits costs less than picking from them.
        essence = torch.tensor(is_essence, device=device)
        tokens = (~essence).nonzero()[:, 0]
        order = torch.cat([tokens, essence.nonzero()[:, 0]])
        row_index, columns = prediction_positions(rows, stored.aligned.subject[members.to(device)])
        self.positions = row_index[order], columns[order]
        self.labels = torch.tensor(labels, device=device)[tokens]
        self.token_request = torch.tensor(token_request, device=device)[tokens]
        self.token_weight = torch.tensor(token_weight, device=device)[tokens]
        self.local_request = torch.tensor([local[original] for original in row_request.tolist()], device=device)
