"""FISTAPruner: l1-regularised least squares by FISTA, rounding, and an adaptive lambda."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..constraints import Constraint
from ..errors import FistaPrunerError
from ..problem import LayerProblem
from ..runtime.numerics import fast_products
from .base import Method, Positive, Solution, Stats, Trace, project_operators
from .conditioning import largest_eigenvalue, once
from .magnitude import Magnitude
from .sparsegpt import SparseGPT
from .wanda import Wanda

PUBLISHED_START, PUBLISHED_INTERVAL, PUBLISHED_WIDTH = 1e-5, (0.0, 1e6), 1e-6


class Fista(Method):
    """FISTAPruner (arXiv 2408.03728): ``min_V f(V)/2 + lambda ||V||_1``, rounded, with an adaptive lambda.

    Two defaults differ from the paper; the recipe ``paper`` sets both as published:
    (1) lambda is relative to ``max |B|`` (``penalty``). (2) The warm start is SparseGPT for every model
    (``warm_start``).

    Each round runs FISTA from the best rounded weights so far, projects by magnitude onto the constraint, and keeps the
    result if ``E_total = sqrt f(rounded)`` fell. With ``E_fista = sqrt f(V)`` and ``E_round = E_total - E_fista``, a
    bisection raises lambda if ``E_round / E_total > xi`` (the solution is too dense to be rounded well), else lowers
    it. The warm start is the first candidate, so that the result is never worse than the warm start.

    Every round also records a certificate of its convex problem: the duality gap as a share of the objective, and the
    fixed-point residual ``||V - prox(V - grad/L)|| / ||V||``.
    """

    name: ClassVar[str] = "fista"
    propagate: ClassVar[Literal["dense", "pruned"]] = "dense"
    dense_target: ClassVar[float] = 1.0
    refit_helps: ClassVar[bool] = True
    trace: ClassVar[Trace | None] = Trace(
        key="rounds",
        value="e_total",
        penalty="lambda",
        value_label="error, first = 1",
        penalty_label="λ",
        round_label="round",
        caption="Error of the rounded weights in each round of the λ search, and the λ it tried, for the hardest "
        "operators.",
        of_first=True,
        search=True,
    )

    iterations: int = Field(20, ge=1, description="K, FISTA steps of a round (paper: 20).")
    tolerance: float = Field(
        1e-6, ge=0.0, description="An operator's FISTA stops when ||V_k - V_{k-1}||_F falls below it (paper: 1e-6)."
    )
    xi: float = Field(
        0.3, gt=0.0, lt=1.0, description="Share of rounding error above which lambda is raised (paper: 0.3)."
    )
    patience: int = Field(3, ge=1, description="T, rounds without improvement after which it stops (paper: 3).")
    warm_start: Literal["auto", "sparsegpt", "wanda", "magnitude", "dense"] = Field(
        "sparsegpt",
        description="Solver of the first weights if the chain has no step before. auto is the paper's choice "
        "by the model's family: SparseGPT for OPT, Wanda for LLaMA and every other.",
    )
    penalty: Literal["relative", "published"] = Field(
        "relative",
        description="relative measures lambda in units of max |B|, above which the solution is zero, and "
        "bisects its logarithm, so that lambda does not depend on the scale of weights and "
        "activations or the number of tokens. published takes the paper's numbers literally, on "
        "sums over tokens: start 1e-5, interval [0, 1e6], width 1e-6.",
    )
    penalty_start: float = Field(1e-5, gt=0.0, lt=1.0, description="First lambda, in units of max |B| (relative only).")
    penalty_interval: tuple[Positive, Positive] = Field(
        (1e-7, 1.0), description="Bounds of the bisection, in units of max |B| (relative only)."
    )
    penalty_width: float = Field(
        0.01, gt=0.0, description="Stops when the ends of the interval differ by less than this share (relative only)."
    )
    fast: bool = Field(
        True,
        description="Use low-precision matrix units inside the iterations; errors and certificates are always fp32.",
    )

    @model_validator(mode="after")
    def _start_inside(self) -> Fista:
        low, high = self.penalty_interval
        if not low < high:
            raise ValueError(f"penalty_interval {[low, high]} is empty, expected a low end and a higher one")
        if not low <= self.penalty_start <= high:
            raise ValueError(f"penalty_start {self.penalty_start:g} is outside penalty_interval {[low, high]}")
        return self

    def supports(self, constraint: Constraint) -> bool:
        return self.warm_start != "sparsegpt" or SparseGPT().supports(constraint)

    def solve(self, problem: LayerProblem, sparsity: Sequence[Constraint], start: Solution | None = None) -> Solution:
        given, start = start is not None, start or self._warm_start(problem, sparsity)
        operators = problem.operators()
        first, warm_up = self._first_round_start(problem, start, given)
        lipschitz = once(problem.gram, "largest eigenvalue", lambda: largest_eigenvalue(problem.gram))
        searches = [
            self._search(operator, weight, mask)
            for operator, weight, mask in zip(
                operators, start.weight.split(problem.rows), start.mask.split(problem.rows), strict=True
            )
        ]
        inputs = list(first.split(problem.rows))
        while any(search.running for search in searches):
            active = [index for index, search in enumerate(searches) if search.running]
            stack = _stack(problem, operators, active)
            penalties = torch.cat(
                [torch.full((problem.rows[i], 1), searches[i].penalty, dtype=problem.weight.dtype) for i in active]
            ).to(problem.weight.device)
            begin = torch.cat([inputs[i] for i in active])
            relaxed, steps = fista(stack, begin, penalties, lipschitz, self.iterations, self.tolerance, fast=self.fast)
            certificates = certificate(stack, relaxed, penalties, lipschitz)
            mask = project_operators(relaxed.abs(), stack.rows, [sparsity[i] for i in active])
            rounded = relaxed * mask
            total, smooth = stack.errors(rounded), stack.errors(relaxed)
            parts = zip(active, rounded.split(stack.rows), mask.split(stack.rows), strict=True)
            for place, (index, weight, kept) in enumerate(parts):
                search = searches[index]
                record = {"steps": steps[place], **certificates[place]}
                search.judge(weight, kept, math.sqrt(total[place]), math.sqrt(smooth[place]), record)
                inputs[index] = search.weight
        weight, mask = torch.cat([s.weight for s in searches]), torch.cat([s.mask for s in searches])
        stats = tuple({"lipschitz": float(lipschitz), "warm_start": warm_up, **search.summary()} for search in searches)
        return Solution(weight, mask, stats, start.warnings)

    def for_model(self, family: Callable[[], str], earlier: Method | None = None) -> Fista:
        if self.warm_start != "auto":
            return self
        if isinstance(earlier, Fista):
            return self.model_copy(update={"warm_start": earlier.warm_start})
        return self.model_copy(update={"warm_start": "sparsegpt" if family() == "opt" else "wanda"})

    def _warm_start(self, problem: LayerProblem, sparsity: Sequence[Constraint]) -> Solution:
        if self.warm_start == "auto":
            raise FistaPrunerError(
                f"{problem.label}: fista's warm_start auto depends on the model's family, which a layer problem does "
                "not contain: write sparsegpt (the paper's for OPT) or wanda (for LLaMA)"
            )
        if self.warm_start == "sparsegpt":
            return SparseGPT().solve(problem, sparsity)
        return (Wanda() if self.warm_start == "wanda" else Magnitude()).solve(problem, sparsity)

    def _first_round_start(self, problem: LayerProblem, start: Solution, given: bool) -> tuple[Tensor, str]:
        """Return the first iterate and its name: the warm start, or the dense weights (candidate: magnitude)."""
        if self.warm_start == "dense":
            return problem.weight, "dense"
        return start.weight, "the step before" if given else self.warm_start

    def _search(self, operator: LayerProblem, weight: Tensor, mask: Tensor) -> _Search:
        (error,) = operator.errors(weight)
        if self.penalty == "published":
            unit, log, start = 1.0 / (operator.tokens or 1), False, PUBLISHED_START
            low, high = PUBLISHED_INTERVAL
            width = PUBLISHED_WIDTH
        else:
            unit, log, start = (
                max(float(operator.linear.abs().max()), torch.finfo(weight.dtype).tiny),
                True,
                self.penalty_start,
            )
            low, high = self.penalty_interval
            width = self.penalty_width
        return _Search(weight, mask, math.sqrt(error), unit, start, low, high, width, log, self.xi, self.patience, [])


@dataclass
class _Search:
    """Outer loop of one operator: its best rounded weights and the bisection of lambda."""

    weight: Tensor
    mask: Tensor
    best: float
    unit: float
    value: float
    low: float
    high: float
    width: float
    log: bool
    xi: float
    patience: int
    rounds: list[Stats]
    idle: int = 0
    running: bool = True

    @property
    def penalty(self) -> float:
        """lambda in the units of the problem (means over tokens)."""
        return self.value * self.unit

    def judge(self, weight: Tensor, mask: Tensor, total: float, smooth: float, record: Stats) -> None:
        """Judge the result of a round, then choose the next lambda or stop."""
        improved = total < self.best
        rounding = total - smooth
        self.rounds.append(
            {
                "lambda": self.penalty,
                "lambda_setting": self.value,
                "e_total": total,
                "e_fista": smooth,
                "e_round": rounding,
                **record,
            }
        )
        if improved:
            self.weight, self.mask, self.best = weight, mask, total
        self.idle = 0 if improved else self.idle + 1
        if total > 0 and rounding / total > self.xi:
            self.low = self.value
        else:
            self.high = self.value
        closed = self.high <= self.low * (1 + self.width) if self.log else self.high - self.low <= self.width
        self.running = self.idle < self.patience and not closed
        self.value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2

    def summary(self) -> Stats:
        return {"e_total": self.best, "rounds": self.rounds, "iterations": sum(int(r["steps"]) for r in self.rounds)}


def _stack(problem: LayerProblem, operators: Sequence[LayerProblem], active: Sequence[int]) -> LayerProblem:
    """Stack the operators that are still searching; returns the problem itself if all of them are."""
    if len(active) == len(operators):
        return problem
    parts = [operators[i] for i in active]
    return LayerProblem(
        weight=torch.cat([p.weight for p in parts]),
        gram=problem.gram,
        drift=None if problem.drift is None else torch.cat([p.drift for p in parts if p.drift is not None]),
        drift_energy=None
        if problem.drift is None
        else torch.cat([p.drift_energy for p in parts if p.drift_energy is not None]),
        energy=torch.cat([p.energy for p in parts if p.energy is not None]),
        target=problem.target,
        names=tuple(p.names[0] for p in parts),
        rows=tuple(p.rows[0] for p in parts),
        tokens=problem.tokens,
    )


def fista(
    problem: LayerProblem,
    start: Tensor,
    penalty: Tensor,
    lipschitz: Tensor,
    iterations: int,
    tolerance: float = 0.0,
    *,
    fast: bool = False,
) -> tuple[Tensor, list[int]]:
    """Run FISTA (Beck & Teboulle 2009) on ``f(V)/2 + sum_i penalty_i ||V_i||_1``, all operators at once.

    Args:
        problem: the layer problem.
        start: (m, n) first iterate.
        penalty: (m, 1) l1 weight of each row.
        lipschitz: 0-dim tensor L, at least the largest eigenvalue of the Gram.
        iterations: largest number of steps.
        tolerance: an operator stops once ``||V_k - V_{k-1}||_F`` is below it. This is decided on the device, so that
            no step waits for the host; the host checks every fifth step whether all operators have stopped.
        fast: use low-precision matrix units for the products.

    Returns:
        The last iterate (m, n) and the number of steps of each operator.
    """
    rows = torch.tensor(problem.rows, device=start.device)
    owner = torch.repeat_interleave(torch.arange(len(rows), device=start.device), rows, output_size=len(start))
    moving = torch.ones(len(rows), dtype=torch.bool, device=start.device)
    taken = torch.zeros(len(rows), dtype=torch.long, device=start.device)
    current = point = start
    momentum = 1.0
    shrink = penalty / lipschitz
    # point - gradient / L in one product: point + (point - W) (-H / L) + drift_gradient / L.
    step_gram = problem.gram / -lipschitz
    constant = None if problem.drift_gradient is None else problem.drift_gradient / lipschitz
    for step in range(1, iterations + 1):
        with fast_products(fast):
            z = torch.addmm(point, point - problem.weight, step_gram)
        if constant is not None:
            z += constant
        following = z.sub_(z.clamp(-shrink, shrink))
        taken += moving
        change = following - current
        size = torch.stack([torch.linalg.vector_norm(part) for part in change.split(problem.rows)])
        if start.device.type != "cpu" or not bool(moving.all()):
            following = torch.where(moving[owner, None], following, current)
            change = following - current
        advance = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        point = torch.add(following, change, alpha=(momentum - 1) / advance)
        momentum, current = advance, following
        moving = moving & (size >= tolerance)
        if tolerance and step % 5 == 0 and not bool(moving.any()):
            break
    return current, [int(steps) for steps in taken.tolist()]


def certificate(problem: LayerProblem, weight: Tensor, penalty: Tensor, lipschitz: Tensor) -> list[Stats]:
    """Certify how close ``weight`` is to the solution of the l1 problem, for each operator.

    The residual ``T - V X*``, scaled into the feasible set of the dual, gives a lower bound of the optimal value from
    the Gram alone, row by row: with ``s = min(1, penalty / max|B - V H|)``, ``D = s (c_T - <V, B>) - s^2 f(V) / 2``.

    Returns:
        For each operator ``objective``, ``gap`` (objective minus dual value, as a share of the objective; 0 at the
        solution) and ``residual`` (relative fixed-point residual).
    """
    gradient = problem.gradient(weight)
    error = problem.row_errors(weight)
    target = _target_energy(problem)
    inner = (weight.double() * problem.linear.double()).sum(1)
    primal = error / 2 + penalty[:, 0].double() * weight.double().abs().sum(1)
    steepest = gradient.abs().amax(1).double().clamp_min(torch.finfo(torch.float64).tiny)
    scale = (penalty[:, 0].double() / steepest).clamp_max(1.0)
    dual = scale * (target - inner) - scale.square() * error / 2
    # The best multiple of the residual has a closed form; it may be smaller than the largest feasible multiple.
    best = torch.minimum(scale, ((target - inner) / error.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0))
    dual = torch.maximum(dual, best * (target - inner) - best.square() * error / 2)
    z = weight - gradient / lipschitz
    shrink = penalty / lipschitz
    moved = (z - z.clamp(-shrink, shrink) - weight).double().square().sum(1)
    length = weight.double().square().sum(1)
    out = []
    for p, d, r, v in zip(*(part.split(problem.rows) for part in (primal, dual, moved, length)), strict=True):
        objective = float(p.sum())
        gap = max(objective - float(d.sum()), 0.0)
        out.append(
            {
                "objective": objective,
                "gap": gap / objective if objective > 0 else 0.0,
                "residual": math.sqrt(float(r.sum()) / max(float(v.sum()), 1e-300)),
            }
        )
    return out


def _target_energy(problem: LayerProblem) -> Tensor:
    """Compute the mean squared target of each row, ``||W X* + a W (X - X*)||^2``: (m,) fp64."""
    product = (problem.weight @ problem.gram).double()
    if problem.drift_gradient is None:
        return (product * problem.weight.double()).sum(1)
    assert problem.drift_energy is not None
    cross = (problem.weight.double() * (product + 2 * problem.drift_gradient.double())).sum(1)
    return cross + problem.target**2 * problem.drift_energy.double()
