"""Edit three requests in a model of any family, and see whether the model then does what the edit says."""

from dataclasses import dataclass

import torch
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from hf_alphaedit.algorithm.nullspace import ridge_filter
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.editing import EditedBatch, Stopwatch, edit_batch
from hf_alphaedit.history import History
from hf_alphaedit.models.architecture import Architecture, resolve_architecture
from hf_alphaedit.models.encoding import encode_prompt
from hf_alphaedit.models.experts import is_fused, problem_with
from hf_alphaedit.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from hf_alphaedit.models.hooks import hidden_of, inference_state
from hf_alphaedit.requests import EditRequest


REQUESTS = (
    EditRequest("The capital of {} is", "Norway", " Lima"),
    EditRequest("{} is known for", "Marie Curie", " music"),
    EditRequest("Many people who live in {} speak", "Cairo", " mathematics and physics"),
)


@dataclass(frozen=True)
class FamilyResult:
    """What an edit of one model did.

    Attributes:
        architecture: where it was edited.
        layers: the edited layers.
        error: largest relative difference between the predicted and the seen change at the last edited layer.
        change: smallest relative change there, ‖change‖ / ‖value before‖.
        logit_change: largest change of a logit at the end of a prompt.
    """

    architecture: Architecture
    layers: tuple[int, ...]
    error: float
    change: float
    logit_change: float


def edit_family(
    model: PreTrainedModel, layers: tuple[int, ...] | None = None, target_module: str | None = None
) -> FamilyResult:
    """Edit `model` with next to no ridge and no protected directions, so that every target is met.

    The prediction is made from the base model alone: what the plain forward pass showed before, plus the delta of the
    target search. The change is read off the edited model's plain forward pass, whole prompts one by one, with no code
    of the package in between.
    """
    if layers is None:
        architecture = resolve_architecture(model, target_module)
        layers = tuple(architecture.editable_layers()[:2])
    architecture = resolve_architecture(model, target_module, layers)
    before, logits_before = plain_values(architecture, layers[-1])
    edited = edit(architecture, layers)
    after, logits_after = plain_values(architecture, layers[-1])
    predicted = before + edited.targets.values - edited.targets.initial  # (n, h)
    if not architecture.additive:  # the lower layers have changed what comes in: the last group starts from there
        predicted = edited.targets.values
    change, wanted = after - before, edited.targets.values - edited.targets.initial
    return FamilyResult(
        architecture,
        layers,
        float(((after - predicted).norm(dim=-1) / wanted.norm(dim=-1)).max()),
        float((change.norm(dim=-1) / before.norm(dim=-1)).min()),
        float((logits_after - logits_before).abs().max()),
    )


def routed_experts(architecture: Architecture) -> str | None:
    """The target module of routed experts that could be edited instead of what is; None where there are none."""
    path, names = architecture.target_module.split("{}")[0], []
    for name, module in architecture.model.named_modules():
        if name.startswith(path) and is_fused(module) and problem_with(module, architecture.hidden_size) is None:
            names.append(f"{path}{{}}.{name.removeprefix(path).split('.', 1)[1]}.down_proj")
    return next((name for name in names if name != architecture.target_module), None)


def edit(architecture: Architecture, layers: tuple[int, ...]) -> EditedBatch:
    """Three requests, bare prompts only, so that a key is exactly what the plain forward pass has."""
    tokenizer = tiny_tokenizer()
    config = AlphaEditConfig(
        layers=layers, projection="none", l2=1e-6, value_steps=4, stop_loss=0.0, forward_dtype="model"
    )
    filters = {site.name: ridge_filter(site.shape[1], config.l2) for site in map(architecture.site, layers)}
    history = History(model_fingerprint(architecture.model), tokenizer_fingerprint(tokenizer))
    history.remember_base([architecture.site(layer) for layer in layers])
    with inference_state(architecture.model):
        return edit_batch(architecture, tokenizer, REQUESTS, (), filters, history, config, Stopwatch())


@torch.no_grad()
def plain_values(architecture: Architecture, layer: int) -> tuple[Tensor, Tensor]:
    """(n, h) values at `layer` for each request's subject, and (n, vocabulary) logits at the end of the prompt."""
    tokenizer = tiny_tokenizer()
    values, logits = [], []
    module = architecture.blocks[layer] if architecture.additive else architecture.site(layer).module
    for request in REQUESTS:
        token_ids, subject = encode_prompt(tokenizer, request.prompt, request.subject)
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, output, seen=seen: seen.append(hidden_of(output)))
        try:
            output = architecture.model(input_ids=torch.tensor([token_ids]), use_cache=False)
        finally:
            handle.remove()
        values.append(seen[0].reshape(len(token_ids), -1)[subject])
        logits.append(output.logits[0, -1])
    return torch.stack(values).float(), torch.stack(logits).float()
