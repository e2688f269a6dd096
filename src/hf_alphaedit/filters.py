"""From second moments and settings to the filter of each site."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_alphaedit.algorithm.nullspace import (
    BlockFilter,
    KeyFilter,
    SpectralFilter,
    Spectrum,
    hard_filter,
    ridge_filter,
    soft_filter,
)
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.corpus import SELF_CORPUS, Corpus, Document, open_corpus
from hf_alphaedit.errors import StatisticsError
from hf_alphaedit.models.weights import EditSite
from hf_alphaedit.statistics import SecondMoments, collect_second_moments


if TYPE_CHECKING:
    from hf_alphaedit.edited_model import EditedModel

logger = logging.getLogger(__name__)


def collect_moments(
    editor: EditedModel,
    corpus: Corpus | None,
    *,
    num_tokens: int | None = None,
    force: bool = False,
    earlier: str | None = None,
) -> SecondMoments:
    """The second moments of all the editor's sites.

    Args:
        editor: its model must have the unedited weights.
        corpus: see `EditedModel.prepare`.
        num_tokens: see there.
        force: see there.
        earlier: identity of the text that earlier edits were made with. It is what None then stands for: its moments
            are read from the cache, or its text is sampled again, if the model itself wrote it.

    Raises:
        StatisticsError: the corpus is empty or can't be read, or the keys are not finite.
    """
    sites, config, history = editor.sites(), editor.config, editor.history
    again = corpus is None and earlier is not None
    num_tokens = num_tokens or (config.corpus_tokens if again else None) or tokens_wanted(editor)
    documents: Iterable[Document]
    if again and not earlier.startswith(SELF_CORPUS):
        documents, name = _Gone(earlier), earlier
    else:
        wanted = SELF_CORPUS if again else corpus
        documents, name = open_corpus(wanted, editor.model, editor.tokenizer, num_tokens=num_tokens)
    if earlier not in (None, name):
        logger.warning("earlier edits used the statistics of %s; the next ones use those of %s", earlier, name)
    return collect_second_moments(
        editor.model, editor.tokenizer, sites, documents, num_tokens=num_tokens,
        sequence_length=config.sequence_length, base_fingerprint=history.base_fingerprint,
        tokenizer_fingerprint=history.tokenizer_fingerprint, corpus_name=name,
        cache_directory=editor.second_moment_directory, force=force,
    )  # fmt: skip


def tokens_wanted(editor: EditedModel) -> int:
    """Tokens to read so that each block of a key sees `tokens_per_dimension` keys for each of its entries.

    In a mixture of experts a token goes to a few of the blocks only; busy experts will see more, others less.
    """
    probed = editor.architecture.probed
    entries = [-(-site.shape[1] // probed[site.layer].experts_per_token) for site in editor.sites()]
    return editor.config.tokens_per_dimension * max(entries)


class _Gone(Iterable[str]):
    """A text that isn't at hand; its statistics may still be in the cache."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Iterator[str]:
        raise StatisticsError(
            f"the edits so far were made with the statistics of {self.name!r}, which aren't in the cache here: call "
            "prepare with that text, or with another one if that is what you want"
        )


def null_rank_of(spectrum: Spectrum, config: AlphaEditConfig) -> int:
    """How many of the smallest directions count as null space under the config's rule (d at most)."""
    if config.threshold_rule == "energy":
        return spectrum.null_rank_by_energy(config.energy_share)
    return spectrum.null_rank_by_threshold(config.absolute_threshold)


def site_filters(
    sites: Sequence[EditSite], moments: Mapping[str, Tensor | Spectrum], config: AlphaEditConfig
) -> dict[str, KeyFilter]:
    """Site name -> filter of its whole keys, from the second moments (or spectra) of their blocks.

    An expert without a second moment is closed: nothing is written to it.
    """
    wanted = {name: moments[name] for site in sites for name in site.blocks if name in moments}
    filters = build_filters(wanted, config)
    return {
        site.name: BlockFilter(tuple(filters.get(name) for name in site.blocks), site.dimension)
        if len(site.blocks) > 1
        else filters[site.blocks[0]]
        for site in sites
    }


def corpus_energy(matrix: Tensor, site: EditSite, moments: Mapping[str, Tensor]) -> float:
    """E‖M k‖² = tr(M C Mᵀ) over the keys k of the corpus, for M (h, d).

    For a mixture of experts, the sum over those that have a second moment, each over the tokens it saw.
    """
    total = 0.0
    for name, block in zip(site.blocks, matrix.split(site.dimension, dim=1), strict=True):  # (h, d) each
        if name in moments:
            moment = moments[name]
            block = block.to(moment.device, moment.dtype)
            total += float(((block @ moment) * block).sum(dtype=torch.float64))
    return total


def build_filters(moments: Mapping[str, Tensor | Spectrum], config: AlphaEditConfig) -> dict[str, SpectralFilter]:
    """Block -> filter, from second moments (d, d) or their spectra.

    Warns where a hard threshold leaves next to nothing, or protects next to nothing.

    Args:
        moments: block -> second moment (d, d), or its spectrum.
        config: the rule and its numbers.
    """
    filters = {}
    for name, moment in tqdm(moments.items(), desc="projector", unit="layer", name="hf_alphaedit", leave=False):
        dimension = len(moment.eigenvalues if isinstance(moment, Spectrum) else moment)
        if config.projection == "none":
            filters[name] = ridge_filter(dimension, config.l2)
            continue
        spectrum = moment if isinstance(moment, Spectrum) else Spectrum.of(moment)
        null_rank = null_rank_of(spectrum, config)
        if config.projection == "soft":
            filters[name] = soft_filter(spectrum, config.soft_weight, config.l2)
            continue
        if not 0.01 < null_rank / dimension < 0.99:
            logger.warning(
                "%s: %d of %d directions count as null space; %s", name, null_rank, dimension,
                "edits will hardly show, raise the threshold" if null_rank < dimension / 2
                else "next to nothing is protected, lower the threshold",
            )  # fmt: skip
        if config.projection == "hard":
            filters[name] = hard_filter(spectrum, null_rank, config.l2)
        else:
            filters[name] = soft_filter(spectrum, config.soft_weight, config.l2, null_rank)
    return filters
