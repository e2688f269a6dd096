"""Weights that bitsandbytes has packed in 4 bits: never written; an edit is a low-rank branch beside the product.

The solve needs keys and values only, which the quantised forward gives, so the factors of its update are all there is
to keep, in full precision, as in a LoRA adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from hf_alphaedit.models.weights import EditSite


if TYPE_CHECKING:
    from hf_alphaedit.algorithm.update import LowRankUpdate
    from hf_alphaedit.batches import Batch
    from hf_alphaedit.history import History


@dataclass(frozen=True, eq=False)
class Branch:
    """A forward hook that adds B A x to what a module makes of its input x.

    Attributes:
        inputs: A (r, d), float32 on the module's device.
        outputs: B (h, r), likewise.
    """

    inputs: Tensor
    outputs: Tensor

    def __call__(self, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = nn.functional.linear(arguments[0].to(self.inputs.dtype), self.inputs)  # (..., r)
        return output + nn.functional.linear(inner, self.outputs).to(output.dtype)  # (..., h)


@dataclass(frozen=True, eq=False)
class QuantisedSite(EditSite):
    """A bitsandbytes `Linear4bit`: its weight is what is packed, unpacked to float32, plus the branch."""

    @property
    def shape(self) -> tuple[int, int]:
        """(h, d) of the matrix that is packed."""
        return self.module.out_features, self.module.in_features

    def read(self) -> Tensor:
        """The weight that the module stands for, as (h, d) float32 on its device."""
        weight, bitsandbytes = self.module.weight, sys.modules["bitsandbytes"]
        unpacked = bitsandbytes.functional.dequantize_4bit(weight.detach(), weight.quant_state).float()  # (h, d)
        branch = branch_of(self.module)
        return unpacked if branch is None else unpacked + branch.outputs @ branch.inputs

    def write_edits(self, history: History, batches: Sequence[Batch] | None = None) -> None:
        """Put the factors of `batches` (default: the history's) in the branch's place; none takes it off."""
        self._set_branch(history.factors(self.name, batches))

    def _set_branch(self, update: LowRankUpdate | None) -> None:
        hooks = self.module._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, Branch)]:
            del hooks[key]
        if update is not None:
            branch = Branch(update.inputs.to(self.device), update.outputs.T.contiguous().to(self.device))
            # First of all hooks, so that others see what the edited weight would give.
            self.module.register_forward_hook(branch, prepend=True)


def branch_of(module: nn.Module) -> Branch | None:
    """The branch that stands beside a module, if there is one."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, Branch)), None)


def is_four_bit(module: nn.Module) -> bool:
    """Whether `module` is a bitsandbytes `Linear4bit`; there can't be one before bitsandbytes is imported."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def claim(model: nn.Module, *, compiled: bool) -> str | None:
    """Get the 4-bit modules of `model` ready for editing: why they can't be, or None.

    On CPUs with AVX512-BF16, bitsandbytes packs a weight anew in its first inference, with scales rounded to bfloat16,
    for a product through which no gradient flows. That is switched off for good: base and edited model compute alike.

    Args:
        model: with or without such modules.
        compiled: whether the model runs through `torch.compile`.
    """
    packed = {path: module for path, module in model.named_modules() if is_four_bit(module)}
    for path, module in packed.items():
        state = getattr(module.weight, "quant_state", None)
        if state is None or has_offloaded_params(module):
            return f"{path} holds no packed weight; load the model on its device, without offloading"
        if getattr(state, "packing_format_for_cpu", False):
            return f"{path} was packed anew for inference on this CPU; load the model again and edit it before it runs"
        if branch_of(module) is not None:
            return f"{path} has edits of another AlphaEditor; go on with that one, or call its undo_all()"
    if packed and compiled:
        return "a compiled forward doesn't notice edits beside packed weights; compile the model after editing"
    for module in packed.values():
        module.support_avx512bf16_for_cpu = False
    return None
