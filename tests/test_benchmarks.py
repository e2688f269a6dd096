"""The benchmarks run and count correctly, on tiny models. Nothing here depends on how fast the machine is."""

import json
from pathlib import Path
from typing import Any

import bench
import gpu
import measuring
import pytest
import reference
import scaling
import solve
import torch
from operations import target_operations
from own_data import own_records
from tiny import tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from workload import DATA_VARIABLE

from hf_alphaedit import AlphaEditConfig, EditRequest
from hf_alphaedit.models.architecture import resolve_architecture
from hf_alphaedit.models.encoding import EncodedRequest, TokenRow
from hf_alphaedit.records import as_record


CONFIG = AlphaEditConfig(layers=(1, 2), value_steps=20)


@pytest.fixture(autouse=True)
def without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Facts and text of the project's own, wherever the tests run."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "none"))


@pytest.fixture
def loaded() -> tuple[Any, Any]:
    return tiny_model("llama", max_position_embeddings=128), tiny_tokenizer()


def run_bench(loaded: tuple, folder: Path, *options: str, config: AlphaEditConfig = CONFIG) -> tuple[int, dict]:
    status = bench.main([*options, "--only", "--output", str(folder)], loaded, config=config)
    return status, json.loads((folder / "bench.json").read_text())


def test_bench_in_paper_mode_agrees(loaded: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = {name: value.clone() for name, value in loaded[0].state_dict().items()}
    options = ("--mode", "paper", "--requests", "1", "--tokens", "512", "--no-metrics", "--phases", *bench.PHASES[1:])
    status, result = run_bench(loaded, tmp_path, *options)
    assert status == 0
    rows = {row["phase"]: row for row in result["phases"]}
    for phase in ("projector", "targets", "keys", "solve", "write", "apply"):
        row = rows[f"{phase} (paper)"]
        assert row["ratio"] == row["reference"] / row["library"]
    assert rows["apply (paper)"]["library"] >= rows["targets (paper)"]["library"]
    assert result["target_search"]["paper"]["share"] > 0
    assert result["agreement"]["targets"] < 1e-4
    assert result["agreement"]["deltas"] < 1e-2
    assert not result["metrics"]
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert "apply (paper), times faster" in capsys.readouterr().out
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("projection", ["hard", "soft"])
def test_bench_lends_targets_and_evaluates(loaded: tuple, tmp_path: Path, projection: Any) -> None:
    options = ("--mode", "recommended", "--requests", "2", "--reference-requests", "1", "--tokens", "512")
    options = (*options, "--phases", "targets")
    config = CONFIG.replace(value_steps=2, projection=projection)
    status, result = run_bench(loaded, tmp_path, *options, config=config)
    assert status == 0
    assert ("null ranks" in result["agreement"]) == (projection == "hard")  # soft has no null space to compare
    assert any("1 of 2 targets" in note for note in result["notes"])
    assert set(result["metrics"]) == {"unedited", "library (recommended)", "reference (recommended)"}
    assert all("efficacy_success" in found for found in result["metrics"].values())
    assert any(goal["name"].startswith("specificity_success") for goal in result["goals"])


def test_bench_compares_moments(loaded: tuple, tmp_path: Path) -> None:
    _, result = run_bench(loaded, tmp_path, "--requests", "1", "--tokens", "512", "--phases", "statistics")
    assert [row["phase"] for row in result["phases"]] == ["statistics", "statistics (bfloat16)"]
    assert set(result["agreement"]) == {"moments (float32)", "moments (bfloat16 products)"}
    assert result["agreement"]["moments (float32)"] < 1e-6
    assert 1e-6 < result["agreement"]["moments (bfloat16 products)"] < 1e-2  # few tokens: little of it cancels


def test_bench_fails_where_the_sides_disagree(loaded: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second_moment = reference.second_moment
    options = ("--requests", "1", "--tokens", "512", "--phases", "statistics")
    monkeypatch.setattr(reference, "second_moment", lambda *arguments: 1.01 * second_moment(*arguments))
    status, result = run_bench(loaded, tmp_path, *options)
    assert result["agreement"]["moments (float32)"] > 5e-3
    assert status == 1


def test_solve_agrees_with_the_dense_form(tmp_path: Path) -> None:
    arguments = ["--dimension", "256", "--hidden", "32", "--past", "60", "--new", "5", "--output", str(tmp_path)]
    assert solve.main(arguments) == 0
    result = json.loads((tmp_path / "solve.json").read_text())
    assert result["difference"] < 1e-9
    assert set(result["seconds"]) == {"library", "dense, float32", "dense, float64"}
    factors = 4 * solve.EDITS * (2 * 256 + 32)
    assert factors < result["state"]["file"] - result["state"]["base"] < factors + 500 * solve.EDITS
    problem = solve.Problem.random(64, 8, 10, 3)
    projector, _ = problem.dense(torch.float64)
    torch.testing.assert_close(problem.filter().root(problem.new) * solve.L2**0.5, problem.new @ projector)


def test_scaling_leaves_the_model_as_it_was(loaded: tuple, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in loaded[0].state_dict().items()}
    arguments = ["--edits", "1", "2", "--earlier", "0", "150", "--batch", "1", "--tokens", "512"]
    assert scaling.main([*arguments, "--output", str(tmp_path)], loaded, CONFIG.replace(value_steps=3)) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [one["edits"] for one in result["batch"]] == [1, 2]
    assert [one["earlier"] for one in result["history"]] == [0, 150]
    assert all(one["per_edit"] * one["edits"] == pytest.approx(one["whole"]) for one in result["batch"])
    assert len(list(tmp_path.glob("scaling_*.png"))) == 2
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_pretended_edits_weigh_on_the_solve_alone(loaded: tuple) -> None:
    editor = scaling.ready_editor(*loaded, CONFIG, 512)
    scaling.pretend_edits(editor, 130)
    assert len(editor.history) == 130
    for site in editor.sites():
        assert editor.history.past_keys(site.name).shape == (130, 64)
        assert torch.equal(editor.history.weight(site.name), site.read())


@pytest.mark.parametrize("options", [["--random-projector"], ["--dtype", "float32"]])
def test_gpu_on_the_processor(options: list[str], tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--device", "cpu", "--batch", "2", "--steps", "3", "--tokens", "600"]
    assert gpu.main([*arguments, *options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [batch["edits"] for batch in result["batches"]] == [2, 2]
    assert all(batch["edits_per_second"] > 0 for batch in result["batches"])
    assert set(result["shares"]) == {"statistics", "targets"}
    assert set(result["seconds"]) == {"model", "statistics", "projector", "batch 1", "batch 2"}


@pytest.mark.gpu
def test_gpu_on_an_accelerator(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--batch", "2", "--steps", "3", "--tokens", "600", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["peak"]["model"] > 0


def test_shapes_are_those_they_are_named_after() -> None:
    """Parameters as published: 8.03 and 1.24 billion (the small one ties its embeddings)."""
    sizes = {}
    for name in ("llama-3-8b", "llama-3.2-1b"):
        model = gpu.build_model(name, torch.device("meta"), torch.bfloat16)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes["llama-3-8b"] == 8030261248
    assert sizes["llama-3.2-1b"] == pytest.approx(1.24e9 + 128256 * 2048, rel=0.01)


def forward_operations(model: PreTrainedModel, token_ids: list[int]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([token_ids]), use_cache=False)
    return counter.get_total_flops()


def test_operations_are_those_of_whole_passes() -> None:
    """With the subject first, no block below and every position in the loss, a step is a pass of the whole model."""
    model = tiny_model("llama", attn_implementation="eager")
    architecture = resolve_architecture(model)
    row, essence = TokenRow((5, 6, 7, 8), 0, 0), TokenRow((5,), 0, 0)
    request = EncodedRequest((row,), essence, (6, 7, 8, 9))
    still, moved = (target_operations(architecture, [request], -1, [updates]) for updates in (0, 1))
    assert still.once == 0
    pairs = 4 * 5 // 2  # eager attention computes the masked half as well
    extra = 2 * 2 * 32 * 5 * (16 - pairs)
    assert still.total == forward_operations(model, [5, 6, 7, 8]) + forward_operations(model, [5]) - extra
    assert moved.blocks == 3 * still.blocks  # two forward passes and one backward pass
    assert moved.head == 3 * still.head


def test_operations_of_a_prefix_count_once() -> None:
    architecture = resolve_architecture(tiny_model("llama"))
    rows = [TokenRow(tuple(range(length)), subject, length - 1) for length, subject in ((9, 4), (5, 4))]
    with_prefix = EncodedRequest((rows[0],), rows[1], (1,))
    once = target_operations(architecture, [with_prefix], 2, [0])
    longer = target_operations(architecture, [with_prefix], 2, [10])
    assert longer.once == once.once
    assert longer.blocks == 21 * once.blocks
    assert longer.head == 21 * once.head


def test_operations_of_contexts_in_turn_are_those_of_the_rows_looked_at() -> None:
    architecture = resolve_architecture(tiny_model("llama"))
    row, essence = TokenRow((5, 6, 7), 1, 2), TokenRow((5, 6), 1, 1)

    def blocks(contexts: int, updates: int, in_turn: bool) -> int:
        request = EncodedRequest((row,) * contexts, essence, (1,))
        return target_operations(architecture, [request], 1, [updates], in_turn).blocks

    assert blocks(5, 10, in_turn=True) == blocks(2, 10, in_turn=False)  # each step sees the bare row and one more
    assert blocks(2, 10, in_turn=True) == blocks(2, 10, in_turn=False)
    assert blocks(5, 10, in_turn=True) < blocks(5, 10, in_turn=False)


def test_the_rate_counts_two_operations_for_each_multiplication() -> None:
    assert measuring.matrix_rate(torch.float32, size=64, repeats=1) > 0
    environment = measuring.environment()
    assert environment["threads"] == torch.get_num_threads()


def test_own_facts_are_sound() -> None:
    records = [as_record(record) for record in own_records(1000)]
    assert len({(record.request.subject, record.request.prompt) for record in records}) == 1000
    for record in records:
        assert isinstance(record.request, EditRequest)
        assert record.request.target_new != record.request.target_true
        assert record.request.text not in {prompt for prompt, _ in record.neighborhood}
    with pytest.raises(ValueError, match="2000"):
        own_records(2000)
