"""Second moments of the keys over a corpus: one pass for all layers, cached, resumable, split over processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.algorithm.moments import SecondMoment
from hf_alphaedit.corpus_pass import CorpusPass, Halves
from hf_alphaedit.errors import StatisticsError
from hf_alphaedit.models.weights import EditSite
from hf_alphaedit.packing import Document, leading_special_tokens, pack, within_context
from hf_alphaedit.processes import Processes
from hf_alphaedit.statistics_files import (
    FORMAT_VERSION,
    Description,
    digest_of,
    read_legacy_moment,
    read_moments,
    write_legacy_moment,
    write_moments,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """C = E[k kᵀ] of the unedited model's keys at every site, over the tokens that have a key there.

    The experts of a mixture have one each, under the names of `EditSite.blocks`. An expert that saw fewer tokens than
    its keys have entries has none: its null space would be made of what it was never asked.

    Attributes:
        moments: block -> (d, d) float32, CPU.
        counts: block -> keys seen, for all blocks of all sites.
        files: block -> our own file, which also holds the two half-sample moments; none for a legacy file.
        corpus: identity of the text.
        tokens: keys seen at the first site, over all its blocks.
        seconds: time spent on reading or computing.
        from_cache: whether every moment came from the cache.
    """

    moments: dict[str, Tensor]
    counts: dict[str, int]
    files: dict[str, Path]
    corpus: str
    tokens: int
    seconds: float
    from_cache: bool


def default_cache_directory(model_name: str | None) -> Path:
    """The folder for the second moments of one model, in the Hub's cache of derived files; made if need be."""
    return cached_assets_path("hf_alphaedit", namespace=model_name or "unnamed", subfolder="second_moments")


def collect_second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[EditSite],
    texts: Iterable[Document],
    *,
    num_tokens: int,
    sequence_length: int,
    base_fingerprint: str,
    tokenizer_fingerprint: str,
    corpus_name: str,
    cache_directory: str | Path,
    force: bool = False,
    count_first: bool = True,
    product_dtype: torch.dtype | None = None,
    forward_dtype: torch.dtype | None = None,
    tokens_per_batch: int = 4096,
    checkpoint_seconds: float = 60.0,
) -> SecondMoments:
    """Second moments of the keys at `sites`, from the cache or from one pass over `texts`.

    The text is packed into sequences of `sequence_length` tokens (at most the model's context), and the forward pass
    ends at the last site, so memory is bounded whatever the context and the vocabulary. The result doesn't depend on
    `tokens_per_batch`, which is halved when memory runs out, nor on the number of processes. A run that is killed goes
    on from its last checkpoint. The model must be the unedited one; it is as before on return.

    Args:
        model: the unedited model, any placement.
        tokenizer: its tokenizer.
        sites: where keys are collected, in the order in which they run; the pass ends after the last.
        texts: texts, or documents of token ids; see `hf_alphaedit.corpus.open_corpus`. Not read if all is cached.
        num_tokens: tokens to read; a shorter corpus is used as it is, with a warning.
        sequence_length: tokens of one packed sequence.
        base_fingerprint: of the unedited weights; like the next two, part of the cache key and checked on reading.
        tokenizer_fingerprint: of the tokenizer.
        corpus_name: identity of the text.
        cache_directory: where moments and checkpoints are kept, see `default_cache_directory`.
        force: compute anew, whatever the cache and the checkpoints hold.
        count_first: count the keys of the special tokens that begin every sequence (BOS), as published.
        product_dtype: dtype of the products k kᵀ, see `SecondMoment`; None is exact.
        forward_dtype: dtype of the matrix products of the forward pass, see `products_in`; None is the model's.
        tokens_per_batch: tokens of one forward pass.
        checkpoint_seconds: time between two checkpoints.

    Raises:
        StatisticsError: the corpus is empty, a site never ran, its keys are not finite, or none of its experts saw
            enough tokens.
    """
    began = time.monotonic()
    processes = Processes.current()
    length = within_context(model, sequence_length)
    common: Description = {
        "format_version": FORMAT_VERSION,
        "base": base_fingerprint,
        "tokenizer": tokenizer_fingerprint,
        "corpus": corpus_name,
        "num_tokens": num_tokens,
        "sequence_length": length,
        "count_first": count_first,
        "model_dtype": str(model.dtype),
        "product_dtype": str(product_dtype),
        "forward_dtype": str(forward_dtype),
    }
    descriptions = {name: {**common, "site": name} for site in sites for name in site.blocks}
    directory = Path(cache_directory)
    files = {name: directory / f"{name}-{digest_of(about)}.safetensors" for name, about in descriptions.items()}

    halves = {} if force else _read_cached(files, descriptions)
    # Processes on several machines may have different caches: what one of them lacks is computed by all.
    lacking = processes.sum(torch.tensor([not halves.keys() >= {*site.blocks} for site in sites]).long())  # (sites,)
    missing = [site for site, count in zip(sites, lacking.tolist(), strict=True) if count]
    if missing:
        about = {**common, "sites": [site.name for site in missing], "process": [processes.rank, processes.count]}
        corpus_pass = CorpusPass(
            model=model,
            sites=missing,
            sequences=_pack_once(processes, texts, tokenizer, num_tokens, length).split(length),
            skipped=0 if count_first else len(leading_special_tokens(tokenizer)),
            processes=processes,
            batch_size=max(1, tokens_per_batch // length),
            product_dtype=product_dtype,
            forward_dtype=forward_dtype,
            checkpoint=directory / f"{digest_of(about)}.checkpoint",
            checkpoint_seconds=checkpoint_seconds,
            description=about,
        )
        collected = corpus_pass.collect(resume=not force)
        if processes.is_main:
            for name, pair in collected.items():
                write_moments(files[name], pair, descriptions[name], torch.float32)
        processes.wait()
        corpus_pass.forget_checkpoint()
        halves |= collected
    return _second_moments(sites, halves, files, corpus_name, began, from_cache=not missing)


def load_second_moments(directory: str | Path, sites: Sequence[EditSite], base_fingerprint: str) -> SecondMoments:
    """Second moments that somebody else computed, from one file per site in `directory`.

    Either our own (`<site>-*.safetensors`, as in the cache) or those of MEMIT and AlphaEdit (`<site>_*mom2*.npz`). The
    latter don't say which weights they belong to, so only their shape is checked.

    Raises:
        StatisticsError: a site has no file or several, or its file is damaged, of another shape, or of other weights.
    """
    began = time.monotonic()
    halves: dict[str, Halves] = {}
    files, corpora = {}, set()
    owners = {name: site for site in sites for name in site.blocks}
    for name, owner in owners.items():
        own, legacy = f"{name}-*.safetensors", f"{name}_*mom2*.npz"
        found = [*Path(directory).glob(own), *Path(directory).glob(legacy)]
        if len(found) != 1 and (found or len(owner.blocks) == 1):  # experts that saw too little may have no file
            raise StatisticsError(f"{directory} has {len(found)} files {own} or {legacy}; exactly one is needed")
        if not found:
            continue
        path = found[0]
        if path.suffix == ".npz":
            half, origin = read_legacy_moment(path, owner.dimension), f"legacy files of {directory}"
            halves[name] = (half, SecondMoment(owner.dimension))
        else:
            (even, odd), about = read_moments(path)
            if (about["base"], about["site"], even.dimension) != (base_fingerprint, name, owner.dimension):
                raise StatisticsError(f"{path} belongs to other weights than those of {name} in this model")
            halves[name], origin, files[name] = (even, odd), about["corpus"], path
        corpora.add(origin)
    return _second_moments(sites, halves, files, ", ".join(sorted(corpora)), began, from_cache=True)


def save_legacy_moments(statistics: SecondMoments, directory: str | Path, *, sample_size: int = 100_000) -> list[Path]:
    """Write one .npz file per site that MEMIT and AlphaEdit read as theirs; return the paths.

    `sample_size` is the number of texts, which stands in the name and the file: these programs look for their own.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, moment in statistics.moments.items():
        paths.append(Path(directory) / f"{name}_float32_mom2_{sample_size}.npz")
        write_legacy_moment(paths[-1], moment, statistics.counts[name], sample_size)
    return paths


def _second_moments(
    sites: Sequence[EditSite],
    halves: dict[str, Halves],
    files: dict[str, Path],
    corpus: str,
    began: float,
    *,
    from_cache: bool,
) -> SecondMoments:
    """The means of `halves`, without those of experts that saw too little."""
    moments, counts = {}, {}
    for site in sites:
        seen = {name: sum(half.count for half in halves.get(name, ())) for name in site.blocks}
        enough = [name for name in site.blocks if len(site.blocks) == 1 or seen[name] >= site.dimension]
        if not enough:
            raise StatisticsError(
                f"none of the {len(seen)} experts of {site.name} saw {site.dimension} tokens, as many as its keys "
                f"have entries (the busiest saw {max(seen.values())}); give more text (num_tokens)"
            )
        moments |= {name: _mean(halves[name]) for name in enough}
        counts |= seen
    tokens = sum(counts[name] for name in sites[0].blocks)
    return SecondMoments(moments, counts, files, corpus, tokens, time.monotonic() - began, from_cache)


def _read_cached(files: dict[str, Path], descriptions: dict[str, Description]) -> dict[str, Halves]:
    """What the cache holds; a file that can't be used is reported and computed again."""
    halves: dict[str, Halves] = {}
    for name, path in files.items():
        if not path.exists():
            continue
        try:
            even, odd = read_moments(path, descriptions[name])[0]
        except (StatisticsError, ValueError) as error:
            logger.warning("cached second moment ignored: %s", error)
            continue
        halves[name] = (even, odd)
    return halves


def _pack_once(
    processes: Processes,
    texts: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    length: int,
) -> Tensor:
    """The packed corpus (n,), read by the main process alone: a sampled or streamed corpus need not repeat itself."""
    tokens = pack(texts, tokenizer, num_tokens, length) if processes.is_main else torch.zeros(0, dtype=torch.int32)
    count = int(processes.sum(torch.tensor(tokens.numel())))
    if not processes.is_main:
        tokens = torch.zeros(count, dtype=torch.int32)
    elif count < num_tokens:
        logger.warning("the corpus has %d tokens, fewer than the %d asked for; all of it is used", count, num_tokens)
    return processes.sum(tokens)


def _mean(halves: Halves) -> Tensor:
    even, odd = halves
    total = SecondMoment(even.dimension)
    total.merge(even)
    total.merge(odd)
    return total.mean()
