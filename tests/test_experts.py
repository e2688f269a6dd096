"""Routed experts in one layer: keys and updates against plain float64 loops, and what is refused."""

import pytest
import torch
from editable import REQUESTS
from family_edit import REQUESTS as FAMILY_REQUESTS
from family_edit import edit_family
from routed import (
    EXPERTS,
    FAMILIES,
    PROMPT,
    SETTINGS,
    experts_of,
    plain_keys,
    prepared,
    relative,
    same,
    state_of,
    subject_keys,
)
from tiny import tiny_model, tiny_tokenizer

from hf_alphaedit.algorithm.nullspace import BlockFilter, SpectralFilter, ridge_filter
from hf_alphaedit.editing import Stopwatch, edit_batch
from hf_alphaedit.errors import EditingError, UnsupportedModelError
from hf_alphaedit.history import History
from hf_alphaedit.models.architecture import resolve_architecture
from hf_alphaedit.models.keys import captured_keys, side_by_side


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_keys_are_those_of_a_loop_over_tokens(name: str) -> None:
    model = tiny_model(name)
    site = resolve_architecture(model, EXPERTS, (1,)).site(1)
    with torch.no_grad(), captured_keys([site], lambda x: x.reshape(-1, x.shape[-1])) as captured:
        model(input_ids=PROMPT, use_cache=False)
    keys = side_by_side(site, captured[site.name], PROMPT.numel())
    expected, outputs = zip(*(plain_keys(model, row, 1) for row in PROMPT), strict=True)
    assert relative(keys, torch.cat(expected).flatten(1)) < 1e-6
    assert relative(keys.double() @ site.read().double().T, torch.cat(outputs).double()) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_the_edited_model_shows_the_predicted_change(name: str) -> None:
    model = tiny_model(name)
    before = [experts_of(model, layer).down_proj.detach().clone() for layer in (0, 1)]
    used = subject_keys(model, list(FAMILY_REQUESTS), 0).ne(0).any(-1).any(0)  # (E,)
    result = edit_family(model, layers=(0, 1), target_module=EXPERTS)
    assert result.error < 1e-3
    assert result.change > 0.05
    assert result.logit_change > 1e-2
    changed = experts_of(model, 0).down_proj.ne(before[0]).flatten(1).any(1)  # (E,)
    assert torch.equal(changed, used)  # the first layer's router sees no edit: the experts chosen there, and no other
    assert experts_of(model, 1).down_proj.ne(before[1]).any()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_the_update_is_the_joint_solution_over_experts(name: str) -> None:
    editor = prepared(name, layers=(2,))
    site, config = editor.sites()[0], editor.config
    projectors = []
    for block in site.blocks:
        values, vectors = torch.linalg.eigh(editor.second_moments()[block].double())
        free = vectors[:, values.cumsum(0) <= config.energy_share * values.sum()]
        projectors.append(free @ free.T / config.l2)
    blocks = torch.block_diag(*projectors)  # (E d, E d)
    keys = subject_keys(editor.model, REQUESTS, 2).flatten(1).T  # (E d, n)
    base, history = site.read(), editor.history
    history.remember_base([site])
    for requests, new, past in [(REQUESTS[:2], keys[:, :2], None), (REQUESTS[2:], keys[:, 2:], keys[:, :2])]:
        before = site.read()
        batch = edit_batch(
            editor.architecture, editor.tokenizer, requests, (), editor.filters(), history, config, Stopwatch()
        ).batch
        history.batches.append(batch)
        gram = new @ new.T + (0 if past is None else past @ past.T)
        system = gram @ blocks + torch.eye(len(blocks), dtype=torch.float64)
        residual = batch.updates[site.name].outputs.double().T  # (h, n)
        expected = residual @ new.T @ blocks @ torch.linalg.inv(system)
        assert relative((site.read() - before).double(), expected) < 1e-4
    assert relative(site.read().double() - base, history.delta(site.name).double()) < 1e-5


def test_a_filter_of_blocks_is_block_diagonal_and_closed_where_it_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    filters = (SpectralFilter(basis[:, :2], torch.tensor([0.5, 0.0]), 2.0, 4), None, ridge_filter(6, 4.0))
    whole = BlockFilter(filters, 6)
    matrix = torch.block_diag(filters[0].root(torch.eye(6)), torch.zeros(6, 6), filters[2].root(torch.eye(6)))
    keys = torch.randn(4, 3, 18, generator=generator)
    assert torch.allclose(whole.root(keys), keys @ matrix, atol=1e-5)
    assert torch.equal(whole.root(keys[0]), whole.root(keys)[0])
    assert whole.null_rank == 10


def test_a_subject_that_goes_only_to_closed_experts_is_refused() -> None:
    model = tiny_model("mixtral")
    architecture = resolve_architecture(model, EXPERTS, (2,))
    site, before = architecture.site(2), state_of(model)
    chosen = subject_keys(model, REQUESTS[:1], 2).ne(0).any(-1)[0].tolist()  # (E,)
    some = tuple(None if used else ridge_filter(64, 0.01) for used in chosen)
    history = History("", "")
    history.remember_base([site])
    with pytest.raises(EditingError, match=r"\['France'\] go only to experts of model.layers.2.+prepare\(num_tokens"):
        edit_batch(
            architecture, tiny_tokenizer(), REQUESTS[:1], (), {site.name: BlockFilter(some, 64)}, history,
            SETTINGS.replace(layers=(2,)), Stopwatch(),
        )  # fmt: skip
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_post_expert_norm": True}, "a norm follows each expert's down-projection"),
        ({"_is_expert_parallel": True}, "are spread over devices"),
    ],
)
def test_experts_of_another_form_are_refused_by_name(change: dict, reason: str) -> None:
    model = tiny_model("mixtral")
    for layer in range(5):
        vars(experts_of(model, layer)).update(change)
    with pytest.raises(UnsupportedModelError, match=f"only a mixture of experts that can't be edited.+{reason}"):
        resolve_architecture(model)
    with pytest.raises(UnsupportedModelError, match=f"layers.2.mlp.experts.down_proj can't be edited.+{reason}"):
        resolve_architecture(model, EXPERTS, (2,))


def test_experts_that_do_something_else_are_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    experts = experts_of(model, 2)
    plain = experts.forward
    monkeypatch.setattr(experts, "forward", lambda *arguments: plain(*arguments).tanh())
    with pytest.raises(UnsupportedModelError, match="is not what the experts return"):
        resolve_architecture(model, EXPERTS, (2,))
    assert resolve_architecture(model, EXPERTS, (1,)).additive


def test_the_module_of_the_experts_is_no_target_but_the_remedy_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"MixtralExperts.+set target_module to .+experts.down_proj"):
        resolve_architecture(tiny_model("mixtral"), "model.layers.{}.mlp.experts", (1,))


def test_shared_experts_come_first_and_routed_ones_on_request() -> None:
    model = tiny_model("qwen2_moe")
    assert resolve_architecture(model).target_module == "model.layers.{}.mlp.shared_expert.down_proj"
    assert resolve_architecture(model, EXPERTS).additive
    assert resolve_architecture(tiny_model("mixtral")).target_module == EXPERTS
