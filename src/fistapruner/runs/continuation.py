"""Decide whether a run directory holds the run that a command asks for: one rule for all verbs.

The same settings, model files, texts and versions go on where they stopped, and end with the same bytes. Anything else
is another run, and is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import A_TEXT, FistaPrunerError, path_text, with_name
from ..models.source import ModelSource
from ..runtime.devices import choose_device, device_title
from ..runtime.machine import versions
from ..runtime.show import shell_line
from ..settings.execution_settings import Execution
from .decision import EvaluationRequest, RunRecord
from .directory import RunDirectory
from .identity import changed_files
from .listener import Listener

SECTIONS = ("data", "calibration", "structure")
"""Sections of a recipe whose settings messages name one by one."""


def refuse_other_settings(run: RunDirectory, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run of other settings.

    Args:
        run: its directory.
        before: its settings, by name; there may be more of them.
        now: those that are asked for and must be the same.

    Raises:
        FistaPrunerError: names the first setting that differs, one of a section as ``data.tokens``.
    """
    before, now = flat_settings(before), flat_settings(now)
    for key in now:
        if before.get(key) != now[key]:
            raise FistaPrunerError(
                f"--out {run.folder} holds a run with {key} = {json.dumps(before.get(key))}, this one has "
                f"{json.dumps(now[key])}: name another folder ('{shell_line('resume', run.folder)}' goes on with that "
                "one)"
            )


def refuse_other_model(run: RunDirectory, record: RunRecord, source: ModelSource) -> None:
    """Refuse to continue a run of a model with other files, wherever they are.

    Raises:
        FistaPrunerError: names the first file that differs; or the model cannot be opened to be compared.
    """
    if changed := changed_files(record.decision.stamps, source):
        raise FistaPrunerError(
            f"--out {run.folder} holds a run of the model {record.decision.model}, and {changed}: name another folder"
        )


def refuse_other_versions(run: RunDirectory, record: RunRecord) -> None:
    """Refuse to compute more of a run that other versions began: its last bits would be others.

    Raises:
        FistaPrunerError: names them.
    """
    here = versions()
    other = [
        f"{name} {record.versions.get(name)} (now {here[name]})"
        for name in ("fistapruner", "torch", "transformers")
        if record.versions.get(name) != here[name]
    ]
    if other:
        raise FistaPrunerError(
            f"--out {run.folder} holds a run that began with {', '.join(other)}: go on with these versions, or name "
            "another folder"
        )


def flat_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings of sections as in messages."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": each for name, each in (value or {}).items()} if key in SECTIONS else {key: value}
    return flat


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


def refuse_lost_text(known: EvaluationRequest | None) -> None:
    """Refuse to resume a run whose text to evaluate on is a file that is gone.

    Raises:
        FistaPrunerError: names it.
    """
    if known is not None and os.path.isabs(known.data) and not Path(known.data).exists():
        raise FistaPrunerError(
            f"the text {known.data}, which this run evaluates on, is gone: give its command again with another "
            "--evaluate, or with --evaluate none"
        )


def execution_here(execution: Execution, listener: Listener) -> Execution:
    """Choose another device for a run that goes on where its own is not, and say so."""
    try:
        choose_device(execution.device)
    except FistaPrunerError as error:
        listener.say(f"{error}; this run goes on with {device_title(choose_device('auto'))}")
        return execution.model_copy(update={"device": "auto"})
    return execution


def refuse_overlap(source: str | Path, out: Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read.

    Raises:
        FistaPrunerError: names both.
    """
    inner, outer = Path(source).resolve(), out.resolve()
    if Path(source).exists() and (inner == outer or outer in inner.parents):
        raise FistaPrunerError(f"--out {out} holds the model {source} itself: name a folder outside of it")


def absolute(name: str) -> str:
    """Make a path that exists absolute, so that a run can continue from another folder; keep other names.

    Its last part stays if it is a link: where the link points, a file may have another suffix, as in the hub's cache.
    """
    if not Path(name).exists():
        return name
    path = with_name(Path(name))
    return str(path.parent.resolve() / path.name)


@contextmanager
def interrupted_with(say: Callable[[], str]) -> Iterator[None]:
    """Let an interruption of the block carry what ``say`` returns then: what is done, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(say()) from None
