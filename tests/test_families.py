"""Every family of transformers that can be built from its config: edited correctly, or refused by name."""

import warnings

import pytest
import torch
from families import FAMILIES, UNBUILDABLE, family_model, runs
from family_edit import REQUESTS, edit_family, routed_experts
from tiny import tiny_tokenizer
from transformers import PreTrainedModel

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import UnsupportedModelError
from hf_alphaedit.models.architecture import resolve_architecture
from hf_alphaedit.models.encoding import encode_request
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.rows import RowForm
from hf_alphaedit.targets import compute_targets


# One of each kind: Conv1D, tuple outputs and parallel blocks, ALiBi, learned positions, a norm after the
# down-projection with soft-caps and sliding windows, a residual multiplier, shared experts, a hybrid with a state
# space, blocks that return a list; and routed experts: with a bias and stored input-first, and behind a norm.
FAST = (
    "llama", "gpt2", "gptj", "bloom", "opt", "gemma2", "granite", "qwen2_moe", "bamba", "openai-gpt", "mixtral",
    "qwen3_moe", "olmoe", "gpt_oss", "flex_olmo",
)  # fmt: skip
TOLERANCE = 1e-3
CONTEXTS = ("The river runs. {}", "Therefore the people who are there said. {}")


def build(family: str) -> PreTrainedModel:
    with warnings.catch_warnings():  # some families of transformers warn about their own code
        warnings.simplefilter("ignore")
        return family_model(family)


def refusal(model: PreTrainedModel) -> str:
    try:
        resolve_architecture(model)
    except UnsupportedModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", FAST)
def test_the_edited_model_does_what_the_edit_says(family: str) -> None:
    result = edit_family(build(family))
    assert result.error < TOLERANCE
    assert result.change > 0.05, "the change is too small to tell anything"
    assert result.logit_change > 1e-3, "the change of the hidden state doesn't reach the output"


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(FAST) - set(UNBUILDABLE)))
def test_every_family_is_edited_correctly_or_refused_by_name(family: str) -> None:
    model = build(family)
    if not runs(model):
        pytest.skip("the family's own forward pass doesn't run with sizes this small")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reason = refusal(model)
    if reason:
        assert len(reason) > 40, "a refusal says what is wrong and what to do"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    result = edit_family(model)
    assert result.error < TOLERANCE
    assert result.change > 0.01
    sites = {result.architecture.site(layer).parameter for layer in result.layers}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == sites


@pytest.mark.parametrize(
    "family",
    [
        *FAST,
        *(pytest.param(one, marks=pytest.mark.slow) for one in sorted(set(FAMILIES) - set(FAST) - set(UNBUILDABLE))),
    ],
)
def test_targets_in_the_fastest_form_are_those_of_whole_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    if not runs(model) or refusal(model):
        pytest.skip("can't be edited")
    architecture = resolve_architecture(model)
    layers = tuple(architecture.editable_layers()[:2])
    architecture = resolve_architecture(model, layers=layers)
    config = AlphaEditConfig(layers=layers, value_steps=4, stop_loss=0.0, forward_dtype="model")
    encoded = [encode_request(tiny_tokenizer(), request, CONTEXTS) for request in REQUESTS]
    with inference_state(model):
        fastest = compute_targets(architecture, encoded, layers[-1], config)
        monkeypatch.setattr("hf_alphaedit.targets.row_form", lambda *_: RowForm.WHOLE)
        whole = compute_targets(architecture, encoded, layers[-1], config)
    delta = whole.values - whole.initial
    assert ((fastest.values - whole.values).norm(dim=-1) < 1e-2 * delta.norm(dim=-1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(UNBUILDABLE)))
def test_routed_experts_beside_dense_or_shared_ones_are_edited_correctly(family: str) -> None:
    model = build(family)
    if not runs(model) or refusal(model) or (target := routed_experts(resolve_architecture(model))) is None:
        pytest.skip("no routed experts beside another feed-forward")
    result = edit_family(model, target_module=target)
    assert result.error < TOLERANCE
    assert result.change > 0.01


def test_a_norm_behind_the_down_projection_is_found() -> None:
    assert not resolve_architecture(build("gemma2")).additive
    assert resolve_architecture(build("gemma")).additive


def test_a_residual_multiplier_is_found() -> None:
    architecture = resolve_architecture(build("granite"))
    assert architecture.additive
    assert architecture.scale == pytest.approx(0.25, rel=1e-4)


def test_a_gate_that_depends_on_the_token_is_no_multiplier() -> None:
    # Qwen2-MoE adds sigmoid(gate(x)) times the shared expert's output.
    assert not resolve_architecture(build("qwen2_moe")).additive


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "additive"), [("llama", True), ("gemma2", False)])
def test_the_probe_tells_rounding_from_a_norm(family: str, additive: bool, dtype: torch.dtype) -> None:
    assert resolve_architecture(build(family).to(dtype)).additive is additive


def test_the_probe_leaves_model_and_random_state_as_they_were() -> None:
    model = build("llama").train()
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    resolve_architecture(model, layers=(0, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_that_never_runs_is_refused() -> None:
    model = build("llama")
    for block in model.model.layers:
        block.spare = torch.nn.ModuleDict({"down_proj": torch.nn.Linear(64, 32)})
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.spare\.down_proj doesn't run"):
        resolve_architecture(model, "model.layers.{}.spare.down_proj", (1,))
    with pytest.raises(UnsupportedModelError, match="several down-projections"):
        resolve_architecture(model)


def test_a_mixture_of_experts_outside_the_interface_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="only a mixture of experts that can't be edited: JetMoeParallel"):
        resolve_architecture(build("jetmoe"))


def test_layers_that_do_not_exist_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="layer 9 doesn't exist: LlamaForCausalLM has layers 0 to 3"):
        resolve_architecture(build("llama"), layers=(1, 9))
