"""Make ``lm-eval`` task configurations of local ``.jsonl`` files, which need no network.

The fields of a file's first line say what kind of task it is:

* ``query``, ``choices``, ``gold``: the choice with the highest likelihood after the query (ARC, PIQA, BoolQ,
  HellaSwag). A query that asks a ``Question:`` gets ``Answer:`` on a line of its own, as in ``lm-eval``.
* ``context``, ``continuation``: right if greedy decoding gives exactly the continuation (LAMBADA).
* ``context_options``, ``continuation``, ``gold``: the context after which the continuation is likeliest (WinoGrande).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ..errors import FistaPrunerError, explain
from ..text.sources import read_lines

Text = Annotated[str, StringConstraints(pattern=r"\S")]
"""Text that is not empty."""


class _Item(BaseModel):
    """One line of a file; its other fields are left out."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="after")
    def _gold_is_an_option(self) -> _Item:
        options, gold = getattr(self, "choices", getattr(self, "context_options", [0])), getattr(self, "gold", 0)
        if not 0 <= gold < len(options):
            raise ValueError(f"gold is {gold}, and the number of one of the {len(options)} options is expected, from 0")
        return self


class Question(_Item):
    """A question, the possible answers and the number of the right one."""

    query: str
    choices: list[Text] = Field(min_length=1)
    gold: int


class Partial(_Item):
    """A continuation, the possible contexts before it and the number of the right one."""

    context_options: list[Text] = Field(min_length=1)
    continuation: Text
    gold: int


class Greedy(_Item):
    """A context and its only right continuation."""

    context: str
    continuation: Text


def local_files(tasks: Sequence[str], tasks_dir: Path) -> list[Path]:
    """Find the files of local tasks; ``all`` names every file of the folder.

    Raises:
        FistaPrunerError: the folder has no tasks, or not this one.
    """
    names = {path.stem: path for path in sorted(tasks_dir.glob("*.jsonl"))}
    if not names:
        raise FistaPrunerError(f"--tasks-dir {tasks_dir} is not a folder with a .jsonl file for each task")
    for task in tasks:
        if task not in (*names, "all"):
            raise FistaPrunerError(f"task {task!r} is not in {tasks_dir}: it has {', '.join(names)}")
    return [*names.values()] if "all" in tasks else [names[task] for task in tasks]


def local_task(path: Path) -> dict[str, Any]:
    """Make the ``lm-eval`` configuration of a local ``.jsonl`` task.

    Raises:
        FistaPrunerError: the file cannot be read, is empty, or a line is no item of a task; names the line.
    """
    items: list[dict[str, Any]] = []
    kind: type[_Item] | None = None
    for where, fields in read_lines(path):
        kind = kind or next(
            (each for each in (Question, Partial, Greedy) if fields.keys() >= {*each.model_fields}), None
        )
        if kind is None:
            raise FistaPrunerError(
                f"{where} has the fields {', '.join(sorted(fields)) or 'none'}: a task has query, choices and gold; "
                "context and continuation; or context_options, continuation and gold"
            )
        try:
            items.append(kind.model_validate(fields).model_dump())
        except ValidationError as error:
            raise FistaPrunerError(f"{where}: {explain(error)}") from None
    if kind is None:
        raise FistaPrunerError(f"{path} is empty: a task has one JSON object a line")
    metrics = ["acc", "acc_norm"] if kind is Question else ["acc"]
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": _dataset(items)},
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        **FORMS[kind],
    }


def _dataset(items: list[dict[str, Any]]) -> Any:
    """Make the data set; ``lm-eval``'s own reader takes text that is a date for a time."""
    from datasets import Dataset, Features, Value

    text = Value("string")
    kinds = {"gold": Value("int64"), "choices": [text], "context_options": [text]}
    return Dataset.from_list(items, Features({field: kinds.get(field, text) for field in items[0]}))


def _prompt(item: dict[str, Any]) -> str:
    """Return what a model is asked; a query with ``Question:`` ends in ``Answer:``."""
    query = str(item["query"]).strip()
    return f"{query}\nAnswer:" if "Question:" in query and not query.endswith("Answer:") else query


FORMS: dict[type[_Item], dict[str, Any]] = {
    Question: {
        "output_type": "multiple_choice",
        "doc_to_text": _prompt,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    },
    # With a number as text and the contexts as choices, lm-eval scores one continuation after each context.
    Partial: {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": lambda item: [option.rstrip(" ") for option in item["context_options"]],
        "doc_to_target": lambda item: item["continuation"].lstrip(" "),
    },
    Greedy: {
        "output_type": "loglikelihood",
        "doc_to_text": lambda item: item["context"].rstrip(" "),
        "doc_to_target": lambda item: " " + item["continuation"].lstrip(" "),
    },
}
"""What ``lm-eval`` asks of an item of each kind."""
