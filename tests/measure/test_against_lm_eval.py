"""The real model and real files in lm-eval's own tasks: our scores against those of lm-eval run by hand.

The files are looked for in ``$FISTAPRUNER_DATA`` (``zero_shot/*.jsonl``).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import fistapruner as fp
from fistapruner.models.source import load_tokenizer, resolve_model

pytestmark = [pytest.mark.slow, pytest.mark.real]
ITEMS = 40
Item = dict[str, Any]


def arc(item: Item) -> Item:
    labels = list("ABCDE"[: len(item["choices"])])
    question = item["query"].removeprefix("Question: ").strip()
    return {
        "question": question,
        "choices": {"text": item["choices"], "label": labels},
        "answerKey": labels[item["gold"]],
    }


def piqa(item: Item) -> Item:
    first, second = item["choices"]
    return {
        "goal": item["query"].removeprefix("Question: ").strip(),
        "sol1": first,
        "sol2": second,
        "label": item["gold"],
    }


def lambada(item: Item) -> Item:
    return {"text": f"{item['context']} {item['continuation']}"}


def winogrande(item: Item) -> Item:
    start = os.path.commonprefix(item["context_options"])  # noqa: RUF071 (characters are meant)
    options = [context.removeprefix(start) for context in item["context_options"]]
    return {
        "sentence": f"{start}_ {item['continuation']}",
        "option1": options[0],
        "option2": options[1],
        "answer": str(item["gold"] + 1),
    }


AS_ON_THE_HUB: dict[str, tuple[str, Callable[[Item], Item]]] = {
    "arc_easy": ("test", arc),
    "arc_challenge": ("test", arc),
    "piqa": ("validation", piqa),
    "lambada_openai": ("test", lambada),
    "winogrande": ("validation", winogrande),
}
"""Tasks of lm-eval: the split it reads, and how an item of a local file looks there."""


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("FISTAPRUNER_DATA", ""))
    if not (folder / "zero_shot" / "piqa.jsonl").is_file():
        pytest.skip("FISTAPRUNER_DATA names no folder with zero_shot/*.jsonl")
    return folder


@pytest.fixture(scope="module")
def dense() -> Path:
    try:
        return resolve_model("smollm2")
    except fp.FistaPrunerError as error:
        pytest.skip(f"the small real model is not here: {error}")


@pytest.fixture(scope="module")
def runner(dense: Path) -> Any:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    return HFLM(pretrained=model, tokenizer=load_tokenizer(dense), batch_size=4, device="cpu")


def test_zero_shot_scores_are_those_of_lm_eval_s_own_tasks(
    data: Path, dense: Path, runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files, theirs = data / "zero_shot", TaskManager()
    for name, (split, convert) in AS_ON_THE_HUB.items():
        lines = (files / f"{name}.jsonl").read_text("utf-8").splitlines()[:ITEMS]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(convert(json.loads(line))) + "\n" for line in lines))
        # Everything but where the data lies is lm-eval's own definition of the task.
        task: dict[str, Any] = {
            "include": str(theirs.task_index[name].yaml_path),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path)}},
            "training_split": None,
            "validation_split": None,
            "test_split": None,
        }
        task["validation_split" if split == "validation" else "test_split"] = split
        path.with_suffix(".yaml").write_text(yaml.safe_dump(task), "utf-8")
    ours = fp.evaluate(dense, tasks_dir=tmp_path, dtype="float32").tasks
    tasks = [str(tmp_path / f"{name}.yaml") for name in AS_ON_THE_HUB]
    results = simple_evaluate(runner, tasks=tasks, bootstrap_iters=0, task_manager=theirs)["results"]
    found = {(task.task, task.metric): task.value for task in ours}
    expected = {
        (name, metric.removesuffix(",none")): value
        for name, scores in results.items()
        for metric, value in scores.items()
        if metric in ("acc,none", "acc_norm,none")
    }
    assert found == expected
    assert {task.items for task in ours} == {ITEMS}
