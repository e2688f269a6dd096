"""4-bit bitsandbytes models: edited through the quantised forward, kept as a branch, never written."""

from pathlib import Path

import pytest
import torch
from editable import CORPUS, REQUESTS, tiny_editor
from family_edit import edit_family
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from typer.testing import CliRunner

from hf_alphaedit import AlphaEditor
from hf_alphaedit.cli import app
from hf_alphaedit.errors import EditingError, StateError, UnsupportedModelError
from hf_alphaedit.models.quantised import QuantisedSite, branch_of


bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)

try:
    bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")(torch.ones(1, 64))
except (RuntimeError, NotImplementedError) as reason:
    pytest.skip(f"bitsandbytes has no 4-bit product for this CPU: {reason}", allow_module_level=True)

# peft asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Linear and Conv1D before they were packed, and a norm behind the down-projection.
in_families = pytest.mark.parametrize("checkpoint", ["llama", "gpt2", "gemma3_text"], indirect=True)
PROMPTS = torch.tensor([[5, 17, 301, 44, 8, 99], [1, 2, 3, 4, 5, 6]])


def four_bit(directory: Path) -> PreTrainedModel:
    """The checkpoint in `directory`, packed while it is loaded, with products in float32."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


@pytest.fixture(scope="module", params=["llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    # Packing is by 64 elements of a row.
    names = ("n_embd", "n_inner") if request.param == "gpt2" else ("hidden_size", "intermediate_size")
    tiny_model(request.param, **dict(zip(names, (64, 128), strict=True))).save_pretrained(directory)
    return directory


@pytest.fixture
def editor(checkpoint: Path) -> AlphaEditor:
    return tiny_editor(four_bit(checkpoint))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(PROMPTS).logits


def packed(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@in_families
def test_the_model_shows_the_change_that_the_edit_predicts(checkpoint: Path) -> None:
    model = AlphaEditor(four_bit(checkpoint), tiny_tokenizer()).model
    before = packed(model)
    result = edit_family(model)
    assert isinstance(result.architecture.site(result.layers[0]), QuantisedSite)
    assert result.change > 0.05  # a share of the value before: the prediction is of something
    assert result.error < 1e-3
    assert result.logit_change > 1e-2
    assert unchanged(model, before)


def test_edits_lie_beside_the_packed_weights_and_are_taken_off(editor: AlphaEditor) -> None:
    before, base = packed(editor.model), logits(editor.model)
    state = editor.model.state_dict().keys()
    first = editor.apply_edits(REQUESTS[:2])
    once = logits(editor.model)
    editor.apply_edits(REQUESTS[2:])
    assert (once - base).abs().max() > 1e-2
    assert all(outcome.p_new_after > 2 * outcome.p_new_before for outcome in first.outcomes)
    assert unchanged(editor.model, before)
    assert editor.model.state_dict().keys() == state
    for site, change in zip(editor.sites(), editor.diff().sites, strict=True):
        branch = branch_of(site.module)
        assert branch is not None
        assert branch.inputs.shape == (3, site.shape[1])
        assert change.rounding < 1e-5  # the base is the unpacked weight, and the delta in full precision
    editor.undo()
    assert torch.equal(logits(editor.model), once)
    with editor.applied(REQUESTS[2:]):
        assert not torch.equal(logits(editor.model), once)
    assert torch.equal(logits(editor.model), once)
    editor.remove(REQUESTS[0])
    assert len(editor.history) == 1
    with editor.unedited():
        assert torch.equal(logits(editor.model), base)
    editor.undo_all()
    assert torch.equal(logits(editor.model), base)
    assert not any(module._forward_hooks for module in editor.model.modules())


@in_families
def test_peft_gives_the_edited_logits_on_the_same_base(editor: AlphaEditor, checkpoint: Path, tmp_path: Path) -> None:
    base = logits(editor.model)
    editor.apply_edits(REQUESTS)
    report = editor.export_lora(tmp_path)
    assert set(report.truncation.values()) == {0.0}
    fresh = AlphaEditor(four_bit(checkpoint), tiny_tokenizer()).model  # computes in float32 on every CPU
    assert torch.equal(logits(fresh), base)
    wrapped = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert (logits(editor.model) - base).abs().max() > 1e-2
    assert (logits(wrapped) - logits(editor.model)).abs().max() < 1e-5


def test_the_edit_pack_goes_on_the_same_base_only(editor: AlphaEditor, checkpoint: Path, tmp_path: Path) -> None:
    editor.apply_edits(REQUESTS)
    editor.save_edits(tmp_path)
    other = tiny_editor(four_bit(checkpoint))
    other.load_edits(tmp_path)
    assert (logits(other.model) - logits(editor.model)).abs().max() < 1e-5
    with pytest.raises(StateError):
        tiny_editor(AutoModelForCausalLM.from_pretrained(checkpoint)).load_edits(tmp_path)


def test_a_checkpoint_is_refused_while_there_are_edits(editor: AlphaEditor, tmp_path: Path) -> None:
    with editor.applied(REQUESTS):
        with pytest.raises(UnsupportedModelError, match="export_lora"):
            editor.save_pretrained(tmp_path / "model")
        with pytest.raises(UnsupportedModelError, match="export_lora"):  # before the (offline) Hub is asked
            editor.push_to_hub("someone/edited")
        assert not (tmp_path / "model").exists()
    editor.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(AlphaEditor.from_pretrained(tmp_path / "model").model), logits(editor.model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:typer")
def test_the_command_line_refuses_a_checkpoint_before_the_work(editor: AlphaEditor, tmp_path: Path) -> None:
    editor.save_pretrained(tmp_path / "base")
    corpus, edits = tmp_path / "corpus.txt", ["--prompt", "We saw {}", "--subject", "Italy", "--target", "city"]
    corpus.write_text("\n".join(CORPUS[:100]), encoding="utf-8")
    command = ["edit", str(tmp_path / "base"), *edits, "--tokens", "200"]
    # Were the statistics collected first, the error would be that there is no such corpus.
    missing = ["--corpus", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*command, *missing])
    assert refused.exit_code != 0
    assert "export_lora" in refused.output
    done = CliRunner().invoke(app, [*command, "--corpus", str(corpus), "--pack", str(tmp_path / "pack")])
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "pack").iterdir()] == ["alphaedit_edits.safetensors"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_edit_leaves_nothing_behind(
    editor: AlphaEditor, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor.apply_edits(REQUESTS[:1])
    before, weights, write, calls = logits(editor.model), packed(editor.model), QuantisedSite.write_edits, []

    def failing_write(site: QuantisedSite, *arguments) -> None:
        write(site, *arguments)
        calls.append(site.name)
        if len(calls) == failing:
            raise EditingError("the device is gone")

    monkeypatch.setattr(QuantisedSite, "write_edits", failing_write)
    with pytest.raises(EditingError, match="device is gone"):
        editor.apply_edits(REQUESTS[1:])
    assert torch.equal(logits(editor.model), before)
    assert unchanged(editor.model, weights)
    assert len(editor.history) == 1


def test_gradients_flow_after_inference(checkpoint: Path) -> None:
    """Also where bitsandbytes would pack weights anew for inference, for a product without a gradient."""
    editor = tiny_editor(four_bit(checkpoint))
    logits(editor.model)
    embedded = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    editor.model(inputs_embeds=embedded).logits[0, -1, 7].backward()
    assert embedded.grad is not None
    step = 1e-2 * embedded.grad / embedded.grad.norm()
    with torch.no_grad():
        ahead, behind = (editor.model(inputs_embeds=embedded + s * step).logits[0, -1, 7] for s in (1, -1))
    assert float(ahead - behind) == pytest.approx(2e-2 * float(embedded.grad.norm()), rel=0.02)


def test_what_cannot_be_edited_is_refused(checkpoint: Path) -> None:
    compiled = four_bit(checkpoint)
    compiled.compile(backend="eager")
    for model in (compiled, torch.compile(four_bit(checkpoint), backend="eager")):
        with pytest.raises(UnsupportedModelError, match="compile the model after editing"):
            AlphaEditor(model, tiny_tokenizer())
    editor = tiny_editor(four_bit(checkpoint))
    with editor.applied(REQUESTS), pytest.raises(UnsupportedModelError, match="another AlphaEditor"):
        AlphaEditor(editor.model, tiny_tokenizer())
    AlphaEditor(editor.model, tiny_tokenizer())
    ran = four_bit(checkpoint)
    logits(ran)
    states = [module.weight.quant_state for module in ran.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):  # not on every CPU
        with pytest.raises(UnsupportedModelError, match="load the model again"):
            AlphaEditor(ran, tiny_tokenizer())
