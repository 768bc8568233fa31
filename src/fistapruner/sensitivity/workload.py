"""Read a workload: the tasks that a model will serve, and how deployments before it went.

A workload file is YAML. Its tasks are those of the calibration text:

    mix: {chat: 0.7, code: 0.3}       # weight of each task
    history: history.jsonl            # the rest only where tolerances are uncertain
    features: [0.2, 1.0]              # of the deployment at hand
    method: auto

A line of the history is a deployment: what was known of it before, and the loss in nats a token that it stood in each
task, ``{"features": [0.1, 0.0], "tolerance": {"chat": 0.05, "code": 0.2}}``.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from ..calibration.text import read_lines
from ..errors import FistaPrunerError, explain, unreadable
from ..recipes.base import Settings
from ..recipes.loading import parse_yaml
from ..recipes.settings import Recipe

MIN_DEPLOYMENTS = 50
"""Deployments that a history has at least: with fewer, the comparison of the rules is noise."""


class WorkloadFile(Settings):
    """The content of a workload file.

    Args:
        mix: weight of each task; they sum to 1.
        history: ``.jsonl`` file of earlier deployments, relative to the workload file.
        features: of the deployment at hand.
        method: rule that decides (:mod:`.workload_rules`); auto takes the one of least cost on held-out deployments,
            less so-ebm, which is experimental.
    """

    mix: dict[str, float] = Field(min_length=1)
    history: str | None = None
    features: tuple[float, ...] = ()
    method: Literal["auto", "mix", "mean", "sample-average", "neighbours", "two-stage", "so-ebm"] = "auto"


@dataclass(frozen=True)
class History:
    """Earlier deployments.

    Args:
        features: (deployments, features), fp64.
        tolerances: (deployments, tasks), nats a token, fp64.
    """

    features: Tensor
    tolerances: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> History:
        return History(self.features[rows], self.tolerances[rows])


@dataclass(frozen=True)
class Workload:
    """A workload that was read and checked.

    Args:
        file: its path.
        settings: what it says.
        history: earlier deployments; None where the mix alone decides.
        sha256: of the file and of its history.
    """

    file: Path
    settings: WorkloadFile
    history: History | None
    sha256: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of all (..., tasks) tensors."""
        return tuple(self.settings.mix)

    @property
    def mix(self) -> Tensor:
        """(tasks,) weights, fp64."""
        return torch.tensor(list(self.settings.mix.values()), dtype=torch.float64)


def read_workload(recipe: Recipe) -> Workload | None:
    """Read the workload that a recipe's allocation names; None where it names none.

    Raises:
        FistaPrunerError: no such file, unknown or missing tasks, weights that are no distribution, a history that is
            too short, or a broken line in it; file and line are named.
    """
    path = recipe.workload
    if path is None:
        return None
    text = _read(path)
    try:
        settings = WorkloadFile.model_validate(parse_yaml(text.decode("utf-8"), str(path)))
    except UnicodeDecodeError:
        raise FistaPrunerError(f"{path} is not UTF-8 text") from None
    except ValidationError as error:
        raise FistaPrunerError(f"{path}: {explain(error, WorkloadFile)}") from None
    _check_mix(settings, list(recipe.calibration.tasks), path)
    _check_method(settings, path)
    digest, history = hashlib.sha256(text), None
    if settings.history is not None:
        place = path.parent / settings.history
        digest.update(_read(place))
        history = _read_history(place, tuple(settings.mix), len(settings.features), path)
    return Workload(path, settings, history, digest.hexdigest())


def workload_sha256(recipe: Recipe) -> str | None:
    """Hash the workload file and its history; None where there is none, or it is gone or no longer valid."""
    try:
        workload = read_workload(recipe)
    except FistaPrunerError:
        return None
    return None if workload is None else workload.sha256


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FistaPrunerError(f"workload: {unreadable(path, error)}") from None


def _check_mix(settings: WorkloadFile, tasks: Sequence[str], path: Path) -> None:
    if len(tasks) < 2:
        raise FistaPrunerError(
            f"{path}: a workload needs the calibration text of at least two tasks: give --calibration NAME=SOURCE for "
            "each, or take --allocation error"
        )
    for task in settings.mix:
        if task not in tasks:
            raise FistaPrunerError(
                f"{path}: mix names the task {task!r}, and the calibration has {', '.join(tasks)}: "
                f"give --calibration {task}=SOURCE, or leave it out"
            )
    for task in tasks:
        if task not in settings.mix:
            raise FistaPrunerError(f"{path}: mix has no weight for the task {task!r}: write 0 where it does not count")
    for task, weight in settings.mix.items():
        if weight < 0:
            raise FistaPrunerError(
                f"{path}: the weight of {task!r} in mix is {weight:g}: a number from 0 to 1 is right"
            )
    total = math.fsum(settings.mix.values())
    if abs(total - 1) > 1e-6:
        raise FistaPrunerError(f"{path}: the weights in mix sum to {total:g}: they must sum to 1")


def _check_method(settings: WorkloadFile, path: Path) -> None:
    if settings.history is None:
        for name, given in (("features", settings.features), ("method", settings.method not in ("auto", "mix"))):
            if given:
                raise FistaPrunerError(f"{path}: {name} needs a history of deployments: name its .jsonl file")
        return
    if not settings.features:
        raise FistaPrunerError(f"{path}: a history needs the features of the deployment at hand: write features: [...]")


def _read_history(path: Path, tasks: tuple[str, ...], width: int, workload: Path) -> History:
    features, tolerances = [], []
    for where, record in read_lines(path):
        row, stood = record.get("features"), record.get("tolerance")
        if not isinstance(row, list) or not all(map(_finite, row)):
            raise FistaPrunerError(f"{where}: 'features' is to be a list of finite numbers")
        if len(row) != width:
            raise FistaPrunerError(f"{where} has {len(row)} features, and {workload} has {width}")
        if not isinstance(stood, dict) or set(stood) != set(tasks):
            raise FistaPrunerError(
                f"{where}: 'tolerance' is to have one number for each of the tasks {', '.join(tasks)}"
            )
        for task, value in stood.items():
            if not _finite(value) or value <= 0:
                raise FistaPrunerError(
                    f"{where}: the tolerance of {task!r} is {value!r}: nats a token above 0 are right"
                )
        features.append(row)
        tolerances.append([stood[task] for task in tasks])
    if len(features) < MIN_DEPLOYMENTS:
        raise FistaPrunerError(
            f"{path} has {len(features)} deployments, and at least {MIN_DEPLOYMENTS} are needed: leave history out, so "
            "that the mix decides"
        )
    return History(torch.tensor(features, dtype=torch.float64), torch.tensor(tolerances, dtype=torch.float64))


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # also a whole number may be too large
