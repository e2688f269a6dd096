"""A model together with what editing it needs: its editable weights, their statistics, and the edits in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.algorithm.nullspace import KeyFilter, Spectrum
from hf_alphaedit.batches import Batch
from hf_alphaedit.config import CONFIG_NAME, AlphaEditConfig
from hf_alphaedit.filters import collect_moments, null_rank_of, site_filters
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


if TYPE_CHECKING:
    from hf_alphaedit.corpus import Corpus


class EditedModel:
    """The state that every operation of `AlphaEditor` works on.

    A weight is always computed from the base weight and the history, never from the weight before: that is what lets
    every change be taken back exactly.

    Attributes:
        model: the (edited) model; the user's own modules.
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
            model: a causal language model, on any device, in any floating-point dtype. Nothing of it is changed here.
            tokenizer: the model's tokenizer.
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
        self._filters: dict[str, KeyFilter] | None = None
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
            revision: branch, tag or commit on the Hub; None takes the main branch.
            token: for private repositories; None takes the one that `hf auth login` stored.
            cache_dir: where downloads are kept; None takes the Hub client's own cache.
            local_files_only: look for nothing on the Hub.
            trust_remote_code: run code that comes with the model.
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
            saved = local_copy(name, CONFIG_NAME, **hub)
            if history.batches:
                config = AlphaEditConfig.from_dict(dict(history.batches[-1].settings))
            elif saved is not None:
                config = AlphaEditConfig.from_json_file(saved)
        return cls(model, tokenizer, config, history=history, base_revision=commit_of(name, **hub))

    def sites(self) -> list[EditSite]:
        """The weights that edits go to, in ascending order of layers."""
        return [self.architecture.site(layer) for layer in self.config.layers or ()]

    def reconfigure(self, config: AlphaEditConfig) -> None:
        """Go on with other settings; what depends on them is built again when it is needed.

        Args:
            config: its `layers` must be set.

        Raises:
            UnsupportedModelError: the model has no such layers or target module.
        """
        if config != self.config:
            self.architecture = resolve_architecture(self.model, config.target_module, config.layers)
            if (config.layers, config.target_module) != (self.config.layers, self.config.target_module):
                self._moments = self._spectra = None
            self.config, self._filters = config, None

    @cached_property
    def second_moment_directory(self) -> Path:
        """Where this model's second moments are kept."""
        return default_cache_directory(self.history.base_model or type(self.model).__name__)

    @cached_property
    def target_directory(self) -> Path:
        """Where targets found for this model are kept."""
        name = self.history.base_model or type(self.model).__name__
        return cached_assets_path("hf_alphaedit", namespace=name, subfolder="targets")

    def prepare(
        self,
        corpus: Corpus | None = None,
        *,
        num_tokens: int | None = None,
        force: bool = False,
        convergence: bool = False,
    ) -> StatisticsReport:
        """Collect the second moments of the unedited model's keys: the long step, done once and cached.

        Args:
            corpus: texts, a local .txt or .jsonl file, or a data set's id; "self" samples text from the model. None
                takes the text of the edits so far; before any, Wikipedia from the Hub, or "self" (with a warning)
                where the Hub can't be reached.
            num_tokens: tokens to read; None means `config.tokens_per_dimension` for each dimension of a key.
            force: compute again even if there is a cached result.
            convergence: also compare the two halves of the corpus, to see whether the text was enough.

        Raises:
            StatisticsError: the corpus is empty or can't be read, or the keys are not finite.
        """
        earlier = self.config.corpus if self.history.batches else None
        with self.unedited(), inference_state(self.model):
            self._moments = collect_moments(self, corpus, num_tokens=num_tokens, force=force, earlier=earlier)
        if (self.config.corpus, num_tokens) != (self._moments.corpus, None):
            self.config = self.config.replace(corpus=self._moments.corpus, corpus_tokens=num_tokens)
        self._spectra = self._filters = None
        null_rank = partial(null_rank_of, config=self.config)
        return report_statistics(self._moments, self.spectra(), null_rank, convergence=convergence)

    def second_moments(self) -> dict[str, Tensor]:
        """Site name -> E[k kᵀ] (d, d) float32 of the unedited model; collects them if that hasn't been done.

        For a mixture of experts, one for each expert that saw enough tokens, under the names of `EditSite.blocks`.
        """
        if self._moments is None:
            self.prepare()
        return cast(SecondMoments, self._moments).moments

    def spectra(self) -> dict[str, Spectrum]:
        """Site name -> eigen-decomposition of its second moment, under the same names as `second_moments()`."""
        if self._spectra is None:
            self._spectra = {name: Spectrum.of(moment) for name, moment in self.second_moments().items()}
        return self._spectra

    def filters(self) -> dict[str, KeyFilter]:
        """The filter of each site's key spectrum; collects the statistics if that hasn't been done."""
        if self._filters is None:
            self._filters = site_filters(self.sites(), self.spectra(), self.config)
        return self._filters

    @property
    def is_prepared(self) -> bool:
        """Whether the second moments are there, so that `filters()` reads no corpus."""
        return self._moments is not None

    def write_weights(self) -> None:
        """Give every site the weight that follows from the history."""
        for site in self.sites():
            if site.name in self.history.base_weights:
                site.write_edits(self.history)

    def write_batches(self, batches: Sequence[Batch]) -> None:
        """Make `batches` the history and give every site the weight that follows from it; all or nothing."""
        with self.all_or_nothing():
            self.history.batches[:] = batches
            self.write_weights()

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Put weights and history back as they were if the block fails, whatever the reason."""
        history = self.history
        batches, contexts, known = list(history.batches), history.contexts, set(history.base_weights)
        history.remember_base(self.sites())
        try:
            yield
        except BaseException:
            history.batches[:], history.contexts = batches, contexts
            self.write_weights()
            for name in set(history.base_weights) - known:
                del history.base_weights[name]
            raise

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The base model's weights inside the block; the edited ones again on exit."""
        batches = list(self.history.batches)
        try:
            if batches:
                self.write_batches([])
            yield
        finally:
            if batches:
                self.write_batches(batches)
