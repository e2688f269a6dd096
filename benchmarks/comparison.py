"""Runs library and reference on the same model in turn and keeps seconds, memory, agreement and metrics."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import reference
import torch
from measuring import Stopwatch, matrix_rate
from operations import target_operations
from reference import Settings
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from workload import Workload

from hf_alphaedit import AlphaEditConfig, AlphaEditor, EditReport
from hf_alphaedit.contexts import encode_requests, sample_contexts
from hf_alphaedit.evaluation.protocol import evaluate
from hf_alphaedit.filters import build_filters
from hf_alphaedit.statistics import SecondMoments, collect_second_moments
from hf_alphaedit.targets import product_dtype


EDIT_PHASES = ("targets", "keys", "solve", "write")
PHASES = ("statistics", "projector", *EDIT_PHASES)
MODES = ("paper", "recommended")
METRICS = ("efficacy", "generalization", "specificity")


@dataclass(frozen=True)
class Edited:
    """What is kept of the library's run in one mode: targets (n, h) and the delta (h, d) of each weight."""

    targets: Tensor
    deltas: list[Tensor]


@dataclass
class Comparison:
    """Both sides on one model, which is as before after each of them.

    Attributes:
        config: the library's settings, layers included. `paper` mode is made of it.
        searched: targets that the reference searches; None is all.
        metrics: whether the edited models are evaluated.
        library, reference: time and memory of each phase; edits have the mode in their name.
        agreement: largest relative difference (Frobenius) between the two sides, by what is compared.
        evaluated: edited model -> metric -> percentage.
        share: mode -> the target search's useful operations against the machine's rate.
        notes: what a reader of the figures has to know.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    workload: Workload
    config: AlphaEditConfig
    phases: Sequence[str] = PHASES
    modes: Sequence[str] = MODES
    searched: int | None = None
    metrics: bool = True
    library: Stopwatch = field(default_factory=Stopwatch)
    reference: Stopwatch = field(default_factory=Stopwatch)
    agreement: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, dict[str, float]] = field(default_factory=dict)
    share: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run the phases and modes asked for."""
        tokens = self.workload.blocks.numel()
        self.model.eval()
        config = self.config.replace(sequence_length=self.workload.blocks.shape[1], cache_targets=False)
        self.layers, self.requests = config.layers or (), [record.request for record in self.workload.records]
        self.notes.append(
            f"{len(self.requests)} requests, {tokens} tokens, layers {list(self.layers)}, {self.workload.source}"
        )
        paper = config.paper()
        contexts = sample_contexts(
            self.model, self.tokenizer, length=paper.context_length, keep_special_tokens=paper.context_special_tokens
        )
        modes = {"paper": paper, "recommended": config}
        self.configs = {mode: modes[mode].replace(context_templates=contexts) for mode in MODES if mode in self.modes}
        with tempfile.TemporaryDirectory() as directory:
            self._run(Path(directory))

    def _run(self, directory: Path) -> None:
        editors = {mode: AlphaEditor(self.model, self.tokenizer, config) for mode, config in self.configs.items()}
        first = next(iter(editors.values()))
        moments = self._statistics(first, directory)
        edits = any(phase in EDIT_PHASES for phase in self.phases)
        if "projector" in self.phases or edits:
            projectors = {mode: self._projectors(mode, moments.moments) for mode in self.configs}
        if edits:
            self._evaluate("unedited")
            edited = {}
            for mode, editor in editors.items():
                editor._moments = moments  # what `prepare` keeps
                edited[mode] = self._library_edit(mode, editor)
            targets = None
            for mode in self.configs:
                targets = self._reference_edit(mode, projectors[mode], edited[mode], targets)

    def _statistics(self, editor: AlphaEditor, directory: Path) -> SecondMoments:
        """The library's float32 moments. The reference's, and those with bfloat16 products, if that is asked for."""
        exact = self._second_moments("statistics", editor, directory, None)
        if "statistics" not in self.phases:
            return exact
        rounded = self._second_moments("statistics (bfloat16)", editor, directory, torch.bfloat16).moments
        with self.reference.measuring("statistics"):
            name = self._settings(next(iter(self.configs))).down_projection
            blocks = self.workload.blocks
            plain = [reference.second_moment(self.model, self.tokenizer, blocks, layer, name) for layer in self.layers]
        self.reference.seconds["statistics (bfloat16)"] = self.reference.seconds["statistics"]
        self.agreement["moments (float32)"] = largest(exact.moments.values(), plain)
        self.agreement["moments (bfloat16 products)"] = largest(rounded.values(), plain)
        return exact

    def _second_moments(
        self, phase: str, editor: AlphaEditor, directory: Path, product_dtype: torch.dtype | None
    ) -> SecondMoments:
        """One pass of the library, without the report that `prepare` makes of it."""
        with self.library.measuring(phase):
            return collect_second_moments(
                self.model, self.tokenizer, editor.sites(), self.workload.texts,
                num_tokens=self.workload.blocks.numel(), sequence_length=self.workload.blocks.shape[1],
                base_fingerprint=editor.history.base_fingerprint,
                tokenizer_fingerprint=editor.history.tokenizer_fingerprint, corpus_name="benchmark",
                cache_directory=directory, product_dtype=product_dtype,
            )  # fmt: skip

    def _projectors(self, mode: str, moments: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The reference's dense projectors under the mode's rule, their ranks compared if the mode projects."""
        config, name = self.configs[mode], f"projector ({mode})"
        absolute = config.threshold_rule == "absolute"
        rule = {"threshold": config.absolute_threshold} if absolute else {"energy_share": config.energy_share}
        with self.reference.measuring(name):
            projectors = [reference.projector(moment, **rule) for moment in moments.values()]
        with self.library.measuring(name):
            filters = list(build_filters(moments, config).values())
        ranks, dimension = [round(float(projector.trace())) for projector in projectors], len(projectors[0])
        self.notes.append(
            f"{mode}: {config.projection} constraint; the reference's null spaces have {ranks} of {dimension} "
            f"directions ({rule})"
        )
        if config.projection == "hard":
            differences = [abs(one.null_rank - rank) for one, rank in zip(filters, ranks, strict=True)]
            self.agreement["null ranks"] = max(max(differences) / dimension, self.agreement.get("null ranks", 0.0))
        return dict(zip(self.layers, projectors, strict=True))

    def _library_edit(self, mode: str, editor: AlphaEditor) -> Edited:
        """`apply_edits` on all requests in one batch, evaluated and undone."""
        editor.filters()  # timed as a phase of its own
        dtype = product_dtype(editor.architecture, editor.config) or self.model.dtype
        rate = matrix_rate(dtype)
        with self.library.measuring(f"apply ({mode})"):
            report = editor.apply_edits(self.requests)
        self.share[mode] = self._share(editor, report, dtype, max(rate, matrix_rate(dtype)))
        self.library.seconds |= {f"{phase} ({mode})": report.seconds[phase] for phase in EDIT_PHASES}
        self.library.seconds[f"apply ({mode})"] = self.library.seconds.pop(f"apply ({mode})")  # the sum goes last
        self._evaluate(f"library ({mode})")
        names = [site.name for site in editor.sites()]
        residual = editor.history.batches[0].updates[names[0]].outputs * len(names)  # (n, h) what all layers share
        deltas = [editor.history.delta(name) for name in names]
        editor.undo_all()
        plain = self.workload.plain_requests()
        values = reference.current_values(self.model, self.tokenizer, plain, self.layers[-1], self._settings(mode))
        return Edited(values.T + residual, deltas)

    def _reference_edit(
        self, mode: str, projectors: Mapping[int, Tensor], edited: Edited, targets: Tensor | None
    ) -> Tensor:
        """The published procedure with the mode's projector and ridge, evaluated and taken back; returns its targets.

        `targets` are those of an earlier mode: they depend on neither, so they aren't searched again.
        """
        settings, requests = self._settings(mode), self.workload.plain_requests()
        contexts = [["{}"], list(self.configs[mode].context_templates or ())]
        first = targets is None
        if targets is None:
            targets = self._reference_targets(requests, contexts, settings, edited.targets)
            if mode == "paper" and self.searched != 0:
                self.agreement["targets"] = largest(edited.targets[: self.searched], targets[: self.searched])
        names = [f"{settings.down_projection.format(layer)}.weight" for layer in self.layers]
        before = {name: self.model.get_parameter(name).detach().clone() for name in names}
        watch = self.reference if first else Stopwatch()
        with watch.measuring("keys, solve and write"):
            record = reference.apply_edits(
                self.model, self.tokenizer, requests, contexts, projectors, settings, targets=targets
            )
        self._evaluate(f"reference ({mode})")
        with torch.no_grad():
            for name, weight in before.items():
                self.model.get_parameter(name).copy_(weight)
        if mode == "paper":
            self.agreement["deltas"] = largest(edited.deltas, [record.deltas[layer] for layer in self.layers])
        if first:
            seconds = dict(record.seconds)
            seconds["keys"] += seconds.pop("values") + seconds.pop("past keys")
            self.reference.seconds |= seconds
            if "targets" in self.reference.seconds:
                parts = [self.reference.peak.get(part) for part in ("targets", "keys, solve and write")]
                self.reference.peak |= {"apply": max(found)} if (found := [peak for peak in parts if peak]) else {}
                self.reference.seconds["apply"] = self.reference.seconds["targets"] + sum(seconds.values())
        return targets

    def _reference_targets(
        self, requests: Sequence[Mapping[str, str]], contexts: list, settings: Settings, lent: Tensor
    ) -> Tensor:
        """(n, h): the first `searched` by the reference, its time scaled to all; the others are `lent`."""
        count = len(requests) if self.searched is None else min(self.searched, len(requests))
        targets = lent.clone()
        for index, request in enumerate(requests[:count]):
            with self.reference.measuring("targets"):
                found = reference.compute_target(
                    self.model, self.tokenizer, request, self.layers[-1], contexts, settings
                )
            targets[index] = found[0]
        if count < len(requests):
            self.notes.append(
                f"the reference searched {count} of {len(requests)} targets; its time is scaled to all of them, "
                "and the other targets are the library's"
            )
        if count:
            self.reference.seconds["targets"] *= len(requests) / count
        return targets

    def _share(self, editor: AlphaEditor, report: EditReport, dtype: torch.dtype, rate: float) -> dict[str, Any]:
        contexts = editor.config.context_templates or ()
        encoded = encode_requests(self.tokenizer, self.requests, contexts, editor.config)
        updates = [outcome.steps for outcome in report.outcomes]
        in_turn = editor.config.contexts_in_turn
        operations = target_operations(editor.architecture, encoded, self.layers[-1], updates, in_turn)
        achieved = operations.total / report.seconds["targets"]
        return {
            "dtype": str(dtype).removeprefix("torch."), "rate": rate, "achieved": achieved, "share": achieved / rate,
            "updates": updates, "operations": {**asdict(operations), "total": operations.total},
        }  # fmt: skip

    def _settings(self, mode: str) -> Settings:
        """The published search, and the mode's ridge."""
        paper = self.configs[mode].paper()
        return Settings(
            layers=self.layers, v_num_grad_steps=paper.value_steps, v_lr=paper.learning_rate,
            v_weight_decay=paper.weight_decay, clamp_norm_factor=paper.clamp_factor, kl_factor=paper.kl_factor,
            stop_loss=paper.stop_loss, l2=self.configs[mode].l2,
        )  # fmt: skip

    def _evaluate(self, side: str) -> None:
        if self.metrics:
            report = evaluate(self.model, self.tokenizer, self.workload.records, metrics=METRICS)
            self.evaluated[side] = {name: estimate.value for name, estimate in report.metrics.items()}


def largest(found: Any, expected: Any) -> float:
    """The largest ‖found - expected‖ / ‖expected‖ over pairs of tensors."""
    pairs = [(mine.double(), theirs.double()) for mine, theirs in zip(found, expected, strict=True)]
    return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)
