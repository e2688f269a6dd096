"""From second moments and settings to the filter of each site."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_alphaedit.algorithm.nullspace import SpectralFilter, Spectrum, hard_filter, ridge_filter, soft_filter
from hf_alphaedit.config import AlphaEditConfig


logger = logging.getLogger(__name__)


def null_rank_of(spectrum: Spectrum, config: AlphaEditConfig) -> int:
    """Directions that count as null space under the config's rule."""
    if config.threshold_rule == "energy":
        return spectrum.null_rank_by_energy(config.energy_share)
    return spectrum.null_rank_by_threshold(config.absolute_threshold)


def build_filters(moments: Mapping[str, Tensor], config: AlphaEditConfig) -> dict[str, SpectralFilter]:
    """Site name -> filter. Warns where a hard threshold leaves next to nothing, or protects next to nothing."""
    filters = {}
    for name, moment in tqdm(moments.items(), desc="projector", unit="layer", name="hf_alphaedit", leave=False):
        if config.projection == "none":
            filters[name] = ridge_filter(len(moment), config.l2)
            continue
        spectrum = Spectrum.of(moment)
        null_rank = null_rank_of(spectrum, config)
        if config.projection == "soft":
            filters[name] = soft_filter(spectrum, config.soft_weight, config.l2)
            continue
        if not 0.01 < null_rank / len(moment) < 0.99:
            logger.warning(
                "%s: %d of %d directions count as null space; %s", name, null_rank, len(moment),
                "edits will hardly show, raise the threshold" if null_rank < len(moment) / 2
                else "next to nothing is protected, lower the threshold",
            )  # fmt: skip
        if config.projection == "hard":
            filters[name] = hard_filter(spectrum, null_rank, config.l2)
        else:
            filters[name] = soft_filter(spectrum, config.soft_weight, config.l2, null_rank)
    return filters
