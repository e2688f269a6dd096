"""The demo on the real model, from the command line."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from smollm2 import PackageNotInstalledError, find_smollm2


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_what_asks_the_saved_model_uses_transformers_alone():
    tree = ast.parse((EXAMPLES / "ask.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "sys", "torch", "transformers"}


def test_facts_and_neighbours_are_about_different_subjects():
    from demo import FACTS

    assert len(FACTS) == 12
    assert sum(not fact.request.prompt.isascii() for fact in FACTS) == 2
    subjects = {fact.request.subject.removeprefix("The ") for fact in FACTS}
    assert len(subjects) == 12
    for fact in FACTS:
        assert fact.request.subject.removeprefix("The ") in fact.paraphrase
        assert not any(subject in fact.neighbour for subject in subjects)


@pytest.mark.slow
def test_demo(tmp_path: Path):
    try:
        find_smollm2()
    except PackageNotInstalledError as error:
        pytest.skip(str(error))
    result = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", "--output", tmp_path / "edited"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "edited" / "model.safetensors").is_file()
    assert "after the reload" in result.stdout
