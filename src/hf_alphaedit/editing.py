"""One batch of edits, as in section 3 of the paper: targets, then layer by layer keys, residual, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_alphaedit.algorithm.nullspace import BlockFilter, KeyFilter
from hf_alphaedit.algorithm.update import LowRankUpdate, solve_update, spread_residual
from hf_alphaedit.batches import Batch
from hf_alphaedit.chunks import WALK_CHUNK
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.contexts import encode_requests
from hf_alphaedit.errors import EditingError
from hf_alphaedit.history import History
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import EncodedRequest, TokenRow
from hf_alphaedit.models.walk import KeyWalk, beginnings_can_be_shared
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.targets import Targets, compute_targets


@dataclass
class Stopwatch:
    """Seconds spent in each phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measuring(self, phase: str) -> Iterator[None]:
        """Add the time that the block takes to `phase`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


@dataclass(frozen=True)
class EditedBatch:
    """A batch and what was seen while it was computed.

    Attributes:
        batch: what goes into the history.
        targets: result of the target search.
        missing: (n,) share of each request's residual that the edited model still lacks at the last layer.
        kept_energy: site -> (n,) share of each key's energy that the filter lets through, ‖Pk‖²/‖k‖² for a projection.
    """

    batch: Batch
    targets: Targets
    missing: Tensor
    kept_energy: Mapping[str, Tensor]


def edit_batch(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    filters: Mapping[str, KeyFilter],
    history: History,
    config: AlphaEditConfig,
    watch: Stopwatch,
    compute: Callable[[Sequence[EncodedRequest], int], Targets] | None = None,
) -> EditedBatch:
    """Compute one batch and write it to the model, layer after layer in ascending order.

    Later layers see the update of earlier ones. The history is read, not changed: the caller appends the batch, or
    restores the weights if anything fails.

    Args:
        architecture: of the model, whose weights at the edited sites are changed in place.
        tokenizer: its tokenizer.
        requests: n requests.
        contexts: templates with one {} each, beside the bare prompt.
        filters: site name -> filter of the key spectrum.
        history: the earlier batches, whose keys are protected and whose deltas stay in the weights.
        config: the settings, layers included.
        watch: gets the seconds of each phase.
        compute: the target search, (encoded requests, layer) -> targets; None is `compute_targets`.

    Raises:
        EditingError: a key, target or update is not finite, or a subject goes only to experts that can't be edited.
    """
    with watch.measuring("encoding"):
        encoded = encode_requests(tokenizer, requests, contexts, config)
    keys_of: dict[str, Tensor] = {}
    updates: dict[str, LowRankUpdate] = {}
    kept_energy: dict[str, Tensor] = {}
    steps = torch.zeros(len(requests), dtype=torch.int64)
    walk = BatchWalk(architecture, encoded, config.layers or ())
    for layers in layer_groups(architecture, config.layers or ()):
        with watch.measuring("targets"):
            if compute is None:
                targets = compute_targets(architecture, encoded, layers[-1], config)
            else:
                targets = compute(encoded, layers[-1])
            _require_finite(targets.values, "targets", requests)
            steps += targets.steps
        for position, layer in enumerate(layers):
            site = architecture.site(layer)
            with watch.measuring("keys"):
                in_contexts, current = walk.advance(layer, layers[-1])  # (n, c, d), (n, h)
                keys = over_contexts(in_contexts, walk.weights)  # (n, d)
                _require_finite(keys, f"keys of {site.name}", requests)
            with watch.measuring("solve"):
                residual = spread_residual(targets.values.to(current.device), current, len(layers) - position)
                residual = residual / architecture.scale  # (n, h)
                spectral_filter = filters[site.name].to(keys.device)
                filtered = spectral_filter.root(keys)  # (n, d)
                _require_open(filtered, spectral_filter, site.name, requests)
                past = history.past_keys(site.name, requests) if config.use_history else None
                past = None if past is None else past.to(keys.device)
                columns = filtered if config.context_keys == "mean" else spectral_filter.root(in_contexts)
                weights = None if config.context_keys == "mean" else walk.weights
                update = solve_update(
                    columns, past, residual.to(keys.device), spectral_filter.root, weights, config.history_weight
                )
                _require_finite(update.inputs, f"update of {site.name}", requests)
                energy = filtered.square().sum(-1) * config.l2 / keys.square().sum(-1)  # (n,)
            keys_of[site.name], kept_energy[site.name] = filtered.cpu(), energy.cpu()
            updates[site.name] = LowRankUpdate(update.inputs.cpu(), update.outputs.cpu())
            with watch.measuring("write"):
                partial = Batch((), {}, {site.name: updates[site.name]})
                site.write_edits(history, [*history.batches, partial])
    with watch.measuring("keys"):
        final = walk.values(layers[-1])
    wanted = (targets.values - targets.initial).norm(dim=-1)  # (n,), zero where nothing was left to do
    lacking = (targets.values - final.cpu()).norm(dim=-1) / wanted.clamp_min(torch.finfo(wanted.dtype).tiny)
    lacking = torch.where(wanted > 0, lacking, 0.0)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    batch = Batch(tuple(requests), keys_of, updates, config.to_dict(), created)
    return EditedBatch(batch, replace(targets, steps=steps), lacking, kept_energy)


def layer_groups(architecture: Architecture, layers: Sequence[int]) -> list[Sequence[int]]:
    """The layers that share one target each.

    Where a down-projection adds to the residual stream, one target at the last layer is spread over all layers, as
    published. Where a norm comes in between, what one layer lacks can't be made up by another: each layer in turn has
    its own target at its down-projection's output, found with the layers below already edited, and takes what they
    left undone.
    """
    return [layers] if architecture.additive else [(layer,) for layer in layers]


class BatchWalk:
    """Keys in contexts, and current values on the bare prompt, layer after layer."""

    def __init__(self, architecture: Architecture, requests: Sequence[EncodedRequest], layers: Sequence[int]) -> None:
        """`layers` are those that the walk will visit, ascending."""
        self.weights = context_weights(len(requests[0].key_rows), len(requests[0].mentions))  # (c,)
        self.bare = _walks(architecture, [request.rows[0] for request in requests])
        # Rows of one context begin with the same tokens, whether the prompt follows or the subject alone.
        contexts = [
            (row, group, alone.subject)
            for one in requests
            for rows, alone in ((one.key_rows, one.rows[0]), (one.mentions, one.essence))
            for group, row in enumerate(rows)
        ]
        rows, groups = [row for row, _, _ in contexts], [group for _, group, _ in contexts]
        shared = bool(contexts) and beginnings_can_be_shared(architecture, rows, groups, layers)
        # Longest first, so that a chunk has little padding; `place` is where each row is then.
        order = sorted(range(len(contexts)), key=lambda index: -contexts[index][2])
        self.place = torch.tensor(order, dtype=torch.long).argsort()
        self.contexts = _walks(
            architecture, [rows[index] for index in order], [groups[index] for index in order] if shared else None
        )

    def advance(self, layer: int, value_layer: int) -> tuple[Tensor, Tensor]:
        """Keys (n, c, d) at `layer` and current values (n, h) of `value_layer` on the bare prompt, both float32.

        The keys are those of the bare prompt, of the `key_rows` in contexts, and of the mentions.
        """
        parts = [walk.advance(layer, value_layer) for walk in self.bare]
        keys = torch.cat([keys for keys, _ in parts]).float()[:, None]  # (n, 1, d)
        values = torch.cat([values for _, values in parts if values is not None]).float()  # (n, h)
        if self.contexts:
            in_contexts = torch.cat([walk.advance(layer, None)[0] for walk in self.contexts]).float()
            in_contexts = in_contexts[self.place.to(keys.device)].unflatten(0, (len(keys), -1))  # (n, c - 1, d)
            keys = torch.cat([keys, in_contexts], 1)
        return keys, values

    def values(self, layer: int) -> Tensor:
        """Current values (n, h) of `layer`, the last edited one, on the bare prompt, float32."""
        parts = [walk.advance(layer, layer)[1] for walk in self.bare]
        return torch.cat([values for values in parts if values is not None]).float()

    def entered(self) -> tuple[Tensor, float]:
        """Norms of the hidden states that entered the layer which `advance` was called for last.

        Returns:
            (n,) those at the prompts' subjects, and the median over all tokens of all rows.
        """
        subjects, everything = [], []
        for walk in (*self.bare, *self.contexts):
            norms = walk.entry.float().norm(dim=-1).cpu()  # (B, S)
            mask = walk.aligned.attention_mask[:, -norms.shape[1] :].bool().cpu()
            everything.append(norms[mask])
            subjects.append(norms[torch.arange(len(norms)), walk.aligned.subject.cpu()])
        return torch.cat(subjects[: len(self.bare)]), float(torch.cat(everything).median())


def _walks(architecture: Architecture, rows: Sequence[TokenRow], groups: Sequence[int] | None = None) -> list[KeyWalk]:
    """The rows in chunks that are bounded by tokens; each keeps its own stored hidden states."""
    size = max(1, WALK_CHUNK // max((row.subject + 1 for row in rows), default=1))
    return [
        KeyWalk(architecture, rows[start : start + size], groups and groups[start : start + size])
        for start in range(0, len(rows), size)
    ]


def context_weights(contexts: int, mentions: int = 0) -> Tensor:
    """(1 + contexts + mentions,) weights of one request's keys, with sum 1.

    The bare prompt, the prompt in contexts and the subject alone in contexts count the same, as far as they are there.
    Without mentions these are MEMIT's and AlphaEdit's two groups.
    """
    groups = [count for count in (1, contexts, mentions) if count]
    return torch.tensor([1 / (len(groups) * count) for count in groups for _ in range(count)])


def over_contexts(keys: Tensor, weights: Tensor) -> Tensor:
    """Keys (n, c, d) averaged with `weights` (c,): (n, d)."""
    return torch.einsum("c,ncd->nd", weights.to(keys), keys)


def _require_finite(values: Tensor, what: str, requests: Sequence[EditRequest]) -> None:
    finite = torch.isfinite(values).all(-1)  # (n,)
    if not finite.all():
        bad = [requests[index].subject for index in (~finite).nonzero()[:, 0].tolist()]
        raise EditingError(f"the {what} are not finite for {bad}; load the model in float32 or lower learning_rate")


def _require_open(filtered: Tensor, key_filter: KeyFilter, site: str, requests: Sequence[EditRequest]) -> None:
    shut = filtered.eq(0).all(-1)  # (n,)
    if isinstance(key_filter, BlockFilter) and shut.any():
        subjects = [requests[index].subject for index in shut.nonzero()[:, 0].tolist()]
        raise EditingError(
            f"{subjects} go only to experts of {site} that saw too few tokens to be edited; collect the statistics "
            "from more text (prepare(num_tokens=...))"
        )
