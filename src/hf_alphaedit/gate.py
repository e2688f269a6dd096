"""Thresholds that an edit has to pass: measured after it, and rolled back where they aren't met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_alphaedit.corpus import texts_of
from hf_alphaedit.errors import ConfigError
from hf_alphaedit.evaluation.counterfact import probes
from hf_alphaedit.evaluation.damage import NUM_TOKENS, Reference, make_reference
from hf_alphaedit.evaluation.protocol import evaluate
from hf_alphaedit.evaluation.report import EvaluationReport
from hf_alphaedit.records import Record


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What an `apply_edits` call has to reach; None doesn't ask. Percentages are 0 to 100, as evaluation gives them.

    Attributes:
        min_efficacy: least percentage of the requests whose new target is predicted token by token.
        min_specificity: least percentage of the records' neighbours that keep their answer: more probable than the
            new target where the old object is known, else predicted token by token. The requests must be records that
            have neighbours (`neighborhood`), as those of CounterFact and zsRE.
        max_perplexity_ratio: largest perplexity on `texts`, relative to the unedited model, so that small losses of
            many calls can't add up unseen.
        texts: held-out texts, or a .txt or .jsonl file of them, for the perplexity.
        num_tokens: how many tokens of them are read at most.

    Raises:
        ConfigError: a threshold is out of range, or its data is missing.
    """

    min_efficacy: float | None = None
    min_specificity: float | None = None
    max_perplexity_ratio: float | None = None
    texts: Sequence[str] | str | Path | None = None
    num_tokens: int = NUM_TOKENS

    def __post_init__(self) -> None:
        for name in ("min_efficacy", "min_specificity"):
            value = getattr(self, name)
            if value is not None and not (value == 0 or 1 < value <= 100):
                raise ConfigError(f"{name}={value!r} must be a percentage up to 100; write 95 for 95 %")
        ratio = self.max_perplexity_ratio
        if ratio is not None and not 0 < ratio < float("inf"):
            raise ConfigError(f"max_perplexity_ratio={ratio!r} must be positive and finite, e.g. 1.05")
        if ratio is not None and not self.texts:
            raise ConfigError("max_perplexity_ratio needs texts to measure it on; give texts=[...] or a file")
        if (self.min_efficacy, self.min_specificity, ratio) == (None, None, None):
            raise ConfigError("the gate asks for nothing; give min_efficacy, min_specificity or max_perplexity_ratio")

    def check(self, records: Sequence[Record]) -> None:
        """Raise `ConfigError` if `records` lack what the gate is to measure."""
        if self.min_specificity is not None and not any(probes(record, "specificity") for record in records):
            raise ConfigError(
                f"min_specificity={self.min_specificity} needs requests with neighbours and their answers; give whole "
                "records, e.g. of CounterFact, or leave it out"
            )

    def reference(self, editor: AlphaEditor) -> Reference | None:
        """The unedited model on the held-out texts; the weights are as before on return."""
        if self.max_perplexity_ratio is None or self.texts is None:
            return None
        texts = texts_of(self.texts)[0] if isinstance(self.texts, (str, Path)) else self.texts
        with editor.unedited():
            return make_reference(editor.model, editor.tokenizer, texts, num_tokens=self.num_tokens)

    def measure(
        self, editor: AlphaEditor, records: Sequence[Record], reference: Reference | None
    ) -> tuple[EvaluationReport, list[str]]:
        """What the edited model reaches, and a sentence for each threshold that it misses."""
        metrics = ("efficacy",) if self.min_specificity is None else ("efficacy", "specificity")
        report = evaluate(editor.model, editor.tokenizer, records, metrics=metrics, held_out=reference)
        found = {name: estimate.value for name, estimate in report.metrics.items()}
        specificity = "specificity_success" if "specificity_success" in found else "specificity_accuracy"
        missed = []
        for name, metric in (("min_efficacy", "efficacy_accuracy"), ("min_specificity", specificity)):
            wanted = getattr(self, name)
            if wanted is not None and not found[metric] >= wanted:  # a NaN passes nothing
                missed.append(f"{metric} is {found[metric]:.1f} and {name} is {wanted:g}")
        ratio = self.max_perplexity_ratio
        if ratio is not None and not found["perplexity_ratio"] <= ratio:
            missed.append(f"perplexity_ratio is {found['perplexity_ratio']:.3f} and max_perplexity_ratio is {ratio:g}")
        return report, missed
