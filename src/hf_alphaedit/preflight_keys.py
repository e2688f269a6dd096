"""Problems that show in how the keys of requests lie: to each other, to earlier ones, and to the room that is left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_alphaedit.batches import count_facts, in_force
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.contexts import encode_requests
from hf_alphaedit.editing import BatchWalk, over_contexts
from hf_alphaedit.errors import EditingError
from hf_alphaedit.estimates import editing_memory, editing_seconds
from hf_alphaedit.history import History
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.preflight_report import PreflightReport
from hf_alphaedit.requests import EditRequest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

# Cosine of two filtered keys from which on an edit is likely to disturb the other one.
SIMILAR = 0.9
# Norm of a hidden state, as a multiple of the usual one, from which on it is a massive activation.
MASSIVE = 10.0
# Share of the null space's directions that edits may use before it counts as filling up.
FULL = 0.5


def check_keys(
    editor: AlphaEditor,
    requests: Sequence[EditRequest],
    report: PreflightReport,
    *,
    similarity: float = SIMILAR,
) -> PreflightReport:
    """The report with how near the keys are to each other and to earlier ones, what room is left, and what it takes.

    Keys are those of the last edited layer, which takes the largest part of an edit, on the bare prompt and in the
    first context alone: more contexts move a cosine by some hundredths and take three times as long. What the batch
    itself will change below is not in them yet. (In the lowest layers, keys say little more than which token ends the
    subject.) Compared are filtered keys, which the update is solved for: an update at one of them moves the other's
    value by their cosine, unless the solve takes both into account, at the price of a larger norm. Source: the keys'
    Gram matrix in the update (paper, equation 14).
    """
    history, config = editor.history, editor.config
    site = editor.sites()[-1]
    contexts = history.contexts or config.context_templates or ()
    encoded = encode_requests(editor.tokenizer, requests, contexts, config)
    looked_at = [replace(one, rows=one.rows[:2], mentions=one.mentions[:1]) for one in encoded]
    with inference_state(editor.model):
        walk = BatchWalk(editor.architecture, looked_at, [site.layer])
        began = time.perf_counter()
        in_contexts, values = walk.advance(site.layer, site.layer)  # (n, c, d), (n, h)
        seconds = time.perf_counter() - began
    keys = over_contexts(in_contexts, walk.weights)  # (n, d)
    if not torch.isfinite(keys).all():
        raise EditingError(f"the keys of {site.name} are not finite; the model's weights are damaged, load it again")
    filters = editor.filters()
    directions = _directions(filters[site.name].root(keys.cpu()))  # (n, d)
    past = history.past_keys(site.name, requests)
    others = directions if past is None else torch.cat([directions, _directions(past)])  # (n + p, d)
    cosines = directions @ others.T  # (n, n + p)
    cosines.fill_diagonal_(-1)
    nearest = cosines.max(1)
    labels = [request.text for request in requests] + _labels(history, site.name, requests)
    checks, warnings = [], list(report.warnings)
    for index, check in enumerate(report.checks):
        value, place = float(nearest.values[index]), int(nearest.indices[index])
        if len(labels) < 2:
            checks.append(check)
            continue
        checks.append(replace(check, similarity=value, nearest=labels[place]))
        mutual = place < len(requests) and int(nearest.indices[place]) == index
        if value >= similarity and not (mutual and place < index):  # a pair is named once
            what = f"request {place}" if place < len(requests) else "an earlier edit"
            warnings.append(
                f"request {index}, {check.text!r}: its key is nearly that of {what}, {labels[place]!r} (cosine "
                f"{value:.2f}); each may undo the other"
            )
    free = {name: spectral_filter.null_rank for name, spectral_filter in filters.items()}
    edits = count_facts(history.batches, requests) + len(requests)
    warnings += _filling_up(config, edits, free)
    norms, usual = walk.entered()  # (n,)
    if editor.architecture.additive:  # then the values are the states that leave the layer
        norms = torch.maximum(norms, values.cpu().norm(dim=-1))
    warnings += _massive(requests, norms / usual)
    rows = [row for one in looked_at for row in (*one.rows, *one.mentions)]
    rate = sum(len(row.until_subject().token_ids) for row in rows) / max(seconds, 1e-9)
    return replace(
        report,
        checks=tuple(checks),
        warnings=tuple(warnings),
        free_directions=free,
        seconds=editing_seconds(editor, encoded, rate),
        memory=editing_memory(editor, encoded),
    )


def _directions(filtered: Tensor) -> Tensor:
    """(n, d) rows of norm 1; zero rows stay zero."""
    return torch.nn.functional.normalize(filtered.float(), dim=-1)


def _labels(history: History, site_name: str, again: Sequence[EditRequest]) -> list[str]:
    """A name for every row of `history.past_keys(site_name, again)`."""
    labels = []
    for batch, places in zip(history.batches, in_force(history.batches, again), strict=True):
        if site_name in batch.keys:
            names = [*(request.text for request in batch.requests), *["(text withheld)"] * batch.withheld]
            labels += [names[place] for place in places] if len(batch.keys[site_name]) == len(batch) else names
    return labels


def _filling_up(config: AlphaEditConfig, edits: int, free: Mapping[str, int]) -> list[str]:
    name = min(free, key=lambda site: free[site])
    if not config.use_history or edits <= FULL * free[name]:
        return []
    return [
        f"after this, {edits} edits share the {free[name]} free directions of {name}; expect earlier edits to fade, "
        "raise energy_share or start from a fresh model"
    ]


def _massive(requests: Sequence[EditRequest], ratios: Tensor) -> list[str]:
    found = (ratios > MASSIVE).nonzero()[:, 0].tolist()
    return [
        f"request {index}, {requests[index].text!r}: at the subject's last token the hidden state is "
        f"{ratios[index]:.0f} times as large as usual (a massive activation, often at a text's first token); an edit "
        "there can wreck the model: begin the prompt with another word, or edit lower layers"
        for index in found
    ]
