"""Uploads against a stand-in for the Hub that keeps real folders and holds every call to the real signatures."""

import fnmatch
import inspect
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from synthetic import random_batches, random_editor, same_weights, weights_of
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_alphaedit
from hf_alphaedit.card import BEGIN, END, LONGEST_TABLE, escaped, merged_card, write_card
from hf_alphaedit.editor import AlphaEditor
from hf_alphaedit.hub import push_to_hub
from hf_alphaedit.requests import EditRequest


class Hub:
    """Repositories as folders: <root>/<repository>/<revision>/files. A new branch starts as a copy of main."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.clients: list[dict[str, Any]] = []

    def client(self, *args: Any, **options: Any) -> Any:
        inspect.signature(HfApi).bind(*args, **options)
        self.clients.append(options)
        api = create_autospec(HfApi, instance=True)  # refuses every call that HfApi itself would refuse
        for name in ("create_repo", "create_branch", "file_exists", "hf_hub_download", "upload_folder"):
            getattr(api, name).side_effect = getattr(self, name)
        return api

    def folder(self, repo_id: str, revision: str | None = None) -> Path:
        return self.root / repo_id / (revision or "main").replace("/", "_")

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> RepoUrl:
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        assert exist_ok or not self.folder(repo_id).exists()
        self.folder(repo_id).mkdir(parents=True, exist_ok=True)
        self.created.append({"repo_id": repo_id, "private": private})
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        if self.folder(repo_id, branch).exists():
            assert exist_ok
            return
        shutil.copytree(self.folder(repo_id), self.folder(repo_id, branch))

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None = None) -> bool:
        return (self.folder(repo_id, revision) / filename).is_file()

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        if not self.file_exists(repo_id, filename, revision=revision):
            raise EntryNotFoundError(filename)
        return str(self.folder(repo_id, revision) / filename)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, commit_description: str | None,
        revision: str | None, create_pr: bool, delete_patterns: list[str],
    ) -> CommitInfo:  # fmt: skip
        target = self.folder(repo_id, revision)
        if create_pr:
            self.create_branch(repo_id, branch="refs/pr/1") if revision is None else None
            target = self.folder(repo_id, "refs/pr/1")
        sent = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        for path in list(target.rglob("*")):
            name = str(path.relative_to(target))
            if name not in sent and any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        self.commits.append({"message": commit_message, "description": commit_description, "files": sent})
        base = f"https://huggingface.co/{repo_id}"
        return CommitInfo(
            commit_url=f"{base}/commit/{len(self.commits):040x}",
            commit_message=commit_message,
            commit_description=commit_description or "",
            oid=f"{len(self.commits):040x}",
            pr_url=f"{base}/discussions/1" if create_pr else None,
        )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("hf_alphaedit.hub.HfApi", hub.client)
    return hub


def test_the_keywords_are_those_of_transformers() -> None:
    ours = dict(inspect.signature(push_to_hub).parameters)
    theirs = dict(inspect.signature(PreTrainedModel.push_to_hub).parameters)
    ours.pop("editor")
    theirs.pop("self")
    assert ours.pop("include_requests").default is True  # ours alone
    assert list(ours) == list(theirs)
    assert {name: parameter.kind for name, parameter in ours.items()} == {
        name: parameter.kind for name, parameter in theirs.items()
    }


def test_push_and_load_again(hub: Hub, tmp_path: Path) -> None:
    editor = random_editor("llama", (2, 1))
    before = weights_of(editor)
    url = push_to_hub(editor, "llama-edited", private=True, token="hf_x", tags=["my-tag"])
    assert url == f"https://huggingface.co/me/llama-edited/commit/{1:040x}"
    assert hub.clients == [
        {"token": "hf_x", "library_name": "hf_alphaedit", "library_version": hf_alphaedit.__version__}
    ]
    assert hub.created == [{"repo_id": "me/llama-edited", "private": True}]
    assert hub.commits[0]["message"] == "Edit 3 facts with AlphaEdit"
    assert {"config.json", "model.safetensors", "tokenizer.json", "alphaedit_config.json",
            "alphaedit_history.safetensors", "README.md"} <= hub.commits[0]["files"]  # fmt: skip
    pushed = hub.folder("me/llama-edited")
    loaded = AlphaEditor.from_pretrained(pushed)
    assert same_weights(weights_of(loaded), before)
    assert loaded.history.requests == editor.history.requests
    plain = AutoModelForCausalLM.from_pretrained(pushed)
    assert same_weights({name: p.detach() for name, p in plain.named_parameters()}, before)
    assert same_weights(weights_of(editor), before)
    card = ModelCard((pushed / "README.md").read_text(encoding="utf-8"))
    assert card.text.strip().startswith("# llama-edited")
    assert 'from_pretrained("me/llama-edited")' in card.text
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alphaedit", "knowledge-editing", "my-tag"],
    }


def test_push_to_a_branch_and_as_a_pull_request(hub: Hub) -> None:
    editor = random_editor("gpt2", (1,))
    push_to_hub(editor, "me/edited", commit_message="First", commit_description="Longer")
    assert hub.commits[0]["message"] == "First"
    assert hub.commits[0]["description"] == "Longer"
    main = {path.name: path.read_bytes() for path in hub.folder("me/edited").iterdir()}
    editor.write_batches([*editor.history.batches, *random_batches(editor, (1,), seed=3)])
    push_to_hub(editor, "me/edited", revision="second")
    assert len(AlphaEditor.from_pretrained(hub.folder("me/edited", "second")).history) == 2
    url = push_to_hub(editor, "me/edited", create_pr=True)
    assert url == "https://huggingface.co/me/edited/discussions/1"
    assert len(AlphaEditor.from_pretrained(hub.folder("me/edited", "refs/pr/1")).history) == 2
    assert {path.name: path.read_bytes() for path in hub.folder("me/edited").iterdir()} == main


def test_sharding_and_stale_weights(hub: Hub) -> None:
    editor = random_editor("llama", (1,))
    push_to_hub(editor, "me/edited")
    folder = hub.folder("me/edited")
    for name in ("pytorch_model.bin", "data.json"):
        (folder / name).write_text("old")
    push_to_hub(editor, "me/edited", max_shard_size="50KB")
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors.index.json" in names
    assert "model.safetensors" not in names  # transformers would load it before the shards
    assert "pytorch_model.bin" not in names
    assert "data.json" in names
    push_to_hub(editor, "me/edited")
    assert not [path.name for path in folder.iterdir() if "-of-" in path.name or "index" in path.name]
    assert same_weights(weights_of(AlphaEditor.from_pretrained(folder)), weights_of(editor))


HAND_WRITTEN = (
    "---\nlicense: apache-2.0  # ours\nbase_model: mine/base\nlanguage:\n- fr\n---\n\n# Mon modèle\n\n"
    "Written by hand.\r\nA second line.\n"
)


def test_a_card_written_by_hand_keeps_its_text(hub: Hub) -> None:
    editor = random_editor("llama", (1,))
    editor.history.base_model = "org/base"
    folder = hub.folder("me/edited")
    folder.mkdir(parents=True)
    (folder / "README.md").write_bytes(HAND_WRITTEN.encode())
    push_to_hub(editor, "me/edited")
    first = (folder / "README.md").read_bytes().decode()
    assert "# Mon modèle\n\nWritten by hand.\r\nA second line.\n\n" + BEGIN in first
    assert ModelCard(first).data.to_dict() == {
        "license": "apache-2.0", "base_model": "mine/base", "language": ["fr"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["alphaedit", "knowledge-editing"],
    }  # fmt: skip
    assert first.count("1 fact changed") == 1

    (folder / "README.md").write_bytes((first + "\nAn afterword.\n").encode())
    editor.write_batches([*editor.history.batches, *random_batches(editor, (1,), seed=3)])
    push_to_hub(editor, "me/edited")
    second = (folder / "README.md").read_bytes().decode()
    assert "2 facts changed" in second
    assert "1 fact changed" not in second
    assert second.count(BEGIN) == second.count(END) == 1
    assert second.endswith(f"{END}\n\nAn afterword.\n")
    assert second[: second.index(BEGIN)] == first[: first.index(BEGIN)]


def test_saving_twice_gives_the_same_card(tmp_path: Path) -> None:
    editor = random_editor("llama", (1,))
    once = write_card(editor, tmp_path).read_bytes()
    assert write_card(editor, tmp_path).read_bytes() == once


@pytest.mark.parametrize("existing", ["# Title only\n", "---\n{}\n---\n", "no line end", f"{BEGIN}\nbroken off"])
def test_cards_of_other_shapes(existing: str) -> None:
    merged = merged_card(existing, "the section", {"tags": ["alphaedit"]}, "title")
    assert ModelCard(merged).data.tags == ["alphaedit"]
    assert f"{BEGIN}\nthe section\n{END}\n" in merged
    assert existing.replace("---\n{}\n---\n", "").strip() in merged
    assert merged_card(merged, "the section", {"tags": ["alphaedit"]}, "title") == merged


def test_results_in_the_metadata_survive() -> None:
    existing = (
        "---\nmodel-index:\n- name: m\n  results:\n  - task:\n      type: text-generation\n    dataset:\n"
        "      type: wikitext\n      name: WikiText\n"
        "    metrics:\n    - type: perplexity\n      value: 12.5\n---\ntext\n"
    )
    card = ModelCard(merged_card(existing, "section", {"tags": ["alphaedit"]}, "title"))
    assert card.data.eval_results[0].metric_value == 12.5
    assert card.data.tags == ["alphaedit"]


def sections(card: str) -> dict[str, str]:
    """Heading -> text below it."""
    parts = re.split(r"^#+ (.+)$", card, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def assert_whole(card: str) -> None:
    """No section is empty, no blank was left by the template, and every table row has as many cells as its head."""
    own = card[card.index(BEGIN) : card.index(END)].replace(BEGIN, "")
    for heading, text in sections(own).items():
        assert text.strip(), f"{heading} is empty"
    for blank in ("None", "Undefined", "{{", "{%", "[]()", " ,", "More Information"):
        assert blank not in own, blank
    assert "\n\n\n" not in own
    for table in re.findall(r"(?:^\|.*\|$\n?)+", own, flags=re.MULTILINE):
        rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()]
        assert len(set(rows)) == 1, table


def card_of(editor: AlphaEditor, directory: Path, **options: Any) -> str:
    return write_card(editor, directory, **options).read_text(encoding="utf-8")


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    editor = random_editor("llama", (2, 1))
    editor.history.base_model, editor.history.base_revision = "org/base", "0123abc"
    outcome = {"before": "French", "after": "English", "p_new_before": 0.0123, "p_new_after": 0.98765}
    editor.history.record_outcomes([outcome] * 3)
    card = card_of(editor, tmp_path / "edited", repository="me/edited")
    assert_whole(card)
    for expected in (
        "3 facts changed by [AlphaEdit](https://arxiv.org/abs/2410.02355)",
        "[org/base](https://huggingface.co/org/base)",
        "| commit of the base | 0123abc |",
        editor.history.base_fingerprint[:16],
        "| Secret prompt 0 about Person 0 1 says |",
        "| French | English | 0.012 | 0.988 |",
        "3 in 2 batches, the last on 2024-05-06",
        "down\\_proj: ",
        "hard, on the null space",
        "learning rate 0.5",
        f"hf_alphaedit {hf_alphaedit.__version__}, transformers ",
        f"torch {torch.__version__}",
        "### Limits",
        "undo_all()",
    ):
        assert expected in card, expected
    assert ModelCard(card).data.base_model == "org/base"
    delta, base = editor.history.delta(editor.sites()[0].name), editor.history.base_weights[editor.sites()[0].name]
    assert f"{float(delta.norm() / base.norm()):.2%} of its norm" in card


def test_the_card_without_measurements_says_so(tmp_path: Path) -> None:
    editor = random_editor("llama", (2,))
    object.__setattr__(editor.history.batches[0], "outcomes", ())
    card = card_of(editor, tmp_path)
    assert_whole(card)
    assert "was not recorded" in card
    assert "P(new)" not in card


def test_a_card_with_withheld_requests_only_counts_them(tmp_path: Path) -> None:
    editor = random_editor("llama", (2, 1))
    card = card_of(editor, tmp_path, include_requests=False)
    assert_whole(card)
    assert "The 3 requests are withheld" in card
    assert not re.search("Secret|Person|Answer|Seen", card)
    single = random_editor("llama", (1,))
    assert "The request is withheld" in card_of(single, tmp_path / "single", include_requests=False)


def test_withheld_and_known_requests_side_by_side(tmp_path: Path) -> None:
    editor = random_editor("llama", (2,))
    editor.save_pretrained(tmp_path, include_requests=False)
    editor = AlphaEditor.from_pretrained(tmp_path)
    editor.write_batches([*editor.history.batches, *random_batches(editor, (1,), seed=4)])
    card = card_of(editor, tmp_path)
    assert_whole(card)
    assert "Person 4 0" in card
    assert "another 2 are withheld" in card


def test_long_tables_are_cut_and_counted(tmp_path: Path) -> None:
    editor = random_editor("llama", (LONGEST_TABLE + 7,), scale=1e-3)
    card = card_of(editor, tmp_path)
    assert_whole(card)
    assert card.count("| Secret prompt 0 about") == LONGEST_TABLE
    assert "7 more are in `alphaedit_history.safetensors`" in card


def test_a_model_without_edits_says_so(tmp_path: Path) -> None:
    card = card_of(random_editor("llama"), tmp_path)
    assert "This model has no edits" in card


def test_text_of_users_stays_text(tmp_path: Path) -> None:
    editor = random_editor("llama", (1,))
    nasty = f"a | b\nc <script>alert(1)</script> {END} [x](javascript:y) **bold** `code` # head {{{{ 7 * 7 }}}} {{% if"
    request = EditRequest("{} says\n| --- |\n# Heading", nasty, nasty, case_id=1)
    object.__setattr__(editor.history.batches[0], "requests", (request,))
    editor.history.record_outcomes([{"before": nasty, "after": nasty, "p_new_before": 0.0, "p_new_after": 1.0}])
    editor.history.base_model = "org/<b>x</b>\n# y"
    editor.history.base_revision = "a|b"
    card = card_of(editor, tmp_path)
    own = card[card.index(BEGIN) + len(BEGIN) : card.rindex(END)]
    assert own.count("<") == 0
    assert END not in own
    assert "{{ 7 * 7 }}" in own.replace("\\", "")  # not 49
    assert not re.search(r"(?<!\\)\[x\]|(?<!\\)\*\*bold|(?<!\\)`code", own)
    tables = [line for line in own.splitlines() if "alert" in line]
    assert len(tables) == 1
    assert len(re.findall(r"(?<!\\)\|", tables[0])) == 7
    assert not re.search(r"^# ", own, flags=re.MULTILINE)


def test_a_local_base_is_named_without_its_path(tmp_path: Path) -> None:
    editor = random_editor("llama", (1,))
    editor.history.base_model = str(tmp_path / "private" / "my_base")
    card = card_of(editor, tmp_path)
    assert "my\\_base (a local model)" in card
    assert "private" not in card
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_escaping() -> None:
    assert escaped("  a\n\tb|c  ") == r"a b\|c"
    assert escaped("中国 <i>&amp;") == "中国 &lt;i&gt;&amp;amp;"
    assert escaped("a\x02b\u202ec") == "a\ufffdb\ufffdc"
    assert escaped("\\|") == r"\\\|"


def test_offline_the_hubs_own_error_comes_through() -> None:
    editor = random_editor("llama", (1,))
    before = weights_of(editor)
    with pytest.raises(OfflineModeIsEnabled):
        push_to_hub(editor, "me/edited")
    assert same_weights(weights_of(editor), before)


def test_a_failing_upload_leaves_no_folder_behind(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def full(**options: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(hub, "upload_folder", full)
    with pytest.raises(ConnectionError, match="gone"):
        push_to_hub(random_editor("llama", (1,)), "me/edited")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_the_stand_in_refuses_what_the_hub_refuses(hub: Hub) -> None:
    api = hub.client(token="x")
    with pytest.raises(TypeError):
        api.upload_folder("folder")
    with pytest.raises(AttributeError):
        _ = api.upload_large_folder
    with pytest.raises(TypeError):
        hub.client(unknown=1)
