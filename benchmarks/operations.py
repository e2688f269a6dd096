"""How many operations the target search cannot do without, for its share of the machine's rate of matrix products.

A multiply-add is two operations. Counted is what the mathematics needs, whatever the implementation runs:

- once, every token of every row through the blocks up to the edited layer, and every token before the subject's last
  one through the blocks above as well (these tokens never see the change);
- per forward pass, the tokens from the subject's last one on through the blocks above the edited layer: two operations
  per weight of a block's matrices and token, and attention's two products, QKᵀ and PV, over the positions each token
  sees;
- per forward pass, the head at the positions that enter the loss: target tokens, and the one position of the KL term;
- per update, the backward pass through the same, with respect to activations alone: as much again for the weights and
  the head, and attention's four products (two of them, for keys and values, from the suffix alone).

With contexts in turn, a pass counts with the rows that are looked at in it.

Not counted: padding, norms, softmax, rotary embeddings, the optimiser, conversions between dtypes, passes that check
something, and steps of requests that had already finished.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.target_rows import turns_of


@dataclass(frozen=True)
class Operations:
    """Useful operations of a target search, by what they are for."""

    once: int
    blocks: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.once + self.blocks + self.attention + self.head


def target_operations(
    architecture: Architecture,
    requests: Sequence[EncodedRequest],
    layer: int,
    updates: Sequence[int],
    in_turn: bool = False,
) -> Operations:
    """Useful operations of the search at `layer`; request i makes `updates[i]` updates and one forward pass more.

    `in_turn` is the setting `contexts_in_turn`.
    """
    weights = [matrix_weights(block) for block in architecture.blocks]
    below, above = sum(weights[: layer + 1]), sum(weights[layer + 1 :])
    depth_above = len(weights) - layer - 1
    head = architecture.head.weight.numel()
    width = attention_width(architecture)
    once = blocks = attention = heads = 0
    for request, count in zip(requests, updates, strict=True):
        turns = turns_of(len(request.rows), in_turn)
        for place, row in enumerate((*request.rows, request.essence)):
            looked_at = [place in turns[step % len(turns)] for step in range(count + 1)]
            forwards, backwards = sum(looked_at), sum(looked_at[:-1])
            length = len(row.token_ids)
            prefix, suffix = row.subject, length - row.subject
            positions = 1 if row is request.essence else len(request.target)
            seen_in_suffix = suffix * (suffix + 1) // 2  # pairs of a suffix token and a suffix token it sees
            seen = prefix * suffix + seen_in_suffix  # ... and any token it sees
            seen_in_prefix = prefix * (prefix + 1) // 2
            once += 2 * (below * length + above * prefix)
            once += 4 * width * ((layer + 1) * (seen_in_prefix + seen) + depth_above * seen_in_prefix)
            blocks += 2 * above * suffix * (forwards + backwards)
            attention += 2 * width * depth_above * (2 * seen * forwards + 2 * (seen + seen_in_suffix) * backwards)
            heads += 2 * head * positions * (forwards + backwards)
    return Operations(once, blocks, attention, heads)


def matrix_weights(block: nn.Module) -> int:
    """Weights of all matrices of one block that act on every token."""
    return sum(module.weight.numel() for module in block.modules() if isinstance(module, (nn.Linear, Conv1D)))


def attention_width(architecture: Architecture) -> int:
    """Heads times their size: the width of queries."""
    config = architecture.model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * size
