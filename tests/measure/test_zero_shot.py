"""Zero-shot tasks: paired statistics, local files, and agreement with lm-eval run by hand."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig

import fistapruner as fp
import tiny
from fistapruner.measure import zero_shot
from fistapruner.measure.local_tasks import local_task
from fistapruner.measure.scoring import mcnemar
from fistapruner.measure.zero_shot import (
    Tasks,
    TaskSettings,
    configured_metrics,
    evaluate_tasks,
    find_tasks,
    read_answers,
    task_result,
)
from fistapruner.models import whole
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.whole import whole_bytes
from fistapruner.reporting.evaluation_text import task_text
from fistapruner.reporting.quality_rows import quality_rows
from fistapruner.runs.results import Evaluation
from packed.pruned import save_pruned

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
    apart = [ours[item] - theirs[item] for item in ours]
    assert result.difference_error == pytest.approx(stdev(apart) / math.sqrt(len(apart)), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=60))
def test_scores_between_right_and_wrong_have_no_verdict(scores: list[float]) -> None:
    items = dict(enumerate(scores))
    result = task_result("truthfulqa_mc2", "acc", items, {**items, 0: 0.25}, shots=3)
    assert result.shots == 3
    assert result.standard_error == pytest.approx(stdev(scores) / math.sqrt(len(scores)), abs=1e-9)
    assert (result.lost, result.won, result.p_value, result.difference_error) == (None, None, None, None)
    text, (row,) = task_text(result), quality_rows([Evaluation("m", "dense", tasks=(result,))])
    assert "(dense" in text
    assert not [said for said in (text, row[-1]) if "lost" in said or "noise" in said]


def test_every_filter_has_its_own_score_and_examples_are_counted() -> None:
    samples = [
        {"doc_id": item, "doc_hash": "", "filter": name, "metrics": ["exact_match"], "exact_match": float(right)}
        for name, rights in (("strict-match", (0, 0, 1)), ("flexible-extract", (1, 0, 1)))
        for item, right in enumerate(rights)
    ]
    plain = [{"doc_id": 0, "doc_hash": "", "filter": "none", "metrics": ["acc"], "acc": 1.0}]
    counts = {"gsm8k": {"original": 9, "effective": 3}, "piqa": {"original": 1, "effective": 1}}
    found = read_answers(
        {"samples": {"gsm8k": samples, "piqa": plain}, "n-shot": {"gsm8k": 5, "piqa": 0}, "n-samples": counts}
    )
    assert found.outcomes == {
        ("gsm8k", "exact_match,strict-match"): {0: 0.0, 1: 0.0, 2: 1.0},
        ("gsm8k", "exact_match,flexible-extract"): {0: 1.0, 1: 0.0, 2: 1.0},
        ("piqa", "acc"): {0: 1.0},
    }
    assert found.shots == {"gsm8k": 5, "piqa": 0}
    assert found.available == {"gsm8k": 9, "piqa": 1}


def test_scores_of_other_items_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*hashes: str, filters: tuple[str, ...] = ("none",), step: int = 1) -> Any:
        samples = [
            {"doc_id": item, "doc_hash": text, "filter": name, "metrics": ["acc"], "acc": 1.0}
            for name in filters
            for item, text in enumerate(hashes)
        ]
        monkeypatch.setattr(zero_shot, "_run", lambda *_: {"samples": {"t": samples[::step]}})
        return evaluate_tasks(tmp_path, Tasks((), None, "local file"))[0].measured_on

    assert measured("a", "b") == measured("a", "b") == measured("a", "b", filters=("none", "strict"))
    assert measured("a", "b") == measured("a", "b", step=-1)  # the order of the answers says nothing of the items
    assert len({measured("a", "b"), measured("a", "c"), measured("b", "a"), measured("a")}) == 4


def test_progress_names_a_run_and_not_its_folder_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {"doc_id": 0, "doc_hash": "a", "filter": "none", "metrics": ["acc"], "acc": 1.0}
    monkeypatch.setattr(zero_shot, "_run", lambda *_: {"samples": {"t": [sample]}})
    (tmp_path / "first" / "model").mkdir(parents=True)
    (tmp_path / "first" / "run.json").touch()
    told: list[str] = []
    evaluate_tasks(
        tmp_path / "first" / "model",
        Tasks((), None, "local file"),
        against=tmp_path / "dense",
        tick=lambda what, *_: told.append(what),
    )
    assert told == ["zero-shot tasks of first", "zero-shot tasks of dense", "zero-shot tasks"]


def test_a_task_without_a_known_metric_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From what its configuration says, before a model is loaded; else once there are answers."""
    (tmp_path / "base.yaml").write_text(
        "process_results: !function utils.results\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    (tmp_path / "wikitext.yaml").write_text("include: base.yaml\ntask: wikitext\n")
    (tmp_path / "own.yaml").write_text("metric_list:\n  - metric: !function utils.acc\n")
    index = {"wikitext": {"yaml_path": str(tmp_path / "wikitext.yaml")}, "group": {"yaml_path": -1}}
    index["own"] = SimpleNamespace(yaml_path=tmp_path / "own.yaml")  # type: ignore[assignment]
    (tmp_path / "listed.yaml").write_text("include: [own.yaml, base.yaml]\n")
    (tmp_path / "odd.yaml").write_text("metric_list: [acc]\n")
    index |= {name: {"yaml_path": str(tmp_path / f"{name}.yaml")} for name in ("listed", "odd")}
    manager = SimpleNamespace(task_index=index, all_tasks=[*index])
    known = ["word_perplexity", "bits_per_byte"]
    assert [configured_metrics(manager, task) for task in index] == [known, [], [], known, []]
    samples = [{"doc_id": 0, "filter": "none", "metrics": ["bleu_max", "bleu_diff"], "bleu_max": 1.0, "bleu_diff": 0.5}]
    with pytest.raises(fp.FistaPrunerError, match=r"'truthfulqa_gen' has the metrics bleu_max, bleu_diff: only tasks"):
        read_answers({"samples": {"truthfulqa_gen": samples}})
    assert not caplog.messages
    scored = [{"doc_id": 0, "doc_hash": "", "filter": "none", "metrics": ["acc"], "acc": 1.0}]
    for found in ({"own": scored, "truthfulqa_gen": samples}, {"truthfulqa_gen": samples, "own": scored}):
        assert read_answers({"samples": found}).outcomes == {("own", "acc"): {0: 1.0}}
    assert [message[:44] for message in caplog.messages] == ["left out: task 'truthfulqa_gen' has the metr"] * 2


def test_weights_are_checked_before_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without text too, where transformers alone would read them."""
    asked: list[Path] = []
    module = sys.modules[fp.evaluate.__module__]
    monkeypatch.setattr(module, "find_tasks", lambda *_: Tasks((), None, ""))
    monkeypatch.setattr(module, "evaluate_tasks", lambda folder, *_, **__: (asked.append(folder), ())[1])
    dense, legacy = (tiny.save("llama", tmp_path / name, num_hidden_layers=1) for name in ("dense", "legacy"))
    torch.save(load_file(legacy / "model.safetensors"), legacy / "pytorch_model.bin")
    (legacy / "model.safetensors").unlink()
    (tmp_path / "typo").mkdir()
    for models in ((legacy, None), (dense, legacy), (tmp_path / "typo", None)):
        with pytest.raises(fp.FistaPrunerError, match=r"typo has no config\.json|legacy has only legacy pickle"):
            fp.evaluate(models[0], against=models[1], tasks=["boolq"])
    assert not asked
    fp.evaluate(dense, against=legacy, tasks=["boolq"], allow_pickle=True)
    assert asked == [dense]


def test_one_task_is_not_a_list_of_letters_and_a_folder_is_all_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    module = sys.modules[fp.evaluate.__module__]
    monkeypatch.setattr(module, "find_tasks", lambda tasks, *_: (asked.append(list(tasks)), Tasks((), None, ""))[1])
    monkeypatch.setattr(module, "evaluate_tasks", lambda *_, **__: ())
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    fp.evaluate(model, tasks="arc_easy")
    fp.evaluate(model, "python", windows=1, seqlen=16, tasks_dir=tmp_path, memory_limit="8GiB")
    assert asked == [["arc_easy"], ["all"]]


def test_a_limit_that_does_not_hold_the_whole_model_is_refused_before_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    module = sys.modules[fp.evaluate.__module__]
    monkeypatch.setattr(module, "find_tasks", lambda *_: Tasks((), None, ""))
    monkeypatch.setattr(module, "evaluate_tasks", lambda folder, *_, **__: (asked.append(folder), ())[1])
    monkeypatch.setattr(whole, "resident_memory", lambda: 2**20)
    small = tiny.save("llama", tmp_path / "small", num_hidden_layers=1)
    large = tiny.save("llama", tmp_path / "large")
    checkpoint = Checkpoint.open(small)
    limit = 2**20 + int(whole_bytes(checkpoint, torch.float32) / whole.ROOM)
    for model, against in ((large, None), (small, large)):
        with pytest.raises(
            fp.FistaPrunerError,
            match=r"^--memory-limit .*iB is not enough: zero-shot tasks load the whole .*large, which needs .*iB: ",
        ):
            fp.evaluate(model, against=against, tasks=["piqa"], memory_limit=limit)
    packed = tmp_path / "large packed"
    fp.pack(save_pruned(tmp_path / "pruned"), packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "unpack", Mock(side_effect=AssertionError))  # which takes long
        for model, against in ((packed, None), (small, packed)):
            with pytest.raises(fp.FistaPrunerError, match=r"whole model .*large packed, which needs"):
                fp.evaluate(model, against=against, tasks=["piqa"], dtype="float32", memory_limit=limit)
    assert not asked
    fp.evaluate(small, tasks=["piqa"], memory_limit=limit)
    assert asked == [small]


def test_a_local_task_asks_as_lm_eval_does(tmp_path: Path) -> None:
    write(tmp_path, "choices", CHOICES)
    task = local_task(tmp_path / "choices.jsonl")
    assert task["output_type"] == "multiple_choice"
    for written in ("", "\nAnswer:", "\nAnswer: "):
        assert task["doc_to_text"]({"query": CHOICES[3]["query"] + written}) == f"{CHOICES[3]['query']}\nAnswer:"
    assert task["doc_to_text"]({"query": " A sentence that goes on "}) == "A sentence that goes on"
    assert (task["doc_to_choice"], task["doc_to_target"]) == ("choices", "gold")
    assert [metric["metric"] for metric in task["metric_list"]] == ["acc", "acc_norm"]
    assert all(metric["aggregation"] == "mean" and metric["higher_is_better"] for metric in task["metric_list"])
    assert (task["num_fewshot"], task["test_split"]) == (0, "test")


@pytest.mark.parametrize("date", ["2024-01-02", "2024-01-02 10:00:00", "2024-01-02T10:00:00Z", "10:30:00", "7"])
def test_items_are_those_of_the_file(tmp_path: Path, date: str) -> None:
    """Text stays text also where it is a date, from any path, and other fields are left out."""
    pytest.importorskip("datasets", reason="the extra 'eval' is not installed")
    for name, item in (
        ("choices", {"query": date, "choices": [date, date], "gold": 1}),
        ("partial", {"context_options": [date], "continuation": date, "gold": 0}),
        ("greedy", {"context": date, "continuation": date}),
    ):
        folder = tmp_path / "a[1]*?"
        write(folder, name, [{**item, "more": {"date": date}}, {**item, "more": 3}])
        found = local_task(folder / f"{name}.jsonl")["custom_dataset"]()["test"]
        assert list(found) == [item, item]


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
    (tmp_path / "marked.jsonl").write_text(json.dumps(GREEDY[0]) + "\n", "utf-8-sig")
    assert local_task(tmp_path / "marked.jsonl")["output_type"] == "loglikelihood"
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(fp.FistaPrunerError, match="is empty"):
        local_task(tmp_path / "empty.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(fp.FistaPrunerError, match=r"cannot read .*folder\.jsonl: Is a directory"):
        find_tasks(["folder"], tmp_path)
    with pytest.raises(fp.FistaPrunerError, match="task 'absent' is not in"):
        find_tasks(["all", "absent"], tmp_path)
    with pytest.raises(fp.FistaPrunerError, match="nowhere is not a folder; name one"):
        find_tasks(["absent"], tmp_path / "nowhere")
    (tmp_path / "without").mkdir()
    with pytest.raises(fp.FistaPrunerError, match=r"without has no \.jsonl file: each task is one"):
        find_tasks(["absent"], tmp_path / "without")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 5 is not JSON"),
        (b'{"context": "\xff", "continuation": "a"}', "line 5 is not UTF-8 text"),
        (b"[]", "line 5: 'context' is not there"),
        (b'{"context": "a"}', "line 5: 'continuation' is not there"),
        (b'{"context": "a", "continuation": 1}', "line 5: 'continuation' is 1, and text is expected"),
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


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"query": 3, "choices": ["a", "b"], "gold": 0}, "'query' is 3, and text"),
        ({"query": "?", "choices": [4, 5], "gold": 0}, "'choices' has 4, and text"),
        ({"query": "?", "choices": ["no", ""], "gold": 0}, "'choices' has '', and text that is not empty"),
        ({"context_options": ["a", " "], "continuation": "b", "gold": 0}, "'context_options' has ' ', and text"),
        ({"context_options": ["a"], "continuation": None, "gold": 0}, "'continuation' is None, and text"),
        ({"context_options": ["a"], "continuation": "", "gold": 0}, "'continuation' is '', and text that is not empty"),
        ({"context": "a", "continuation": "  "}, "'continuation' is '  ', and text that is not empty"),
        ({"context": "a\ud800", "continuation": "b"}, "a text has half a character"),
        ({"query": "?", "choices": ["no", "\udc00"], "gold": 0}, "a text has half a character"),
        ({"context": ["a"], "continuation": "b"}, r"'context' is \['a'\], and text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, item: dict[str, Any], message: str) -> None:
    """In the first line, too."""
    write(tmp_path, "odd", [item])
    with pytest.raises(fp.FistaPrunerError, match=rf"odd\.jsonl, line 1: {message}"):
        local_task(tmp_path / "odd.jsonl")


@pytest.mark.parametrize("gold", [2, -1, "1", True, 0.0, None])
@pytest.mark.parametrize("items", [CHOICES, PARTIAL])
def test_a_gold_that_names_no_option_is_refused(tmp_path: Path, items: list[dict[str, Any]], gold: Any) -> None:
    wrong = {**items[0], "gold": gold}
    if "choices" in wrong:
        wrong["choices"] = wrong["choices"][:2]
    write(tmp_path, "every", [wrong])  # the first line may be wrong as well as another
    with pytest.raises(fp.FistaPrunerError, match=r"line 1: 'gold' is .* counts from 0: 0 to 1"):
        local_task(tmp_path / "every.jsonl")


@pytest.mark.parametrize("context", ["one two", "one two  "])
@pytest.mark.parametrize("continuation", ["three\n", " three\n"])
def test_one_space_stands_between_a_context_and_its_continuation(
    tmp_path: Path, context: str, continuation: str
) -> None:
    item: dict[str, Any] = {"context": context, "continuation": continuation}
    write(tmp_path, "greedy", [item])
    task = local_task(tmp_path / "greedy.jsonl")
    assert task["doc_to_text"](item) + task["doc_to_target"](item) == "one two three\n"
    item = {"context_options": [context, context], "continuation": continuation, "gold": 1}
    write(tmp_path, "partial", [item])
    task = local_task(tmp_path / "partial.jsonl")  # lm-eval writes its own space before the target
    assert [f"{option} {task['doc_to_target'](item)}" for option in task["doc_to_choice"](item)] == [
        "one two three\n"
    ] * 2


def test_options_that_are_no_list_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "text", [{"query": "which?", "choices": "ab", "gold": 0}])
    with pytest.raises(fp.FistaPrunerError, match="line 1: 'choices' is 'ab', and a list"):
        local_task(tmp_path / "text.jsonl")


def test_prompts_that_lm_eval_cuts_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: Path, *_: Any) -> dict[str, Any]:
        logger = logging.getLogger("lm_eval.models.huggingface")
        logger.warning("another warning")
        if folder.name == "short":
            for number in (3, 4):
                logger.warning("Combined length exceeds model's maximum. Truncating %d tokens from the left.", number)
        return {"samples": {"t": [{"doc_id": 0, "doc_hash": "", "metrics": ["acc"], "acc": 1.0}]}}

    monkeypatch.setattr(zero_shot, "_run", run)
    monkeypatch.setattr(sys.modules[fp.evaluate.__module__], "find_tasks", lambda *_: Tasks((), None, "local file"))
    model = tiny.save("llama", tmp_path / "long")
    assert fp.evaluate(model, tasks=["t"]).warnings == ()
    model = model.rename(tmp_path / "short")
    assert fp.evaluate(model, tasks=["t"]).warnings == (
        f"tasks on {model}: at least 2 requests are longer than the model takes, and were cut at their beginning",
    )
    assert caplog.messages == []


def test_lm_eval_is_told_how_long_texts_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would let RoBERTa's take two positions that no token has."""
    made: list[dict[str, Any]] = []
    stand_in = SimpleNamespace(simple_evaluate=lambda *_, **__: {}, HFLM=lambda **given: made.append(given))
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    sizes = {**tiny.WIDE, "vocab_size": tiny.VOCABULARY, "pad_token_id": 1, "is_decoder": True}
    config = RobertaConfig(**sizes, max_position_embeddings=66)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    zero_shot._run(tmp_path, Tasks((), None, "local file"), TaskSettings(), lambda *_: None)
    assert [given["max_length"] for given in made] == [64]


@pytest.mark.slow
def test_a_task_that_lm_eval_does_not_know() -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    with pytest.raises(fp.FistaPrunerError, match="task 'absent' is not known to lm-eval"):
        find_tasks(["absent"])


def test_items_that_lm_eval_cannot_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(simple_evaluate=Mock(side_effect=IndexError("odd item")), HFLM=Mock())
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    with pytest.raises(fp.FistaPrunerError, match=r"lm-eval could not evaluate the tasks on .*: IndexError: odd item"):
        evaluate_tasks(tiny.save("llama", tmp_path / "model"), Tasks((), None, "local file"))


@pytest.mark.slow
def test_an_answer_that_is_longer_than_the_model_takes_is_told(tmp_path: Path) -> None:
    """lm-eval's assertion has no words."""
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    write(tmp_path / "tasks", "long", [{"context": "one", "continuation": "two " * 400}])
    model = tiny.save("opt", tmp_path / "model")
    with pytest.raises(fp.FistaPrunerError, match="an answer of a task is longer than the 128 tokens that the model"):
        evaluate_tasks(model, find_tasks(["long"], tmp_path / "tasks"))


@pytest.mark.slow
def test_local_tasks_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, items in (("choices", CHOICES), ("greedy", GREEDY), ("partial", PARTIAL)):
        write(tmp_path / "tasks", name, items)
    dense = tiny.save("llama", tmp_path / "dense")
    other = tiny.save("llama", tmp_path / "other", seed=5)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    told: list[tuple[str, int, int]] = []
    result = fp.evaluate(
        other, tasks=["all"], tasks_dir=tmp_path / "tasks", against=dense, tick=lambda *progress: told.append(progress)
    )
    said = capfd.readouterr().err
    assert "requests" not in said  # lm-eval shows bars of its own
    assert "git" not in said  # it asks git about the current folder
    requests = 3 * len(CHOICES) + len(GREEDY) + 2 * len(PARTIAL)
    for name in ("other", "dense"):
        assert (f"zero-shot tasks of {name}, requests", requests, requests) in told
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
