"""Forecast uncertain quantities from features, as independent Gaussians given by a small network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..runtime.numerics import seeded

HIDDEN = 32
"""Width of the two hidden layers: enough for some hundred cases."""

EPOCHS = 1000
"""Epochs of maximum likelihood, at most."""

PATIENCE = 50
"""Epochs without improvement on held-out cases after which training stops."""

LEARNING_RATE = 3e-3
"""Learning rate of maximum likelihood."""


class Forecast(nn.Module):
    """Mean and standard deviation of each quantity: a network with two hidden layers (tanh), in fp64.

    Inputs are standardised with the mean and deviation of the training cases (:func:`feature_scale`).

    Args:
        features: (cases, features) of the training cases.
        outcomes: (cases, quantities) of the training cases.
        seed: of the first weights.
    """

    _center: Tensor
    _scale: Tensor

    def __init__(self, features: Tensor, outcomes: Tensor, *, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("_center", features.mean(0))
        self.register_buffer("_scale", feature_scale(features))
        widths = (features.shape[1], HIDDEN, HIDDEN, 2 * outcomes.shape[1])
        layers = [  # without torch's own first weights, which would draw from its global generator
            nn.utils.skip_init(nn.Linear, before, after, dtype=torch.float64)
            for before, after in itertools.pairwise(widths)
        ]
        generator = seeded(seed, "forecast")
        with torch.no_grad():
            for layer in layers:
                layer.weight.normal_(std=1 / math.sqrt(layer.in_features), generator=generator)
                layer.bias.zero_()
            layers[-1].weight.mul_(0.1)  # begin at the distribution without features
            layers[-1].bias.copy_(torch.cat([outcomes.mean(0), _softplus_inverse(outcomes.std(0).clamp_min(1e-6))]))
        self._network = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each (cases, quantities), from (cases, features)."""
        mean, spread = self._network((features - self._center) / self._scale).chunk(2, -1)
        return mean, nn.functional.softplus(spread) + 1e-6


def feature_scale(features: Tensor) -> Tensor:
    """Compute what divides the (features,) distances from the mean: the deviation over (cases, features).

    It is infinite where all cases have one value: they teach nothing of another one, which counts as theirs.
    """
    return features.std(0).clamp_min(1e-9).masked_fill((features == features[0]).all(0), math.inf)


def fit_forecast(
    forecast: nn.Module, features: Tensor, outcomes: Tensor, held_out: tuple[Tensor, Tensor], *, epochs: int = EPOCHS
) -> None:
    """Fit a forecast by maximum likelihood, stopped early on held-out cases.

    Args:
        forecast: gives mean and standard deviation from features, such as :class:`Forecast`; trained in place.
        features: (cases, features).
        outcomes: (cases, quantities).
        held_out: features and outcomes of the cases that decide when to stop.
        epochs: at most.
    """
    train(
        forecast,
        lambda: negative_log_likelihood(forecast(features), outcomes),
        lambda: float(negative_log_likelihood(forecast(held_out[0]), held_out[1])),
        epochs=epochs,
        learning_rate=LEARNING_RATE,
        patience=PATIENCE,
    )


def negative_log_likelihood(forecast: tuple[Tensor, Tensor], outcomes: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of outcomes, without its constant."""
    mean, spread = forecast
    return (0.5 * ((outcomes - mean) / spread).square() + spread.log()).mean()


def train(
    forecast: nn.Module,
    loss: Callable[[], Tensor],
    judge: Callable[[], float],
    *,
    epochs: int,
    learning_rate: float,
    patience: int | None = None,
) -> int:
    """Train with Adam on all cases at once, and keep the state that a judge likes best.

    The state before training is the first candidate, so that training never ends worse than it began.

    Args:
        forecast: what is trained, in place.
        loss: what to minimise, of the forecast as it is.
        judge: what decides which state is kept: least is best.
        epochs: steps, at most.
        learning_rate: of Adam.
        patience: epochs without improvement after which training stops; None takes all.

    Returns:
        The epoch that is kept; 0 is the state before training.
    """
    optimizer = torch.optim.Adam(forecast.parameters(), lr=learning_rate)

    def snapshot() -> tuple[float, dict[str, Tensor]]:
        forecast.eval()
        with torch.no_grad():
            return judge(), {name: value.clone() for name, value in forecast.state_dict().items()}

    best, kept = snapshot(), 0
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        forecast.train()
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        now = snapshot()
        if now[0] < best[0]:
            best, kept = now, epoch
        elif patience is not None and epoch - kept >= patience:
            break
    forecast.load_state_dict(best[1])
    forecast.eval()
    return kept


def expected_excess(value: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Compute ``𝔼 (value - y)₊`` for y ~ N(mean, spread²), in closed form.

    With ``z = (value - mean)/spread`` it is ``(value - mean) Φ(z) + spread φ(z)``; its derivative in the value is Φ(z).
    """
    z = (value - mean) / spread
    below: Tensor = torch.special.ndtr(z)
    return (value - mean) * below + spread * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _softplus_inverse(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))
