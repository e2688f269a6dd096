"""Generation against the model's own greedy search, one prompt at a time."""

import copy

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation.generation import end_tokens, generate


PROMPTS = [
    "The capital of France is",
    "Marie Curie",
    "中国的首都是",
    "x",
    "Paris is a city in France, and many people 👍",
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %} bot:{% endif %}"
)


def plain_greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The argmax of whole unpadded passes, one token after another."""
    ids = list(ids)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count:
            token = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            if token in end_tokens(model, tiny_tokenizer()):
                break
            new.append(token)
    return new


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "bloom", "gemma2"])
@pytest.mark.parametrize("bos", [True, False])
def test_greedy_equals_one_by_one(name: str, bos: bool):
    model, tokenizer = tiny_model(name), tiny_tokenizer(bos=bos, pad=False, padding_side="left" if bos else "right")
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        whole = tokenizer.decode(ids + plain_greedy(model, ids, 8), skip_special_tokens=True)
        expected.append(whole.removeprefix(prompt).rstrip("\ufffd"))
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=2) == expected


def test_model_without_a_cache_object_gives_the_same(tokenizer: PreTrainedTokenizerBase):
    model = tiny_model("llama")
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    handle = model.register_forward_hook(lambda module, inputs, output: setattr(output, "past_key_values", None))
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=5) == expected
    handle.remove()


def test_the_models_generation_settings_are_neither_used_nor_changed(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
):
    expected = generate(tiny_llama, tokenizer, PROMPTS)
    settings = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, eos_token_id=0)
    tiny_llama.generation_config = settings
    before = copy.deepcopy(settings.to_dict())
    assert generate(tiny_llama, tokenizer, PROMPTS) == expected
    assert tiny_llama.generation_config is settings
    assert settings.to_dict() == before


def test_an_end_token_ends_only_its_row(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    ids = tokenizer(PROMPTS[0])["input_ids"]
    first, second = plain_greedy(tiny_llama, ids, 2)
    others = generate(tiny_llama, tokenizer, PROMPTS[1:], max_new_tokens=4)
    token = second if second != first else first
    tiny_llama.generation_config.eos_token_id = [0, token]
    ended, *rest = generate(tiny_llama, tokenizer, PROMPTS, max_new_tokens=4)
    assert ended == (tokenizer.decode([first]) if second != first else "").rstrip("\ufffd")
    assert any(text == other for text, other in zip(rest, others, strict=True))


def test_samples_depend_on_seed_and_index_only(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    prompts = [PROMPTS[0]] * 6
    texts = generate(tiny_llama, tokenizer, prompts, top_k=5, seed=1, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(texts)) > 1
    assert generate(tiny_llama, tokenizer, prompts, top_k=5, seed=1, max_new_tokens=6, batch_size=1) == texts
    assert generate(tiny_llama, tokenizer, prompts, top_k=5, seed=2, max_new_tokens=6) != texts


def test_samples_come_from_the_top_k_with_their_probabilities(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
):
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        values, tokens = tiny_llama(ids).logits[0, -1].topk(3)
    count = 400
    texts = generate(tiny_llama, tokenizer, [PROMPTS[0]] * count, top_k=3, max_new_tokens=1)
    for token, probability in zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True):
        share = texts.count(tokenizer.decode([token]).rstrip("\ufffd")) / count
        assert share == pytest.approx(probability, abs=0.08)


def test_total_length_limits_the_continuation(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    length = len(tokenizer(PROMPTS[0])["input_ids"])
    short, none = generate(
        tiny_llama, tokenizer, [PROMPTS[0], PROMPTS[0] * 3], max_new_tokens=9, max_tokens=length + 2
    )
    assert short == generate(tiny_llama, tokenizer, [PROMPTS[0]], max_new_tokens=2)[0]
    assert none == ""


def test_chat_goes_through_the_template(tiny_llama: PreTrainedModel):
    tokenizer = tiny_tokenizer(bos=True)
    with pytest.raises(RequestError, match="no.* template|none; set chat=False"):
        generate(tiny_llama, tokenizer, PROMPTS[:1], chat=True)
    tokenizer.chat_template = TEMPLATE
    for prompt, message in [("Who is it?", "Who is it?"), ("She is", "Complete this sentence: She is")]:
        ids = tokenizer(f"<s>user: {message} bot:", add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        reply = tokenizer.decode(plain_greedy(tiny_llama, ids, 6)).rstrip("\ufffd")
        assert generate(tiny_llama, tokenizer, [prompt], max_new_tokens=6, chat=True) == [reply]


def test_what_cannot_be_continued_is_refused(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    assert generate(tiny_llama, tokenizer, []) == []
    with pytest.raises(RequestError, match="no token"):
        generate(tiny_llama, tokenizer, [""])
    with pytest.raises(RequestError, match="takes 128"):
        generate(tiny_llama, tokenizer, ["a b c d " * 30], max_new_tokens=40)
