"""Make zero-shot tasks of local ``.jsonl`` files, which need no network.

The fields of a file say what kind of task it is:

* ``query``, ``choices``, ``gold``: the choice with the highest likelihood after the query (ARC, PIQA, BoolQ,
  HellaSwag). A query that asks a ``Question:`` gets ``Answer:`` on a line of its own, as in ``lm-eval``, unless it ends
  in it.
* ``context``, ``continuation``: right if greedy decoding gives exactly the continuation (LAMBADA).
* ``context_options``, ``continuation``, ``gold``: the context after which the continuation is likeliest (WinoGrande).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError
from ..text.sources import read_lines

KINDS = (("query", "choices", "gold"), ("context_options", "continuation", "gold"), ("context", "continuation"))
"""Fields that make a line of a local file a task."""

TEXTS = ("query", "context", "continuation")
"""Those of them that are text."""


def local_files(tasks: Sequence[str], tasks_dir: Path) -> list[Path]:
    """Find the files of local tasks.

    Raises:
        FistaPrunerError: there is no such folder, or it has no tasks, or not this one.
    """
    if not tasks_dir.is_dir():
        raise FistaPrunerError(f"--tasks-dir {tasks_dir} is not a folder; name one with a .jsonl file for each task")
    present = sorted(tasks_dir.glob("*.jsonl"))
    if not present:
        raise FistaPrunerError(f"--tasks-dir {tasks_dir} has no .jsonl file: each task is one")
    names = {path.stem: path for path in present}
    for task in tasks:
        if task not in (*names, "all"):
            raise FistaPrunerError(f"task {task!r} is not in {tasks_dir}: it has {', '.join(names)}")
    return present if "all" in tasks else [names[task] for task in tasks]


def local_task(path: Path) -> dict[str, Any]:
    """Make the ``lm-eval`` configuration of a local ``.jsonl`` task.

    The first line gives the kind of task; all lines are checked.

    Raises:
        FistaPrunerError: the file cannot be read, is empty, has none of the known sets of fields, or a line (its
            number is given) that is not UTF-8 JSON, lacks the fields of the first, has another value than whole
            text in one of them, an empty continuation or option, or whose ``gold`` names no option.
    """
    items = _items_of_file(path)
    fields = tuple(items[0])
    task: dict[str, Any] = {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": _dataset(items)},
        "test_split": "test",
        "num_fewshot": 0,
    }
    if fields == KINDS[0]:
        return task | {
            "output_type": "multiple_choice",
            "doc_to_text": _question,
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
        }
    if fields == KINDS[1]:
        # With a number as text and the contexts as choices, lm-eval scores one continuation after each context.
        return task | {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": lambda item: [option.rstrip(" ") for option in item["context_options"]],
            "doc_to_target": lambda item: item["continuation"].lstrip(" "),
            "metric_list": [_mean("acc")],
        }
    return task | {
        "output_type": "loglikelihood",
        "doc_to_text": lambda item: item["context"].rstrip(" "),
        "doc_to_target": lambda item: " " + item["continuation"].lstrip(" "),
        "metric_list": [_mean("acc")],
    }


def _dataset(items: Sequence[Mapping[str, Any]]) -> Any:
    """Make the data set that ``lm-eval`` reads.

    Its own reader of files takes text that is a date for a time.
    """
    from datasets import Dataset, Features, Value

    text = Value("string")
    kinds = {"gold": Value("int64"), "choices": [text], "context_options": [text]}
    return Dataset.from_list([*items], Features({field: kinds.get(field, text) for field in items[0]}))


def _items_of_file(path: Path) -> list[dict[str, Any]]:
    """Read the items of a file: of every line, the fields of the same one of :data:`KINDS`.

    Raises:
        FistaPrunerError: see :func:`local_task`.
    """
    kind: tuple[str, ...] = ()
    items: list[dict[str, Any]] = []
    for where, fields in read_lines(path):
        kind = kind or _kind_of(path, fields)
        for field in kind:
            if field not in fields:
                raise FistaPrunerError(f"{where}: {field!r} is not there, and every line has {', '.join(kind)}")
            if field in TEXTS and not isinstance(fields[field], str):
                raise FistaPrunerError(f"{where}: {field!r} is {fields[field]!r:.100}, and text is expected")
        if "continuation" in kind and not fields["continuation"].strip(" "):
            text = fields["continuation"]
            raise FistaPrunerError(f"{where}: 'continuation' is {text!r:.100}, and text that is not empty is expected")
        if "gold" in kind:
            _check_options(fields, "choices" if "choices" in kind else "context_options", where)
        items.append({field: fields[field] for field in kind})
    if not items:
        raise FistaPrunerError(f"{path} is empty: a task has one JSON object a line")
    return items


def _kind_of(path: Path, item: Mapping[str, Any]) -> tuple[str, ...]:
    """Find the fields that make an item a task.

    Raises:
        FistaPrunerError: the item has not all fields of any kind.
    """
    for fields in KINDS:
        if item.keys() >= set(fields):
            return fields
    raise FistaPrunerError(
        f"{path} has the fields {', '.join(sorted(item)) or 'none'}: a task has query, choices and gold; context and "
        "continuation; or context_options, continuation and gold"
    )


def _check_options(item: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse an item with an option that is no text, or whose ``gold`` is not the number of one of them.

    Args:
        item: the item.
        name: field that has its options.
        where: file and line.

    Raises:
        FistaPrunerError: names file, line and value.
    """
    options, gold = item[name], item["gold"]
    if not isinstance(options, list) or not options:
        raise FistaPrunerError(f"{where}: {name!r} is {options!r:.100}, and a list with an answer in it is expected")
    for option in options:
        if not isinstance(option, str) or not option.strip():
            raise FistaPrunerError(f"{where}: {name!r} has {option!r:.100}, and text that is not empty is expected")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise FistaPrunerError(
            f"{where}: 'gold' is {gold!r:.100}, and the number of one of the {len(options)} {name} is expected, which "
            f"counts from 0: 0 to {len(options) - 1}"
        )


def _question(item: Mapping[str, Any]) -> str:
    """Return the prompt of an item; a query with ``Question:`` ends in ``Answer:``."""
    query = str(item["query"]).strip()
    return f"{query}\nAnswer:" if "Question:" in query and not query.endswith("Answer:") else query


def _mean(metric: str) -> dict[str, Any]:
    """Return the ``lm-eval`` configuration of a metric."""
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}
