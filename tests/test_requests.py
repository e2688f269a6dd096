"""Requests: where the subject goes, where a space is put, and what is refused."""

import json
from typing import Any

import pytest

from hf_alphaedit.errors import RequestError
from hf_alphaedit.requests import EditRequest, joined_target


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        ("The mother tongue of {} is", "Danielle Darrieux", "The mother tongue of Danielle Darrieux is"),
        ("{}", "Rome", "Rome"),
        ("{}的首都是", "中国", "中国的首都是"),
        ("In {a} {0} } { of {} {b", "France", "In {a} {0} } { of France {b"),
        ("The set {} has", "{1, 2}", "The set {1, 2} has"),
        ("Braces like {} have", "{}", "Braces like {} have"),
        ("100% of {} %s", "%d", "100% of %d %s"),
        ("A {} B", " Rome ", "A  Rome  B"),
    ],
)
def test_the_subject_is_put_in_its_place(prompt: str, subject: str, text: str) -> None:
    assert EditRequest(prompt, subject, "x").text == text


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("The capital of France is", "Rome", " Rome"),
        ("The capital of France is ", "Rome", "Rome"),
        ("The capital of France is\n", "Rome", "Rome"),
        ("The capital of France is", " Rome", " Rome"),
        ("The capital of France is", "\nRome", "\nRome"),
        ("The capital of France is", "  Rome", "  Rome"),
        ("Er heißt", "Übermut", " Übermut"),
        ("Столица Франции —", "Рим", " Рим"),
        ("프랑스의 수도는", "로마", " 로마"),  # Korean separates words by spaces
        ("عاصمة فرنسا هي", "روما", " روما"),
        ("फ़्रांस की राजधानी", "रोम", " रोम"),
        ("中国的首都是", "上海", "上海"),
        ("中国的首都是", "Rome", "Rome"),
        ("The Chinese name of Shanghai is", "上海", "上海"),
        ("フランスの首都は", "ローマ", "ローマ"),
        ("フランスの首都は", "ひらがな", "ひらがな"),
        ("ﾌﾗﾝｽ", "ﾛｰﾏ", "ﾛｰﾏ"),
        ("日本の年号は〇", "々", "々"),
        ("เมืองหลวงของฝรั่งเศสคือ", "โรม", "โรม"),
        ("ເມືອງຫຼວງ", "ໂລມ", "ໂລມ"),
        ("រដ្ឋធានី", "រ៉ូម", "រ៉ូម"),
        ("ပြင်သစ်", "ရောမ", "ရောမ"),
        ("首都：", "Rome", "Rome"),
        ("他写了《", "Hamlet", "Hamlet"),
        ("首都是。", "Rome", "Rome"),
    ],
)
def test_a_space_is_put_where_the_script_wants_one(prompt: str, target: str, joined: str) -> None:
    assert joined_target(prompt, target) == joined
    assert EditRequest("{}", prompt, target).target_text == joined


def test_nothing_is_put_beside_nothing() -> None:
    assert joined_target("", "Rome") == "Rome"
    assert joined_target("It is", "") == ""


@pytest.mark.parametrize(
    ("changes", "value", "remedy"),
    [
        ({"prompt": "The capital is"}, "'The capital is'", "write exactly one.*'France'"),
        ({"prompt": "{} and {}"}, "2 placeholders", "write exactly one"),
        ({"prompt": "The capital of {0} is"}, "0 placeholders", "write exactly one"),
        ({"prompt": ""}, "prompt=''", "say what the fact's prompt is"),
        ({"subject": " \n"}, r"subject=' \\n'", "say what the fact's subject is"),
        ({"target_new": ""}, "target_new=''", "say what the fact's target_new is"),
        ({"target_new": None}, "target_new=None is a NoneType", "a text is needed"),
        ({"subject": 7}, "subject=7 is a int", "a text is needed"),
        ({"prompt": ["{}"]}, "is a list", "a text is needed"),
        ({"other_prompts": "{} has"}, "'{} has' is one text", "give a list"),
        ({"other_prompts": ["{} has", "capital"]}, "prompt='capital' holds 0", "write exactly one"),
        ({"other_prompts": [None]}, "holds None, a NoneType", "a text is needed"),
        ({"other_prompts": ["{} has "]}, "'Rome' follows '{} has ' with", "end with a space, or none"),
        ({"other_prompts": ["{}的首都是"]}, "'Rome' follows '{}的首都是' with", "end with a space, or none"),
    ],
)
def test_an_error_names_the_value_and_the_remedy(changes: dict[str, Any], value: str, remedy: str) -> None:
    fields = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", **changes}
    with pytest.raises(RequestError, match=value) as caught:
        EditRequest(**fields)
    assert caught.match(remedy)


def test_requests_are_values() -> None:
    request = EditRequest("{} is", "中国", "上海", case_id=3)
    assert request == EditRequest("{} is", "中国", "上海", case_id=3)
    assert len({request, EditRequest("{} is", "中国", "上海", case_id=3)}) == 1
    assert request.to_dict() == {"prompt": "{} is", "subject": "中国", "target_new": "上海", "case_id": 3}
    assert EditRequest(**json.loads(json.dumps(request.to_dict()))) == request


def test_other_prompts_are_kept_in_any_sequence() -> None:
    request = EditRequest("{} is in", "Rome", "Spain", other_prompts=["The country of {} is", "{} lies in"])
    assert request.other_prompts == ("The country of {} is", "{} lies in")
    assert len({request, EditRequest(**json.loads(json.dumps(request.to_dict())))}) == 1
