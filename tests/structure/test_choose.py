"""The choice of channels: scores by their definition, elimination against brute force."""

from itertools import combinations

import pytest
import torch
from problems import CHANNELS, COUNT, ROWS, brute, by, make, statistics, unshrunk

from fistapruner import LayerProblem
from fistapruner.structure.choose import channel_scores, eliminate
from fistapruner.structure.refit import ChannelStatistics, removal_error, remove_channels, shrunk


def test_scores_are_what_they_are_called() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(COUNT, CHANNELS, generator=generator) + torch.arange(CHANNELS)
    weight = torch.randn(ROWS, CHANNELS, generator=generator)
    known = statistics(weight, inputs)
    energy = (inputs[:, None, :] * weight).double().square().sum(1).mean(0)
    flap = weight.double().square().sum(0) * inputs.double().var(0, correction=0)
    torch.testing.assert_close(channel_scores("energy", known.problem, known.mean), energy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(channel_scores("flap", known.problem, known.mean), flap, rtol=1e-3, atol=1e-3)
    magnitude = channel_scores("magnitude", known.problem, known.mean)
    torch.testing.assert_close(magnitude, weight.double().square().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("drift", "target", "share"), [(0.0, 1.0, 0.0), (0.3, 0.5, 0.0), (0.3, 0.5, 0.4)])
def test_the_channel_that_costs_least_goes_next(drift: float, target: float, share: float, block: int) -> None:
    """Blocks of more than all subsets are tried of, too."""
    channels = 28 if block > 1 else CHANNELS
    problem = shrunk(make(drift, target, channels=channels), share)
    order, warnings = eliminate(problem, channels // block - 1, block)
    assert not warnings
    left = set(range(channels // block))
    for channel in order:

        def cost(gone: int, left: frozenset[int] = frozenset(left)) -> float:
            return brute(problem, torch.tensor([i for i in range(channels) if i // block in left - {gone}]))

        assert cost(channel) == pytest.approx(min(map(cost, left)), rel=1e-6)
        left.remove(channel)


@pytest.mark.parametrize(("seed", "drift", "target"), [(21, 0.3, 0.5), (23, 0.3, 0.5), (0, 0.0, 1.0)])
def test_of_few_blocks_those_that_cost_least_together_go(seed: int, drift: float, target: float) -> None:
    """Greedily others would, with the first two seeds."""
    problem = make(drift, target, seed=seed, channels=12)

    def cost(kept: tuple[int, ...]) -> float:
        return brute(problem, torch.tensor([i for i in range(12) if i // 2 in kept]))

    best = min(combinations(range(6), 3), key=cost)
    known = unshrunk(ChannelStatistics(problem, torch.zeros(12), None))
    assert remove_channels(known, 3, by("obs"), block=2).keep.tolist() == list(best)


def test_channels_that_others_replace_go_first_at_no_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(COUNT, CHANNELS, generator=generator)
    inputs[:, 5] = inputs[:, 2]
    inputs[:, 6] = 0.5 * inputs[:, 1] - 2 * inputs[:, 4]
    inputs[:, 7] = 0.0
    weight = torch.randn(ROWS, CHANNELS, generator=generator)
    known = unshrunk(statistics(weight, inputs))
    order, _ = eliminate(known.problem, 3)
    assert order[0] == 7
    assert len({2, 5} & set(order)) == len({1, 4, 6} & set(order)) == 1
    removal = remove_channels(known, CHANNELS - 2, by("obs"))  # the dead one and one of the others
    assert removal_error(known, removal.places, removal.weight) < 1e-6


def test_of_near_copies_one_stays_in_long_eliminations_too() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 700, generator=generator)
    inputs[:, :60] = inputs[:, 60:120] + 0.02 * torch.randn(2000, 60, generator=generator)
    problem = LayerProblem.from_activations(torch.randn(40, 700, generator=generator), inputs)
    gone = set(eliminate(problem, 330)[0])
    assert len(gone) == 330
    assert not [channel for channel in range(60) if {channel, channel + 60} <= gone]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize(("tokens", "channels"), [(60, 48), (20, 48), (100, 300)])
def test_inputs_without_full_rank_are_eliminated_too(tokens: int, channels: int, block: int) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(tokens, channels, generator=generator)
    dense[:, 2], dense[:, 3] = dense[:, 5], 0.0
    seen = dense + 0.3 * torch.randn(tokens, channels, generator=generator)
    problem = LayerProblem.from_activations(torch.randn(ROWS, channels, generator=generator), seen, dense)
    order, _ = eliminate(problem, channels // block - 1, block)
    assert len(set(order)) == channels // block - 1


def test_importance_of_rows_decides_which_channels_stay() -> None:
    """A channel that only an unimportant row reads goes."""
    weight = torch.eye(2).repeat(1, 2)  # row 0 reads channels 0 and 2, row 1 channels 1 and 3
    known = statistics(weight, torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(0)))
    for first, second, kept in ((1.0, 1e-6, [0, 2]), (1e-6, 1.0, [1, 3])):
        removal = remove_channels(known, 2, by("obs"), importance=torch.tensor([first, second]))
        assert removal.keep.tolist() == kept
