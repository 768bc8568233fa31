"""Compare pruning methods: one model, one calibration for each seed, one evaluation text.

    DIR/
        compare.json   compare.md   compare.html    the rows; written again after every row
        runs/NAME/                                  the run directory of a row: method, sparsity, seed

Every row is a run of ``prune``, so a row that was stopped continues, and a finished one is only read. A comparison is
the rows that are asked for now. Once a row is measured its weights are deleted, because they are as large as the
model, unless the command asks to keep them; later commands leave those. Model, texts and shared settings of a folder
never change.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import FistaPrunerError, MissingExtraError, out_path
from .measure.data import Windows, check_data, load_windows
from .measure.evaluate import evaluate
from .measure.logits import KeptStates
from .measure.run import publish, shared_text
from .models.source import ModelSource, Permissions
from .pruning.context import open_model
from .pruning.run import prune
from .reporting.comparison import comparison_markdown
from .reporting.page import write_page
from .runs.directory import PruneDirectory, refuse_out
from .runs.log import LOCK, Listener, hold
from .runs.records import FIGURES, RUNS, TABLE, CompareRow, Comparison, Evaluation, ModelFacts, Report, load_comparison
from .runs.settled import flat_settings, interrupted_with, stamps, text_sha256
from .runtime.files import (
    PARTIAL,
    disk_errors,
    entries,
    json_sha256,
    remove_folder,
    write_json_atomic,
    write_text_atomic,
)
from .runtime.machine import now, versions
from .runtime.numerics import dtype_name, undisturbed
from .settings.parse import load_recipe_settings, merge_settings, read_assignments, shipped_recipes
from .settings.prune import Recipe
from .solvers import METHODS
from .solvers.own import own_method
from .text import calibration_length
from .text.sources import check_source

STATES = "dense-states"
"""File with the dense model's last hidden states on the evaluation windows, while a comparison runs."""


@undisturbed()
def compare(
    model: str | Path,
    methods: str | Sequence[str],
    sparsities: str | Sequence[str],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    data: str = "python",
    windows: int | None = None,
    keep: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
) -> Comparison:
    """Prune a model in many ways and measure all of them alike.

    Args:
        model: hub id, local folder, GGUF file, or ``smollm2``.
        methods: method chains, names of shipped recipes, or YAML recipe files, as a list or separated by commas. Each
            may have settings of its own after an ``@``: ``wanda,wanda@calibration.samples=64,best``. Of a
            recipe sparsity, calibration, seed and execution are left out: all rows use those of the comparison.
        sparsities: patterns, as a list or separated by commas: ``"50%,2:4"``.
        out: folder of the comparison. The same command goes on; rows that are there are not made again.
        seeds: each draws its own calibration windows; every method sees the same ones.
        settings: recipe settings that all rows share.
        data: text to evaluate on, as :func:`fistapruner.evaluate` takes it, in windows as long as the calibration's.
        windows: only its first so many windows.
        keep: keep the pruned checkpoints of these rows, also in later calls.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the comparison.

    Returns:
        What is in ``out/compare.json``. A method that cannot do a sparsity has a row that says why.

    Raises:
        FistaPrunerError: bad input, named, before anything is pruned; or ``out`` holds a comparison of another model,
            text or shared settings, or is in use.
    """
    listener, folder, permissions = listener or Listener(), out_path(out), Permissions(allow_pickle, trust_remote_code)
    jobs = _plan(methods, sparsities, seeds, settings or {})
    check_data(data)
    texts = dict.fromkeys(text for job in jobs for text in job.recipe.calibration.sources.values())
    for text in texts:
        check_source(text)
    _refuse_other_things(folder)
    source, shared = permissions.find(model), _recipe({"method": "magnitude"}, settings or {}, "50%", 0)
    opened = open_model(source, shared)
    cut = load_windows(data, source.tokenizer(), calibration_length(shared.calibration, opened), windows)
    measured_on = cut.sha256, dtype_name(opened.dtype)
    comparison = Comparison(
        command=command,
        started=now(),
        versions=versions(),
        model=ModelFacts(source=str(model)),
        fingerprint=_fingerprint(source, shared, measured_on),
    )
    if warning := shared_text(texts, data):
        listener.say(warning)
        comparison.warnings.append(warning)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        interrupted_with(lambda: "interrupted; nothing is lost: give the same command again"),
        hold(folder),
        closing(KeptStates(source.folder, folder / STATES)) as states,
    ):
        if (folder / FIGURES).is_file():
            _refuse_another(comparison, folder)
        rows = _Rows(str(model), source, folder, cut, measured_on, keep, states, listener, command)
        _write(folder, comparison)
        for number, job in enumerate(jobs, 1):
            listener.say(f"{number}/{len(jobs)}: {job.label}, {job.recipe.sparsity}, seed {job.seed}")
            comparison.rows.append(rows.row(job, comparison, shared))
            _write(folder, comparison)
        comparison.status, comparison.finished = "finished", now()
        _write(folder, comparison)
        try:
            listener.say(f"page: {write_page(folder)}")
        except MissingExtraError as error:
            listener.say(str(error))
    return comparison


@dataclass(frozen=True)
class _Job:
    """One row to be: the method as the user wrote it, the seed, and all settings of its run."""

    label: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its run directory: readable, and different for different rows."""
        sparsity = str(self.recipe.sparsity)
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{self.label}-{sparsity.replace(':', 'of').replace('%', '')}")[:80]
        return f"{plain}-seed{self.seed}-{hashlib.sha256(f'{self.label} {sparsity}'.encode()).hexdigest()[:6]}"


def _plan(
    methods: str | Sequence[str], sparsities: str | Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any]
) -> list[_Job]:
    """List the rows: every method at every sparsity, seed after seed."""
    patterns = [text.strip() for text in (sparsities.split(",") if isinstance(sparsities, str) else sparsities)]
    named = _read_methods(methods)
    jobs = [
        _Job(label, seed, _recipe(own, settings, sparsity, seed, label))
        for seed in seeds
        for sparsity in patterns
        for label, own in named
    ]
    if not jobs:
        raise FistaPrunerError("nothing to compare: name methods, sparsities and seeds")
    if len({job.name for job in jobs}) < len(jobs):
        raise FistaPrunerError(
            f"methods {','.join(label for label, _ in named)!r}, sparsities {','.join(patterns)!r} and seeds "
            f"{','.join(map(str, seeds))!r} name a row twice: name each method, sparsity and seed once"
        )
    return jobs


def _recipe(
    own: Mapping[str, Any], shared: Mapping[str, Any], sparsity: str, seed: int, label: str = "settings"
) -> Recipe:
    """Build the recipe of a row: its ``own`` settings over those that all rows share."""
    said = merge_settings(dict(shared), {"seed": seed})
    return Recipe.build(merge_settings(merge_settings(said, dict(own)), {"sparsity": sparsity}), label)


def _read_methods(text: str | Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Read methods separated by commas, as pairs of label and settings.

    The own settings of a method follow an ``@``. A part with ``=`` belongs to the method before it; a value in brackets
    may have commas.
    """
    groups: list[list[str]] = []
    for part in (text if isinstance(text, str) else ",".join(text)).split(","):
        last = groups[-1][-1] if groups else ""
        name, at, first = part.strip().partition("@")
        if sum(map(last.count, "[{")) > sum(map(last.count, "]}")):
            groups[-1][-1] += f",{part}"
        elif groups and "=" in name:
            groups[-1].append(part.strip())
        else:
            groups.append([name, *([first] if at else [])])
    return [_read_method(name, given) for name, *given in groups]


def _read_method(name: str, given: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Read one method, chain or recipe with its own settings."""
    label = f"{name}@{','.join(given)}" if given else name
    settings = read_assignments(given, f"--methods {label}")
    if refused := {"method", "sparsity", "seed"} & set(settings):
        raise FistaPrunerError(
            f"--methods {label}: {min(refused)} is no setting of one method: use --methods, --sparsity or --seeds"
        )
    if name in shipped_recipes() or name.endswith((".yaml", ".yml")):
        recipe = load_recipe_settings(name)
        base = {key: recipe[key] for key in recipe if key not in ("sparsity", "calibration", "seed", "execution")}
    else:
        known = METHODS.get(name) or own_method(name)
        inner = set(settings) & set(known.descriptions()) - set(Recipe.model_fields) if known else ()
        base = {"method": {name: {key: settings.pop(key) for key in sorted(inner)}} if inner else name}
    return label, merge_settings(base, settings)


def _drawing(recipe: Recipe) -> str:
    """Return the settings that decide the calibration windows, as text."""
    return f"{recipe.calibration.model_dump_json()} {recipe.seed}"


def _fingerprint(source: ModelSource, shared: Recipe, measured_on: tuple[str, str]) -> dict[str, Any]:
    """Return what all rows share, by name."""
    calibration = shared.calibration.with_absolute_files()
    settings = shared.model_copy(update={"calibration": calibration}).identity()
    shared_by_all = {key: settings[key] for key in settings if key not in ("method", "sparsity", "seed")}
    texts = {"calibration text": text_sha256(shared), "evaluation text": measured_on[0], "precision": measured_on[1]}
    return {"model": json_sha256(dict(stamps(source.checkpoint()))), **flat_settings(shared_by_all), **texts}


def _refuse_other_things(folder: Path) -> None:
    """Refuse a folder that has things in it and is no comparison."""
    refuse_out(folder)
    if not folder.is_dir() or (folder / FIGURES).is_file():
        return
    if names := {path.name for path in entries(folder)} - {LOCK, FIGURES + PARTIAL}:
        raise FistaPrunerError(f"--out {folder} is a folder with other things in it ({min(names)}); name a new folder")


def _refuse_another(comparison: Comparison, folder: Path) -> None:
    """Refuse a ``folder`` with a comparison of another model, text or settings."""
    before = load_comparison(folder)
    for name, value in comparison.fingerprint.items():
        if before.fingerprint.get(name) != value:
            raise FistaPrunerError(f"--out {folder} holds a comparison with another {name}: name another folder")


def _write(folder: Path, comparison: Comparison) -> None:
    write_json_atomic(folder / FIGURES, comparison.model_dump(mode="json"))
    write_text_atomic(folder / TABLE, comparison_markdown(comparison))


@dataclass(frozen=True)
class _Rows:
    """Make the rows of a comparison.

    Args:
        text: windows that all rows are measured on; ``measured_on``: their hash, and the precision.
        keep: leave the checkpoints, and make those again that are not there any more.
        states: hidden states of the dense model on these windows, which therefore runs once.
        drawn: calibration windows that a row has drawn, and how, by their settings.
    """

    model: str
    source: ModelSource
    folder: Path
    text: Windows
    measured_on: tuple[str, str]
    keep: bool
    states: KeptStates
    listener: Listener
    command: str | None
    drawn: dict[str, tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)

    def row(self, job: _Job, comparison: Comparison, shared: Recipe) -> CompareRow:
        """Make one row, which says why where it has no figures; tell ``comparison`` what all share."""
        row = CompareRow(
            method="+".join(step.name for step in job.recipe.method),
            label=job.label,
            sparsity=str(job.recipe.sparsity),
            seed=job.seed,
            settings=job.recipe.model_dump(mode="json", exclude={"execution"}),
        )
        run = PruneDirectory(self.folder / RUNS / job.name)
        try:
            report = self._report(run, job.recipe)
        except FistaPrunerError as error:
            row.error = str(error)
            self.listener.say(f"{job.label}: {error}")
            return row
        measured = self._evaluation(report)
        assert measured is not None
        comparison.model, comparison.machine, comparison.dense = report.model, report.machine, measured.reference
        if report.calibration is not None:
            self.drawn[_drawing(job.recipe)] = run.tokens(), report.calibration.model_dump(mode="json")
            if job.recipe.calibration.model_copy(update={"seed": 0}) == shared.calibration:
                comparison.calibration = comparison.calibration or report.calibration
        perplexity, dense = measured.perplexity, measured.reference
        assert perplexity is not None
        assert dense is not None
        row = row.model_copy(update=dict(report.totals))
        row.settings = {key: value for key, value in report.recipe.items() if key != "execution"}
        row.perplexity, row.divergence = perplexity, measured.divergence
        row.gap = perplexity.nll - dense.nll if math.isfinite(perplexity.nll) else None
        row.relative_error = report.mean_error
        if row.seconds is not None:
            row.seconds -= row.time_split.get("calibration", 0.0)
        if report.widths:
            row.dense_weights = report.model.parameters
        return row

    def _report(self, run: PruneDirectory, recipe: Recipe) -> Report:
        """Prune and measure, or read the report of a run that was pruned and measured so before."""
        found = self._finished(run, recipe)
        if found is not None:
            if not self.keep or run.has_model(found.fingerprint):
                return found
            remove_folder(run.folder)  # an earlier comparison has kept no checkpoints
        report = prune(
            self.model,
            run.folder,
            recipe=recipe,
            listener=self.listener,
            command=self.command,
            tokens=self.drawn.get(_drawing(recipe)),
            source=self.source,
            **vars(self.source.permissions),
        )
        if self._evaluation(report) is None:
            self.listener.say(f"evaluating on {self.text.data}")
            measured = evaluate(
                run.model,
                self.text,
                against=self.source.folder,
                device=recipe.execution.device,
                dtype=recipe.dtype,
                memory_limit=recipe.execution.memory_limit,
                tick=self.listener.tick,
                kept=self.states,
                **vars(self.source.permissions),
            )
            report.evaluations.append(measured)
            publish(run, report, Listener())  # pruning has named the report already
        if not self.keep:
            remove_folder(run.model)
            remove_folder(run.adapter)
        return report

    def _finished(self, run: PruneDirectory, recipe: Recipe) -> Report | None:
        """Read the report of a run of this recipe that is finished and measured; its weights may be gone."""
        try:
            report = run.read_report() if run.report_file.is_file() else None
        except FistaPrunerError:  # pruning says so, and makes it again
            return None
        if report is None or report.status != "finished" or self._evaluation(report) is None:
            return None
        asked = recipe.resolved(earlier=report.recipe, family=self.source.family)
        return report if Recipe.build(report.recipe).fingerprint() == asked.fingerprint() else None

    def _evaluation(self, report: Report) -> Evaluation | None:
        """Find the report's measurement on the windows of the comparison."""
        for found in report.evaluations:
            if found.perplexity and found.reference and found.perplexity.measured_on == self.measured_on:
                return found
        return None
