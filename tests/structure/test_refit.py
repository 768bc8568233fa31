"""The weights of the channels that stay: optimality, shrinkage by cross-validation, bias, statistics."""

from itertools import combinations

import pytest
import torch
from problems import CHANNELS, brute, by, make, statistics, unshrunk
from torch import Tensor

from fistapruner import LayerProblem
from fistapruner.structure.refit import (
    GRID,
    ChannelStatistics,
    ChannelSums,
    refitted,
    removal_error,
    remove_channels,
    shrunk,
    validation_errors,
)


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.3, 0.5)])
def test_every_subset_has_its_least_squares_weights(drift: float, target: float) -> None:
    problem = make(drift, target)
    for size in range(1, CHANNELS):
        for kept in combinations(range(CHANNELS), size):
            keep = torch.tensor(kept)
            small = problem.restricted(keep)
            weight, warnings = refitted(small)
            assert not warnings
            assert float(small.row_errors(weight).sum()) == pytest.approx(brute(problem, keep), rel=1e-4, abs=1e-4)
            scale = float((problem.weight @ problem.gram).abs().max())
            assert float(small.gradient(weight).abs().max()) < 1e-4 * scale
            assert small.relative_error(weight) <= small.dense_error() + 1e-6  # type: ignore[index]


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_shrinkage_is_a_penalty_on_the_change_of_each_channel(share: float) -> None:
    """Of ``share / (1 - share) H_jj``, with drift too: the minimum from the Gram and the drift before shrinkage."""
    problem = make(0.3, 0.5)
    gram = problem.gram.double()
    penalised = gram + share / (1 - share) * torch.diag(gram.diagonal())
    change = torch.linalg.solve(penalised, problem.drift.double(), left=False)
    found = refitted(shrunk(problem, share))[0]
    torch.testing.assert_close(found.double(), problem.weight + change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["obs", "energy", "flap", "magnitude"])
def test_a_refit_is_never_worse_than_dropping_on_its_own_tokens(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(60, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    known = statistics(weight, inputs)
    fitted = remove_channels(known, 16, by(method, "refit"))
    assert removal_error(known, fitted.places, fitted.weight) <= fitted.dropped
    assert fitted.shrink in [share / (2 - share) for share in GRID]
    assert fitted.validated is not None
    alone = remove_channels(known, 16, by(method, "none"))
    assert alone.validated is None
    assert removal_error(known, alone.places, alone.weight) == pytest.approx(alone.dropped)
    assert torch.equal(alone.weight, weight[:, alone.keep])


def test_the_share_is_near_the_best_on_fresh_tokens_and_grows_as_tokens_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    channels, keep = 64, torch.arange(44)
    factors = torch.randn(8, channels, generator=generator) * 0.5
    weight = torch.randn(16, channels, generator=generator)

    def draw(tokens: int) -> Tensor:
        common = torch.randn(tokens, 8, generator=generator) @ factors
        return common + torch.randn(tokens, channels, generator=generator)

    truth, chosen = LayerProblem.from_activations(weight, draw(50_000)).restricted(keep), []
    for tokens in (100, 400, 6400):
        known = statistics(weight, draw(tokens))
        removal = remove_channels(known, len(keep), by("obs"), chosen=keep)
        fits = [refitted(shrunk(known.problem, share).restricted(keep))[0] for share in GRID]
        best = min(float(truth.row_errors(fit).sum()) for fit in fits)
        assert float(truth.row_errors(removal.weight).sum()) < 1.05 * best
        chosen.append(removal.shrink or 0.0)
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_validation_errors_are_those_of_fits_on_the_other_half(share: float, biased: bool) -> None:
    """On tokens, by least squares with the penalty on the changes of every channel in its own units.

    The bias is that of the fitted half.
    """
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(80, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    inputs = (inputs + torch.arange(12) * biased).double()
    weight, keep = torch.randn(5, 12, generator=generator).double(), torch.tensor([0, 2, 3, 5, 6, 9, 11])
    problem = LayerProblem.from_activations(weight.float(), inputs.float())
    expected, halves = 0.0, (inputs[:40], inputs[40:])
    for fitted, fresh in (halves, halves[::-1]):
        mean = fitted.mean(0) * biased
        root, test = (1 - share) ** 0.5 * (fitted - mean), fresh - mean
        penalty = torch.diag(share * (fitted - mean).square().sum(0)).sqrt()  # those that go change by -W_j
        rows = torch.cat([root, penalty])
        found = torch.linalg.lstsq(rows[:, keep], rows @ weight.T).solution.T
        expected += float((test[:, keep] @ found.T - test @ weight.T).square().sum() / len(fresh)) / 2
    expected /= float((inputs @ weight.T).square().sum() / len(inputs))
    grams, means = [(half.T @ half / 40).float() for half in halves], [half.mean(0) for half in halves]
    told = means if biased else None
    assert validation_errors(problem, grams, keep, [share], told)[0] == pytest.approx(expected, rel=1e-3)
    known = ChannelStatistics(problem, inputs.mean(0), (grams[0], grams[1]), None, (means[0], means[1]))
    removal = remove_channels(known, len(keep), by("obs"), chosen=keep, biased=biased)
    assert removal.validated == pytest.approx(min(validation_errors(problem, grams, keep, means=told)))


def test_the_bias_of_flap_takes_the_mean_of_what_goes() -> None:
    generator = torch.Generator().manual_seed(1)
    dense, noise = torch.randn(2, 60, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    dense += torch.arange(12.0)
    for seen in (dense, dense + 0.3 * noise + 0.1):
        sums = ChannelSums(weight, 4, drift_from=None if seen is dense else "outputs")
        for window in range(4):
            rows = slice(15 * window, 15 * window + 15)
            sums.add(window, seen[rows][None], None if seen is dense else dense[rows] @ weight.T)
        known = sums.statistics("operator", 1.0)
        removal = remove_channels(known, 8, by("flap"), biased=True)
        gone = [channel for channel in range(12) if channel not in removal.keep.tolist()]
        torch.testing.assert_close(removal.bias, weight[:, gone] @ seen.mean(0)[gone], rtol=1e-4, atol=1e-4)
        assert torch.equal(removal.weight, weight[:, removal.keep])
        outputs = seen[:, removal.keep] @ removal.weight.T + removal.bias
        wanted = dense @ weight.T
        expected = float((outputs - wanted).square().sum() / wanted.square().sum())
        found = removal_error(known, removal.places, removal.weight, removal.bias)
        assert found == pytest.approx(expected, rel=1e-3)
        assert found < removal.dropped
        around = known.around(weight + 0.1 * torch.randn(5, 12, generator=generator))
        assert removal_error(around, removal.places, removal.weight, removal.bias) == pytest.approx(found, rel=1e-3)
        assert remove_channels(known, 8, by("flap")).bias is None


def with_intercept(inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    """Least-squares weights and bias, and their squared error a token, in fp64."""
    inputs = torch.cat((inputs, torch.ones(len(inputs), 1)), 1).double()
    found = torch.linalg.lstsq(inputs, target.double()).solution
    return found[:-1].T, found[-1], float((inputs @ found - target).square().sum() / len(inputs))


@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5)])
def test_a_refit_with_a_bias_is_least_squares_with_an_intercept(drift: float, target: float) -> None:
    generator = torch.Generator().manual_seed(2)
    dense, noise = torch.randn(2, 80, 9, generator=generator)
    dense = dense @ torch.randn(9, 9, generator=generator) + torch.arange(9.0) * 0.7
    seen = dense + drift * (noise + 0.5)
    weight = torch.randn(5, 9, generator=generator)
    sums = ChannelSums(weight, 4, drift_from="outputs" if drift else None)
    for window, (inputs, outputs) in enumerate(zip(seen.split(20), (dense @ weight.T).split(20), strict=True)):
        sums.add(window, inputs[None], outputs if drift else None)
    known = unshrunk(sums.statistics("operator", target))
    wanted = (target * dense + (1 - target) * seen).double() @ weight.T.double()
    energy = float((dense.double() @ weight.T.double()).square().sum() / 80)
    for count in (8, 5):
        removal = remove_channels(known, count, by("obs"), biased=True)
        values, intercept, error = with_intercept(seen[:, removal.places], wanted)
        change = intercept if removal.bias is None else removal.bias.double() - intercept
        torch.testing.assert_close(removal.weight.double(), values, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=5e-3)
        found = removal_error(known, removal.places, removal.weight, removal.bias)
        assert found == pytest.approx(error / energy, rel=1e-3)
        alone = remove_channels(known, count, by("obs"), chosen=removal.keep)
        assert alone.bias is None
        assert found < removal_error(known, alone.places, alone.weight)
        if count == 8:  # obs knows what the bias makes up for
            singles = [with_intercept(seen[:, [k for k in range(9) if k != j]], wanted)[2] for j in range(9)]
            assert removal.keep.tolist() == [k for k in range(9) if k != min(range(9), key=lambda j: singles[j])]


@pytest.mark.parametrize(
    ("compared", "splits"),
    [
        (1, ([1, 1, 1, 1, 1], [1, 2, 2], [1, 3, 1], [1, 4])),
        (3, ([1, 1, 1, 1, 1], [2, 1, 2], [3, 2])),
        (5, ([1, 1, 1, 1, 1], [2, 2, 1], [3, 2], [5])),
    ],
)
def test_statistics_are_the_same_for_all_batch_sizes(compared: int, splits: tuple[list[int], ...]) -> None:
    """A batch across the middle window is cut; the dense model ran on the first windows only."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 7, 6, generator=generator) + torch.arange(6.0)
    weight = torch.randn(3, 6, generator=generator)
    dense = inputs @ weight.T + torch.randn(5, 7, 3, generator=generator)
    residual = torch.randn(5, 7, 3, generator=generator)
    parts = inputs[:2].reshape(-1, 6), inputs[2:].reshape(-1, 6)
    drift = (dense - inputs @ weight.T + residual)[:compared].reshape(-1, 3).double().mean(0)
    for sizes in splits:
        sums = ChannelSums(weight, 5, drift_from="outputs")
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            told = (dense[rows].reshape(-1, 3), residual[rows].reshape(-1, 3)) if rows.stop <= compared else ()
            sums.add(start, inputs[rows], *told)
            start += size
        known = sums.statistics("operator", 1.0)
        for gram, mean, part in zip(known.halves, known.half_means, parts, strict=True):
            torch.testing.assert_close(gram, part.T @ part / len(part), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mean, part.double().mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(known.mean, inputs.double().mean((0, 1)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(known.drift_mean, drift, rtol=1e-5, atol=1e-5)


def test_an_operator_whose_weights_are_zero_loses_channels_without_an_error() -> None:
    known = statistics(torch.zeros(3, 9), torch.randn(80, 9, generator=torch.Generator().manual_seed(2)))
    removal = remove_channels(unshrunk(known), 5, by("obs"), biased=True)
    assert removal_error(known, removal.places, removal.weight, removal.bias) == 0.0
