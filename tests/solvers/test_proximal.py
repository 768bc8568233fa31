"""The default solver: its thresholds, its metric, and that it beats the methods it replaces."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fistapruner.constraints.thresholds import GroupThreshold, SampledThreshold
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import make_problem

from fistapruner import LayerProblem
from fistapruner.core.selection import keep_n_of_m
from fistapruner.solvers import solve
from fistapruner.solvers.proximal import Proximal, obs_scale, resolvents


@pytest.mark.parametrize("threshold", [SampledThreshold(9600, 96, 200), GroupThreshold(2, 4)])
def test_thresholds_ask_a_device_for_no_value(threshold: SampledThreshold | GroupThreshold) -> None:
    """On a GPU that would stall the queue; the meta device, which has no values, refuses it."""
    values, out = torch.empty(96, 200, device="meta"), torch.empty(96, 200, device="meta")
    for correct in (False, True, False):
        threshold(values, out, correct=correct)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 17), st.data())
def test_comparison_network_keeps_the_n_largest(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    groups, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    values = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    spread = values.view(rows, groups, m).transpose(1, 2).reshape(rows, -1).contiguous()
    out = torch.empty_like(spread)
    GroupThreshold(n, m)(spread, out, correct=False)
    expected = values * keep_n_of_m(values.abs(), n, m)
    assert torch.equal(out.view(rows, m, groups).transpose(1, 2).reshape(rows, -1), expected)


@pytest.mark.parametrize("shape", [(1, 5), (40, 60), (600, 700)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sampled_threshold_settles_near_the_wanted_share(shape: tuple[int, int], share: float) -> None:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 1, shape[1])
    threshold, out = SampledThreshold(round(share * math.prod(shape)), *shape), torch.empty(shape)
    for _ in range(4):
        threshold(values, out, correct=True)
    threshold(values, out, correct=False)
    kept = int((out != 0).sum())
    assert abs(kept - round((1 - share) * values.numel())) <= max(1, 0.002 * values.numel())
    assert bool((out[out != 0].abs().min() > values[out == 0].abs().max()).all())


def test_metric_is_the_cost_of_removing_an_input() -> None:
    gram = make_problem().gram
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    scale, _ = obs_scale(gram, 1e-6, "operator")
    schur = 1 / torch.linalg.inv(gram.double()).diagonal()
    ratio = scale.double().square() / schur
    assert float(ratio.max() / ratio.min()) < 1.02


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_resolvent(rho: float) -> None:
    gram = make_problem().gram
    gram = gram / gram.diagonal().mean()
    expected = rho * torch.linalg.inv(gram.double() + rho * torch.eye(len(gram), dtype=torch.float64))
    assert torch.allclose(resolvents(gram, False)(rho).double(), expected, atol=1e-4)


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4", "4:8"])
@pytest.mark.parametrize(("drift", "target"), [(0.0, 1.0), (0.3, 1.0)])
def test_beats_the_other_solvers(sparsity: str, drift: float, target: float) -> None:
    """On the mean of a few problems; single small ones are a lottery for every heuristic."""
    problem = make_problem((32,) * 6, 64, drift=drift, target=target)

    def mean(method: str | list[Proximal]) -> float:
        return sum(record["relative_error"] for record in solve(problem, sparsity, method).stats)

    ours = mean([Proximal(shrinkage=0)])  # the error that is compared is that of the same tokens
    assert ours <= mean("alps") * 1.02
    for name in ("wanda+refit", "sparsegpt+refit", "fista+refit", "admm"):
        assert ours < mean(name)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_full_precision_gives_nearly_the_same(drift: float) -> None:
    problem = make_problem((64,), 64, drift=drift)
    fast = solve(problem, 0.5, "proximal").stats[0]["relative_error"]
    exact = solve(problem, 0.5, [Proximal(fast=False)]).stats[0]["relative_error"]
    assert fast == pytest.approx(exact, rel=0.03)


def test_shrinkage_helps_where_tokens_are_few() -> None:
    """Solved on the Gram of few tokens and judged on that of many others; no number of tokens, no shrinkage."""
    generator = torch.Generator().manual_seed(0)
    weight, mixing = (torch.randn(64, 64, generator=generator) for _ in range(2))
    mixing = mixing / 16 + torch.eye(64)
    few, many = (
        LayerProblem.from_activations(weight, torch.randn(count, 64, generator=generator) @ mixing)
        for count in (200, 20000)
    )

    def solved(problem: LayerProblem, shrinkage: float) -> torch.Tensor:
        return solve(problem, "50%", [Proximal(shrinkage=shrinkage)]).weight

    assert many.errors(solved(few, 1.0)) < many.errors(solved(few, 0.0))
    assert few.errors(solved(few, 3.0)) > few.errors(solved(few, 0.0))
    exact = dataclasses.replace(few, tokens=None)
    assert torch.equal(solved(exact, 3.0), solved(few, 0.0))


def test_a_start_that_is_kept_is_recorded() -> None:
    problem = make_problem()
    for stats in solve(problem, "50%", "wanda+proximal").stats:
        (first, last) = stats["steps"]
        assert last["start_kept"] == (first["relative_error"] == last["relative_error"])
    assert "start_kept" not in solve(problem, "50%", "proximal").stats[0]["steps"][-1]
