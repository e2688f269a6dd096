"""One batch of edits against plain forward passes: keys, the spread of the residual, what the edited model has."""

from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from hf_alphaedit.algorithm.nullspace import ridge_filter
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.editing import (
    BatchWalk,
    EditedBatch,
    Stopwatch,
    context_weights,
    edit_batch,
    layer_groups,
    over_contexts,
)
from hf_alphaedit.errors import EditingError
from hf_alphaedit.history import History
from hf_alphaedit.models.architecture import Architecture, resolve_architecture
from hf_alphaedit.models.encoding import KEY_CONTEXTS, EncodedRequest, encode_request
from hf_alphaedit.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from hf_alphaedit.models.hooks import hidden_of, inference_state
from hf_alphaedit.requests import EditRequest


CONTEXTS = ("The river runs. {}", "Therefore the people who are there said. {}", "I. {}")
REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("{} plays", "Ada Lovelace", "the big drum"),
    EditRequest("It is said that all of the people in {} speak", "Norway", "music"),
]
FAMILIES = ["llama", "gpt2", "gptj"]


def encoded(contexts: tuple[str, ...] = CONTEXTS) -> list[EncodedRequest]:
    return [encode_request(tiny_tokenizer(), request, contexts, mentions=True) for request in REQUESTS]


@torch.no_grad()
def plain(architecture: Architecture, requests: list[EncodedRequest], layer: int, last: int) -> tuple[Tensor, Tensor]:
    """Keys (n, c, d) at `layer` and bare-prompt block outputs (n, h) at `last`, from whole rows one at a time."""
    keys, values = [], []
    for request in requests:
        for index, row in enumerate(request.rows):
            inputs: list[Tensor] = []
            outputs: list[Tensor] = []
            handles = [
                architecture.site(layer).module.register_forward_pre_hook(
                    lambda _, arguments, seen=inputs: seen.append(arguments[0])
                ),
                architecture.blocks[last].register_forward_hook(
                    lambda _, __, output, seen=outputs: seen.append(hidden_of(output))
                ),
            ]
            architecture.model(torch.tensor([row.token_ids]), use_cache=False)
            for handle in handles:
                handle.remove()
            keys.append(inputs[0].reshape(len(row.token_ids), -1)[row.subject])
            if index == 0:
                values.append(outputs[0][0, row.subject])
    return torch.stack(keys).unflatten(0, (len(requests), -1)), torch.stack(values)


def edit(
    architecture: Architecture, layers: tuple[int, ...], contexts: tuple[str, ...] = (), **settings: Any
) -> tuple[EditedBatch, History]:
    """Edit without any protection, so that what must come out can be written down."""
    defaults = {"projection": "none", "l2": 1e-6, "value_steps": 4, "stop_loss": 0.0, "forward_dtype": "model"}
    config = AlphaEditConfig(layers=layers, **{**defaults, **settings})
    tokenizer, model = tiny_tokenizer(), architecture.model
    history = History(model_fingerprint(model), tokenizer_fingerprint(tokenizer))
    sites = [architecture.site(layer) for layer in layers]
    history.remember_base(sites)
    filters = {site.name: ridge_filter(site.read().shape[1], config.l2) for site in sites}
    with inference_state(model):
        batch = edit_batch(architecture, tokenizer, REQUESTS, contexts, filters, history, config, Stopwatch())
    return batch, history


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_those_of_plain_passes(family: str) -> None:
    architecture, requests = resolve_architecture(tiny_model(family)), encoded()
    walk = BatchWalk(architecture, requests, (1, 2, 3))
    for layer in (1, 2, 3):  # later calls start from what the earlier ones stored
        keys, values = walk.advance(layer, 3)
        expected_keys, expected_values = plain(architecture, requests, layer, 3)
        expected_mentions, _ = plain(architecture, mentions_of(requests), layer, 3)
        expected_keys = torch.cat([expected_keys, expected_mentions.unflatten(0, (len(REQUESTS), -1))[:, :, 0]], 1)
        assert keys.shape == (len(REQUESTS), 1 + 2 * len(CONTEXTS), 64)
        torch.testing.assert_close(keys, expected_keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(walk.values(3), expected_values, rtol=1e-4, atol=1e-5)


def test_keys_are_those_of_the_first_contexts() -> None:
    architecture = resolve_architecture(tiny_model("llama"))
    many = tuple(f"The river number {number}. {{}}" for number in range(KEY_CONTEXTS + 2))
    requests, fewer = encoded(many), encoded(many[:KEY_CONTEXTS])
    assert [len(request.rows) for request in requests] == [1 + len(many)] * len(REQUESTS)  # the search sees them all
    (keys, values), (expected_keys, expected_values) = (
        BatchWalk(architecture, rows, (2,)).advance(2, 2) for rows in (requests, fewer)
    )
    assert keys.shape == (len(REQUESTS), 1 + 2 * KEY_CONTEXTS, 64)
    torch.testing.assert_close(keys, expected_keys, rtol=0, atol=0)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0)


@pytest.mark.parametrize("contexts", [3, 1, 0])
def test_a_key_is_half_the_bare_prompts_and_half_the_mean_of_the_others(contexts: int) -> None:
    keys = torch.randn(3, 1 + contexts, 8, generator=torch.Generator().manual_seed(0))
    expected = keys[:, 0] / 2 + keys[:, 1:].mean(1) / 2 if contexts else keys[:, 0]
    torch.testing.assert_close(over_contexts(keys, context_weights(contexts)), expected)


def test_the_subject_alone_is_a_third_of_the_key() -> None:
    keys = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = (keys[:, 0] + keys[:, 1:4].mean(1) + keys[:, 4:].mean(1)) / 3
    torch.testing.assert_close(over_contexts(keys, context_weights(3, 2)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_keys_are_filtered_means_over_contexts(family: str) -> None:
    architecture = resolve_architecture(tiny_model(family))
    expected, _ = plain(architecture, encoded(), 2, 2)
    batch, history = edit(architecture, (2,), CONTEXTS, l2=4.0, context_keys="mean")
    name = architecture.site(2).name
    mean = over_contexts(expected, context_weights(len(CONTEXTS)))
    torch.testing.assert_close(batch.batch.keys[name], mean / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.kept_energy[name], torch.ones(3))
    assert history.batches == []  # the caller's to append
    assert batch.batch.requests == tuple(REQUESTS)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_a_second_pass_gives_the_keys_of_the_first(family: str) -> None:
    # What enters a layer depends on the layers below it, and those had been edited before its keys were read.
    architecture = resolve_architecture(tiny_model(family))
    unedited, _ = plain(architecture, encoded(), 3, 3)
    batch, _ = edit(architecture, (1, 2, 3), CONTEXTS, l2=1.0, context_keys="separate")
    weights = context_weights(len(CONTEXTS))
    for layer in (1, 2, 3):
        again, _ = plain(architecture, encoded(), layer, 3)
        torch.testing.assert_close(
            batch.batch.keys[architecture.site(layer).name], over_contexts(again, weights), rtol=1e-3, atol=1e-4
        )
    assert over_contexts(unedited - again, weights).norm() > 0.01 * over_contexts(again, weights).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_is_spread_over_the_layers_left(family: str) -> None:
    layers = (1, 2, 3)
    architecture = resolve_architecture(tiny_model(family))
    batch, history = edit(architecture, layers)
    written: list[int] = []
    for layer in layers:  # from the base weights on, as during the edit
        for other in layers:
            site = architecture.site(other)
            partial = [batch.batch] if other in written else []
            site.write(history.weight(site.name, partial))
        _, current = plain(architecture, encoded(()), layer, 3)
        outputs = batch.batch.updates[architecture.site(layer).name].outputs
        expected = (batch.targets.values - current) / (3 - len(written))
        torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        written.append(layer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(3,), (1, 2, 3)])
def test_the_edited_model_has_the_target(family: str, layers: tuple[int, ...]) -> None:
    architecture = resolve_architecture(tiny_model(family))
    batch, _ = edit(architecture, layers)
    _, final = plain(architecture, encoded(()), 3, 3)
    wanted = (batch.targets.values - batch.targets.initial).norm(dim=-1)
    assert ((final - batch.targets.values).norm(dim=-1) < 1e-3 * wanted).all()
    assert (batch.missing < 1e-3).all()


@pytest.mark.parametrize("l2", [0.1, 3.0, 100.0])
def test_the_ridge_shrinks_what_arrives(l2: float) -> None:
    # At one layer all is linear: the change at the keys is R G (G + λ I)⁻¹ with G = Kᵀ K.
    architecture = resolve_architecture(tiny_model("llama"))
    keys, before = plain(architecture, encoded(()), 3, 3)
    batch, _ = edit(architecture, (3,), l2=l2)
    _, after = plain(architecture, encoded(()), 3, 3)
    gram = keys[:, 0].double() @ keys[:, 0].double().T  # (n, n)
    residual = (batch.targets.values - batch.targets.initial).double()  # (n, h)
    arrived = torch.linalg.inv(gram + l2 * torch.eye(3, dtype=torch.float64)) @ gram
    torch.testing.assert_close(after - before, (arrived.T @ residual).float(), rtol=1e-3, atol=1e-4)
    expected = (residual - arrived.T @ residual).norm(dim=-1) / residual.norm(dim=-1)
    torch.testing.assert_close(batch.missing, expected.float(), rtol=1e-3, atol=1e-4)


def test_separate_contexts_bring_the_residual_into_each_of_them() -> None:
    errors = {}
    for context_keys in ("with_subject", "separate", "mean"):
        architecture = resolve_architecture(tiny_model("llama"))
        rows, mentions = rows_of(encoded()), mentions_of(encoded())
        before = [plain_outputs(architecture, row) for row in [*rows, *mentions]]
        batch, _ = edit(architecture, (3,), CONTEXTS, context_keys=context_keys)
        after = [plain_outputs(architecture, row) for row in [*rows, *mentions]]
        changes = (torch.stack(after) - torch.stack(before)).split([len(rows), len(mentions)])
        residual = (batch.targets.values - batch.targets.initial)[:, None]  # (n, 1, h)
        errors[context_keys] = [
            float(((change.unflatten(0, (3, -1)) - residual).norm(dim=-1) / residual.norm(dim=-1)).max())
            for change in changes  # (n c, h)
        ]
        assert batch.batch.updates[architecture.site(3).name].inputs.shape[0] == 3  # the rank stays that of the edits
    assert max(errors["with_subject"]) < 1e-3
    assert errors["separate"][0] < 1e-3 < 0.01 < errors["separate"][1]
    assert errors["mean"][0] > 10 * errors["separate"][0]


def rows_of(requests: list[EncodedRequest]) -> list[EncodedRequest]:
    return [EncodedRequest((row,), request.essence, request.target) for request in requests for row in request.rows]


def mentions_of(requests: list[EncodedRequest]) -> list[EncodedRequest]:
    return [
        EncodedRequest((row,), request.essence, request.target) for request in requests for row in request.mentions
    ]


def plain_outputs(architecture: Architecture, request: EncodedRequest) -> Tensor:
    return plain(architecture, [request], 3, 3)[1][0]


def test_layers_with_a_norm_behind_them_have_targets_of_their_own() -> None:
    additive, normed = (resolve_architecture(tiny_model(name)) for name in ("llama", "gemma3_text"))
    assert layer_groups(additive, (1, 2, 3)) == [(1, 2, 3)]
    assert layer_groups(normed, (1, 2, 3)) == [(1,), (2,), (3,)]


def test_edits_that_are_not_finite_name_the_subject() -> None:
    architecture = resolve_architecture(tiny_model("llama"))
    layers, config = (3,), AlphaEditConfig(layers=(3,), projection="none")
    good, history = edit(architecture, layers)
    spoiled = good.targets.values.clone()
    spoiled[1, 0] = float("nan")
    filters = {site.name: ridge_filter(64, 1.0) for site in map(architecture.site, layers)}

    def compute(*_: Any) -> Any:
        return type(good.targets)(**{**vars(good.targets), "values": spoiled})

    before = {name: value.clone() for name, value in architecture.model.state_dict().items()}
    with pytest.raises(EditingError, match=r"targets are not finite for \['Ada Lovelace'\]"):
        edit_batch(architecture, tiny_tokenizer(), REQUESTS, (), filters, history, config, Stopwatch(), compute)
    assert all(torch.equal(value, before[name]) for name, value in architecture.model.state_dict().items())


def test_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.measuring("one"):
            nn.Linear(2, 2)
    with pytest.raises(KeyError), watch.measuring("two"):
        raise KeyError
    assert watch.seconds.keys() == {"one", "two"}
    assert all(seconds > 0 for seconds in watch.seconds.values())
