"""Mixtures of experts whose weights are fused into 3-D parameters, as one wide matrix that edits are written to.

What such a module returns for a token is Σ s_e W_e k_e over the experts e that the router chose for it, with their
shares s_e. That is W κ with all experts side by side, W = [W_1 ... W_E] (h, E d), and the key κ = [s_1 k_1, ...]
(E d,), which is zero at the experts that were not chosen. So a mixture is edited like any other matrix; what its keys
are, and whether this is what the module does, is all that is special.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hf_alphaedit.models.weights import EditSite


# What transformers' experts interface sets on every module that takes part in it.
INTERFACE = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


@dataclass(frozen=True, eq=False)
class ExpertsSite(EditSite):
    """The down-projections of all experts of one layer, side by side: (h, E d).

    Attributes:
        name: path of the parameter, e.g. `model.layers.5.mlp.experts.down_proj`.
        layer: index of the decoder block.
        module: the module that holds the experts.
    """

    parameter_name: ClassVar[str] = "down_proj"

    @property
    def parameter(self) -> str:
        """Path of the parameter."""
        return self.name

    @property
    def blocks(self) -> tuple[str, ...]:
        """One name for each of the E experts."""
        return tuple(f"{self.name}.{expert}" for expert in range(len(self.weight)))

    @property
    def stored_transposed(self) -> bool:
        """Whether the weights are stored as (E, d, h), rather than (E, h, d)."""
        return bool(self.module.is_transposed)

    def as_matrix(self, stored: Tensor) -> Tensor:
        """(E, h, d) or (E, d, h) -> (h, E d)."""
        return stored.permute((2, 0, 1) if self.stored_transposed else (1, 0, 2)).flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """(h, E d) -> (E, h, d) or (E, d, h)."""
        apart = matrix.unflatten(1, (len(self.weight), -1))  # (h, E, d)
        return apart.permute((1, 2, 0) if self.stored_transposed else (1, 0, 2))


@dataclass(frozen=True, eq=False)
class Routing:
    """What goes into a mixture of experts.

    Attributes:
        hidden: (n, h) hidden states.
        experts: (n, k) indices of the experts chosen for each.
        shares: (n, k) their shares in the output.
    """

    hidden: Tensor
    experts: Tensor
    shares: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Routing:
        """The same for each of the three tensors."""
        return Routing(function(self.hidden), function(self.experts), function(self.shares))


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds the down-projections of several experts as one parameter."""
    weight = module._parameters.get(ExpertsSite.parameter_name)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3


def problem_with(module: nn.Module, hidden_size: int) -> str | None:
    """Why these experts can't be edited; None if nothing speaks against it before they have run."""
    name: str = type(module).__name__
    if not is_fused(module):
        return f"{name} has no parameter {ExpertsSite.parameter_name} of shape (experts, out, in)"
    lacking = [attribute for attribute in INTERFACE if not hasattr(module, attribute)]
    if lacking or not hasattr(module, "gate_up_proj" if module.has_gate else "up_proj"):
        return f"{name} takes no part in transformers' experts interface, so its keys are unknown"
    if module.has_post_expert_norm:
        return f"in {name} a norm follows each expert's down-projection"
    if getattr(module, "_is_expert_parallel", False):
        return f"the experts of {name} are spread over devices"
    outputs = ExpertsSite("", 0, module).shape[0]
    if outputs != hidden_size:
        return f"{name} has {outputs} outputs where the residual stream has {hidden_size}"
    return None


@contextmanager
def on_routing(module: nn.Module, function: Callable[[Routing], None]) -> Iterator[None]:
    """Call `function` with what goes into the experts, before they run."""
    signature = inspect.signature(type(module).forward)

    def hook(_: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        given = list(signature.bind(module, *arguments, **keywords).arguments.values())
        function(Routing(*(tensor.detach() for tensor in given[1:4])))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def expert_keys(module: Any, routing: Routing) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Expert, rows (m,) of the routing that it was chosen for, and its keys s_e k_e (m, d), for all that were chosen.

    The keys are computed a second time, beside the module's own forward pass, which hands them to nobody.
    """
    # Under accelerate's offloading the weights come to the device only for the module's own forward.
    with align_module_device(module):
        for expert in routing.experts.unique().tolist():
            rows, slots = torch.where(routing.experts == expert)
            weight = (module.gate_up_proj if module.has_gate else module.up_proj)[expert]
            weight = weight.T if module.is_transposed else weight  # (out, in)
            bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if module.has_bias else None
            inner = nn.functional.linear(routing.hidden[rows], weight, None if bias is None else bias[expert])
            keys = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # (m, d)
            yield expert, rows, keys * routing.shares[rows, slots, None]


@torch.no_grad()
def mixed_output(module: Any, routing: Routing) -> Tensor:
    """Σ s_e (W_e k_e + b_e), at least in float32: (n, h), what the module returns if it is what is said above."""
    wide = torch.promote_types(routing.hidden.dtype, torch.float32)
    total = torch.zeros_like(routing.hidden, dtype=wide)  # (n, h)
    with align_module_device(module):
        for expert, rows, keys in expert_keys(module, routing):
            weight = module.down_proj[expert].to(wide)
            total.index_add_(0, rows, keys.to(wide) @ (weight if module.is_transposed else weight.T))
        if module.has_bias:
            biases = module.down_proj_bias[routing.experts]  # (n, k, h)
            total += torch.einsum("nk,nkh->nh", routing.shares.to(wide), biases.to(wide))
    return total
