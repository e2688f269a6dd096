"""The metrics by hand, damage against plain passes, and the report."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, training_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation import EvaluationReport, counterfact, evaluate, generate, knowedit, make_reference, score
from hf_alphaedit.evaluation.damage import last_word_accuracy, multiple_choice, pack
from hf_alphaedit.evaluation.report import Estimate, estimate
from hf_alphaedit.evaluation.scoring import Score
from hf_alphaedit.records import Record, as_record
from hf_alphaedit.requests import EditRequest


TEXTS = training_text()
FACT = EditRequest("The capital of {} is", "France", "Rome", "Paris", case_id=1)
RECORD = Record(
    FACT,
    paraphrases=("France is ruled from", "In France, the capital is"),
    neighborhood=(("The capital of Peru is", "Paris"), ("The capital of Cuba is", None)),
    generation_prompts=("France is known for", "France is known for"),
    portability={"Reasoning": (("The mayor of the capital of France is", ("Ada", "Ada L.")),)},
    locality={"Other": (("The capital of Japan is", ("Tokyo",)), ("The capital of Italy is", ("Rome",)))},
)


def scored(*values: float, predictions: tuple[bool, ...] | None = None) -> Score:
    """A score with these token probabilities, right where `predictions` says so."""
    right = predictions or (False,) * len(values)
    return Score(tuple(map(math.log, values)), tuple(map(int, right)), (1,) * len(values))


def test_counterfact_by_hand():
    scores = {
        (FACT.text, "Rome"): scored(0.5, 0.4, predictions=(True, True)),
        (FACT.text, "Paris"): scored(0.45),  # the mean over tokens decides: 0.447 < 0.45
        (RECORD.paraphrases[0], "Rome"): scored(0.5, 0.5, predictions=(True, False)),
        (RECORD.paraphrases[0], "Paris"): scored(0.3),
        (RECORD.paraphrases[1], "Rome"): scored(0.1, 0.1),
        (RECORD.paraphrases[1], "Paris"): scored(0.2),
        ("The capital of Peru is", "Paris"): scored(0.2),
        ("The capital of Peru is", "Rome"): scored(0.1, 0.1),
    }
    assert {
        pair for name in counterfact.NAMES for probe in counterfact.probes(RECORD, name) for pair in probe.pairs()
    } == set(scores)
    assert counterfact.measure(RECORD, "efficacy", scores) == {"efficacy_success": 0, "efficacy_accuracy": 1}
    assert counterfact.measure(RECORD, "generalization", scores) == {
        "generalization_success": 0.5,
        "generalization_accuracy": 0,
    }
    assert counterfact.measure(RECORD, "specificity", scores) == {"specificity_success": 1, "specificity_accuracy": 0}


def test_zsre_counts_tokens_over_all_prompts():
    record = as_record(
        {
            "src": "Who wrote Emma?",
            "subject": "Emma",
            "answers": ["Jane Austen"],
            "rephrase": ["Emma's author?", "x Emma"],
            "loc": "nq question: who",
            "loc_ans": "me",
        }
    )
    scores = {
        ("Who wrote Emma?", "Jane Austen"): scored(0.1, 0.1, predictions=(True, False)),
        ("Emma's author?", "Jane Austen"): scored(0.1, 0.1, predictions=(True, True)),
        ("x Emma", "Jane Austen"): scored(*[0.1] * 6, predictions=(True,) + (False,) * 5),
        ("nq question: who?", "me"): scored(0.1, predictions=(True,)),
    }
    assert counterfact.measure(record, "efficacy", scores) == {"efficacy_accuracy": 0, "efficacy_token_accuracy": 0.5}
    assert counterfact.measure(record, "generalization", scores) == {
        "generalization_accuracy": 0.5,
        "generalization_token_accuracy": 3 / 8,  # not the mean of 1 and 1/6
    }
    assert counterfact.measure(record, "specificity", scores)["specificity_token_accuracy"] == 1


def test_knowedit_by_hand():
    scores = {
        ("The mayor of the capital of France is", "Ada"): scored(0.1, 0.1, predictions=(True, False)),
        ("The mayor of the capital of France is", "Ada L."): scored(*[0.1] * 4, predictions=(True, True, True, False)),
        ("The capital of Japan is", "Tokyo"): scored(0.1, 0.1, predictions=(True, True)),
        ("The capital of Italy is", "Rome"): scored(0.1),
    }
    assert knowedit.measure(RECORD, "portability", scores) == {"portability": 0.75, "portability_Reasoning": 0.75}
    before = {"Other": [[1, 7], [0]]}  # agreement with what was said, right or wrong
    assert knowedit.measure(RECORD, "locality", scores, before) == {
        "locality": 0.5,
        "locality_agreement": 0.75,
        "locality_Other": 0.5,
    }
    with pytest.raises(ValueError, match="other records"):
        knowedit.measure(RECORD, "locality", scores, {"Other": [[1, 7]]})


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", max_position_embeddings=256)


def test_evaluate_is_made_of_its_parts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    other = Record(EditRequest("{} is known for", "Ada Lovelace", "music"), paraphrases=("Ada Lovelace did",))
    report = evaluate(model, tokenizer, [RECORD, other], max_new_tokens=6)
    pairs = [(FACT.text, "Rome"), (FACT.text, "Paris")]
    new, old = score(model, tokenizer, pairs)
    first, second = report.records
    assert report["efficacy_success"].value == 100 * (new.loss < old.loss)
    assert report["efficacy_success"].count == 1
    assert report["efficacy_accuracy"].count == 2
    assert report["efficacy_token_accuracy"].count == 1
    assert first["probability_new"] == pytest.approx(math.exp(new.log_probability))
    assert first["probability_true"] == pytest.approx(math.exp(old.log_probability))
    assert "probability_true" not in second
    assert first["generation_texts"][FACT.text] == generate(model, tokenizer, [FACT.text], max_new_tokens=6)[0]
    assert list(second["generation_texts"]) == ["Ada Lovelace is known for", "Ada Lovelace did"]
    assert evaluate(model, tokenizer, [RECORD, other], max_new_tokens=6, batch_size=1).metrics == report.metrics


def test_generation_counts_what_is_said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    said = generate(model, tokenizer, ["The capital of France is"], max_new_tokens=2)[0].strip()
    fact = {"prompt": "The capital of {} is", "subject": "France", "target_true": "a b c"}
    right = evaluate(model, tokenizer, [{**fact, "target_new": said}], metrics=["generation"], max_new_tokens=2)
    wrong = evaluate(model, tokenizer, [{**fact, "target_new": "Lima"}], metrics=["generation"], max_new_tokens=2)
    assert right["generation_success"].value == 100
    assert wrong["generation_success"].value == 0


def test_chat_is_measured_beside_plain_text(model: PreTrainedModel):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }} ->"
    report = evaluate(model, tokenizer, [RECORD], metrics=["generation"], chat=True, max_new_tokens=4)
    asked = f"Complete this sentence: {FACT.text} ->"
    assert report.records[0]["chat_texts"][FACT.text] == generate(model, tokenizer, [asked], max_new_tokens=4)[0]
    assert {"chat_success", "chat_paraphrase_success", "generation_success"} <= set(report.metrics)


def test_locality_agreement_with_the_unedited_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    before = evaluate(model, tokenizer, [RECORD], metrics=["locality"])
    before = EvaluationReport.from_json(before.to_json())
    assert evaluate(model, tokenizer, [RECORD], metrics=["locality"], before=before)["locality_agreement"].value == 100
    other = tiny_model("llama", seed=1)
    assert evaluate(other, tokenizer, [RECORD], metrics=["locality"], before=before)["locality_agreement"].value < 100
    with pytest.raises(ValueError, match="has 1 records, not 2"):
        evaluate(model, tokenizer, [RECORD, RECORD], before=before)


def test_fluency_and_consistency(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    report = evaluate(model, tokenizer, [RECORD, Record(FACT)], metrics=["fluency", "consistency"], corpus=TEXTS)
    texts = report.records[0]["sampled_texts"]
    assert len(set(texts)) == 2
    assert all(text.startswith("France is known for") for text in texts)
    assert report["fluency"].count == report["consistency"].count == 1
    assert report["fluency"].value > 0
    assert 0 < report["consistency"].value <= 100
    with pytest.raises(ValueError, match="'consistency' needs corpus"):
        evaluate(model, tokenizer, [RECORD], metrics=["consistency"])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_perplexity_and_divergence_against_plain_passes(name: str):
    tokenizer = tiny_tokenizer(bos=True)
    model = tiny_model(name)
    reference = make_reference(model, tokenizer, TEXTS, num_tokens=200, window=50, stride=3)
    assert reference.windows.shape == (4, 50)
    assert set(reference.windows[:, 0].tolist()) == {tokenizer.bos_token_id}
    unchanged = evaluate(model, tokenizer, held_out=reference)
    assert unchanged["perplexity_ratio"].value == pytest.approx(1, abs=1e-5)
    assert unchanged["kl"].value == pytest.approx(0, abs=1e-6)

    with torch.no_grad():
        before = model(reference.windows).logits[:, :-1].double().log_softmax(-1)
        block = model.get_submodule("transformer.h.2" if name == "gpt2" else "model.layers.2")
        module = next(module for path, module in block.named_modules() if path.endswith(("mlp.c_proj", "down_proj")))
        module.weight.copy_(module.weight.roll(1, 0))
        after = model(reference.windows).logits[:, :-1].double().log_softmax(-1)
    losses = [-x.gather(-1, reference.windows[:, 1:, None]).mean() for x in (before, after)]
    divergence = (before.exp() * (before - after)).sum(-1)[:, ::3].mean()
    assert divergence > 1e-4
    report = evaluate(model, tokenizer, held_out=reference)
    assert report["perplexity"].value == pytest.approx(float(losses[1].exp()), rel=1e-5)
    assert report["perplexity_ratio"].value == pytest.approx(float((losses[1] - losses[0]).exp()), rel=1e-5)
    assert report["kl"].value == pytest.approx(float(divergence), rel=1e-3)


def test_held_out_texts_are_packed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    windows = pack(model, tokenizer, iter(TEXTS), num_tokens=100, window=30)
    stream = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    assert windows.flatten().tolist() == stream[:90]
    assert pack(model, tokenizer, TEXTS[0] * 100, num_tokens=600, window=600).shape == (2, 256)
    with pytest.raises(RequestError, match="fewer than one window"):
        evaluate(model, tokenizer, held_out=["too short"])


def test_last_words_and_choices(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    prompt = "The capital of France is"
    word = generate(model, tokenizer, [prompt], max_new_tokens=1)[0]
    texts = [prompt + " Lima", f"{prompt} {word.strip()}"]
    expected = [score(model, tokenizer, [(prompt, text.removeprefix(prompt + " "))])[0].exact for text in texts]
    assert last_word_accuracy(model, tokenizer, texts) == expected
    with pytest.raises(RequestError, match="no last word"):
        last_word_accuracy(model, tokenizer, ["Paris"])

    choices = ["Lima", "and many people live there", "k"]
    results = score(model, tokenizer, [("Question: where?\nAnswer:", choice) for choice in choices])
    sums = [result.log_probability for result in results]
    rates = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
    best, best_rate = sums.index(max(sums)), rates.index(max(rates))
    questions = [{"query": "Question: where?", "choices": choices, "gold": gold} for gold in range(3)]
    plain, normalised = multiple_choice(model, tokenizer, questions)
    assert plain == [gold == best for gold in range(3)]
    assert normalised == [gold == best_rate for gold in range(3)]
    assert best != best_rate  # otherwise the two could be swapped unnoticed
    report = evaluate(model, tokenizer, choices={"where": questions}, lambada=texts)
    assert report["where"].value == pytest.approx(100 / 3)
    assert report["lambada"].count == 2
    with pytest.raises(RequestError, match="question 0 lacks"):
        multiple_choice(model, tokenizer, [{"query": "x", "choices": ["a"]}])


def test_intervals():
    values = [1.0] * 30 + [0.0] * 70
    result = estimate(values, scale=100)
    error = 100 * math.sqrt(0.3 * 0.7 / 100)
    assert result.value == pytest.approx(30)
    assert result.low == pytest.approx(30 - 1.96 * error, abs=2)
    assert result.high == pytest.approx(30 + 1.96 * error, abs=2)
    state = torch.get_rng_state()
    assert estimate(values, scale=100) == result
    assert torch.equal(torch.get_rng_state(), state)
    assert estimate(values, scale=100, seed=1).low != result.low or estimate(values, seed=1).high != result.high
    assert estimate([2.0], transform=torch.exp) == Estimate(*[pytest.approx(math.exp(2))] * 3, count=1)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_report_round_trip_table_and_plot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    report = evaluate(model, tokenizer, [RECORD], held_out=TEXTS * 9, max_new_tokens=3)
    report.to_json(tmp_path / "report.json")
    assert EvaluationReport.from_json(tmp_path / "report.json") == report
    assert EvaluationReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["records"][0]["case_id"] == 1
    table = str(report).splitlines()
    assert len(table) == 1 + len(report.metrics)
    assert all(line.split()[0] == name for line, name in zip(table[1:], report.metrics, strict=True))
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "one.png")
    report.plot(tmp_path / "two.svg", before=report)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "two.svg").read_text("utf-8").rstrip().endswith("</svg>")
    with pytest.raises(KeyError, match="wasn't measured"):
        report["nonsense"]


def test_wrong_calls_are_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(ValueError, match=r"unknown metrics \['accuracy'\]"):
        evaluate(model, tokenizer, [RECORD], metrics=["accuracy"])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model, tokenizer, [])
    with pytest.raises(RequestError, match="record 1: subject is missing"):
        evaluate(model, tokenizer, [RECORD, {}])


@pytest.mark.slow
def test_lm_eval_gives_what_we_give(model: PreTrainedModel, tmp_path: Path):
    """The real package on a task of its own kind; its import alone takes many seconds."""
    pytest.importorskip("lm_eval")
    from hf_alphaedit.evaluation.capability import run_lm_eval

    tokenizer = tiny_tokenizer(pad=False)
    questions = [
        {
            "query": f"Question: What is {first}?",
            "choices": ["a city", second, "many people live there"],
            "gold": number % 3,
        }
        for number, (first, second) in enumerate(
            itertools.pairwise(text.split()[0] for text in TEXTS[::3] if text.isascii())
        )
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(
        "task: own_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'questions.jsonl'}\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{query}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        encoding="utf-8",
    )
    random.seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    model.train()
    result = run_lm_eval(model, tokenizer, ["own_choice"], include_path=tmp_path, batch_size=4)
    assert model.training
    assert tokenizer.pad_token is None
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    ours = evaluate(model, tokenizer, choices={"own_choice": questions})
    assert result["own_choice/acc"].value == pytest.approx(ours["own_choice"].value)
    assert result["own_choice/acc_norm"].value == pytest.approx(ours["own_choice_norm"].value)
    assert result["own_choice/acc"].count == len(questions)
    assert result["own_choice/acc"].low < result["own_choice/acc"].value < result["own_choice/acc"].high
