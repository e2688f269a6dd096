"""Run by `accelerate launch` in test_processes.py: prepare, edit and save a checkpoint, as any script would."""

import os
import sys
from pathlib import Path

from tiny import tiny_tokenizer, training_text
from transformers import AutoModelForCausalLM

from hf_alphaedit import AlphaEditConfig, AlphaEditor
from hf_alphaedit.processes import Processes


REQUESTS = [
    {"prompt": "The capital of {} is", "subject": "Norway", "target_new": "Lima"},
    {"prompt": "{} is known for", "subject": "Marie Curie", "target_new": "music"},
    {"prompt": "Many people who live in {} speak", "subject": "Cairo", "target_new": "Norwegian"},
]
CONFIG = AlphaEditConfig(
    layers=(1, 2), value_steps=6, context_templates=("People say that {}",), sequence_length=32, cache_targets=False,
    forward_dtype="model",
)  # fmt: skip


def main(checkpoint: Path, moments: Path, output: Path, failing_rank: int) -> None:
    """Edit `checkpoint` and save it to `output`; process `failing_rank` fails when the search begins."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    editor = AlphaEditor(model, tiny_tokenizer(), CONFIG)
    editor.second_moment_directory = moments
    editor.prepare(training_text(), num_tokens=640)
    processes = Processes.current()
    assert processes.count == int(os.environ.get("EXPECTED_PROCESSES", "1"))
    if processes.count > 1 and processes.rank == failing_rank:
        model.model.layers[3].register_forward_pre_hook(fail)
    editor.apply_edits(REQUESTS)
    editor.save_pretrained(output)


def fail(*_: object) -> None:
    """Stop as a process does that has lost its device."""
    raise ValueError("this process was told to fail")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else -1)
