"""`AlphaEditor`: a model, its tokenizer, and the edits made to it so far."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.algorithm.nullspace import SpectralFilter, Spectrum
from hf_alphaedit.atomic import all_or_nothing, unedited, write_weights
from hf_alphaedit.batches import Batch
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.filters import build_filters, collect_moments, null_rank_of
from hf_alphaedit.history import HISTORY_NAME, History
from hf_alphaedit.models.architecture import resolve_architecture
from hf_alphaedit.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.placement import plain_model
from hf_alphaedit.models.weights import EditSite
from hf_alphaedit.presets import config_for
from hf_alphaedit.repository import commit_of, local_copy
from hf_alphaedit.statistics import SecondMoments, default_cache_directory
from hf_alphaedit.statistics_report import StatisticsReport, report_statistics
from hf_alphaedit.undo import undo


if TYPE_CHECKING:
    from hf_alphaedit.corpus import Corpus
    from hf_alphaedit.gate import Gate
    from hf_alphaedit.preflight_report import PreflightReport
    from hf_alphaedit.records import Record
    from hf_alphaedit.report import EditReport
    from hf_alphaedit.requests import EditRequest
    from hf_alphaedit.tuning_report import TuningReport

logger = logging.getLogger(__name__)


class AlphaEditor:
    """Edits facts in a causal language model and keeps the sequence of edits.

    The model stays the user's own plain model; its weights at the edited layers are changed in place. Hooks live only
    while a call runs.

    Attributes:
        model: the (edited) model.
        tokenizer: its tokenizer; never changed.
        config: the settings, layers included.
        history: all edits so far.
        architecture: the parts of the model that editing touches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AlphaEditConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        history: History | None = None,
        base_revision: str | None = None,
    ) -> None:
        """Wrap a model that is already loaded.

        Args:
            config: settings, a preset's name or a path; None finds the preset for the model's shape or derives one.
            history: earlier edits of this very model (from `History.load`); None means it is unedited.
            base_revision: commit of the model on the Hub, where known.

        Raises:
            UnsupportedModelError: the model can't be edited correctly; the message names the reason.
            ConfigError: the settings can't be used.
            StateError: `history` belongs to other weights, another tokenizer or other layers.
        """
        model = plain_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.config = config_for(model, config)
        self.architecture = resolve_architecture(model, self.config.target_module, self.config.layers)
        self._moments: SecondMoments | None = None
        self._spectra: dict[str, Spectrum] | None = None
        self._filters: dict[str, SpectralFilter] | None = None
        sites = self.sites()
        tokenizer_name = tokenizer_fingerprint(tokenizer)
        if history is None:
            history = History(
                model_fingerprint(model), tokenizer_name, base_model=model.config.name_or_path or None,
                base_revision=base_revision,
            )  # fmt: skip
        else:
            history.check(
                base_fingerprint=model_fingerprint(model, history.base_weights),
                tokenizer_fingerprint=tokenizer_name, sites=sites,
            )  # fmt: skip
            history.check_edited(sites)
        self.history = history

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: AlphaEditConfig | Mapping[str, Any] | str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **model_kwargs: Any,
    ) -> Self:
        """Load model and tokenizer, and the earlier edits if the directory or repository holds any.

        Args:
            pretrained_model_name_or_path: a Hub id or a directory.
            config: as in `AlphaEditor(...)`; None takes the settings saved with the edits, if there are any.
            model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` as they are (`dtype`, `device_map`, ...).

        Raises:
            OSError: the model can't be found (transformers' own message).
            UnsupportedModelError, ConfigError, StateError: as `AlphaEditor(...)`.
        """
        name = str(pretrained_model_name_or_path)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub = {key: value for key, value in hub.items() if value is not None}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, **hub, **model_kwargs)
        history_file = local_copy(name, HISTORY_NAME, **hub)
        history = None if history_file is None else History.load(history_file)
        if history is not None and config is None:
            config = AlphaEditConfig.from_dict(dict(history.batches[-1].settings)) if history.batches else None
        return cls(model, tokenizer, config, history=history, base_revision=commit_of(name, **hub))

    def sites(self) -> list[EditSite]:
        """The weights that edits go to, in ascending order of layers."""
        return [self.architecture.site(layer) for layer in self.config.layers or ()]

    @cached_property
    def second_moment_directory(self) -> Path:
        """Where this model's second moments are kept."""
        return default_cache_directory(self.history.base_model or type(self.model).__name__)

    def reconfigure(self, config: AlphaEditConfig) -> None:
        """Go on with other settings; filters are built again when they are needed."""
        if config != self.config:
            self.architecture = resolve_architecture(self.model, config.target_module, config.layers)
            self.config, self._filters = config, None
            if self._moments is not None and any(site.name not in self._moments.moments for site in self.sites()):
                self._moments = self._spectra = None

    def prepare(
        self, corpus: Corpus | None = None, *, num_tokens: int | None = None, force: bool = False,
        convergence: bool = False,
    ) -> StatisticsReport:  # fmt: skip
        """Collect the second moments of the unedited model's keys: the long step, done once and cached.

        Args:
            corpus: texts, a local .txt or .jsonl file, or a data set's id; "self" samples text from the model. None
                takes Wikipedia from the Hub, or "self" (with a warning) where the Hub can't be reached.
            num_tokens: tokens to read; None means `config.tokens_per_dimension` for each dimension of a key.
            force: compute again even if there is a cached result.
            convergence: also compare the two halves of the corpus, to see whether the text was enough.

        Raises:
            StatisticsError: the corpus is empty or can't be read, or the keys are not finite.
        """
        with self.unedited(), inference_state(self.model):
            self._moments = collect_moments(self, corpus, num_tokens=num_tokens, force=force)
        self._spectra = self._filters = None
        return report_statistics(
            self._moments, self.spectra(), partial(null_rank_of, config=self.config), convergence=convergence
        )

    def filters(self) -> dict[str, SpectralFilter]:
        """The filter of each site's key spectrum; collects the statistics if that hasn't been done."""
        if self._filters is None:
            self._filters = build_filters(self.spectra(), self.config)
        return self._filters

    def second_moments(self) -> dict[str, Tensor]:
        """Site name -> E[k kᵀ] (d, d) float32 of the unedited model; collects them if that hasn't been done."""
        if self._moments is None:
            self.prepare()
        return cast(SecondMoments, self._moments).moments

    def spectra(self) -> dict[str, Spectrum]:
        """Site name -> eigen-decomposition of its second moment."""
        if self._spectra is None:
            self._spectra = {name: Spectrum.of(moment) for name, moment in self.second_moments().items()}
        return self._spectra

    def tune(self, directory: str | Path, records: Iterable[Record] | None = None, **options: Any) -> TuningReport:
        """Search settings for this model by measurement; see `hf_alphaedit.tuning.tune` for the options."""
        from hf_alphaedit.tuning import tune

        return tune(self, directory, records, **options)

    @property
    def is_prepared(self) -> bool:
        """Whether the second moments are there, so that `filters()` reads no corpus."""
        return self._moments is not None

    def preflight(
        self, requests: Iterable[Record | EditRequest | Mapping[str, Any]], **options: Any
    ) -> PreflightReport:
        """Look for problems without changing anything; see `hf_alphaedit.preflight.preflight` for the options."""
        from hf_alphaedit.preflight import preflight

        return preflight(self, requests, **options)

    def apply_edits(
        self,
        requests: Iterable[Record | EditRequest | Mapping[str, Any]],
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
        from hf_alphaedit.applying import apply_edits

        return apply_edits(
            self, requests, batch_size=batch_size, seed=seed, preflight=preflight, gate=gate, retry=retry,
            drop_failed=drop_failed,
        )  # fmt: skip

    def undo(self, batches: int = 1) -> None:
        """Take back the last batches, bit for bit; see `hf_alphaedit.undo` for this and for taking out one edit."""
        undo(self, batches)

    def undo_all(self) -> None:
        """Take back every edit: the edited weights are those of the base model."""
        self.write_batches([])

    def write_batches(self, batches: Sequence[Batch]) -> None:
        """Make `batches` the history and give every site the weight that follows from it; all or nothing."""
        with self.all_or_nothing():
            self.history.batches[:] = batches
            self.write_weights()

    def save_pretrained(
        self, save_directory: str | Path, *, include_requests: bool = True, **save_kwargs: Any
    ) -> None:
        """Write a plain transformers checkpoint, plus the settings, the edits and a model card.

        Args:
            include_requests: with False no text of a request is written anywhere.
            save_kwargs: passed to the model's `save_pretrained` as they are (`max_shard_size`, ...).
        """
        from hf_alphaedit.saving import save_editor

        save_editor(self, Path(save_directory), include_requests=include_requests, **save_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; returns the URL. Options: see `hf_alphaedit.hub.push_to_hub`."""
        from hf_alphaedit.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def write_weights(self) -> None:
        """Give every site the weight that follows from the history."""
        write_weights(self)

    def all_or_nothing(self) -> AbstractContextManager[None]:
        """Put weights and history back as they were if the block fails, whatever the reason."""
        return all_or_nothing(self)

    def unedited(self) -> AbstractContextManager[None]:
        """The base model's weights inside the block; the edited ones again on exit."""
        return unedited(self)
