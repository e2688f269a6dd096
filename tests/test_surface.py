"""Every operation hangs on `AlphaEditor`, with the arguments that scripts rely on."""

import inspect
from pathlib import Path

import pytest
import torch
from editable import CONFIG, REQUESTS, tiny_editor
from torch import nn

from hf_alphaedit import AlphaEditor
from hf_alphaedit.errors import StateError


SURFACE = {
    "__init__": ["model", "tokenizer", "config"],
    "from_pretrained": [
        "pretrained_model_name_or_path", "config", "revision", "token", "cache_dir", "local_files_only",
        "trust_remote_code", "model_kwargs",
    ],
    "prepare": ["corpus", "num_tokens", "force"],
    "preflight": ["requests"],
    "apply_edits": ["requests", "batch_size", "seed", "gate"],
    "applied": ["requests"],
    "undo": ["batches"],
    "undo_all": [],
    "remove": ["which", "replay"],
    "evaluate": ["records", "metrics"],
    "diff": [],
    "check": [],
    "trace": ["facts"],
    "tune": ["directory"],
    "save_pretrained": ["save_directory", "save_kwargs"],
    "save_edits": ["directory"],
    "load_edits": ["directory_or_repo"],
    "export_lora": ["directory", "max_rank"],
    "push_to_hub": [
        "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr",
        "max_shard_size", "tags",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SURFACE)
def test_operation_has_its_arguments_and_documents_them(name: str) -> None:
    method = getattr(AlphaEditor, name)
    parameters = inspect.signature(method).parameters
    assert set(SURFACE[name]) <= set(parameters)
    for parameter in parameters:
        assert parameter == "self" or f" {parameter}: " in (inspect.getdoc(method) or "")


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_applied_edits_end_with_their_block() -> None:
    editor = tiny_editor(value_steps=3, context_templates=None, context_length=12)
    before = weights(editor.model)
    with editor.applied(REQUESTS[:2], batch_size=1) as report:
        assert len(report.outcomes) == len(editor.history) == 2
        assert not same(editor.model, before)
        editor.undo()
    assert same(editor.model, before)
    assert len(editor.history) == 0
    assert editor.history.contexts is None
    with pytest.raises(KeyError), editor.applied(REQUESTS[:1]):
        raise KeyError
    assert same(editor.model, before)


def test_applied_edits_stand_on_earlier_ones() -> None:
    editor = tiny_editor(value_steps=3)
    editor.apply_edits(REQUESTS[:1])
    before, batches = weights(editor.model), list(editor.history.batches)
    with editor.applied(REQUESTS[1:]):
        assert len(editor.history.batches) == 2
    assert same(editor.model, before)
    assert editor.history.batches == batches


def test_other_layers_get_statistics_of_their_own() -> None:
    editor = tiny_editor(value_steps=2)
    assert list(editor.filters()) == [f"model.layers.{layer}.mlp.down_proj" for layer in CONFIG.layers or ()]
    spectra = editor.spectra()
    editor.reconfigure(editor.config.replace(l2=3.0))
    assert editor.is_prepared
    assert editor.spectra() is spectra  # only the filters depend on it
    assert editor.filters()["model.layers.2.mlp.down_proj"].tail in (0.0, pytest.approx(3.0**-0.5))
    editor.reconfigure(editor.config.replace(layers=(1,)))
    assert not editor.is_prepared


def test_edits_travel_through_the_editors_own_methods(tmp_path: Path) -> None:
    editor, other = tiny_editor(value_steps=3), tiny_editor(value_steps=3)
    with pytest.raises(StateError, match="no edits"):
        editor.save_edits(tmp_path)
    editor.apply_edits(REQUESTS[:2])
    assert editor.save_edits(tmp_path).edits == 2
    other.load_edits(tmp_path)
    assert same(other.model, weights(editor.model))
    assert editor.export_lora(tmp_path / "adapter").edits == 2
    assert [site.edits for site in editor.diff().sites] == [2, 2]
    assert all(site.corpus_energy is not None for site in editor.diff().sites)
    assert editor.evaluate(REQUESTS[:2], metrics=("efficacy",)).metrics
    editor.remove(0)
    assert [request.subject for request in editor.history.requests] == ["Italy"]
    editor.undo_all()
    assert len(editor.history) == 0
