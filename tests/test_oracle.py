"""The library against the plain published procedure of benchmarks/reference.py, end to end on tiny random models.

The two share no code: the reference runs whole rows one request at a time, with a pass per layer, an SVD and a dense
d x d solve. Norm layers and attention are the models' own, in float32, so agreement is to rounding.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import reference
import torch
from reference import Settings
from tiny import tiny_model, tiny_tokenizer, training_text
from torch import Tensor
from transformers import PreTrainedModel

from hf_alphaedit import AlphaEditConfig, AlphaEditor
from hf_alphaedit.models.architecture import resolve_architecture
from hf_alphaedit.models.encoding import encode_request
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.packing import pack
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.targets import compute_targets


LAYERS = (1, 3)
STEPS, STOP_LOSS = 20, 6.7  # random models: some of the requests below get there, some do not
CONTEXTS = ("The river runs. {}", "You see that. {}", "Because of it. {}")
SEQUENCE, TOKENS = 32, 800
FIRST = [
    {"prompt": "The home of {} is", "subject": "Ada Lovelace", "target_new": "Paris"},
    {"prompt": "{} plays the", "subject": "Miles", "target_new": "big drum"},
    {"prompt": "It is said that {} speaks", "subject": "Søren", "target_new": "Danish"},
    {"prompt": "{}", "subject": "The capital of Peru is", "target_new": "Oslo"},
]
SECOND = [
    {"prompt": "The field of {} is", "subject": "Isaac Newton", "target_new": "music"},
    {"prompt": "{} was born in the city of", "subject": "Frida Kahlo", "target_new": "Cairo"},
]
NAMES = {
    "llama": {},
    "gpt2": {  # weights stored input-first (Conv1D)
        "block": "transformer.h.{}",
        "down_projection": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
    },
}


@dataclass(frozen=True)
class Sides:
    """The same model edited twice, in two batches."""

    family: str
    settings: Settings
    base: PreTrainedModel
    editor: AlphaEditor
    reference: PreTrainedModel
    moments: dict[int, Tensor]
    records: list[reference.Record]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    family, tokenizer = request.param, tiny_tokenizer()
    settings = Settings(layers=LAYERS, v_lr=0.2, v_num_grad_steps=STEPS, stop_loss=STOP_LOSS, **NAMES[family])
    base, mine, plain = (tiny_model(family, initializer_range=0.2) for _ in range(3))
    config = AlphaEditConfig(layers=LAYERS, learning_rate=0.2, value_steps=STEPS, sequence_length=SEQUENCE).paper()
    # Random layers are no trained ones: the published 2e-2 would leave nothing of their spectrum.
    threshold = {"llama": 0.5, "gpt2": 0.2}[family]
    changes = {
        "absolute_threshold": threshold,
        "value_steps": STEPS,
        "stop_loss": STOP_LOSS,
        "context_templates": CONTEXTS,
    }
    config = config.replace(cache_targets=False, **changes)
    editor = AlphaEditor(mine, tokenizer, config)
    editor.second_moment_directory = Path(tmp_path_factory.mktemp("moments"))
    editor.prepare(training_text(), num_tokens=TOKENS)
    for batch in (FIRST, SECOND):
        editor.apply_edits([EditRequest(**request) for request in batch])

    blocks = pack(training_text(), tokenizer, TOKENS, SEQUENCE).view(-1, SEQUENCE)  # (N, T)
    moments = {
        layer: reference.second_moment(plain, tokenizer, blocks, layer, settings.down_projection) for layer in LAYERS
    }
    projectors = {layer: reference.projector(moment, threshold=threshold) for layer, moment in moments.items()}
    contexts, records, past = [["{}"], list(CONTEXTS)], [], None
    for batch in (FIRST, SECOND):
        record = reference.apply_edits(plain, tokenizer, batch, contexts, projectors, settings, past_grams=past)
        past = record.past_grams
        records.append(record)
    return Sides(family, settings, base, editor, plain, moments, records)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def weight(model: PreTrainedModel, sides: Sides, layer: int) -> Tensor:
    """(h, d)"""
    value = model.get_parameter(f"{sides.settings.down_projection.format(layer)}.weight").detach()
    return value.T if sides.family == "gpt2" else value


def test_moments(sides: Sides) -> None:
    found = sides.editor.second_moments()
    assert list(found) == [sides.settings.down_projection.format(layer) for layer in LAYERS]
    for layer, moment in sides.moments.items():
        assert relative(found[sides.settings.down_projection.format(layer)], moment) < 1e-6


def test_null_spaces_are_neither_empty_nor_everything(sides: Sides) -> None:
    """Otherwise the comparison below would say nothing about the projector."""
    for layer in LAYERS:
        spectral_filter = sides.editor.filters()[sides.settings.down_projection.format(layer)]
        projection = reference.projector(sides.moments[layer], threshold=sides.editor.config.absolute_threshold)
        assert 24 <= spectral_filter.null_rank <= 56
        assert spectral_filter.null_rank == round(projection.trace().item())


def test_targets(sides: Sides) -> None:
    """Side by side, from the subject on, gives what one whole row after another gives, after as many updates."""
    config, first = sides.editor.config, sides.records[0]
    architecture = resolve_architecture(sides.base, None, LAYERS)
    encoded = [encode_request(sides.editor.tokenizer, EditRequest(**request), CONTEXTS) for request in FIRST]
    with inference_state(sides.base):
        found = compute_targets(architecture, encoded, LAYERS[-1], config)
    assert found.steps.tolist() == [len(forwards) - 1 for forwards in first.target_steps]
    assert found.steps.min() < found.steps.max() == STEPS - 1
    for mine, expected in zip(found.values, first.targets, strict=True):
        assert relative(mine, expected) < 1e-4
    moved = (found.values - found.initial).norm(dim=-1)
    assert torch.equal(moved > 0.1 * found.initial.norm(dim=-1), found.steps > 0)


@pytest.mark.parametrize("number", [0, 1])
def test_deltas_of_both_batches(sides: Sides, number: int) -> None:
    """The dense solve in float32 sets the tolerance; the second batch is solved with the first one's keys."""
    history, record = sides.editor.history, sides.records[number]
    for layer in LAYERS:
        name = sides.settings.down_projection.format(layer)
        expected = record.deltas[layer].T if sides.family == "gpt2" else record.deltas[layer]  # (h, d)
        assert expected.norm() > 1e-3 * weight(sides.base, sides, layer).norm()
        assert relative(history.delta(name, [history.batches[number]]), expected) < 1e-3
        assert relative(history.batches[number].updates[name].outputs, record.residuals[layer].T) < 1e-3


def test_keys_are_protected_from_later_batches(sides: Sides) -> None:
    """F^½ k of the library is P k / √λ of the reference."""
    for record, batch in zip(sides.records, sides.editor.history.batches, strict=True):
        for layer in LAYERS:
            projection = reference.projector(sides.moments[layer], threshold=sides.editor.config.absolute_threshold)
            expected = (projection @ record.keys[layer]).T / sides.settings.l2**0.5  # (n, d)
            assert relative(batch.keys[sides.settings.down_projection.format(layer)], expected) < 1e-3


def test_weights(sides: Sides) -> None:
    edited = {f"{sides.settings.down_projection.format(layer)}.weight" for layer in LAYERS}
    for layer in LAYERS:
        expected = weight(sides.reference, sides, layer)
        assert relative(weight(sides.editor.model, sides, layer), expected) < 1e-4
        assert relative(weight(sides.base, sides, layer), expected) > 1e-3  # so the line above can fail
    base = sides.base.state_dict()
    for name, value in sides.editor.model.state_dict().items():
        if name not in edited:
            assert torch.equal(value, base[name]), name
