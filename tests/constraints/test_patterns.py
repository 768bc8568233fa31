"""Patterns are exact: parsing, projection, verification."""

from __future__ import annotations

import pytest
import torch
from fistapruner.constraints.selection import bisect_kth_largest
from hypothesis import given, settings
from hypothesis import strategies as st

from fistapruner import FistaPrunerError
from fistapruner.core import NM, Unstructured, parse_sparsity
from fistapruner.core.constraints import counted_sparsity
from fistapruner.core.selection import keep_largest, keep_n_of_m


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (0.5, Unstructured(0.5)),
        ("0.5", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        (" 62.5 % ", Unstructured(0.625)),
        (0, Unstructured(0.0)),
        ("2:4", NM(2, 4)),
        ("4 : 8", NM(4, 8)),
        (NM(1, 2), NM(1, 2)),
    ],
)
def test_parse(written: object, meant: object) -> None:
    assert parse_sparsity(written) == meant  # type: ignore[arg-type]
    assert parse_sparsity(str(meant)) == meant


@pytest.mark.parametrize("wrong", [1.0, -0.1, 50, "150%", "4:2", "2:2", "0:4", "half", "", "nan", float("nan"), True])
def test_parse_refuses_and_names_the_value(wrong: object) -> None:
    with pytest.raises(FistaPrunerError) as error:
        parse_sparsity(wrong)  # type: ignore[arg-type]
    assert any(text in str(error.value) for text in (str(wrong), "1.5", "n:m"))


@pytest.mark.parametrize(("zeros", "weights", "written"), [(1, 3, "33.3333%"), (0, 0, "0.0000%"), (7, 7, "99.9999%")])
def test_a_share_that_was_counted_can_be_read(zeros: int, weights: int, written: str) -> None:
    assert counted_sparsity(zeros, weights) == written
    assert parse_sparsity(written).fraction == pytest.approx(float(written.rstrip("%")) / 100)


def test_a_pattern_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(FistaPrunerError, match=r"2:4 .*fc1.*10 inputs"):
        NM(2, 4).check(10, "fc1")
    NM(2, 4).check(12, "fc1")
    Unstructured(0.5).check(10, "fc1")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 0.99),
    st.sampled_from(["operator", "row"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_unstructured_is_exact(rows: int, columns: int, share: float, scope: str, ties: bool, seed: int) -> None:
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = scores.round()
    mask = Unstructured(share).project(scores, scope)
    assert int((~mask).sum()) == round(share * rows * columns)
    assert Unstructured(share).satisfies(torch.ones(rows, columns) * mask)
    if scope == "operator" and mask.any() and not mask.all():
        assert float(scores[mask].min()) >= float(scores[~mask].max())
    if scope == "row":
        kept = mask.sum(1)
        assert int(kept.max() - kept.min()) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 99), st.data())
def test_n_of_m_is_exact(m: int, groups: int, rows: int, ties: bool, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = scores.round()
    mask = keep_n_of_m(scores, n, m)
    assert bool((mask.view(rows, groups, m).sum(-1) == n).all())
    grouped, kept = scores.view(rows, groups, m), mask.view(rows, groups, m)
    lowest = torch.where(kept, grouped, torch.inf).amin(-1)
    highest = torch.where(kept, -torch.inf, grouped).amax(-1)
    assert bool((lowest >= highest).all())
    assert NM(n, m).satisfies(scores * mask)


def test_ties_are_broken_by_position_and_nan_is_smallest() -> None:
    scores = torch.tensor([[1.0, 1.0, float("nan"), 1.0]])
    assert keep_largest(scores, 2).tolist() == [[True, True, False, False]]
    assert keep_largest(scores, 3).tolist() == [[True, True, False, True]]
    assert keep_n_of_m(scores, 2, 4).tolist() == [[True, True, False, False]]
    assert not keep_largest(scores, 0).any()
    assert keep_largest(scores, 4).all()


def test_satisfies_sees_one_weight_too_many() -> None:
    weight = torch.tensor([[1.0, 0, 0, 2], [1, 0, 3, 2]])
    assert not NM(2, 4).satisfies(weight)
    assert not Unstructured(0.5).satisfies(weight)
    assert Unstructured(0.375).satisfies(weight)
    assert not NM(2, 4).satisfies(torch.zeros(2, 6))


@pytest.mark.parametrize("values", ["normal", "tied", "infinite", "half"])
def test_bisection_finds_the_same_value(values: str) -> None:
    flat = torch.randn(1001, generator=torch.Generator().manual_seed(2))
    if values == "tied":
        flat = flat.round() * 0.0
    elif values == "infinite":
        flat[::3], flat[1::3] = torch.inf, -torch.inf
    elif values == "half":
        flat = flat.half()
    for count in (1, 2, 500, 800, 1001):
        assert float(bisect_kth_largest(flat, count)) == float(flat.sort(descending=True).values[count - 1])


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 12), st.integers(2, 12), st.floats(0, 0.99), st.integers(0, 99), st.data())
def test_rows_alone_have_the_mask_of_the_whole(
    rows: int, columns: int, share: float, seed: int, data: st.DataObject
) -> None:
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).round()
    pattern = Unstructured(share)
    middle = data.draw(st.integers(1, rows - 1))
    blocks = [
        pattern.rows_block(rows, columns, a, b).project(scores[a:b], "row") for a, b in ((0, middle), (middle, rows))
    ]
    assert torch.equal(torch.cat(blocks), pattern.project(scores, "row"))


@given(st.integers(1, 200_000), st.floats(0, 1))
def test_counts_have_a_pattern_that_gives_them_back(weights: int, share: float) -> None:
    for zeros in (round(share * weights), weights):
        pattern = Unstructured.of_counts(zeros, weights)
        assert pattern.zeros(1, weights) == zeros
        assert parse_sparsity(str(pattern)) == pattern


def test_unknown_scope() -> None:
    with pytest.raises(FistaPrunerError, match="layer"):
        Unstructured(0.5).project(torch.ones(2, 2), "layer")


@pytest.mark.parametrize("make", ["normal", "rounded", "constant", "periodic", "mostly zero"])
@pytest.mark.parametrize("count", [1, 1000, 200_000, 299_999])
def test_large_selections_are_exact_too(make: str, count: int) -> None:
    """Above 2^17 values the threshold is bracketed by a sample first."""
    scores = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    if make == "rounded":
        scores = (4 * scores).round()
    elif make == "constant":
        scores = torch.ones(300, 1000)
    elif make == "periodic":
        scores = torch.arange(1000.0).expand(300, 1000)
    elif make == "mostly zero":
        scores = scores * (scores > 2)
    mask = keep_largest(scores, count)
    assert int(mask.sum()) == count
    assert float(scores[mask].min()) >= float(scores[~mask].max())
    tied = (scores == scores[mask].min()).flatten()
    kept = mask.flatten()[tied]
    assert bool((kept[:-1] >= kept[1:]).all())  # the first of the ties
