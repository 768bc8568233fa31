"""Preference losses against their definitions, many-digit arithmetic, finite differences and MRPO's public code."""

from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fistapruner.papers.mrpo import (
    accuracy,
    clipped,
    fixed_weights,
    geometric_mean,
    harmonic_mean,
    held_out_weights,
    margins_of,
    pair_weights,
    preference_losses,
    reference_margins,
    weigh,
)

KINDS = ("dpo", "multi-dpo", "harmonic", "geometric")
BETA = 0.1

cases = given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6))


def drawn(seed: int, count: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the model and of references from -300 to -1, and weights."""
    generator = torch.Generator().manual_seed(seed)
    references = -1 - 299 * torch.rand(count, pairs, 2, generator=generator, dtype=torch.float64)
    model = -1 - 299 * torch.rand(pairs, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, pairs, generator=generator, dtype=torch.float64) + 0.01
    return model, references, weights / weights.sum(0)


def losses(kind: str, model: Tensor, references: Tensor, weights: Tensor) -> Tensor:
    margins, shares = reference_margins(kind, references, weights)  # type: ignore[arg-type]
    return preference_losses(margins_of(model), margins, shares, BETA)


def dpo(model: Tensor, reference: Tensor) -> Tensor:
    """The definition, by torch's own functions."""
    return -torch.nn.functional.logsigmoid(BETA * (margins_of(model) - margins_of(reference)))


@settings(max_examples=50, deadline=None)
@cases
def test_one_reference_or_equal_ones_are_dpo(seed: int, count: int, pairs: int) -> None:
    model, references, weights = drawn(seed, count, pairs)
    expected = dpo(model, references[0])
    for kind in KINDS:
        assert torch.allclose(losses(kind, model, references[:1], torch.ones(1, pairs).double()), expected, atol=1e-12)
        if kind != "dpo":
            equal = references[:1].expand(count, -1, -1)
            assert torch.allclose(losses(kind, model, equal, weights), expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, -1), st.floats(0.001, 1)), min_size=2, max_size=4))
def test_the_harmonic_mean_is_that_of_many_digits(references: list[tuple[float, float]]) -> None:
    total = sum(weight for _, weight in references)
    values = torch.tensor([[[value, value]] for value, _ in references], dtype=torch.float64)
    weights = torch.tensor([[weight / total] for _, weight in references], dtype=torch.float64)
    found = harmonic_mean(values, weights)
    with mpmath.workdps(200):
        inverse = mpmath.fsum(
            mpmath.mpf(float(weight)) / mpmath.exp(mpmath.mpf(value))
            for (value, _), weight in zip(references, weights[:, 0], strict=True)
        )
        expected = float(-mpmath.log(inverse))
    assert found[0].tolist() == pytest.approx([expected, expected], rel=1e-12, abs=1e-9)


@settings(max_examples=20, deadline=None)
@cases
def test_every_pair_has_its_own_weights(seed: int, count: int, pairs: int) -> None:
    model, references, weights = drawn(seed, count, pairs)
    for kind in KINDS[1:]:
        alone = [
            losses(kind, model[pair : pair + 1], references[:, pair : pair + 1], weights[:, pair : pair + 1])
            for pair in range(pairs)
        ]
        assert torch.allclose(losses(kind, model, references, weights), torch.cat(alone), rtol=1e-11, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_the_public_code_has_the_weights_swapped(seed: int, share: float) -> None:
    """thaihungle/MRPO: r_1 + r_2 - log(a exp(r_1) + (1 - a) exp(r_2)), a the weight of reference 1."""
    _, (first, second), _ = drawn(seed, 2, 3)
    most = torch.maximum(first, second)
    code = first + second - most - (share * (first - most).exp() + (1 - share) * (second - most).exp()).log()
    ours = torch.stack([first, second])
    swapped = torch.tensor([1 - share, share], dtype=torch.float64)[:, None].expand(-1, 3)
    assert torch.allclose(harmonic_mean(ours, swapped), code, rtol=1e-10)
    if abs(share - 0.5) > 0.01:
        assert not torch.allclose(harmonic_mean(ours, swapped.flip(0)), code, rtol=1e-10)


@settings(max_examples=30, deadline=None)
@cases
def test_gradients_are_the_closed_form_and_finite_differences(seed: int, count: int, pairs: int) -> None:
    model, references, weights = drawn(seed, count, pairs)
    for kind in KINDS[1:]:
        told = clipped(references, 0.1) if kind == "harmonic" else references
        margins, shares = reference_margins(kind, told, weights)  # type: ignore[arg-type]
        margin = margins_of(model).requires_grad_()
        (found,) = torch.autograd.grad(preference_losses(margin, margins, shares, BETA).sum(), margin)
        expected = (-BETA * shares * torch.sigmoid(-BETA * (margin.detach() - margins))).sum(0)
        assert torch.isfinite(found).all()
        assert torch.allclose(found, expected, atol=1e-14)
        with torch.no_grad():
            ahead, behind = (preference_losses(margin + step, margins, shares, BETA) for step in (1e-4, -1e-4))
        assert torch.allclose((ahead - behind) / 2e-4, found, atol=1e-8)


@settings(max_examples=50, deadline=None)
@cases
def test_clipping(seed: int, count: int, pairs: int) -> None:
    """All at 0 nothing is left but the base; a wide region changes nothing; in between values move monotonously."""
    _, references, _ = drawn(seed, count, pairs)
    base = references[:1].expand_as(references)
    assert torch.equal(clipped(references, 0.0), base)
    assert torch.equal(clipped(references, 1e9), references)
    distances = [(clipped(references, eta) - base).abs() for eta in (0.0, 0.01, 0.1, 1.0, 10.0)]
    assert all(bool((near <= far + 1e-9).all()) for near, far in pairwise(distances))
    mean = references.mean(0).abs()
    share = 0.1 * mean / mean.sum(-1, keepdim=True)
    inside = (references - base).abs() <= share * base.abs()
    assert torch.equal(clipped(references, 0.1)[inside], references[inside])
    assert bool(((clipped(references, 0.1) - base).abs() <= share * base.abs() * (1 + 1e-12)).all())
    fixed = clipped(references, -0.1)
    assert bool(((fixed - base).abs() <= 0.1 * base.abs() * (1 + 1e-12)).all())


@settings(max_examples=30, deadline=None)
@cases
def test_a_constant_added_to_a_reference(seed: int, count: int, pairs: int) -> None:
    """It changes no loss but the harmonic one, which is that one's weakness."""
    model, references, weights = drawn(seed, count + 1, pairs)
    moved = references.clone()
    moved[0] -= 7.0
    for kind in ("multi-dpo", "geometric"):
        before, after = (losses(kind, model, each, weights) for each in (references, moved))
        assert torch.allclose(before, after, atol=1e-10)
    assert torch.allclose(losses("dpo", model, references[:1], weights[:1]), dpo(model, moved[0]), atol=1e-10)


def test_weights() -> None:
    references = torch.tensor([[[-1.0, -5.0], [-5.0, -1.0]], [[-1.0, -2.0], [-1.0, -2.0]]], dtype=torch.float64)
    assert held_out_weights(references).tolist() == pytest.approx([0.5 / 1.5, 1 / 1.5])
    assert held_out_weights(references, "margin").tolist() == pytest.approx([4 / 5, 1 / 5])
    assert pair_weights(references).flatten().tolist() == pytest.approx([0.8, 0.8, 0.2, 0.2], abs=1e-5)
    assert fixed_weights(torch.tensor([1.0, 3.0]), 2).tolist() == [[0.25, 0.25], [0.75, 0.75]]
    for rule, expected in {"fixed": [0.5, 0.5], "held-out": [0.5, 0.5], "held-out-margin": [0.8, 0.2]}.items():
        assert weigh(references, rule, [0])[:, 1].tolist() == pytest.approx(expected)  # the first pair is held out
    equal = torch.zeros(2, 3, 2).double()
    assert pair_weights(equal).tolist() == [[0.5] * 3] * 2
    assert held_out_weights(equal - torch.tensor([0.0, 1.0]).double().flip(0)).tolist() == [0.5, 0.5]
    _, drawn_references, _ = drawn(4, 3, 5)  # swapped answers change no weight of a pair
    assert torch.equal(pair_weights(drawn_references), pair_weights(drawn_references.flip(-1)))


@pytest.mark.parametrize("kind", ["multi-dpo", "geometric"])
def test_per_pair_weights_do_not_lower_the_loss_where_references_know_nothing(kind: str) -> None:
    """Random margins, a model without one, and both orders of the answers."""
    _, references, _ = drawn(5, 2, 200)
    model, equal = torch.zeros(200, 2).double(), torch.full((2, 200), 0.5).double()
    by_pair, by_half = (
        losses(kind, model, references, weights) + losses(kind, model, references.flip(-1), weights)
        for weights in (pair_weights(references), equal)
    )
    assert bool((by_pair >= by_half - 1e-12).all())
    assert float(by_pair.mean()) > float(by_half.mean())


def test_geometric_weights_mix_margins() -> None:
    _, references, weights = drawn(3, 3, 4)
    mixed = margins_of(geometric_mean(references, weights))
    assert torch.allclose(mixed, (weights * margins_of(references)).sum(0), atol=1e-10)


def test_ties_count_one_half() -> None:
    assert float(accuracy(torch.tensor([1.0, 0.0, -1.0, 2.0]))) == 0.625
