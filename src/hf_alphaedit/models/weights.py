"""Read and write the one weight an edit changes, wherever it lives: resident, offloaded to CPU or disk, any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    align_module_device,
    has_offloaded_params,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from hf_alphaedit.batches import Batch
    from hf_alphaedit.history import History


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embeddings when they run."""
    embeddings = model.get_input_embeddings()
    if has_offloaded_params(embeddings):
        return torch.device(embeddings._hf_hook.execution_device)
    return next(embeddings.parameters()).device


@dataclass(frozen=True, eq=False)
class EditSite:
    """One weight that edits are written to.

    Its key may be made of several blocks of one length, each with statistics of its own: one block here, one for each
    expert in `models.experts.ExpertsSite`.

    Attributes:
        name: module path in the unedited model, e.g. `model.layers.5.mlp.down_proj`; the key of all saved state.
        layer: index of the decoder block.
        module: the `nn.Linear` or `Conv1D` that holds the weight.
    """

    name: str
    layer: int
    module: nn.Module
    parameter_name: ClassVar[str] = "weight"

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is stored; without values (meta) where it is offloaded."""
        return getattr(self.module, self.parameter_name)

    @property
    def parameter(self) -> str:
        """Path of the parameter."""
        return f"{self.name}.{self.parameter_name}"

    @property
    def shape(self) -> tuple[int, int]:
        """(h, d) of the matrix that `read` gives."""
        height, width = self.as_matrix(self.weight.detach().to("meta")).shape
        return height, width

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks of a key, under which second moments are kept; a single one is the site's."""
        return (self.name,)

    @property
    def dimension(self) -> int:
        """Length of one block of a key."""
        return self.shape[1] // len(self.blocks)

    @property
    def stored_transposed(self) -> bool:
        """Whether the weight is stored as (in, out), as in GPT-2's `Conv1D`, rather than (out, in)."""
        return isinstance(self.module, Conv1D)

    @property
    def device(self) -> torch.device:
        """Where the weight is when its module runs."""
        if has_offloaded_params(self.module):
            return torch.device(self.module._hf_hook.execution_device)
        return self.weight.device

    def as_matrix(self, stored: Tensor) -> Tensor:
        """The parameter's tensor as (h, d)."""
        return stored.T if self.stored_transposed else stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix.T if self.stored_transposed else matrix

    def read(self) -> Tensor:
        """A copy of the weight as (h, d), on its execution device, in its own dtype."""
        with torch.no_grad(), align_module_device(self.module):
            return self.as_matrix(self.weight.detach()).clone(memory_format=torch.contiguous_format)

    def write_edits(self, history: History, batches: Sequence[Batch] | None = None) -> None:
        """Replace the weight by what it is after `batches` (default: the history's); see `History.weight`."""
        self.write(history.weight(self.name, batches, self.device))

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Replace the weight by `value` (h, d), rounded to the weight's dtype, in place.

        In place, because a new `nn.Parameter` would break ties. For an offloaded weight the store that accelerate
        loads from is what counts: a value set on the module itself is lost at the next forward pass. A file in the
        user's cache is never written; accelerate's loader prefers its `state_dict` to the file.
        """
        value = self.as_stored(value)
        if not has_offloaded_params(self.module):
            self.weight.copy_(value)
            return
        store, key = self.module._hf_hook.weights_map, self.parameter_name
        if isinstance(store, PrefixedDataset):
            store, key = store.dataset, store.prefix + key
        if isinstance(store, OffloadedWeightsLoader):
            store = store.state_dict
        store[key] = value.to("cpu", self.weight.dtype).contiguous()
