"""Zero-shot tasks: paired statistics, local files, and agreement with lm-eval run by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import fistapruner as fp
import tiny
from fistapruner.evaluation.zero_shot import TaskSettings, evaluate_tasks, find_tasks, local_task, mcnemar, task_result

CHOICES = [
    {"query": f"Question: what comes after {i}?", "choices": [f"{i + 1}", f"{i + 2} or so", "none"], "gold": i % 3}
    for i in range(12)
]
GREEDY = [{"context": f"one two three {i}", "continuation": "four"} for i in range(6)]
PARTIAL = [
    {"context_options": [f"a cat {i}", f"a dog {i}"], "continuation": "ran away.", "gold": i % 2} for i in range(8)
]


def write(folder: Path, name: str, items: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


@settings(deadline=None)  # the first call imports scipy.stats
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1))
    expected = min(1.0, 2 * tail / 2**total)
    assert mcnemar(lost, won) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_paired_counts(pairs: list[tuple[bool, bool]]) -> None:
    ours = {index: float(a) for index, (a, _) in enumerate(pairs)}
    theirs = {index: float(b) for index, (_, b) in enumerate(pairs)}
    result = task_result("t", "acc", ours, theirs)
    assert result.lost is not None
    assert result.won is not None
    assert result.reference is not None
    assert (result.won - result.lost) / len(pairs) == pytest.approx(result.value - result.reference)
    assert result.significant == (mcnemar(result.lost, result.won) < 0.05)


def test_different_items_cannot_be_compared() -> None:
    with pytest.raises(fp.FistaPrunerError, match="different items"):
        task_result("t", "acc", {0: 1.0}, {1: 1.0})


def test_bad_tasks_are_named(tmp_path: Path) -> None:
    (tmp_path / "wrong.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(fp.FistaPrunerError, match="has the fields question"):
        local_task(tmp_path / "wrong.jsonl")
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(fp.FistaPrunerError, match="line 1 is not JSON"):
        local_task(tmp_path / "broken.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(fp.FistaPrunerError, match="is empty"):
        local_task(tmp_path / "empty.jsonl")
    with pytest.raises(fp.FistaPrunerError, match="task 'absent' is not in"):
        find_tasks(["absent"], tmp_path)
    with pytest.raises(fp.FistaPrunerError, match=r"holds no \.jsonl task"):
        find_tasks(["absent"], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 5 is not JSON"),
        (b'{"context": "\xff", "continuation": "a"}', "line 5 is not JSON in UTF-8"),
        (b"[]", "line 5: 'context' is not there"),
        (b'{"context": "a"}', "line 5: 'continuation' is not there"),
        (b'{"context": "a", "continuation": 1}', "line 5: 'continuation' is not there, or of another type"),
    ],
)
def test_every_line_of_a_task_is_checked(tmp_path: Path, line: bytes, message: str) -> None:
    write(tmp_path, "greedy", GREEDY[:3])
    path = tmp_path / "greedy.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    assert local_task(path)["output_type"] == "loglikelihood"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(fp.FistaPrunerError, match=message):
        local_task(path)


@pytest.mark.slow
def test_a_task_that_lm_eval_does_not_know() -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    with pytest.raises(fp.FistaPrunerError, match="task 'absent' is not known to lm-eval"):
        find_tasks(["absent"])


@pytest.mark.slow
def test_items_that_lm_eval_cannot_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "tasks", "hollow", [{"query": "which?", "choices": [], "gold": 0}])
    with pytest.raises(fp.FistaPrunerError, match="lm-eval could not evaluate the tasks"):
        evaluate_tasks(tiny.save("llama", tmp_path / "model"), find_tasks(["hollow"], tmp_path / "tasks"))


@pytest.mark.slow
def test_local_tasks_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, items in (("choices", CHOICES), ("greedy", GREEDY), ("partial", PARTIAL)):
        write(tmp_path / "tasks", name, items)
    dense = tiny.save("llama", tmp_path / "dense")
    other = tiny.save("llama", tmp_path / "other", seed=5)
    result = fp.evaluate(other, tasks=["all"], tasks_dir=tmp_path / "tasks", against=dense)
    scores = {(task.task, task.metric): task for task in result.tasks}
    assert set(scores) == {("choices", "acc"), ("choices", "acc_norm"), ("greedy", "acc"), ("partial", "acc")}
    assert scores["choices", "acc"].items == len(CHOICES)
    assert scores["greedy", "acc"].value == 0.0

    for folder, ours in ((other, "value"), (dense, "reference")):
        assert getattr(scores["choices", "acc"], ours) == pytest.approx(share_right(folder, CHOICES))
        assert getattr(scores["partial", "acc"], ours) == pytest.approx(share_right_partial(folder, PARTIAL))

    # The same by lm-eval itself, without any of our code but the task's definition.
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    runner = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(other), batch_size=16, device="cpu")
    by_hand = simple_evaluate(runner, tasks=[local_task(tmp_path / "tasks" / "choices.jsonl")], bootstrap_iters=0)[
        "results"
    ]["choices"]
    assert scores["choices", "acc"].value == by_hand["acc,none"]
    assert scores["choices", "acc_norm"].value == by_hand["acc_norm,none"]

    limited = evaluate_tasks(other, find_tasks(["choices"], tmp_path / "tasks"), TaskSettings(limit=5))
    assert {task.items for task in limited} == {5}
    assert limited[0].reference is None


def log_likelihood(folder: Path, context: str, continuation: str) -> float:
    """Log-likelihood of ``continuation`` after ``context``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = torch.tensor(tokenizer(context + continuation, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        chances = model(ids[None]).logits[0].log_softmax(-1)
    return float(sum(chances[place - 1, ids[place]] for place in range(before, len(ids))))


def share_right(folder: Path, items: list[dict[str, Any]]) -> float:
    right = 0
    for item in items:
        scores = [log_likelihood(folder, item["query"] + "\nAnswer:", " " + choice) for choice in item["choices"]]
        right += scores.index(max(scores)) == item["gold"]
    return right / len(items)


def share_right_partial(folder: Path, items: list[dict[str, Any]]) -> float:
    right = 0
    for item in items:
        scores = [log_likelihood(folder, context, " " + item["continuation"]) for context in item["context_options"]]
        right += scores.index(max(scores)) == item["gold"]
    return right / len(items)
