"""`AlphaEditor`: a model, its tokenizer, and the edits made to it so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_alphaedit.applying import apply_edits
from hf_alphaedit.check import CheckReport, check_model
from hf_alphaedit.diff import diff
from hf_alphaedit.edited_model import EditedModel
from hf_alphaedit.evaluation.protocol import DEFAULT_METRICS, evaluate
from hf_alphaedit.hub import push_to_hub
from hf_alphaedit.lora import export_lora
from hf_alphaedit.pack import load_edits, save_edits
from hf_alphaedit.preflight import preflight
from hf_alphaedit.processes import Processes
from hf_alphaedit.repairing import lost_edits, repair
from hf_alphaedit.saving import save_editor
from hf_alphaedit.tracing import trace
from hf_alphaedit.tuning import tune
from hf_alphaedit.undo import remove, undo


if TYPE_CHECKING:
    from hf_alphaedit.diff import DiffReport
    from hf_alphaedit.evaluation.report import EvaluationReport
    from hf_alphaedit.gate import Gate
    from hf_alphaedit.lora import ExportReport
    from hf_alphaedit.pack import PackReport
    from hf_alphaedit.preflight_report import PreflightReport
    from hf_alphaedit.records import Record
    from hf_alphaedit.report import EditReport
    from hf_alphaedit.requests import EditRequest
    from hf_alphaedit.trace_report import TraceReport
    from hf_alphaedit.tuning_report import TuningReport

    Fact = Record | EditRequest | Mapping[str, Any]


class AlphaEditor(EditedModel):
    """Edits facts in a causal language model and keeps the sequence of edits.

    The model stays the user's own plain model; its weights at the edited layers are changed in place. Hooks live only
    while a call runs. How it is made, loaded and prepared is in `EditedModel`.
    """

    def preflight(self, requests: Iterable[Fact], **options: Any) -> PreflightReport:
        """Look for problems without changing anything.

        Args:
            requests: as for `apply_edits`.
            options: see `hf_alphaedit.preflight.preflight`.

        Raises:
            RequestError: `requests` is empty or no list; problems of single requests are in the report.
        """
        return preflight(self, requests, **options)

    def apply_edits(
        self,
        requests: Iterable[Fact],
        *,
        batch_size: int | None = None,
        seed: int = 0,
        preflight: bool = True,
        gate: Gate | None = None,
        retry: int = 0,
        drop_failed: bool = False,
    ) -> EditReport:
        """Write the requested facts into the model, all or nothing.

        Args:
            requests: `EditRequest`s, or records or mappings in any of the shapes `as_record` takes.
            batch_size: requests per solve; None takes all at once. Batches follow one another as separate calls would.
            seed: decides the sampled context templates, if this is the first call.
            preflight: look for problems first: errors raise before any work, warnings are in the report.
            gate: what has to be reached; if it isn't, nothing is kept.
            retry: how often requests that aren't predicted token by token after their batch are tried again, each time
                with twice the steps and a tenth of the loss to stop at.
            drop_failed: leave out what still isn't predicted then; the report lists it.

        Returns:
            Before and after for every request, the change of every weight, and the time and memory it took.

        Raises:
            RequestError: a request can't be used; nothing has been done.
            ConfigError: an option is out of range, or the gate asks for what the requests can't tell.
            EditingError: the computation failed; weights, hooks, flags and random state are as before.
            GateError: the gate wasn't passed; everything is as before, and the report is in the error.
        """
        return apply_edits(
            self, requests, batch_size=batch_size, seed=seed, preflight=preflight, gate=gate, retry=retry,
            drop_failed=drop_failed,
        )  # fmt: skip

    @contextmanager
    def applied(self, requests: Iterable[Fact], **options: Any) -> Iterator[EditReport]:
        """Edits for the length of a `with` block, which gets the report of `apply_edits`.

        On exit weights, edits and context templates are those from before the block, whatever was done inside it.

        Args:
            requests: as for `apply_edits`.
            options: the other arguments of `apply_edits`.
        """
        batches, contexts = list(self.history.batches), self.history.contexts
        report = self.apply_edits(requests, **options)
        try:
            yield report
        finally:
            self.write_batches(batches)
            self.history.contexts = contexts

    def lost(self) -> list[EditRequest]:
        """The edits that the model doesn't say (any more), token by token; see `hf_alphaedit.repairing.lost_edits`."""
        return lost_edits(self)

    def repair(self, *, rounds: int = 1, **options: Any) -> list[EditReport]:
        """Make `lost` edits again, in place of the earlier ones, in `rounds` calls of `apply_edits` at most.

        Returns a report for each; see `hf_alphaedit.repairing.repair`, also for what is raised.
        """
        return repair(self, rounds=rounds, **options)

    def check(self) -> CheckReport:
        """Say what will be edited and why, what the probe saw, and what statistics and edits will cost."""
        return check_model(self)

    def undo(self, batches: int = 1) -> None:
        """Take back the last batches, bit for bit.

        Args:
            batches: how many.

        Raises:
            StateError: `batches` is less than 1, or more than there are.
        """
        undo(self, batches)

    def undo_all(self) -> None:
        """Take back every edit: the edited weights are those of the base model, bit for bit."""
        self.write_batches([])

    def remove(self, which: EditRequest | int, *, replay: bool = False) -> None:
        """Take out one edit and keep all others; what is exact about it is told in `hf_alphaedit.undo.remove`.

        Args:
            which: the request, or its index among all edits (negative counts from the end).
            replay: make all other edits again, which is exact, instead of solving again from the stored keys.

        Raises:
            StateError: there is no such edit or several, or what is needed isn't stored.
        """
        remove(self, which, replay=replay)

    def evaluate(
        self, records: Iterable[Fact] = (), *, metrics: Sequence[str] = DEFAULT_METRICS, **options: Any
    ) -> EvaluationReport:
        """Measure the model as it is now; nothing is changed.

        Args:
            records: what to ask; each metric uses the records that have the prompts it needs.
            metrics: what to measure; see `hf_alphaedit.evaluation.protocol.evaluate`, also for all below.
            options: further data (`held_out`, `lambada`, `choices`, `corpus`), and how to measure.

        Raises:
            ValueError: an unknown metric, or one without the data it needs.
            RequestError: a record can't be used.
        """
        return evaluate(self.model, self.tokenizer, records, metrics=metrics, **options)

    def diff(self) -> DiffReport:
        """What the edits changed in each weight; with the share of corpus energy if the statistics are there."""
        return diff(self, self.second_moments() if self.is_prepared else None)

    def trace(self, facts: Iterable[Fact], **options: Any) -> TraceReport:
        """Causal tracing of facts in the unedited model, and the layers it suggests to edit.

        Args:
            facts: with the answer that the model knows; see `hf_alphaedit.tracing.trace`.
            options: see there.

        Raises:
            RequestError: a fact can't be used, or the model knows none of them.
        """
        with self.unedited():
            return trace(self.architecture, self.tokenizer, facts, **options)

    def tune(self, directory: str | Path, records: Iterable[Record] | None = None, **options: Any) -> TuningReport:
        """Search settings for this model by measurement.

        Args:
            directory: gets the log of the trials, from which the search resumes, and the resulting preset.
            records: facts to try settings on; None takes its own.
            options: see `hf_alphaedit.tuning.tune`.
        """
        return tune(self, directory, records, **options)

    def save_pretrained(
        self, save_directory: str | Path, *, include_requests: bool = True, **save_kwargs: Any
    ) -> None:
        """Write a plain transformers checkpoint, plus the settings, the edits and a model card.

        Args:
            save_directory: is made if it doesn't exist.
            include_requests: with False no text of a request is written anywhere.
            save_kwargs: passed to the model's `save_pretrained` as they are (`max_shard_size`, ...).

        Raises:
            UnsupportedModelError: the edits are kept beside 4-bit weights; use `export_lora` or `save_edits`.
        """
        save_editor(self, Path(save_directory), include_requests=include_requests, **save_kwargs)

    def save_edits(
        self, directory: str | Path, *, include_requests: bool = True, include_keys: bool = False
    ) -> PackReport:
        """Write the edits alone, as a small patch for the unedited model; `load_edits` is its inverse.

        Args:
            directory: is made if it doesn't exist.
            include_requests: with False no text of a request is written.
            include_keys: write the keys too, so that edits made after `load_edits` leave these in place.

        Raises:
            StateError: there are no edits.
        """
        return save_edits(
            self, directory, include_requests=include_requests, include_keys=include_keys,
            is_main_process=Processes.current().is_main,
        )  # fmt: skip

    def load_edits(self, directory_or_repo: str | Path, **hub: Any) -> None:
        """Apply what `save_edits` wrote to this model, on top of the edits it has; all or nothing.

        Args:
            directory_or_repo: a directory, or a Hub repository.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            StateError: the edits are damaged, or belong to another base model, layer, tokenizer or dtype.
        """
        load_edits(self, directory_or_repo, **hub)

    def export_lora(
        self, directory: str | Path, *, max_rank: int | None = None, allowed_ranks: Sequence[int] | None = None
    ) -> ExportReport:
        """Write the edits as a standard PEFT LoRA adapter of the unedited model.

        Args:
            directory: is made if it doesn't exist.
            max_rank: cut each delta to this rank; the report has the error. None cuts nothing off.
            allowed_ranks: pad to the smallest of these that is enough, for engines that take only some ranks.

        Raises:
            StateError: there are no edits.
            ConfigError: `max_rank` is less than 1, or no allowed rank is enough.
        """
        return export_lora(self, directory, max_rank=max_rank, allowed_ranks=allowed_ranks)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        include_requests: bool = True,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; returns its address, or that of the pull request.

        Args:
            repo_id: name of the repository; it is made if it doesn't exist.
            commit_message: None says how many facts were edited.
            commit_description: longer text of the commit or pull request.
            private: for a new repository; None takes the organisation's default.
            token: None takes the one that `hf auth login` stored.
            revision: branch to upload to; it is made if it doesn't exist.
            create_pr: open a pull request instead of a commit on the branch.
            max_shard_size: of the weight files; None takes transformers' default.
            tags: for the card's metadata, beside our own.
            include_requests: with False no text of a request is in any file of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub's own error, as it is.
            huggingface_hub.errors.OfflineModeIsEnabled: the Hub is switched off by `HF_HUB_OFFLINE`.
        """
        return push_to_hub(
            self, repo_id, commit_message=commit_message, commit_description=commit_description, private=private,
            token=token, revision=revision, create_pr=create_pr, max_shard_size=max_shard_size, tags=tags,
            include_requests=include_requests,
        )  # fmt: skip
