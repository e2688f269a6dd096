"""Records of every shape and file format, and everything that must be refused with a reason."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hf_alphaedit.errors import RequestError
from hf_alphaedit.records import Record, as_record, as_requests, read_records, word_positions
from hf_alphaedit.requests import EditRequest


FLAT = {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "English"}
COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["He left. Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": ["J. R. R. Tolkien, a native"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
ZSRE = {
    "example_id": 624,
    "src": "What is the name of Refresh the Demon's record label?",
    "answers": ["Music for Nations", "MFN"],
    "rephrase": "What is the record label for Refresh the Demon?",
    "loc": "nq question: what is a cup measurement in american recipes",
    "loc_ans": "half a liquid pint",
    "subject": "Refresh the Demon",
}
KNOWEDIT = {
    "subject": "Deadly Illusions",
    "prompt": "The name of the screenwriter of Deadly Illusions is",
    "target_new": "Péter Bacsó",
    "ground_truth": "Anna Elizabeth James",
    "rephrase": "The screenwriter of Deadly Illusions is named",
    "portability": {
        "Reasoning": [
            {"prompt": "The occupation of its screenwriter is", "ground_truth": [["director", "film director"]]},
            {"prompt": "Nobody knows", "ground_truth": []},
        ]
    },
    "locality": {"Relation_Specificity": [{"prompt": "Its director is", "ground_truth": "Anna"}]},
}


def test_flat_record_keeps_every_field():
    record = as_record({**FLAT, "target_true": "French", "relation": "P103", "case_id": 7, "rephrase": "She speaks"})
    assert record == Record(
        EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French", "P103", 7), ("She speaks",)
    )


def test_other_prompts_are_texts_with_the_subject_or_its_place():
    prompts = ["{} speaks", "The language of Danielle Darrieux is"]
    request = as_record({**FLAT, "other_prompts": prompts}).request
    assert request.other_prompts == ("{} speaks", "The language of {} is")
    assert as_record({**COUNTERFACT, "other_prompts": prompts}).request.other_prompts == request.other_prompts
    with pytest.raises(RequestError, match="'She speaks' contains the subject 'Danielle Darrieux' not at all"):
        as_record({**FLAT, "other_prompts": ["She speaks"]})


def test_counterfact_record():
    record = as_record(COUNTERFACT)
    assert record.request == EditRequest(
        "The mother tongue of {} is", "Danielle Darrieux", "English", "French", "P103", 3
    )
    assert record.paraphrases == ("He left. Danielle Darrieux, a native",)
    assert record.neighborhood == (("The mother tongue of Léon Blum is", "French"),)
    assert record.attribute_prompts == ("J. R. R. Tolkien, a native",)
    assert record.generation_prompts == ("Danielle Darrieux's mother tongue is",)


def test_counterfact_rewrite_alone_is_a_request():
    assert as_requests([COUNTERFACT["requested_rewrite"]])[0].target_true == "French"


def test_zsre_record_takes_the_first_answer_and_gives_the_other_question_its_mark():
    record = as_record(ZSRE)
    assert record.request == EditRequest(
        "What is the name of {}'s record label?", "Refresh the Demon", "Music for Nations", case_id=624
    )
    assert record.paraphrases == ("What is the record label for Refresh the Demon?",)
    question = "nq question: what is a cup measurement in american recipes?"
    assert record.neighborhood == ((question, "half a liquid pint"),)
    assert as_record({**ZSRE, "loc": ZSRE["loc"] + "?"}).neighborhood[0][0] == question


def test_knowedit_record_flattens_aliases_and_drops_questions_without_answers():
    record = as_record(KNOWEDIT)
    assert record.request.prompt == "The name of the screenwriter of {} is"
    assert record.request.target_true == "Anna Elizabeth James"
    assert record.paraphrases == ("The screenwriter of Deadly Illusions is named",)
    assert record.portability == {
        "Reasoning": (("The occupation of its screenwriter is", ("director", "film director")),)
    }
    assert record.locality == {"Relation_Specificity": (("Its director is", ("Anna",)),)}


def test_records_and_requests_pass_through():
    request = EditRequest(**FLAT)
    assert as_record(request) == Record(request)
    assert as_record(as_record(COUNTERFACT)) == as_record(COUNTERFACT)
    assert as_record(request.to_dict()).request == request


@pytest.mark.parametrize(
    "neighborhood",
    [
        [["Rome is in", "Italy"]],
        [{"prompt": "Rome is in", "answer": "Italy"}],
        [("Rome is in", "Italy")],
    ],
)
def test_flat_neighbours_bring_their_own_answers(neighborhood: list):
    assert as_record({**FLAT, "neighborhood": neighborhood}).neighborhood == (("Rome is in", "Italy"),)
    assert as_record({**FLAT, "neighborhood": ["Rome is in"]}).neighborhood == (("Rome is in", None),)


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The capital of France is", "France", "The capital of {} is"),
        ("In San Francisco, San Franciscans", "San Francisco", "In {}, San Franciscans"),
        ("Anna's sister is Ann", "Ann", "Anna's sister is {}"),
        ("中国的首都是", "中国", "{}的首都是"),
        ("The sign 🇭🇺 stands for", "🇭🇺", "The sign {} stands for"),
        ("Use {x} in C++ for", "C++", "Use {x} in {} for"),
        ("O'Brien's dog", "O'Brien", "{}'s dog"),
        ("Refresh the Demon's label", "the Demon's", "Refresh {} label"),
    ],
)
def test_subject_is_found_as_a_whole_word(prompt: str, subject: str, expected: str):
    request = as_record({"prompt": prompt, "subject": subject, "target_new": "x"}).request
    assert request.prompt == expected
    assert request.text == prompt


def test_word_positions():
    assert word_positions("Anna, Ann and Ann", "Ann") == [6, 14]
    assert word_positions("上海，上海", "上海") == [0, 3]
    assert word_positions("aaa", "aa") == []
    assert word_positions("text", "") == []


BAD: list[tuple[Any, str]] = [
    ("The capital", "is a str"),
    (None, "is a NoneType"),
    ({}, "subject is missing"),
    ({"prompt": "{} is", "subject": "Rome"}, "target_new is missing"),
    ({**FLAT, "subject": ""}, "subject='' is empty"),
    ({**FLAT, "subject": 5}, "subject=5 is a int"),
    ({**FLAT, "prompt": " "}, "prompt=' ' is empty"),
    ({**FLAT, "target_new": {"id": "Q1"}}, "target_new is missing"),
    ({**FLAT, "target_new": []}, r"target_new=\[\] is a list"),
    ({**FLAT, "prompt": "{} and {}"}, "holds 2 placeholders"),
    ({**FLAT, "prompt": "Her mother tongue is"}, "not at all"),
    ({**FLAT, "subject": "mother", "prompt": "Her motherland is"}, "not at all"),
    ({**FLAT, "subject": "Rome", "prompt": "Rome is Rome, so"}, "2 times"),
    ({**FLAT, "paraphrases": 3}, "paraphrases=3 is a int"),
    ({**FLAT, "paraphrases": ["a", ""]}, "paraphrases='' is empty"),
    ({**FLAT, "neighborhood": "Rome is in"}, "neighborhood='Rome is in' is a str"),
    ({**FLAT, "neighborhood": [["a", "b", "c"]]}, "a neighborhood prompt"),
    ({**FLAT, "portability": ["a"]}, "portability=.* is a list"),
    ({**FLAT, "locality": {"group": ["text"]}}, "locality group 'group' holds 'text'"),
    ({"requested_rewrite": "text"}, "requested_rewrite='text' is a str"),
    ({**ZSRE, "answers": []}, "answers is missing or empty"),
    ({**ZSRE, "loc_ans": None}, "loc_ans is missing"),
    ({**ZSRE, "subject": "Demons"}, "not at all"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records_are_refused_by_name(record: Any, message: str):
    with pytest.raises(RequestError, match=message):
        as_record(record)


def test_files_of_every_format_give_the_same_records(tmp_path: Path):
    rows = [{**FLAT, "target_true": "French"}, {"prompt": "{}的首都是", "subject": "中国", "target_new": "上海, 🏙"}]
    (tmp_path / "facts.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = [json.dumps(rows[0]), "", json.dumps(rows[1], ensure_ascii=False).replace("🏙", "🏙\u2028")]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with (tmp_path / "facts.CSV").open("w", encoding="utf-8-sig", newline="") as file:  # as Excel writes it
        writer = csv.DictWriter(file, ["subject", "prompt", "target_new", "target_true", "paraphrases"])
        writer.writeheader()
        writer.writerows([{**rows[0], "paraphrases": '["a b", "c"]'}, rows[1]])
    expected = [as_record(row) for row in rows]
    assert read_records(tmp_path / "facts.json") == expected
    from_lines = read_records(str(tmp_path / "facts.jsonl"))
    assert from_lines[0] == expected[0]
    assert from_lines[1].request.target_new == "上海, 🏙\u2028"
    from_csv = read_records(tmp_path / "facts.CSV")
    assert from_csv[0].paraphrases == ("a b", "c")
    assert [record.request for record in from_csv] == [record.request for record in expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", r"suffix '.txt'"),
        ("a.json", b"{", "can't be read as json"),
        ("a.json", b"\xff\xfe", "can't be read as json"),
        ("a.jsonl", b'{"a": 1}\n{', "can't be read as jsonl"),
        ("a.jsonl", b"[1]\n", "record 1: .* is a list"),
        ("a.jsonl", b"\n", "no .*record"),
        ("a.csv", b"prompt,subject,target_new\n{} is,a,b\n{} is,a,b,c\n", "more cells than the header"),
        ("a.csv", b"prompt,subject,target_new\n{} is,a,b\n{} is,,b\n", "record 2: subject is missing"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_records(tmp_path / name)


def test_one_record_is_no_list():
    with pytest.raises(RequestError, match="pass a list"):
        read_records(FLAT)  # ty: ignore[invalid-argument-type]
    with pytest.raises(RequestError, match="record 1: subject is missing"):
        read_records([FLAT, {}])


@pytest.mark.parametrize(("name", "count"), [("counterfact", 1200), ("zsre", 600), ("knowedit_wiki_counterfact", 200)])
def test_real_data_sets(data_directory: Path, name: str, count: int):
    records = read_records(data_directory / f"{name}.json")
    raw = json.loads((data_directory / f"{name}.json").read_text("utf-8"))
    assert len(records) == count
    for record, source in zip(records, raw, strict=True):
        text = (
            source.get("src")
            or source.get("prompt")
            or source["requested_rewrite"]["prompt"].replace("{}", source["requested_rewrite"]["subject"])
        )
        assert record.request.text == text
