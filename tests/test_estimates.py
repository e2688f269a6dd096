"""How much the target search runs at once, from what memory is free."""

import dataclasses

import pytest
import torch
from editable import REQUESTS, tiny_editor
from tiny import tiny_model

from hf_alphaedit.chunks import CPU_CHUNK
from hf_alphaedit.estimates import CHUNK_RANGE, chunk_tokens, editing_memory, editing_seconds
from hf_alphaedit.models.architecture import Architecture, resolve_architecture
from hf_alphaedit.models.encoding import EncodedRequest, encode_request


class _OnAccelerator(Architecture):
    """An architecture whose inputs go to an accelerator that isn't there."""

    input_device = torch.device("cuda", 1)  # ty: ignore[invalid-assignment]


def on_accelerator(free: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("hf_alphaedit.estimates.get_max_memory", lambda: {0: 1, 1: free, "cpu": 10**12})
    found = resolve_architecture(tiny_model("llama"), layers=(1, 2))
    fields = {item.name: getattr(found, item.name) for item in dataclasses.fields(found)}
    return chunk_tokens(_OnAccelerator(**fields), 2)


def test_a_cpu_takes_what_it_is_fast_with() -> None:
    assert chunk_tokens(resolve_architecture(tiny_model("llama"), layers=(1, 2)), 2) == CPU_CHUNK


def test_an_accelerator_takes_what_its_own_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2**24
    tokens = on_accelerator(free, monkeypatch)
    assert CHUNK_RANGE[0] < tokens < CHUNK_RANGE[1]
    assert on_accelerator(2 * free, monkeypatch) in (2 * tokens, 2 * tokens + 1)
    assert on_accelerator(0, monkeypatch) == CHUNK_RANGE[0]
    assert on_accelerator(2**50, monkeypatch) == CHUNK_RANGE[1]


def encoded(count: int, contexts: tuple[str, ...]) -> list[EncodedRequest]:
    editor = tiny_editor()
    return [encode_request(editor.tokenizer, request, contexts) for request in REQUESTS[:count]]


def test_contexts_in_turn_cost_less_and_more_requests_more() -> None:
    contexts = ("I said. {}", "They know. {}", "We do. {}", "It is. {}")
    in_turn, together = tiny_editor(), tiny_editor(contexts_in_turn=False)
    one, three = encoded(1, contexts), encoded(3, contexts)
    assert editing_seconds(in_turn, three, 100.0) < editing_seconds(together, three, 100.0)
    assert editing_memory(in_turn, three) < editing_memory(together, three)
    assert editing_memory(in_turn, one) < editing_memory(in_turn, three)
