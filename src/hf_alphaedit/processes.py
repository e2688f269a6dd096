"""Several processes started by `accelerate launch`: who am I, how many are we, and sums over all of us."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information, parse_flag_from_env, reduce
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes that share one piece of work; a single one unless a launcher started more.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        state: accelerate's state; None for a single process, whose torch and environment are left alone.
    """

    rank: int = 0
    count: int = 1
    state: PartialState | None = None

    @classmethod
    def current(cls) -> Processes:
        """Join the processes of this launch; accelerate is set up only if it already was, or a launcher wants it."""
        if not PartialState._shared_state and get_cpu_distributed_information().world_size == 1:
            return cls()
        # accelerate takes several processes on CPU for one unless it is told that the CPU is meant.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu)
        return cls() if state.num_processes == 1 else cls(state.process_index, state.num_processes, state)

    @property
    def is_main(self) -> bool:
        """Whether this process writes shared files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, on its own device; every process must call it."""
        if self.state is None:
            return tensor
        return reduce(tensor.to(self.state.device), "sum").to(tensor.device)

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.state is not None:
            self.state.wait_for_everyone()
