"""What the examples give a request besides its record: other prompts, and none that it is judged by."""

from example_data import with_other_prompts

from hf_alphaedit import EditRequest, Record


def record(prompt: str, subject: str, relation: str | None, *paraphrases: str) -> Record:
    return Record(EditRequest(prompt, subject, "Rome", relation=relation), paraphrases)


def test_other_prompts_are_those_of_the_relation_that_do_not_judge_it() -> None:
    first = record("{} lies in", "Lima", "country", "He left. Lima belongs to", "The river of Lima, in")
    everything = [
        record("The river of {}, in", "Bonn", "country"),
        record("{} was led by", "Oslo", "leader"),
        record("{} is in", "Bonn", "country"),
        first,
        record("{} is in", "Kyiv", "country"),
        record("{} belongs to", "Kyiv", "country"),
        record("In which land is {}? In", "Kyiv", "country"),
        record("{} speaks", "Ada", None),
    ]
    wanted = ("{} is in", "In which land is {}? In")
    for count in range(4):
        (found,) = with_other_prompts([first], everything, count)
        assert found.request.other_prompts == wanted[:count]
        assert found.paraphrases == first.paraphrases
    unrelated = with_other_prompts([everything[1], everything[-1]], everything, 5)
    assert [found.request.other_prompts for found in unrelated] == [(), ()]
