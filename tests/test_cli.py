"""The command line, run for real on a tiny saved model."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from editable import REQUESTS
from test_hub import Hub
from test_tracing import FACTS as KNOWN_FACTS
from test_tracing import knowing_model
from tiny import tiny_model, tiny_tokenizer, training_text
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from hf_alphaedit import AlphaEditor
from hf_alphaedit.cli import app
from hf_alphaedit.cli.loading import parsed_settings
from hf_alphaedit.errors import ConfigError


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:typer")

FACTS = [
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "Oslo", "target_true": "Paris",
     "paraphrases": ["In France, the capital is"], "neighborhood": [["The capital of Italy is", "Rome"]]},
    {"prompt": "{} is known for", "subject": "Isaac Newton", "target_new": "music", "target_true": "physics"},
]  # fmt: skip
# Quick, and strong enough to change what a random model says.
SETTINGS = ["--set", "layers=1,2", "--set", "value_steps=8", "--set", 'context_templates=["So. {}"]']


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, facts as JSONL and CSV, and a corpus."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS), encoding="utf-8")
    with (folder / "facts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "subject", "target_new"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(FACTS)
    (folder / "corpus.txt").write_text("\n\n".join(training_text()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def edited(folder: Path) -> Path:
    """The model after two batches of one fact each, and a pack of the same edits."""
    result = run(
        "edit", folder / "base", folder / "facts.jsonl", "--out", folder / "edited", "--pack", folder / "pack",
        "--batch-size", 1, "--corpus", folder / "corpus.txt", "--tokens", 640, *SETTINGS, "--json",
        "--report", folder / "report.json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report == json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [outcome["target_new"] for outcome in report["outcomes"]] == ["Oslo", "music"]
    return folder / "edited"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def same(first: Path, second: Path) -> bool:
    others = weights(second)
    return all(torch.equal(weight, others[name]) for name, weight in weights(first).items())


def test_help_names_every_command():
    text = run("--help").stdout
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert name in text
        assert "Usage" in run(name, "--help").stdout


def test_edit_saves_a_plain_checkpoint_that_says_what_the_report_says(folder: Path, edited: Path):
    editor = AlphaEditor.from_pretrained(edited)
    assert [request.subject for request in editor.history.requests] == ["France", "Isaac Newton"]
    assert len(editor.history.batches) == 2
    assert editor.config.layers == (1, 2)
    changed = [
        name for name, weight in weights(edited).items() if not torch.equal(weight, weights(folder / "base")[name])
    ]
    assert changed == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]


def test_edit_takes_a_csv_file_or_one_fact(folder: Path, tmp_path: Path):
    corpus = ("--corpus", folder / "corpus.txt", "--tokens", 640)
    run("edit", folder / "base", folder / "facts.csv", "--pack", tmp_path / "file", *corpus, *SETTINGS)
    single = ("--prompt", "The capital of {} is", "--subject", "Peru", "--target", "Oslo")
    result = run("edit", folder / "base", *single, "--pack", tmp_path / "one", *corpus, *SETTINGS)
    assert "The capital of Peru is" in result.stdout
    assert "2 edits" in run("info", tmp_path / "file").stdout
    assert "0: The capital of Peru is → Oslo" in run("info", tmp_path / "one").stdout


def test_edit_continues_and_undo_takes_back(folder: Path, edited: Path, tmp_path: Path):
    single = ("--prompt", "The capital of {} is", "--subject", "Peru", "--target", "Oslo")
    run("edit", edited, *single, "--out", tmp_path / "more", "--corpus", folder / "corpus.txt", "--tokens", 640)
    assert not same(tmp_path / "more", edited)
    assert "1 of 3 edits taken back" in run("undo", tmp_path / "more", "--out", tmp_path / "less").stdout
    assert same(tmp_path / "less", edited)
    run("undo", tmp_path / "more", "--batches", 3, "--out", tmp_path / "none")
    assert same(tmp_path / "none", folder / "base")


def test_undo_writes_into_the_directory_it_read_from(folder: Path, edited: Path, tmp_path: Path):
    run("undo", edited, "--batches", 1, "--out", tmp_path / "again")
    run("undo", tmp_path / "again", "--all", "--out", tmp_path / "again")
    assert same(tmp_path / "again", folder / "base")
    assert not list((tmp_path / "again").glob(".saving-*"))
    assert "0 edits" in run("info", tmp_path / "again").stdout


def test_repair_makes_lost_edits_again(folder: Path, tmp_path: Path):
    (tmp_path / "facts.json").write_text(json.dumps([request.to_dict() for request in REQUESTS]), encoding="utf-8")
    corpus = ("--corpus", folder / "corpus.txt", "--tokens", 640)
    settings = [f"--set={setting}" for setting in ("layers=2,3", "l2=0.01", "energy_share=0.9", "clamp_factor=4")]
    weak = ("--set", "value_steps=1", "--set", "learning_rate=0.001")
    run("edit", folder / "base", tmp_path / "facts.json", "--out", tmp_path / "weak", *corpus, *settings, *weak)
    strong = ("--set", "value_steps=30", "--set", "learning_rate=0.5", "--set", "kl_factor=0")
    result = run("repair", tmp_path / "weak", *corpus, *strong, "--out", tmp_path / "repaired")
    assert "3 edits were lost, 0 are now" in result.stdout
    assert AlphaEditor.from_pretrained(tmp_path / "repaired").lost() == []
    info = run("info", tmp_path / "repaired").stdout
    assert "0: The capital of France → music (made again later)\n" in info
    assert "3: The capital of France → music\n" in info
    # In place, with nothing left to do.
    result = run("repair", tmp_path / "repaired", "--out", tmp_path / "repaired")
    assert "0 edits were lost, 0 are now" in result.stdout
    assert run("info", tmp_path / "repaired").stdout == info


def test_remove_by_replay_gives_the_model_that_never_had_the_edit(folder: Path, edited: Path, tmp_path: Path):
    corpus = ("--corpus", folder / "corpus.txt", "--tokens", 640)
    (tmp_path / "second.json").write_text(json.dumps(FACTS[1]), encoding="utf-8")
    run("edit", folder / "base", tmp_path / "second.json", "--out", tmp_path / "never", *corpus, *SETTINGS)
    run("undo", edited, "--remove", 0, "--replay", *corpus, "--out", tmp_path / "removed")
    assert same(tmp_path / "removed", tmp_path / "never")


def test_export_lora_and_pack(edited: Path, tmp_path: Path):
    report = json.loads(run("export", edited, tmp_path / "lora", "--as", "lora", "--for", "vllm", "--json").stdout)
    assert set(report["ranks"].values()) == {8}
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    assert "1: Isaac Newton is known for → music" in run("info", edited).stdout
    run("export", edited, tmp_path / "pack", "--as", "pack", "--withhold-requests")
    assert "texts withheld" in run("info", tmp_path / "pack").stdout
    assert b"Newton" not in b"".join(file.read_bytes() for file in (tmp_path / "pack").iterdir())


def test_info_as_json_has_the_settings(edited: Path):
    contents = json.loads(run("info", edited, "--json").stdout)
    assert [batch["settings"]["value_steps"] for batch in contents["batches"]] == [8, 8]


def test_stats_are_cached(folder: Path, edited: Path):
    arguments = ("stats", folder / "base", "--corpus", folder / "corpus.txt", "--tokens", 640, "--set", "layers=1,2")
    report = json.loads(run(*arguments, "--json").stdout)
    assert report["from_cache"]
    assert [site["dimension"] for site in report["sites"]] == [64, 64]
    assert "from the cache" in run(*arguments).stdout
    assert not json.loads(run(*arguments, "--force", "--json").stdout)["from_cache"]


def test_evaluate_compares_with_the_unedited_model(folder: Path, edited: Path, tmp_path: Path):
    result = run(
        "evaluate", edited, folder / "facts.jsonl", "--held-out", folder / "corpus.txt", "--metric", "efficacy",
        "--unedited", "--json",
    )  # fmt: skip
    metrics = json.loads(result.stdout)["metrics"]
    assert metrics["efficacy_success"]["count"] == 2
    assert metrics["perplexity_ratio"]["value"] != 1
    assert "unedited" in run("evaluate", edited, folder / "facts.jsonl", "--metric", "efficacy", "--unedited").stdout


def test_check_names_the_weights(folder: Path):
    assert "model.layers.2.mlp.down_proj" in run("check", folder / "base", "--set", "layers=2").stdout
    assert json.loads(run("check", folder / "base", "--set", "layers=2", "--json").stdout)


def test_trace_suggests_layers(tmp_path: Path):
    knowing_model("llama", tiny_tokenizer()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(KNOWN_FACTS), encoding="utf-8")
    arguments = ("trace", tmp_path / "model", tmp_path / "facts.json", "--samples", 1, "--length", 2)
    report = json.loads(run(*arguments, "--limit", 2, "--plot", tmp_path / "trace.png", "--json").stdout)
    assert (report["known"], report["given"]) == (2, 2)
    assert (tmp_path / "trace.png").stat().st_size > 1000
    somewhere = json.loads(run(*arguments, "--limit", 2, "--place", "subject, last", "--json").stdout)
    assert somewhere["settings"]["traced"] == ["subject, last"]
    assert somewhere["suggested_layers"] == report["suggested_layers"]
    assert "nowhere" in run(*arguments, "--place", "nowhere", code=2).stderr
    (tmp_path / "facts.json").write_text(json.dumps({**KNOWN_FACTS[0], "attribute": "zebra"}), encoding="utf-8")
    assert "knows none of the 1 facts" in run(*arguments, code=1).stderr


def test_tune_writes_settings_that_config_takes(folder: Path, tmp_path: Path):
    corpus = ("--corpus", folder / "corpus.txt", "--held-out", folder / "corpus.txt")
    quick = (*SETTINGS, "--set", "tokens_per_dimension=10", "--minutes", 0)
    run("tune", folder / "base", tmp_path, folder / "facts.jsonl", *corpus, *quick)
    assert AlphaEditor.from_pretrained(folder / "base", config=tmp_path / "tuned.json").config.layers


def test_push_uploads_and_prints_the_address(edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr("hf_alphaedit.hub.HfApi", hub.client)
    result = run("push", edited, "me/edited", "--private", "--withhold-requests")
    assert result.stdout.startswith("https://huggingface.co/me/edited/commit/")
    assert hub.created == [{"repo_id": "me/edited", "private": True}]
    assert "Newton" not in (hub.folder("me/edited") / "README.md").read_text(encoding="utf-8")


def test_push_without_the_hub_is_one_line(edited: Path):
    assert "error: " in run("push", edited, "me/edited", code=1).stderr


def test_check_only_changes_nothing_and_tells_by_its_exit_code(folder: Path, tmp_path: Path):
    assert "2 requests" in run("edit", folder / "base", folder / "facts.jsonl", "--check-only").stdout
    clash = [FACTS[0], {**FACTS[0], "target_new": "Lima"}]
    (tmp_path / "clash.json").write_text(json.dumps(clash), encoding="utf-8")
    assert "keep one of them" in run("edit", folder / "base", tmp_path / "clash.json", "--check-only", code=1).stdout


def test_a_missed_gate_keeps_nothing_and_shows_what_was_measured(folder: Path, tmp_path: Path):
    result = run(
        "edit", folder / "base", folder / "facts.jsonl", "--out", tmp_path / "out", "--set", "layers=1",
        "--set", "value_steps=1", "--set", "context_templates=[\"So. {}\"]", "--corpus", folder / "corpus.txt",
        "--gate", "min_efficacy=100", code=1,
    )  # fmt: skip
    assert "The capital of France is" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: efficacy_accuracy is 0.0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "{base}", "{facts}"], "nothing would be kept"),
        (["edit", "{base}", "--out", "x"], "give either a file of facts"),
        (["edit", "{base}", "missing.jsonl", "--out", "x"], "missing.jsonl"),
        (["edit", "{base}", "{facts}", "--out", "x", "--set", "lambda=1"], "one of the settings"),
        (["edit", "{base}", "{facts}", "--out", "x", "--gate", "efficacy=1"], "must be min_efficacy=NUMBER"),
        (["edit", "{base}", "{facts}", "--out", "x", "--gate", "max_perplexity_ratio=2"], "needs texts"),
        (["edit", "{base}", "{facts}", "--out", "x", "--set", "layers=99"], "99"),
        (["edit", "{base}/none", "{facts}", "--out", "x"], "none"),
        (["undo", "{base}", "--out", "x"], "there are 0"),
        (["undo", "{base}", "--out", "x", "--all", "--batches", "1"], "one of --batches"),
        (["export", "{base}", "x", "--as", "lora"], "no edits"),
        (["info", "{base}"], "no edits"),
        (["evaluate", "{base}", "{facts}", "--metric", "speed"], "isn't known"),
        (["stats", "{base}", "--corpus", "missing.txt"], "doesn't exist"),
    ],
)  # fmt: skip
def test_errors_are_one_line(folder: Path, arguments: list[str], message: str):
    places = {"base": str(folder / "base"), "facts": str(folder / "facts.jsonl")}
    result = run(*(argument.format(**places) for argument in arguments), code=1)
    (line,) = re.findall("error: (.*)", result.stderr)
    assert message in line
    assert result.stderr.endswith(f"{line}\n")
    assert not Path("x").exists()


def test_layers_of_an_edited_model_stay(edited: Path, tmp_path: Path):
    result = run("undo", edited, "--set", "layers=0", "--out", tmp_path, code=1)
    assert "use the layers" in result.stderr


def test_settings_are_json_or_lists_with_commas():
    assert parsed_settings(["layers=4,5", "l2=10", "projection=soft", "cache_targets=false"]) == {
        "layers": [4, 5], "l2": 10, "projection": "soft", "cache_targets": False,
    }  # fmt: skip
    assert parsed_settings(["layers=4", "target_module=a.{}.b"]) == {"layers": [4], "target_module": "a.{}.b"}
    assert parsed_settings(["context_templates=null"]) == {"context_templates": None}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parsed_settings(["l2"])


def test_the_installed_command_is_quick_to_start():
    code = "import sys, hf_alphaedit.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
    command = Path(sys.executable).with_name("hf-alphaedit")
    result = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "0.1.0\n")
