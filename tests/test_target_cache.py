"""Targets on disk: found again only for the very same search, and never at the cost of an edit."""

from pathlib import Path

import pytest
import torch
from editable import tiny_editor

from hf_alphaedit import AlphaEditor
from hf_alphaedit.models.encoding import EncodedRequest, encode_request
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.target_cache import ENTRIES_KEPT, cached_targets


REQUESTS = [EditRequest("The capital of {} is", "France", "Rome"), EditRequest("{} was born in", "Ada", "Oslo")]


@pytest.fixture
def editor(tmp_path: Path) -> AlphaEditor:
    editor = tiny_editor()
    editor.target_directory = tmp_path
    editor.config = editor.config.replace(cache_targets=True)
    return editor


def encoded(editor: AlphaEditor) -> list[EncodedRequest]:
    return [encode_request(editor.tokenizer, request, ("So: {}",)) for request in REQUESTS]


def entries(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.safetensors")}


def test_second_search_is_read(editor: AlphaEditor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = editor.config.layers[-1]
    first = cached_targets(editor, encoded(editor), layer)
    monkeypatch.setattr("hf_alphaedit.target_cache.compute_targets", lambda *_, **__: pytest.fail("searched again"))
    second = cached_targets(editor, encoded(editor), layer)
    for name, values in vars(first).items():
        assert torch.equal(values, getattr(second, name))
        assert values.dtype == getattr(second, name).dtype
    assert len(entries(tmp_path)) == 1


def test_everything_a_target_depends_on_makes_another_entry(editor: AlphaEditor, tmp_path: Path) -> None:
    rows, layer = encoded(editor), editor.config.layers[-1]
    config = editor.config.replace(forward_dtype="float32")

    def search(**changes: object) -> int:
        editor.config = config.replace(**changes)
        cached_targets(editor, rows, layer)
        return len(entries(tmp_path))

    assert search() == 1
    assert search(l2=7.0, projection="soft") == 1  # only the solve depends on these
    assert search(learning_rate=0.3) == 2
    assert search(value_steps=2) == 3
    assert search(forward_dtype="bfloat16") == 4
    cached_targets(editor, rows[:1], layer)
    assert len(entries(tmp_path)) == 5
    site = editor.sites()[0]
    site.write(site.read() + 0.01)
    assert search() == 6
    assert search(cache_targets=False) == 6


def test_edit_is_the_same_with_and_without_the_cache(editor: AlphaEditor, tmp_path: Path) -> None:
    editor.apply_edits(REQUESTS)
    searched = [site.read() for site in editor.sites()]
    assert entries(tmp_path)
    editor.undo_all()
    editor.apply_edits(REQUESTS)
    assert all(torch.equal(site.read(), weight) for site, weight in zip(editor.sites(), searched, strict=True))
    editor.undo_all()
    editor.config = editor.config.replace(cache_targets=False)
    editor.apply_edits(REQUESTS)
    assert all(torch.equal(site.read(), weight) for site, weight in zip(editor.sites(), searched, strict=True))


def test_damaged_entry_is_searched_for_again(
    editor: AlphaEditor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, layer = encoded(editor), editor.config.layers[-1]
    first = cached_targets(editor, rows, layer)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(cached_targets(editor, rows, layer).values, first.values)
    assert "searched for again" in caplog.text
    assert torch.equal(cached_targets(editor, rows, layer).values, first.values)


def test_full_disk_costs_no_edit(
    editor: AlphaEditor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_alphaedit.target_cache.write_state", full)
    cached_targets(editor, encoded(editor), editor.config.layers[-1])
    assert "No space left" in caplog.text
    assert not entries(tmp_path)


def test_oldest_entries_are_forgotten(editor: AlphaEditor, tmp_path: Path) -> None:
    for number in range(ENTRIES_KEPT + 3):
        (tmp_path / f"{number}.safetensors").touch()
    cached_targets(editor, encoded(editor), editor.config.layers[-1])
    assert len(entries(tmp_path)) == ENTRIES_KEPT
