"""Hooks and replacements on the user's modules. All are context managers and gone on exit, also after an exception."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


GROUPED_ATTENTION = "TRANSFORMERS_SDPA_FORCE_GQA"  # an environment variable of transformers


class StopForward(Exception):
    """Ends a forward pass once everything that was wanted has been captured."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a decoder block returns: a tensor, or the first element of a tuple or list."""
    return output if isinstance(output, Tensor) else output[0]


def like_output(hidden: Tensor, output: Any) -> Any:
    """`hidden` in the form of `output` (see `hidden_of`)."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)([hidden, *output[1:]])


@contextmanager
def on_input(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `function` with the module's first positional input; what it returns, if anything, takes its place."""

    def hook(_: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict] | None:
        if arguments:
            changed = function(arguments[0])
            return None if changed is None else ((changed, *arguments[1:]), keywords)
        changed = function(keywords["hidden_states"])
        return None if changed is None else (arguments, {**keywords, "hidden_states": changed})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `function` with the module's (first) output tensor; what it returns, if anything, takes its place."""

    def hook(_: nn.Module, __: tuple, output: Any) -> Any:
        changed = function(hidden_of(output))
        return None if changed is None else like_output(changed, output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let each module run another function instead of its `forward`; the old one is back on exit.

    The attribute is put back as it was found: accelerate, too, keeps a `forward` on the instance.
    """
    saved = {module: vars(module).get("forward") for module in replacements}
    try:
        for module, function in replacements.items():
            module.forward = function
        yield
    finally:
        for module, forward in saved.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End the forward pass inside the block once `module` has run. Put only the model's call into the block."""

    def stop(_: Tensor) -> None:
        raise StopForward

    try:
        with on_output(module, stop):
            yield
    except StopForward:
        pass


@contextmanager
def inference_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient for any parameter, no compiled forward; all three are as before on exit.

    A forward compiled by `Module.compile` would not notice the hooks that are set while it is in use.
    """
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    training = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for module, mode in training.items():
            module.training = mode
        for parameter, required in gradients.items():
            parameter.requires_grad_(required)


def products_in(
    modules: Iterable[nn.Module], dtype: torch.dtype | None, feed_forwards: Iterable[nn.Module] = ()
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards, for `replaced_forward`, that run these modules' matrix products in `dtype`.

    Inputs and outputs keep their own dtype, and so does what lies between the products: norms, attention weights, the
    residual stream. Inside of `feed_forwards` that are made of products and activations only, the activations are in
    `dtype` as well. The forwards hold a copy of the weights in `dtype`. Only plain `nn.Linear` and `Conv1D` modules
    with resident weights take part; None gives no forwards.
    """
    if dtype is None:
        return {}

    def product(module: nn.Module) -> Callable[[Tensor], Tensor]:
        weight = module.weight.detach().to(dtype)
        weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight  # (out, in)
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        return lambda x: nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)

    def inside(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        return lambda x, *others, **keywords: forward(x.to(dtype), *others, **keywords).to(x.dtype)

    forwards: dict[nn.Module, Callable[..., Any]] = {
        module: product(module)
        for module in modules
        if type(module) in (nn.Linear, Conv1D) and not has_offloaded_params(module)
    }
    products = {parameter for module in forwards for parameter in module.parameters()}
    return forwards | {
        module: inside(module)
        for module in feed_forwards
        if module not in forwards and products.issuperset(module.parameters())
    }


@contextmanager
def grouped_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, heads that share a key and a value share them in memory too, also under a mask.

    transformers copies them for every head where there is a mask, since GPU kernels take none then; on a CPU the
    copies are most of what attention costs with short queries.
    """
    before = os.environ.get(GROUPED_ATTENTION)
    try:
        if device.type == "cpu":
            os.environ[GROUPED_ATTENTION] = "1"
        yield
    finally:
        os.environ.pop(GROUPED_ATTENTION, None)
        if before is not None:
            os.environ[GROUPED_ATTENTION] = before


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` has matrix units for bfloat16."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("amx_tile") or capabilities.get("avx512_bf16"))
    supports = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supports is not None and bool(supports())
