"""An editor of routed experts: their statistics against a plain loop, and that no edit is lost on any way."""

import warnings
from collections import Counter
from pathlib import Path

import accelerate
import pytest
import torch
from editable import CONFIG, CORPUS, REQUESTS, TOKENS
from routed import (
    EXPERTS,
    FAMILIES,
    PROMPT,
    experts_editor,
    experts_of,
    plain_keys,
    prepared,
    relative,
    same,
    state_of,
    with_an_idle_expert,
)
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_alphaedit import AlphaEditor, Record
from hf_alphaedit.errors import StatisticsError, UnsupportedModelError
from hf_alphaedit.packing import pack
from hf_alphaedit.statistics import collect_second_moments, load_second_moments, save_legacy_moments


def leak(editor: AlphaEditor, site: str) -> float:
    """Σ_e tr(Δ_e C_e Δ_eᵀ) / Σ_e tr(W_e C_e W_eᵀ) over the experts with a second moment."""
    sums = []
    for matrix in (editor.history.delta(site), editor.history.base_weights[site]):
        experts = matrix.double().chunk(len(experts_of(editor.model, 0).down_proj), dim=1)
        found = [(expert, editor.second_moments().get(f"{site}.{i}")) for i, expert in enumerate(experts)]
        sums.append(sum(float(torch.trace(e @ c.double() @ e.T)) for e, c in found if c is not None))
    return sums[0] / sums[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_expert_has_the_second_moment_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    editor = experts_editor(name)
    editor.second_moment_directory = tmp_path
    report = editor.prepare(CORPUS, num_tokens=700)
    sequences = pack(CORPUS, editor.tokenizer, 700, 48).long().split(48)
    for layer in (2, 3):
        keys = torch.cat([plain_keys(editor.model, sequence, layer)[0] for sequence in sequences])  # (T, E, d)
        for expert in range(keys.shape[1]):
            block = f"{EXPERTS.format(layer)}.{expert}"
            own = keys[:, expert][keys[:, expert].ne(0).any(-1)]  # (m, d)
            assert editor._moments.counts[block] == len(own)
            assert (block in report.left_out) == (len(own) < keys.shape[2])
            if block not in report.left_out:
                assert relative(editor.second_moments()[block], own.T @ own / len(own)) < 1e-5
    again = editor.prepare(CORPUS, num_tokens=700)
    assert again.from_cache
    assert again.left_out == report.left_out
    sites, fingerprint = editor.sites(), editor.history.base_fingerprint
    if not report.left_out:
        loaded = load_second_moments(tmp_path, sites, fingerprint)
        assert same(loaded.moments, editor.second_moments())
    save_legacy_moments(editor._moments, tmp_path / "legacy")
    loaded = load_second_moments(tmp_path / "legacy", sites, fingerprint)
    assert loaded.moments.keys() == editor.second_moments().keys()
    for block, moment in loaded.moments.items():
        assert relative(moment, editor.second_moments()[block].double()) < 1e-6


def test_a_checkpoint_of_experts_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepared("mixtral").second_moments()
    editor = experts_editor("mixtral")
    editor.second_moment_directory = tmp_path
    runs = Counter()
    original = type(editor.model).forward

    def failing(*arguments, **keywords):
        runs["passes"] += 1
        if runs["passes"] == 2:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    options = {"tokens_per_batch": 480, "checkpoint_seconds": 0.0}
    monkeypatch.setattr(
        "hf_alphaedit.filters.collect_second_moments",
        lambda *given, **keywords: collect_second_moments(*given, **keywords, **options),
    )
    with monkeypatch.context() as patched:
        patched.setattr(type(editor.model), "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            editor.prepare(CORPUS, num_tokens=TOKENS)
    assert list(tmp_path.glob("*.checkpoint"))
    editor.prepare(CORPUS, num_tokens=TOKENS)
    for block, moment in editor.second_moments().items():
        assert relative(moment, expected[block].double()) < 1e-6


def test_an_expert_that_saw_too_little_is_told_and_left_alone() -> None:
    editor = experts_editor(with_an_idle_expert())
    report = editor.prepare(CORPUS, num_tokens=TOKENS)
    idle = {f"{EXPERTS.format(layer)}.4" for layer in (2, 3)}
    assert idle <= set(report.left_out)
    assert all(report.left_out[name] == 0 for name in idle)
    assert any("not edited" in text and f"{EXPERTS.format(2)}.4" in text for text in report.warnings)
    base = [experts_of(editor.model, layer).down_proj[4].clone() for layer in (2, 3)]
    result = editor.apply_edits(REQUESTS)
    assert all(outcome.p_new_after > outcome.p_new_before for outcome in result.outcomes)
    assert all(torch.equal(experts_of(editor.model, layer).down_proj[4], base[layer - 2]) for layer in (2, 3))


def test_too_little_text_for_every_expert_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"none of the 4 experts of model.layers.2.+\(num_tokens\)"):
        prepared("mixtral", tokens=60)


@pytest.mark.parametrize("name", FAMILIES)
def test_edits_are_saved_loaded_continued_and_taken_back(name: str, tmp_path: Path) -> None:
    editor = prepared(name)
    base = state_of(editor.model)
    report = editor.apply_edits(REQUESTS[:2])
    assert all(outcome.p_new_after > 5 * outcome.p_new_before for outcome in report.outcomes)
    for change, entry in zip(report.sites, editor.diff().sites, strict=True):
        energy = leak(editor, change.site)
        assert change.corpus_energy == pytest.approx(energy, rel=1e-4)
        assert entry.corpus_energy == pytest.approx(energy, rel=1e-4)
    first = state_of(editor.model)
    editor.save_pretrained(tmp_path / "model")
    pack_report = editor.save_edits(tmp_path / "edits", include_keys=True)
    assert pack_report.edits == 2

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(state_of(plain), first)
    loaded = AlphaEditor.from_pretrained(tmp_path / "model")
    loaded.prepare(CORPUS, num_tokens=TOKENS)
    for one in (editor, loaded):
        one.apply_edits(REQUESTS[2:])
    assert same(state_of(loaded.model), state_of(editor.model))
    loaded.undo()
    assert same(state_of(loaded.model), first)
    loaded.undo_all()
    assert same(state_of(loaded.model), base)

    fresh = experts_editor(name)
    fresh.load_edits(tmp_path / "edits")
    assert same(state_of(fresh.model), first)
    editor.undo()
    site, batch = EXPERTS.format(2), editor.history.batches[0]
    editor.remove(1)
    key, residual = batch.keys[site][0], batch.updates[site].outputs[0]
    alone = torch.outer(residual, editor.filters()[site].root(key[None])[0]) / (1 + key @ key)
    assert relative(editor.history.delta(site), alone.double()) < 1e-5
    editor.undo_all()
    assert same(state_of(editor.model), base)


def test_a_lora_adapter_of_experts_is_refused_with_the_remedy(tmp_path: Path) -> None:
    editor = prepared("olmoe")
    editor.apply_edits(REQUESTS[:1])
    with pytest.raises(UnsupportedModelError, match=r"OlmoeExperts.+use save_edits"):
        editor.export_lora(tmp_path)


def test_check_and_preflight_speak_of_experts() -> None:
    editor = prepared("mixtral")
    text = str(editor.check())
    assert EXPERTS.format(2) in text
    assert "32 x 256, 4 experts, float32" in text
    report = editor.preflight(REQUESTS)
    assert report.free_directions[EXPERTS.format(2)] == editor.filters()[EXPERTS.format(2)].null_rank > 100


def test_the_tokens_to_read_count_what_an_expert_sees() -> None:
    assert experts_editor("mixtral").check().statistics_tokens == 10 * 64 * 4 // 2
    assert AlphaEditor(tiny_model("llama"), tiny_tokenizer(), CONFIG).check().statistics_tokens == 10 * 64


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_the_implementation_of_the_experts_does_not_matter(implementation: str) -> None:
    expected, model = prepared("mixtral"), tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    editor = prepared(model)
    for one in (expected, editor):
        one.apply_edits(REQUESTS)
    for site in editor.sites():
        assert relative(editor.history.delta(site.name), expected.history.delta(site.name).double()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_the_edit(dtype: torch.dtype) -> None:
    editor = prepared(tiny_model("mixtral").to(dtype))
    before = state_of(editor.model)
    report = editor.apply_edits(REQUESTS)
    assert all(outcome.p_new_after > outcome.p_new_before for outcome in report.outcomes)
    assert {value.dtype for value in state_of(editor.model).values()} == {dtype}
    editor.undo_all()
    assert same(state_of(editor.model), before)


def test_offloaded_experts_take_the_same_edit(tmp_path: Path) -> None:
    expected = prepared("mixtral")
    expected.apply_edits(REQUESTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = accelerate.disk_offload(tiny_model("mixtral"), tmp_path, execution_device=torch.device("cpu"))
    editor = prepared(model)
    editor.apply_edits(REQUESTS)
    for site, resident in zip(editor.sites(), expected.sites(), strict=True):
        assert relative(site.read(), resident.read().double()) < 1e-6
    with torch.no_grad():
        assert torch.allclose(model(input_ids=PROMPT).logits, expected.model(input_ids=PROMPT).logits, atol=1e-4)


def test_a_search_for_settings_puts_routed_experts_back(tmp_path: Path) -> None:
    facts = [
        Record(request, paraphrases=(f"Tell me of {request.subject}",), neighborhood=(("We saw Peru", "field"),))
        for request in REQUESTS
    ]
    editor = experts_editor("mixtral", value_steps=4, tokens_per_dimension=16)
    before = state_of(editor.model)
    report = editor.tune(
        tmp_path, facts, texts=CORPUS[:60], corpus=CORPUS, windows=[(2, 3)], ladders={"clamp_factor": (1.0, 4.0)}
    )
    assert all(trial.error is None for trial in report.trials)
    assert same(state_of(editor.model), before)
