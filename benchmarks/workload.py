"""What the benchmarks edit and read: records and text from a folder of evaluation data, or of the project's own."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from own_data import own_records
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.corpus import open_corpus
from hf_alphaedit.packing import pack
from hf_alphaedit.records import Record, as_record


DATA_VARIABLE = "HF_ALPHAEDIT_DATA"


def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, by the examples' own loader."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from smollm2 import load_smollm2

    return load_smollm2()


@dataclass(frozen=True)
class Workload:
    """Records to edit and texts for the statistics, with the token blocks (N, T) the library makes of the texts."""

    records: list[Record]
    texts: list[str]
    blocks: Tensor
    source: str

    def plain_requests(self) -> list[dict[str, str]]:
        """The requests as the reference takes them."""
        requests = [record.request for record in self.records]
        return [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in requests]


def data_directory() -> Path | None:
    """The folder named by `HF_ALPHAEDIT_DATA`, if it is there."""
    named = os.environ.get(DATA_VARIABLE)
    return Path(named) if named and Path(named).is_dir() else None


def load_records(count: int) -> tuple[list[Record], str]:
    """The first `count` records of CounterFact, or facts of the project's own where there is no data."""
    directory = data_directory()
    raw: list[dict[str, Any]]
    if directory is None:
        raw, source = own_records(count), "own facts"
    else:
        raw, source = json.loads((directory / "counterfact.json").read_text("utf-8"))[:count], "CounterFact"
    if len(raw) < count:
        raise ValueError(f"{count} requests are more than the {len(raw)} records of {source}; take fewer")
    return [as_record(record) for record in raw], source


def load_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[list[str], str]:
    """Wikipedia articles of at least `tokens` tokens in all, or texts sampled from the model."""
    directory, texts, count = data_directory(), [], 0
    if directory is None:
        documents, source = open_corpus("self", model, tokenizer, num_tokens=2 * tokens)
        return [str(tokenizer.decode(document)) for document in documents], f"text: {source}"
    with open(directory / "wikipedia.jsonl", encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            count += len(tokenizer(texts[-1], verbose=False)["input_ids"])
            if count >= tokens:
                break
    return texts, "text: Wikipedia"


def load_workload(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, sequence_length: int
) -> Workload:
    """`count` records, and texts that make at most `tokens` tokens in whole sequences."""
    records, source = load_records(count)
    texts, origin = load_texts(model, tokenizer, tokens)
    packed = pack(texts, tokenizer, tokens // sequence_length * sequence_length, sequence_length)  # (n,)
    blocks = packed[: len(packed) // sequence_length * sequence_length].long().view(-1, sequence_length)  # (N, T)
    return Workload(records, texts, blocks, f"{source}, {origin}")
