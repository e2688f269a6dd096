"""Where the text for the second moments comes from: memory, local files, the Hub, or the model itself."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HTTPError  # of the HTTP library that this release of the Hub client uses
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import StatisticsError
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.weights import input_device
from hf_alphaedit.packing import Document, leading_special_tokens, within_context


logger = logging.getLogger(__name__)

DEFAULT_CORPUS = "wikimedia/wikipedia:20231101.en"
SELF_CORPUS = "self"
SAMPLE_LENGTH = 128  # tokens of one sampled text; many short texts tell more than few long ones
SAMPLES_PER_BATCH = 128

Corpus = str | Path | Iterable[str]


def open_corpus(
    corpus: Corpus | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    seed: int = 0,
) -> tuple[Iterable[Document], str]:
    """The documents of `corpus` and its identity, as in `texts_of`; nothing is read before the first iteration.

    "self" is text sampled from `model`, which should be the unedited one. None means Wikipedia from the Hub, or "self"
    where that can't be reached; the log says so.
    """
    if corpus is None:
        try:
            return _dataset_texts(DEFAULT_CORPUS)
        except StatisticsError as error:
            logger.warning("%s; text sampled from the model itself is used instead", error)
            corpus = SELF_CORPUS
    if corpus == SELF_CORPUS:
        sampler = partial(sample_self_corpus, model, tokenizer, num_tokens, seed)
        return _Rereadable(sampler), f"self (seed {seed}, {num_tokens} tokens)"
    return texts_of(corpus)


def texts_of(corpus: Corpus) -> tuple[Iterable[str], str]:
    """The texts of `corpus`, and a string that identifies their content.

    - a path to a .txt file (texts separated by blank lines) or a .jsonl file (field `text`): file name and SHA-256;
    - the id of a data set on the Hub, `owner/name[:configuration][@revision]` (extra `datasets`): id and commit.
      Split `train`, field `text`, streamed in shuffled order;
    - an iterable of texts: SHA-256 of the texts. An iterator is read to its end; cut an endless one yourself.

    Raises:
        StatisticsError: the file doesn't exist or has another form, the Hub can't be reached, or there is no text.
    """
    if isinstance(corpus, (str, Path)):
        suffix = Path(corpus).suffix.lower()
        return _file_texts(Path(corpus)) if suffix in (".txt", ".jsonl") else _dataset_texts(str(corpus))
    texts = list(corpus)
    digest = hashlib.sha256()
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise StatisticsError(f"item {index} of the corpus is a {type(text).__name__}, not a text: {text!r:.80}")
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return texts, f"{len(texts)} texts, sha256 {digest.hexdigest()[:16]}"


class _Rereadable(Iterable):
    """Iterates over a fresh call of `read` every time."""

    def __init__(self, read: partial) -> None:
        self.read = read

    def __iter__(self) -> Iterator:
        return self.read()


def _file_texts(path: Path) -> tuple[Iterable[str], str]:
    if not path.is_file():
        raise StatisticsError(f"corpus file {path} doesn't exist; give a .txt or .jsonl file, or a list of texts")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _Rereadable(partial(_read_file, path)), f"{path.name}, sha256 {digest[:16]}"


def _read_file(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        if path.suffix.lower() == ".txt":
            yield from _paragraphs(file)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise StatisticsError(
                    f"{path}, line {number}: no JSON object with a field 'text' ({error!r})"
                ) from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _dataset_texts(name: str) -> tuple[Iterable[str], str]:
    path, _, revision = name.partition("@")
    path, _, configuration = path.partition(":")
    if is_offline_mode():
        raise StatisticsError(
            f"corpus {name!r} is on the Hub, which is switched off (HF_HUB_OFFLINE); give a local file"
        )
    try:
        import datasets
    except ImportError as error:
        raise StatisticsError(
            f"corpus {name!r} needs the datasets package: pip install 'hf-alphaedit[datasets]'"
        ) from error
    try:
        commit = HfApi().dataset_info(path, revision=revision or None, timeout=10).sha
    except (OSError, HTTPError, ValueError) as error:  # ValueError: not an id at all
        raise StatisticsError(f"corpus {name!r} can't be found on the Hub ({error}); give a local file") from error

    def read() -> Iterator[str]:
        rows = datasets.load_dataset(path, configuration or None, split="train", streaming=True, revision=commit)
        yield from (row["text"] for row in rows.shuffle(seed=0, buffer_size=1000))

    return _Rereadable(partial(read)), f"{path}:{configuration}@{commit}"


@torch.no_grad()
def sample_self_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    seed: int,
    *,
    length: int = SAMPLE_LENGTH,
    batch_size: int = SAMPLES_PER_BATCH,
) -> Iterator[list[int]]:
    """Sample documents of at most `length` tokens from the model, at least `num_tokens` tokens in all.

    Temperature 1 from a random first token, without filters and past end-of-text tokens: the model's own distribution.
    The random numbers are the function's own; the global state and the user's generation settings aren't touched.
    """
    logger.info("sampling %d tokens of text from the model itself, as no corpus was given", num_tokens)
    prefix = leading_special_tokens(tokenizer)
    special = set(tokenizer.all_special_ids)
    vocabulary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    generator, device = torch.Generator().manual_seed(seed), input_device(model)
    length = within_context(model, len(prefix) + length) - len(prefix)
    count = -(-num_tokens // length)
    with (
        inference_state(model),
        tqdm(
            total=count * length, desc="Sampling text", unit="token", unit_scale=True, name="hf_alphaedit"
        ) as progress,
    ):
        for start in range(0, count, batch_size):
            rows = min(batch_size, count - start)
            first = vocabulary[torch.randint(len(vocabulary), (rows, 1), generator=generator)]  # (B, 1)
            tokens = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(rows, -1), first], dim=1)
            cache = None
            for _ in range(length - 1):
                outputs = model(
                    input_ids=tokens.to(device) if cache is None else tokens[:, -1:].to(device),
                    attention_mask=torch.ones_like(tokens).to(device),
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = outputs.get("past_key_values")
                probabilities = outputs.logits[:, -1].float().softmax(-1).cpu()  # (B, vocabulary)
                tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
                progress.update(rows)
            progress.update(rows)
            yield from tokens[:, len(prefix) :].tolist()
