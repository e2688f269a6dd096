"""What would be edited in a model and why, and what it will cost: `AlphaEditor.check` and `hf-alphaedit check`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import has_offloaded_params

from hf_alphaedit.contexts import encode_requests
from hf_alphaedit.estimates import editing_memory, editing_seconds
from hf_alphaedit.filters import tokens_wanted
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.hooks import inference_state, stop_after
from hf_alphaedit.models.weights import input_device
from hf_alphaedit.requests import EditRequest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

REQUESTS = 100  # edits that time and memory are estimated for
PROBE_TOKENS = 256
# Of the usual length: a prompt of ten words, and five sampled contexts.
EXAMPLE = EditRequest("The city in which the headquarters of {} are found is called", "Example Company", "Paris")
CONTEXTS = ("The people who live here say that. {}",) * 5


@dataclass(frozen=True)
class SiteCheck:
    """One weight that edits go to.

    Attributes:
        site: module path.
        outputs, inputs: its shape as (h, d).
        dtype: of the stored weight.
        place: device it runs on, and 'offloaded' if it isn't kept there.
        scale, error: what the probe saw, see `models.probe.Additivity`.
        experts: that lie side by side in the weight; 1 for a plain matrix.
    """

    site: str
    outputs: int
    inputs: int
    dtype: str
    place: str
    scale: float
    error: float
    experts: int = 1


@dataclass(frozen=True)
class CheckReport:
    """What `AlphaEditor.check` found.

    Attributes:
        model: class of the model, and where it came from.
        blocks: number of decoder blocks.
        sites: the weights that edits go to.
        rule: how targets and residuals are handled, and why.
        settings: where the settings come from.
        statistics_tokens: tokens that the second moments will be collected from; 0 if they are there already.
        statistics_seconds: estimate for that.
        edit_seconds: estimate for a batch of `requests` edits.
        edit_bytes: memory beyond the loaded model for that batch.
        requests: size of that batch.
    """

    model: str
    blocks: int
    sites: tuple[SiteCheck, ...]
    rule: str
    settings: str
    statistics_tokens: int
    statistics_seconds: float
    edit_seconds: float
    edit_bytes: int
    requests: int = REQUESTS

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.blocks} blocks; settings: {self.settings}", self.rule, "will be edited:"]
        lines += [
            f"  {one.site} ({one.outputs} x {one.inputs}{f', {one.experts} experts' if one.experts > 1 else ''}, "
            f"{one.dtype}, {one.place}); probe: factor {one.scale:.4g}, error {one.error:.1e}"
            for one in self.sites
        ]
        if self.statistics_tokens:
            lines.append(f"statistics: {self.statistics_tokens} tokens, about {_duration(self.statistics_seconds)}")
        else:
            lines.append("statistics: collected already")
        lines.append(
            f"{self.requests} edits: about {_duration(self.edit_seconds)} and {self.edit_bytes / 2**30:.2f} GiB "
            "beyond the model"
        )
        return "\n".join(lines)


def check_model(editor: AlphaEditor) -> CheckReport:
    """Say what will be edited and why, with the probe's results and estimates from one short forward pass.

    Nothing is changed. The estimates count multiplications; sampled text, the spectra and the report come on top.

    Args:
        editor: of the model; making one has refused what can't be edited.
    """
    architecture, config = editor.architecture, editor.config
    sites = editor.sites()
    layers = tuple(site.layer for site in sites)
    shapes = [site.shape for site in sites]
    checks = tuple(
        SiteCheck(
            site.name, *shape, str(site.weight.dtype).removeprefix("torch."),
            f"{site.device}{', offloaded' if has_offloaded_params(site.module) else ''}",
            architecture.probed[site.layer].scale, architecture.probed[site.layer].error, len(site.blocks),
        )
        for site, shape in zip(sites, shapes, strict=True)
    )  # fmt: skip
    speed = tokens_per_second(architecture, layers[-1])
    encoded = encode_requests(editor.tokenizer, [EXAMPLE], CONTEXTS, config) * REQUESTS
    tokens = 0 if editor.is_prepared else tokens_wanted(editor)
    source = editor.history.base_model
    return CheckReport(
        f"{type(editor.model).__name__}{f' ({source})' if source else ''}", len(architecture.blocks), checks,
        rule_of(architecture, layers), config.source, tokens, tokens / speed,
        editing_seconds(editor, encoded, speed), editing_memory(editor, encoded),
    )  # fmt: skip


def rule_of(architecture: Architecture, layers: Sequence[int]) -> str:
    """How residuals are handled in this model, and why, in one sentence."""
    if not architecture.additive:
        each = f"; each of the {len(layers)} layers has targets of its own" if len(layers) > 1 else ""
        return (
            "a norm or a gate follows the down-projection, so targets are found at its output, where the write is "
            f"linear{each}"
        )
    if architecture.scale != 1:
        return (
            f"the down-projection is added to the residual stream times {architecture.scale:.4g}: residuals are "
            "divided by that"
        )
    return "the down-projection is added to the residual stream as it is: the published rule"


@torch.no_grad()
def tokens_per_second(architecture: Architecture, layer: int) -> float:
    """Speed of the forward pass up to block `layer`: one short row, run once to warm up and once for the time."""
    model = architecture.model
    vocabulary = model.get_input_embeddings().num_embeddings
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or PROBE_TOKENS
    token_ids = (torch.arange(min(PROBE_TOKENS, longest)) % vocabulary)[None].to(input_device(model))  # (1, T)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with inference_state(model), stop_after(architecture.blocks[layer]):
            model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - began
    return token_ids.numel() / seconds


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
