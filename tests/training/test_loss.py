"""Losses of tokens and their gradients, against their definitions in torch."""

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from fistapruner.runtime.numerics import Budgets
from fistapruner.training.loss import token_losses


def drawn(seed: int, tokens: int, vocabulary: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own, dense = torch.randn(2, tokens, vocabulary, generator=generator) * spread
    return own, dense, torch.randint(vocabulary, (tokens,), generator=generator)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(2, 40), st.floats(0.1, 20))
def test_losses_are_what_torch_computes(seed: int, tokens: int, vocabulary: int, spread: float) -> None:
    own, dense, targets = drawn(seed, tokens, vocabulary, spread)
    exact = own.double().requires_grad_()
    log_q, log_p = exact.log_softmax(-1), dense.double().log_softmax(-1)
    kl = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    ce = cross_entropy(exact, targets, reduction="none")
    for share in (1.0, 0.0, 0.4):
        expected = share * kl + (1 - share) * ce
        (gradient,) = torch.autograd.grad(expected.sum(), exact, retain_graph=True)
        with patch("fistapruner.training.loss.BUDGETS", Budgets(rows=4 * vocabulary * 3)):
            value, found = token_losses(own, targets, dense if share else None, share, 0.5)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(2 * found.double(), gradient, rtol=1e-5, atol=1e-6)
        again, nothing = token_losses(own, targets, dense if share else None, share)
        assert nothing is None
        assert torch.equal(again, value)


def test_tokens_that_the_dense_model_rules_out_do_not_count() -> None:
    """A padded vocabulary: probability 0 there, whatever the model says."""
    own, dense, targets = drawn(0, 5, 12, 1.0)
    dense[:, 8:] = -torch.inf
    targets = targets.clamp_max(7)
    expected = kl_div(own.log_softmax(-1), dense.softmax(-1), reduction="none").nan_to_num(0.0).sum(-1)
    value, gradient = token_losses(own, targets, dense, 1.0, 1.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, own.softmax(-1) - dense.softmax(-1))
    own[:, 8:] = -torch.inf  # ruled out by both
    value, gradient = token_losses(own, targets, dense, 0.9, 1.0)
    assert bool(value.isfinite().all() and gradient.isfinite().all())
