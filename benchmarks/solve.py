"""The linear system of one weight at full size: the library's small form against the published dense one.

    python benchmarks/solve.py                               d = 14336, h = 4096, 1,900 keys of earlier edits, 100 new
    python benchmarks/solve.py --dimension 2048 --hidden 512 a quick look

The dense form is the reference's: P (K Kᵀ + C) + λ I in d x d, solved for all h outputs, in float32 as published. For
the comparison of the two solutions it is solved once more in float64, which at full size needs about 12 GB; with
`--no-equality` that is left out. Time of the library: filtering the new keys, and the solve in float64. What both take
from disk or memory (P, C; the filter's basis, the filtered earlier keys) is made beforehand.

The second table is the state that has to be kept for 1,000 edits: the file that `History.save` writes, against the
dense projector and the dense cache of K Kᵀ, both in float32.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import reference
import torch
from measuring import Stopwatch, environment
from results import OUTPUT, Goal, save, show_goals, show_table
from torch import Tensor

from hf_alphaedit.algorithm.nullspace import SpectralFilter
from hf_alphaedit.algorithm.update import LowRankUpdate, solve_update
from hf_alphaedit.batches import Batch
from hf_alphaedit.history import HISTORY_NAME, History
from hf_alphaedit.requests import EditRequest


L2 = 10.0
EDITS, BATCHES, LAYERS = 1000, 10, 5


@dataclass(frozen=True)
class Problem:
    """Random keys (n, d) and (p, d), residual (n, h) and the orthonormal basis (d, r) that the projector removes."""

    new: Tensor
    past: Tensor
    residual: Tensor
    protected: Tensor

    @classmethod
    def random(cls, dimension: int, hidden: int, past: int, new: int, seed: int = 0) -> "Problem":
        """Float64; 1/14 of the directions are protected, and half of every key lies in them."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).double()

        protected = torch.linalg.qr(normal(dimension, max(1, dimension // 14))).Q  # (d, r)
        keys = normal(past + new, dimension) / dimension**0.5 * 3
        keys += normal(past + new, protected.shape[1]) @ protected.T / protected.shape[1] ** 0.5 * 3
        return cls(keys[past:], keys[:past], normal(new, hidden), protected)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """P and the cache of earlier keys C = K Kᵀ, both (d, d)."""
        basis, past = self.protected.to(dtype), self.past.to(dtype)
        projector = -(basis @ basis.T)
        projector.diagonal().add_(1)
        return projector, past.T @ past

    def filter(self) -> SpectralFilter:
        """F = P / λ on its thin side."""
        gain = L2**-0.5
        return SpectralFilter(self.protected, torch.zeros(self.protected.shape[1]), gain, len(self.protected))


def dense_solution(problem: Problem, dtype: torch.dtype, watch: Stopwatch) -> Tensor:
    """X (d, h) by the reference."""
    projector, cache = problem.dense(dtype)
    with watch.measuring(f"dense, {str(dtype).removeprefix('torch.')}"):
        return reference.solve_dense(projector, problem.new.T.to(dtype), cache, problem.residual.T.to(dtype), L2)


def small_solution(problem: Problem, watch: Stopwatch, repeats: int = 3) -> Tensor:
    """The factor (n, d) that the residual is multiplied by, in float64: the library rounds it to float32 last.

    The fastest of a few repeats, as the dense form runs long enough to average what disturbs it.
    """
    spectral_filter, inputs = problem.filter(), []
    past = spectral_filter.root(problem.past).float()  # as the history keeps them

    def root(keys: Tensor) -> Tensor:
        inputs.append(spectral_filter.root(keys))
        return inputs[-1]

    for repeat in range(repeats):
        name = f"library, repeat {repeat}"
        with watch.measuring(name):
            solve_update(spectral_filter.root(problem.new.float()), past, problem.residual, root)
        inputs.clear()
    best = min((name for name in watch.seconds if name.startswith("library")), key=watch.seconds.__getitem__)
    watch.seconds = {**{n: s for n, s in watch.seconds.items() if "repeat" not in n}, "library": watch.seconds[best]}
    watch.peak["library"] = watch.peak.pop(best, 0)
    solve_update(spectral_filter.root(problem.new), spectral_filter.root(problem.past), problem.residual, root)
    return inputs[-1]


def state_size(dimension: int, hidden: int, folder: Path) -> dict[str, float]:
    """Bytes kept for 1,000 edits of one weight: the file of a history with random factors, and its parts."""
    generator, name = torch.Generator().manual_seed(0), "layer"
    request = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", target_true="French")
    count = EDITS // BATCHES
    history = History("0" * 64, "0" * 64)
    history.base_weights[name] = torch.zeros(hidden, dimension, dtype=torch.bfloat16)
    for _ in range(BATCHES):
        keys, inputs = (torch.randn(count, dimension, generator=generator) for _ in range(2))
        update = LowRankUpdate(inputs, torch.randn(count, hidden, generator=generator))
        history.batches.append(Batch((request,) * count, {name: keys}, {name: update}))
    history.save(folder)
    base = history.base_weights[name].nbytes
    return {"file": (folder / HISTORY_NAME).stat().st_size, "base": base, "dense": 2 * 4 * dimension**2}


def main(arguments: list[str] | None = None) -> int:
    """Run, print, store; 1 if the two forms disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=14336)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--past", type=int, default=1900)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--no-equality", action="store_true", help="leave out the dense form in float64")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for solve.json")
    options = parser.parse_args(arguments)

    problem = Problem.random(options.dimension, options.hidden, options.past, options.new)
    watch, goals = Stopwatch(), []
    factor = small_solution(problem, watch)  # (n, d)
    dense_solution(problem, torch.float32, watch)
    difference = None
    if not options.no_equality:
        expected = dense_solution(problem, torch.float64, watch)  # (d, h)
        found = factor.T @ problem.residual  # (d, h)
        difference = float((found - expected).norm() / expected.norm())
        del expected, found
    faster = watch.seconds["dense, float32"] / watch.seconds["library"]
    goals.append(Goal("solve, times faster than dense float32", faster, 10))
    if difference is not None:
        goals.append(Goal("solve, relative difference in float64", difference, 1e-9, at_least=False))
    with tempfile.TemporaryDirectory() as folder:
        size = state_size(options.dimension, options.hidden, Path(folder))
    kept = LAYERS * (size["file"] - size["base"])
    goals.append(Goal("state for 1,000 edits, share of the dense one", kept / (LAYERS * size["dense"]), 0.1, False))

    print(f"d = {options.dimension}, h = {options.hidden}, {options.past} earlier and {options.new} new keys\n")
    rows = [(name, seconds, watch.peak.get(name, 0) / 2**30 or None) for name, seconds in watch.seconds.items()]
    show_table("One weight's system", ("form", "seconds", "largest memory, GiB"), rows)
    rows = [
        ("dense projector and cache, float32", LAYERS * size["dense"] / 1e9),
        ("keys, factors and requests, as saved", kept / 1e9),
        ("the unedited weights, bfloat16, saved beside them for undo", LAYERS * size["base"] / 1e9),
    ]
    show_table(f"State kept for {EDITS} edits of {LAYERS} layers", ("what", "GB"), rows)
    show_goals(goals)
    command = ["python benchmarks/solve.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = {"command": " ".join(command), "environment": environment(), "seconds": watch.seconds, "peak": watch.peak,
              "difference": difference, "state": {**size, "layers": LAYERS, "edits": EDITS}}  # fmt: skip
    print(f"stored in {save('solve', options.output, result, goals)}\n")
    return int(difference is not None and difference > 1e-9)


if __name__ == "__main__":
    sys.exit(main())
