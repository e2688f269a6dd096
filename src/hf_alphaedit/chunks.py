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
PACKED_PADDING = 1 / 20  # of a token's cost: what padding takes that only attention sees


def suffix_length(request: EncodedRequest) -> int:
    """Tokens from the subject's last one on, the longest row's."""
    return max(len(row.token_ids) - row.subject for row in request.rows)


def step_tokens(request: EncodedRequest, rows_per_step: int) -> float:
    """Tokens of a request that one step of the search runs, padding aside: the mean over the contexts."""
    suffixes = [len(row.token_ids) - row.subject for row in request.rows]
    return sum(suffixes) / len(suffixes) * (rows_per_step - 1) + 1  # one of the rows is '<subject> is a'


def chunked(
    order: Sequence[int],
    requests: Sequence[EncodedRequest],
    largest_chunk: int,
    rows_per_step: int,
    *,
    packed: bool = False,
) -> list[list[int]]:
    """`order` (ascending suffix length) cut into chunks of at most `largest_chunk` tokens, or of one request.

    Among all ways to cut it, the one whose tokens, padding included, and chunks, at `CHUNK_COST` each, sum up to the
    least.

    Args:
        order: indices of the requests.
        requests: all of them.
        largest_chunk: tokens that may run side by side.
        rows_per_step: rows of a request that a step runs.
        packed: rows run without padding (`models.packed`), so that it doesn't count as tokens, and costs less.
    """
    cost, start = [0.0], [0]  # of the best way to cut the first i requests, and where its last chunk begins
    for end in range(1, len(order) + 1):
        padded_each, candidates = rows_per_step * suffix_length(requests[order[end - 1]]), []
        tokens = 0.0
        for begin in range(end - 1, -1, -1):
            tokens += step_tokens(requests[order[begin]], rows_per_step)
            padded = (end - begin) * padded_each
            if (tokens if packed else padded) > largest_chunk and candidates:
                break
            padding = (padded - tokens) * (PACKED_PADDING if packed else 1)
            candidates.append((cost[begin] + tokens + padding + CHUNK_COST, begin))
        least, begin = min(candidates)
        cost.append(least), start.append(begin)
    chunks: list[list[int]] = []
    end = len(order)
    while end:
        chunks.insert(0, list(order[start[end] : end]))
        end = start[end]
    return chunks
