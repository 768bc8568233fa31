"""Zero-shot tasks: paired statistics, local files, and agreement with lm-eval run by hand."""

import json
import math
import sys
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig

import fistapruner as fp
import tiny
from fistapruner.measure.logits import mcnemar
from fistapruner.measure.tasks import Tasks, evaluate_tasks, find_tasks, task_result
from fistapruner.models import build
from fistapruner.models.build import whole_bytes
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.reporting.measured import task_facts

CHOICES = [
    {"query": f"What comes after {i}?", "choices": [f"{i + 1}", f"{i + 2} or so", "none"], "gold": i % 3}
    for i in range(12)
]


def write(folder: Path, name: str, items: list[Any], **task: Any) -> None:
    """Write a task as lm-eval defines tasks, and its items beside it."""
    folder.mkdir(exist_ok=True)
    items_file = folder / f"{name}.jsonl"
    items_file.write_text("".join(json.dumps(item) + "\n" for item in items))
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(items_file)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **task}))


@settings(deadline=None)  # the first call imports scipy.stats
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_paired_counts_and_the_exact_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    ours = {index: float(a) for index, (a, _) in enumerate(pairs)}
    theirs = {index: float(b) for index, (_, b) in enumerate(pairs)}
    result = task_result("t", "acc", ours, theirs)
    assert (result.won - result.lost) / len(pairs) == pytest.approx(result.value - result.reference)
    apart = [ours[item] - theirs[item] for item in ours]
    assert result.difference_error == pytest.approx(stdev(apart) / math.sqrt(len(apart)), abs=1e-9)
    total = result.lost + result.won
    tail = sum(math.comb(total, k) for k in range(min(result.lost, result.won) + 1))
    assert result.p_value == mcnemar(result.lost, result.won) == pytest.approx(min(1.0, 2 * tail / 2**total), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=60))
def test_scores_between_right_and_wrong_have_no_verdict(scores: list[float]) -> None:
    items = dict(enumerate(scores))
    result = task_result("truthfulqa_mc2", "acc", items, {**items, 0: 0.25}, shots=3)
    assert result.shots == 3
    assert result.standard_error == pytest.approx(stdev(scores) / math.sqrt(len(scores)), abs=1e-9)
    assert (result.lost, result.won, result.p_value, result.difference_error) == (None, None, None, None)
    (fact,) = task_facts([result])
    assert fact.dense
    assert "lost" not in fact.how


def answer(item: int, text: str, through: str = "none", **scores: float) -> dict[str, Any]:
    return {"doc_id": item, "doc_hash": text, "filter": through, **scores}


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in of lm-eval, which answers with what a test puts into it."""
    stand_in = SimpleNamespace(simple_evaluate=Mock(), HFLM=Mock())
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, stand_in)

    def says(samples: dict[str, list[dict[str, Any]]], shots: int = 0) -> None:
        counts = {task: {"original": 9} for task in samples}
        stand_in.simple_evaluate.return_value = {"samples": samples, "n-shot": dict.fromkeys(samples, shots)} | {
            "n-samples": counts
        }

    stand_in.says = says
    return stand_in


ANY = Tasks((), None, "local file")


def test_every_filter_has_its_own_score_and_progress_names_the_run(tmp_path: Path, lm_eval: Any) -> None:
    lm_eval.says(
        {
            "gsm8k": [
                answer(item, "", name, exact_match=float(right))
                for name, rights in (("strict-match", (0, 0, 1)), ("flexible-extract", (1, 0, 1)))
                for item, right in enumerate(rights)
            ],
            "gen": [answer(0, "", bleu_max=1.0)],
        },
        shots=5,
    )
    model = tiny.save("llama", tmp_path / "first" / "model", num_hidden_layers=1)
    (tmp_path / "first" / "run.json").touch()
    told: list[str] = []
    found = evaluate_tasks([model, model], ANY, tick=lambda what, *_: told.append(what))
    assert told == ["zero-shot tasks of first", "zero-shot tasks of first", "zero-shot tasks"]
    scores = {(each.task, each.metric): (each.value, each.reference) for each in found}
    assert scores == {
        ("gsm8k", "exact_match,strict-match"): (1 / 3, 1 / 3),
        ("gsm8k", "exact_match,flexible-extract"): (2 / 3, 2 / 3),
    }
    assert {(each.shots, each.available, each.items) for each in found} == {(5, 9, 3)}
    lm_eval.simple_evaluate.side_effect = IndexError("odd item")
    with pytest.raises(fp.FistaPrunerError, match=r"lm-eval could not evaluate the tasks on .*: IndexError: odd item"):
        evaluate_tasks([model], ANY)


def test_scores_of_other_items_are_told_apart(tmp_path: Path, lm_eval: Any) -> None:
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)

    def measured(*hashes: str, filters: tuple[str, ...] = ("none",), step: int = 1) -> Any:
        found = [answer(item, text, name, acc=1.0) for name in filters for item, text in enumerate(hashes)]
        lm_eval.says({"t": found[::step]})
        return evaluate_tasks([model], ANY)[0].measured_on

    assert measured("a", "b") == measured("a", "b") == measured("a", "b", filters=("none", "strict"))
    assert measured("a", "b") == measured("a", "b", step=-1)  # the order of the answers says nothing of the items
    assert len({measured("a", "b"), measured("a", "c"), measured("b", "a"), measured("a")}) == 4


def test_lm_eval_is_told_how_long_texts_may_be(tmp_path: Path, lm_eval: Any) -> None:
    """It would let RoBERTa's take two positions that no token has."""
    sizes = {**tiny.WIDE, "vocab_size": tiny.VOCABULARY, "pad_token_id": 1, "is_decoder": True}
    config = RobertaConfig(**sizes, max_position_embeddings=66)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    lm_eval.says({"t": [answer(0, "", acc=1.0)]})
    evaluate_tasks([tmp_path], ANY)
    assert lm_eval.HFLM.call_args.kwargs["max_length"] == 64


def asked(tasks: Mock) -> list[tuple[tuple[str, ...], Path]]:
    """Tasks and models of all calls of :func:`evaluate_tasks`."""
    return [(call.args[1].names, call.args[0][0]) for call in tasks.call_args_list]


def test_weights_are_checked_before_tasks(tmp_path: Path, tasks: Mock) -> None:
    """Without text too, where transformers alone would read them."""
    dense, legacy = (tiny.save("llama", tmp_path / name, num_hidden_layers=1) for name in ("dense", "legacy"))
    torch.save(load_file(legacy / "model.safetensors"), legacy / "pytorch_model.bin")
    (legacy / "model.safetensors").unlink()
    (tmp_path / "typo").mkdir()
    for models in ((legacy, None), (dense, legacy), (tmp_path / "typo", None)):
        with pytest.raises(fp.FistaPrunerError, match=r"typo has no config\.json|legacy has only legacy pickle"):
            fp.evaluate(models[0], against=models[1], tasks=["boolq"])
    assert not asked(tasks)
    fp.evaluate(dense, against=legacy, tasks="boolq", allow_pickle=True)
    fp.evaluate(dense, "python", windows=1, seqlen=16, tasks_dir=tmp_path, memory_limit="8GiB")
    assert asked(tasks) == [(("boolq",), dense), ((), dense)]  # one task is not a list of letters


def test_a_limit_that_does_not_hold_the_whole_model_is_refused_before_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: Mock
) -> None:
    monkeypatch.setattr(build, "resident_memory", lambda: 2**20)
    small = tiny.save("llama", tmp_path / "small", num_hidden_layers=1)
    large = tiny.save("llama", tmp_path / "large")
    limit = 2**20 + int(whole_bytes(Checkpoint.open(small), torch.float32) / build.ROOM)
    for model, against in ((large, None), (small, large)):
        with pytest.raises(fp.FistaPrunerError, match=r"^--tasks on .*large needs the whole model on cpu, .*: leave"):
            fp.evaluate(model, against=against, tasks=["piqa"], memory_limit=limit)
    assert not asked(tasks)
    fp.evaluate(small, tasks=["piqa"], memory_limit=limit)
    assert asked(tasks) == [(("piqa",), small)]


@pytest.mark.slow
def test_local_tasks_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(
        tmp_path / "tasks",
        "choices",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    greedy = [{"context": f"one two three {i}", "continuation": "four"} for i in range(6)]
    asked = {"doc_to_text": "{{context}}", "doc_to_target": "{{continuation}}", "metric_list": [{"metric": "acc"}]}
    write(tmp_path / "tasks", "greedy", greedy, output_type="loglikelihood", **asked)
    dense = tiny.save("llama", tmp_path / "dense")
    other = tiny.save("llama", tmp_path / "other", seed=5)
    result = fp.evaluate(other, tasks_dir=tmp_path / "tasks", against=dense)
    scores = {(task.task, task.metric): task for task in result.tasks}
    assert set(scores) == {("choices", "acc"), ("choices", "acc_norm"), ("greedy", "acc")}
    assert scores["choices", "acc"].items == scores["choices", "acc"].available == len(CHOICES)
    assert scores["choices", "acc"].source == "tasks"
    assert scores["greedy", "acc"].value == 0.0
    options = [([(item["query"], f" {choice}") for choice in item["choices"]], item["gold"]) for item in CHOICES]
    for folder, ours in ((other, "value"), (dense, "reference")):
        assert getattr(scores["choices", "acc"], ours) == pytest.approx(share_right(folder, options))

    limited = evaluate_tasks([other], find_tasks(["choices"], tmp_path / "tasks"), limit=5)
    assert {task.items for task in limited} == {5}
    assert limited[0].reference is None
    for where, said in ((None, "lm-eval"), (tmp_path / "tasks", "--tasks-dir .*tasks")):
        with pytest.raises(fp.FistaPrunerError, match=f"task 'absent' is not known to {said}"):
            find_tasks(["absent"], where)


def share_right(folder: Path, asked: list[tuple[list[tuple[str, str]], int]]) -> float:
    """Share of items whose right (context, continuation) has the highest log-likelihood."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def log_likelihood(context: str, continuation: str) -> float:
        before = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        ids = torch.tensor(tokenizer(context + continuation, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            chances = model(ids[None]).logits[0].log_softmax(-1)
        return float(sum(chances[place - 1, ids[place]] for place in range(before, len(ids))))

    right = 0
    for options, gold in asked:
        scores = [log_likelihood(*option) for option in options]
        right += scores.index(max(scores)) == gold
    return right / len(asked)
