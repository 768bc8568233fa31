"""MAMF: enough rounds that no task is missed, the same number of tokens from each task of a round."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fistapruner import FistaPrunerError
from fistapruner.papers.mamf import Mixture, shuffled


@pytest.mark.parametrize(
    ("tasks", "per_round", "rounds"), [(10, 3, 20), (10, 8, 5), (20, 5, 25), (10, 2, 31), (2, 1, 10)]
)
def test_rounds_follow_the_formula(tasks: int, per_round: int, rounds: int) -> None:
    """The first three are cases in which the published program stays below the bound; 2 of 1 is 2^-10 < 1e-3."""
    assert Mixture(tasks, per_round).rounds == rounds
    assert (1 - per_round / tasks) ** rounds <= 1e-3 < (1 - per_round / tasks) ** (rounds - 1)
    assert Mixture(tasks, tasks).rounds == Mixture(tasks).rounds == 1
    assert Mixture(10, 9).rounds == 3  # exact quotients are not rounded up
    assert Mixture(1000, 999).rounds == 1


def test_every_turn_has_all_numbers_in_an_order_of_its_own() -> None:
    turns = shuffled(torch.arange(20), 60, 0, "windows").view(3, 20).tolist()
    assert all(sorted(turn) == list(range(20)) for turn in turns)
    assert len(set(map(tuple, turns))) == 3


def test_no_task_is_missed_too_often() -> None:
    tasks, per_round, draws = 5, 2, 1000
    rounds = Mixture(tasks, per_round).rounds
    missed = torch.zeros(tasks)
    for seed in range(draws):
        drawn = Mixture(tasks, per_round, seed).draw(rounds * per_round)
        missed += torch.bincount(drawn, minlength=tasks) == 0
    # The probability is 0.6^14 = 7.8e-4, so 0.8 are expected of each task; 7 has a probability below 1e-4.
    assert int(missed.max()) <= 6
    assert 1 <= int(missed.sum()) <= 12


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data(), st.integers(0, 999))
def test_tasks_of_a_round_get_the_same_number_of_windows(tasks: int, data: st.DataObject, extra: int) -> None:
    per_round = data.draw(st.integers(1, tasks))
    mixture = Mixture(tasks, per_round, extra)
    windows = mixture.rounds * per_round + extra
    drawn = mixture.draw(windows).tolist()
    assert len(drawn) == windows
    for number in range(mixture.rounds):
        part = drawn[windows * number // mixture.rounds : windows * (number + 1) // mixture.rounds]
        counts = [part.count(task) for task in set(part)]
        assert len(counts) == per_round
        assert max(counts) - min(counts) <= 1
    with pytest.raises(FistaPrunerError, match="and there are"):
        mixture.draw(mixture.rounds * per_round - 1)
