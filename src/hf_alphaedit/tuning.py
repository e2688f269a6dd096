"""Settings for a model by measurement: a coordinate-wise search whose trials are logged, and undone exactly."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_alphaedit.algorithm.nullspace import Spectrum
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.contexts import contexts_for
from hf_alphaedit.corpus import sample_self_corpus, texts_of
from hf_alphaedit.editing import Stopwatch, edit_batch
from hf_alphaedit.errors import EditingError, RequestError, StateError
from hf_alphaedit.evaluation.damage import Reference, make_reference
from hf_alphaedit.evaluation.protocol import evaluate
from hf_alphaedit.filters import collect_moments, site_filters
from hf_alphaedit.history import History
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.weights import EditSite
from hf_alphaedit.records import Record, read_records
from hf_alphaedit.target_cache import SEARCH_SETTINGS
from hf_alphaedit.targets import Targets, compute_targets
from hf_alphaedit.tracing import trace
from hf_alphaedit.tuning_facts import tuning_facts
from hf_alphaedit.tuning_report import Trial, TuningReport, objective
from hf_alphaedit.tuning_search import LADDERS, Search, TrialLog, digest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

logger = logging.getLogger(__name__)

LOG_NAME = "trials.jsonl"
PRESET_NAME = "tuned.json"
METRICS = ("efficacy", "generalization", "specificity")
HELD_OUT_TOKENS = 8192


def tune(
    editor: AlphaEditor,
    directory: str | Path,
    records: Iterable[Record | Mapping[str, Any]] | None = None,
    *,
    texts: Sequence[str] | str | Path | None = None,
    corpus: Any = None,
    windows: Sequence[Sequence[int]] | None = None,
    ladders: Mapping[str, Sequence[float]] | None = None,
    minutes: float = 60.0,
    seed: int = 0,
) -> TuningReport:
    """Search settings for the editor's model: layer window, learning rate, clamp, energy share, ridge.

    From the best of the starting windows, one setting at a time moves to its neighbours for as long as the objective
    (`tuning_report.OBJECTIVE`) rises, until no neighbour is better or the time is up. Every trial edits all facts in
    one batch, is evaluated, and is undone exactly. Trials are logged as they are made, so a search that was killed
    goes on where it was when it is called again with the same arguments. The best settings are written to
    `directory/tuned.json`, a file that `config=` takes, and the editor goes on with its own settings.

    Args:
        editor: of an unedited model; its config is the start.
        directory: for the log and the result; made if need be.
        records: facts with paraphrases and neighbours; None takes the package's own (`tuning_facts`).
        texts: held-out texts or a file of them, for the perplexity; None samples them from the model.
        corpus: for the second moments, as in `AlphaEditor.prepare`.
        windows: layers to start from; None takes the config's and what causal tracing suggests.
        ladders: setting -> its values in ascending order; None is `LADDERS`.
        minutes: no trial begins after them; trials of earlier calls don't count.
        seed: of the contexts and the sampled texts.

    Raises:
        StateError: the model is edited already.
        RequestError: the records can't be used, or have no paraphrases or neighbours.
    """
    if len(editor.history):
        raise StateError(
            f"the model has {len(editor.history)} edits; settings are tuned on the unedited one: undo_all"
        )
    facts = tuning_facts() if records is None else read_records(list(records))
    if not any(record.paraphrases for record in facts) or not any(record.neighborhood for record in facts):
        raise RequestError("the records have no paraphrases or no neighborhood; both are part of the objective")
    with _settings_kept(editor), inference_state(editor.model):
        held_out = _held_out(editor, texts, seed)
        bench = _Bench(editor, facts, held_out, corpus, seed)
        depth = len(editor.architecture.blocks)
        search = Search(
            bench.attempt,
            bench.start,
            depth,
            TrialLog(Path(directory) / LOG_NAME, bench.context),
            time.monotonic() + 60 * minutes,
        )
        starts = [tuple(window) for window in windows] if windows else _starts(editor, facts, seed)
        finished = search.run(starts, LADDERS if ladders is None else ladders)
    best = max(search.trials, key=lambda trial: trial.score)
    config = bench.start.replace(
        **best.settings, source=f"tuned: score {best.score:.1f} after {len(search.trials)} trials"
    )
    report = TuningReport(config, tuple(search.trials), bench.before, finished, bench.conditions)
    report.save_preset(Path(directory) / PRESET_NAME, editor.model.config)
    return report


@contextmanager
def _settings_kept(editor: AlphaEditor) -> Iterator[None]:
    config = editor.config
    try:
        yield
    finally:
        editor.reconfigure(config)


def _held_out(editor: AlphaEditor, texts: Sequence[str] | str | Path | None, seed: int) -> Reference:
    if texts is None:
        # Not the text that the second moments may come from: another seed.
        documents = sample_self_corpus(editor.model, editor.tokenizer, HELD_OUT_TOKENS, seed + 1)
        chosen: Iterable[str] = [str(editor.tokenizer.decode(ids, skip_special_tokens=True)) for ids in documents]
    else:
        chosen = texts_of(texts)[0] if isinstance(texts, (str, Path)) else texts
    return make_reference(editor.model, editor.tokenizer, islice(chosen, 10_000), num_tokens=HELD_OUT_TOKENS)


def _starts(editor: AlphaEditor, facts: Sequence[Record], seed: int) -> list[tuple[int, ...]]:
    """The config's layers, and those that causal tracing suggests where the model knows enough of the facts."""
    starts = [tuple(editor.config.layers or ())]
    try:
        found = trace(
            editor.architecture, editor.tokenizer, [record.request for record in facts if record.request.target_true],
            kinds=("mlp",), layers_to_suggest=len(starts[0]), seed=seed,
        )  # fmt: skip
    except RequestError as error:
        logger.info("tracing suggests nothing: %s", error)
        return starts
    return list(dict.fromkeys([*starts, found.suggested_layers]))


@dataclass(eq=False)
class _Bench:
    """Tries settings on one model: an edit, its evaluation, and the weights as they were."""

    editor: AlphaEditor
    facts: Sequence[Record]
    held_out: Reference
    corpus: Any
    seed: int
    targets: dict[str, Targets] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    decomposed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        editor = self.editor
        self.start = editor.config
        self.contexts = contexts_for(editor.model, editor.tokenizer, editor.config, self.seed)
        self.before = self._measured()
        self.conditions = {
            "facts": len(self.facts),
            "facts_digest": digest([asdict(record) for record in self.facts]),
            "held_out_tokens": self.held_out.windows.numel(),
            "seed": self.seed,
            "model": editor.history.base_model,
            "base_fingerprint": editor.history.base_fingerprint,
        }
        self.context = digest(
            [self.conditions, self.start.to_dict(), self.contexts, self.held_out.windows.tolist(), repr(self.corpus)]
        )

    def _measured(self) -> dict[str, float]:
        report = evaluate(
            self.editor.model, self.editor.tokenizer, self.facts, metrics=METRICS, held_out=self.held_out
        )
        return {name: estimate.value for name, estimate in report.metrics.items()}

    def attempt(self, settings: Mapping[str, Any]) -> Trial:
        """Edit with the start's settings but for `settings`, measure, and put the weights back, bit for bit."""
        began = time.monotonic()
        config = self.start.replace(**settings)
        self.editor.reconfigure(config)
        sites = self.editor.sites()
        filters = site_filters(sites, self._spectra(sites), config)
        scratch = History("", "")  # only for the weights: the editor's own history has no part in this
        scratch.remember_base(sites)
        metrics, error = {}, None
        try:
            edit_batch(
                self.editor.architecture, self.editor.tokenizer, [record.request for record in self.facts],
                self.contexts, filters, scratch, config, Stopwatch(), self._search(config),
            )  # fmt: skip
            metrics = self._measured()
        except EditingError as problem:
            error = str(problem)
        finally:
            for site in sites:
                site.write_edits(scratch)
        score = objective(metrics, self.before) if metrics else 0.0
        return Trial(dict(settings), score, metrics, time.monotonic() - began, error)

    def _spectra(self, sites: Sequence[EditSite]) -> dict[str, Spectrum]:
        """Decomposed once for each weight, whatever the settings of its filter."""
        if not {site.name for site in sites} <= self.decomposed:
            moments: dict[str, Tensor] = collect_moments(self.editor, self.corpus).moments
            self.spectra |= {
                found: Spectrum.of(moment) for found, moment in moments.items() if found not in self.spectra
            }
            self.decomposed |= {site.name for site in sites}
        return self.spectra

    def _search(self, config: AlphaEditConfig) -> Callable[[Sequence[EncodedRequest], int], Targets]:
        """A target search that remembers: with the same settings and nothing written below, targets are the same."""

        def search(encoded: Sequence[EncodedRequest], layer: int) -> Targets:
            architecture = self.editor.architecture
            if not architecture.additive and layer != self.editor.sites()[0].layer:
                return compute_targets(architecture, encoded, layer, config)
            key = digest([layer, *(getattr(config, name) for name in (*SEARCH_SETTINGS, "forward_dtype"))])
            if key not in self.targets:
                self.targets[key] = compute_targets(architecture, encoded, layer, config)
            return self.targets[key]

        return search
