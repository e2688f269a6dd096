"""Models with routed experts, editors of them, and their keys by a plain float64 loop over tokens and experts."""

from typing import Any

import torch
from editable import CONFIG, CORPUS, TOKENS
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_alphaedit import AlphaEditor
from hf_alphaedit.models.encoding import encode_prompt


FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
EXPERTS = "model.layers.{}.mlp.experts.down_proj"
SETTINGS = CONFIG.replace(target_module=EXPERTS, forward_dtype="model", sequence_length=48)
PROMPT = torch.tensor([[5, 80, 300, 41, 17, 222, 9], [7, 401, 33, 90, 12, 350, 21]])


def experts_of(model: PreTrainedModel, layer: int) -> nn.Module:
    return model.get_submodule(EXPERTS.format(layer).removesuffix(".down_proj"))


@torch.no_grad()
def plain_keys(model: PreTrainedModel, token_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """(T, E, d) share-weighted keys of one row at `layer`, token by token in float64, and what the experts return."""
    seen: list[tuple] = []
    module = experts_of(model, layer)
    handle = module.register_forward_hook(lambda _, given, output: seen.append((*given, output)))
    model(input_ids=token_ids[None], use_cache=False)
    handle.remove()
    hidden, chosen, shares, output = seen[0]
    keys = torch.zeros(len(hidden), len(module.down_proj), module.down_proj.shape[2], dtype=torch.float64)
    for token in range(len(hidden)):
        for expert, share in zip(chosen[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (module.gate_up_proj[expert].double() @ hidden[token].double()).chunk(2)
            keys[token, expert] = share * nn.functional.silu(gate) * up
    return keys, output


def subject_keys(model: PreTrainedModel, requests: list, layer: int) -> Tensor:
    """(n, E, d) at the subject's last token of each bare prompt."""
    rows = [encode_prompt(tiny_tokenizer(), request.prompt, request.subject) for request in requests]
    return torch.stack([plain_keys(model, torch.tensor(ids), layer)[0][subject] for ids, subject in rows])


def experts_editor(name: str | PreTrainedModel, **settings: Any) -> AlphaEditor:
    model = tiny_model(name) if isinstance(name, str) else name
    return AlphaEditor(model, tiny_tokenizer(), SETTINGS.replace(**settings))


def prepared(name: str | PreTrainedModel, tokens: int = TOKENS, **settings) -> AlphaEditor:
    editor = experts_editor(name, **settings)
    editor.prepare(CORPUS, num_tokens=tokens)
    return editor


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def with_an_idle_expert() -> PreTrainedModel:
    """Its fifth expert has a logit of 0 beside two pairs of opposite logits, of which the two positive ones win."""
    model = tiny_model("qwen3_moe", num_experts=5)
    for block in model.model.layers:
        with torch.no_grad():
            block.mlp.gate.weight[1], block.mlp.gate.weight[3] = -block.mlp.gate.weight[0], -block.mlp.gate.weight[2]
            block.mlp.gate.weight[4] = 0
    return model
