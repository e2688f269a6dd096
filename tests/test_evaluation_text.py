"""Measures of texts, by hand and against scikit-learn."""

import math

import pytest
from tiny import training_text

from hf_alphaedit.evaluation.text import TfIdf, degenerate, fluency, judge, ngram_entropy, references, words


def test_words():
    assert words("It's  3.5, naïve—中国的🏙") == [
        "It",
        "'",
        "s",
        "3",
        ".",
        "5",
        ",",
        "naïve",
        "—",
        "中",
        "国",
        "的",
        "🏙",
    ]
    assert words(" \n") == []


def test_ngram_entropy_by_hand():
    # bigrams: a b (2), b a, b c: entropies in bits of (1/2, 1/4, 1/4)
    assert ngram_entropy("a b a b c", 2) == pytest.approx(1.5)
    assert ngram_entropy("a b a b c", 3) == pytest.approx(math.log2(3))  # aba, bab, abc
    assert fluency("a b a b c") == pytest.approx((2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2)
    assert ngram_entropy("a a a a", 2) == 0
    assert ngram_entropy("a", 2) == 0
    assert fluency("") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("Paris Paris Paris", False),  # too short to say
        ("Paris. " * 12, True),
        ("is is is is is is is is is is", True),
        ("上海" * 10, True),
        ("the city of the city of the city of the city of the city of the city of", True),
        ("Paris. It is the largest city of the country and the seat of its government.", False),
        ("English. The mother tongue of Danielle Darrieux is English. The mother tongue of", False),
        ("法国的首都是巴黎，它是一座美丽的城市，也是欧洲的中心。", False),
    ],
)
def test_degenerate(text: str, expected: bool):
    assert degenerate(text) is expected


@pytest.mark.parametrize(
    ("text", "new", "old", "says"),
    [
        (" English, not French.", "English", "French", "new"),
        (" French, and English.", "English", "French", "old"),
        (" ENGLISH", "English", "French", "new"),
        (" Englishman", "English", "French", None),
        (" the Frenchman", "English", "French", None),
        (" New\n York City", "New York", None, "new"),
        (" New York City", "New York City", "New York", "new"),
        (" New York City", "New York", "New York City", "old"),
        (" New York", "York", "New York", "old"),
        ("上海。", "上海", "北京", "new"),
        ("是北京，不是上海", "上海", "北京", "old"),
        (" 🏙!", "🏙", "🏯", "new"),
        ("", "English", None, None),
    ],
)
def test_judge_says_which_object_comes_first(text: str, new: str, old: str | None, says: str | None):
    result = judge(text, new, old)
    assert (result.names_new, result.names_old) == (says == "new", says == "old")
    assert result.success == (says == "new")


def test_collapsed_text_is_no_success():
    result = judge(" English" * 12, "English", "French")
    assert result.names_new
    assert result.degenerate
    assert not result.success


def test_tf_idf_by_hand():
    similarity = TfIdf(["aa bb", "AA cc", "d"])  # idf: aa ln(4/3) + 1, bb and cc ln(4/2) + 1; d is one letter
    common, rare = math.log(4 / 3) + 1, math.log(2) + 1
    length = math.hypot(2 * common, rare) * math.hypot(common, rare)
    assert similarity.similarity("aa aa bb d", "cc aa") == pytest.approx(2 * common**2 / length)
    assert similarity.similarity("aa", "other words") == 0


@pytest.mark.slow
def test_tf_idf_equals_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    corpus = [line for line in training_text() if line.isascii()]
    ours, theirs = TfIdf(corpus), text.TfidfVectorizer().fit(corpus)
    pairs = [("The capital of France", "Paris is the capital of Norway, France and France"), (corpus[3], corpus[5])]
    for first, second in [*pairs, ("Unknown words here", corpus[0]), (corpus[0], corpus[0])]:
        vectors = theirs.transform([first, second])
        assert ours.similarity(first, second) == pytest.approx((vectors[0] @ vectors[1].T).sum())


def test_tf_idf_without_spaces():
    similarity = TfIdf(["中国的首都是北京", "法国的首都是巴黎", "日本"])
    assert similarity.similarity("北京", "北京") == pytest.approx(1)
    assert similarity.similarity("北京", "巴黎") == 0
    assert 0 < similarity.similarity("北京的", "中国的首都") < 1


def test_references_name_the_answer_as_a_word():
    corpus = ["He plays rugby.", "Rugby is a town.", "rugbyman", "about rugby", "rugby again"]
    assert references(corpus, "rugby", limit=2) == ["He plays rugby.", "about rugby"]
    assert references(corpus, "chess") == []
