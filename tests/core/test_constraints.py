"""Properties that every constraint has, a newcomer's too; texts; exact selection."""

import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fistapruner import FistaPrunerError
from fistapruner.core import NM, Constraint, Stacked, Unstructured, parse_sparsity
from fistapruner.core.constraints import KINDS, Scope, counted_sparsity, patterns_met, stack
from fistapruner.core.selection import GroupThreshold, SampledThreshold, keep_largest, keep_n_of_m
from layer_problems import EXAMPLES, every_constraint, registered

SCOPES: tuple[Scope, Scope] = ("operator", "row")
SEED = st.integers(0, 99)
over_every_constraint = pytest.mark.parametrize("constraint", every_constraint(), ids=str)


def make_scores(constraint: Constraint, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(10, 6 * constraint.group_length, generator=generator).abs() + 0.1
    return scores.mul(2).round() + 1 if kind == "tied" else torch.ones_like(scores) if kind == "constant" else scores


@over_every_constraint
def test_the_text_of_a_constraint_is_read_back(constraint: Constraint) -> None:
    with registered():
        assert parse_sparsity(f"  {constraint} ") == constraint == parse_sparsity(constraint)
    assert pickle.loads(pickle.dumps(constraint)) == constraint  # it travels to worker processes
    assert hash(pickle.loads(pickle.dumps(constraint))) == hash(constraint)


def test_messages_name_forms_that_are_read() -> None:
    with registered():
        assert set(KINDS) == set(EXAMPLES)
        with pytest.raises(FistaPrunerError, match="'half'") as refused:
            parse_sparsity("half")
        for kind in KINDS.values():
            for form in kind.forms:
                assert form in str(refused.value)
                example = re.search(r"\((.*)\)", form)
                assert isinstance(parse_sparsity(example[1]), kind)


@pytest.mark.parametrize(
    ("written", "meant"),
    [(0.5, 0.5), ("0.5", 0.5), (" 62.5 % ", 0.625), (0, 0.0), ("4 : 8", NM(4, 8)), (NM(1, 2), NM(1, 2))],
)
def test_texts(written: object, meant: object) -> None:
    assert parse_sparsity(written) == (Unstructured(meant) if isinstance(meant, float) else meant)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [1.0, -0.1, 50, "150%", "4:2", "0:4", "half", "nan", float("nan"), True])
def test_wrong_texts_are_named(wrong: object) -> None:
    with pytest.raises(FistaPrunerError, match=r"1\.5" if wrong == "150%" else re.escape(str(wrong))):
        parse_sparsity(wrong)  # type: ignore[arg-type]


@over_every_constraint
@pytest.mark.parametrize("kind", ["normal", "tied", "constant"])
@pytest.mark.parametrize("scope", SCOPES)
def test_projections_are_exact(constraint: Constraint, kind: str, scope: Scope) -> None:
    scores = make_scores(constraint, kind)
    mask = constraint.project(scores, scope)
    assert int((~mask).sum()) == constraint.zeros(*scores.shape)
    assert constraint.zeros(40, scores.shape[1]) == pytest.approx(constraint.fraction * 4 * scores.numel(), abs=20)
    assert constraint.satisfies(scores * mask)
    assert constraint.satisfies(torch.zeros_like(scores))
    assert torch.equal(constraint.project(scores, scope), mask)
    assert torch.equal(constraint.project(mask.float()), mask)
    for place in (~mask).nonzero()[:3].tolist():  # one weight too many
        more = scores * mask
        more[tuple(place)] = 1.0
        assert not constraint.satisfies(more)
    if constraint.nm is not None:
        assert NM(*constraint.nm).satisfies(scores * mask)


@over_every_constraint
@pytest.mark.parametrize("scope", SCOPES)
def test_the_first_of_ties_is_kept_and_nan_is_smallest(constraint: Constraint, scope: Scope) -> None:
    scores = make_scores(constraint, "tied").double()
    tilt = torch.arange(scores.numel(), dtype=torch.float64).view(scores.shape) * 1e-9
    assert torch.equal(constraint.project(scores, scope), constraint.project(scores - tilt, scope))
    broken, lowest = scores.clone(), scores.clone()
    broken[::2, ::3], lowest[::2, ::3] = torch.nan, -torch.inf
    assert torch.equal(constraint.project(broken, scope), constraint.project(lowest, scope))


@over_every_constraint
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_relaxed_goes_from_dense_to_the_constraint(constraint: Constraint, kind: str) -> None:
    scores = make_scores(constraint, kind)
    kept = constraint.project(scores)
    assert bool(constraint.relaxed(scores, 0.0).all())
    assert torch.equal(constraint.relaxed(scores, 1.0), kept)
    for share in (0.2, 0.7):
        mask = constraint.relaxed(scores, share)
        assert int((~mask).sum()) == round(share * constraint.zeros(*scores.shape))
        assert bool(mask[kept].all())
        if not bool(mask.all()):
            assert float(scores[~mask].max()) <= float(scores[mask & ~kept].min())
        assert torch.equal(mask, Constraint.relaxed(constraint, scores, share))  # an override is only faster


@over_every_constraint
def test_an_operator_that_does_not_fit_is_named(constraint: Constraint) -> None:
    length = constraint.group_length
    constraint.check(3 * length, "fc1")
    if length > 1:
        with pytest.raises(FistaPrunerError, match=rf"{constraint} .*fc1.* {3 * length + 1} inputs.* {length}$"):
            constraint.check(3 * length + 1, "fc1")
        assert not constraint.satisfies(torch.zeros(2, 3 * length + 1))


@over_every_constraint
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_columns_from_left_to_right_add_up(constraint: Constraint, groups: int) -> None:
    scores = make_scores(constraint)
    blocks = scores.split(groups * constraint.group_length, 1)
    starts = [sum(block.shape[1] for block in blocks[:i]) for i in range(len(blocks))]
    mask = torch.cat([constraint.project_columns(*each) for each in zip(blocks, starts, strict=True)], 1)
    assert int((~mask).sum()) == constraint.zeros(*scores.shape)
    assert constraint.satisfies(scores * mask)


@over_every_constraint
def test_thresholds_keep_what_the_projection_keeps(constraint: Constraint) -> None:
    """In strided columns; a sampled threshold of a small operator sees all of its values."""
    values = make_scores(constraint)
    length = constraint.group_length
    strided = values.view(len(values), -1, length).transpose(1, 2).reshape(values.shape)
    out = torch.empty_like(values)
    constraint.threshold(*values.shape)(strided, out, correct=False)
    kept = out.view(len(values), length, -1).transpose(1, 2).reshape(values.shape) != 0
    assert int((kept != constraint.project(values)).sum()) <= int(length == 1)


@pytest.mark.parametrize("threshold", [SampledThreshold(9600, 96, 200), GroupThreshold(2, 4)])
def test_thresholds_ask_a_device_for_no_value(threshold: SampledThreshold | GroupThreshold) -> None:
    """On a GPU that would stall the queue; the meta device, which has no values, refuses it."""
    values, out = torch.empty(2, 96, 200, device="meta")
    for correct in (False, True, False):
        threshold(values, out, correct=correct)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 17), st.integers(1, 5), st.integers(1, 4), SEED, st.data())
def test_comparison_networks_keep_the_n_largest(m: int, groups: int, rows: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    values = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    spread = values.view(rows, groups, m).transpose(1, 2).reshape(rows, -1).contiguous()
    out = torch.empty_like(spread)
    GroupThreshold(n, m)(spread, out, correct=False)
    expected = values * keep_n_of_m(values.abs(), n, m)
    assert torch.equal(out.view(rows, m, groups).transpose(1, 2).reshape(rows, -1), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 0.99),
    st.sampled_from(SCOPES),
    st.booleans(),
    st.integers(0, 9),
)
def test_shares_are_exact(rows: int, columns: int, share: float, scope: Scope, ties: bool, seed: int) -> None:
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    mask = Unstructured(share).project(scores, scope)
    assert int((~mask).sum()) == round(share * rows * columns)
    if scope == "operator" and mask.any() and not mask.all():
        assert float(scores[mask].min()) >= float(scores[~mask].max())
    if scope == "row":
        assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 6), st.booleans(), SEED, st.data())
def test_n_of_m_is_exact(m: int, groups: int, rows: int, ties: bool, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    kept, grouped = NM(n, m).project(scores).view(rows, groups, m), scores.view(rows, groups, m)
    assert bool((kept.sum(-1) == n).all())
    lowest, highest = grouped.where(kept, torch.inf).amin(-1), grouped.where(~kept, -torch.inf).amax(-1)
    assert bool((lowest >= highest).all())


@given(st.integers(1, 200_000), st.floats(0, 1))
def test_counts_have_a_constraint_that_gives_them_back(weights: int, share: float) -> None:
    for zeros in (round(share * weights), weights):
        constraint = Unstructured.of_counts(zeros, weights)
        assert constraint.zeros(1, weights) == zeros
        assert parse_sparsity(str(constraint)) == constraint
        assert parse_sparsity(counted_sparsity(zeros, weights)).fraction == pytest.approx(zeros / weights, abs=2e-6)


@pytest.mark.parametrize("make", ["normal", "rounded", "constant", "periodic", "mostly zero"])
@pytest.mark.parametrize("count", [1, 1000, 200_000, 299_999])
def test_large_selections_are_exact(make: str, count: int) -> None:
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
    kept = mask[scores == scores[mask].min()]
    assert bool((kept[:-1] >= kept[1:]).all())  # the first of the ties


def test_a_stack_has_a_constraint_for_each_operator() -> None:
    scores = torch.rand(10, 8, generator=torch.Generator().manual_seed(0))
    stacked = stack(["2:4", "50%"], (4, 6))
    mask = stacked.project(scores)
    assert torch.equal(mask, torch.cat([NM(2, 4).project(scores[:4]), Unstructured(0.5).project(scores[4:])]))
    assert stacked.satisfies(scores * mask)
    assert not stacked.satisfies(scores * mask.flip(0))
    assert stack("2:4", (4, 6)).constraints == (NM(2, 4), NM(2, 4))
    with pytest.raises(FistaPrunerError, match="1 constraints, 2 numbers of rows and 2 names"):
        Stacked((NM(2, 4),), (4, 6))


@pytest.mark.parametrize("shape", [(1, 5), (40, 60), (600, 700)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sampled_thresholds_settle_near_the_wanted_share(shape: tuple[int, int], share: float) -> None:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 1, shape[1])
    threshold, out = SampledThreshold(round(share * math.prod(shape)), *shape), torch.empty(shape)
    for correct in (True, True, True, True, False):
        threshold(values, out, correct=correct)
    wanted = round((1 - share) * values.numel())
    assert int((out != 0).sum()) == pytest.approx(wanted, abs=max(1, 0.002 * values.numel()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 6, 12, 16, 32, 96]), st.floats(0, 1), st.integers(0, 99))
def test_patterns_are_those_that_every_group_shows(rows: int, columns: int, density: float, seed: int) -> None:
    weight = (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density).float()
    lengths = [m for m in (2, 4, 8, 16, 32) if columns % m == 0]
    counts = {m: int(weight.view(rows, -1, m).sum(-1).max()) for m in lengths}
    found = patterns_met(weight, 32)
    assert found == [NM(max(1, n), m) for m, n in counts.items() if max(1, n) < m]
    assert all(pattern.satisfies(weight) for pattern in found)
    assert not any(NM(pattern.n - 1, pattern.m).satisfies(weight) for pattern in found if pattern.n > 1)
