"""Continuations and scores of one pass against each by itself."""

import pytest
from test_evaluation_scoring import PAIRS, assert_same
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation.generation import generate
from hf_alphaedit.evaluation.scoring import encode_pairs, score
from hf_alphaedit.evaluation.together import continue_and_score


ONE_TOKEN = [("The capital of France is", "a"), ("Marie Curie", "is"), ("The capital of France is", "the")]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
@pytest.mark.parametrize("bos", [True, False])
def test_same_as_each_by_itself(name: str, bos: bool):
    model, tokenizer = tiny_model(name), tiny_tokenizer(bos=bos, pad=False, padding_side="left" if bos else "right")
    pairs = [*ONE_TOKEN, *PAIRS, ONE_TOKEN[1]]
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    texts, scores = continue_and_score(model, tokenizer, pairs, max_new_tokens=6)
    assert texts == dict(zip(prompts, generate(model, tokenizer, prompts, max_new_tokens=6), strict=True))
    assert_same(scores, score(model, tokenizer, pairs))


def test_targets_of_one_token_cost_no_pass_of_their_own(tokenizer: PreTrainedTokenizerBase):
    model, passes = tiny_model("llama"), []
    assert [len(target) for _, target in encode_pairs(model, tokenizer, ONE_TOKEN)] == [1, 1, 1]
    handle = model.register_forward_hook(lambda module, inputs, output: passes.append(output))
    generate(model, tokenizer, [prompt for prompt, _ in ONE_TOKEN], max_new_tokens=4)
    alone = len(passes)
    continue_and_score(model, tokenizer, ONE_TOKEN, max_new_tokens=4)
    handle.remove()
    assert len(passes) == 2 * alone


def test_many_pairs_are_scored_batch_by_batch(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_alphaedit.evaluation.forward.TOKEN_BUDGET", 20)
    model = tiny_model("llama")
    texts, scores = continue_and_score(model, tokenizer, PAIRS + ONE_TOKEN, max_new_tokens=3)
    assert set(texts) == {prompt for prompt, _ in PAIRS + ONE_TOKEN}
    assert_same(scores, score(model, tokenizer, PAIRS + ONE_TOKEN))


def test_nothing_and_an_empty_target(tokenizer: PreTrainedTokenizerBase):
    model = tiny_model("llama")
    assert continue_and_score(model, tokenizer, [], max_new_tokens=3) == ({}, [])
    with pytest.raises(RequestError, match="empty target"):
        continue_and_score(model, tokenizer, [("Marie Curie", "")], max_new_tokens=3)
