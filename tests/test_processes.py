"""`accelerate launch` with two real processes: the moments and the weights of one, and an end with an error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edit_in_processes import main
from safetensors.torch import load_file
from tiny import tiny_model


SCRIPT = Path(__file__).with_name("edit_in_processes.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").save_pretrained(directory)
    return directory


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    # `--multi_gpu` with ACCELERATE_USE_CPU, since `--cpu` alone starts a single process unless MPI is there.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(SCRIPT), *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "EXPECTED_PROCESSES": "2"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "edited", "sums"),
    [
        ("llama", r"model\.layers\.[12]\.mlp\.down_proj\.weight", 2),
        ("mixtral", r"model\.layers\.[12]\..+\.w2\.weight", 8),
    ],
)
def test_two_processes_edit_as_one(name: str, edited: str, sums: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    tiny_model(name).save_pretrained(checkpoint)
    done = launch(checkpoint, tmp_path / "moments of two", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    main(checkpoint, tmp_path / "moments of one", tmp_path / "one", -1)
    directories = (tmp_path / "one", tmp_path / "two", checkpoint)
    one, two, base = (load_file(directory / "model.safetensors") for directory in directories)
    changed = {name for name, value in one.items() if not torch.equal(value, base[name])}
    assert {name.split(".")[2] for name in changed} == {"1", "2"}
    assert all(re.fullmatch(edited, name) for name in changed)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    moments = [sorted((tmp_path / f"moments of {count}").glob("*.safetensors")) for count in ("one", "two")]
    assert [file.name for file in moments[0]] == [file.name for file in moments[1]]
    assert len(moments[0]) == sums
    for mine, other in zip(*moments, strict=True):
        other_values = load_file(other)
        for name, value in load_file(mine).items():
            torch.testing.assert_close(other_values[name], value, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_leaves_the_moments_whole(checkpoint: Path, tmp_path: Path) -> None:
    failed = launch(checkpoint, tmp_path / "moments", tmp_path / "edited", 1)
    assert failed.returncode != 0
    assert "told to fail" in failed.stderr
    assert not (tmp_path / "edited").exists()
    again = launch(checkpoint, tmp_path / "moments", tmp_path / "edited")
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "edited" / "model.safetensors").exists()
