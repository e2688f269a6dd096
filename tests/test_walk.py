"""The walk over the edited layers: rows that continue from a shared beginning against whole rows."""

import pytest
import torch
from families import FAMILIES, UNBUILDABLE, family_model, runs
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from hf_alphaedit.editing import BatchWalk
from hf_alphaedit.errors import UnsupportedModelError
from hf_alphaedit.models.architecture import Architecture, resolve_architecture
from hf_alphaedit.models.encoding import TokenRow, encode_request
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.walk import KeyWalk, beginnings_can_be_shared
from hf_alphaedit.requests import EditRequest


CONTEXTS = ("The river runs. {}", "Therefore the people who are there said. {}", "{}")
REQUESTS = (
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("It is said that all of the people in {} speak", "Norway", "music"),
    EditRequest("{} plays", "Ada Lovelace", "the big drum"),
)
LAYERS = (0, 1, 3)


def rows_in_contexts() -> tuple[list[TokenRow], list[int]]:
    """Prompts and subjects behind every context, and the context of each; the last context is empty."""
    requests = [encode_request(tiny_tokenizer(), request, CONTEXTS, mentions=True) for request in REQUESTS]
    rows = [row for request in requests for row in (*request.rows[1:], *request.mentions)]
    return rows, [*range(len(CONTEXTS))] * (2 * len(requests))


def keys_while_weights_change(architecture: Architecture, walk: KeyWalk, layers: tuple[int, ...]) -> list[Tensor]:
    """The keys of each layer, each read after the layers before it were changed; the weights are put back."""
    found, before = [], {layer: architecture.site(layer).read().clone() for layer in layers}
    with inference_state(architecture.model):
        for layer in layers:
            found.append(walk.advance(layer, None)[0])
            architecture.site(layer).write(before[layer] * 1.5)
        for layer in layers:
            architecture.site(layer).write(before[layer])
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "bloom", "opt", "gemma3_text", "mixtral"])
def test_keys_behind_shared_beginnings_are_those_of_whole_rows(family: str) -> None:
    architecture, (rows, groups) = resolve_architecture(tiny_model(family)), rows_in_contexts()
    with inference_state(architecture.model):
        assert beginnings_can_be_shared(architecture, rows, groups, LAYERS)
    shared = keys_while_weights_change(architecture, KeyWalk(architecture, rows, groups), LAYERS)
    whole = keys_while_weights_change(architecture, KeyWalk(architecture, rows), LAYERS)
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)


def test_a_beginning_runs_once_for_all_rows() -> None:
    architecture, (rows, groups) = resolve_architecture(tiny_model("llama")), rows_in_contexts()
    shared, whole = KeyWalk(architecture, rows, groups), KeyWalk(architecture, rows)
    beginnings = [row.token_ids[: row.subject] for row in rows[:3]]
    assert shared.begun.token_ids.shape[0] == len(CONTEXTS)
    assert shared.begun.token_ids.shape[1] < max(map(len, beginnings))
    saved = whole.aligned.token_ids.numel() - shared.aligned.token_ids.numel() - shared.begun.token_ids.numel()
    assert saved > 0.3 * whole.aligned.token_ids.numel()


def test_a_row_alone_in_its_group_shares_nothing() -> None:
    architecture, (rows, _) = resolve_architecture(tiny_model("llama")), rows_in_contexts()
    walk = KeyWalk(architecture, rows, range(len(rows)))
    assert walk.beginnings is None
    assert torch.equal(walk.advance(1, None)[0], KeyWalk(architecture, rows).advance(1, None)[0])


@pytest.mark.parametrize(
    ("family", "fits"), [("llama", True), ("bamba", False), ("openai-gpt", False), ("recurrent_gemma", False)]
)
def test_families_without_plain_attention_states_run_whole_rows(family: str, fits: bool) -> None:
    architecture, (rows, groups) = resolve_architecture(family_model(family)), rows_in_contexts()
    requests = [encode_request(tiny_tokenizer(), request, CONTEXTS, mentions=True) for request in REQUESTS]
    with inference_state(architecture.model):
        assert beginnings_can_be_shared(architecture, rows, groups, LAYERS) is fits
        walk = BatchWalk(architecture, requests, LAYERS)
        assert all((one.beginnings is not None) is fits for one in walk.contexts)
        keys, _ = walk.advance(3, 3)
        expected = KeyWalk(architecture, rows).advance(3, None)[0].unflatten(0, (len(REQUESTS), -1))
    torch.testing.assert_close(keys[:, 1:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(UNBUILDABLE)))
def test_every_family_has_the_keys_of_whole_rows(family: str) -> None:
    model = family_model(family)
    if not runs(model):
        pytest.skip("the family's own forward pass doesn't run with sizes this small")
    try:
        architecture = resolve_architecture(model)
    except UnsupportedModelError:
        pytest.skip("the family is refused")
    rows, groups = rows_in_contexts()
    layers = tuple(architecture.editable_layers())
    with inference_state(model):
        if not beginnings_can_be_shared(architecture, rows, groups, layers):
            pytest.skip("the family keeps other states than attention keys and values")
    shared = keys_while_weights_change(architecture, KeyWalk(architecture, rows, groups), layers)
    whole = keys_while_weights_change(architecture, KeyWalk(architecture, rows), layers)
    torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-4)
