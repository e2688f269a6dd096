"""Where texts come from, and how they are packed."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import BEGIN, tiny_model, tiny_tokenizer, training_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit import corpus as corpus_module
from hf_alphaedit.corpus import open_corpus, sample_self_corpus, texts_of
from hf_alphaedit.errors import StatisticsError
from hf_alphaedit.packing import leading_special_tokens, pack


# Sources


def test_a_list_of_texts_is_known_by_its_content() -> None:
    texts, name = texts_of(["one", "two"])
    assert list(texts) == ["one", "two"]
    assert texts_of(["one", "two"])[1] == texts_of(text for text in ("one", "two"))[1] == name
    assert len({name, texts_of(["two", "one"])[1], texts_of(["onetwo"])[1], texts_of(["one", "two", ""])[1]}) == 4


def test_an_iterator_can_be_read_twice() -> None:
    texts, _ = texts_of(iter(["one", "two"]))
    assert list(texts) == list(texts) == ["one", "two"]


def test_what_is_not_text_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"item 1 of the corpus is a dict, not a text: \{'text'"):
        texts_of(["one", {"text": "two"}])


def test_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\nFirst line\nsecond line\n  \n\nAnother text\n", encoding="utf-8")
    texts, name = texts_of(str(path))
    assert list(texts) == list(texts) == ["First line\nsecond line\n", "Another text\n"]
    path.write_text("First line", encoding="utf-8")
    assert name.startswith("corpus.txt")
    assert texts_of(path)[1] != name


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    records = [{"title": "a", "text": "Eine Straße"}, {"title": "b", "text": "中国的首都"}]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    assert list(texts_of(path)[0]) == ["Eine Straße", "中国的首都"]


@pytest.mark.parametrize("line", ['{"title": "no text"}', "not json", "[1, 2]"])
def test_bad_json_lines_are_named_by_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(StatisticsError, match="line 2"):
        list(texts_of(path)[0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="absent.jsonl doesn't exist"):
        texts_of(tmp_path / "absent.jsonl")


def test_a_data_set_offline_says_what_to_do() -> None:
    with pytest.raises(StatisticsError, match="HF_HUB_OFFLINE is set|give a local file"):
        texts_of("someone/texts")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub that knows one data set; `datasets` streams it as it streams any other."""
    datasets = pytest.importorskip("datasets")
    asked: dict[str, Any] = {}

    class Api:
        def dataset_info(self, path: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
            if path != "wikimedia/wikipedia":
                raise OSError(f"404: no data set {path}")
            asked["revision asked"] = revision
            return SimpleNamespace(sha=revision or "0123abcd")

    def load_dataset(path: str, name: str | None, **arguments: Any) -> Any:
        asked.update(path=path, name=name, **arguments)
        rows = [{"id": str(index), "text": f"article {index}"} for index in range(20)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(corpus_module, "is_offline_mode", lambda: False)
    monkeypatch.setattr(corpus_module, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_is_streamed_at_one_commit(hub: dict[str, Any]) -> None:
    texts, name = texts_of("wikimedia/wikipedia:20231101.en")
    assert name == "wikimedia/wikipedia:20231101.en@0123abcd"
    assert "path" not in hub  # nothing is loaded before it is read
    read = list(texts)
    assert sorted(read) == sorted(f"article {index}" for index in range(20))
    assert read == list(texts)
    assert (hub["path"], hub["name"], hub["revision"]) == ("wikimedia/wikipedia", "20231101.en", "0123abcd")
    assert hub["streaming"]


def test_the_revision_of_a_data_set_can_be_chosen(hub: dict[str, Any]) -> None:
    assert texts_of("wikimedia/wikipedia@beef")[1] == "wikimedia/wikipedia:@beef"
    assert hub["revision asked"] == "beef"


def test_an_unknown_data_set_is_named(hub: dict[str, Any]) -> None:
    with pytest.raises(StatisticsError, match="'someone/texts' can't be found on the Hub"):
        texts_of("someone/texts")


def test_default_is_wikipedia_online(
    hub: dict[str, Any], tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts, name = open_corpus(None, tiny_llama, tokenizer, num_tokens=10)
    assert name.startswith("wikimedia/wikipedia:20231101.en@")
    assert "article 3" in list(texts)


def test_default_is_the_model_itself_offline_and_the_log_says_so(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    texts, name = open_corpus(None, tiny_llama, tokenizer, num_tokens=200)
    assert "sampled from the model itself is used instead" in caplog.text
    assert name == open_corpus("self", tiny_llama, tokenizer, num_tokens=200)[1]
    assert name != open_corpus("self", tiny_llama, tokenizer, num_tokens=200, seed=1)[1]
    assert sum(len(text) for text in texts) >= 200


def test_open_corpus_takes_what_texts_of_takes(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert open_corpus(["one"], tiny_llama, tokenizer, num_tokens=5) == texts_of(["one"])


# Packing


def plain_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [
        token
        for text in texts
        for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]


def test_documents_are_joined_by_the_end_token_and_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = plain_stream(training_text(), tokenizer)
    assert pack(training_text(), tokenizer, 333, 50).tolist() == stream[:333]
    assert pack(training_text(), tokenizer, 10**6, 50).tolist() == stream
    assert pack(training_text(), tokenizer, 333, 7).dtype == torch.int32


def test_every_sequence_begins_with_bos() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    begin = tokenizer.convert_tokens_to_ids(BEGIN)
    stream = plain_stream(training_text(), tokenizer)
    sequences = [sequence.tolist() for sequence in pack(training_text(), tokenizer, 500, 50).split(50)]
    assert [len(sequence) for sequence in sequences] == [50] * 10
    assert all(sequence[0] == begin and begin not in sequence[1:] for sequence in sequences)
    assert [token for sequence in sequences for token in sequence[1:]] == stream[: 500 - 10]


def test_documents_of_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    expected = [7, 8, 9, end, *tokenizer("text")["input_ids"], end, 5, end]
    assert pack([[7, 8, 9], "text", [5]], tokenizer, 100, 50).tolist() == expected


def test_no_more_is_read_than_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "one more text"

    assert pack(endless(), tokenizer, 1000, 64).numel() == 1000


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_text_is_refused(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(StatisticsError, match="no text"):
        pack(texts, tokenizer, 100, 50)


def test_a_text_longer_than_the_models_context_is_no_warning(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.model_max_length = 16
    assert pack(["word " * 500], tokenizer, 400, 50).numel() == 400
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_leading_special_tokens(kind: Any) -> None:
    assert leading_special_tokens(tiny_tokenizer(kind)) == []
    assert leading_special_tokens(tiny_tokenizer(kind, bos=True)) == [tiny_tokenizer(kind, bos=True).bos_token_id]


# Text from the model itself


def sample_without_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int
) -> list[list[int]]:
    """The same random numbers, with the whole text run again for every token."""
    generator = torch.Generator().manual_seed(seed)
    allowed = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    first = torch.tensor(allowed)[torch.randint(len(allowed), (rows, 1), generator=generator)]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.cat([torch.tensor(begin).long().expand(rows, -1), first], 1)
    with torch.no_grad():
        for _ in range(length - 1):
            probabilities = model(tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens[:, len(begin) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("bos", [False, True])
def test_sampling_with_the_cache_equals_plain_sampling(name: str, bos: bool) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer(bos=bos)
    sampled = list(sample_self_corpus(model, tokenizer, 60, seed=3, length=20))
    assert sampled == sample_without_cache(model, tokenizer, rows=3, length=20, seed=3)


def test_sampling_is_seeded_and_leaves_everything_as_it_was(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_llama.train()
    generation = tiny_llama.generation_config.to_dict()
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO):
        first, again, other = (
            list(sample_self_corpus(tiny_llama, tokenizer, 40, seed, length=20)) for seed in (0, 0, 1)
        )
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tiny_llama.generation_config.to_dict() == generation
    assert all(module.training for module in tiny_llama.modules())
    assert "from the model itself" in caplog.text


def test_samples_come_in_batches_and_fit_the_context() -> None:
    model, tokenizer = tiny_model("gpt2", n_positions=16), tiny_tokenizer(bos=True)
    sampled = list(sample_self_corpus(model, tokenizer, 80, seed=0, length=1000, batch_size=2))
    assert [len(document) for document in sampled] == [15] * 6  # 16 positions, one of them BOS
    assert len({tuple(document) for document in sampled}) == 6
