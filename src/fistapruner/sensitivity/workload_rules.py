"""Allocate sparsity for a workload: several tasks, known weights, and uncertain tolerances.

Pruning to an allocation a costs task t ``D_t(a)`` nats a token, predicted from the task's own error curves
(:mod:`.error_curves`). With weights m_t of the tasks:

* *Known mix.* Zeros are taken where they raise ``Σ_t m_t D_t(a)`` least. Weights that are uncertain change nothing:
  this cost is linear in them, so their expectation decides.
* *Uncertain tolerances.* A deployment stands a loss of ``B_t``, and more costs more, in units of the mean loss at
  uniform sparsity:

      f(B, a) = Σ_t m_t [γ (D_t - B_t)₊ + ½ κ D_t²]          γ = 20, κ = 1

  B is not known before, but its distribution can be learnt from earlier deployments. Rules, from simple to complex:

  ``mix``             the allocation of the known mix; looks at no tolerance.
  ``mean``            best for the mean tolerances.
  ``sample-average``  least mean cost over all earlier deployments.
  ``neighbours``      least mean cost over the 20 deployments with the nearest features.
  ``two-stage``       a Gaussian forecast of the tolerances from the features by maximum likelihood (:mod:`.forecast`),
                      then the least expected cost, which has a closed form.
  ``so-ebm``          the same forecast, learnt on from the cost of its decisions (:mod:`.so_ebm`). Experimental.

Every rule chooses among the same candidates: allocations that are best for some mix, for mixes on a lattice. The cost
rises with every D_t and D_t is convex, so the best allocation is the best one for some mix.

1. Differs from the paper: with so few candidates, SO-EBM's expectations are exact sums and need no sampler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core import Unstructured
from ..runs.workload_records import WorkloadFacts, WorkloadRule, WorkloadTask
from ..runtime.numerics import mean_and_error, seeded
from .error_curves import ZerosBudget
from .forecast import Forecast, expected_excess, feature_scale, fit_forecast, train
from .so_ebm import energy_loss, importance_weights
from .workload import History, Workload

EXCESS, DAMAGE = 20.0, 1.0
"""γ and κ."""

LATTICE = 256
"""Mixes whose best allocations are candidates, at most; one for each task where there are more tasks."""

NEIGHBOURS = 20

FOLDS = 5
"""Parts of the history; each is held out once."""

PENALTIES = (0.01, 1.0)
"""λ of SO-EBM; the better one on held-out deployments is kept."""

EBM_EPOCHS = 40


@dataclass(frozen=True)
class Candidates:
    """Allocations to choose from: uniform, for the known mix, and for every mix on a lattice.

    Args:
        zeros: (candidates, operators).
        losses: (candidates, tasks) predicted nats a token, fp64.
    """

    zeros: Tensor
    losses: Tensor


def find_candidates(
    budget: ZerosBudget, curves: Sequence[Mapping[str, Tensor]], mix: Tensor, *, several: bool = True
) -> Candidates:
    """Allocate zeros uniformly, for the known mix, and for every mix on the lattice.

    Args:
        budget: the zeros.
        curves: for each task, the predicted cost of each operator (:func:`~.error_curves.split_budget`).
        mix: (tasks,) known weights.
        several: with the lattice; without it the first two are all.
    """
    slopes = torch.stack([budget.slopes(task) for task in curves])
    lowest = torch.stack([torch.stack([curve[0].double() for curve in task.values()]).sum() for task in curves])
    uniform = budget.uniform()
    # Relative losses on the lattice, so that tasks of different difficulty are equally finely divided.
    scale = 1 / (lowest + budget.rise(slopes, uniform)).clamp_min(1e-300)
    mixes = [mix, *(point * scale for point in (_lattice(len(curves)) if several else ()))]
    zeros = [uniform, *(budget.cheapest(torch.tensordot(weights, slopes, 1)) for weights in mixes)]
    return Candidates(torch.stack(zeros), torch.stack([lowest + budget.rise(slopes, row) for row in zeros]))


def _lattice(tasks: int) -> Iterator[Tensor]:
    """Yield the points of the finest lattice on the simplex with at most :data:`LATTICE` points."""
    parts = 1
    while math.comb(parts + tasks, tasks - 1) <= LATTICE:
        parts += 1
    for bars in itertools.combinations(range(parts + tasks - 1), tasks - 1):
        ends = torch.tensor([-1, *bars, parts + tasks - 1])
        yield (ends.diff() - 1).double() / parts


@dataclass(frozen=True)
class Costs:
    """Costs of the candidates, in units of the mean loss at uniform sparsity.

    Args:
        losses: (candidates, tasks).
        mix: (tasks,) weights.
    """

    losses: Tensor
    mix: Tensor

    def known(self, tolerances: Tensor) -> Tensor:
        """Compute f, (deployments, candidates), from (deployments, tasks) tolerances."""
        return self._sum((self.losses - tolerances[:, None]).relu())

    def expected(self, mean: Tensor, spread: Tensor) -> Tensor:
        """Compute f's expectation, (deployments, candidates), for Gaussian tolerances (deployments, tasks)."""
        return self._sum(expected_excess(self.losses, mean[:, None], spread[:, None]))

    def _sum(self, excess: Tensor) -> Tensor:
        return (EXCESS * excess + 0.5 * DAMAGE * self.losses.square()) @ self.mix


def decide_by_rules(
    learn: History, features: Tensor, costs: Costs, *, seed: int = 0, experimental: bool = False
) -> dict[str, Tensor]:
    """Choose a candidate for each deployment by every rule, from simple to complex.

    Args:
        learn: deployments to learn from, in the units of ``costs``.
        features: (deployments, features) of those to decide for.
        costs: of the candidates.
        seed: of everything random.
        experimental: also by SO-EBM.

    Returns:
        (deployments,) numbers of candidates.
    """
    count, known = len(features), costs.known(learn.tolerances)
    center, scale = learn.features.mean(0), feature_scale(learn.features)
    distances = torch.cdist((features - center) / scale, (learn.features - center) / scale)
    nearest = distances.argsort(dim=1, stable=True)[:, :NEIGHBOURS]
    decided = {
        "mix": torch.ones(count, dtype=torch.int64),
        "mean": costs.known(learn.tolerances.mean(0)[None]).argmin(1).expand(count),
        "sample-average": known.mean(0).argmin().expand(count),
        "neighbours": known[nearest].mean(1).argmin(1),
    }
    order = torch.randperm(len(learn), generator=seeded(seed, "forecast rows"))
    held, used = learn[order[: len(learn) // 5]], learn[order[len(learn) // 5 :]]
    forecast = Forecast(used.features, used.tolerances, seed=seed)
    fit_forecast(forecast, used.features, used.tolerances, (held.features, held.tolerances))
    with torch.no_grad():
        decided["two-stage"] = costs.expected(*forecast(features)).argmin(1)
        if experimental:
            forecast = fit_so_ebm(forecast, used, held, costs)
            decided["so-ebm"] = costs.expected(*forecast(features)).argmin(1)
    return decided


def fit_so_ebm(two_stage: Forecast, learn: History, held: History, costs: Costs) -> Forecast:
    """Learn a forecast on from the costs of its decisions; it stays what it was where that does not help.

    Args:
        two_stage: the forecast to begin with.
        learn: deployments to learn from.
        held: deployments whose mean cost decides which state is kept.
        costs: of the candidates.
    """
    known = costs.known(learn.tolerances)
    best = known.argmin(1, keepdim=True)
    with torch.no_grad():
        temperature = float(costs.expected(*two_stage(learn.features)).std(1).median())
    p = importance_weights(known, temperature=temperature)
    on_held = costs.known(held.tolerances)

    def judge(forecast: Forecast) -> float:
        with torch.no_grad():
            decided = costs.expected(*forecast(held.features)).argmin(1, keepdim=True)
        return float(on_held.gather(1, decided).mean())

    def loss(forecast: Forecast, penalty: float) -> Tensor:
        energy = costs.expected(*forecast(learn.features))
        q = importance_weights(energy, temperature=temperature)
        return energy_loss(energy.gather(1, best)[:, 0], energy, q, p, penalty)

    found = two_stage
    for penalty in PENALTIES:
        tried = deepcopy(two_stage)
        train(tried, partial(loss, tried, penalty), partial(judge, tried), epochs=EBM_EPOCHS, learning_rate=1e-3)
        found = min(found, tried, key=judge)  # the first of equals
    return found


def compare_rules(history: History, costs: Costs, *, seed: int = 0, experimental: bool = False) -> list[WorkloadRule]:
    """Measure the cost of every rule on held-out deployments, and its regret.

    The history is cut into five parts; each is decided for with what the others teach. Regret is the mean cost over
    that of the best candidate in hindsight.

    Args:
        history: all deployments, in the units of ``costs``.
        costs: of the candidates.
        seed: of everything random.
        experimental: also SO-EBM.

    Returns:
        Uniform sparsity, then every rule from simple to complex.
    """
    known = costs.known(history.tolerances)
    paid: dict[str, Tensor] = {"uniform": known[:, 0]}
    for number, held in enumerate(torch.randperm(len(history), generator=seeded(seed, "folds")).chunk(FOLDS)):
        others = torch.ones(len(history), dtype=torch.bool).index_fill(0, held, False)
        decided = decide_by_rules(
            history[others], history.features[held], costs, seed=seed + number + 1, experimental=experimental
        )
        for rule, chosen in decided.items():
            mine = paid.setdefault(rule, torch.empty(len(history), dtype=torch.float64))
            mine[held] = known[held].gather(1, chosen[:, None])[:, 0]
    least = min((rule for rule in paid if rule != "uniform"), key=lambda rule: float(paid[rule].mean()))
    rows = []
    for rule, cost in paid.items():
        regret, regret_error = mean_and_error(cost - known.min(1).values)
        behind, behind_error = mean_and_error(cost - paid[least])
        rows.append(
            WorkloadRule(
                rule=rule,
                cost=float(cost.mean()),
                regret=regret,
                regret_error=regret_error,
                behind=behind,
                behind_error=behind_error,
            )
        )
    return rows


def choose_rule(rows: Sequence[WorkloadRule]) -> str:
    """Return the simplest rule whose cost is within one standard error (paired) of the least."""
    return next(row.rule for row in rows if row.rule != "uniform" and row.behind <= row.behind_error)


def allocate_workload(
    workload: Workload,
    curves: Mapping[str, Mapping[str, Tensor]],
    sizes: Mapping[str, int],
    fraction: float,
    *,
    seed: int = 0,
) -> tuple[dict[str, Unstructured], WorkloadFacts]:
    """Decide the sparsity of every operator for a workload.

    Args:
        workload: its tasks, and earlier deployments.
        curves: for each task, the (points,) predicted cost of each operator.
        sizes: weights of each operator.
        fraction: the sparsity of all operators together.
        seed: of everything random.

    Returns:
        The sparsities, whose zeros sum to exactly what ``fraction`` gives in every operator; and how they were chosen.
    """
    budget, history, settings = ZerosBudget(sizes, fraction), workload.history, workload.settings
    by_task = [curves[task] for task in workload.tasks]
    found = find_candidates(budget, by_task, workload.mix, several=history is not None)
    rule, why, rows, chosen = "mix", "there is no history of deployments", [], 1
    unknown: list[int] = []
    means: dict[str, float] = {}
    if history is not None:
        unit = max(float(found.losses[0] @ workload.mix), 1e-30)
        costs = Costs(found.losses / unit, workload.mix)
        scaled = History(history.features, history.tolerances / unit)
        experimental = settings.method == "so-ebm"
        rows = compare_rules(scaled, costs, seed=seed, experimental=experimental)
        rule, why = settings.method, "named in the workload file"
        if rule == "auto":
            rule, why = choose_rule(rows), "the simplest within one standard error of the least held-out cost"
        here = torch.tensor([settings.features], dtype=torch.float64)
        decided = decide_by_rules(scaled, here, costs, seed=seed, experimental=experimental)
        chosen = int(decided[rule])
        mean = costs.known(scaled.tolerances).mean(0)
        means = {"uniform": float(mean[0]), "mix": float(mean[1]), "chosen": float(mean[chosen])}
        first = history.features[0]
        alone = (history.features == first).all(0) & (here[0] != first)
        unknown = [number + 1 for number in alone.nonzero().flatten().tolist()]
    tasks = {
        task: WorkloadTask(
            weight=settings.mix[task],
            uniform=float(found.losses[0, number]),
            predicted=float(found.losses[chosen, number]),
            tolerance=None if history is None else float(history.tolerances[:, number].mean()),
        )
        for number, task in enumerate(workload.tasks)
    }
    facts = WorkloadFacts(
        file=str(workload.file),
        sha256=workload.sha256,
        rule=rule,
        why=why,
        tasks=tasks,
        rules=rows,
        deployments=None if history is None else len(history),
        costs=means,
        unknown_features=unknown,
    )
    return budget.sparsities(found.zeros[chosen]), facts
