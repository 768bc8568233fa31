"""Allocate sparsity for several tasks, whose tolerances may be uncertain: SO-EBM.

Kong, Cui, Zhuang, Feng, Prakash & Zhang 2022, "End-to-End Stochastic Optimization with Energy-Based Model", NeurIPS,
arXiv 2211.13837. A workload file is YAML; its tasks are those of the calibration text:

    mix: {chat: 0.7, code: 0.3}     # weight of each task; the rest only where tolerances are uncertain
    features: [0.2, 1.0]            # of the deployment at hand
    history:                        # earlier deployments, and the loss in nats a token that each tolerated
    - {features: [0.1, 0.0], tolerance: {chat: 0.05, code: 0.2}}

An allocation a costs task t ``D_t(a)`` nats a token, predicted by its error curves. For a known mix m, zeros are taken
where they raise ``Σ_t m_t D_t(a)`` least; an uncertain mix counts by its mean, since this is linear in m. With
tolerances B the cost, in units of the mean loss at uniform sparsity, is

    f(B, a) = Σ_t m_t [γ (D_t - B_t)₊ + ½ κ D_t²]          γ = 20, κ = 1

B is forecast from the features x as N(μ(x), σ(x)²), and E(x, a) = 𝔼 f(B, a) has a closed form. Costs are read as
energies of two distributions of decisions, ``q(a|x) ∝ exp(-E(x, a)/τ)`` and ``p(a|B) ∝ exp(-f(B, a)/τ)``. With the best
decision in hindsight a*, learning minimises ``E(x, a*) + τ log Z(x) + λ τ KL(p || q)``, whose gradient is

    ∇E(a*) - 𝔼_q ∇E + λ (𝔼_p ∇E - 𝔼_q ∇E)

1. Differs from the paper, which samples decisions: here they are the allocations that are best for some mix on a
   lattice, and expectations exact sums. As f rises with every D_t, which is convex, no others are needed.
2. Differs from the paper, whose forecast is a deep network: here it is linear in x, which fifty lines can teach. It
   begins at maximum likelihood; the state is kept whose decisions cost least on a fifth of the history, held out.
3. Differs from the paper in τ: 1 there, here the median over deployments of E's standard deviation over decisions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Annotated, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..allocate.allocate import ZerosBudget
from ..core import Unstructured
from ..runs.records import WorkloadFacts
from ..runtime.numerics import seeded
from ..settings.base import RunRecipe, Settings

EXCESS, DAMAGE, PENALTY = 20.0, 1.0, 0.01  # γ, κ and λ
DECISIONS, DEPLOYMENTS = 256, 50  # mixes on the lattice, at most, and deployments of a history, at least
fp64 = partial(torch.tensor, dtype=torch.float64)


class Deployment(Settings):
    """What was known of an earlier deployment, and the nats a token that it tolerated in each task."""

    features: tuple[float, ...]
    tolerance: dict[str, Annotated[float, Field(gt=0)]]


class Workload(RunRecipe):
    """The content of a workload file; ``Workload.of(path)`` reads it."""

    verb: ClassVar[str] = "workload"

    mix: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=2)
    features: tuple[float, ...] = ()
    history: tuple[Deployment, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if abs((total := math.fsum(self.mix.values())) - 1) > 1e-6:
            raise ValueError(f"the weights in mix sum to {total:g}: they must sum to 1")
        if bool(self.features) != bool(self.history) or 0 < len(self.history) < DEPLOYMENTS:
            found = f"{len(self.features)} features and {len(self.history)} deployments"
            raise ValueError(f"{found}: give features and at least {DEPLOYMENTS} deployments, or neither")
        for number, row in enumerate(self.history, 1):
            if len(row.features) != len(self.features) or row.tolerance.keys() != self.mix.keys():
                asked = f"{len(self.features)} features and a tolerance for each of {', '.join(self.mix)}"
                raise ValueError(f"deployment {number} of history is to have {asked}")
        return self

    def allocate(
        self, curves: Mapping[str, Mapping[str, Tensor]], sizes: Mapping[str, int], fraction: float, seed: int = 0
    ) -> tuple[dict[str, Unstructured], WorkloadFacts]:
        """Decide the sparsity of every operator, as ``split_budget`` does with the curves of one task."""
        budget, mix = ZerosBudget(sizes, fraction), fp64(list(self.mix.values()))
        zeros, losses = decisions(budget, [curves[task] for task in self.mix], mix, several=bool(self.history))
        chosen = 1
        if self.history:
            costs = Costs(losses / (unit := max(float(losses[0] @ mix), 1e-30)), mix)
            features = fp64([row.features for row in self.history])
            stood = fp64([[row.tolerance[task] for task in self.mix] for row in self.history]) / unit
            _, forecast = learn(features, stood, costs, seed)
            chosen = int(costs.expected(*forecast(fp64([self.features]))).argmin())
        rows = zip(self.mix.items(), losses[0].tolist(), losses[chosen].tolist(), strict=True)
        tasks = {name: {"weight": m, "uniform": before, "predicted": now} for (name, m), before, now in rows}
        facts = WorkloadFacts(fingerprint=self.fingerprint(), deployments=len(self.history), tasks=tasks)
        return budget.sparsities(zeros[chosen]), facts


def decisions(
    budget: ZerosBudget, curves: Sequence[Mapping[str, Tensor]], mix: Tensor, *, several: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (decisions, operators) zeros and (decisions, tasks) losses: uniform, the mix, ``several``."""
    slopes = torch.stack([budget.slopes(task) for task in curves])
    lowest = torch.stack([torch.stack([curve[0].double() for curve in task.values()]).sum() for task in curves])
    # Relative losses on the lattice, so that tasks of different difficulty are equally finely divided.
    scale = 1 / (lowest + budget.rise(slopes, budget.uniform)).clamp_min(1e-300)
    tasks, mixes = len(curves), [mix]
    parts = max(each for each in range(1, DECISIONS) if math.comb(each + tasks - 1, tasks - 1) <= max(DECISIONS, tasks))
    for bars in itertools.combinations(range(parts + tasks - 1), tasks - 1) if several else ():
        mixes.append((torch.tensor([-1, *bars, parts + tasks - 1]).diff() - 1).double() / parts * scale)
    zeros = [budget.uniform, *(budget.cheapest(torch.tensordot(weights, slopes, 1)) for weights in mixes)]
    return torch.stack(zeros), torch.stack([lowest + budget.rise(slopes, row) for row in zeros])


class Costs(NamedTuple):
    """Costs of decisions with (decisions, tasks) losses, in units of the mean loss at uniform sparsity."""

    losses: Tensor
    mix: Tensor

    def known(self, tolerances: Tensor) -> Tensor:
        """Compute f, (deployments, decisions), from (deployments, tasks) tolerances."""
        return self._sum((self.losses - tolerances[:, None]).relu())

    def expected(self, mean: Tensor, spread: Tensor) -> Tensor:
        """Compute E, (deployments, decisions), for Gaussian tolerances (deployments, tasks)."""
        gap, spread = self.losses - mean[:, None], spread[:, None]
        z = gap / spread
        return self._sum(gap * torch.special.ndtr(z) + spread * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))

    def _sum(self, excess: Tensor) -> Tensor:
        return (EXCESS * excess + 0.5 * DAMAGE * self.losses.square()) @ self.mix


def energy_loss(best: Tensor, energy: Tensor, cost: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute a number with the loss's gradient from (cases,) E(x, a*) and (cases, decisions) E and f."""
    q, p = (torch.softmax(-each.detach() / temperature, -1) for each in (energy, cost))
    forecast = (q * energy).sum(-1)
    return (best - forecast + PENALTY * ((p * energy).sum(-1) - forecast)).mean()


class Forecast(nn.Module):
    """Mean and deviation, linear in the features, begun at those of the (cases, quantities) outcomes."""

    def __init__(self, features: Tensor, outcomes: Tensor) -> None:
        super().__init__()
        # A feature with one value in all cases teaches nothing of another value.
        self._scale = features.std(0).clamp_min(1e-9).masked_fill((features == features[0]).all(0), math.inf)
        self._center, spread = features.mean(0), outcomes.std(0).clamp_min(1e-6)
        self._weight = nn.Parameter(features.new_zeros(features.shape[1], 2 * outcomes.shape[1]))
        self._bias = nn.Parameter(torch.cat([outcomes.mean(0), spread + torch.log(-torch.expm1(-spread))]))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each (cases, quantities), from (cases, features)."""
        mean, spread = ((features - self._center) / self._scale @ self._weight + self._bias).chunk(2, -1)
        return mean, nn.functional.softplus(spread) + 1e-6


def train(model: nn.Module, loss: Callable[[], Tensor], judge: Callable[[], float], epochs: int, rate: float) -> int:
    """Take Adam steps on all cases at once, keep the state that is judged least, return its epoch."""
    optimizer, least, kept = torch.optim.Adam(model.parameters(), lr=rate), math.inf, (0, model.state_dict())
    for epoch in range(epochs + 1):
        with torch.no_grad():
            now = judge()
        if now < least:
            least, kept = now, (epoch, deepcopy(model.state_dict()))
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
    model.load_state_dict(kept[1])
    return kept[0]


def learn(features: Tensor, tolerances: Tensor, costs: Costs, seed: int = 0) -> tuple[Forecast, Forecast]:
    """Learn a forecast by maximum likelihood, and from there by SO-EBM; return both."""
    order = torch.randperm(len(features), generator=seeded(seed, "forecast rows"))
    held, used = order[: len(order) // 5], order[len(order) // 5 :]
    forecast, known = Forecast(features[used], tolerances[used]), costs.known(tolerances)

    def likelihood(rows: Tensor) -> Tensor:
        mean, spread = forecast(features[rows])
        return torch.mean(0.5 * ((tolerances[rows] - mean) / spread).square() + spread.log())

    train(forecast, lambda: likelihood(used), lambda: float(likelihood(held)), epochs=300, rate=0.01)
    two_stage, best = deepcopy(forecast), known[used].argmin(1, keepdim=True)
    temperature = float(costs.expected(*two_stage(features[used])).detach().std(1).median())

    def loss() -> Tensor:
        energy = costs.expected(*forecast(features[used]))
        return energy_loss(energy.gather(1, best)[:, 0], energy, known[used], temperature)

    def paid() -> float:
        return float(known[held].gather(1, costs.expected(*forecast(features[held])).argmin(1, keepdim=True)).mean())

    train(forecast, loss, paid, epochs=40, rate=1e-3)
    return two_stage, forecast
