"""What the user wants changed: one `EditRequest` for each fact, from any of the shapes people have."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from hf_alphaedit.errors import RequestError


PLACEHOLDER = "{}"
# How the Unicode names of their characters begin.
SCRIPTS_WITHOUT_SPACES = (
    "CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO", "THAI", "LAO",
    "KHMER", "MYANMAR",
)  # fmt: skip


@dataclass(frozen=True)
class EditRequest:
    """One fact to write.

    Attributes:
        prompt: text with exactly one `{}` where the subject stands, e.g. `"The mother tongue of {} is"`. Other braces
            are plain text.
        subject: what the fact is about.
        target_new: what the model shall say next.
        target_true: what it says now, where known; only used to report and to evaluate.
        relation: name of the relation, where known (CounterFact's `relation_id`); used to find conflicts.
        case_id: the data set's own number or name of the record.
        other_prompts: the fact in other words, each with one `{}` and to be continued by the same target. The search
            looks at them in the contexts, where it would look at the prompt again.

    Raises:
        RequestError: no or several `{}`, an empty field, or another prompt that the target continues otherwise.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    relation: str | None = None
    case_id: int | str | None = None
    other_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise RequestError(f"{name}={value!r} is a {type(value).__name__}; a text is needed")
            if not value.strip():
                raise RequestError(f"{name}={value!r} is empty; say what the fact's {name} is")
        if isinstance(self.other_prompts, str):
            raise RequestError(f"other_prompts={self.other_prompts!r} is one text; give a list of texts")
        object.__setattr__(self, "other_prompts", tuple(self.other_prompts or ()))  # JSON gives a list
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                raise RequestError(f"other_prompts holds {prompt!r}, a {type(prompt).__name__}; a text is needed")
            if prompt.count(PLACEHOLDER) != 1:
                raise RequestError(
                    f"prompt={prompt!r} holds {prompt.count(PLACEHOLDER)} placeholders {{}}; write exactly one, "
                    f"where the subject {self.subject!r} stands"
                )
            if joined_target(self.filled(prompt), self.target_new) != self.target_text:
                raise RequestError(
                    f"{self.target_new!r} follows {prompt!r} with a space between and {self.prompt!r} without, or the "
                    "other way round; let all prompts of a request end with a space, or none"
                )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt and the other prompts."""
        return self.prompt, *self.other_prompts

    @property
    def text(self) -> str:
        """The prompt with the subject in place (by position, so that other braces stay as they are)."""
        return self.filled(self.prompt)

    def filled(self, prompt: str) -> str:
        """Any prompt with one `{}` with this subject in place."""
        before, after = prompt.split(PLACEHOLDER)
        return before + self.subject + after

    @property
    def target_text(self) -> str:
        """`target_new` as it continues the prompt: one space is put between them where the script wants one."""
        return joined_target(self.text, self.target_new)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the fields that are None or empty."""
        fields = {**vars(self), "other_prompts": list(self.other_prompts)}
        return {name: value for name, value in fields.items() if value is not None and value != []}


def joined_target(prompt: str, target: str) -> str:
    """`target` with one space before it if it needs one to continue `prompt`.

    None is put where either side already has white space at the joint, or where one of the two characters that meet
    belongs to a script that is written without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese).
    """
    if not target or target[0].isspace() or not prompt or prompt[-1].isspace():
        return target
    if written_without_spaces(target[0]) or written_without_spaces(prompt[-1]):
        return target
    return " " + target


def written_without_spaces(character: str) -> bool:
    """Whether the character's script puts no spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese."""
    name = unicodedata.name(character, "")
    return name.startswith(SCRIPTS_WITHOUT_SPACES) or "\u3000" <= character <= "\u303f"  # CJK punctuation
