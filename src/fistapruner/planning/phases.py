"""Estimate the time of what a run does beside pruning: writing text, measuring, evaluating."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from ..allocate.measure import differentiates, needs_measuring, windows_measured
from ..models.layerwise import LayerwiseModel
from ..runs.records import PlanRow
from ..settings.settings import Recipe
from ..text import SELF
from ..text.generate import generation_steps
from .time_probe import Beside

PHASES = {
    "writing the calibration text": "calibration",
    "measuring the dense model": "sensitivity",
    "evaluation": "evaluation",
    "sample prompts": "samples",
}
"""Phases of a run's time, by their name in a plan."""

BACKWARD = 4
"""Passes that a forward pass with a backward one takes, in which each layer runs again."""

TIMED = 3
"""Steps of generating that are timed."""


def measure_phases(
    model: LayerwiseModel, recipe: Recipe, seqlen: int, beside: Beside, *, drawn: bool, after: tuple[int, int]
) -> dict[str, float]:
    """Estimate the seconds of every phase beside pruning that a run has, by its name in :data:`PHASES`.

    Args:
        model: the model.
        recipe: settings.
        seqlen: tokens in a calibration window.
        beside: what was timed with pruning.
        drawn: whether the calibration windows are there already.
        after: tokens that are evaluated and tokens that continue sample prompts after the run, of all models.
    """
    samples = recipe.calibration.samples
    layers = sum(weight.numel() for layer in model.layers for weight in layer.parameters())
    whole = 1 + model.vocabulary * model.width / layers  # with the head
    text, measuring, evaluation, prompts = PHASES
    found = {}
    if SELF in recipe.calibration.sources.values() and not drawn:
        batch, steps = generation_steps(model, samples, seqlen)
        found[text] = steps * whole * _step_seconds(model, batch)
    if needs_measuring(recipe):
        passes = windows_measured(samples) * seqlen * (BACKWARD if differentiates(recipe) else 1)
        found[measuring] = passes * whole * beside.token + beside.curves
    evaluated, continued = after
    if evaluated:
        found[evaluation] = evaluated * whole * beside.token
        found[prompts] = continued * whole * _step_seconds(model, 1)
    return found


def _step_seconds(model: LayerwiseModel, texts: int) -> float:
    """Measure the seconds in which all decoder layers take one token of each of ``texts`` texts."""
    with model.embeddings_and_head(head=False):
        call = model.calls(texts, 1)[0]
    hidden = torch.zeros(texts, 1, model.width, dtype=model.dtype, device=model.device)
    with model.layer(0), torch.no_grad():
        model.run(0, hidden, call)
        begin = time.perf_counter()
        for _ in range(TIMED):
            model.run(0, hidden, call).cpu()
        return (time.perf_counter() - begin) / TIMED * len(model)


def with_phases(rows: Sequence[PlanRow], split: Mapping[str, float]) -> list[PlanRow]:
    """Add the measured times of phases to the rows of a plan."""
    return [
        row.model_copy(update={"actual": split[PHASES[row.quantity]]}) if PHASES.get(row.quantity) in split else row
        for row in rows
    ]
