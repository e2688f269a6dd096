"""Token rows: where the subject ends, whatever the tokenizer does at the beginning, at the end and in between."""

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from tiny import BEGIN, END, tiny_tokenizer
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_alphaedit.errors import RequestError
from hf_alphaedit.models.encoding import (
    TokenRow,
    encode_prompt,
    encode_request,
    encode_target,
    encode_with_spans,
    with_aside,
    with_gaps,
)
from hf_alphaedit.requests import EditRequest


PROMPTS = [
    ("The capital of {} is", "Norway"),
    ("{} is known for", "Marie Curie"),
    ("The work of {}'s student, {braces}, is", "Johann Sebastian Bach"),
    ("{}", "Ada Lovelace"),
    ("中国的首都{}是", "北京"),
    ("On {}, people say", "🙂 day"),
    ("a {} b", "trailing space "),
    ("Søren met {} in", "Łukasz Żółć"),
]
KINDS = [("byte_level", False), ("byte_level", True), ("metaspace", False), ("metaspace", True)]
CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class WithoutOffsets(PreTrainedTokenizerFast):
    """A tokenizer that can't say which characters a token stands for, as those without a fast backend."""

    @property
    def is_fast(self) -> bool:
        return False

    def __call__(self, *arguments, return_offsets_mapping: bool = False, **keywords):
        assert not return_offsets_mapping, "this tokenizer has no offsets"
        return super().__call__(*arguments, **keywords)


def without_offsets(kind: str, bos: bool) -> PreTrainedTokenizerBase:
    fast = tiny_tokenizer(kind, bos=bos)
    return WithoutOffsets(
        tokenizer_object=fast.backend_tokenizer, eos_token=END, bos_token=fast.bos_token, pad_token=fast.pad_token
    )


def prompts_of(tokenizer: PreTrainedTokenizerBase, rows: Iterable[TokenRow]) -> list[str]:
    """What each row says before the target."""
    return [tokenizer.decode(row.token_ids[: row.first_prediction + 1]) for row in rows]


def subject_by_decoding(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: str, subject: str) -> int:
    """The first token after which the decoded text holds the whole subject: an oracle that uses no offsets."""
    wanted = prompt[: prompt.index("{}")] + subject.rstrip()
    for count in range(1, len(ids) + 1):
        if tokenizer.decode(ids[:count], skip_special_tokens=True).strip().startswith(wanted.strip()):
            return count - 1
    raise AssertionError("the subject is nowhere")


@pytest.mark.parametrize(("prompt", "subject"), PROMPTS)
@pytest.mark.parametrize(("kind", "bos"), KINDS)
def test_the_subject_ends_where_its_last_character_is(kind: str, bos: bool, prompt: str, subject: str) -> None:
    tokenizer = tiny_tokenizer(kind, bos=bos)
    ids, index = encode_prompt(tokenizer, prompt, subject)
    assert index == subject_by_decoding(tokenizer, ids, prompt, subject)
    assert (ids[0] == tokenizer.bos_token_id) is bos


@pytest.mark.parametrize(("prompt", "subject"), PROMPTS)
@pytest.mark.parametrize(("kind", "bos"), KINDS)
def test_without_offsets_the_rows_are_the_same(kind: str, bos: bool, prompt: str, subject: str) -> None:
    assert encode_prompt(without_offsets(kind, bos), prompt, subject) == encode_prompt(
        tiny_tokenizer(kind, bos=bos), prompt, subject
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_a_missing_pad_token_change_nothing(side: str) -> None:
    request = EditRequest("The capital of {} is", "Norway", "Lima")
    plain = encode_request(tiny_tokenizer(), request, ("So: {}",))
    assert encode_request(tiny_tokenizer(pad=False, padding_side=side), request, ("So: {}",)) == plain


def test_a_token_that_the_tokenizer_puts_at_the_end_is_dropped() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 1), (END, 0)]
    )
    assert tokenizer("Norway")["input_ids"][-1] == tokenizer.eos_token_id
    request = EditRequest("The capital of {} is", "Norway", "Lima")
    appending, plain = encode_request(tokenizer, request), encode_request(tiny_tokenizer(bos=True), request)
    assert appending == plain


@pytest.mark.parametrize(("kind", "bos"), KINDS)
def test_prompt_and_target_are_the_tokens_of_the_whole_text(kind: str, bos: bool) -> None:
    tokenizer = tiny_tokenizer(kind, bos=bos)
    encoded = encode_request(tokenizer, EditRequest("The capital of {} is", "Norway", "Lima"))
    row = encoded.rows[0]
    assert [*row.token_ids, encoded.target[-1]] == encode_with_spans(tokenizer, "The capital of Norway is Lima")[0]
    assert len(row.token_ids) - row.first_prediction == len(encoded.target)


def test_contexts_come_before_and_keep_the_subject() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    bare, framed = encode_request(
        tokenizer, EditRequest("The capital of {} is", "Norway", "Lima"), ("People say. {}",)
    ).rows
    assert framed.subject > bare.subject
    assert framed.token_ids[framed.subject] == bare.token_ids[bare.subject]
    assert framed.until_subject().token_ids == framed.token_ids[: framed.subject + 1]


def test_mentions_are_the_subject_alone_behind_each_context() -> None:
    tokenizer, contexts = tiny_tokenizer(bos=True), ("People say. {}", "It is {} again")
    request = EditRequest("The capital of {} is", "Norway", "Lima")
    mentions = encode_request(tokenizer, request, contexts, mentions=True).mentions
    texts = [tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in mentions]
    assert texts == ["People say. Norway", "It is Norway"]
    assert all(row.subject == row.first_prediction == len(row.token_ids) - 1 for row in mentions)
    assert encode_request(tokenizer, request, contexts).mentions == ()
    assert encode_request(tokenizer, request, mentions=True).mentions == ()


def test_every_second_context_gets_an_aside_from_the_next() -> None:
    tokenizer, contexts = tiny_tokenizer(), ("Yes. {}", "No. {}", "I say, {}", "So. {}")
    request = EditRequest("The capital of {} is", "Norway", "Lima")
    plain, asides = (encode_request(tokenizer, request, contexts, asides=asides) for asides in (False, True))
    texts = prompts_of(tokenizer, asides.rows)
    assert texts == [
        "The capital of Norway is",
        "Yes. The capital of Norway is",
        "No. The capital of Norway (I say,) is",
        "I say, The capital of Norway is",
        "So. The capital of Norway (Yes) is",
    ]
    assert [row.until_subject().token_ids for row in asides.rows] == [
        row.until_subject().token_ids for row in plain.rows
    ]  # a causal model has the same keys
    assert (asides.target, asides.essence, asides.mentions) == (plain.target, plain.essence, plain.mentions)


def test_other_prompts_take_the_place_of_the_prompt_in_contexts() -> None:
    tokenizer, contexts = tiny_tokenizer(), ("Yes. {}", "No. {}", "I say, {}")
    request = EditRequest(
        "The capital of {} is", "Norway", "Lima", other_prompts=("In {}, they rule from", "{} has its court in")
    )
    encoded = encode_request(tokenizer, request, contexts, asides=True, mentions=True)
    texts = prompts_of(tokenizer, encoded.rows)
    assert texts == [
        "The capital of Norway is",
        "Yes. In Norway, they rule from",
        "No. Norway has its court in",
        "I say, In Norway, they rule from",
    ]
    assert [tokenizer.decode(row.until_subject().token_ids) for row in encoded.rows] == [
        "The capital of Norway", "Yes. In Norway", "No. Norway", "I say, In Norway",
    ]  # fmt: skip
    assert all(row.token_ids[row.first_prediction + 1 :] == encoded.target[:-1] for row in encoded.rows)
    plain = encode_request(tokenizer, replace(request, other_prompts=()), contexts, asides=True, mentions=True)
    assert (encoded.target, encoded.essence, encoded.mentions) == (plain.target, plain.essence, plain.mentions)


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("The mother tongue of {} is", "{} is"),
        ("{} was written in the city of ", "{} of "),
        ('In "{}", people mostly speak', '"{}", speak'),
        ("Who leads {}'s green party?\n", "{}'s party?\n"),
        ("The capital of {}", "{}"),
        ("{}", "{}"),
        ("中国的首都{}是", "中国的首都{}是"),
        ("The {brace} of {} is", "{} is"),
    ],
)
def test_gaps_leave_what_touches_the_subject_and_the_last_word(prompt: str, left: str) -> None:
    assert with_gaps(prompt, 1.0, random.Random(0)) == left
    assert with_gaps(prompt, 0.0, random.Random(0)) == prompt


def test_gaps_are_the_same_each_time_and_differ_between_contexts() -> None:
    tokenizer, contexts = tiny_tokenizer(), ("Yes. {}", "No. {}", "So. {}")
    request = EditRequest("In the north of {} the people are known to speak", "Norway", "Lima")
    rows, again = (encode_request(tokenizer, request, contexts, gaps=0.5).rows for _ in range(2))
    assert rows == again
    bare, *texts = prompts_of(tokenizer, rows)
    assert bare == request.text
    assert len({text.split(". ")[1] for text in texts}) == 3
    for text, row in zip(texts, rows[1:], strict=True):
        words = iter(request.text.split())
        assert all(word in words for word in text.split(". ")[1].split())  # the same words in the same order
        assert text.endswith(" speak")
        assert tokenizer.decode(row.token_ids[: row.subject + 1]).endswith("Norway")


def test_gaps_leave_about_their_share() -> None:
    prompt = "a " * 500 + "{} " + "b " * 500 + "c"
    left = with_gaps(prompt, 0.25, random.Random(1)).split()
    assert left.count("a") == pytest.approx(375, abs=40)
    assert left.count("b") == pytest.approx(375, abs=40)


@pytest.mark.parametrize("prompt", ["{}", "{}'s capital is", "中国的首都{}是", "{}, which lies in"])
def test_no_aside_where_no_space_follows_the_subject(prompt: str) -> None:
    assert with_aside(prompt, "Yes. {}") == prompt
    assert with_aside("{} is", "{} Yes") == "{} is"


@pytest.mark.parametrize("bos", [False, True])
def test_a_chat_template_brings_its_own_special_tokens(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": [BEGIN]})
    tokenizer.chat_template = CHAT
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The capital of {} is"}], tokenize=False, add_generation_prompt=True
    )
    ids, subject = encode_prompt(tokenizer, prompt, "Norway")
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert tokenizer.decode(ids[: subject + 1]).endswith("The capital of Norway")
    whole = tokenizer(prompt.replace("{}", "Norway"), add_special_tokens=False)["input_ids"]
    assert ids == whole


def test_a_target_that_merges_with_the_prompt_is_encoded_alone() -> None:
    tokenizer = tiny_tokenizer()
    prompt, target = "The capital of France is", "land"
    prompt_ids = tokenizer(prompt)["input_ids"]
    joint = tokenizer(prompt + target)["input_ids"]
    expected = joint[len(prompt_ids) :] if joint[: len(prompt_ids)] == prompt_ids else tokenizer(target)["input_ids"]
    assert encode_target(tokenizer, prompt, target) == expected


def test_a_subject_that_the_tokenizer_drops_is_refused() -> None:
    tokenizer = tiny_tokenizer("metaspace")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("§", "")
    with pytest.raises(RequestError, match="no token holds the last character"):
        encode_prompt(tokenizer, "{} is", "§")
