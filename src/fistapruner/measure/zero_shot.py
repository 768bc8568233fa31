"""Score zero-shot tasks with ``lm-eval``, with paired tests against the dense model.

A task is an ``lm-eval`` name (its data comes from the hub), or a local ``.jsonl`` file, which needs no network
(:mod:`~fistapruner.measure.local_tasks`).
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..models.architecture import max_length
from ..models.tokenizer import load_tokenizer
from ..models.whole import load_whole
from ..runs.results import TaskResult
from ..runtime.numerics import dtype_name
from ..runtime.progress import Tick, silent
from .local_tasks import local_files, local_task
from .scoring import mcnemar
from .streaming import shown_name

log = logging.getLogger("fistapruner")

METRICS = ("acc", "acc_norm", "exact_match")
"""Metrics of single items; ``acc_norm`` divides a choice's log-likelihood by its length."""

Outcomes = dict[tuple[str, str], dict[int, float]]
"""(task, metric) to item number to its score: 1 (right), 0 (wrong), or what a task gives between them.

A metric of answers that were filtered has the filter's name after a comma, as in ``lm-eval``:
``exact_match,strict-match``.
"""


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
    """Find tasks by name and check them, before any model is loaded.

    Args:
        tasks: ``lm-eval`` names, or names of ``.jsonl`` files in ``tasks_dir`` without the suffix; ``all`` takes every
            file of ``tasks_dir``.
        tasks_dir: folder of local tasks; their files are read whole.

    Raises:
        FistaPrunerError: an unknown task, one without a metric of :data:`METRICS`, or a file that is no task.
        MissingExtraError: the extra ``eval`` is not installed.
    """
    local = None if tasks_dir is None else tuple(local_task(path) for path in local_files(tasks, tasks_dir))
    _require_lm_eval()
    from lm_eval.tasks import TaskManager

    # lm-eval's warnings concern models given by name; here they are loaded.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if local is not None:
        # Local tasks do not need lm-eval's own tasks, whose table takes seconds to read.
        return Tasks(local, TaskManager(include_defaults=False), "local file")
    manager = TaskManager()
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise FistaPrunerError(
            f"task {unknown[0]!r} is not known to lm-eval (see 'lm-eval ls tasks'); --tasks-dir takes local files"
        )
    for task in tasks:
        _check_metrics(task, configured_metrics(manager, task))
    return Tasks(tuple(tasks), manager, "lm-eval")


def configured_metrics(manager: Any, task: str) -> list[str]:
    """Read the metrics in a task's configuration; empty where it does not say them.

    Args:
        manager: ``lm-eval``'s ``TaskManager``.
        task: its name.
    """
    entry = getattr(manager, "task_index", {}).get(task)
    path = entry.get("yaml_path") if isinstance(entry, dict) else getattr(entry, "yaml_path", None)
    return _metrics_in(Path(path)) if isinstance(path, (str, Path)) else []


class _Loader(yaml.SafeLoader):
    """Reads a task's YAML, and None for the Python functions that it names."""


_Loader.add_constructor("!function", lambda loader, node: None)


def _metrics_in(path: Path) -> list[str]:
    try:
        config = yaml.load(path.read_text("utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(config, dict):
        return []
    if isinstance(listed := config.get("metric_list"), list):
        names = [entry.get("metric") if isinstance(entry, dict) else None for entry in listed]
        return [] if None in names else [str(name) for name in names]
    included = config.get("include") or []
    files = [included] if isinstance(included, str) else included
    return next((found for file in files if (found := _metrics_in(path.parent / str(file)))), [])


def _check_metrics(task: str, metrics: Sequence[str]) -> None:
    """Refuse a task that has metrics, none of which is known.

    Raises:
        FistaPrunerError: names them.
    """
    if metrics and not set(metrics) & set(METRICS):
        raise FistaPrunerError(
            f"task {task!r} has the metrics {', '.join(metrics)}: only tasks with {', '.join(METRICS)} can be scored"
        )


@dataclass(frozen=True)
class TaskSettings:
    """How models are run on tasks.

    Args:
        limit: items of each task, the first ones; None takes all.
        device: device of the models; None is the CPU.
        dtype: precision of weights and passes; None as in :func:`~fistapruner.models.whole.load_whole`.
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
    warn: Callable[[str], None] = lambda sentence: None,
) -> tuple[TaskResult, ...]:
    """Score a model on zero-shot tasks, and a reference model on the same items.

    Args:
        folder: the model's Hugging Face folder.
        tasks: what :func:`find_tasks` found.
        settings: how the models are run.
        against: the dense model's folder.
        tick: receives progress: (what, steps done, steps in all).
        warn: receives what to know of the scores, as a sentence.

    Raises:
        FistaPrunerError: ``lm-eval`` fails: task data that cannot be loaded or has items it cannot ask; or no task has
            one of :data:`METRICS`.
    """
    models = [folder] if against is None else [folder, against]
    answers: list[Answers] = []
    for done, path in enumerate(models):
        name = f"zero-shot tasks of {shown_name(path)}"
        tick(name, done, len(models))
        with _counted_cuts() as cuts:
            answers.append(read_answers(_run(path, tasks, settings, partial(tick, f"{name}, requests"))))
        if cuts:
            warn(
                f"tasks on {path}: at least {len(cuts)} requests are longer than the model takes, and were cut at "
                "their beginning"
            )
    tick("zero-shot tasks", len(models), len(models))
    ours = answers[0]
    return tuple(
        task_result(
            task,
            metric,
            items,
            reference=answers[1].outcomes[task, metric] if against is not None else None,
            source=tasks.source,
            available=ours.available.get(task),
            shots=ours.shots.get(task, 0),
            dtype=None if settings.dtype is None else dtype_name(settings.dtype),
            items_sha256=ours.items_sha256.get(task, ""),
        )
        for (task, metric), items in ours.outcomes.items()
    )


@contextmanager
def _counted_cuts() -> Iterator[list[str]]:
    """Collect what ``lm-eval`` says of requests that it cuts; its other warnings stay hidden."""
    cuts: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if "truncat" in record.getMessage().lower():
            cuts.append(record.getMessage())
        return record.levelno >= logging.ERROR

    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(keep)
    try:
        yield cuts
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


Count = Callable[[int, int], None]
"""Receives progress: (requests answered, requests in all)."""


class _Bar:
    """Pass the steps of a bar of ``lm-eval`` on; made and moved as one of ``tqdm``."""

    def __init__(self, tick: Count, items: Iterable[Any] = (), total: int = 0, **others: Any) -> None:
        self.tick, self.items, self.total = tick, items, total
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def update(self, count: int = 1) -> None:
        self.done += count
        self.tick(self.done, self.total)

    def close(self) -> None:
        pass


@contextmanager
def _bars_as(tick: Count) -> Iterator[None]:
    """Show answered requests by ``tick``, not by the bars of ``lm-eval``, and let it not ask git.

    Nothing else turns these off.
    """
    unseen = partial(silent, "")  # of what takes no time
    with ExitStack() as patches:
        for name, shown in (("models.huggingface", tick), ("api.model", unseen), ("api.task", unseen)):
            module: Any = sys.modules.get(f"lm_eval.{name}")
            if hasattr(module, "tqdm"):
                patches.callback(setattr, module, "tqdm", module.tqdm)
                module.tqdm = partial(_Bar, shown)
        evaluator: Any = sys.modules.get("lm_eval.evaluator")
        if hasattr(evaluator, "get_git_commit_hash"):
            patches.callback(setattr, evaluator, "get_git_commit_hash", evaluator.get_git_commit_hash)
            evaluator.get_git_commit_hash = lambda: None
        yield


def task_result(
    task: str,
    metric: str,
    items: Mapping[int, float],
    reference: Mapping[int, float] | None = None,
    source: str = "",
    available: int | None = None,
    shots: int = 0,
    dtype: str | None = None,
    items_sha256: str = "",
) -> TaskResult:
    """Compute score, standard error and paired test of a task.

    Scores between right and wrong (a share of probability, such as that of ``truthfulqa_mc2``) have no such test.

    Args:
        task, metric, source, available, shots, dtype, items_sha256: recorded as they are; ``available`` is the number
            of items the task has, ``shots`` that of the examples in the prompt, ``dtype`` the precision of the passes,
            ``items_sha256`` a hash of the items.
        items: right (1) or wrong (0) by item number, or a score; ``reference``: the same of the dense model.

    Raises:
        FistaPrunerError: the two models answered different items.
    """
    alone = TaskResult(
        task,
        metric,
        len(items),
        *_score(items),
        shots=shots,
        source=source,
        available=available,
        dtype=dtype,
        items_sha256=items_sha256,
    )
    if reference is None:
        return alone
    if items.keys() != reference.keys():
        raise FistaPrunerError(f"task {task}: the two models answered different items; they cannot be compared")
    lost = won = None
    if {*items.values(), *reference.values()} <= {0.0, 1.0}:
        lost = sum(reference[item] > right for item, right in items.items())
        won = sum(reference[item] < right for item, right in items.items())
    before, before_error = _score(reference)
    return replace(
        alone,
        reference=before,
        reference_standard_error=before_error,
        lost=lost,
        won=won,
        p_value=None if lost is None or won is None else mcnemar(lost, won),
    )


def _require_lm_eval() -> None:
    """Refuse tasks where ``lm-eval`` is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "a zero-shot task")


@dataclass(frozen=True)
class Answers:
    """How a model did on tasks.

    Args:
        outcomes: scores of single items.
        available: number of items that a task has; ``shots``: number of examples in its prompts.
        items_sha256: of each task, a hash of the items that were asked.
    """

    outcomes: Outcomes
    available: dict[str, int]
    shots: dict[str, int]
    items_sha256: dict[str, str]


def _run(folder: Path, tasks: Tasks, settings: TaskSettings, tick: Count) -> dict[str, Any]:
    """Run one model on tasks; returns what ``lm-eval`` does."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = load_whole(
        folder, settings.device or torch.device("cpu"), settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    batch_size = settings.batch_size or (4 if model.device.type == "cpu" else 16)
    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length(model))
    wanted = list(tasks.specifications)
    try:
        with _bars_as(tick):
            found = simple_evaluate(
                runner,
                tasks=wanted,
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=tasks.manager,
            )
    except (OSError, ConnectionError) as error:
        raise FistaPrunerError(
            f"task data could not be loaded: {one_line(error)}; --tasks-dir takes local files and needs no network"
        ) from None
    except Exception as error:  # every task has its own code for unexpected items
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""  # an assertion says nothing
        if isinstance(error, AssertionError) and "continuation_enc" in said and "max_length" in said:
            said = f"an answer of a task is longer than the {runner.max_length} tokens that the model takes"
        reason = " ".join(f"{type(error).__name__}: {said}".split())[:200]
        raise FistaPrunerError(f"lm-eval could not evaluate the tasks on {folder}: {reason}") from error
    finally:
        del runner, model
        gc.collect()
    return dict(found or {})


def read_answers(found: Mapping[str, Any]) -> Answers:
    """Read the scores of single items from what ``lm-eval`` returns.

    A task with none of :data:`METRICS`, such as one of a group, is left out with a warning.

    Raises:
        FistaPrunerError: no task has one of them.
    """
    outcomes: Outcomes = {}
    faults = []
    for task, samples in found["samples"].items():
        try:
            _check_metrics(task, list(dict.fromkeys(metric for sample in samples for metric in sample["metrics"])))
        except FistaPrunerError as error:
            faults.append(error)
            continue
        for sample in samples:
            through = sample.get("filter", "none")
            for metric in METRICS:
                if metric in sample:
                    name = metric if through == "none" else f"{metric},{through}"
                    outcomes.setdefault((task, name), {})[sample["doc_id"]] = float(sample[metric])
    if faults and not outcomes:
        raise faults[0]
    for fault in faults:
        log.warning("left out: %s", fault)
    return Answers(
        outcomes,
        {task: int(count["original"]) for task, count in found.get("n-samples", {}).items()},
        {task: int(shots or 0) for task, shots in found.get("n-shot", {}).items()},
        {task: _items_sha256(found["samples"][task]) for task, _ in outcomes},
    )


def _items_sha256(samples: Sequence[Mapping[str, Any]]) -> str:
    """Hash the items of a task, which ``lm-eval`` has hashed one by one."""
    items = {sample["doc_id"]: sample["doc_hash"] for sample in samples}  # one sample for each filter
    return hashlib.sha256("".join(f"{number} {items[number]}\n" for number in sorted(items)).encode()).hexdigest()


def _score(items: Mapping[int, float]) -> tuple[float, float]:
    """Return the mean and its standard error with the sample variance, as ``lm-eval`` does."""
    count = len(items)
    mean = sum(items.values()) / count
    squares = sum((score - mean) ** 2 for score in items.values())
    return mean, math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
