"""Align one model with many losses from one cache of references, and tabulate them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, out_path
from ..evaluation.data import check_data
from ..models.source import Permissions
from ..recipes.align_settings import AlignRecipe
from ..recipes.loading import merge_settings
from ..reporting.align_table import align_table
from ..runs.align_directory import AlignDirectory
from ..runs.arguments import checked_arguments
from ..runs.base import parse
from ..runs.comparison_records import FIGURES, RUNS, TABLE, AlignComparison, AlignRow
from ..runs.identity import stamps
from ..runs.listener import Listener
from ..runs.records import Report, load_run
from ..runs.training_runs import input_run
from ..runtime.files import copy_atomic, disk_errors, read_json, sha256_file, write_json_atomic, write_text_atomic
from ..runtime.machine import versions
from .align import ALIGN
from .compare_folder import comparing, refuse_other_things
from .find_model import absolute, find_dense, same_model
from .prepare_align import check_pairs
from .protocol import distinct_seeds
from .training import train
from .training_inputs import TrainingRequest, asked, evaluation_of, find_input, refuse_itself

JOBS: dict[str, dict[str, Any]] = {
    "distillation only": {"loss": "none", "anchor": 1.0},
    "SFT on chosen": {"loss": "sft"},
    "DPO, pruned": {"loss": "dpo", "references": ["pruned"]},
    "DPO, dense": {"loss": "dpo", "references": ["dense"]},
    "multi-DPO": {"loss": "multi-dpo"},
    "harmonic, clipped": {"loss": "harmonic", "clip": 0.1},
    "harmonic, not clipped": {"loss": "harmonic", "clip": "none"},
    "harmonic, per pair": {"loss": "harmonic", "weights": "per-pair"},
    "geometric, held-out": {"loss": "geometric", "weights": "held-out"},
}
"""Settings of the rows, in the order of the table."""

VARIED = ("loss", "references", "weights", "shares", "clip", "anchor")
"""Settings that the rows decide."""


@checked_arguments
def align_compare(
    model: str | Path,
    out: str | Path,
    *,
    recipe: AlignRecipe | Mapping[str, Any] | str | Path | None = None,
    seeds: Sequence[int] | None = None,
    keep: bool = False,
    dense: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | Path | None = "auto",
    evaluate_windows: int | None = None,
    **settings: Any,
) -> AlignComparison:
    """Align a model with every loss, on the same pairs, steps and parameters.

    Args:
        model: as for ``fistapruner.align``, with a dense model that is known.
        out: folder of the comparison; one that was begun is continued, and rows of other seeds stay.
        recipe: settings that all rows share, as for ``fistapruner.align``; ``loss``, ``references``, ``weights``,
            ``shares``, ``clip`` and ``anchor`` are those of the rows.
        seeds: each is one run of every row: order of the pairs and start values; None is one run with the
            recipe's seeds.
        keep: keep the checkpoints, and the states of training; what an earlier call has removed is made again.
        dense: the dense model; None takes the one that the run or the checkpoint's record names.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the comparison; None leaves it out.
        evaluate: text for the perplexity, as for ``fistapruner.align``.
        evaluate_windows: only its first so many windows.
        **settings: single settings over the recipe.

    Returns:
        What is in ``out/compare.json``; ``out/compare.md`` has the table. A row that fails says why.

    Raises:
        FistaPrunerError: bad input, named, before anything is trained.
    """
    if not isinstance(keep, bool):
        raise FistaPrunerError(f"keep {keep!r}: True or False is expected")
    folder, listener = out_path(out), listener or Listener()
    request = TrainingRequest.of(
        model,
        AlignRecipe.of(recipe).changed(settings),
        dense=dense,
        permissions=Permissions(allow_pickle, trust_remote_code),
        command=command,
        evaluate=evaluate,
        evaluate_windows=evaluate_windows,
    )
    found, jobs, dense = _plan(folder, request, seeds)
    request = replace(request, dense=dense)
    reports: dict[tuple[str, int], Report | str] = {}
    with comparing(folder):
        if (earlier := _earlier(folder, found, listener)) is not None:
            found.rows, found.before = earlier.rows, earlier.before
        rows = {(row.label, row.seed): row for row in found.rows}
        _write(folder, found)
        for number, ((label, seed), job) in enumerate(jobs.items(), 1):
            listener.say(f"{number}/{len(jobs)}: {label}, seed {seed}")
            run = AlignDirectory(folder / RUNS / f"{_slug(label)}-{seed}")
            try:
                reports[label, seed] = _run(folder, found, run, replace(request, recipe=job), listener, keep=keep)
            except FistaPrunerError as error:
                if not reports:  # bad input: every row would fail alike
                    raise
                reports[label, seed] = str(error)
            if not keep and isinstance(reports[label, seed], Report):
                run.remove_weights()
            row, known = _row(label, seed, reports[label, seed]), rows.get((label, seed))
            if row.error and known is not None:  # its figures stay
                row = known.model_copy(update={"error": row.error})
            rows[label, seed] = row
            found.rows = sorted(rows.values(), key=lambda row: [*JOBS, row.label].index(row.label))
            found.before = next(
                (
                    before
                    for report in reports.values()
                    if isinstance(report, Report) and report.recovery
                    for before in report.recovery.before
                    if before.perplexity is not None
                ),
                found.before,
            )
            _write(folder, found)
        found.status = "finished"
        _write(folder, found)
    return found


def _plan(
    folder: Path, request: TrainingRequest[AlignRecipe], seeds: Sequence[int] | None
) -> tuple[AlignComparison, dict[tuple[str, int], AlignRecipe], str | None]:
    """Check everything that can be checked before any row is trained.

    Args:
        folder: of the comparison.
        request: what all rows share.
        seeds: see :func:`align_compare`.

    Returns:
        The comparison without rows, the recipes by label and seed in the order to run them, and the dense model's
        folder; None where none is named.

    Raises:
        FistaPrunerError: bad input, named; or the folder holds something else.
    """
    shared, dense, permissions = request.recipe, request.dense, request.permissions
    default = AlignRecipe()
    for name in VARIED:
        if getattr(shared, name) != getattr(default, name):
            raise FistaPrunerError(f"{name}: a comparison runs all losses and decides it for each row; leave it out")
    varied, seeds = seeds is not None, (shared.seed,) if seeds is None else distinct_seeds(seeds)
    if not seeds:
        raise FistaPrunerError("seeds: at least one is needed")
    jobs = {}
    # Those with both references come first: the others then find what they need in the cache.
    order = sorted(JOBS, key=lambda label: JOBS[label]["loss"] not in ("multi-dpo", "harmonic", "geometric"))
    for seed in seeds:
        own = {"seed": seed, "data": {"seed": seed}} if varied else {}
        for label in order:
            row = {**shared.model_dump(mode="json"), **JOBS[label]}
            jobs[label, seed] = AlignRecipe.build(merge_settings(row, own))
    check_pairs(shared)
    evaluation = request.evaluation_beside(evaluation_of(input_run(request.model)))
    begun = _begun(folder)
    if evaluation is not None and begun is None:
        check_data(evaluation.data)
    models = {request.model: find_input(request.model, permissions, verb="align")}
    if dense is not None:
        models[dense] = find_dense(dense, None if begun is None else begun.record(), permissions)
        refuse_itself(dense, models[dense], models[request.model])
    refuse_other_things(folder)
    base = shared.with_absolute_files().model_dump(mode="json", exclude={"execution", *VARIED})
    texts = [Path(text) for text in (base["data"]["pairs"], evaluation and evaluation.data) if text]
    files = {str(path): sha256_file(path) for path in texts if path.is_file()}
    files |= {
        str(Path(absolute(name)) / file): stamp
        for name, source in models.items()
        for file, stamp in stamps(source.checkpoint())
    }
    found = AlignComparison(
        command=request.command,
        model=absolute(request.model),
        dense=None if dense is None else absolute(dense),
        evaluation={} if evaluation is None else evaluation.model_dump(mode="json"),
        recipe=base,
        files=files,
        versions=versions(),
    )
    _earlier(folder, found, Listener())
    return found, jobs, None if dense is None else str(models[dense].folder)


def _run(
    folder: Path,
    found: AlignComparison,
    run: AlignDirectory,
    request: TrainingRequest[AlignRecipe],
    listener: Listener,
    *,
    keep: bool,
) -> Report:
    """Align one row, or read its report where that is done.

    Args:
        folder: of the comparison; ``found``: what it has.
        run: the row's run directory; ``request``: what is asked of it.
        listener: receives progress.
        keep: see :func:`align_compare`.
    """
    report = _finished(run, request.recipe, evaluated=bool(found.evaluation), keep=keep)
    if report is None:
        _take_references(folder, run)
        before = [] if found.before is None else [found.before]
        report = train(ALIGN, run.folder, replace(request, before=before, like=_begun(folder)), listener)
        copy_atomic(run.references_file, folder / run.references_file.name)  # where others were stale
    return report


def _begun(folder: Path) -> AlignDirectory | None:
    """Find a row that has begun; None where there is none."""
    for file in sorted((folder / RUNS).glob("*/run.json")):
        run = AlignDirectory(file.parent)
        with suppress(FistaPrunerError):  # a damaged record is named where its row is made
            if run.record() is not None:
                return run
    return None


def _take_references(folder: Path, run: AlignDirectory) -> None:
    """Give a run the references that an earlier row has computed."""
    cache = folder / run.references_file.name
    with disk_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        if cache.exists() and not run.references_file.exists():
            copy_atomic(cache, run.references_file)


def _finished(run: AlignDirectory, recipe: AlignRecipe, *, evaluated: bool, keep: bool) -> Report | None:
    """Read the report of a row that was done before; None where work is left, or it had other settings.

    Args:
        run: of the row.
        recipe: its settings.
        evaluated: the row is evaluated on a text, and so is the model before alignment.
        keep: its checkpoint is there, too.
    """
    with suppress(FistaPrunerError):
        record = run.record()
        if record is not None and run.report_file.exists() and record.decision.asked == asked(recipe):
            report = load_run(run.folder)
            done = report.status == "finished" and report.alignment is not None
            known = report.recovery is not None and any(known.perplexity for known in report.recovery.before)
            measured = known and any(found.perplexity for found in report.evaluations)
            there = not keep or run.model_fault(report.fingerprint or "") is None
            # The page is written last, and the weights are removed after it.
            published = run.page_file.exists() or not run.model.exists()
            return report if done and there and published and (measured or not evaluated) else None
    return None


def _row(label: str, seed: int, report: Report | str) -> AlignRow:
    if isinstance(report, str):
        return AlignRow(label=label, seed=seed, error=report)
    training = report.recovery
    start, best = (training.start, training.best) if training else (None, None)
    return AlignRow(
        label=label,
        seed=seed,
        alignment=report.alignment,
        evaluation=report.evaluations[-1] if report.evaluations else None,
        held_out=(start.held_out, best.held_out) if start and best else None,
        kept_step=training.kept_step if training else None,
        seconds=report.totals.seconds,
    )


def _earlier(folder: Path, now: AlignComparison, listener: Listener) -> AlignComparison | None:
    """Read the comparison that is continued; None where none can be read, or no row has begun.

    Raises:
        FistaPrunerError: it has other settings, models or texts; names the first that differs, or the file that has
            changed.
    """
    if not (folder / FIGURES).exists():
        return None
    try:
        content = read_json(folder / FIGURES)
    except FistaPrunerError as error:
        if not (folder / RUNS).is_dir():
            raise
        listener.say(f"{error}: it is made again; rows that are asked for are read from {folder / RUNS}")
        return None
    before = parse(AlignComparison, content, str(folder / FIGURES))
    if not before.rows and _begun(folder) is None:  # bad input that the first row showed
        return None
    pairs: dict[str, tuple[Any, Any]] = {}
    if not same_model(before.model, now.model):
        pairs["model"] = before.model, now.model
    pairs |= {key: (before.recipe.get(key), value) for key, value in now.recipe.items()}
    if not (before.dense and now.dense and same_model(before.dense, now.dense)):
        pairs["dense"] = before.dense, now.dense
    for key in ("data", "windows", "seqlen"):
        pairs[f"evaluation.{key}"] = before.evaluation.get(key), now.evaluation.get(key)
    for key, (old, new) in pairs.items():
        if old != new:
            raise FistaPrunerError(
                f"--out {folder} holds a comparison with {key} = {old}, this one has {new}: name another folder"
            )
    # The same file may be named by another path of it.
    old_files, new_files = (
        {os.path.realpath(name): digest for name, digest in found.files.items()} for found in (before, now)
    )
    for name in sorted({*old_files, *new_files}):
        if old_files.get(name) != new_files.get(name):
            raise FistaPrunerError(f"{name} has changed since the comparison in {folder} began: name another folder")
    return before


def _write(folder: Path, found: AlignComparison) -> None:
    write_json_atomic(folder / FIGURES, found.model_dump(mode="json"))
    write_text_atomic(folder / TABLE, align_table(found))


def _slug(label: str) -> str:
    return "-".join(label.lower().replace(",", "").split())
