"""Does SO-EBM decide better than two-stage learning? The published problem of power scheduling, on synthetic data.

Every day, the power of each of 24 hours is scheduled before the load is known. An hour costs 50 for each unit that is
missing, 0.5 for each that is too much, and half the squared difference; neighbouring hours differ by at most 0.4. Costs
and limits are those of Donti et al. 2017 (arXiv 1703.04529) and of SO-EBM (Kong et al. 2022, arXiv 2211.13837). The
loads are drawn here: a daily curve, weekends, temperature, an error of the whole day and one of every hour, larger on
hot days. They are not those of the papers, so only differences between rows can be compared with theirs.

    python benchmarks/power_scheduling.py            # ten draws at two sizes of the error, on one thread
    python benchmarks/power_scheduling.py --seeds 3 --noise 0.01

Rows of the table, all with the same network (that of the public programs, narrower: batch norm, ReLU, dropout), the
same days to learn from and the same held-out days:

* two-stage: mean and deviation of each hour by maximum likelihood, then the schedule of least expected cost.
* two-stage, deviations times one factor: the factor is chosen on held-out days.
* quadratic programming: the two-stage network goes on learning from the cost of its schedules, differentiated through
  the Newton system (a quadratic program) at the solution, as in Donti et al.
* SO-EBM, published sampler: 128 schedules around the best one in hindsight, with weights for whole days.
* SO-EBM, an hour at a time: the same schedules; each hour has its own weights, because costs are a sum over hours.

As in the paper, the energy leaves out the limit on neighbouring hours; the decision keeps it. The best schedule in
hindsight is the load itself.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from workload_allocation import mean_with_error

from fistapruner.papers.so_ebm import energy_loss, train
from fistapruner.runtime.numerics import seeded
from fistapruner.runtime.show import counted

HOURS = 24
MISSING, SURPLUS = 50.0, 0.5
RAMP = 0.4
SCALES = (0.1, 0.05, 0.02)
DRAWS = 128
BATCH = 64
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
HIDDEN = 64
SHARPNESS = 1e5
"""Of the barrier: limits are kept, and costs are within 46/SHARPNESS of the best."""


@dataclass(frozen=True)
class Days:
    """Features (days, features) known the day before, and loads (days, 24)."""

    features: Tensor
    loads: Tensor

    def __getitem__(self, days: slice | Tensor) -> Days:
        return Days(self.features[days], self.loads[days])


def draw_days(days: int, seed: int, noise: float) -> Days:
    """Draw synthetic days; no load changes by more than the limit from one hour to the next."""
    generator = seeded(seed, "power")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hour, day = torch.arange(HOURS, dtype=torch.float64), torch.arange(days, dtype=torch.float64)
    weekend = (day % 7 >= 5).double()
    season = torch.stack([torch.sin(2 * math.pi * day / 365), torch.cos(2 * math.pi * day / 365)], 1)
    heat = 0.8 * season[:, 1] + 0.5 * normal(days)
    curve = 0.5 * torch.sin(2 * math.pi * (hour - 9) / 24) + 0.2 * torch.sin(4 * math.pi * (hour - 7) / 24)
    afternoon = torch.exp(-0.5 * ((hour - 15) / 4) ** 2)
    expected = 2 + curve - 0.3 * weekend[:, None] * (1 + curve) + 0.175 * heat.square()[:, None] * afternoon
    loads = expected + noise * (1 + heat.relu())[:, None] * (normal(days, 1) + 0.5 * normal(days, HOURS))
    for one in range(1, HOURS):
        loads[:, one] = loads[:, one - 1] + (loads[:, one] - loads[:, one - 1]).clamp(-RAMP, RAMP)
    known = torch.stack([heat[1:], heat[1:] ** 2, weekend[1:]], 1)
    return Days(torch.cat([loads[:-1], known, season[1:]], 1), loads[1:])


class Network(nn.Module):
    """Mean and deviation of each hour. Forecasts are too wide where dropout disturbs more than the error does.

    Args:
        days: standardise features and loads.
        seed: of the first weights.
    """

    def __init__(self, days: Days, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name, values in (("features", days.features), ("loads", days.loads)):
            self.register_buffer(f"{name}_mean", values.mean(0))
            self.register_buffer(f"{name}_scale", values.std(0).clamp_min(1e-9))
        layers: list[nn.Module] = []
        for inputs in (days.features.shape[1], HIDDEN):
            layers += [nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN, 2 * HOURS))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        inputs = (features - self.features_mean) / self.features_scale
        mean, spread = self.layers(inputs.float()).double().chunk(2, -1)
        return self.loads_mean + self.loads_scale * mean, self.loads_scale * nn.functional.softplus(spread) + 1e-6


def hourly_cost(schedule: Tensor, loads: Tensor) -> Tensor:
    """f of each hour."""
    short = loads - schedule
    return MISSING * short.relu() + SURPLUS * (-short).relu() + 0.5 * short.square()


def hourly_energy(schedule: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """E of each hour: the expectation of :func:`hourly_cost` for a Gaussian load, in closed form."""
    z = (schedule - mean) / spread
    density = spread * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    short = density - (schedule - mean) * torch.special.ndtr(-z)
    surplus = density + (schedule - mean) * torch.special.ndtr(z)
    return MISSING * short + SURPLUS * surplus + 0.5 * ((schedule - mean).square() + spread.square())


def decide(mean: Tensor, spread: Tensor) -> Tensor:
    """Find the schedules (days, 24) of least expected cost: each hour alone, or by :func:`_within_limits`."""
    with torch.no_grad():
        low, high = mean - 0.1 * spread - 1, mean + 6 * spread
        for _ in range(50):  # the derivative rises, and is negative at the mean
            middle = (low + high) / 2
            rising = (MISSING + SURPLUS) * torch.special.ndtr((middle - mean) / spread) - MISSING + middle - mean > 0
            low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
        schedule = (low + high) / 2
        beyond = schedule.diff(dim=1).abs().amax(1) > RAMP - 0.01  # nearer, the barrier's curvature matters
        if bool(beyond.any()):
            schedule[beyond] = _within_limits(mean[beyond], spread[beyond])
        return schedule


def _within_limits(mean: Tensor, spread: Tensor) -> Tensor:
    """Minimise expected costs within the limits by Newton's method with a logarithmic barrier."""
    schedule = mean.mean(1, keepdim=True).expand_as(mean).clone()
    for sharpness in (1e1, 1e3, SHARPNESS):
        for _ in range(40):
            gradient, hessian, _ = _derivatives(schedule, mean, spread, sharpness)
            step = torch.linalg.solve(hessian, gradient)
            decrement = (gradient * step).sum(1)
            if float(decrement.max()) < 1e-6:
                break
            before = _barrier(schedule, mean, spread, sharpness)
            size = torch.ones(len(mean), 1, dtype=mean.dtype)
            for _ in range(30):
                after = _barrier(schedule - size * step, mean, spread, sharpness)
                worse = ~(after <= before - 0.1 * size[:, 0] * decrement + 1e-12 * before.abs())
                if not bool(worse.any()):
                    break
                size[worse] /= 2
            size[worse] = 0.0
            schedule = schedule - size * step
    return schedule


def _barrier(schedule: Tensor, mean: Tensor, spread: Tensor, sharpness: float) -> Tensor:
    ramp = schedule.diff(dim=1)
    walls = torch.log(RAMP - ramp) + torch.log(RAMP + ramp)  # not a number outside of the limits
    return hourly_energy(schedule, mean, spread).sum(1) - walls.sum(1) / sharpness


def _derivatives(schedule: Tensor, mean: Tensor, spread: Tensor, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and Hessian of the barrier problem, and the derivative of E's gradient in the mean and spread."""
    z = (schedule - mean) / spread
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) / spread
    ramp = schedule.diff(dim=1)
    first = (1 / (RAMP - ramp) - 1 / (RAMP + ramp)) / sharpness
    second = (1 / (RAMP - ramp).square() + 1 / (RAMP + ramp).square()) / sharpness
    gradient = (MISSING + SURPLUS) * torch.special.ndtr(z) - MISSING + schedule - mean
    gradient = gradient + torch.nn.functional.pad(first, (1, 0)) - torch.nn.functional.pad(first, (0, 1))
    curvature = (MISSING + SURPLUS) * density + 1
    wall = torch.nn.functional.pad(second, (1, 0)) + torch.nn.functional.pad(second, (0, 1))
    hessian = torch.diag_embed(curvature + wall)
    hessian = hessian - torch.diag_embed(second, 1) - torch.diag_embed(second, -1)
    cross = torch.stack([-curvature, -(MISSING + SURPLUS) * density * z])
    return gradient, hessian, cross


def quadratic_program_loss(forecast: nn.Module, days: Days) -> Tensor:
    """Mean cost of the decided schedules, with its gradient by implicit differentiation."""
    mean, spread = forecast(days.features)
    fixed = mean.detach(), spread.detach()
    schedule = decide(*fixed)
    _, hessian, cross = _derivatives(schedule, *fixed, SHARPNESS)
    slope = schedule.clone().requires_grad_()
    cost = hourly_cost(slope, days.loads).sum(1).mean()
    (above,) = torch.autograd.grad(cost, slope)
    adjoint = -torch.linalg.solve(hessian, above)  # d cost / d(mean, spread) = -above · H⁻¹ · cross
    return (adjoint * (cross[0] * mean + cross[1] * spread)).sum()


def sample(best: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draw (days, 128, 24) schedules from the published mixture around (days, 24); and each hour's log density."""
    generator = seeded(seed, "schedules")
    scales = torch.tensor(SCALES, dtype=best.dtype)
    which = torch.randint(len(SCALES), (len(best), DRAWS, 1), generator=generator)
    noise = torch.randn(len(best), DRAWS, HOURS, generator=generator, dtype=best.dtype)
    offset = scales[which] * noise
    parts = -0.5 * (offset[..., None] / scales).square() - scales.log()
    return best[:, None] + offset, parts


def effective_size(weights: Tensor) -> Tensor:
    """The effective sample size ``1/Σ w²`` of weights (..., decisions)."""
    return 1 / weights.square().sum(-1)


def so_ebm_loss(forecast: nn.Module, days: Days, seed: int, *, by_hour: bool) -> tuple[Tensor, float]:
    """SO-EBM's loss on some days, and the median effective size of the weights of the forecast's distribution.

    Args:
        forecast: the network.
        days: the best schedule in hindsight is the load itself, which keeps the limit.
        seed: of the draws.
        by_hour: each hour has its own weights.
    """
    mean, spread = forecast(days.features)
    schedules, parts = sample(days.loads, seed)
    energy = hourly_energy(schedules, mean[:, None], spread[:, None])
    cost = hourly_cost(schedules, days.loads[:, None])
    best = hourly_energy(days.loads, mean, spread)
    if by_hour:  # (days, hours, draws): the marginal of the proposal is a mixture in every hour
        energy, cost, log_proposal = energy.mT, cost.mT, parts.logsumexp(-1).mT
    else:  # the scale is shared by the hours of a schedule
        energy, cost, best = energy.sum(-1), cost.sum(-1), best.sum(-1)
        log_proposal = parts.sum(-2).logsumexp(-1)
    energy, cost = energy + log_proposal, cost + log_proposal  # the weights of draws are relative to their density
    sizes = effective_size(torch.softmax(-energy.detach(), -1))
    return energy_loss(best, energy, cost) * (HOURS if by_hour else 1), float(sizes.median())


def mean_cost(forecast: nn.Module, days: Days, factor: float = 1.0) -> float:
    """Mean cost of a day's schedule."""
    with torch.no_grad():
        mean, spread = forecast(days.features)
        return float(hourly_cost(decide(mean, factor * spread), days.loads).sum(1).mean())


def run(seed: int, days: int, noise: float, steps: int) -> dict[str, tuple[float, str]]:
    """Mean cost on test days of every method, and a remark."""
    drawn = draw_days(days, seed, noise)
    size = len(drawn.loads)
    first, second = size * 64 // 100, size * 80 // 100
    learn, held, test = drawn[slice(0, first)], drawn[slice(first, second)], drawn[slice(second, size)]
    two_stage = Network(learn, seed)

    def likelihood(some: Days, *, learning: bool) -> Tensor:
        mean, spread = two_stage.train(learning)(some.features)
        return torch.mean(0.5 * ((some.loads - mean) / spread).square() + spread.log())

    train(
        two_stage,
        lambda: likelihood(learn, learning=True),
        lambda: float(likelihood(held, learning=False)),
        epochs=300,
        rate=3e-3,
    )
    two_stage.eval()
    with torch.no_grad():
        mean, spread = two_stage(test.features)
        residual = float(((test.loads - mean) / spread).square().mean())
    factor = min(FACTORS, key=lambda one: mean_cost(two_stage, held, one))
    rows = {
        "two-stage": (mean_cost(two_stage, test), f"mean squared standardised residual {residual:.2f}"),
        "two-stage, deviations times one factor": (mean_cost(two_stage, test, factor), f"factor {factor}"),
    }

    def end_to_end(name: str, loss: Callable[[nn.Module, Days, int], tuple[Tensor, float]]) -> None:
        forecast, sizes = deepcopy(two_stage), []

        def step() -> Tensor:
            batch = torch.randperm(first, generator=seeded(seed, "batch", len(sizes)))[:BATCH]
            value, effective = loss(forecast.train(), learn[batch], len(sizes))
            sizes.append(effective)
            return value

        kept = train(forecast, step, lambda: mean_cost(forecast.eval(), held), epochs=steps, rate=3e-4)
        forecast.eval()
        effective = statistics.median(sizes)
        note = "" if math.isnan(effective) else f", effective size {effective:.1f} of {DRAWS}"
        rows[name] = mean_cost(forecast, test), f"step {kept} kept{note}"

    end_to_end("quadratic programming", lambda forecast, batch, _: (quadratic_program_loss(forecast, batch), math.nan))
    end_to_end(
        "SO-EBM, published sampler",
        lambda forecast, batch, step: so_ebm_loss(forecast, batch, step, by_hour=False),
    )
    end_to_end(
        "SO-EBM, an hour at a time",
        lambda forecast, batch, step: so_ebm_loss(forecast, batch, step, by_hour=True),
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="draws of days (default: %(default)s)")
    parser.add_argument("--days", type=int, default=1000, help="days of each draw (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of learning from costs (default: %(default)s)")
    parser.add_argument("--noise", default="0.01,0.03", help="sizes of the load's error (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: at least 1 is expected")
    torch.set_num_threads(1)
    for noise in arguments.noise.split(","):
        begin, found = time.perf_counter(), []
        for seed in range(arguments.seeds):
            found.append(run(seed, arguments.days, float(noise), arguments.steps))
            line = "; ".join(f"{name} {cost:.3f} {note}".rstrip() for name, (cost, note) in found[-1].items())
            print(f"seed {seed}: {line}", flush=True)
        how = "mean ± standard error over" if len(found) > 1 else "with"
        print(
            f"\nError {noise}: mean cost of a test day, and its difference from two-stage on the same days; {how} "
            f"{counted(len(found), 'draw')} of {arguments.days} days (64 % to learn from, 16 % held out, 20 % to "
            f"test); {time.perf_counter() - begin:.0f} s on one thread"
        )
        print_table(found)


def print_table(found: list[dict[str, tuple[float, str]]]) -> None:
    """Print one row for each method."""
    base = [rows["two-stage"][0] for rows in found]
    print("\n| method | cost | difference | relative | better in |\n|---|---|---|---|---|")
    for name in found[0]:
        costs = [rows[name][0] for rows in found]
        differences = [cost - other for cost, other in zip(costs, base, strict=True)]
        wins = sum(difference < 0 for difference in differences)
        print(
            f"| {name} | {mean_with_error(costs)} | {mean_with_error(differences)} | "
            f"{100 * (sum(costs) / sum(base) - 1):+.1f} % | {wins} of {len(found)} |"
        )
    print(flush=True)


if __name__ == "__main__":
    main()
