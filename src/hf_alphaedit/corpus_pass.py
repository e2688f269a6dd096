"""One pass of the model over a corpus that sums the second moments of many sites, with checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from accelerate.utils import has_offloaded_params
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from hf_alphaedit.algorithm.moments import SecondMoment
from hf_alphaedit.errors import StatisticsError
from hf_alphaedit.models.hooks import inference_state, products_in, replaced_forward, stop_after
from hf_alphaedit.models.keys import Keys, captured_keys
from hf_alphaedit.models.weights import EditSite, input_device
from hf_alphaedit.processes import Processes
from hf_alphaedit.statistics_files import Description, read_moments, write_moments


logger = logging.getLogger(__name__)

Halves = tuple[SecondMoment, SecondMoment]  # of the even and of the odd sequences of the corpus


@dataclass(eq=False, kw_only=True)
class CorpusPass:
    """What to run, and how.

    Attributes:
        model: the unedited model.
        sites: where keys are taken, in the order in which they run; the forward pass ends at the last one.
        sequences: the token ids of the whole corpus, each (T,); only the last may be shorter.
        skipped: positions at the beginning of each sequence that don't count.
        processes: each takes every `processes.count`-th sequence.
        batch_size: sequences per forward pass, halved when memory runs out.
        product_dtype: see `SecondMoment`.
        forward_dtype: see `products_in`.
        checkpoint: file for what this process has summed so far.
        checkpoint_seconds: time between two checkpoints.
        description: what the checkpoint must belong to.
    """

    model: PreTrainedModel
    sites: Sequence[EditSite]
    sequences: Sequence[Tensor]
    skipped: int
    processes: Processes
    batch_size: int
    product_dtype: torch.dtype | None
    forward_dtype: torch.dtype | None
    checkpoint: Path
    checkpoint_seconds: float
    description: Description

    def collect(self, *, resume: bool) -> dict[str, Halves]:
        """Run to the end, from the last checkpoint if `resume`, and return block -> moments over all processes.

        A block is a site, or one expert of a site; see `EditSite.blocks`.

        Raises:
            StatisticsError: a site never ran, or its keys are not finite.
        """
        done, halves = self._resume() if resume else (0, {})
        mine = range(self.processes.rank, len(self.sequences), self.processes.count)
        before_last = takewhile(lambda module: module is not self.sites[-1].module, self.model.modules())
        resident = [module for module in before_last if not has_offloaded_params(module)]
        with (
            torch.no_grad(),
            inference_state(self.model),
            replaced_forward(products_in(resident, self.forward_dtype)),
            tqdm(
                total=sum(len(self.sequences[index]) for index in mine),
                initial=sum(len(self.sequences[index]) for index in mine[:done]),
                desc="Second moments",
                unit="token",
                unit_scale=True,
                disable=not self.processes.is_main,
                name="hf_alphaedit",
            ) as progress,
        ):
            saved_at = time.monotonic()
            while done < len(mine):
                batch = self._next_batch(mine, done)
                keys = self._keys_within_memory(batch)
                if keys is None:
                    continue
                self._add(batch, keys, halves)
                done += len(batch)
                progress.update(sum(len(self.sequences[index]) for index in batch))
                if time.monotonic() - saved_at >= self.checkpoint_seconds and done < len(mine):
                    self._save(done, halves)
                    saved_at = time.monotonic()
        return {name: self._finished(name, site, halves) for site in self.sites for name in site.blocks}

    def forget_checkpoint(self) -> None:
        """Remove this process's checkpoint, once the result is safe."""
        self.checkpoint.unlink(missing_ok=True)

    def _next_batch(self, mine: range, done: int) -> range:
        """Indices of the next sequences, all of one length: a shorter last one runs alone."""
        batch = mine[done : done + self.batch_size]
        alike = len(self.sequences[batch[-1]]) == len(self.sequences[batch[0]])
        return batch if alike else batch[:-1]

    def _keys_within_memory(self, batch: range) -> dict[str, Keys] | None:
        """The keys of every site, with rows of (B T, d); None if memory ran out, after which `batch_size` is half."""
        try:
            return self._keys(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
        self.batch_size = len(batch) // 2
        logger.warning("out of memory: going on with %d sequences at a time", self.batch_size)
        clear_device_cache(garbage_collection=True)
        return None

    def _keys(self, batch: range) -> dict[str, Keys]:
        token_ids = torch.stack([self.sequences[index] for index in batch]).long()  # (B, T)
        token_ids = token_ids.to(input_device(self.model))
        with ExitStack() as stack:
            keys = stack.enter_context(captured_keys(self.sites, lambda x: x.reshape(-1, x.shape[-1])))
            stack.enter_context(stop_after(self.sites[-1].module))
            self.model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False)
        missed = sorted({site.name for site in self.sites} - keys.keys())
        if missed:
            raise StatisticsError(
                f"{missed} did not run in a forward pass of {type(self.model).__name__}, so there are no keys; "
                "choose other layers, or pass the model as it was before compiling or wrapping it"
            )
        return keys

    def _add(self, batch: range, keys: dict[str, Keys], halves: dict[str, Halves]) -> None:
        # The keys are all there now, and the forward pass has given its own memory back: what the sums need beside
        # is less than what it took, so that memory doesn't run out half-way through an update.
        length = len(self.sequences[batch[0]])  # T
        parity = torch.tensor([index % 2 for index in batch])  # (B,)
        for site in self.sites:
            blocks = keys.pop(site.name)
            self._begin(site, halves)
            for name, (rows, inputs) in blocks.items():  # (m,), (m, d)
                counted = rows % length >= self.skipped  # (m,)
                half_of = parity.to(rows.device)[rows // length]  # (m,)
                for half, moment in enumerate(halves[name]):
                    moment.update(inputs[counted & (half_of == half)])  # (n, d)

    def _begin(self, site: EditSite, halves: dict[str, Halves]) -> None:
        """Empty sums for every block of `site` that has none yet."""
        # The sums live with the layer, except where the device has no float64.
        device = torch.device("cpu") if site.device.type == "mps" else site.device
        for name in site.blocks:
            if name not in halves:
                even, odd = (SecondMoment(site.dimension, device, self.product_dtype) for _ in range(2))
                halves[name] = even, odd

    def _finished(self, name: str, site: EditSite, halves: dict[str, Halves]) -> Halves:
        self._begin(site, halves)  # a process with no sequence of its own still takes part in the sum
        for moment in halves[name]:
            packed = self.processes.sum(moment.packed)
            moment.packed = packed.float().double().cpu()  # as in the file, so that the cache changes nothing
            moment.count = int(self.processes.sum(torch.tensor(moment.count)))
            if not moment.packed.isfinite().all():
                raise StatisticsError(
                    f"the keys of {name} are not finite; the model overflows in {self.model.dtype}: "
                    "load it in bfloat16 or float32"
                )
        return halves[name]

    def _save(self, done: int, halves: dict[str, Halves]) -> None:
        moments = [moment for site in self.sites for name in site.blocks for moment in halves[name]]
        write_moments(self.checkpoint, moments, {**self.description, "done": done}, torch.float64)

    def _resume(self) -> tuple[int, dict[str, Halves]]:
        """Number of sequences done and the sums so far: what the checkpoint says, or nothing."""
        if not self.checkpoint.exists():
            return 0, {}
        try:
            moments, found = read_moments(self.checkpoint)
            done = found.pop("done")
            if found != self.description:
                raise StatisticsError(f"{self.checkpoint} is the checkpoint of another run")
        except (StatisticsError, KeyError) as error:
            logger.warning("the checkpoint can't be used (%s); starting again", error)
            return 0, {}
        halves: dict[str, Halves] = {}
        for site in self.sites:
            self._begin(site, halves)
        for (even, odd), pair in zip(halves.values(), zip(moments[::2], moments[1::2], strict=True), strict=True):
            even.merge(pair[0])
            odd.merge(pair[1])
        logger.info("going on after %d of %d sequences", done, len(self.sequences))
        return done, halves
