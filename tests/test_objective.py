"""The loss of the target search with lookup tables for logits, against values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from hf_alphaedit.algorithm.objective import TargetLoss, target_loss


VOCABULARY, HIDDEN = 5, 4
# The probability of each of three target tokens, request 0: two rows of two tokens; request 1: two rows of one token.
PROBABILITIES = {(0, 0): (0.5, 0.25), (0, 1): (0.8, 0.1), (1, 0): (0.4,), (1, 1): (0.02,)}
LABELS = {0: (3, 1), 1: (4,)}


def row(probability: float, label: int) -> list[float]:
    """A distribution with this probability at the label; the rest is shared unevenly by the others."""
    shares = iter((0.4, 0.3, 0.2, 0.1))
    return [probability if token == label else (1 - probability) * next(shares) for token in range(VOCABULARY)]


def table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (t, vocabulary), labels, requests and weights (t,) of all positions."""
    rows, labels, requests, weights = [], [], [], []
    for (request, _), probabilities in PROBABILITIES.items():
        for probability, label in zip(probabilities, LABELS[request], strict=True):
            rows.append(row(probability, label))
            labels.append(label)
            requests.append(request)
            weights.append(1 / (2 * len(probabilities)))
    shift = torch.linspace(-7, 9, len(rows))[:, None]  # logits are log-probabilities up to a constant
    return torch.tensor(rows).log() + shift, torch.tensor(labels), torch.tensor(requests), torch.tensor(weights)


def loss_of(
    logits: Tensor,
    subject: Tensor | None = None,
    reference: Tensor | None = None,
    delta: Tensor | None = None,
    kl_factor: float = 0.0,
    weight_decay: float = 0.0,
) -> TargetLoss:
    _, labels, requests, weights = table()
    subject = torch.zeros(2, VOCABULARY) if subject is None else subject
    reference = subject.log_softmax(-1) if reference is None else reference
    delta = torch.zeros(2, HIDDEN) if delta is None else delta
    norm = torch.tensor([2.0, 3.0])
    return target_loss(logits, labels, requests, weights, subject, reference, delta, norm, kl_factor, weight_decay)


def test_likelihood_is_the_mean_over_rows_of_the_mean_over_tokens() -> None:
    loss = loss_of(table()[0])
    first = -(math.log(0.5) + math.log(0.25) + math.log(0.8) + math.log(0.1)) / 4
    second = -(math.log(0.4) + math.log(0.02)) / 2
    assert loss.likelihood.tolist() == pytest.approx([first, second], rel=1e-5)
    assert loss.total.tolist() == pytest.approx([first, second], rel=1e-5)
    assert loss.total.dtype == torch.float32


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits = table()[0].bfloat16()
    assert torch.equal(loss_of(logits).likelihood, loss_of(logits.float()).likelihood)


def test_gradient_of_the_likelihood() -> None:
    logits, labels, _, weights = table()
    logits.requires_grad_()
    loss_of(logits).total.sum().backward()
    expected = (logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, VOCABULARY)) * weights[:, None]
    torch.testing.assert_close(logits.grad, expected)


def test_argmax_asks_for_every_token_in_every_row() -> None:
    logits, labels, requests, _ = table()
    assert loss_of(logits).argmax.tolist() == [False, False]
    right = logits.scatter(1, labels[:, None], 99.0)
    assert loss_of(right).argmax.tolist() == [True, True]
    for position in range(len(labels)):
        wrong = right.clone()
        wrong[position, (labels[position] + 1) % VOCABULARY] = 100.0
        expected = [True, True]
        expected[requests[position]] = False
        assert loss_of(wrong).argmax.tolist() == expected


def test_divergence_is_zero_at_the_start() -> None:
    subject = torch.tensor([[1.0, 2.0, 0.0, -3.0, 0.5], [9.0, 0.0, 0.0, 0.0, 0.0]])
    assert loss_of(table()[0], subject, kl_factor=3.0).divergence.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_divergence_is_that_of_the_edited_from_the_unedited_distribution() -> None:
    edited = torch.tensor([[0.7, 0.1, 0.1, 0.05, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]])
    unedited = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2], [0.9, 0.025, 0.025, 0.025, 0.025]])
    loss = loss_of(table()[0], edited.log() + 4, unedited.log(), kl_factor=0.5)
    pairs = [list(zip(p.tolist(), q.tolist(), strict=True)) for p, q in zip(edited, unedited, strict=True)]
    assert loss.divergence.tolist() == pytest.approx(
        [0.5 * sum(p * math.log(p / q) for p, q in pair) for pair in pairs], rel=1e-5
    )
    assert loss.divergence.tolist() != pytest.approx(
        [0.5 * sum(q * math.log(q / p) for p, q in pair) for pair in pairs], rel=0.05
    )


def test_decay_is_the_norm_over_the_squared_norm_of_the_value() -> None:
    delta = torch.tensor([[3.0, 0.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    loss = loss_of(table()[0], delta=delta, weight_decay=0.5)
    assert loss.decay.tolist() == pytest.approx([0.5 * 5 / 4, 0.5 * 2 / 9])


def test_total_is_the_sum_and_carries_the_gradient() -> None:
    delta = torch.tensor([[3.0, 0.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    subject = torch.tensor([[1.0, 2.0, 0.0, -3.0, 0.5], [9.0, 0.0, 0.0, 0.0, 0.0]])
    loss = loss_of(table()[0], subject, torch.full((2, 5), 0.2).log(), delta, kl_factor=0.1, weight_decay=0.5)
    torch.testing.assert_close(loss.total, loss.likelihood + loss.divergence + loss.decay)
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in (loss.likelihood, loss.divergence, loss.decay))
    loss.total.sum().backward()
    norm = delta.detach().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(delta.grad, 0.5 * delta.detach() / norm / torch.tensor([[4.0], [9.0]]))


def test_gradient_at_the_start_is_finite() -> None:
    delta = torch.zeros(2, HIDDEN, requires_grad=True)
    loss_of(table()[0], delta=delta, weight_decay=0.5).total.sum().backward()
    assert delta.grad.count_nonzero() == 0
