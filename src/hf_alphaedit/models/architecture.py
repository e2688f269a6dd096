"""Where a model can be edited, found from its module tree and config: decoder blocks, down-projections, head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_alphaedit.errors import UnsupportedModelError
from hf_alphaedit.models.experts import ExpertsSite, is_fused, problem_with
from hf_alphaedit.models.probe import Additivity, probe_additivity
from hf_alphaedit.models.quantised import QuantisedSite, is_four_bit
from hf_alphaedit.models.weights import EditSite, input_device


# Leaf names that transformers gives to the second projection of a feed-forward block.
DOWN_PROJECTION_NAMES = frozenset({"down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h", "w2"})
# Parts of a path that is no feed-forward block: attention and other mixers of positions, norms, adapters, routers.
NOT_FEED_FORWARD = ("attn", "attention", "mixer", "mamba", "ssm", "conv", "norm", "lora", "adapter", "router", "gate")
EXPERTS_LEAF = ExpertsSite.parameter_name
EXPERTS_REMEDY = "Set target_module to a matrix that runs for every token"
SAME_SCALE = 2e-2  # factors closer than this are one factor, seen through a low-precision dtype


@dataclass(frozen=True, eq=False)
class Architecture:
    """The parts of one model that editing touches.

    Attributes:
        model: the causal language model.
        blocks: its decoder blocks, in order.
        target_module: path of the down-projection with {} for the layer.
        head: the module that turns the last hidden states into logits.
        hidden_size: h, width of the residual stream.
        additive: whether a change of the down-projection's output appears in the block's output, times `scale`.
        scale: the factor between the two (a residual multiplier; 1 in most families).
        probed: layer -> what the probe saw there.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    target_module: str
    head: nn.Module
    hidden_size: int
    additive: bool = True
    scale: float = 1.0
    probed: Mapping[int, Additivity] = field(default_factory=dict)

    @property
    def input_device(self) -> torch.device:
        """Where token ids go: the device of the embedding's weights when it runs."""
        return input_device(self.model)

    def value_module(self, layer: int) -> nn.Module:
        """The module whose output is `layer`'s value: what the down-projection's output is added to.

        That is the block, whose output is the residual stream, or the down-projection itself where a norm lies between
        the two.
        """
        return self.blocks[layer] if self.additive else self.site(layer).module

    def resume_block(self, layer: int) -> int:
        """The first block that has to run again when the value of `layer` changes."""
        return layer + 1 if self.additive else layer

    def editable_layers(self) -> list[int]:
        """The layers that have the down-projection; hybrids and some mixtures of experts have it only in some."""
        modules = dict(self.model.named_modules())
        names = {name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
        names |= {f"{name}.{EXPERTS_LEAF}" for name, module in modules.items() if is_fused(module)}
        return [layer for layer in range(len(self.blocks)) if self.target_module.format(layer) in names]

    def feed_forwards(self) -> list[nn.Module]:
        """The modules that hold a down-projection."""
        parents = [self.target_module.format(layer).rpartition(".")[0] for layer in self.editable_layers()]
        return [self.model.get_submodule(parent) for parent in parents]

    def site(self, layer: int) -> EditSite:
        """The weight edited in `layer`.

        Raises:
            UnsupportedModelError: there is no such layer, or its down-projection is no plain matrix.
        """
        if not 0 <= layer < len(self.blocks):
            raise UnsupportedModelError(
                f"layer {layer} doesn't exist: {type(self.model).__name__} has layers 0 to {len(self.blocks) - 1}"
            )
        name = self.target_module.format(layer)
        parent, _, leaf = name.rpartition(".")
        try:
            experts = self.model.get_submodule(parent)
            if leaf == EXPERTS_LEAF and is_fused(experts):
                return self._experts_site(name, layer, experts)
            module = self.model.get_submodule(name)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{name} doesn't exist in {type(self.model).__name__}; the layers that have it are "
                f"{self.editable_layers()}"
            ) from error
        if not isinstance(module, (nn.Linear, Conv1D)):
            remedy = f"; set target_module to {self.target_module}.{EXPERTS_LEAF}" if is_fused(module) else ""
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}; an nn.Linear or Conv1D is needed{remedy}"
            )
        return (QuantisedSite if is_four_bit(module) else EditSite)(name, layer, module)

    def _experts_site(self, name: str, layer: int, module: nn.Module) -> ExpertsSite:
        problem = problem_with(module, self.hidden_size)
        if problem is not None:
            raise UnsupportedModelError(f"{name} can't be edited: {problem}. {EXPERTS_REMEDY}")
        return ExpertsSite(name, layer, module)


def resolve_architecture(
    model: PreTrainedModel, target_module: str | None = None, layers: Sequence[int] | None = None
) -> Architecture:
    """Find the editable parts of `model` within seconds, and run one short forward pass to see how they add up.

    Args:
        model: a plain model, see `placement.plain_model`.
        target_module: path of the down-projection with {} for the layer; None finds it.
        layers: the layers to probe, those that will be edited; None takes the middle one.

    Raises:
        UnsupportedModelError: with the part that is missing or ambiguous, and what to set instead.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no language-model head; load it as a causal LM")
    text_config = model.config.get_text_config(decoder=True)
    block_path, blocks = _decoder_blocks(model, text_config.num_hidden_layers)
    if target_module is None:
        target_module = f"{block_path}.{{}}.{_down_projection(blocks, text_config.hidden_size)}"
    architecture = Architecture(model, blocks, target_module, head, text_config.hidden_size)
    if layers is None:
        editable = architecture.editable_layers()
        layers = [editable[len(editable) // 2]] if editable else [len(blocks) // 2]
    for layer in layers:
        _require_own_weight(architecture.site(layer), model)
    return replace(architecture, **_additivity(architecture, layers))


def _require_own_weight(site: EditSite, model: PreTrainedModel) -> None:
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is site.weight]
    if len(names) > 1:
        raise UnsupportedModelError(
            f"{names[0]} and {', '.join(names[1:])} are one weight, so an edit of one block would change the others; "
            "choose other layers, or a target_module that each block has for itself"
        )


def _additivity(architecture: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    """What the probe says about all of `layers` together: fields of `Architecture`."""
    probed = probe_additivity(architecture, layers)
    scales = [found.scale for found in probed.values()]
    middle = sum(scales) / len(scales)
    alike = max(scales) - min(scales) < SAME_SCALE * abs(middle)
    if not all(found.additive for found in probed.values()) or not alike:
        return {"probed": probed, "additive": False}
    return {"probed": probed, "scale": 1.0 if abs(middle - 1) < SAME_SCALE else middle}


def _decoder_blocks(model: PreTrainedModel, count: int) -> tuple[str, nn.ModuleList]:
    found: list[tuple[str, nn.ModuleList]] = []
    for root in (model.get_decoder(), model):
        inside = set(root.modules())
        found = [
            (name, module)
            for name, module in model.named_modules()
            if module in inside and isinstance(module, nn.ModuleList) and len(module) == count
        ]
        # The text decoder's own blocks lie less deep than those of an encoder that is built into it.
        depths = [name.count(".") for name, _ in found]
        found = [pair for pair, depth in zip(found, depths, strict=True) if depth == min(depths)]
        if len(found) == 1:
            return found[0]
    raise UnsupportedModelError(
        f"{type(model).__name__} has {len(found)} lists of {count} modules; exactly one list of decoder blocks is "
        "needed"
    )


def _down_projection(blocks: nn.ModuleList, hidden_size: int) -> str:
    """Path of the down-projection inside a block: by its usual names, by its shape, or that of shared experts.

    Where no such matrix is in as many blocks as routed experts are, those are meant.
    """
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("named", "shaped", "shared", "routed")}
    for block in blocks:
        for name, module in block.named_modules():
            if is_fused(module) and problem_with(module, hidden_size) is None:
                counts["routed"][f"{name}.{EXPERTS_LEAF}"] += 1
            if not isinstance(module, (nn.Linear, Conv1D)) or any(part in name.lower() for part in NOT_FEED_FORWARD):
                continue
            outputs, inputs = _shape(module)
            if outputs != hidden_size:
                continue
            leaf = name.rsplit(".", 1)[-1]
            if "shared_expert" in name:
                counts["shared"][name] += leaf in DOWN_PROJECTION_NAMES
            elif "expert" not in name and leaf in DOWN_PROJECTION_NAMES:
                counts["named"][name] += 1
            elif "expert" not in name and inputs > outputs:
                counts["shaped"][name] += 1
    named = counts["named"] or counts["shaped"]
    # A few first layers may be dense where all others are mixtures of experts: what most layers have is meant.
    kinds = (named, counts["shared"], counts["routed"])
    candidates = max(kinds, key=lambda counter: max(counter.values(), default=0))
    most = max(candidates.values(), default=0)
    paths = [path for path, number in candidates.items() if number == most]
    if len(paths) == 1:
        return paths[0]
    kind = type(blocks[0]).__name__
    if not paths and (problems := _problems_with_experts(blocks, hidden_size)):
        raise UnsupportedModelError(
            f"the {kind} blocks have no dense or shared feed-forward, only a mixture of experts that can't be edited: "
            f"{'; '.join(problems)}. {EXPERTS_REMEDY}"
        )
    if not paths:
        raise UnsupportedModelError(
            f"the {kind} blocks have no feed-forward block with a down-projection of {hidden_size} outputs; if they "
            "have one under another name, set target_module, e.g. 'model.layers.{}.mlp.down_proj'"
        )
    raise UnsupportedModelError(
        f"the {kind} blocks have several down-projections, {sorted(paths)}; choose one with target_module, e.g. "
        "'model.layers.{}.mlp.down_proj'"
    )


def _problems_with_experts(blocks: nn.ModuleList, hidden_size: int) -> list[str]:
    experts = [part for part in blocks.modules() if is_fused(part) or type(part).__name__.endswith("Experts")]
    return sorted({problem for part in experts if (problem := problem_with(part, hidden_size)) is not None})


def _shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of an `nn.Linear` or `Conv1D`; quantised modules say it in their attributes alone."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features
