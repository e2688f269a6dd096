"""Target values for many requests: the search of `algorithm.optimize` on the forward passes of `models.forward`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_alphaedit.algorithm.optimize import DeltaSearch, search_delta
from hf_alphaedit.chunks import chunked, suffix_length
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import EditingError
from hf_alphaedit.estimates import chunk_tokens
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.models.hooks import grouped_attention, multiplies_bfloat16, products_in, replaced_forward
from hf_alphaedit.models.rows import RowForm
from hf_alphaedit.processes import Processes
from hf_alphaedit.row_form import row_form
from hf_alphaedit.sharing import search_shared
from hf_alphaedit.target_rows import RowLoss, StoredRows, rows_per_step


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """Result of the target search for n requests, all tensors on the CPU in float32.

    Attributes:
        values: (n, h) the targets z = initial + delta.
        initial: (n, h) the values before the edit, at the subject's last token of the bare prompt.
        steps: (n,) int64, updates made.
        likelihood: (n,) last negative log-likelihood of the target, in nats per token.
        argmax: (n,) bool, whether the target was the argmax in every row of the last look.
    """

    values: Tensor
    initial: Tensor
    steps: Tensor
    likelihood: Tensor
    argmax: Tensor


def compute_targets(
    architecture: Architecture,
    requests: Sequence[EncodedRequest],
    layer: int,
    config: AlphaEditConfig,
    *,
    largest_chunk: int | None = None,
    alone: bool = False,
) -> Targets:
    """Search the value at `layer` that makes the model say each target (paper, equation 3).

    Requests of similar length run side by side in chunks of at most `largest_chunk` tokens; a chunk that doesn't fit
    into memory is halved. The result doesn't depend on the chunks, up to the order of floating-point sums. The model
    is not changed.

    Args:
        architecture: of the model.
        requests: n encoded requests.
        layer: whose value is searched for.
        config: the settings.
        largest_chunk: tokens that run side by side; None lets the device's memory decide.
        alone: search for all of them in this process, also where several were launched and would share them out.

    Raises:
        EditingError: a loss became NaN or infinite.
        UnsupportedModelError: the model's output can't be reproduced from stored states.
    """
    order = sorted(range(len(requests)), key=lambda index: suffix_length(requests[index]))
    count, hidden_size = len(requests), architecture.hidden_size
    result = Targets(
        torch.empty(count, hidden_size), torch.empty(count, hidden_size), torch.empty(count, dtype=torch.int64),
        torch.empty(count), torch.empty(count, dtype=torch.bool),
    )  # fmt: skip
    processes = Processes.current()
    if processes.count > 1 and not alone:

        def search(mine: Sequence[int]) -> Targets:
            members = [requests[index] for index in mine]
            return compute_targets(architecture, members, layer, config, largest_chunk=largest_chunk, alone=True)

        return search_shared(processes, order, search, result)
    form = row_form(architecture, requests, layer)
    chunks = chunked(
        order, requests, largest_chunk or chunk_tokens(architecture, layer), rows_per_step(requests[0], config),
        packed=form is RowForm.PACKED,
    )  # fmt: skip
    dtype = product_dtype(architecture, config)
    modules = [module for block in architecture.blocks for module in block.modules()]
    products = products_in([*modules, architecture.head], dtype, architecture.feed_forwards())
    with tqdm(total=count * config.value_steps, desc="targets", unit="step", name="hf_alphaedit", leave=False) as bar:
        while chunks:
            chunk = chunks.pop(0)
            members = [requests[index] for index in chunk]
            try:
                with replaced_forward(products), grouped_attention(architecture.input_device):
                    rows = StoredRows.of(architecture, members, layer, form)
                    search = _search(architecture, rows, layer, config, bar.update)
            except FloatingPointError as error:
                raise EditingError(f"{error} (of requests {chunk}); try a lower learning_rate or float32") from error
            except (RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or not should_reduce_batch_size(error):
                    raise
                logger.warning("%d requests don't fit into memory together; trying half of them", len(chunk))
                chunks[:0] = [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]
                continue
            result.values[chunk], result.initial[chunk] = (rows.initial + search.delta).cpu(), rows.initial.cpu()
            result.steps[chunk], result.likelihood[chunk] = search.steps.cpu(), search.likelihood.cpu()
            result.argmax[chunk] = search.argmax.cpu()
    return result


def _search(
    architecture: Architecture,
    rows: StoredRows,
    layer: int,
    config: AlphaEditConfig,
    on_steps: Callable[[int], object],
) -> DeltaSearch:
    norm = rows.initial.norm(dim=-1)  # (n,)
    counted = [len(rows.requests)]

    def on_step(step: int, active: int) -> None:
        # Steps that finished requests don't need count as done.
        on_steps(active + (counted[0] - active) * (config.value_steps - step))
        counted[0] = active

    return search_delta(
        RowLoss(architecture, rows, layer, norm, config), norm, architecture.hidden_size, steps=config.value_steps,
        learning_rate=config.learning_rate, betas=config.adam_betas, clamp_factor=config.clamp_factor,
        stop_loss=config.stop_loss, stop_at_argmax=config.stop_at_argmax, on_step=on_step,
    )  # fmt: skip


def product_dtype(architecture: Architecture, config: AlphaEditConfig) -> torch.dtype | None:
    """The dtype for matrix products in the target search; None leaves the model's own.

    'auto' is bfloat16 for a float32 model on a device that multiplies bfloat16 matrices in hardware.
    """
    if config.forward_dtype == "model":
        return None
    if config.forward_dtype != "auto":
        return getattr(torch, config.forward_dtype)
    weight = architecture.site((config.layers or architecture.editable_layers())[0]).weight
    if weight.dtype != torch.float32:
        return None
    return torch.bfloat16 if multiplies_bfloat16(architecture.input_device) else None
