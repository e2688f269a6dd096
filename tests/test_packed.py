"""Rows without padding: what transformers' attention gets, and that nothing of it stays behind."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import family_model
from test_targets import LAYER, architecture_of, assert_same, deltas, encoded, targets
from tiny import tiny_model, tiny_tokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_alphaedit.models.encoding import encode_request
from hf_alphaedit.models.forward import align_rows
from hf_alphaedit.models.packed import ATTENTION, Group, PackedRows, sees_everything
from hf_alphaedit.models.rows import RowForm
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.row_form import row_form
from hf_alphaedit.target_rows import StoredRows, all_rows


REQUESTS = encoded(asides=True)
# Bare prompts, two contexts, '<subject> is a'; one kind of all requests behind the other.
KINDS = [[all_rows([request])[kind] for request in REQUESTS] for kind in range(4)]
ROWS = [row for kind in KINDS for row in kind]


@pytest.fixture
def packed() -> PackedRows:
    aligned, _ = align_rows(architecture_of(), ROWS, LAYER)
    places = torch.arange(len(ROWS)).split(len(REQUESTS))
    return PackedRows.of([Group.of(aligned.select(rows)) for rows in places])


@pytest.fixture
def own_attention() -> Iterator[Any]:
    """Somebody's own attention function in place of transformers'."""
    attend = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def own(*arguments: Any, **keywords: Any) -> Any:
        return attend(*arguments, **keywords)

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = own
    yield own
    del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def test_the_line_holds_every_token_once(packed: PackedRows) -> None:
    suffixes = [row.token_ids[row.subject :] for row in ROWS]
    assert packed.line.token_ids.tolist() == [[token for suffix in suffixes for token in suffix]]
    assert packed.line.position_ids.tolist() == [
        [position for row in ROWS for position in range(row.subject, len(row.token_ids))]
    ]
    for index, row in enumerate(ROWS):
        places = packed.token[index, : len(row.token_ids) - row.subject]
        assert packed.line.token_ids[0, places].tolist() == list(row.token_ids[row.subject :])
        assert packed.line.subject[index] == places[0]


def test_spread_and_gather_are_inverse_and_padding_gets_no_gradient(packed: PackedRows) -> None:
    group = packed.groups[2]  # with asides, so that rows differ in length
    rows, columns = group.token.shape
    line = torch.randn(len(group.column), 3, 4, requires_grad=True)  # (t, heads, size)
    assert len(line) < rows * columns
    spread = group.spread(line)
    assert spread.shape == (rows, 3, columns, 4)
    gathered = group.gather(spread.transpose(1, 2))
    torch.testing.assert_close(gathered, line)
    (gradient,) = torch.autograd.grad(gathered.sum(), line)
    assert torch.equal(gradient, torch.ones_like(line))


def test_tokens_without_padding_are_in_place_as_they_are(packed: PackedRows) -> None:
    group = packed.groups[3]  # '<subject> is a' has one token from the subject on
    assert not group.padded
    assert all(one.padded for one in packed.groups[:3])
    line = torch.randn(len(group.column), 3, 4)  # (t, heads, size)
    spread = group.spread(line)
    assert torch.equal(spread[:, :, 0], line)
    assert torch.equal(group.gather(spread.transpose(1, 2)), line)


def test_turns_share_the_rows_they_have_in_common() -> None:
    stored = StoredRows.of(architecture_of(), REQUESTS, LAYER, RowForm.PACKED)
    everyone = torch.arange(len(REQUESTS))

    def group(place: int, active: torch.Tensor) -> Group:
        return stored.group([place], stored.members([place], active))

    first = group(0, everyone)
    assert group(0, everyone) is first
    assert group(1, everyone) is not first
    left = group(0, everyone[1:])  # once a request is finished
    expected = [token for row in KINDS[0][1:] for token in row.token_ids[row.subject :]]
    assert left.gather(left.rows.token_ids).tolist() == expected
    assert group(0, everyone[1:]) is left


def test_states_of_blocks_that_dont_run_again_are_not_kept() -> None:
    architecture = architecture_of()
    aligned, _ = align_rows(architecture, ROWS, LAYER)
    first = architecture.resume_block(LAYER)
    for states in (aligned.attention_keys, aligned.attention_values):
        assert [one.shape[2] for one in states] == [aligned.before] * len(architecture.blocks)  # a cache's length
        assert [one.shape[3] for one in states[:first]] == [1] * first
        assert all(one.shape[3] > 1 for one in states[first:])


def test_groups_have_no_more_padding_than_they_need_and_see_what_a_row_sees(packed: PackedRows) -> None:
    for rows, group in zip(KINDS, packed.groups, strict=True):
        before, after = max(row.subject for row in rows), max(len(row.token_ids) - row.subject for row in rows)
        assert group.mask.shape == (len(rows), 1, after, before + after)
        assert group.rows.attention_keys[0].shape[2] == before
        for row, mask in zip(rows, group.mask[:, 0], strict=True):
            for column in range(len(row.token_ids) - row.subject):
                assert int(mask[column].sum()) == row.subject + column + 1


def test_attention_is_as_before_also_after_an_error(packed: PackedRows, own_attention: Any) -> None:
    with pytest.raises(TypeError), packed.attention():
        ALL_ATTENTION_FUNCTIONS[ATTENTION]("no tensors")
    assert ALL_ATTENTION_FUNCTIONS[ATTENTION] is own_attention


def test_transformers_own_attention_isnt_shadowed_afterwards(packed: PackedRows) -> None:
    with packed.attention():
        pass
    with pytest.raises(KeyError):
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def test_a_model_in_another_thread_notices_nothing(packed: PackedRows) -> None:
    model, token_ids = tiny_model("llama"), torch.arange(7)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(token_ids).logits

    expected = logits()
    with packed.attention(), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(logits).result(), expected)


def test_rows_longer_than_a_window_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    window = 24
    first, last = EditRequest("{} is", "Ada", "music"), EditRequest("Now they say that {} is", "Ada", "music")
    long = EditRequest("We say {} is", "Ada", "the city of all people who sing and play very loud music in the street")
    requests = [encode_request(tiny_tokenizer(), request) for request in (first, last, long)]
    architecture = architecture_of(model=tiny_model("gemma3_text", sliding_window=window))
    assert row_form(architecture, requests[:2], LAYER) is RowForm.PACKED  # the two that are tried in both cases
    assert row_form(architecture, requests, LAYER) is RowForm.PADDED
    assert sees_everything(architecture, window)
    longest = max(len(row.token_ids) for row in all_rows(requests))
    assert longest > window + 1
    assert not sees_everything(architecture, longest)
    found = targets(architecture, requests)
    monkeypatch.setattr("hf_alphaedit.targets.row_form", lambda *_: RowForm.WHOLE)
    whole = targets(architecture, requests)
    assert_same(found, whole)
    monkeypatch.setattr("hf_alphaedit.targets.row_form", lambda *_: RowForm.PACKED)
    assert (deltas(targets(architecture, requests)) - deltas(whole))[2].norm() > 1e-2 * deltas(whole)[2].norm()


@pytest.mark.parametrize("family", ["bloom", "falcon_h1"])
def test_families_that_tell_tokens_apart_by_other_means_are_not_packed(family: str) -> None:
    assert row_form(architecture_of(model=family_model(family)), encoded(), LAYER) is not RowForm.PACKED
