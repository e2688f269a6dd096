"""Causal tracing: which layers recall a fact, at which tokens.

A fact's subject is corrupted with noise on its embeddings, until the model no longer says the answer. Then one clean
state at a time is put back; how much of the answer's probability returns is that state's indirect effect. Source: Meng
et al., "Locating and Editing Factual Associations in GPT", section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow, encode_target, encode_with_spans
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.rows import whole_rows
from hf_alphaedit.records import Record, as_record
from hf_alphaedit.requests import PLACEHOLDER, EditRequest, joined_target
from hf_alphaedit.trace_report import PLACES, TraceReport
from hf_alphaedit.trace_runs import Runs, TracedFact, answer_logits


KINDS = ("hidden", "mlp", "attention")
FACTS_AT_ONCE = 8  # their clean and corrupted states are kept in memory


def trace(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    facts: Iterable[Record | EditRequest | Mapping[str, Any]],
    *,
    kinds: Sequence[str] = KINDS,
    places: Sequence[str] = PLACES,
    samples: int = 3,
    noise: float = 3.0,
    window: int | None = None,
    layers_to_suggest: int = 5,
    batch_size: int | None = None,
    seed: int = 0,
) -> TraceReport:
    """Trace the facts that the model knows; the others are counted and left out.

    The model is as before on return, and so is the global random state.

    Args:
        architecture: of the unedited model.
        tokenizer: its tokenizer.
        facts: what to recall: mappings with `prompt`, `subject` and `attribute`, or requests and records, whose
            `target_true` is the answer. A fact is known if the answer's first token is the argmax.
        kinds: which states to restore: "hidden" (a block's output), "mlp" and "attention" (what these add).
        places: at which tokens (see `PLACES`); "subject, last" alone is several times faster and enough to choose
            layers. Effects elsewhere are given as 0.
        samples: noise draws per fact; the published figure is 10.
        noise: standard deviation of the noise, in those of the subjects' embeddings.
        window: consecutive layers whose "mlp" or "attention" states are restored together, around each layer; None
            takes a fifth of the layers, as published (10 of 48).
        layers_to_suggest: length of the suggested range.
        batch_size: rows at once; None lets their length decide.
        seed: of the noise.

    Raises:
        RequestError: a fact can't be used, or the model knows none of them.
        ValueError: an unknown kind or place.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"unknown kinds {unknown}; there are {list(KINDS)}")
    if unknown := sorted(set(places) - set(PLACES)):
        raise ValueError(f"unknown places {unknown}; there are {list(PLACES)}")
    encoded = [_encoded(tokenizer, _with_answer(fact)) for fact in facts]
    modules = {kind: _modules(architecture, kind) for kind in kinds}
    count = len(architecture.blocks)
    window = window or max(1, round(count / 5))
    totals = {kind: torch.zeros(len(PLACES), count, dtype=torch.float64) for kind in kinds}
    seen = torch.zeros(len(PLACES), dtype=torch.float64)
    clean, corrupted = [], []
    with torch.no_grad(), inference_state(architecture.model):
        known = [fact for fact, knows in zip(encoded, _knows(architecture, encoded), strict=True) if knows]
        if not known:
            raise RequestError(f"the model knows none of the {len(encoded)} facts; trace facts whose answers it says")
        scale = noise * _embedding_deviation(architecture, known)
        starts = range(0, len(known), FACTS_AT_ONCE)
        with tqdm(total=len(starts) * len(kinds) * count, desc="Tracing", name="hf_alphaedit") as bar:
            for first in starts:
                group = known[first : first + FACTS_AT_ONCE]
                runs = Runs(architecture, modules, group, samples, scale, seed + first, batch_size)
                clean += runs.clean_probability.tolist()
                corrupted += runs.corrupted_probability.tolist()
                for fact in group:
                    for token in fact.tokens_at(places):
                        seen[fact.place(token)] += 1
                for kind in kinds:
                    for layer in range(count):
                        for (fact, token), effect in runs.effects(kind, layer, window, places):
                            totals[kind][group[fact].place(token), layer] += effect
                        bar.update()
    effects = {kind: (total / seen.clamp_min(1)[:, None]).tolist() for kind, total in totals.items()}
    settings = {
        "samples": samples, "noise": noise, "window": window, "traced": list(places),
        "layers_to_suggest": layers_to_suggest, "seed": seed,
    }  # fmt: skip
    total = len(known)
    return TraceReport(effects, total, len(encoded), sum(clean) / total, sum(corrupted) / total, settings)


def _with_answer(fact: Record | EditRequest | Mapping[str, Any]) -> tuple[EditRequest, str]:
    if isinstance(fact, Mapping) and "attribute" in fact:
        fact = {**fact, "target_new": fact["attribute"], "target_true": fact["attribute"]}
    request = as_record(fact).request
    if request.target_true is None:
        raise RequestError(
            f"the fact {request.text!r} has no attribute (or target_true): say what the model should recall"
        )
    return request, request.target_true


def _encoded(tokenizer: PreTrainedTokenizerBase, fact: tuple[EditRequest, str]) -> TracedFact:
    request, answer = fact
    text, start = request.text, request.prompt.index(PLACEHOLDER)
    end = start + len(request.subject)
    token_ids, spans = encode_with_spans(tokenizer, text)
    inside = [index for index, (first, last) in enumerate(spans) if first < end and last > start]
    if not inside:
        raise RequestError(f"no token of {text!r} belongs to the subject {request.subject!r}; write it differently")
    target = encode_target(tokenizer, text, joined_target(text, answer))
    return TracedFact(tuple(token_ids), inside[0], inside[-1] + 1, target[0])


def _knows(architecture: Architecture, facts: Sequence[TracedFact]) -> list[bool]:
    result: list[bool] = []
    for first in range(0, len(facts), FACTS_AT_ONCE):
        group = facts[first : first + FACTS_AT_ONCE]
        rows = whole_rows(architecture, [TokenRow(fact.token_ids, 0, 0) for fact in group])
        predicted = answer_logits(architecture, rows, group).argmax(-1).tolist()
        result += [token == fact.answer for token, fact in zip(predicted, group, strict=True)]
    return result


def _embedding_deviation(architecture: Architecture, facts: Sequence[TracedFact]) -> float:
    """Standard deviation of the embeddings of all subject tokens."""
    tokens = [token for fact in facts for token in fact.token_ids[fact.start : fact.end]]
    embeddings = architecture.model.get_input_embeddings()
    return float(embeddings(torch.tensor([tokens], device=architecture.input_device)).float().std())


def _modules(architecture: Architecture, kind: str) -> list[nn.Module]:
    """For each layer, the module whose output is the state of this kind."""
    found: list[nn.Module] = []
    for layer, block in enumerate(architecture.blocks):
        children = dict(block.named_children())
        attention = [name for name, child in children.items() if "att" in name.lower() and any(child.children())]
        inside = architecture.target_module.partition("{}.")[2].partition(".")[0]
        names = {"hidden": [""], "mlp": [inside] if inside in children else [], "attention": attention}[kind]
        if len(names) != 1:
            raise RequestError(
                f"layer {layer} of {type(architecture.model).__name__} has {len(names)} modules {names} that could be "
                f"its {kind!r}; trace the other kinds"
            )
        found.append(block.get_submodule(names[0]))
    return found
