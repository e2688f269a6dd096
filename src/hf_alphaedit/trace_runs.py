"""The corrupted and restored runs of causal tracing.

A restored state changes nothing below its own layer. So every run starts from the stored corrupted states that enter
the first block it changes, and all tokens, noise samples and facts of one layer share a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_alphaedit.evaluation.forward import TOKEN_BUDGET, logits_at
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.hooks import on_input, on_output
from hf_alphaedit.models.rows import AlignedRows, skipped_blocks, whole_rows
from hf_alphaedit.trace_report import PLACES


@dataclass(frozen=True)
class TracedFact:
    """One fact as token ids: the prompt, the subject's tokens in it (from `start` up to `end`), the answer's first."""

    token_ids: tuple[int, ...]
    start: int
    end: int
    answer: int

    def tokens_at(self, places: Collection[str]) -> list[int]:
        """The tokens at these places that noise on the subject can change."""
        return [token for token in range(self.start, len(self.token_ids)) if PLACES[self.place(token)] in places]

    def place(self, token: int) -> int:
        """Index in `PLACES` of where `token` stands."""
        if token < self.end:
            name = "subject, last" if token == self.end - 1 else "subject, first" if token == self.start else "subject"
        else:
            last = len(self.token_ids) - 1
            name = "prompt, last" if token == last else "after subject" if token == self.end else "further"
        return PLACES.index(name)


class Runs:
    """Clean and corrupted runs of some facts, and what restoring single states does.

    Shapes: F facts, S noise samples, T tokens of the longest prompt, h the hidden size. Rows of corrupted runs are
    ordered by fact, then sample.
    """

    def __init__(
        self, architecture: Architecture, modules: Mapping[str, Sequence[nn.Module]], facts: Sequence[TracedFact],
        samples: int, scale: float, seed: int, batch_size: int | None,
    ) -> None:  # fmt: skip
        self.architecture, self.modules, self.facts, self.samples = architecture, modules, facts, samples
        rows = [TokenRow(fact.token_ids, fact.end - 1, len(fact.token_ids) - 1) for fact in facts]
        self.clean_rows = whole_rows(architecture, rows)
        self.rows = whole_rows(architecture, [row for row in rows for _ in range(samples)])
        self.at_once = batch_size or max(1, TOKEN_BUDGET // self.rows.token_ids.shape[1])
        blocks = list(architecture.blocks)
        self.clean: dict[tuple[str, int], Tensor] = {}  # (kind, layer) -> (F, T, h)
        forms: list[Any] = []
        with ExitStack() as stack:
            for kind, by_layer in modules.items():
                for layer, module in enumerate(by_layer):
                    stack.enter_context(on_output(module, self._keeper(self.clean, (kind, layer), len(facts))))
            handle = blocks[0].register_forward_hook(lambda _, __, output: forms.append(output))
            stack.callback(handle.remove)
            self.clean_probability = self._probabilities(self.clean_rows, range(len(facts)))
        form = (Tensor, 1) if isinstance(forms[0], Tensor) else (type(forms[0]), len(forms[0]))
        self.rows = replace(self.rows, block_form=form)
        self.corrupted: dict[int, Tensor] = {}  # block -> (F S, T, h), what enters it; after the last: what leaves it
        everyone = [fact for fact in range(len(facts)) for _ in range(samples)]
        embeddings = architecture.model.get_input_embeddings()
        with ExitStack() as stack:
            stack.enter_context(on_output(embeddings, lambda x: x + self._noise(x, scale, seed)))
            for layer, block in enumerate(blocks):
                stack.enter_context(on_input(block, self._keeper(self.corrupted, layer, len(everyone))))
            stack.enter_context(on_output(blocks[-1], self._keeper(self.corrupted, len(blocks), len(everyone))))
            by_row = self._probabilities(self.rows, everyone)  # (F S,)
        self.corrupted_probability = by_row.view(len(facts), samples).mean(1)

    @staticmethod
    def _keeper(store: dict[Any, Tensor], key: Any, rows: int) -> Any:
        def keep(hidden: Tensor) -> None:
            store[key] = hidden.detach().reshape(rows, -1, hidden.shape[-1]).clone()

        return keep

    def _noise(self, embedded: Tensor, scale: float, seed: int) -> Tensor:
        """(F S, T, h): noise on the subject's tokens, zero elsewhere; each fact has its own draws."""
        result = torch.zeros(embedded.shape, dtype=torch.float32)
        for index, fact in enumerate(self.facts):
            generator = torch.Generator().manual_seed(seed + index)
            draws = torch.randn(self.samples, fact.end - fact.start, embedded.shape[-1], generator=generator)
            result[index * self.samples : (index + 1) * self.samples, fact.start : fact.end] = scale * draws
        return result.to(embedded)

    def _probabilities(self, rows: AlignedRows, facts: Iterable[int]) -> Tensor:
        """(rows,) probability of each row's answer after its prompt, float64."""
        chosen = [self.facts[fact] for fact in facts]
        logits = answer_logits(self.architecture, rows, chosen)  # (rows, V)
        answers = torch.tensor([fact.answer for fact in chosen], device=logits.device)
        return logits.double().softmax(-1).gather(-1, answers[:, None])[:, 0].cpu()

    def effects(
        self, kind: str, layer: int, window: int, places: Collection[str]
    ) -> Iterator[tuple[tuple[int, int], float]]:
        """((fact, token), indirect effect) of restoring `kind` around `layer`, for every token at `places`."""
        layers = range(layer, layer + 1)
        if kind != "hidden":
            layers = range(max(0, layer - window // 2), min(len(self.modules[kind]), layer - window // 2 + window))
        wanted = [(fact, token) for fact, item in enumerate(self.facts) for token in item.tokens_at(places)]
        plan = [
            (fact, token, fact * self.samples + sample) for fact, token in wanted for sample in range(self.samples)
        ]
        if not plan:
            return
        found = [
            self._restored(plan[at : at + self.at_once], kind, layers) for at in range(0, len(plan), self.at_once)
        ]
        restored = torch.cat(found).view(len(wanted), self.samples).mean(1)
        for (fact, token), value in zip(wanted, restored.tolist(), strict=True):
            yield (fact, token), value - float(self.corrupted_probability[fact])

    def _restored(self, plan: Sequence[tuple[int, int, int]], kind: str, layers: range) -> Tensor:
        """(rows,) answer probabilities of corrupted runs with one token's clean states of `layers` put back."""
        facts, tokens, sources = (torch.tensor(column) for column in zip(*plan, strict=True))
        everyone = torch.arange(len(plan))

        def put_back(layer: int, hidden: Tensor) -> Tensor:
            changed = hidden.reshape(len(plan), -1, hidden.shape[-1]).clone()
            changed[everyone, tokens] = self.clean[kind, layer][facts, tokens].to(changed)
            return changed.view_as(hidden)

        first = layers[0] + 1 if kind == "hidden" else layers[0]
        rows = replace(self.rows, entry=self.corrupted[first]).select(sources)  # entry is (rows, T, h)
        if kind == "hidden" and rows.entry is not None:
            rows = replace(rows, entry=put_back(layers[0], rows.entry))
        with ExitStack() as stack:
            stack.enter_context(_entering(self.architecture, rows, first))
            for layer in layers if kind != "hidden" else ():
                stack.enter_context(on_output(self.modules[kind][layer], lambda x, layer=layer: put_back(layer, x)))
            return self._probabilities(rows, facts.tolist())


@contextmanager
def _entering(architecture: Architecture, rows: AlignedRows, first: int) -> Iterator[None]:
    """Run from block `first` on, which gets `rows.entry`."""
    if first == 0:
        with on_input(architecture.blocks[0], lambda hidden: rows.entry):
            yield
    else:
        with skipped_blocks(architecture, rows, first):
            yield


def answer_logits(architecture: Architecture, rows: AlignedRows, facts: Sequence[TracedFact]) -> Tensor:
    """(rows, V) logits after each row's prompt."""
    last = torch.tensor([len(fact.token_ids) - 1 for fact in facts], device=rows.token_ids.device)
    takes_positions = "position_ids" in inspect.signature(type(architecture.model).forward).parameters
    logits, _ = logits_at(
        architecture.model, torch.arange(len(facts), device=last.device), last, input_ids=rows.token_ids,
        attention_mask=rows.attention_mask, use_cache=False,
        **({"position_ids": rows.position_ids} if takes_positions else {}),
    )  # fmt: skip
    return logits
