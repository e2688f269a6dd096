"""`AlphaEditor`: a model, its tokenizer, and the edits made to it so far."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.algorithm.nullspace import SpectralFilter
from hf_alphaedit.batches import Batch
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.contexts import sample_contexts
from hf_alphaedit.corpus import Corpus, open_corpus
from hf_alphaedit.editing import EditedBatch, Stopwatch, edit_batch
from hf_alphaedit.filters import build_filters
from hf_alphaedit.history import HISTORY_NAME, History
from hf_alphaedit.models.architecture import resolve_architecture
from hf_alphaedit.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.weights import EditSite
from hf_alphaedit.outcomes import measure, report_of
from hf_alphaedit.presets import config_for
from hf_alphaedit.report import EditReport
from hf_alphaedit.repository import commit_of, local_copy
from hf_alphaedit.requests import EditRequest, as_requests
from hf_alphaedit.statistics import SecondMoments, collect_second_moments, default_cache_directory


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
        self.model, self.tokenizer = model, tokenizer
        self.config = config_for(model, config)
        self.architecture = resolve_architecture(model, self.config.target_module, self.config.layers)
        self._moments: SecondMoments | None = None
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

    def prepare(
        self, corpus: Corpus | None = None, *, num_tokens: int | None = None, force: bool = False
    ) -> SecondMoments:
        """Collect the second moments of the unedited model's keys: the long step, done once and cached.

        Args:
            corpus: texts, a local .txt or .jsonl file, or a data set's id; "self" samples text from the model. None
                takes Wikipedia from the Hub, or "self" (with a warning) where the Hub can't be reached.
            num_tokens: tokens to read; None means `config.tokens_per_dimension` for each dimension of a key.
            force: compute again even if there is a cached result.

        Raises:
            StatisticsError: the corpus is empty or can't be read, or the keys are not finite.
        """
        sites = self.sites()
        dimension = max(site.read().shape[1] for site in sites)
        num_tokens = num_tokens or self.config.tokens_per_dimension * dimension
        with self._unedited(), inference_state(self.model):
            documents, name = open_corpus(corpus, self.model, self.tokenizer, num_tokens=num_tokens)
            self._moments = collect_second_moments(
                self.model, self.tokenizer, sites, documents, num_tokens=num_tokens,
                sequence_length=self.config.sequence_length, base_fingerprint=self.history.base_fingerprint,
                tokenizer_fingerprint=self.history.tokenizer_fingerprint, corpus_name=name,
                cache_directory=self.second_moment_directory, force=force,
            )  # fmt: skip
        self._filters = None
        return self._moments

    def filters(self) -> dict[str, SpectralFilter]:
        """The filter of each site's key spectrum; collects the statistics if that hasn't been done."""
        if self._filters is None:
            self._filters = build_filters(self.second_moments(), self.config)
        return self._filters

    def second_moments(self) -> dict[str, Tensor]:
        """Site name -> E[k kᵀ] (d, d) float32 of the unedited model; collects them if that hasn't been done."""
        return (self._moments or self.prepare()).moments

    def apply_edits(
        self,
        requests: Iterable[EditRequest | Mapping[str, Any]],
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> EditReport:
        """Write the requested facts into the model, all or nothing.

        Args:
            requests: `EditRequest`s, or mappings in any of the shapes `as_requests` takes.
            batch_size: requests per solve; None takes all at once. Batches follow one another as separate calls would.
            seed: decides the sampled context templates, if this is the first call.

        Returns:
            Before and after for every request, the change of every weight, and the time and memory it took.

        Raises:
            RequestError: a request can't be used; nothing has been done.
            EditingError: the computation failed; weights, hooks, flags and random state are as before.
        """
        wanted = as_requests(requests)
        size = batch_size or len(wanted)
        watch = Stopwatch()
        with watch.measuring("projector"):
            filters = self.filters()
        before_batches = list(self.history.batches)
        edited: list[EditedBatch] = []
        with self._all_or_nothing(), inference_state(self.model):
            with watch.measuring("report"):
                before = measure(self.model, self.tokenizer, wanted)
            if self.history.contexts is None:
                with watch.measuring("contexts"):
                    self.history.contexts = self._contexts(seed)
            starts = range(0, len(wanted), size)
            for start in tqdm(starts, desc="batches", name="hf_alphaedit", disable=len(starts) == 1):
                batch = edit_batch(
                    self.architecture, self.tokenizer, wanted[start : start + size], self.history.contexts, filters,
                    self.history, self.config, watch,
                )  # fmt: skip
                self.history.batches.append(batch.batch)
                edited.append(batch)
            with watch.measuring("report"):
                after = measure(self.model, self.tokenizer, wanted)
                return report_of(self, wanted, before, after, edited, before_batches, watch.seconds)

    def undo(self, batches: int = 1) -> None:
        """Take back the last `batches` batches; the weights are, bit for bit, what they were before them.

        Raises:
            ValueError: there are fewer batches than that.
        """
        if not 1 <= batches <= len(self.history.batches):
            raise ValueError(f"batches={batches} can't be undone: there are {len(self.history.batches)}")
        self.write_batches(self.history.batches[: len(self.history.batches) - batches])

    def undo_all(self) -> None:
        """Take back every edit: the edited weights are those of the base model."""
        self.write_batches([])

    def write_batches(self, batches: Sequence[Batch]) -> None:
        """Make `batches` the history and give every site the weight that follows from it; all or nothing."""
        with self._all_or_nothing():
            self.history.batches[:] = batches
            self._write_weights()

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
        """Upload what `save_pretrained` writes; see `hf_alphaedit.hub.push_to_hub` for the options. Returns the URL."""
        from hf_alphaedit.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def _contexts(self, seed: int) -> tuple[str, ...]:
        if self.config.context_templates is not None:
            return self.config.context_templates
        return sample_contexts(
            self.model, self.tokenizer, length=self.config.context_length,
            keep_special_tokens=self.config.context_special_tokens, seed=seed,
        )  # fmt: skip

    def _write_weights(self) -> None:
        for site in self.sites():
            if site.name in self.history.base_weights:
                site.write(self.history.weight(site.name, device=site.device))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put weights and history back as they were if the block fails, whatever the reason."""
        batches, contexts = list(self.history.batches), self.history.contexts
        self.history.remember_base(self.sites())
        try:
            yield
        except BaseException:
            self.history.batches[:], self.history.contexts = batches, contexts
            self._write_weights()
            raise

    @contextmanager
    def _unedited(self) -> Iterator[None]:
        """The base model's weights inside the block; the edited ones again on exit."""
        if not self.history.batches:
            yield
            return
        batches = list(self.history.batches)
        try:
            self.write_batches([])
            yield
        finally:
            self.write_batches(batches)
