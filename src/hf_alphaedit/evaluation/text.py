"""Measures of texts alone: words, repetition, n-gram entropy, tf-idf similarity, which object is named first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_alphaedit.records import word_positions
from hf_alphaedit.requests import written_without_spaces


# A text is called degenerate only from this many words on; shorter ones (an answer in a chat) say too little.
JUDGED_WORDS = 8
# ... when more than this share of its trigrams has been there before,
MOST_REPETITION = 0.6
# ... or when its words have less than this entropy, relative to that of as many different words.
LEAST_ENTROPY = 0.4


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other visible character by itself.

    Characters of scripts without spaces (Chinese, Japanese, Thai, ...) count as one word each.
    """
    result: list[str] = []
    inside = False
    for character in text:
        plain = character.isalnum() and not written_without_spaces(character)
        if plain and inside:
            result[-1] += character
        elif not character.isspace():
            result.append(character)
        inside = plain
    return result


def ngram_entropy(text: str, size: int) -> float:
    """Entropy in bits of the text's word n-grams of one size; 0 for a text that has none."""
    tokens = words(text)
    counts = Counter(zip(*(tokens[start:] for start in range(size)), strict=False))
    return _entropy(counts)


def fluency(text: str) -> float:
    """Weighted n-gram entropy in bits: (2/3 H2 + 4/3 H3) / 2.

    As in ROME's evaluation, except that words are split by `words` instead of NLTK's rules for English.
    """
    return (2 / 3 * ngram_entropy(text, 2) + 4 / 3 * ngram_entropy(text, 3)) / 2


def degenerate(text: str) -> bool:
    """Whether a text has collapsed into repetition (see the limits at the top of this module)."""
    tokens = words(text.casefold())
    if len(tokens) < JUDGED_WORDS:
        return False
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    repetition = 1 - len(set(trigrams)) / len(trigrams)
    return repetition > MOST_REPETITION or _entropy(Counter(tokens)) < LEAST_ENTROPY * math.log2(len(tokens))


def _entropy(counts: Counter) -> float:
    total = counts.total()
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


@dataclass(frozen=True)
class Judgement:
    """What a continuation says.

    Attributes:
        names_new: it names the new object, and not the old one before it.
        names_old: it names the old object, and not the new one before it.
        degenerate: it has collapsed into repetition.
    """

    names_new: bool
    names_old: bool
    degenerate: bool

    @property
    def success(self) -> bool:
        """The new object comes first, in a text that hasn't collapsed."""
        return self.names_new and not self.degenerate


def judge(continuation: str, new: str, old: str | None = None) -> Judgement:
    """Which of two objects a continuation names first, as a whole word and whatever the case.

    Where one object begins with the other and both are found at one place, the longer one is what is said.
    """
    text = " ".join(continuation.casefold().split())

    def place(answer: str | None) -> tuple[float, int]:
        answer = " ".join((answer or "").casefold().split())
        positions = word_positions(text, answer)
        return (positions[0], -len(answer)) if positions else (math.inf, 0)

    first_new, first_old = place(new), place(old)
    return Judgement(
        names_new=first_new[0] < math.inf and first_new <= first_old,
        names_old=first_old[0] < math.inf and first_old < first_new,
        degenerate=degenerate(continuation),
    )


class TfIdf:
    """Term weights of a corpus: cosine similarity of texts by the words they share, rare words counting more.

    weight(word) = occurrences in the text * (ln((1 + texts) / (1 + texts with the word)) + 1), the smoothed form that
    ROME's evaluation uses through scikit-learn. Words in the corpus count, lower-cased, of two characters or more
    (one, in scripts without spaces).
    """

    def __init__(self, corpus: Iterable[str]) -> None:
        frequency: Counter[str] = Counter()
        texts = 0
        for text in corpus:
            frequency.update(set(self._terms(text)))
            texts += 1
        self.weights = {word: math.log((1 + texts) / (1 + count)) + 1 for word, count in frequency.items()}

    def similarity(self, first: str, second: str) -> float:
        """Cosine in [0, 1]; 0 if a text has no word of the corpus."""
        a, b = self._vector(first), self._vector(second)
        norms = math.hypot(*a.values()) * math.hypot(*b.values())
        return math.fsum(weight * b[word] for word, weight in a.items() if word in b) / norms if norms else 0.0

    def _vector(self, text: str) -> dict[str, float]:
        counts = Counter(self._terms(text))
        return {word: count * self.weights[word] for word, count in counts.items() if word in self.weights}

    @staticmethod
    def _terms(text: str) -> list[str]:
        return [
            word
            for word in words(text.lower())
            if word[0].isalnum() and (len(word) > 1 or written_without_spaces(word))
        ]


def references(corpus: Sequence[str], answer: str, limit: int = 25) -> list[str]:
    """The first `limit` texts of the corpus that name `answer` as a whole word."""
    found: list[str] = []
    for text in corpus:
        if answer in text and word_positions(text, answer):
            found.append(text)
            if len(found) == limit:
                break
    return found
