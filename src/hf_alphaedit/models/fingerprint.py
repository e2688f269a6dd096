"""Short names for weights and tokenizers: two that agree here are the same for every purpose of editing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.models.experts import ExpertsSite
from hf_alphaedit.models.quantised import is_four_bit
from hf_alphaedit.models.weights import EditSite


SAMPLES = 1024  # elements of each parameter that are looked at

# Entries of a config that users set freely and that don't change what a token's hidden state is.
FREE_CONFIG_KEYS = frozenset(
    {
        "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "output_hidden_states",
        "output_attentions", "return_dict", "problem_type", "id2label", "label2id", "bos_token_id", "eos_token_id",
        "pad_token_id", "quantization_config", "initializer_range", "auto_map",
    }
)  # fmt: skip

# Every script, digits, white space and controls: texts on which two different tokenizers would part.
PROBES = (
    "The mother tongue of Danielle Darrieux is French.",
    " leading space,  two spaces\nand a\tnew line ",
    "中国的首都是北京。日本の首都は東京です。",
    "Ünïcödé 1234567890 3.14 <s></s>{}[]()_-/\\ 🙂",
    "don't DON'T Don’t e\u0301 é",
)


def model_fingerprint(model: PreTrainedModel, base_weights: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 that names the unedited weights of `model`, wherever they live.

    It covers what the config says beyond its defaults and, of every parameter, name, dtype, shape and up to 1,024
    evenly spaced elements. So it tells checkpoints, revisions and dtypes apart, at the cost of one look at each
    weight; a change of a few single elements elsewhere can escape it.

    Args:
        model: edited or not.
        base_weights: site name -> (h, d), the unedited value of each weight that has been edited; these stand in
            for what the model holds now.
    """
    base_weights = base_weights or {}
    digest = hashlib.sha256(json.dumps(_config_of(model), sort_keys=True, default=str).encode())
    for module_name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        with torch.no_grad(), align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                value = parameter.detach()
                if name == "weight" and module_name in base_weights and not is_four_bit(module):
                    value = EditSite(module_name, 0, module).as_stored(base_weights[module_name])
                elif f"{module_name}.{name}" in base_weights:
                    path = f"{module_name}.{name}"
                    value = ExpertsSite(path, 0, module).as_stored(base_weights[path])
                digest.update(f"\n{module_name}.{name} {value.dtype} {tuple(value.shape)} ".encode())
                digest.update(_sample(value))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 that names what `tokenizer` does: its vocabulary, and the ids it gives to a set of probing texts.

    Behaviour rather than files, so that saving and reloading, padding side and class don't matter.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    encoded = [tokenizer(text, padding=False, truncation=False)["input_ids"] for text in PROBES]
    return hashlib.sha256(json.dumps([vocabulary, encoded]).encode()).hexdigest()


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of one tensor: dtype, shape and every byte in row-major order."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}\n".encode())
    digest.update(memory_of(weight))
    return digest.hexdigest()


def memory_of(tensor: Tensor) -> memoryview:
    """The elements of `tensor` in row-major order, byte for byte (a copy only where they don't lie so already)."""
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data


def _config_of(model: PreTrainedModel) -> dict[str, Any]:
    # The difference to the defaults, because a newer transformers adds fields to every config.
    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: kept(entry)
            for key, entry in value.items()
            if str(key) not in FREE_CONFIG_KEYS and not str(key).startswith("_")
        }

    return kept(model.config.to_diff_dict())


def _sample(value: Tensor) -> memoryview:
    flat = value.reshape(-1)
    return memory_of(flat[:: max(1, -(-flat.numel() // SAMPLES))])
