"""Texts of several tasks: shares of uniform and pooled mixtures, in training and in calibration."""

from __future__ import annotations

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import LETTERS, letters_tokenizer, tiny

from fistapruner import FistaPrunerError
from fistapruner.measure.data import evaluation_documents
from fistapruner.papers.mamf import Mixture
from fistapruner.settings.calibration_settings import Calibration
from fistapruner.settings.loading import merge_settings
from fistapruner.settings.recover_settings import RecoverRecipe, TrainingData
from fistapruner.settings.settings import Recipe
from fistapruner.text import calibration_tokens
from fistapruner.text.training_text import TrainingText, order, shared_documents, training_text
from fistapruner.training.recovery import check_mixture


def texts(folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    """Write one file of random documents for each task; a task's documents begin with its name."""
    generator = random.Random(0)
    sources = {}
    for name, size in sizes.items():
        documents = [name + "".join(generator.choices(LETTERS, k=20)) for _ in range(size)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
        sources[name] = str(path)
    return sources


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(1, 5), st.none() | st.integers(1, 9), st.integers(1, 900))
def test_what_is_named_is_enough_for_a_mixture(
    tasks: int, per_round: int, windows_per_step: int, steps: int | None, tokens: int
) -> None:
    texts = {str(number): "python" for number in range(tasks)}
    asked: dict[str, Any] = {"windows_per_step": windows_per_step, "steps": steps}
    asked["data"] = {"tasks": texts, "tokens": tokens, "per_round": min(per_round, tasks)}
    try:
        check_mixture(RecoverRecipe(**asked), 32)
    except FistaPrunerError as error:
        advice, _, fewer_rounds = str(error).partition(": take ")[2].partition(", or per_round ")
        for value, name in re.findall(r"at least (\d+) (\w+)", advice):
            (asked if name == "steps" else asked["data"])[name] = int(value)
        assert (asked["steps"], asked["data"]["tokens"]) != (steps, tokens)
        check_mixture(RecoverRecipe(**asked), 32)
        if fewer_rounds:
            asked |= {"steps": steps, "data": {"tasks": texts, "tokens": tokens, "per_round": int(fewer_rounds)}}
            check_mixture(RecoverRecipe(**asked), 32)


def test_uniform_and_pooled(tmp_path: Path) -> None:
    data = TrainingData(tasks=texts(tmp_path, {"a": 400, "b": 100, "c": 100}), tokens=60 * 32)
    uniform = training_text(data, letters_tokenizer(), 32)
    pooled = training_text(data.model_copy(update={"mixture": "pooled"}), letters_tokenizer(), 32)
    assert uniform.tasks == ("a", "b", "c")
    assert torch.bincount(uniform.task[~uniform.held_out]).tolist() == [20, 20, 20]
    assert torch.bincount(pooled.task[~pooled.held_out]).tolist() == [40, 10, 10]
    assert torch.equal(uniform.tokens[uniform.held_out], pooled.tokens[pooled.held_out])
    for text in (uniform, pooled):
        assert set(text.task[text.held_out].tolist()) == {0, 1, 2}
        assert int(text.held_out.sum()) <= 16
        assert set(text.facts["tasks"]) == {"a", "b", "c"}
    for task, name in enumerate("abc"):
        first = letters_tokenizer().convert_tokens_to_ids(name)
        windows = uniform.tokens[uniform.task == task]
        after_end = windows[:, 1:][windows[:, :-1] == 2]
        assert set(after_end.tolist()) == {first}


@pytest.mark.parametrize("per_round", [None, 2])
def test_order_takes_the_same_number_of_tokens_from_each_task(tmp_path: Path, per_round: int | None) -> None:
    data = TrainingData(tasks=texts(tmp_path, {"a": 200, "b": 40, "c": 40}), tokens=70 * 32, per_round=per_round)
    text = training_text(data, letters_tokenizer(), 32)
    drawn = order(text, 35, 2, data)
    assert torch.equal(drawn, order(text, 35, 2, data))
    assert not bool(text.held_out[drawn].any())
    tasks = text.task[drawn].flatten()
    assert torch.equal(tasks, Mixture(3, per_round, data.seed).draw(70))
    for task in range(3):
        own = drawn.flatten()[tasks == task].tolist()
        there = int(((text.task == task) & ~text.held_out).sum())
        for start in range(0, len(own) - there + 1, there):
            assert len(set(own[start : start + there])) == there
    pooled = data.model_copy(update={"mixture": "pooled"})
    assert not torch.equal(drawn, order(text, 35, 2, pooled))
    with pytest.raises(FistaPrunerError, match="needs"):
        order(text, 1, 2, data)


def test_generated_text_is_a_task_too(tmp_path: Path) -> None:
    sources = {"own": "self", **texts(tmp_path, {"a": 100})}
    for mixture in ("uniform", "pooled"):
        data = TrainingData(tasks=sources, tokens=20 * 32, mixture=mixture)
        text = training_text(data, letters_tokenizer(), 32, lambda: tiny("llama"))
        assert torch.bincount(text.task[~text.held_out]).tolist() == [10, 10]


def test_too_few_windows_are_refused_before_text_is_generated(tmp_path: Path) -> None:
    sources = {"own": "self", **texts(tmp_path, {"a": 100, "b": 100})}
    with pytest.raises(FistaPrunerError, match=r"3 tasks, 1 a round, needs 18 windows .* there are 10"):
        training_text(TrainingData(tasks=sources, tokens=320, per_round=1), letters_tokenizer(), 32)


def test_shared_documents_are_named(tmp_path: Path) -> None:
    sources = texts(tmp_path, {"a": 100, "b": 3})
    text = training_text(TrainingData(source=sources["a"], tokens=10**5), letters_tokenizer(), 32)
    other, documents = evaluation_documents(sources["b"]), evaluation_documents(sources["a"])
    assert shared_documents(text.documents, other, "b.jsonl") is None
    said = shared_documents(text.documents, [*other, *documents], "b.jsonl")  # of both sides
    assert said is not None
    assert said.startswith("100 of the 103 documents of the evaluation text 'b.jsonl' are also in the training text (")
    assert documents[0] in said
    (tmp_path / "c.txt").write_text("\n\n".join(documents))
    source = str(tmp_path / "c.txt")
    whole = training_text(TrainingData(source=source, tokens=64), letters_tokenizer(), 32)
    assert shared_documents(whole.documents, evaluation_documents(source), "c.txt") is not None
    python = training_text(TrainingData(source="python", tokens=256), letters_tokenizer(), 32)
    assert shared_documents(python.documents, evaluation_documents("python"), "python") is None


def test_absent_hashes_share_nothing() -> None:
    nothing = torch.zeros(0, 8)
    text = TrainingText(nothing.long(), nothing.bool(), torch.zeros(0).bool(), torch.zeros(0).long(), ("a",), {})
    assert shared_documents(text.documents, ["a"], "b") is None


def test_calibration_draws_uniformly_over_tasks(tmp_path: Path) -> None:
    sources = texts(tmp_path, {"a": 300, "b": 60, "c": 60})
    settings_ = Calibration(tasks={"own": "self", **sources}, samples=14, seed=3)
    tokens, facts = calibration_tokens(settings_, letters_tokenizer(), 24, lambda: tiny("llama"))
    assert tokens.shape == (14, 24)
    assert facts["source"] == "own, a, b, c"
    assert facts["documents"] == 420
    assert sorted(task["samples"] for task in facts["tasks"].values()) == [3, 3, 4, 4]
    with pytest.raises(FistaPrunerError, match="and there are 3: take at least 4 samples"):
        calibration_tokens(settings_.model_copy(update={"samples": 3}), letters_tokenizer(), 24)
    assert facts["tasks"]["own"]["how"].startswith("generated")
    assert facts["tasks"]["a"]["source"] == sources["a"]
    assert "windows of a.jsonl" in facts["how"]
    assert str(tmp_path) not in facts["how"]
    for task, name in enumerate("abc", start=1):
        # Windows of one task alone are drawn as without the mixture.
        alone = Calibration(source=sources[name], samples=facts["tasks"][name]["samples"], seed=3)
        expected, _ = calibration_tokens(alone, letters_tokenizer(), 24)
        assert torch.equal(tokens[Mixture(4, seed=3).draw(14) == task], expected)


def test_one_calibration_source_or_several_tasks() -> None:
    def built(**settings_: Any) -> Calibration:
        return Recipe.build({"calibration": settings_}).calibration

    assert built(tasks={"a": "c4"}).sources == {"a": "c4"}
    assert built(source=None).source == "self"
    assert built(source="c4", tasks={}).sources == {"c4": "c4"}
    mixed = built(tasks={"a": "python", "b": "x.txt"})
    assert (mixed.name, mixed.source, mixed.files) == ("a, b", None, (Path("x.txt"),))
    assert mixed.with_absolute_files().tasks == {"a": "python", "b": str(Path("x.txt").absolute())}
    assert Recipe.from_yaml(Recipe.build({"calibration": mixed.model_dump()}).to_yaml()).calibration == mixed
    for wrong, words in (
        ({"source": "c4", "tasks": {"a": "c4"}}, "either one source or tasks"),
        ({"samples": 1, "tasks": {"a": "c4", "b": "python"}}, "samples is 1, and each of the 2 tasks needs a window"),
    ):
        with pytest.raises(FistaPrunerError, match=words):
            built(**wrong)


def test_a_source_replaces_tasks_of_the_recipe_under_it() -> None:
    base = {"calibration": {"tasks": {"a": "c4"}, "samples": 4}}
    assert merge_settings(base, {"calibration": {"source": "python"}}) == {
        "calibration": {"source": "python", "samples": 4}
    }
    base = {"calibration": {"source": "c4", "tasks": {}}}
    assert merge_settings(base, {"calibration": {"tasks": {"a": "b"}}}) == {"calibration": {"tasks": {"a": "b"}}}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(LETTERS[:4], min_size=10, max_size=20), min_size=4, max_size=16, unique=True), st.data())
def test_a_document_that_one_task_holds_out_is_trained_on_by_none(documents: list[str], data: st.DataObject) -> None:
    halves = [data.draw(st.lists(st.sampled_from(documents), min_size=3, unique=True)) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for name, half in zip("ab", halves, strict=True):
            sources[name] = f"{folder}/{name}.jsonl"
            records = ({"prompt": "", "completion": document} for document in half)
            Path(sources[name]).write_text("".join(json.dumps(record) + "\n" for record in records))
        try:
            text = training_text(TrainingData(tasks=sources, tokens=10**4), letters_tokenizer(), 24)
        except FistaPrunerError as error:
            assert "too short" in str(error)  # noqa: PT017
            return
    sides = []
    for rows in (text.held_out, ~text.held_out):
        ids = letters_tokenizer().convert_ids_to_tokens(text.tokens[rows].flatten().tolist())
        sides.append({word for word in "".join(ids).split("</s>") if word})
    assert sides[0]
    assert not sides[0] & sides[1]
