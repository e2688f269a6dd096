"""What wraps a model, or has become of its weights: taken off where that is harmless, else refused with a remedy."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_alphaedit.errors import UnsupportedModelError
from hf_alphaedit.models.quantised import claim, is_four_bit


GGUF_REMEDY = (
    "load it with AutoModelForCausalLM.from_pretrained(id, gguf_file=name, "
    "quantization_config=GgufConfig(dequantize=True))"
)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The model itself: out of `torch.compile`, DistributedDataParallel and the like, if it can be edited.

    The modules are the user's own, so that what is written shows in the wrapped model as well.

    Raises:
        UnsupportedModelError: it is wrapped by PEFT, quantised by other means than 4 bits of bitsandbytes, or spread
            as shards; the message has the remedy.
    """
    name, compiled = type(model).__name__, False
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "peft_config"):
            raise UnsupportedModelError(
                f"{name} is wrapped by PEFT, whose adapters change what an edited weight does; edit "
                "model.merge_and_unload(), or edit the base model first and train or load the adapter afterwards"
            )
        compiled |= hasattr(model, "_orig_mod")
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise UnsupportedModelError(
                f"{name} is no transformers PreTrainedModel; load it with AutoModelForCausalLM"
            )
        model = inner
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{name} has PEFT adapters, which change what an edited weight does; edit it before they are added, or "
            "call model.delete_adapter on them"
        )
    if getattr(model, "is_quantized", False) and not any(map(is_four_bit, model.modules())):
        raise UnsupportedModelError(f"{name} is quantised ({_quantisation(model)}); {_remedy(model)}")
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UnsupportedModelError(
                f"{path} of {name} is spread over devices as shards (DTensor); load the model without tp_plan, "
                "distributed_config or FSDP, e.g. with device_map='auto', and edit it before it is sharded"
            )
    compiled |= any(module._compiled_call_impl for module in model.modules())
    problem = claim(model, compiled=compiled)
    if problem is not None:
        raise UnsupportedModelError(f"{name}: {problem}")
    return model


def _quantisation(model: PreTrainedModel) -> str:
    method: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(method, "quant_method", None) or "unknown method"
    return str(getattr(method, "value", method))


def _remedy(model: PreTrainedModel) -> str:
    if _quantisation(model) == "gguf":
        return GGUF_REMEDY
    return (
        "an update can't be added to packed weights without rounding it away: load the model without "
        "quantization_config (dtype='bfloat16'), edit and save it, and quantise the result"
    )
