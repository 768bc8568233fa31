"""Many methods, one protocol: the same model, calibration windows and evaluation text for every one.

    DIR/
        compare.json   compare.md     the figures so far; rewritten after every run
        runs/NAME/                    one run directory for each method, sparsity and seed

Every run is a normal run, so a comparison that was stopped continues. Once a run is measured, its checkpoint and
tensors are deleted (they are as large as the model), unless this command or an earlier one kept them; its records stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, out_path
from ..execution.context import open_model
from ..execution.executors import default_threads
from ..measure.data import check_data
from ..measure.streaming import KeptStates
from ..models.files.low_rank import refuse_low_rank
from ..models.source import Permissions
from ..pruning.settle import describe_model
from ..reporting.write import write_page
from ..runs.comparison_records import STATES, Comparison
from ..runs.continuation import refuse_overlap
from ..runs.listener import Listener
from ..runtime.devices import choose_device
from ..runtime.machine import describe_machine, now, versions
from ..runtime.numerics import undisturbed
from ..text import SELF
from .compare_folder import (
    comparing,
    earlier_comparison,
    find_source_of_rows,
    rows_that_stay,
    unchanged_rows,
    write_comparison,
)
from .compare_jobs import (
    CalibrationWindows,
    agree_protocol,
    check_jobs,
    draw,
    plan_jobs,
    shared_texts,
)
from .compare_rows import Shared, measure_dense, run_job
from .contenders import parse_contenders


@undisturbed()
def compare(
    model: str | Path,
    methods: str | Sequence[str],
    sparsities: Sequence[str],
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
        methods: see :func:`parse_contenders`.
        sparsities: patterns, such as ``["50%", "2:4"]``.
        out: folder of the comparison; one that was begun is continued, and rows it has beside those asked for now stay,
            but for those whose model or calibration text has changed. A row is not measured again if its recipe, model,
            calibration text, weights and evaluation windows are the same.
        seeds: each draws its own calibration windows; every method sees the same ones.
        settings: recipe settings that all share, also the rows that stay.
        data: text to evaluate on, as :func:`fistapruner.evaluate` takes it, in windows as long as the first method's
            calibration windows.
        windows: only its first so many windows.
        keep: keep the pruned checkpoints of the rows asked for now, also in later calls.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the comparison.

    Returns:
        What is in ``out/compare.json``. A method that cannot do a sparsity has a row that says why.

    Raises:
        FistaPrunerError: bad input, named, before anything is pruned; rows in ``out`` with other shared settings or
            evaluation windows; or another comparison works on ``out``.
    """
    listener, permissions = listener or Listener(), Permissions(allow_pickle, trust_remote_code)
    model, folder = str(model), out_path(out)
    jobs = plan_jobs(parse_contenders(methods), sparsities, seeds, settings or {})
    check_jobs(jobs, folder)
    check_data(data)
    before = earlier_comparison(folder, model)
    source = find_source_of_rows(model, folder, permissions)
    refuse_overlap(source.folder, folder)
    refuse_low_rank(source.folder, "compare")
    jobs = [job.resolved(folder, source.family) for job in jobs]
    protocol = agree_protocol(source, jobs[0].recipe, data, windows, settings or {})
    rows_that_stay(before.rows, jobs, protocol, folder)
    calibrated: CalibrationWindows = {}
    for job in jobs:
        if SELF not in job.recipe.calibration.sources.values():  # a fault in the text shows now
            draw(job, source, folder, calibrated, listener)
    with comparing(folder):
        before = earlier_comparison(folder, model)  # as it is now that it is held
        rows, dropped = unchanged_rows(rows_that_stay(before.rows, jobs, protocol, folder), jobs, source, folder)
        comparison = Comparison(
            command=command,
            started=now(),
            versions=versions(),
            machine=describe_machine(choose_device(protocol.device), default_threads(jobs[0].recipe.execution)),
            model=describe_model(source, model, open_model(source, jobs[0].recipe)),
            calibration=before.calibration if rows else None,
            rows=rows,
            asked={job.key for job in jobs},
        )
        for warning in [*dropped, *shared_texts(jobs, data)]:
            listener.say(warning)
            comparison.warnings.append(warning)
        with closing(KeptStates(source.folder, folder / STATES)) as kept:
            stay = {row.key for row in before.rows if row.kept} | (comparison.asked if keep else set())
            shared = Shared(model, source, folder, protocol, listener, keep, stay, kept, calibrated, command)
            dense = measure_dense(shared)
            comparison.dense = dense
            if before.rows:  # those that are out of date go before their runs are made again
                write_comparison(folder, comparison)
            for number, job in enumerate(jobs, 1):
                listener.say(f"{number}/{len(jobs)}: {job.label}, {job.recipe.sparsity}, seed {job.seed}")
                draw(job, source, folder, calibrated, listener)
                row = run_job(job, shared, comparison, dense)
                comparison.rows = [*(other for other in comparison.rows if other.key != row.key), row]
                write_comparison(folder, comparison)
        comparison.status = "finished"
        comparison.finished = now()
        write_comparison(folder, comparison)
        try:
            listener.say(f"page: {write_page(folder)}")
        except MissingExtraError as error:
            listener.say(str(error))
    return comparison
