"""The runs that a comparison makes: what they are, what they need, and their calibration windows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FistaPrunerError
from ..execution.context import open_model
from ..execution.executors import default_threads
from ..measure.data import load_windows
from ..models.source import ModelSource
from ..pruning.inputs import check_sources
from ..pruning.settle import draw_windows, drawing_of
from ..runs.comparison_records import RUNS
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runtime.devices import cpu_threads
from ..runtime.numerics import dtype_name
from ..settings.settings import Recipe
from ..text import SELF, calibration_length
from .contenders import Contender
from .measure import shared_text
from .protocol import FOLLOWED, Protocol, distinct_seeds

CalibrationWindows = dict[str, tuple[Tensor, dict[str, Any]]]
"""Calibration windows, and how they were drawn, by their settings."""


@dataclass(frozen=True)
class CompareJob:
    """One run of a comparison.

    Args:
        label: the method as the user wrote it.
        seed: of the run and of its calibration windows.
        recipe: all settings.
    """

    label: str
    seed: int
    recipe: Recipe

    @property
    def key(self) -> tuple[str, str, int]:
        """Identify its row among those of a comparison."""
        return self.label, str(self.recipe.sparsity), self.seed

    def run(self, folder: Path) -> PruneDirectory:
        """Return its run directory in that of a comparison."""
        return PruneDirectory(folder / RUNS / run_name(*self.key))

    def resolved(self, folder: Path, family: Callable[[], str]) -> CompareJob:
        """Return this run with ``auto`` of its recipe resolved.

        What depends on the executor stays as it is in a run that has begun in ``folder``, of the comparison.
        """
        run, earlier = self.run(folder), None
        if (record := run.record()) is not None:
            earlier = Recipe.build(record.recipe, str(run.run_file)).model_dump(mode="json", include=FOLLOWED)
        return replace(self, recipe=self.recipe.resolved(earlier=earlier, family=family))


def plan_jobs(
    contenders: Sequence[Contender], sparsities: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any]
) -> list[CompareJob]:
    """List the runs of a comparison: every method at every sparsity, seed after seed.

    Raises:
        FistaPrunerError: nothing to do, what is no list of seeds, a seed or sparsity named twice, or
            settings that are no recipe.
    """
    jobs = []
    for seed in distinct_seeds(seeds):
        for sparsity in sparsities:
            for contender in contenders:
                jobs.append(CompareJob(contender.label, seed, contender.recipe(settings, sparsity, seed)))
    if not jobs:
        raise FistaPrunerError("nothing to compare: name methods, sparsities and seeds")
    if len({str(job.recipe.sparsity) for job in jobs}) < len(sparsities):  # 0.5 is 50%
        raise FistaPrunerError(f"--sparsity {','.join(sparsities)!r} names the same sparsity twice")
    return jobs


def check_jobs(jobs: Sequence[CompareJob], folder: Path) -> None:
    """Check what can be checked of the runs before the model is looked for.

    Raises:
        FistaPrunerError: text that is not there.
    """
    for job in jobs:
        if not job.run(folder).run_file.exists():
            check_sources(job.recipe)


def shared_texts(jobs: Sequence[CompareJob], data: str) -> list[str]:
    """Warn of evaluation text that has documents of the calibration text of a run."""
    calibration = {source: None for job in jobs for source in job.recipe.calibration.sources.values()}
    warning = shared_text(calibration, data)
    return [] if warning is None else [warning]


def agree_protocol(
    source: ModelSource, recipe: Recipe, data: str, windows: int | None, settings: Mapping[str, Any]
) -> Protocol:
    """Fix what all rows share, from the first ``recipe``: evaluation windows, precision, calibration."""
    opened = open_model(source, recipe)
    text = load_windows(data, source.tokenizer(), calibration_length(recipe.calibration, opened), windows)
    calibration = Recipe.build({"calibration": settings.get("calibration") or {}}).resolved().calibration
    execution = recipe.execution
    return Protocol(
        text=text,
        dtype=dtype_name(opened.dtype),
        calibration=calibration,
        device=execution.device,
        asked_dtype=recipe.dtype,
        memory_limit=execution.memory_limit,
        shared=settings,
        family=source.family,
    )


def draw(
    job: CompareJob, source: ModelSource, folder: Path, calibrated: CalibrationWindows, listener: Listener
) -> None:
    """Draw the calibration windows of a row that has not begun, unless another row has the same.

    They are drawn before the row, so that their time is not that of the method named first.

    Args:
        job: the row.
        source: the model's folder.
        folder: of the comparison.
        calibrated: receives the windows.
        listener: receives progress.

    Raises:
        FistaPrunerError: a text that is too short or cannot be read, or a model that cannot generate it.
    """
    recipe, calibration = job.recipe, job.recipe.calibration
    key = calibration.model_dump_json()
    if key in calibrated or job.run(folder).run_file.exists():
        return
    model = open_model(source, recipe)
    seqlen, found = calibration_length(calibration, model), None
    if SELF in calibration.sources.values():  # it takes long: rows that are begun or were stopped have left it
        drawing = drawing_of(recipe, model, seqlen)
        earlier = (PruneDirectory(run).drawn(drawing) for run in sorted((folder / RUNS).glob("*")))
        found = next(filter(None, earlier), None)
    with cpu_threads(default_threads(recipe.execution)):
        drawn = found or draw_windows(recipe, source, model, source.tokenizer(), seqlen, listener)
    model.check_tokens(drawn[0])
    calibrated[key] = drawn


def run_name(label: str, sparsity: str, seed: int) -> str:
    """Name the folder of a run: readable, and different for different labels."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{label}-{sparsity.replace(':', 'of').replace('%', '')}")[:80]
    return f"{plain}-seed{seed}-{hashlib.sha256(f'{label} {sparsity}'.encode()).hexdigest()[:6]}"
