"""The published target vector: one request at a time, every row in full length, the logits of every token.

Part of the baseline (see `reference.py`); it shares nothing with the library.
"""

from collections.abc import Mapping, Sequence

import torch
from reference_inputs import Settings, encode_row, encode_target, hook, pad_right, tensor_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase


KL_PROMPT = "{} is a"


def compute_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Mapping[str, str],
    layer: int,
    contexts: Sequence[Sequence[str]],
    settings: Settings,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Target z (h,): the output of block `layer` at the subject that makes the model say `target_new`.

    Adam on delta, added in every row at the row's own subject token; loss = NLL over the context rows
    + kl_factor * KL(now || first step) at the subject of "{subject} is a" + v_weight_decay * |delta| / |h0|^2.
    The last forward is followed by no update. Also returns loss, nll, kl and decay of each forward.
    """
    device, target = model.device, encode_target(tokenizer, request["target_new"])
    prompts = [
        encode_row(tokenizer, context, request["prompt"], request["subject"])
        for group in contexts
        for context in group
    ]
    rewriting = len(prompts)
    kl_ids, kl_subject = encode_row(tokenizer, "{}", KL_PROMPT, request["subject"])
    batch = pad_right([ids + target[:-1] for ids, _ in prompts] + [kl_ids], device)
    rows = torch.arange(rewriting + 1, device=device)
    subjects = torch.tensor([subject for _, subject in prompts] + [kl_subject], device=device)  # (rewriting + 1,)
    # The token before target token i is at len(prompt) - 1 + i.
    starts = torch.tensor([len(ids) - 1 for ids, _ in prompts], device=device)
    positions = starts[:, None] + torch.arange(len(target), device=device)  # (rewriting, target)
    labels = torch.tensor(target, device=device).expand(rewriting, -1)  # (rewriting, target)

    last_block = model.config.get_text_config().num_hidden_layers - 1
    loss_layer = max(layer, last_block if settings.v_loss_layer is None else settings.v_loss_layer)
    norm, head = model.get_submodule(settings.final_norm), model.get_submodule(settings.head)
    delta = torch.zeros(model.config.get_text_config().hidden_size, device=device, requires_grad=True)  # (h,)
    optimizer = torch.optim.Adam([delta], lr=settings.v_lr)
    clean: list[Tensor] = []  # h0 (h,), from the first forward
    final: list[Tensor] = []  # output of the loss layer in the current forward

    def inject(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple:
        hidden = tensor_of(output)  # (rewriting + 1, tokens, h)
        if not clean:
            clean.append(hidden[0, subjects[0]].detach().clone())
        hidden = hidden.index_put((rows, subjects), delta.expand(len(rows), -1).to(hidden.dtype), accumulate=True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def keep(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
        final[:] = [tensor_of(output)]

    steps: list[dict[str, float]] = []
    first_distribution = None
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    block = model.get_submodule(settings.block.format(layer))
    loss_block = model.get_submodule(settings.block.format(loss_layer))
    try:
        for step in range(settings.v_num_grad_steps):
            # The injecting hook comes first, so that with loss_layer == layer the kept output contains delta.
            with hook(block, inject), hook(loss_block, keep):
                logits = model(**batch, use_cache=False).logits  # (rewriting + 1, tokens, V)
            distribution = logits[rewriting, kl_subject].float().log_softmax(-1)  # (V,)
            if first_distribution is None:
                first_distribution = distribution.detach()
            # As published, norm and head run a second time on every token of the rewriting rows.
            log_probabilities = head(norm(final[0][:rewriting])).float().log_softmax(-1)  # (rewriting, tokens, V)
            nll = -log_probabilities[rows[:rewriting, None], positions, labels].mean(1).mean()
            kl = settings.kl_factor * functional.kl_div(
                first_distribution[None], distribution[None], log_target=True, reduction="batchmean"
            )
            decay = settings.v_weight_decay * delta.norm() / clean[0].norm() ** 2
            loss = nll + kl + decay
            steps.append({"loss": loss.item(), "nll": nll.item(), "kl": kl.item(), "decay": decay.item()})
            if steps[-1]["loss"] < settings.stop_loss or step == settings.v_num_grad_steps - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                limit = settings.clamp_norm_factor * clean[0].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
    return clean[0].float() + delta.detach(), steps
