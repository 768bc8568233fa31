"""Score zero-shot tasks with ``lm-eval``, with paired tests against the dense model.

A task is an ``lm-eval`` name (its data comes from the hub), or a local ``.jsonl`` file, which needs no network
(:mod:`~fistapruner.measure.local_tasks`).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..models.build import load_whole, max_length
from ..models.tokenizer import load_tokenizer
from ..runs.results import TaskResult
from ..runtime.numerics import dtype_name
from ..runtime.progress import Tick, silent
from .local_tasks import local_files, local_task
from .logits import mcnemar
from .streaming import shown_name

METRICS = ("acc", "acc_norm", "exact_match")
"""Metrics of single items; ``acc_norm`` divides a choice's log-likelihood by its length."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that :func:`find_tasks` found.

    Args:
        specifications: names or configurations, as ``lm-eval`` takes them.
        manager: ``lm-eval``'s ``TaskManager`` that knows them.
        source: source of their items, for the report.
    """

    specifications: tuple[Any, ...]
    manager: Any
    source: str


def find_tasks(tasks: Sequence[str], tasks_dir: Path | None = None) -> Tasks:
    """Find tasks by name and read their items, before any model is loaded.

    Args:
        tasks: ``lm-eval`` names, or names of ``.jsonl`` files in ``tasks_dir`` without the suffix; ``all`` takes every
            file of ``tasks_dir``.
        tasks_dir: folder of local tasks.

    Raises:
        FistaPrunerError: an unknown task, one without a metric of :data:`METRICS`, items that cannot be loaded, or a
            file that is no task.
        MissingExtraError: the extra ``eval`` is not installed.
    """
    local = None if tasks_dir is None else tuple(local_task(path) for path in local_files(tasks, tasks_dir))
    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "a zero-shot task")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings concern models given by name
    if local is not None:
        return Tasks(local, TaskManager(include_defaults=False), "local file")
    manager = TaskManager()
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise FistaPrunerError(
            f"task {unknown[0]!r} is not known to lm-eval (see 'lm-eval ls tasks'); --tasks-dir takes local files"
        )
    with _failures_explained("read the tasks"):
        found = manager.load(list(tasks))["tasks"]
    for name, task in found.items():
        metrics = [entry["metric"] for entry in task.config.metric_list or () if isinstance(entry["metric"], str)]
        if metrics and not {*metrics} & {*METRICS}:
            raise FistaPrunerError(
                f"task {name!r} has the metrics {', '.join(metrics)}; tasks with {', '.join(METRICS)} can be scored"
            )
    return Tasks(tuple(tasks), manager, "lm-eval")


@dataclass(frozen=True)
class TaskSettings:
    """How models are run on tasks.

    Args:
        limit: items of each task, the first ones; None takes all.
        device: device of the models; None is the CPU.
        dtype: precision of weights and passes; None as in :func:`~fistapruner.models.build.load_whole`.
        batch_size: requests in one forward pass; None is 4 on a CPU, 16 on a GPU.
        trust_remote_code: run Python code that comes with a checkpoint.
    """

    limit: int | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    batch_size: int | None = None
    trust_remote_code: bool = False


def evaluate_tasks(
    folder: Path,
    tasks: Tasks,
    settings: TaskSettings = TaskSettings(),
    *,
    against: Path | None = None,
    tick: Tick = silent,
) -> tuple[TaskResult, ...]:
    """Score a model on zero-shot tasks, and a reference model on the same items.

    Args:
        folder: the model's Hugging Face folder.
        tasks: what :func:`find_tasks` found.
        settings: how the models are run.
        against: the dense model's folder.
        tick: receives progress: (what, steps done, steps in all); ``lm-eval`` shows the requests by bars of its own.

    Raises:
        FistaPrunerError: ``lm-eval`` fails, as on items it cannot ask; or no task has one of :data:`METRICS`.
    """
    models = [folder] if against is None else [folder, against]
    found = []
    for done, path in enumerate(models):
        tick(f"zero-shot tasks of {shown_name(path)}", done, len(models))
        found.append(_run(path, tasks, settings))
    tick("zero-shot tasks", len(models), len(models))
    scores = [_scores(each["samples"]) for each in found]
    if not scores[0]:
        raise FistaPrunerError(f"no task has one of the metrics {', '.join(METRICS)}: only such tasks can be scored")
    return tuple(
        task_result(
            task,
            metric,
            items,
            scores[1][task, metric] if against is not None else None,
            shots=int(found[0]["n-shot"].get(task) or 0),
            source=tasks.source,
            available=int(found[0]["n-samples"][task]["original"]),
            dtype=None if settings.dtype is None else dtype_name(settings.dtype),
            items_sha256=_items_sha256(found[0]["samples"][task]),
        )
        for (task, metric), items in scores[0].items()
    )


def _run(folder: Path, tasks: Tasks, settings: TaskSettings) -> dict[str, Any]:
    """Run one model on tasks; returns what ``lm-eval`` does."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device, trust = settings.device or torch.device("cpu"), settings.trust_remote_code
    model = load_whole(folder, device, settings.dtype, trust_remote_code=trust)
    runner = HFLM(
        pretrained=model,
        tokenizer=load_tokenizer(folder, trust_remote_code=trust),
        batch_size=settings.batch_size or (4 if device.type == "cpu" else 16),
        max_length=max_length(model),
    )
    with _failures_explained(f"evaluate the tasks on {folder}"):
        found = simple_evaluate(
            runner,
            tasks=list(tasks.specifications),
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=tasks.manager,
        )
    return dict(found or {})


@contextmanager
def _failures_explained(what: str) -> Iterator[None]:
    """Turn failures of ``lm-eval``, each of whose tasks has its own code, into errors."""
    try:
        yield
    except OSError as error:  # those of the network too
        raise FistaPrunerError(
            f"task data could not be loaded: {one_line(error)}; --tasks-dir takes local files and needs no network"
        ) from None
    except Exception as error:
        raise FistaPrunerError(f"lm-eval could not {what}: {type(error).__name__}: {one_line(error, 200)}") from error


def _scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, str], dict[int, float]]:
    """Read the score of every item by (task, metric).

    It is 1 (right), 0 (wrong), or what a task gives between them. A metric of answers that were filtered has the
    filter's name after a comma, as in ``lm-eval``.
    """
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for task, answers in samples.items():
        for answer in answers:
            through = answer.get("filter", "none")
            for metric in [metric for metric in METRICS if metric in answer]:
                name = metric if through == "none" else f"{metric},{through}"
                scores.setdefault((task, name), {})[answer["doc_id"]] = float(answer[metric])
    return scores


def _items_sha256(samples: Sequence[Mapping[str, Any]]) -> str:
    """Hash the items of a task, which ``lm-eval`` has hashed one by one."""
    items = {sample["doc_id"]: sample["doc_hash"] for sample in samples}  # one sample for each filter
    return hashlib.sha256("".join(f"{number} {items[number]}\n" for number in sorted(items)).encode()).hexdigest()


def task_result(
    task: str, metric: str, items: Mapping[int, float], reference: Mapping[int, float] | None = None, **about: Any
) -> TaskResult:
    """Compute score, standard error and paired test of a task.

    Scores between right and wrong (a share of probability, such as that of ``truthfulqa_mc2``) have no such test.

    Args:
        task: its name.
        metric: what is scored.
        items: right (1) or wrong (0) by item number, or a score; ``reference``: the same of the dense model.
        **about: other fields of :class:`~fistapruner.runs.results.TaskResult`, recorded as they are.

    Raises:
        FistaPrunerError: the two models answered different items.
    """
    alone = TaskResult(task, metric, len(items), *_mean(items), **about)
    if reference is None:
        return alone
    if items.keys() != reference.keys():
        raise FistaPrunerError(f"task {task}: the two models answered different items; they cannot be compared")
    before, before_error = _mean(reference)
    alone = replace(alone, reference=before, reference_standard_error=before_error)
    if not {*items.values(), *reference.values()} <= {0.0, 1.0}:
        return alone
    lost = sum(reference[item] > right for item, right in items.items())
    won = sum(reference[item] < right for item, right in items.items())
    return replace(alone, lost=lost, won=won, p_value=mcnemar(lost, won))


def _mean(items: Mapping[int, float]) -> tuple[float, float]:
    """Return the mean and its standard error with the sample variance, as ``lm-eval`` does."""
    count = len(items)
    mean = sum(items.values()) / count
    squares = sum((score - mean) ** 2 for score in items.values())
    return mean, math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
