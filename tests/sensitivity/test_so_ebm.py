"""SO-EBM: its gradient and weights against quadrature, and the published problem of ``benchmarks/power_scheduling``."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fistapruner.sensitivity.forecast import Forecast, expected_excess, fit_forecast, train
from fistapruner.sensitivity.so_ebm import energy_loss, importance_weights
from scipy.optimize import minimize
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import power_scheduling as power


def test_expected_excess_is_the_integral() -> None:
    values = torch.linspace(-1.0, 3.0, 9, dtype=torch.float64)
    mean, spread = torch.tensor(1.2, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    y = torch.linspace(1.2 - 4.0, 1.2 + 4.0, 400001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((y - mean) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
    expected = torch.stack([torch.trapezoid((value - y).relu() * density, y) for value in values])
    assert torch.allclose(expected_excess(values, mean, spread), expected, rtol=1e-7, atol=1e-9)


def test_gradient_equals_quadrature_in_one_dimension() -> None:
    """∇E(a*) - 𝔼_q ∇E + λ (𝔼_p ∇E - 𝔼_q ∇E) is the gradient of E(a*) + log Z + λ KL(p || q), all on a fine grid."""
    grid, penalty = torch.linspace(0.0, 9.0, 90001, dtype=torch.float64), 0.3
    outcome = torch.tensor(1.3, dtype=torch.float64)
    parameters = torch.tensor([1.0, 0.3], dtype=torch.float64, requires_grad=True)
    width = float(grid[1] - grid[0])

    energy = power.hourly_energy(grid, *parameters)
    log_q = -energy - (torch.logsumexp(-energy, 0) + math.log(width))
    cost = power.hourly_cost(grid, outcome)
    log_p = -cost - (torch.logsumexp(-cost, 0) + math.log(width))
    best = power.hourly_energy(outcome, *parameters)
    divergence = (log_p.exp() * (log_p - log_q)).sum() * width
    log_z = torch.logsumexp(-energy, 0) + math.log(width)
    (exact,) = torch.autograd.grad(best + log_z + penalty * divergence, parameters)

    energy, best = power.hourly_energy(grid, *parameters), power.hourly_energy(outcome, *parameters)
    q, p = importance_weights(energy), importance_weights(cost)
    (found,) = torch.autograd.grad(energy_loss(best[None], energy[None], q[None], p[None], penalty), parameters)
    assert torch.allclose(found, exact, rtol=1e-9)


def test_importance_sampler_equals_the_exact_expectation() -> None:
    """𝔼_q of a decision and of its square, from 100,000 draws of another distribution, within 3 standard errors."""
    mean, spread = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    grid = torch.linspace(-2.0, 12.0, 140001, dtype=torch.float64)
    exact = importance_weights(power.hourly_energy(grid, mean, spread))
    generator = torch.Generator().manual_seed(0)
    drawn = 1.8 + torch.randn(100_000, generator=generator, dtype=torch.float64)
    weights = importance_weights(power.hourly_energy(drawn, mean, spread) - 0.5 * (drawn - 1.8) ** 2)
    assert float(weights.sum()) == pytest.approx(1)
    for power_of in (1, 2):
        expectation = (exact * grid**power_of).sum()
        estimate = (weights * drawn**power_of).sum()
        error = (weights * (drawn**power_of - estimate)).square().sum().sqrt()
        assert abs(float(estimate - expectation)) < 3 * float(error)


def test_weights_do_not_change_when_energies_are_shifted() -> None:
    energy = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(importance_weights(energy + 7.0), importance_weights(energy))
    assert torch.allclose(importance_weights(3 * energy, temperature=3.0), importance_weights(energy))


def test_effective_size_of_equal_weights_and_of_a_dominant_one() -> None:
    assert float(power.effective_size(torch.full((128,), 1 / 128))) == pytest.approx(128)
    assert float(power.effective_size(torch.tensor([1.0, 0.0, 0.0]))) == 1.0


def test_published_sampler_degenerates_in_24_dimensions() -> None:
    """Of 128 schedules about one counts; the weights of single hours stay usable."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.zeros(400, power.HOURS, dtype=torch.float64), torch.tensor(0.12, dtype=torch.float64)
    loads = mean + spread * torch.randn(400, power.HOURS, generator=generator, dtype=torch.float64)
    schedules, parts = power.sample(loads, seed=0)
    energy = power.hourly_energy(schedules, mean[:, None], spread)
    cost = power.hourly_cost(schedules, loads[:, None])

    def sizes(hours: int) -> tuple[float, float]:
        log_proposal = parts[..., :hours, :].sum(-2).logsumexp(-1)
        weights = (importance_weights(values[..., :hours].sum(-1) + log_proposal) for values in (energy, cost))
        q, p = (float(power.effective_size(one).median()) for one in weights)
        return q, p

    assert sizes(1) == pytest.approx((6.0, 15.5), rel=0.25)
    assert sizes(2) == pytest.approx((2.9, 6.6), rel=0.25)
    assert max(sizes(24)) < 1.4


def test_schedules_are_optimal_and_keep_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, power.HOURS, generator=generator, dtype=torch.float64).cumsum(1) * 0.3
    spread = 0.05 + 0.2 * torch.rand(3, power.HOURS, generator=generator, dtype=torch.float64)
    found = power.decide(mean, spread)
    assert float(found.diff(dim=1).abs().max()) <= power.RAMP + 1e-9
    assert float(found.diff(dim=1).abs().max()) > power.RAMP - 0.01  # the limit binds here
    ramps = np.diff(np.eye(power.HOURS), axis=0)
    limits = {"type": "ineq", "fun": lambda x: np.concatenate([power.RAMP - ramps @ x, power.RAMP + ramps @ x])}
    for day in range(3):

        def cost(x: np.ndarray, day: int = day) -> float:
            return float(power.hourly_energy(torch.from_numpy(x), mean[day], spread[day]).sum())

        other = minimize(cost, found[day].numpy(), method="SLSQP", constraints=limits, options={"maxiter": 200})
        assert cost(found[day].numpy()) == pytest.approx(other.fun, abs=2e-3)


def test_gradient_through_the_decision_is_the_slope_of_its_cost() -> None:
    days = power.draw_days(12, seed=1, noise=0.2)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([0.02, 0.0], dtype=torch.float64))

        def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
            spread = torch.full_like(days.loads, 0.2) * self.shift[1].exp()
            return days.loads.roll(1, 0) + self.shift[0], spread

    forecast = Shifted()
    (found,) = torch.autograd.grad(power.quadratic_program_loss(forecast, days), [forecast.shift])
    for one in range(2):
        costs = []
        for change in (1e-4, -1e-4):
            with torch.no_grad():
                forecast.shift[one] += change
            costs.append(power.mean_cost(forecast, days))
            with torch.no_grad():
                forecast.shift[one] -= change
        assert float(found[one]) == pytest.approx((costs[0] - costs[1]) / 2e-4, rel=0.02)


def test_no_load_changes_faster_than_the_limit() -> None:
    """So the best schedule in hindsight is the load."""
    days = power.draw_days(200, seed=0, noise=0.1)
    assert float(days.loads.diff(dim=1).abs().max()) <= power.RAMP + 1e-12


def test_benchmark_compares_all_methods_on_the_same_days() -> None:
    rows = power.run(seed=0, days=80, noise=0.01, steps=2)
    assert next(iter(rows)) == "two-stage"
    assert len(rows) == 5
    assert all(math.isfinite(cost) and cost > 0 for cost, _ in rows.values())


def test_training_never_ends_worse_than_it_began() -> None:
    forecast = nn.Linear(1, 1)
    before = {name: value.clone() for name, value in forecast.state_dict().items()}
    kept = train(
        forecast,
        lambda: forecast(torch.ones(1, 1)).sum(),
        lambda: -float(forecast.bias),  # the judge disagrees with the loss
        epochs=5,
        learning_rate=0.1,
    )
    assert kept == 0
    assert all(torch.equal(value, before[name]) for name, value in forecast.state_dict().items())


def test_a_forecast_finds_means_and_deviations() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(600, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(600, 1, generator=generator, dtype=torch.float64)
    outcomes = 3 * features + (0.1 + 0.4 * features) * noise
    forecast = Forecast(features[:400], outcomes[:400])
    fit_forecast(forecast, features[:400], outcomes[:400], (features[400:], outcomes[400:]))
    mean, spread = forecast(torch.tensor([[0.2], [0.8]], dtype=torch.float64))
    assert mean.flatten().tolist() == pytest.approx([0.6, 2.4], abs=0.1)
    assert spread.flatten().tolist() == pytest.approx([0.18, 0.42], rel=0.25)
