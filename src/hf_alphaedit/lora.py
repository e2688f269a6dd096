"""The edits as a standard PEFT LoRA adapter: B = outputsᵀ and A = inputs are the delta, exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.batches import dense_update, shape_of
from hf_alphaedit.errors import ConfigError, StateError, UnsupportedModelError
from hf_alphaedit.state import replacing, write_text


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"

# The values that vLLM takes for its max_lora_rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportReport:
    """What was exported as a LoRA adapter.

    Attributes:
        directory: where the adapter is.
        edits: number of edits in it.
        size: of the adapter's weights, in bytes.
        ranks: site -> rank of its pair of matrices.
        truncation: site -> ‖Δ - BA‖ / ‖Δ‖ in the Frobenius norm; 0.0 where nothing was cut off.
    """

    directory: str
    edits: int
    size: int
    ranks: dict[str, int]
    truncation: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"LoRA adapter of {self.edits} edits, {self.size / 1e6:.1f} MB: {self.directory}"]
        for site, rank in self.ranks.items():
            error = self.truncation[site]
            lines.append(f"  {site}: rank {rank}, " + (f"{error:.2%} of the delta cut off" if error else "exact"))
        return "\n".join(lines)


def export_lora(
    editor: AlphaEditor,
    directory: str | Path,
    *,
    max_rank: int | None = None,
    allowed_ranks: Sequence[int] | None = None,
) -> ExportReport:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as `peft.PeftModel.from_pretrained` reads them.

    Alpha is the rank, so the scale is 1 and B·A is the delta itself, in float32. No decomposition is made up to the
    true rank: the factors are written as they are, or the summed delta beside an identity where the edits outnumber a
    side of the weight.

    Args:
        editor: is not changed. The adapter belongs to its *unedited* model.
        directory: is made if it doesn't exist.
        max_rank: cut each delta to this rank by a singular value decomposition, the best in the Frobenius norm; the
            report has the error.
        allowed_ranks: give all sites one rank, the smallest of these that is enough, by padding with zeros. For
            serving engines that take a fixed set (`VLLM_RANKS`) and for llama.cpp, which has one alpha for all sites.

    Raises:
        StateError: there are no edits.
        ConfigError: `max_rank` is less than 1, or no allowed rank is enough.
        UnsupportedModelError: an edited weight belongs to no `nn.Linear` or `Conv1D`, which is all that LoRA covers.
    """
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"max_rank={max_rank} must be at least 1")
    sites = {site.name: site for site in editor.sites()}
    pairs, truncation = {}, {}
    for name in sites:
        update = editor.history.factors(name)
        if update is not None:
            pairs[name], truncation[name] = _reduced(update, max_rank)
    if not pairs:
        raise StateError("there are no edits to export; call apply_edits first")
    if allowed_ranks is not None:
        rank = _smallest_allowed(max(len(pair.inputs) for pair in pairs.values()), allowed_ranks)
        pairs = {name: _padded(pair, rank) for name, pair in pairs.items()}

    modules = {name: sites[name].module for name in pairs}
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}; a LoRA adapter covers nn.Linear and Conv1D only: use save_edits"
            )
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.inputs.contiguous()  # (r, d)
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.outputs.T.contiguous()  # (h, r)
    ranks = {name: len(pair.inputs) for name, pair in pairs.items()}
    transposed = {isinstance(module, Conv1D) for module in modules.values()}
    config = _adapter_config(editor, ranks, fan_in_fan_out=transposed == {True})

    directory = Path(directory)
    with replacing(directory / ADAPTER_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(directory / ADAPTER_CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = (directory / ADAPTER_NAME).stat().st_size
    return ExportReport(str(directory), len(editor.history), size, ranks, truncation)


def singular_factors(update: LowRankUpdate) -> tuple[Tensor, Tensor, Tensor]:
    """U (h, r), s (r,) and Vᵀ (r, d) of the update in float64, without forming it.

    QR of both factors, then the singular value decomposition of the small core between them; r is the smallest of the
    number of edits, h and d.
    """
    inputs, outputs = update.inputs.double(), update.outputs.double()  # (n, d), (n, h)
    right, right_core = torch.linalg.qr(inputs.T)  # (d, a), (a, n)
    left, left_core = torch.linalg.qr(outputs.T)  # (h, b), (b, n)
    u, s, vt = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)  # (b, r), (r,), (r, a)
    return left @ u, s, vt @ right.T


def _reduced(update: LowRankUpdate, max_rank: int | None) -> tuple[LowRankUpdate, float]:
    """The update with at most `max_rank` rows, and the relative error of leaving out the others."""
    height, width = shape_of(update)
    true_rank = min(len(update.inputs), height, width)
    if max_rank is not None and max_rank < true_rank:
        u, s, vt = singular_factors(update)
        root = s[:max_rank].sqrt()  # split evenly, so that neither factor loses precision in a narrow dtype
        inputs, outputs = root[:, None] * vt[:max_rank], root[:, None] * u.T[:max_rank]
        error = s[max_rank:].norm() / s.norm() if s.any() else s.new_zeros(())
        return LowRankUpdate(inputs.float(), outputs.float()), float(error)
    if true_rank == len(update.inputs):
        return update, 0.0
    delta = update.dense().float()  # (h, d): more edits than the weight has rows or columns
    if height <= width:
        return dense_update(delta), 0.0
    return LowRankUpdate(torch.eye(width), delta.T.contiguous()), 0.0


def _padded(update: LowRankUpdate, rank: int) -> LowRankUpdate:
    missing = (0, 0, 0, rank - len(update.inputs))
    return LowRankUpdate(nn.functional.pad(update.inputs, missing), nn.functional.pad(update.outputs, missing))


def _smallest_allowed(rank: int, allowed: Sequence[int]) -> int:
    enough = [value for value in allowed if value >= rank]
    if not enough:
        raise ConfigError(
            f"the edits have rank {rank}, and none of the allowed ranks {sorted(allowed)} is enough; pass "
            f"max_rank={max(allowed, default=1)} to cut them off (the report has the error), or merge the edits"
        )
    return min(enough)


def _adapter_config(editor: AlphaEditor, ranks: dict[str, int], *, fan_in_fan_out: bool) -> dict[str, Any]:
    rank = max(ranks.values())
    smaller = {name: value for name, value in ranks.items() if value != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": editor.history.base_model or editor.model.name_or_path or None,
        "revision": editor.history.base_revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
