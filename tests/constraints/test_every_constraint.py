"""Properties that every registered constraint must have, and that a newcomer's has too."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import Tensor

from fistapruner import FistaPrunerError
from fistapruner.core import NM, Constraint, parse_sparsity
from fistapruner.core.constraints import CONSTRAINTS, Scope
from toy_constraints import EXAMPLES, every_constraint, registered

SCOPES: tuple[Scope, Scope] = ("operator", "row")
EVERY_CONSTRAINT = every_constraint()
over_every_constraint = pytest.mark.parametrize("constraint", EVERY_CONSTRAINT, ids=str)


def make_scores(constraint: Constraint, kind: str = "normal", rows: int = 10, groups: int = 6) -> Tensor:
    scores = torch.randn(rows, groups * constraint.group_length, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    return scores.mul(2).round() + 1 if kind == "tied" else torch.ones_like(scores) if kind == "constant" else scores


def test_every_registered_constraint_has_examples() -> None:
    with registered():
        assert set(CONSTRAINTS) == set(EXAMPLES)


def test_a_constraint_without_examples_stops_no_other_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONSTRAINTS, "new", NM)
    assert every_constraint() == EVERY_CONSTRAINT


@over_every_constraint
def test_the_text_of_a_constraint_parses_back_to_it(constraint: Constraint) -> None:
    with registered():
        assert parse_sparsity(str(constraint)) == constraint
        assert parse_sparsity(f"  {constraint} ") == constraint
    assert pickle.loads(pickle.dumps(constraint)) == constraint  # it travels to worker processes
    assert len({constraint, pickle.loads(pickle.dumps(constraint))}) == 1


def test_the_forms_in_messages_are_examples_that_parse() -> None:
    with registered():
        for kind in CONSTRAINTS.values():
            for form in kind.forms:
                example = re.search(r"\((.*)\)", form)
                assert example is not None
                assert isinstance(parse_sparsity(example[1]), kind)
        with pytest.raises(FistaPrunerError) as error:
            parse_sparsity("half")
    assert all(form in str(error.value) for kind in CONSTRAINTS.values() for form in kind.forms)
    assert "'half'" in str(error.value)


@over_every_constraint
@pytest.mark.parametrize("kind", ["normal", "tied", "constant"])
@pytest.mark.parametrize("scope", SCOPES)
def test_projections_are_exact_and_satisfy(constraint: Constraint, kind: str, scope: Scope) -> None:
    scores = make_scores(constraint, kind)
    mask = constraint.project(scores, scope)
    assert mask.shape == scores.shape
    assert int((~mask).sum()) == constraint.zeros(*scores.shape)
    assert constraint.satisfies(scores * mask)
    assert constraint.satisfies(torch.zeros_like(scores))
    assert torch.equal(constraint.project(scores, scope), mask)  # the same on every call
    assert torch.equal(constraint.project(mask.float()), mask)  # a projection of what it keeps keeps it
    for place in (~mask).nonzero()[:3].tolist():  # one weight too many
        more = scores * mask
        more[tuple(place)] = 1.0
        assert not constraint.satisfies(more)


@over_every_constraint
@pytest.mark.parametrize("kind", ["tied", "constant"])
def test_the_first_of_tied_scores_are_kept(constraint: Constraint, kind: str) -> None:
    scores = make_scores(constraint, kind).double()
    tilt = torch.arange(scores.numel(), dtype=torch.float64).view(scores.shape) * 1e-9
    assert torch.equal(constraint.project(scores), constraint.project(scores - tilt))


@over_every_constraint
@pytest.mark.parametrize("scope", SCOPES)
def test_nan_is_the_smallest_score(constraint: Constraint, scope: Scope) -> None:
    scores = make_scores(constraint)
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
        dropped = ~mask
        if bool(dropped.any()) and not bool(mask.all()):
            assert float(scores[dropped].max()) <= float(scores[mask & ~kept].min())
        assert torch.equal(mask, Constraint.relaxed(constraint, scores, share))  # an override is only faster


@over_every_constraint
def test_an_operator_that_does_not_fit_is_named(constraint: Constraint) -> None:
    length = constraint.group_length
    constraint.check(3 * length, "fc1")
    if length > 1:
        with pytest.raises(FistaPrunerError) as error:
            constraint.check(3 * length + 1, "fc1")
        assert all(text in str(error.value) for text in (str(constraint), "fc1", str(3 * length + 1), str(length)))
        with pytest.raises(FistaPrunerError):
            constraint.project(torch.ones(2, 3 * length + 1))
        assert not constraint.satisfies(torch.zeros(2, 3 * length + 1))


@over_every_constraint
def test_whole_groups_of_outputs_and_inputs_may_go(constraint: Constraint) -> None:
    if constraint.zeros_suffice:
        pytest.skip("its zeros may be anywhere")
    rows, length = constraint.group_rows, constraint.group_length
    scores = make_scores(constraint, rows=24 * rows)
    kept = (scores * constraint.project(scores)).view(24, rows, 6, length)[1::2]
    assert constraint.satisfies((kept[:, :, ::2] if length > 1 else kept).flatten(2).flatten(0, 1))


@over_every_constraint
def test_columns_decided_from_left_to_right_add_up(constraint: Constraint) -> None:
    if not constraint.columnwise:
        pytest.skip("its columns are decided together")
    scores = make_scores(constraint)
    for groups in (1, 2, 4):
        width = groups * constraint.group_length
        starts = range(0, scores.shape[1], width)
        mask = torch.cat([constraint.project_columns(scores[:, start : start + width], start) for start in starts], 1)
        assert int((~mask).sum()) == constraint.zeros(*scores.shape)
        assert constraint.satisfies(scores * mask)


@over_every_constraint
@pytest.mark.parametrize("scope", SCOPES)
def test_independent_rows_are_projected_alike_in_blocks(constraint: Constraint, scope: Scope) -> None:
    scores = make_scores(constraint, "tied")
    changed = torch.cat([scores[:1], scores[1:].flip(0, 1)])
    if not constraint.rows_independent(scope):
        pytest.skip("its rows compete")
    assert torch.equal(constraint.project(scores, scope)[0], constraint.project(changed, scope)[0])
    if scope == "row":
        edges = ((0, 3), (3, 10))
        parts = [constraint.rows_block(*scores.shape, a, b).project(scores[a:b], scope) for a, b in edges]
        assert torch.equal(torch.cat(parts), constraint.project(scores, scope))


@over_every_constraint
def test_its_nm_pattern_is_true_of_every_projection(constraint: Constraint) -> None:
    if constraint.nm is not None:
        scores = make_scores(constraint)
        assert NM(*constraint.nm).satisfies(scores * constraint.project(scores))


@over_every_constraint
def test_thresholds_keep_what_the_projection_keeps(constraint: Constraint) -> None:
    """In strided columns; a sampled threshold of a small operator sees all of its values."""
    values = make_scores(constraint)
    length = constraint.group_length
    strided = values.view(len(values), -1, length).transpose(1, 2).reshape(values.shape)
    out = torch.empty_like(values)
    constraint.threshold(*values.shape)(strided, out, correct=False)
    kept = out.view(len(values), length, -1).transpose(1, 2).reshape(values.shape) != 0
    different = int((kept != constraint.project(values)).sum())
    assert different <= (1 if constraint.zeros_suffice else 0)


@over_every_constraint
def test_a_free_share_of_zeros_is_what_allocation_needs(constraint: Constraint) -> None:
    if constraint.supports_allocation:
        assert constraint.zeros_suffice
    assert constraint.zeros(4, 40 * constraint.group_length) == pytest.approx(
        constraint.fraction * 160 * constraint.group_length, abs=1
    )
