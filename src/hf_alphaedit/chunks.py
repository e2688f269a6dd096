"""Which requests run side by side in the target search: few padded tokens, and few chunks."""

from __future__ import annotations

from collections.abc import Sequence

from hf_alphaedit.models.encoding import EncodedRequest


# Tokens that run side by side on a CPU: products are at full speed from a few hundred on, and larger tensors only cost
# page faults. (Accelerators: `estimates.chunk_tokens`.)
CPU_CHUNK = 1024
# Tokens of a pass without gradients, on any device.
WALK_CHUNK = 2048
CHUNK_COST = 64  # in tokens: what a pass takes however little it holds


def suffix_length(request: EncodedRequest) -> int:
    """Tokens from the subject's last one on, the longest row's."""
    return max(len(row.token_ids) - row.subject for row in request.rows)


def chunked(
    order: Sequence[int], requests: Sequence[EncodedRequest], largest_chunk: int, rows_per_step: int
) -> list[list[int]]:
    """`order` (ascending suffix length) cut into chunks of at most `largest_chunk` tokens, or of one request.

    A request counts with `rows_per_step` rows of its suffix length.

    Among all ways to cut it, the one whose tokens, padding included, and chunks, at `CHUNK_COST` each, sum up to the
    least.
    """
    cost, start = [0], [0]  # of the best way to cut the first i requests, and where its last chunk begins
    for end in range(1, len(order) + 1):
        tokens_each, candidates = rows_per_step * suffix_length(requests[order[end - 1]]), []
        for begin in range(end - 1, -1, -1):
            tokens = (end - begin) * tokens_each
            if tokens > largest_chunk and candidates:
                break
            candidates.append((cost[begin] + tokens + CHUNK_COST, begin))
        least, begin = min(candidates)
        cost.append(least), start.append(begin)
    chunks: list[list[int]] = []
    end = len(order)
    while end:
        chunks.insert(0, list(order[start[end] : end]))
        end = start[end]
    return chunks
