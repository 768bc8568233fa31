"""What a run directory holds of an earlier attempt: whether it is this run, and what is left to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..errors import A_TEXT, FistaPrunerError, path_text
from ..models.source import Permissions, packed_file
from ..papers.so_ebm import Workload
from ..runs.decision import EvaluationRequest, PruneRecord, RunRecord
from ..runs.directory import RunDirectory
from ..runs.identity import changed_files, fingerprint, stamps, text_sha256
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report
from ..runtime.devices import choose_device, device_title
from ..runtime.files import PARTIAL
from ..runtime.formatting import shell_line
from ..runtime.machine import versions
from ..settings.execution_settings import Execution
from ..settings.loading import parse_yaml
from ..settings.settings import Recipe
from .find_model import absolute, find_source, same_path

SECTIONS = ("data", "calibration", "structure")
"""Sections of a recipe whose settings messages name one by one."""


def evaluation_on(evaluate: str | Path | None, windows: Any) -> EvaluationRequest | None:
    """Return the request to evaluate on a text, a file by its absolute path; None where there is none.

    Raises:
        FistaPrunerError: what is no name of a text, or a number of windows that is none or has no effect.
    """
    if evaluate is None:
        if windows is not None:
            raise FistaPrunerError(f"evaluate_windows {windows} has no effect: evaluate names no text")
        return None
    if windows is not None and (not isinstance(windows, int) or isinstance(windows, bool)):
        raise FistaPrunerError(f"evaluate_windows {windows!r}: a whole number from 1 is expected")
    text = path_text("evaluate", evaluate, A_TEXT)
    if text == "none" and not Path(text).is_file():  # as the command has it
        raise FistaPrunerError("evaluate 'none' is no text: give None to evaluate nothing")
    return EvaluationRequest(data=absolute(text) if Path(text).is_file() else text, windows=windows)


def is_lost(text: EvaluationRequest) -> bool:
    """Check whether a text to evaluate on is a file that is gone."""
    return os.path.isabs(text.data) and not Path(text.data).exists()


def refuse_lost_text(known: EvaluationRequest | None, command: str = "its prune command again") -> None:
    """Refuse to go on with a run whose text to evaluate on is a file that is gone.

    Args:
        known: the text.
        command: that goes on without it.

    Raises:
        FistaPrunerError: names both.
    """
    if known is not None and is_lost(known):
        raise FistaPrunerError(
            f"the text {known.data}, which this run evaluates on, is gone: give {command} with another --evaluate, or "
            "with --evaluate none"
        )


def refuse_lost_model(run: PruneDirectory, record: PruneRecord) -> None:
    """Refuse to go on with a run whose model's folder is gone.

    Raises:
        FistaPrunerError: names it, and the command that goes on with the model elsewhere.
    """
    if not record.decision.folder.is_dir():
        raise FistaPrunerError(
            f"the model of the run in {run.folder} is not at {record.decision.folder}; give its prune command again, "
            "with its new place"
        )


@dataclass(frozen=True)
class FinishedRun:
    """What a run directory holds of a finished run.

    Args:
        report: of the run, if nothing is left to do.
        damaged: the report of a run whose checkpoint must be written again from the layers; its measurements stay.
        outdated: the report of a run that is made again with all its layers.
        says: a sentence for the user.
        folder: of its model, where that is now; None where nothing has begun.
    """

    report: Report | None = None
    damaged: Report | None = None
    outdated: Report | None = None
    says: str | None = None
    folder: Path | None = None


def find_finished(run: PruneDirectory, model: str, recipe: Recipe, permissions: Permissions) -> FinishedRun:
    """Look for a finished run of this model and recipe.

    Args:
        run: its directory.
        model: as the user named it.
        recipe: all settings, resolved.
        permissions: what the model's files may do.

    Raises:
        FistaPrunerError: the directory holds a run of another model or recipe.
    """
    record = run.record()
    if record is None:
        return FinishedRun()
    begun = FinishedRun(folder=refuse_other(run, record, model, recipe, permissions))
    if not run.report_file.exists():
        return begun
    try:
        report = run.read_report()
    except FistaPrunerError as error:
        return replace(begun, says=f"the report is made again: {error}")
    if report.status != "finished" or report.fingerprint != record.fingerprint:
        return begun
    if why := changed_text(record, recipe) or changed_input(run, record, recipe, permissions, begun.folder):
        return replace(begun, outdated=report, says=f"the run is made again: {why}")
    fault = run.model_fault(record.fingerprint or "")
    if fault is None and run.model_record() is None and (run.model / PARTIAL).exists():
        fault = f"writing {run.model} was interrupted"
    if fault is not None:
        return replace(begun, damaged=report, says=f"the checkpoint is made again: {fault}")
    return replace(begun, report=report, says=f"{run.folder} holds the finished run of this recipe")


def refuse_other(
    run: PruneDirectory, record: PruneRecord, model: str, recipe: Recipe, permissions: Permissions
) -> Path:
    """Refuse to continue a run of other settings, of another workload or of another model.

    Returns:
        The model's folder, where it is now.

    Raises:
        FistaPrunerError: names the first setting that differs; or the model cannot be opened to be compared.
    """
    refuse_other_settings(run, Recipe.build(record.recipe, str(run.run_file)).identity(), recipe.identity())
    path, decided = recipe.workload, record.workload
    there = path is not None and path.exists()  # a file that is gone is not needed any more
    if decided is not None and there and Workload.of(path).fingerprint() != decided.fingerprint:
        raise FistaPrunerError(f"--out {run.folder} holds a run for another content of {path}: name another folder")
    before, here, folder = record.decision.model, absolute(model), record.decision.folder
    if same_path(before, here):
        return folder
    # A path is the same model where its files are, as in a moved tree or a copy; any other name where it is alike.
    if Path(model).exists():
        packed = packed_file(Path(model))  # converting it takes long, into a folder of its name
        other = packed is not None and packed.stem != folder.name.rpartition("-")[0]
        if not other:
            source = find_source(model, record, permissions)
            other, folder = changed_files(record.decision.stamps, source) is not None, source.folder.absolute()
    else:
        other = record.model.source != model
    if other:
        raise FistaPrunerError(
            f"--out {run.folder} holds a run of the model {before!r}, this one is of {here!r}: name another folder"
        )
    return folder


def refuse_other_settings(
    run: RunDirectory,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    flag: str = "--out",
    advice: str | None = None,
) -> None:
    """Refuse to continue a run of other settings.

    Args:
        run: its directory.
        before: its settings, by name; there may be more of them.
        now: those that are asked for and must be the same.
        flag: that asks for them in this directory; ``advice``: what to do, None goes on with the run or leaves it.

    Raises:
        FistaPrunerError: names the first setting that differs, one of a section as ``data.tokens``.
    """
    advice = advice or f"'{shell_line('resume', run.folder)}' goes on with that one; for this one name another folder"
    before, now = _flat(before), _flat(now)
    for key in now:
        if before.get(key) != now[key]:
            raise FistaPrunerError(
                f"{flag} {run.folder} holds a run with {key} = {json.dumps(before.get(key))}, "
                f"this one has {json.dumps(now[key])}: {advice}"
            )


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings of sections as in messages."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": each for name, each in (value or {}).items()} if key in SECTIONS else {key: value}
    return flat


def refuse_other_tokens(
    run: PruneDirectory, tokens: Tensor, recipe: Recipe, permissions: Permissions, folder: Path | None
) -> None:
    """Refuse to continue a run with other calibration windows.

    Where their text or the model, now in ``folder``, has changed since, they may be others: the run is made again.

    Raises:
        FistaPrunerError: the directory holds a run of other windows.
    """
    record = run.record()
    if record is None or changed_text(record, recipe) or changed_input(run, record, recipe, permissions, folder):
        return  # nothing has begun, or the run is made again
    try:
        same = torch.equal(run.tokens(), tokens.to(torch.int64))
    except FistaPrunerError:  # without its own windows it is made again, too
        return
    if not same:
        raise FistaPrunerError(
            f"--out {run.folder} holds a run of other calibration windows than those of tokens: name another folder, "
            "or remove it"
        )


def changed_text(record: PruneRecord, recipe: Recipe) -> str | None:
    """Say that the calibration text has changed since the run began; None where it has not, or is gone."""
    noted, found = record.decision.calibration_sha256, text_sha256(recipe)
    if noted is None or found is None or noted == found:
        return None
    return f"{recipe.calibration.name} is not the text that it was calibrated on"


def changed_input(
    run: PruneDirectory, record: PruneRecord, recipe: Recipe, permissions: Permissions, folder: Path | None
) -> str | None:
    """Say that the dense model or the tokens have changed; None where they have not, or one is gone."""
    decision = record.decision
    folder = folder or decision.folder
    try:
        checkpoint = permissions.at(folder).checkpoint()
        if tuple(stamps(checkpoint)) != decision.stamps:
            return f"{folder} is not the model that it pruned"
        same = record.fingerprint == fingerprint(recipe, checkpoint, run.tokens(), decision.numerics)
    except FistaPrunerError:
        return None
    return None if same else f"{run.calibration_file} does not hold the tokens that it was calibrated on"


def began_on(record: PruneRecord) -> str:
    """Name the device that a run began on, as :func:`.device_title` does."""
    return record.machine.device_name or record.decision.numerics.device


def execution_here(execution: Execution, listener: Listener) -> Execution:
    """Choose another device for a run that goes on where its own is not, and say so."""
    try:
        choose_device(execution.device)
    except FistaPrunerError as error:
        listener.say(f"{error}; this run goes on with {device_title(choose_device('auto'))}")
        return execution.model_copy(update={"device": "auto"})
    return execution


def refuse_input(model: str, out: Path) -> None:
    """Refuse an output folder that is, or holds, what the user named as the model, where that is a path.

    Raises:
        FistaPrunerError: names both.
    """
    if Path(model).exists():
        refuse_overlap(Path(model), out)


def refuse_overlap(source: Path, out: Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read.

    Raises:
        FistaPrunerError: names both.
    """
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or outer in inner.parents:
        raise FistaPrunerError(f"--out {out} holds the model {source} itself: name a folder outside of it")


def keep_recipe(run: RunDirectory, begun: RunRecord, listener: Listener) -> None:
    """Write ``recipe.yaml`` again where it does not have the settings of ``run.json``, and say so."""
    with suppress(OSError, ValueError, FistaPrunerError):
        if parse_yaml(run.recipe_file.read_text("utf-8"), str(run.recipe_file)) == begun.recipe:
            return
    listener.say(f"{run.recipe_file} does not have the settings of run.json, which this run keeps: it is written again")
    write_settings(run, begun.recipe)


def write_settings(run: RunDirectory, settings: Mapping[str, Any]) -> None:
    """Write ``recipe.yaml`` with the settings of ``run.json``."""
    run.write_recipe(str(yaml.safe_dump(dict(settings), sort_keys=False)))


def say_kept_plan(begun: RunRecord, execution: Execution, listener: Listener) -> None:
    """Say which settings change nothing, because a run that goes on keeps its plan."""
    for name in ("memory_limit", "batch_size"):
        if getattr(execution, name) not in (None, begun.recipe["execution"][name]):
            flag = f"--{name.replace('_', '-')}"
            work = "pruning" if begun.kind == "prune" else "training"
            listener.say(f"this run keeps the plan that it began with: another {flag} changes nothing in the {work}")


def say_other_versions(before: Mapping[str, str], listener: Listener) -> None:
    """Warn that a run continues with other versions than it began with, which may change last bits."""
    other = [
        f"{name} {before.get(name)} (now {version})"
        for name, version in versions().items()
        if before.get(name) != version
    ]
    if other:
        listener.say(
            f"this run began with {', '.join(other)}: results may differ in their last bits from those of one that "
            "never stopped"
        )


@contextmanager
def interrupted_with(say: Callable[[], str]) -> Iterator[None]:
    """Let an interruption of the block carry what ``say`` returns then: what is done, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            said = say()
        except KeyboardInterrupt:  # Ctrl-C twice
            said = say()
        raise KeyboardInterrupt(said) from None
