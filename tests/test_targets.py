"""The target search on tiny models: side by side as one by one, whatever the chunks, the memory and the way."""

import contextlib
import logging
import math
import os
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_alphaedit.chunks import CHUNK_COST, chunked, step_tokens, suffix_length
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import EditingError
from hf_alphaedit.models import beginnings
from hf_alphaedit.models.architecture import Architecture, resolve_architecture
from hf_alphaedit.models.encoding import EncodedRequest, TokenRow, encode_request
from hf_alphaedit.models.forward import align_rows
from hf_alphaedit.models.hooks import GROUPED_ATTENTION, grouped_attention
from hf_alphaedit.models.rows import RowForm
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.row_form import row_form
from hf_alphaedit.targets import Targets, compute_targets, product_dtype


LAYER = 2
FAMILIES = ["llama", "gpt2", "gemma3_text"]  # the last has a norm behind its down-projection
CONTEXTS = ("The river runs. {}", "Therefore the people who are there said. {}")
REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("{} plays", "Ada", "the big drum and sings"),
    EditRequest("It is said that all of the people in {}", "Norway", "music"),
    EditRequest("{}的首都是", "中国", "上海"),
    EditRequest("In 1900, {} was a city which had very many", "Cairo, Egypt,", "students"),
]
# The subject ends the prompt, so the value that is searched for is what predicts the target.
EASY = [
    EditRequest("The capital of {}", "France", "music"),
    EditRequest("We saw {}", "Italy", "city"),
    EditRequest("Who is {}", "Ada Lovelace", "people"),
    EditRequest("{}", "Norway", "the"),
]
CONFIG = AlphaEditConfig(layers=(1, 2), value_steps=6, stop_loss=0.0, forward_dtype="model")


def encoded(requests: list[EditRequest] = REQUESTS, asides: bool = False) -> list[EncodedRequest]:
    return [encode_request(tiny_tokenizer(), request, CONTEXTS, asides=asides) for request in requests]


def architecture_of(family: str = "llama", model: PreTrainedModel | None = None) -> Architecture:
    return resolve_architecture(model or tiny_model(family), layers=(1, 2))


def targets(architecture: Architecture, requests: list[EncodedRequest], **options: Any) -> Targets:
    chunk = {"largest_chunk": options.pop("largest_chunk")} if "largest_chunk" in options else {}
    return compute_targets(architecture, requests, LAYER, CONFIG.replace(**options), **chunk)


def deltas(found: Targets) -> Tensor:
    return found.values - found.initial


def assert_same(first: Targets, second: Targets, tolerance: float = 1e-4) -> None:
    """Equal per request, relative to the size of what was searched for."""
    assert first.steps.tolist() == second.steps.tolist()
    error = (deltas(first) - deltas(second)).norm(dim=-1) / deltas(second).norm(dim=-1).clamp_min(1e-3)
    assert error.max() < tolerance, error
    torch.testing.assert_close(first.initial, second.initial, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.likelihood, second.likelihood, rtol=tolerance, atol=tolerance)
    assert first.argmax.tolist() == second.argmax.tolist()


def one_by_one(architecture: Architecture, requests: list[EncodedRequest], **options: Any) -> Targets:
    parts = [targets(architecture, [request], **options) for request in requests]
    return Targets(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@pytest.mark.parametrize("family", FAMILIES)
def test_side_by_side_as_one_by_one(family: str) -> None:
    architecture, requests = architecture_of(family), encoded()
    assert architecture.additive == (family != "gemma3_text")
    together = targets(architecture, requests, largest_chunk=10**6)
    assert (deltas(together).norm(dim=-1) > 0.1 * together.initial.norm(dim=-1)).all()
    assert_same(together, one_by_one(architecture, requests))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_turn", [True, False])
def test_every_form_of_rows_gives_the_same(family: str, in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, requests = architecture_of(family), encoded(asides=True)
    assert row_form(architecture, requests, LAYER) is RowForm.PACKED
    tokens: list[int] = []
    architecture.blocks[-1].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[:2].numel()))
    found, most = [], []
    for form in RowForm:
        monkeypatch.setattr("hf_alphaedit.targets.row_form", lambda *_, form=form: form)
        tokens.clear()
        found.append(targets(architecture, requests, contexts_in_turn=in_turn, largest_chunk=10**6))
        most.append(sum(tokens))
    assert most[0] < most[1] < most[2]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_first_look_is_the_plain_models_likelihood(family: str) -> None:
    architecture, requests = architecture_of(family), encoded()
    found = targets(architecture, requests, value_steps=1, contexts_in_turn=False)
    assert torch.equal(found.values, found.initial)
    assert found.steps.tolist() == [0] * len(requests)
    for request, likelihood in zip(requests, found.likelihood.tolist(), strict=True):
        losses = []
        for row in request.rows:
            with torch.no_grad():
                logits = architecture.model(torch.tensor([row.token_ids])).logits[0, row.first_prediction :]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(request.target)).item())
        assert likelihood == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("in_turn", [True, False])
def test_search_as_a_plain_loop_over_whole_rows(in_turn: bool) -> None:
    """One request, every row run whole by the plain model, torch's own Adam; contexts in turn or all at each step."""
    architecture = architecture_of()
    (request,) = encoded(REQUESTS[1:2], asides=True)
    model, block = architecture.model, architecture.blocks[LAYER]
    assert len(request.rows) == 3

    def logits_of(row: TokenRow, added: Tensor) -> Tensor:
        def add(_: Any, __: Any, output: Tensor) -> Tensor:
            return output.index_put((torch.tensor([0]), torch.tensor([row.subject])), added[None], accumulate=True)

        handle = block.register_forward_hook(add)
        try:
            return model(torch.tensor([row.token_ids])).logits[0]
        finally:
            handle.remove()

    initial = model(torch.tensor([request.rows[0].token_ids]), output_hidden_states=True).hidden_states[LAYER + 1]
    norm = initial[0, request.rows[0].subject].norm().item()
    delta = torch.zeros(architecture.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=CONFIG.learning_rate, betas=CONFIG.adam_betas)
    reference = logits_of(request.essence, delta)[request.essence.subject].log_softmax(-1).detach()
    for step in range(CONFIG.value_steps - 1):
        rows = [request.rows[0], request.rows[1 + step % 2]] if in_turn else request.rows
        loss = sum(
            torch.nn.functional.cross_entropy(
                logits_of(row, delta)[row.first_prediction :], torch.tensor(request.target)
            )
            for row in rows
        ) / len(rows)
        now = logits_of(request.essence, delta)[request.essence.subject].log_softmax(-1)
        loss += CONFIG.kl_factor * torch.nn.functional.kl_div(reference, now, reduction="sum", log_target=True)
        loss += CONFIG.weight_decay * delta.norm() / norm**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= min(1.0, CONFIG.clamp_factor * norm / delta.norm().item())
    found = deltas(targets(architecture, [request], contexts_in_turn=in_turn))[0]
    assert (found - delta.detach()).norm() < 1e-3 * delta.norm()
    other = deltas(targets(architecture, [request], contexts_in_turn=not in_turn))[0]
    assert (other - delta.detach()).norm() > 1e-2 * delta.norm()


def test_search_lowers_the_loss() -> None:
    architecture, requests = architecture_of(), encoded(EASY)
    before = targets(architecture, requests, value_steps=1)
    after = targets(architecture, requests, clamp_factor=4.0, value_steps=12)
    assert (after.likelihood < before.likelihood - 1).all()


@pytest.mark.parametrize("largest_chunk", [1, 60, 100])
def test_chunks_decide_nothing(largest_chunk: int) -> None:
    architecture, requests = architecture_of(), encoded(asides=True)
    order = sorted(range(len(requests)), key=lambda index: suffix_length(requests[index]))
    assert len(chunked(order, requests, largest_chunk, 4)) > len(chunked(order, requests, 10**6, 4))
    assert_same(targets(architecture, requests, largest_chunk=largest_chunk), targets(architecture, requests))


@pytest.mark.parametrize("size", [1, 30, 100, 10**6])
@pytest.mark.parametrize("chunk_cost", [0, CHUNK_COST, 10**6])
@pytest.mark.parametrize("packed", [True, False])
def test_chunks_are_the_cheapest_within_their_size(
    size: int, chunk_cost: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_alphaedit.chunks.CHUNK_COST", chunk_cost)
    requests = encoded([*REQUESTS, *EASY])
    order = sorted(range(len(requests)), key=lambda index: suffix_length(requests[index]))

    def cost(chunk: Sequence[int]) -> float:
        padded = len(chunk) * 4 * max(suffix_length(requests[index]) for index in chunk)
        tokens = sum(step_tokens(requests[index], 4) for index in chunk) if packed else padded
        return math.inf if tokens > size and len(chunk) > 1 else tokens + (padded - tokens) / 8 + chunk_cost

    chunks = chunked(order, requests, size, 4, packed=packed)
    assert [index for chunk in chunks for index in chunk] == order
    every_way = (
        [order[begin:end] for begin, end in pairwise([0, *cuts, len(order)])]
        for count in range(len(order))
        for cuts in combinations(range(1, len(order)), count)
    )
    assert sum(map(cost, chunks)) == pytest.approx(min(sum(map(cost, way)) for way in every_way))


def rows_of_contexts(family: str) -> tuple[Architecture, list[TokenRow], list[int]]:
    """A tiny model, the rows of some requests, and the context of each as its group."""
    requests = encoded()
    rows = [row for request in requests for row in (*request.rows, request.essence)]
    return architecture_of(family), rows, list(range(4)) * len(requests)


def counting_tokens(architecture: Architecture, tokens: list[int]) -> RemovableHandle:
    """Every pass appends the number of its tokens, padding included, to `tokens` until the handle is removed."""
    embedding = architecture.model.get_input_embeddings()
    return embedding.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_beginnings_that_contexts_share_run_once(family: str) -> None:
    architecture, rows, groups = rows_of_contexts(family)
    tokens: list[int] = []
    handle = counting_tokens(architecture, tokens)
    shared, values = align_rows(architecture, rows, LAYER, groups=groups)
    with_sharing = sum(tokens)
    alone, expected_values = align_rows(architecture, rows, LAYER)
    handle.remove()
    assert with_sharing < sum(tokens) - with_sharing
    mine = [values, shared.entry, *shared.attention_keys, *shared.attention_values]
    theirs = [expected_values, alone.entry, *alone.attention_keys, *alone.attention_values]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(shared.attention_mask, alone.attention_mask)
    assert torch.equal(shared.position_ids, alone.position_ids)


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_rows_of_other_lengths_run_by_themselves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, rows, groups = rows_of_contexts(family)
    tokens: list[int] = []
    handle = counting_tokens(architecture, tokens)
    found, run = [], []
    for cost in (0, 10**6):  # each length by itself; all at once
        monkeypatch.setattr(beginnings, "PASS_COST", cost)
        found.append(align_rows(architecture, rows, LAYER, groups=groups)[0])
        run.append(sum(tokens) - sum(run))
    handle.remove()
    apart, together = found
    assert run[0] < run[1]
    tokens_of = apart.attention_mask[:, apart.before :].bool()  # padding may hold anything
    mine, theirs = ([one.entry[tokens_of], *one.attention_keys, *one.attention_values] for one in found)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert apart.entry.shape == together.entry.shape


def test_a_pass_is_cut_where_padding_would_cost_more_than_another() -> None:
    assert beginnings.alike([3, 140, 3, 139, 0]) == [[1, 3], [0, 2, 4]]
    assert beginnings.alike([5] * 3) == [[0, 1, 2]]


class SmallMemory:
    """Fails, as torch's allocator does, where more than so many rows come together."""

    def __init__(self, model: PreTrainedModel, rows: int, message: str) -> None:
        self.rows, self.message, self.failures = rows, message, 0
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: Any, __: Any, keywords: dict[str, Any]) -> None:
        if keywords["input_ids"].shape[0] > self.rows:
            self.failures += 1
            raise RuntimeError(self.message)


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("message", [f"{ALLOCATOR} allocate 9 bytes", "CUDA out of memory. Tried to allocate 2 GiB"])
def test_a_chunk_that_does_not_fit_is_halved(message: str, caplog: pytest.LogCaptureFixture) -> None:
    requests = encoded(REQUESTS[:1] * 4 + REQUESTS[:4])
    undisturbed = targets(architecture_of(), requests, largest_chunk=10**6)
    architecture = architecture_of()
    memory = SmallMemory(architecture.model, 4, message)  # the rows of one request
    with caplog.at_level(logging.WARNING):
        found = targets(architecture, requests, largest_chunk=10**6)
    assert memory.failures >= 3
    assert "trying half of them" in caplog.text
    assert_same(found, undisturbed)
    SmallMemory(architecture.model, 2, message)
    with pytest.raises(RuntimeError, match="allocate"):
        targets(architecture, requests[:1])


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    architecture, requests = architecture_of(), encoded()
    memory = SmallMemory(architecture.model, 4, "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        targets(architecture, requests * 2, largest_chunk=10**6)
    assert memory.failures <= 2  # with and without stored attention states; no halves were tried


@pytest.mark.parametrize("family", FAMILIES)
def test_products_in_bfloat16_are_close(family: str) -> None:
    architecture, requests = architecture_of(family), encoded()
    exact = targets(architecture, requests, value_steps=3)
    rounded = targets(architecture, requests, value_steps=3, forward_dtype="bfloat16")
    assert rounded.values.dtype == torch.float32
    assert not torch.equal(rounded.initial, exact.initial)
    assert (rounded.initial - exact.initial).norm() < 0.02 * exact.initial.norm()
    torch.testing.assert_close(rounded.likelihood, exact.likelihood, rtol=0.05, atol=0.05)
    # Adam's first steps follow signs, so a small gradient that rounds to the other side turns one coordinate round.
    assert (torch.cosine_similarity(deltas(rounded), deltas(exact)) > 0.9).all()
    assert all(
        module.weight.dtype == torch.float32 for module in architecture.model.modules() if hasattr(module, "weight")
    )
    assert not any("forward" in vars(module) for module in architecture.model.modules())


def test_product_dtype_follows_setting_and_weights() -> None:
    narrow, wide = architecture_of(model=tiny_model("llama").bfloat16()), architecture_of()
    assert product_dtype(wide, CONFIG) is None
    assert product_dtype(wide, CONFIG.replace(forward_dtype="bfloat16")) == torch.bfloat16
    assert product_dtype(narrow, CONFIG.replace(forward_dtype="auto")) is None
    assert product_dtype(narrow, CONFIG.replace(forward_dtype="float32")) == torch.float32
    assert product_dtype(wide, CONFIG.replace(forward_dtype="auto")) in (None, torch.bfloat16)
    routed = resolve_architecture(tiny_model("mixtral"), "model.layers.{}.mlp.experts.down_proj", (1, 2))
    auto = CONFIG.replace(forward_dtype="auto")
    assert product_dtype(routed, auto) == product_dtype(wide, auto)


@pytest.mark.parametrize("before", [None, "0"])
def test_grouped_attention_is_gone_on_exit(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GROUPED_ATTENTION, raising=False)
    if before is not None:
        monkeypatch.setenv(GROUPED_ATTENTION, before)
    with contextlib.suppress(KeyboardInterrupt), grouped_attention(torch.device("cpu")):
        assert os.environ[GROUPED_ATTENTION] == "1"
        raise KeyboardInterrupt
    with grouped_attention(torch.device("meta")):
        assert os.environ.get(GROUPED_ATTENTION) == before
    assert os.environ.get(GROUPED_ATTENTION) == before


def test_grouped_attention_changes_rounding_only() -> None:
    model = tiny_model("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    token_ids, mask = torch.arange(12).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    plain = model(token_ids, attention_mask=mask).logits
    with grouped_attention(torch.device("cpu")):
        torch.testing.assert_close(model(token_ids, attention_mask=mask).logits, plain)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_finished_requests_leave_the_batch(family: str) -> None:
    architecture, requests = architecture_of(family), encoded(EASY)
    options = {"clamp_factor": 4.0, "value_steps": 12, "kl_factor": 0.0, "weight_decay": 0.0}
    alone = [targets(architecture, [request], **options).likelihood for request in requests]
    stop_loss = float(torch.cat(alone).median()) + 0.3  # some get there
    rows: list[int] = []
    handle = architecture.head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    found = targets(architecture, requests, stop_loss=stop_loss, largest_chunk=10**6, **options)
    handle.remove()
    assert 1 < len(set(found.steps.tolist())) <= len(requests)
    assert min(rows) < max(rows)  # logits at fewer positions than at first
    assert_same(found, one_by_one(architecture, requests, stop_loss=stop_loss, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_get_no_gradient_and_nothing_stays(family: str) -> None:
    model = tiny_model(family)
    architecture = architecture_of(model=model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    targets(architecture, encoded(), value_steps=3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_duplicates_do_not_see_each_other() -> None:
    architecture, requests = architecture_of(), encoded()
    same_subject = encoded([EditRequest("The capital of {} is", "France", "Oslo")])
    found = targets(architecture, [requests[0], requests[1], requests[0], *same_subject])
    assert torch.equal(found.values[0], found.values[2]) or (found.values[0] - found.values[2]).norm() < 1e-4
    assert_same(found, one_by_one(architecture, [requests[0], requests[1], requests[0], *same_subject]))
    torch.testing.assert_close(found.initial[3], found.initial[0], rtol=1e-5, atol=1e-5)
    assert (found.values[3] - found.values[0]).norm() > 0.1


def test_a_loss_that_is_not_finite_is_an_editing_error() -> None:
    architecture = architecture_of()
    count = 0

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return output * float("nan") if count > 5 else output

    architecture.head.register_forward_hook(spoil)
    with pytest.raises(EditingError, match=r"not finite at step \d.*lower learning_rate"):
        targets(architecture, encoded()[:1])
