"""Teacher forcing against models whose probabilities are known, and against plain one-by-one forward passes."""

import itertools
import math

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, training_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation.scoring import Score, score, score_tokens, shared_rows
from hf_alphaedit.requests import joined_target


PAIRS = [
    ("The capital of France is", "Rome"),
    ("The capital of France is", "Paris, and many people live there."),
    ("The capital of France is", "Paris"),
    ("The capital", "of France is Paris"),
    ("Marie Curie's work in physics was read by students all over the world. She is known for her", "music"),
    ("中国的首都是", "上海"),
    ("日本", "的首都是🏯东京"),
    ("👍", "is a sign"),
    ("A line\n", "and \t another"),
    ("x", "y " * 50),
]


def lookup_model(table: Tensor) -> PreTrainedModel:
    """A Llama whose logits for the next token are `table[token]` (V, V), whatever came before."""
    size = len(table)
    model = tiny_model("llama", vocab_size=size, hidden_size=size, num_hidden_layers=1, rms_norm_eps=0.0)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))  # the norm makes it sqrt(V) times as large
        model.lm_head.weight.copy_(table.T / math.sqrt(size))
    return model


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> tuple[list[int], list[int]]:
    ids = tokenizer(prompt)["input_ids"]
    joint = tokenizer(prompt + joined_target(prompt, target))["input_ids"]
    assert joint[: len(ids)] == ids
    return ids, joint[len(ids) :]


def plain_score(model: PreTrainedModel, prompt: list[int], target: list[int]) -> Score:
    """One unpadded row through the whole model, all logits, float64 softmax."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *target]]), use_cache=False).logits[0].double()
    rows = logits[len(prompt) - 1 : -1]
    values = rows.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
    return Score(tuple(values.tolist()), tuple(rows.argmax(-1).tolist()), tuple(target))


def assert_same(found: list[Score], expected: list[Score]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.predictions == theirs.predictions
        assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=2e-5)


def test_probabilities_of_a_lookup_table():
    table = torch.tensor([[0.0, 1, 2, 3], [4, 0, 0, 0], [0, 0, 0, 9], [1, 1, 2, 1]])
    probabilities = table.softmax(-1)
    (result,) = score_tokens(lookup_model(table), [([0, 1], [0, 3, 1])])
    expected = [probabilities[1, 0], probabilities[0, 3], probabilities[3, 1]]
    assert result.log_probabilities == pytest.approx([math.log(value) for value in expected], abs=1e-5)
    assert result.predictions == (0, 3, 2)
    assert result.correct == (True, True, False)
    assert not result.exact
    assert result.token_accuracy == pytest.approx(2 / 3)
    assert result.loss == pytest.approx(-sum(math.log(value) for value in expected) / 3, abs=1e-5)
    assert math.exp(result.log_probability) == pytest.approx(float(torch.stack(expected).prod()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma2", "bloom", "mixtral"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_scores_equal_plain_passes(name: str, batch_size: int | None):
    model, tokenizer = tiny_model(name), tiny_tokenizer(bos=True)
    expected = [plain_score(model, *encoded(tokenizer, *pair)) for pair in PAIRS]
    assert_same(score(model, tokenizer, PAIRS, batch_size=batch_size), expected)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("bos", [True, False])
def test_padding_settings_and_company_do_not_matter(kind, bos: bool, tiny_gpt2: PreTrainedModel):
    usual = tiny_tokenizer(kind, bos=bos)
    other = tiny_tokenizer(kind, bos=bos, pad=False, padding_side="left")
    together = score(tiny_gpt2, usual, PAIRS)
    assert_same(together, [score(tiny_gpt2, other, [pair])[0] for pair in PAIRS])
    assert_same(score(tiny_gpt2, other, PAIRS[::-1]), together[::-1])
    assert other.padding_side == "left"
    assert other.pad_token is None


def test_target_tokens_decode_to_the_target(tokenizer: PreTrainedTokenizerBase, tiny_llama: PreTrainedModel):
    for (prompt, target), result in zip(PAIRS, score(tiny_llama, tokenizer, PAIRS), strict=True):
        assert tokenizer.decode(result.tokens) == joined_target(prompt, target)
    assert tokenizer.decode(score(tiny_llama, tokenizer, [("法国的首都是", "上海")])[0].tokens) == "上海"


def test_target_that_merges_with_the_prompt_is_tokenised_alone(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
):
    for prompt, target in [("中国", "的首都是"), ("The ", "capital")]:
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(prompt + target)["input_ids"][: len(ids)] != ids
        target_ids = tokenizer(target)["input_ids"]
        (result,) = score(tiny_llama, tokenizer, [(prompt, target)])
        assert_same([result], [plain_score(tiny_llama, ids, target_ids)])


def test_only_target_positions_reach_the_head(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    seen = []
    handle = tiny_llama.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    results = score(tiny_llama, tokenizer, PAIRS[1:3])  # one target begins with the other: a single row
    handle.remove()
    assert seen == [(1, len(results[0].tokens), 32)]


def test_shared_rows_against_brute_force():
    rows = [row for size in range(1, 5) for row in itertools.product((0, 1), repeat=size)][::3] + [(0,), (0,), (1, 1)]
    kept, holder = shared_rows(rows)
    for row, index in zip(rows, holder, strict=True):
        assert kept[index][: len(row)] == row
    for row in kept:
        assert not any(len(other) > len(row) and other[: len(row)] == row for other in rows)
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(rows)


def test_nothing_of_the_model_changes(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    tiny_llama.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    modes = [module.training for module in tiny_llama.modules()]
    score(tiny_llama, tokenizer, PAIRS)
    assert [module.training for module in tiny_llama.modules()] == modes
    assert [parameter.requires_grad for parameter in tiny_llama.parameters()].count(False) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("The capital is", ""), "empty target"),
        (("", "Rome"), "empty prompt"),
        (("The capital is", "a b c d e f " * 40), "has .* tokens; LlamaForCausalLM takes 128"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    pair: tuple[str, str], message: str, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
):
    with pytest.raises(RequestError, match=message):
        score(tiny_llama, tokenizer, [PAIRS[0], pair])


def test_no_pairs(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    assert score(tiny_llama, tokenizer, []) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        score(tiny_llama, tokenizer, PAIRS, batch_size=0)


def test_training_text_is_tokenised_as_a_whole(tiny_llama: PreTrainedModel):
    """The tokens of prompt and target together are those of the text, for every tokenizer and split at a space."""
    for kind, bos in itertools.product(("byte_level", "metaspace"), (True, False)):
        tokenizer = tiny_tokenizer(kind, bos=bos)
        for text in training_text()[:6]:
            prompt, _, target = text.rpartition(" ")
            (result,) = score(tiny_llama, tokenizer, [(prompt, target)])
            whole = tokenizer(text)["input_ids"]
            assert tuple(whole[len(tokenizer(prompt)["input_ids"]) :]) == result.tokens
