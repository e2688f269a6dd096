"""Second moments on disk: our own cache and checkpoints (safetensors), and the files of MEMIT and AlphaEdit (npz)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_alphaedit.algorithm.moments import SecondMoment
from hf_alphaedit.errors import StatisticsError


FORMAT_VERSION = 1
Description = dict[str, Any]


def digest_of(description: Description) -> str:
    """A short name for everything that `description` says."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]


def write_moments(path: Path, moments: Sequence[SecondMoment], description: Description, dtype: torch.dtype) -> None:
    """Write the packed sums of `moments` in `dtype`, with their counts and what they are; atomic.

    The file appears under its name only when it is complete: a killed process leaves the old one, or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"packed.{index}": moment.packed.to("cpu", dtype) for index, moment in enumerate(moments)}
    metadata = {
        "format": "hf_alphaedit second moments",
        "format_version": str(FORMAT_VERSION),
        "dimensions": json.dumps([moment.dimension for moment in moments]),
        "counts": json.dumps([moment.count for moment in moments]),
        "description": json.dumps(description, sort_keys=True),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.temporary")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_moments(path: Path, description: Description | None = None) -> tuple[list[SecondMoment], Description]:
    """Read what `write_moments` wrote, on the CPU, and its description.

    Raises:
        StatisticsError: the file is missing, damaged, of another kind, or not of the `description` asked for.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise StatisticsError(f"{path} holds no second moments of format {FORMAT_VERSION}; compute them again")
            found = json.loads(metadata["description"])
            if description is not None and found != description:
                wrong = sorted(key for key in {*found, *description} if found.get(key) != description.get(key))
                told = ", ".join(f"{key}: {found.get(key)!r} instead of {description.get(key)!r}" for key in wrong)
                raise StatisticsError(f"{path} belongs to something else ({told}); compute it again")
            moments = []
            dimensions, counts = json.loads(metadata["dimensions"]), json.loads(metadata["counts"])
            for index, (dimension, count) in enumerate(zip(dimensions, counts, strict=True)):
                moment = SecondMoment(dimension)
                packed = file.get_tensor(f"packed.{index}")
                if packed.shape != moment.packed.shape or not packed.isfinite().all():
                    raise StatisticsError(f"{path} is damaged: packed.{index} is cut short, or not finite")
                moment.packed.copy_(packed)
                moment.count = count
                moments.append(moment)
            return moments, found
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StatisticsError(f"{path} can't be read as second moments ({error}); compute them again") from error


def read_legacy_moment(path: str | Path, dimension: int | None = None) -> SecondMoment:
    """Read an .npz file of MEMIT, ROME or AlphaEdit: `mom2.mom2` (d, d) is a sum, `mom2.count` the number of keys.

    Nothing in the file is unpickled.

    Raises:
        StatisticsError: the file is missing or damaged, lacks one of the two, or has another shape than (`dimension`,
            `dimension`).
    """
    try:
        # opened here, since numpy leaves a damaged file open
        with Path(path).open("rb") as opened, numpy.load(opened, allow_pickle=False) as arrays:
            total, count = arrays["mom2.mom2"], int(arrays["mom2.count"])
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise StatisticsError(f"{path} can't be read as second moments of MEMIT or AlphaEdit ({error})") from error
    wanted = (dimension or total.shape[-1],) * 2
    if total.shape != wanted:
        raise StatisticsError(f"{path} holds a matrix of shape {total.shape}; the keys of this model need {wanted}")
    if count < 1 or not numpy.isfinite(total).all():
        raise StatisticsError(f"{path} is damaged: {count} keys, or a sum that is not finite")
    symmetric = torch.from_numpy(total).double()  # (d, d) sum
    symmetric = (symmetric + symmetric.T) / 2
    return SecondMoment.from_mean(symmetric / count, count)


def write_legacy_moment(path: str | Path, mean: Tensor, count: int, sample_size: int) -> None:
    """Write C (d, d) over `count` keys from `sample_size` texts under the names that MEMIT and AlphaEdit read."""
    arrays = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": count,
        "mom2.mom2": (mean.cpu().double() * count).float().numpy(),
        "constructor": "util.runningstats.CombinedStat()",
        "sample_size": sample_size,
    }
    with Path(path).open("wb") as file:  # a file object, since numpy would add a suffix to a name
        numpy.savez(file, allow_pickle=False, **{name: numpy.asarray(value) for name, value in arrays.items()})
