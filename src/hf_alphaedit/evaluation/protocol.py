"""The one call that measures a model: on records, on held-out text and on general ability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.evaluation import counterfact, knowedit
from hf_alphaedit.evaluation.damage import Reference, held_out_losses, last_word_accuracy, multiple_choice, pack
from hf_alphaedit.evaluation.generation import NEW_TOKENS, generate
from hf_alphaedit.evaluation.report import Estimate, EvaluationReport, estimate
from hf_alphaedit.evaluation.scoring import Pair, Score, score
from hf_alphaedit.evaluation.text import TfIdf, fluency, judge, references
from hf_alphaedit.records import Record, as_record, read_records
from hf_alphaedit.requests import EditRequest


DEFAULT_METRICS = (*counterfact.NAMES, *knowedit.NAMES, "generation")
SAMPLED_METRICS = ("fluency", "consistency")
METRICS = (*DEFAULT_METRICS, *SAMPLED_METRICS)
# ROME's evaluation of fluency: top-5 sampling, prompt and continuation of 100 tokens together.
SAMPLED_TOP_K, SAMPLED_TOKENS = 5, 100


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record | EditRequest | Mapping[str, Any]] = (),
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    corpus: Sequence[str] | None = None,
    held_out: Reference | Iterable[str] | None = None,
    lambada: Sequence[str] | None = None,
    choices: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    before: EvaluationReport | None = None,
    chat: bool = False,
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Measure `model`; nothing of it is changed.

    Args:
        model: a causal language model, edited or not.
        tokenizer: its padding settings are neither used nor changed.
        records: what to ask; each metric uses the records that have the prompts it needs.
        metrics: of `efficacy`, `generalization`, `specificity` (see `evaluation.counterfact`), `portability`,
            `locality` (`evaluation.knowedit`), `generation` (greedy continuations of the prompt and its paraphrases,
            judged by `evaluation.text.judge`), and, much slower, `fluency` and `consistency`.
        corpus: texts from which `consistency` takes its references: those that name the new target.
        held_out: texts for perplexity; or, from `make_reference` on the unedited model, also for the ratio of
            perplexities and the KL divergence.
        lambada: passages whose last word the model shall say.
        choices: name of a task -> multiple-choice questions (`query`, `choices`, `gold`).
        before: the unedited model's report on the same records, for `locality_agreement`.
        chat: also put the prompts through the chat template.
        max_new_tokens: length of the greedy continuations.
        batch_size: rows at once; None lets their lengths decide. The result doesn't depend on it.
        seed: of the bootstrap and the sampled texts.

    Raises:
        ValueError: an unknown metric, or one without the data it needs.
        RequestError: a record can't be used.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; there are {list(METRICS)}")
    if "consistency" in metrics and not corpus:
        raise ValueError("the metric 'consistency' needs corpus=[texts] to take references from")
    items = [as_record(record) for record in read_records(records)] if (records := list(records)) else []
    if not items and held_out is None and lambada is None and not choices:
        raise ValueError("there is nothing to evaluate; give records, held_out, lambada or choices")
    details: list[dict[str, Any]] = [
        {"case_id": item.request.case_id, "text": item.request.text, **item.request.to_dict(), "values": {}}
        for item in items
    ]
    _teacher_forced(model, tokenizer, items, details, metrics, before, batch_size)
    if "generation" in metrics:
        for prefix, through_chat in (("generation", False), ("chat", True))[: 1 + chat]:
            texts = _generated(model, tokenizer, items, max_new_tokens, through_chat, batch_size)
            for item, detail in zip(items, details, strict=True):
                detail[f"{prefix}_texts"] = {prompt: texts[prompt] for prompt in _prompts(item)}
                detail["values"].update(_judged(item, texts, prefix))
    if set(SAMPLED_METRICS) & set(metrics):
        _sampled(model, tokenizer, items, details, metrics, corpus or (), seed, batch_size)
    result = _means(details, seed)
    if held_out is not None:
        result.update(_held_out(model, tokenizer, held_out, seed))
    if lambada is not None:
        right = last_word_accuracy(model, tokenizer, lambada, batch_size=batch_size)
        result["lambada"] = estimate(right, seed=seed, scale=100)
    for task, questions in (choices or {}).items():
        plain, normalised = multiple_choice(model, tokenizer, questions, batch_size=batch_size)
        result[task] = estimate(plain, seed=seed, scale=100)
        result[f"{task}_norm"] = estimate(normalised, seed=seed, scale=100)
    settings = {"metrics": list(metrics), "records": len(items), "seed": seed, "max_new_tokens": max_new_tokens}
    return EvaluationReport(result, details, settings)


def _teacher_forced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Record],
    details: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    before: EvaluationReport | None,
    batch_size: int | None,
) -> None:
    """Score every pair that any metric looks at, once and in common batches, and fill in the records' values."""
    facts = [name for name in counterfact.NAMES if name in metrics]
    groups = [name for name in knowedit.NAMES if name in metrics]
    wanted: dict[Pair, None] = {}
    for item in items:
        for name in facts:
            wanted.update((pair, None) for probe in counterfact.probes(item, name) for pair in probe.pairs())
        for name in groups:
            wanted.update((pair, None) for pair in knowedit.pairs(item, name))
    scores = dict(zip(wanted, score(model, tokenizer, list(wanted), batch_size=batch_size), strict=True))
    earlier: Sequence[Mapping[str, Any]] = before.records if before else [{}] * len(items)
    if len(earlier) != len(items):
        raise ValueError(f"`before` has {len(earlier)} records, not {len(items)}; evaluate both on the same ones")
    for item, detail, old in zip(items, details, earlier, strict=True):
        for name in facts:
            detail["values"].update(counterfact.measure(item, name, scores))
        for name in groups:
            detail["values"].update(knowedit.measure(item, name, scores, old.get("predictions")))
        if "locality" in groups and item.locality:
            detail["predictions"] = knowedit.predictions(item, scores)
        if "efficacy" in facts:
            detail.update(_probabilities(item, scores))


def _probabilities(item: Record, scores: Mapping[Pair, Score]) -> dict[str, float]:
    targets = {"probability_new": item.request.target_new, "probability_true": item.request.target_true}
    return {
        name: math.exp(scores[item.request.text, target].log_probability)
        for name, target in targets.items()
        if target is not None
    }


def _prompts(item: Record) -> tuple[str, ...]:
    return (item.request.text, *item.paraphrases)


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Record],
    max_new_tokens: int,
    chat: bool,
    batch_size: int | None,
) -> dict[str, str]:
    prompts = list(dict.fromkeys(prompt for item in items for prompt in _prompts(item)))
    texts = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, chat=chat, batch_size=batch_size)
    return dict(zip(prompts, texts, strict=True))


def _judged(item: Record, texts: Mapping[str, str], prefix: str) -> dict[str, float]:
    """Success on the prompt and on the paraphrases; on the prompt, also what else was said."""
    request = item.request
    first, *others = [judge(texts[prompt], request.target_new, request.target_true) for prompt in _prompts(item)]
    values = {f"{prefix}_success": float(first.success), f"{prefix}_degenerate": float(first.degenerate)}
    if request.target_true is not None:
        values[f"{prefix}_names_old"] = float(first.names_old)
    if others:
        values[f"{prefix}_paraphrase_success"] = sum(other.success for other in others) / len(others)
    return values


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Record],
    details: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    corpus: Sequence[str],
    seed: int,
    batch_size: int | None,
) -> None:
    """Fluency: mean n-gram entropy of sampled texts. Consistency: their joint tf-idf similarity to references."""
    prompts = [prompt for item in items for prompt in item.generation_prompts]  # repeated ones get other samples
    continuations = generate(
        model, tokenizer, prompts, max_new_tokens=SAMPLED_TOKENS, max_tokens=SAMPLED_TOKENS,
        top_k=SAMPLED_TOP_K, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    texts = iter([prompt + new for prompt, new in zip(prompts, continuations, strict=True)])
    similarity = TfIdf(corpus) if "consistency" in metrics else None
    for item, detail in zip(items, details, strict=True):
        own = [next(texts) for _ in item.generation_prompts]
        if own and "fluency" in metrics:
            detail["values"]["fluency"] = sum(map(fluency, own)) / len(own)
        found = references(corpus, item.request.target_new) if own and similarity else []
        if found and similarity:
            detail["values"]["consistency"] = similarity.similarity(" ".join(own), " ".join(found))
        detail["sampled_texts"] = own


def _means(details: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Estimate]:
    found = dict.fromkeys(name for detail in details for name in detail["values"])
    names = sorted(found, key=lambda name: [name.startswith(metric) for metric in METRICS], reverse=True)
    return {
        name: estimate(
            [detail["values"][name] for detail in details if name in detail["values"]], seed=seed, scale=100
        )
        for name in names
    }


def _held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Reference | Iterable[str], seed: int
) -> dict[str, Estimate]:
    reference = held_out if isinstance(held_out, Reference) else None
    windows = held_out.windows if isinstance(held_out, Reference) else pack(model, tokenizer, held_out)
    losses, divergences = held_out_losses(model, windows, reference)
    result = {"perplexity": estimate(losses.tolist(), seed=seed, transform=torch.exp)}
    if reference is not None and divergences is not None:
        change = (losses - reference.losses).tolist()  # paired: the texts' own difficulty drops out
        result["perplexity_ratio"] = estimate(change, seed=seed, transform=torch.exp)
        result["kl"] = estimate(divergences.tolist(), seed=seed)
    return result
