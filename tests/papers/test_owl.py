"""OWL: outliers are counted against the layer's mean, and layers with more of them keep more weights."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fistapruner.core import ProblemSums, Unstructured
from fistapruner.models.operators import Layout, Operator
from fistapruner.papers.owl import REACH, Outliers


def gathered(outliers: list[int], width: int = 40) -> tuple[Outliers, dict[str, int]]:
    """Layers of two operators on inputs of mean square 1, with so many outliers; and the sizes of operators."""
    names = ("a", "b")
    layers = tuple(tuple((Operator.of(name, nn.Linear(width, 10, bias=False)),) for name in names) for _ in outliers)
    layout = Layout("layers", layers, (), ())
    found = Outliers(layout)
    for index, count in enumerate(outliers):
        for number in range(2):
            weight = torch.ones(10, width)
            weight.view(-1)[: count if number == 0 else 0] = 100.0
            sums = ProblemSums(weight)
            sums.add(torch.ones(3, width))
            found.add(index, number, sums)
    return found, dict.fromkeys((name for name, _ in layout.operators()), 10 * width)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.05, 0.95))
def test_layers_with_more_outliers_keep_more_and_the_total_is_exact(outliers: list[int], fraction: float) -> None:
    found, sizes = gathered(outliers)
    split = found.allocation(sizes, fraction)
    zeros = {name: pattern.zeros(1, sizes[name]) for name, pattern in split.items()}
    assert sum(zeros.values()) == sum(Unstructured(fraction).zeros(1, size) for size in sizes.values())
    assert max(abs(pattern.fraction - fraction) for pattern in split.values()) <= 2 * REACH + 0.01
    order = sorted(range(len(outliers)), key=lambda index: outliers[index])
    for less, more in itertools.pairwise(order):
        assert zeros[f"layers.{more}.a"] <= zeros[f"layers.{less}.a"] + 1
