"""Edit requests as token ids, aligned on the subject's last token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.requests import PLACEHOLDER, EditRequest


BARE = PLACEHOLDER
ASIDE = " ({})"
# More than these change nothing that could be measured, and each costs a pass through the edited layers.
KEY_CONTEXTS = 5


@dataclass(frozen=True)
class TokenRow:
    """One row for the model.

    Attributes:
        token_ids: the whole row.
        subject: index of the subject's last token.
        first_prediction: index of the position that predicts the first target token.
    """

    token_ids: tuple[int, ...]
    subject: int
    first_prediction: int

    def until_subject(self) -> TokenRow:
        """The row cut after the subject's last token: all that a causal model's key depends on."""
        return TokenRow(self.token_ids[: self.subject + 1], self.subject, self.subject)


@dataclass(frozen=True)
class EncodedRequest:
    """The rows of one request.

    Attributes:
        rows: one per context, the bare prompt first, each followed by all target tokens but the last.
        essence: '<subject> is a' up to the subject's last token; its next-token distribution is to stay as it is.
        target: token ids of the target.
        mentions: the subject alone behind each of the first `KEY_CONTEXTS` contexts, up to its last token; empty where
            its key isn't wanted.
    """

    rows: tuple[TokenRow, ...]
    essence: TokenRow
    target: tuple[int, ...]
    mentions: tuple[TokenRow, ...] = ()

    @property
    def key_rows(self) -> tuple[TokenRow, ...]:
        """The rows in contexts whose keys are edited; further contexts only vary what the target search sees."""
        return self.rows[1 : 1 + KEY_CONTEXTS]


def encode_request(
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    contexts: Sequence[str] = (),
    *,
    gaps: float = 0.0,
    asides: bool = False,
    mentions: bool = False,
) -> EncodedRequest:
    """Encode the bare prompt and one row per context, with the request's other prompts in turn where it has any.

    Ids are concatenated, never texts: what the model saw as the prompt stays the prompt, whatever characters meet.

    Args:
        tokenizer: the model's.
        request: what to encode.
        contexts: texts with one {} each, where the prompt goes.
        gaps: share of a prompt's words to leave out in each context (see `with_gaps`); which ones depends on the
            request and the context's index alone.
        asides: in every second context, put what stands before the {} of the next one behind the subject, in
            brackets, where a space follows the subject. Requests with other prompts go without.
        mentions: encode the subject alone behind contexts as well.

    Raises:
        RequestError: the target has no tokens.
    """
    target = tuple(encode_target(tokenizer, request.text, request.target_text))
    prompts = [_worded(request, contexts, index, gaps, asides) for index in range(1, len(contexts) + 1)]
    rows = []
    for prompt, context in zip((request.prompt, *prompts), (BARE, *contexts), strict=True):
        prompt_ids, subject = encode_prompt(tokenizer, prompt, request.subject, context)
        rows.append(TokenRow((*prompt_ids, *target[:-1]), subject, len(prompt_ids) - 1))
    essence = _until_subject(tokenizer, "{} is a", request.subject)
    keyed = contexts[:KEY_CONTEXTS] if mentions else ()
    alone = [_until_subject(tokenizer, BARE, request.subject, context) for context in keyed]
    return EncodedRequest(tuple(rows), essence, target, tuple(alone))


def _worded(request: EditRequest, contexts: Sequence[str], index: int, gaps: float, asides: bool) -> str:
    """The prompt as it stands in the context of this index, counted from 1."""
    if request.other_prompts:
        prompt = request.other_prompts[(index - 1) % len(request.other_prompts)]
    else:
        prompt = request.prompt
    if gaps:
        prompt = with_gaps(prompt, gaps, random.Random(f"{index} {request.text}"))
    if asides and index % 2 == 0 and not request.other_prompts:
        prompt = with_aside(prompt, contexts[index % len(contexts)])
    return prompt


def _until_subject(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, context: str = BARE) -> TokenRow:
    token_ids, last = encode_prompt(tokenizer, prompt, subject, context)
    return TokenRow(tuple(token_ids), last, last).until_subject()


def with_gaps(prompt: str, share: float, draws: random.Random) -> str:
    """The prompt without some of its words, each of which goes with probability `share`.

    What is written together with the subject stays ('s, a comma, all of a script without spaces), and so does the last
    word behind it, which the target follows.
    """
    before, after = prompt.split(PLACEHOLDER)
    *ahead, attached_ahead = before.split(" ")
    written = after.rstrip()
    attached, *behind = written.split(" ")
    last = behind[-1:]
    ahead, behind = ([word for word in words if draws.random() >= share] for words in (ahead, behind[:-1]))
    behind_subject = " ".join([attached, *behind, *last]) + after[len(written) :]
    return " ".join([*ahead, attached_ahead]) + PLACEHOLDER + behind_subject


def with_aside(prompt: str, context: str) -> str:
    """The prompt with the beginning of `context` in brackets behind the subject.

    As it is where no space follows the subject ('s, a comma, the end, scripts without spaces), or where the context
    begins with the prompt.
    """
    before, after = prompt.split(PLACEHOLDER)
    aside = context.split(PLACEHOLDER)[0].strip(" .")
    if not aside or not after.startswith(" "):
        return prompt
    return before + PLACEHOLDER + ASIDE.format(aside) + after


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, context: str = BARE
) -> tuple[list[int], int]:
    """Token ids of `context` around `prompt` around `subject`, and the index of the subject's last token.

    That token is the last one whose characters include the subject's last character that isn't white space. Special
    tokens the tokenizer puts in front are kept; those it puts at the end would come between prompt and target, and
    are dropped. Placeholders are filled by position, so braces elsewhere are plain text.
    """
    context_before, context_after = context.split(PLACEHOLDER)
    prompt_before, prompt_after = prompt.split(PLACEHOLDER)
    text = context_before + prompt_before + subject + prompt_after + context_after
    last_character = len(context_before) + len(prompt_before) + len(subject.rstrip()) - 1
    token_ids, spans = encode_with_spans(tokenizer, text)
    holders = [index for index, (start, end) in enumerate(spans) if start <= last_character < end]
    if not holders:
        raise RequestError(
            f"no token holds the last character of the subject {subject!r} in {text!r}; "
            "the tokenizer drops or replaces it, so write the subject differently"
        )
    return token_ids, holders[-1]


def encode_with_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids with special tokens, those at the end dropped, and the span of characters of each token.

    A text that begins with a special token, as chat templates write them, gets no others. Tokenizers without offsets
    (no fast backend) get spans from the lengths of decoded beginnings.
    """
    complete = text.startswith(tuple(tokenizer.all_special_tokens))
    encoded = tokenizer(
        text,
        add_special_tokens=not complete,
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
    )
    token_ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    if tokenizer.is_fast:
        spans = [tuple(span) for span in encoded["offset_mapping"]]
    else:
        spans = _spans_by_decoding(tokenizer, token_ids, text)
    # An empty span alone doesn't tell: byte-level tokenizers may give one to a token of white space.
    while token_ids and special[-1] and spans[-1][0] == spans[-1][1]:
        token_ids.pop(), special.pop(), spans.pop()
    return token_ids, spans


def _spans_by_decoding(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], text: str) -> list[tuple[int, int]]:
    """Spans from decoding ever longer beginnings; a character whose bytes are split belongs to all its tokens."""
    spans, start = [], 0
    for count in range(1, len(token_ids) + 1):
        beginning = tokenizer.decode(token_ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        complete = beginning.rstrip("\N{REPLACEMENT CHARACTER}")
        offset = len(text) - len(text.lstrip()) if not beginning.startswith(text[:1]) else 0
        end = min(len(text), len(complete) + offset)
        unfinished = len(complete) < len(beginning)
        spans.append((start, end + 1 if unfinished else max(end, start)))
        start = max(start, end)
    return spans


def encode_target(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """Token ids of `target` as it follows `prompt`.

    Where tokenising both together leaves the prompt's ids as they are, the target's ids are the rest. Otherwise the
    characters at the joint merge, and the target is tokenised alone, since the model will have seen the prompt alone.

    Raises:
        RequestError: the target has no tokens.
    """
    prompt_ids, _ = encode_with_spans(tokenizer, prompt)
    joint_ids, _ = encode_with_spans(tokenizer, prompt + target)
    if joint_ids[: len(prompt_ids)] == prompt_ids and len(joint_ids) > len(prompt_ids):
        return joint_ids[len(prompt_ids) :]
    target_ids = list(tokenizer(target, add_special_tokens=False)["input_ids"])
    if not target_ids:
        raise RequestError(f"the target {target!r} has no tokens; give the new object as text")
    return target_ids
