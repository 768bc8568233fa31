"""Score zero-shot tasks with ``lm-eval``, with paired tests against the dense model.

Tasks are those that ``lm-eval`` knows, whose items come from the hub, or those that ``.yaml`` files of a folder
define, as ``lm-eval --include_path`` takes them; their items may be local files.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..models.build import load_whole, max_length
from ..models.source import load_tokenizer
from ..passes.store import CPU
from ..runs.records import TaskResult
from ..runtime.numerics import dtype_name, mean_and_error
from ..runtime.show import Tick, silent
from .logits import mcnemar, shown_name

METRICS = ("acc", "acc_norm", "exact_match")
"""Metrics of single items; ``acc_norm`` divides a choice's log-likelihood by its length."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that :func:`find_tasks` found."""

    names: tuple[str, ...]
    manager: Any  # lm-eval's TaskManager that knows them
    source: str  # of their definitions, for the report


def find_tasks(tasks: Sequence[str], tasks_dir: Path | None = None) -> Tasks:
    """Find tasks by name and read their items, before any model is loaded.

    Args:
        tasks: names of ``lm-eval``, or of the tasks in ``tasks_dir``; without names all tasks of ``tasks_dir``.
        tasks_dir: folder of ``.yaml`` files that define tasks.
    """
    if tasks_dir is not None and not any(tasks_dir.glob("**/*.yaml")):
        raise FistaPrunerError(f"--tasks-dir {tasks_dir} has no .yaml file: write each task as lm-eval defines tasks")
    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "a zero-shot task")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings concern models given by name
    with _failures_explained("read the tasks"):
        manager = TaskManager(include_path=tasks_dir, include_defaults=tasks_dir is None)
        names = tuple(tasks or manager.all_tasks)
        unknown = [name for name in names if name not in manager.all_tasks]
        found = {} if unknown else manager.load(list(names))["tasks"]
    if unknown:
        where = "lm-eval (see 'lm-eval ls tasks')" if tasks_dir is None else f"--tasks-dir {tasks_dir}"
        raise FistaPrunerError(f"task {unknown[0]!r} is not known to {where}")
    for name, task in found.items():
        metrics = [str(entry["metric"]) for entry in task.config.metric_list or ()]
        if metrics and not {*metrics} & {*METRICS}:
            raise FistaPrunerError(
                f"task {name!r} has the metrics {', '.join(metrics)}; tasks with {', '.join(METRICS)} can be scored"
            )
    return Tasks(names, manager, "lm-eval" if tasks_dir is None else tasks_dir.name)


def evaluate_tasks(
    folders: Sequence[Path],
    tasks: Tasks,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    tick: Tick = silent,
) -> tuple[TaskResult, ...]:
    """Score a model on zero-shot tasks, alone or beside the dense one on the same items.

    Args:
        folders: of the model, and perhaps of the dense one.
        tasks: of :func:`find_tasks`.
        limit: take only the first items of each task.
        tick: called with (what, steps done, steps in all); ``lm-eval`` shows the requests by bars of its own.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found: list[dict[str, Any]] = []
    for done, folder in enumerate(folders):
        tick(f"zero-shot tasks of {shown_name(folder)}", done, len(folders))
        model = load_whole(folder, device, dtype, trust_remote_code=trust_remote_code)
        runner = HFLM(
            pretrained=model,
            tokenizer=load_tokenizer(folder, trust_remote_code=trust_remote_code),
            batch_size=batch_size or (4 if device.type == "cpu" else 16),
            max_length=max_length(model),
        )
        asked = {"tasks": list(tasks.names), "limit": limit, "task_manager": tasks.manager}
        with _failures_explained(f"evaluate the tasks on {folder}"):
            found.append(simple_evaluate(runner, **asked, bootstrap_iters=0, log_samples=True) or {})
    tick("zero-shot tasks", len(folders), len(folders))
    scores = [_scores(each["samples"]) for each in found]
    return tuple(
        task_result(
            task,
            metric,
            items,
            scores[1][task, metric] if scores[1:] else None,
            shots=int(found[0]["n-shot"].get(task) or 0),
            source=tasks.source,
            available=int(found[0]["n-samples"][task]["original"]),
            dtype=dtype_name(dtype),
            items_sha256=_items_sha256(found[0]["samples"][task]),
        )
        for (task, metric), items in scores[0].items()
    )


@contextmanager
def _failures_explained(what: str) -> Iterator[None]:
    """Turn failures of ``lm-eval``, each of whose tasks has its own code, into errors."""
    try:
        yield
    except Exception as error:
        raise FistaPrunerError(f"lm-eval could not {what}: {type(error).__name__}: {one_line(error)}") from error


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

    ``items`` and ``reference``, those of the dense model, are right (1) or wrong (0) by item number, or scores between
    (a share of probability, such as that of ``truthfulqa_mc2``), which have no such test.
    """
    alone = TaskResult(task, metric, len(items), *_mean(items), **about)
    if reference is None:
        return alone
    before, before_error = _mean(reference)
    alone = replace(alone, reference=before, reference_standard_error=before_error)
    if not {*items.values(), *reference.values()} <= {0.0, 1.0}:
        return alone
    lost = sum(reference[item] > right for item, right in items.items())
    won = sum(reference[item] < right for item, right in items.items())
    return replace(alone, lost=lost, won=won, p_value=mcnemar(lost, won))


def _mean(items: Mapping[int, float]) -> tuple[float, float]:
    """Return the mean and its standard error with the sample variance, as ``lm-eval`` does."""
    return mean_and_error(torch.tensor([*items.values()], dtype=torch.float64))
