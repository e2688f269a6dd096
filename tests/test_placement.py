"""The same edit wherever the weights live and whatever wraps the model, or a refusal that says what to do."""

from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer, training_text
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_alphaedit import AlphaEditConfig, AlphaEditor
from hf_alphaedit.errors import UnsupportedModelError


REQUESTS = [
    {"prompt": "The capital of {} is", "subject": "Norway", "target_new": "Lima"},
    {"prompt": "{} is known for", "subject": "Marie Curie", "target_new": "music"},
]
LAYERS = (1, 2)
CONFIG = AlphaEditConfig(
    layers=LAYERS, value_steps=6, context_templates=("People say that {}",), l2=1e-3, sequence_length=32,
    cache_targets=False, forward_dtype="model",
)  # fmt: skip
PROMPT = torch.tensor([[5, 80, 300, 41, 17, 222, 9]])


def edited(model: torch.nn.Module, directory: Path) -> AlphaEditor:
    editor = AlphaEditor(model, tiny_tokenizer(), CONFIG)
    editor.second_moment_directory = directory
    editor.prepare(training_text(), num_tokens=640)
    editor.apply_edits(REQUESTS)
    return editor


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=PROMPT).logits.float()


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> AlphaEditor:
    """The edit that every other placement must reproduce."""
    editor = edited(tiny_model("llama"), tmp_path_factory.mktemp("resident"))
    change = (logits(editor.model) - logits(tiny_model("llama"))).abs().max()
    assert change > 0.1, "an edit that changes nothing tells nothing"
    return editor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").save_pretrained(directory)
    return directory


def cpu_offloaded(checkpoint: Path, folder: Path) -> PreTrainedModel:
    return accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(checkpoint), execution_device="cpu")


def disk_offloaded(checkpoint: Path, folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def from_pretrained_with_disk(checkpoint: Path, folder: Path) -> PreTrainedModel:
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer in (0, 2, 3) else "cpu" for layer in range(5)}
    return AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map, offload_folder=folder)


@pytest.mark.parametrize("place", [cpu_offloaded, disk_offloaded, from_pretrained_with_disk])
def test_offloaded_weights_take_the_same_edit(place, resident: AlphaEditor, checkpoint: Path, tmp_path: Path) -> None:
    stored = {file: file.read_bytes() for file in checkpoint.iterdir()}
    model = place(checkpoint, tmp_path / "offload")
    editor = edited(model, tmp_path / "moments")
    for mine, other in zip(editor.sites(), resident.sites(), strict=True):
        torch.testing.assert_close(mine.read(), other.read(), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), logits(resident.model), rtol=0, atol=1e-5)
    assert {file: file.read_bytes() for file in checkpoint.iterdir()} == stored, "the user's checkpoint was written"
    editor.undo_all()
    torch.testing.assert_close(logits(model), logits(tiny_model("llama")), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_model_is_saved_and_reloaded(resident: AlphaEditor, checkpoint: Path, tmp_path: Path) -> None:
    editor = edited(from_pretrained_with_disk(checkpoint, tmp_path / "offload"), tmp_path / "moments")
    editor.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(reloaded), logits(editor.model), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(reloaded), logits(resident.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_the_edit_and_keeps_its_dtype(
    dtype: torch.dtype, resident: AlphaEditor, checkpoint: Path, tmp_path: Path
) -> None:
    editor = edited(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype), tmp_path)
    for mine, other in zip(editor.sites(), resident.sites(), strict=True):
        base = resident.history.base_weights[other.name]
        wanted, found = other.read() - base, mine.read().float() - editor.history.base_weights[mine.name].float()
        assert mine.module.weight.dtype == dtype
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.9
    editor.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded), logits(editor.model))


def test_ties_survive(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    editor = edited(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    editor.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(reloaded), logits(model))


def test_training_flags_and_checkpointing_are_as_before(resident: AlphaEditor, tmp_path: Path) -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.activation_checkpointing_enable()
    frozen = model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    editor = edited(model, tmp_path)
    assert model.training
    assert model.is_activation_checkpointing
    assert not frozen.requires_grad
    assert model.model.layers[2].mlp.down_proj.weight.requires_grad
    for mine, other in zip(editor.sites(), resident.sites(), strict=True):
        torch.testing.assert_close(mine.read(), other.read(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_edited_underneath(in_place: bool, resident: AlphaEditor, tmp_path: Path) -> None:
    model = tiny_model("llama")
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    before = logits(compiled)
    editor = edited(compiled, tmp_path)
    assert editor.model is model
    if in_place:
        assert model._compiled_call_impl is not None
    assert (logits(compiled) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(compiled), logits(resident.model), rtol=0, atol=1e-5)


def test_data_parallel_wrappers_are_taken_off() -> None:
    model = tiny_model("llama")
    assert AlphaEditor(torch.nn.DataParallel(model), tiny_tokenizer(), CONFIG).model is model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # said by peft
def test_peft_models_are_refused_with_advice() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        AlphaEditor(model, tiny_tokenizer(), CONFIG)
    model = tiny_model("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="delete_adapter"):
        AlphaEditor(model, tiny_tokenizer(), CONFIG)


def test_quantised_models_are_refused_with_the_remedy() -> None:
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(UnsupportedModelError, match="without quantization_config"):
        AlphaEditor(model, tiny_tokenizer(), CONFIG)


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        projection = model.model.layers[1].mlp.down_proj
        mesh = init_device_mesh("cpu", (1,))
        projection.weight = torch.nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj\.weight.*DTensor"):
            AlphaEditor(model, tiny_tokenizer(), CONFIG)
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_that_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is no transformers PreTrainedModel"):
        AlphaEditor(torch.nn.Linear(2, 2), tiny_tokenizer(), CONFIG)
