"""The published procedure in benchmarks/reference.py, against direct computations on tiny random models."""

from dataclasses import replace

import pytest
import reference
import torch
from reference import Settings
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer


LAYERS = (1, 2)
CONTEXTS = [["{}"], ["The river runs. {}", "You see. {}"]]
REQUESTS = [
    {"prompt": "The home of {} is", "subject": "Ada Lovelace", "target_new": "Paris"},
    {"prompt": "{} plays the", "subject": "Miles", "target_new": " big drum"},
    {"prompt": "It is said that {} speaks", "subject": "Søren", "target_new": "Danish"},
]
GPT2_NAMES = {
    "block": "transformer.h.{}",
    "down_projection": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
}


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Model:
    return tiny_model(family, initializer_range=0.2)


@pytest.fixture
def settings(family: str) -> Settings:
    names = GPT2_NAMES if family == "gpt2" else {}
    return Settings(layers=LAYERS, v_lr=0.5, **names)


def blocks_and_projections(model: Model) -> tuple[list, list]:
    if isinstance(model, GPT2LMHeadModel):
        return list(model.transformer.h), [block.mlp.c_proj for block in model.transformer.h]
    return list(model.model.layers), [block.mlp.down_proj for block in model.model.layers]


@torch.no_grad()
def seen_by(model: Model, module: torch.nn.Module, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output (tokens, width) of a module and the logits (tokens, V), for one row that needs no padding."""
    seen = []
    handle = module.register_forward_hook(lambda _, arguments, output: seen.append((arguments[0], output)))
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    handle.remove()
    inside, outside = seen[0]
    return inside[0], (outside[0] if isinstance(outside, tuple) else outside)[0], logits


def rank_deficient_moment(size: int, generator: torch.Generator) -> Tensor:
    factor = torch.randn(size, size // 2, generator=generator, dtype=torch.float64)
    return factor @ factor.T / size


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["subject"])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("bos", [False, True])
def test_subject_is_where_the_prefix_up_to_it_ends(request_: dict, kind: str, bos: bool) -> None:
    tokenizer = tiny_tokenizer(kind, bos=bos)
    for context in ("{}", "The river runs. {}"):
        ids, subject = reference.encode_row(tokenizer, context, request_["prompt"], request_["subject"])
        text = context.replace("{}", request_["prompt"]).replace("{}", request_["subject"])
        until_subject = text[: text.index(request_["subject"]) + len(request_["subject"])]
        assert ids == tokenizer(text)["input_ids"]
        assert subject == len(tokenizer(until_subject)["input_ids"]) - 1


def test_target_gets_one_space_and_may_not_be_empty(tokenizer: Tokenizer) -> None:
    assert reference.encode_target(tokenizer, "Paris") == reference.encode_target(tokenizer, " Paris")
    assert tokenizer.decode(reference.encode_target(tokenizer, "Paris")) == " Paris"
    with pytest.raises(ValueError, match="empty"):
        reference.encode_target(tokenizer, "")


def test_contexts_follow_their_seed(model: Model, tokenizer: Tokenizer) -> None:
    first = reference.generate_contexts(model, tokenizer, seed=3)
    assert first == reference.generate_contexts(model, tokenizer, seed=3)
    assert first != reference.generate_contexts(model, tokenizer, seed=4)
    assert [len(group) for group in first] == [1, 5]
    assert all(context.count("{}") == context.count("{") == 1 for group in first for context in group)


def test_second_moment_is_the_mean_over_real_tokens(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    texts = ["The home of Ada", "Frida plays the drum and the river runs by the home", "", "You"]
    _, projections = blocks_and_projections(model)
    rows = [tokenizer(text)["input_ids"] for text in texts if text]
    keys = torch.cat([seen_by(model, projections[1], row)[0] for row in rows]).double()
    expected = (keys.T @ keys / len(keys)).float()
    for options in ({}, {"stop_early": True}, {"batch_tokens": 8}):
        moment = reference.second_moment(model, tokenizer, texts, 1, settings.down_projection, **options)
        torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-6)


def test_second_moment_of_token_blocks(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    tokens = torch.randint(0, 512, (5, 12), generator=torch.Generator().manual_seed(1))
    _, projections = blocks_and_projections(model)
    keys = torch.cat([seen_by(model, projections[2], row)[0] for row in tokens.tolist()])
    moment = reference.second_moment(model, tokenizer, tokens, 2, settings.down_projection)
    torch.testing.assert_close(moment, keys.T @ keys / 60, rtol=1e-5, atol=1e-6)


def test_projector_keeps_the_quiet_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([5.0, 3.0, 1.0, 0.6, 0.3, 0.1], dtype=torch.float64)  # sum 10
    moment = basis @ values.diag() @ basis.T
    for rule, kept in (({"threshold": 0.5}, 2), ({"energy_share": 0.11}, 3), ({"energy_share": 0.51}, 5)):
        projection = reference.projector(moment, **rule)
        torch.testing.assert_close(projection, basis[:, -kept:] @ basis[:, -kept:].T)
        torch.testing.assert_close(projection @ projection, projection)
    with pytest.raises(ValueError, match="either"):
        reference.projector(moment)


def test_dense_solve_equals_the_dual_form() -> None:
    generator = torch.Generator().manual_seed(5)
    moment = rank_deficient_moment(20, generator)
    projection = reference.projector(moment, threshold=0.5)
    past, keys, residual = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, 4), (20, 3), (7, 3))
    )
    solution = reference.solve_dense(projection, keys, past @ past.T, residual, 2.0)
    projected = projection @ torch.cat([past, keys], 1)  # (20, 7)
    system = projected.T @ projected + 2.0 * torch.eye(7, dtype=torch.float64)
    dual = (projected @ torch.linalg.inv(system))[:, 4:] @ residual.T
    torch.testing.assert_close(solution, dual, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(projection @ solution, solution, rtol=1e-10, atol=1e-12)
    single = reference.solve_dense(*(x.float() for x in (projection, keys, past @ past.T, residual)), 2.0)
    torch.testing.assert_close(single.double(), dual, rtol=1e-3, atol=1e-5)


def test_one_step_returns_the_clean_hidden_state(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    once = replace(settings, v_num_grad_steps=1)
    for request in REQUESTS:
        target, steps = reference.compute_target(model, tokenizer, request, 2, CONTEXTS, once)
        ids, subject = reference.encode_row(tokenizer, "{}", request["prompt"], request["subject"])
        blocks, _ = blocks_and_projections(model)
        torch.testing.assert_close(target, seen_by(model, blocks[2], ids)[1][subject], rtol=1e-5, atol=1e-5)
        assert len(steps) == 1


def test_first_loss_is_the_teacher_forced_nll(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    blocks, _ = blocks_and_projections(model)
    for request in REQUESTS:
        target = reference.encode_target(tokenizer, request["target_new"])
        losses = []
        for context in sum(CONTEXTS, []):
            ids, _ = reference.encode_row(tokenizer, context, request["prompt"], request["subject"])
            logits = seen_by(model, blocks[0], ids + target)[2]
            losses.append(torch.nn.functional.cross_entropy(logits[len(ids) - 1 : -1], torch.tensor(target)))
        _, steps = reference.compute_target(model, tokenizer, request, 2, CONTEXTS, settings)
        assert steps[0]["nll"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert steps[0]["decay"] == 0
        assert steps[-1]["loss"] < steps[0]["loss"]


def test_updates_are_one_fewer_than_forwards(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    """Adam's first update moves every coordinate by the learning rate, so one update has norm lr * sqrt(h)."""
    loose = replace(settings, clamp_norm_factor=1e6, v_lr=0.01)
    steps = {count: replace(loose, v_num_grad_steps=count) for count in (1, 2)}
    before, after = (
        reference.compute_target(model, tokenizer, REQUESTS[0], 2, CONTEXTS, steps[count])[0] for count in (1, 2)
    )
    assert (after - before).norm().item() == pytest.approx(0.01 * 32**0.5, rel=1e-3)


def test_second_loss_is_that_of_the_moved_subject(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    """Row by row, with delta added by hand: NLL, KL at the subject of "{} is a" and decay of the second forward."""
    short = {count: replace(settings, v_num_grad_steps=count) for count in (1, 2)}
    clean, after = (
        reference.compute_target(model, tokenizer, REQUESTS[1], 2, CONTEXTS, short[count]) for count in (1, 2)
    )
    delta = after[0] - clean[0]
    blocks, _ = blocks_and_projections(model)

    def log_probabilities(ids: list[int], subject: int, moved: bool) -> Tensor:
        def move(_: torch.nn.Module, __: tuple, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[0, subject] += delta * moved
            return changed

        handle = blocks[2].register_forward_hook(move)
        logits = seen_by(model, blocks[0], ids)[2]
        handle.remove()
        return logits.log_softmax(-1)

    target = reference.encode_target(tokenizer, REQUESTS[1]["target_new"])
    losses = []
    for context in sum(CONTEXTS, []):
        ids, subject = reference.encode_row(tokenizer, context, REQUESTS[1]["prompt"], REQUESTS[1]["subject"])
        rows = log_probabilities(ids + target, subject, True)[len(ids) - 1 : -1]
        losses.append(-rows[torch.arange(len(target)), target].mean())
    ids, subject = reference.encode_row(tokenizer, "{}", "{} is a", REQUESTS[1]["subject"])
    now, first = (log_probabilities(ids, subject, moved)[subject] for moved in (True, False))
    step = after[1][1]
    assert step["nll"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert step["kl"] == pytest.approx(0.0625 * (now.exp() * (now - first)).sum().item(), rel=1e-3)
    assert step["decay"] == pytest.approx(0.5 * (delta.norm() / clean[0].norm() ** 2).item(), rel=1e-4)
    assert step["loss"] == pytest.approx(step["nll"] + step["kl"] + step["decay"], rel=1e-5)


def test_clamp_and_side_effects(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    frozen = model.get_submodule(settings.head).weight.requires_grad_(False)
    tight = replace(settings, clamp_norm_factor=0.1)
    once = replace(settings, v_num_grad_steps=1)
    target, steps = reference.compute_target(model, tokenizer, REQUESTS[0], 2, CONTEXTS, tight)
    clean, _ = reference.compute_target(model, tokenizer, REQUESTS[0], 2, CONTEXTS, once)
    assert len(steps) == tight.v_num_grad_steps
    assert (target - clean).norm().item() == pytest.approx(0.1 * clean.norm().item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad == (parameter is not frozen) for parameter in model.parameters())


def test_keys_weigh_the_groups_equally(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    keys = reference.compute_keys(model, tokenizer, REQUESTS, 1, CONTEXTS, settings)
    _, projections = blocks_and_projections(model)
    for column, request in enumerate(REQUESTS):
        expected = torch.zeros(64)
        for context, weight in (("{}", 0.5), *((context, 0.25) for context in CONTEXTS[1])):
            ids, subject = reference.encode_row(tokenizer, context, request["prompt"], request["subject"])
            expected += weight * seen_by(model, projections[1], ids)[0][subject]
        torch.testing.assert_close(keys[:, column], expected, rtol=1e-4, atol=1e-5)


def test_edits_reach_their_targets_and_nothing_else_is_written(
    model: Model, tokenizer: Tokenizer, settings: Settings
) -> None:
    """Without projection, with a vanishing ridge and the bare context, the solve must reproduce every target."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = replace(settings, l2=1e-6, v_num_grad_steps=4)
    projectors = {layer: torch.eye(64) for layer in LAYERS}
    record = reference.apply_edits(model, tokenizer, REQUESTS, [["{}"]], projectors, exact)
    values = reference.current_values(model, tokenizer, REQUESTS, LAYERS[-1], exact)
    torch.testing.assert_close(values.T, record.targets, rtol=1e-2, atol=1e-2)
    written = {f"{settings.down_projection.format(layer)}.weight": layer for layer in LAYERS}
    for name, value in model.state_dict().items():
        if name in written:
            torch.testing.assert_close(value, before[name] + record.deltas[written[name]])
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name
    assert set(record.seconds) == {"targets", "keys", "values", "solve", "write", "past keys"}


def test_second_batch_respects_the_first(model: Model, tokenizer: Tokenizer, settings: Settings) -> None:
    generator = torch.Generator().manual_seed(7)
    projectors = {
        layer: reference.projector(rank_deficient_moment(64, generator).float(), threshold=0.01) for layer in LAYERS
    }
    targets = torch.randn(3, 32, generator=generator)
    first = reference.apply_edits(model, tokenizer, REQUESTS[:2], CONTEXTS, projectors, settings, targets=targets[:2])
    for layer in LAYERS:  # the published second key pass finds the keys of the first
        keys = first.keys[layer]
        torch.testing.assert_close(first.past_grams[layer], keys @ keys.T, rtol=1e-4, atol=1e-4)
    second = reference.apply_edits(
        model,
        tokenizer,
        REQUESTS[2:],
        CONTEXTS,
        projectors,
        settings,
        targets=targets[2:],
        past_grams=first.past_grams,
        second_key_pass=False,
    )
    for layer in LAYERS:
        keys, past = second.keys[layer].double(), first.keys[layer].double()
        projection = projectors[layer].double()
        system = projection @ (keys @ keys.T + past @ past.T) + 10.0 * torch.eye(64, dtype=torch.float64)
        update = torch.linalg.inv(system) @ projection @ keys @ second.residuals[layer].double().T  # (d, h)
        delta = second.deltas[layer] if isinstance(model, GPT2LMHeadModel) else second.deltas[layer].T
        torch.testing.assert_close(delta.double(), update, rtol=1e-2, atol=1e-4 * update.abs().max().item())
        torch.testing.assert_close(
            second.past_grams[layer].double(), past @ past.T + keys @ keys.T, rtol=1e-4, atol=1e-4
        )
