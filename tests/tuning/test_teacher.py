"""The dense model's stored predictions, against its own forward pass; damaged blocks; rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import opened
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from fistapruner.activations.store import scratch_factory
from fistapruner.activations.stream import forward
from fistapruner.calibration.training_text import TrainingText
from fistapruner.errors import FistaPrunerError
from fistapruner.tuning.losses import DenseLogits, TokenLoss, TopTokens
from fistapruner.tuning.objective import Objective
from fistapruner.tuning.teacher import Teacher

SEQLEN = 16


def some_tokens(windows: int) -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, (windows, SEQLEN), generator=torch.Generator().manual_seed(5))


def logits_of(teacher: Teacher, windows: Sequence[int]) -> Tensor:
    """(windows, seqlen, vocabulary) logits from what is stored."""
    teacher.require(windows)
    predictions = teacher.predictions(windows, torch.ones(len(windows), SEQLEN, dtype=torch.bool))
    with teacher.dense.embeddings_and_head(), torch.no_grad():
        parts = [predictions.rows(start, stop) for start, stop in ((0, 7), (7, len(windows) * SEQLEN))]
    logits = [part.logits for part in parts if isinstance(part, DenseLogits)]
    return torch.cat(logits).view(len(windows), SEQLEN, -1)


def own_logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=tokens, use_cache=False).logits
    return logits.float()


@pytest.mark.parametrize(
    ("architecture", "changes", "tolerance"),
    [
        ("llama", {"tie_word_embeddings": True}, 1e-5),
        ("gemma2", {}, 1e-5),
        ("gpt2", {}, 1e-5),
        ("opt", {}, 1e-5),
        ("qwen2", {"dtype": torch.bfloat16}, 2e-2),
    ],
)
def test_logits_are_those_of_the_dense_model(
    tmp_path: Path, architecture: str, changes: dict[str, Any], tolerance: float
) -> None:
    folder = tiny.save(architecture, tmp_path / "model", **changes)
    tokens = some_tokens(5)
    teacher = Teacher(opened(folder), tokens, tmp_path / "teacher", batch_size=2)
    expected = own_logits(folder, tokens[[4, 1]])
    found = logits_of(teacher, [4, 1]).float()
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    stored = sum(file.stat().st_size for file in (tmp_path / "teacher").glob("*.safetensors"))
    itemsize = changes.get("dtype", torch.float32).itemsize
    assert tokens.numel() * 32 * itemsize < stored < tokens.numel() * 32 * itemsize + 4096
    assert all(parameter.is_meta for parameter in teacher.dense.model.parameters())


def test_hidden_states_that_float16_does_not_hold_are_stored(tmp_path: Path) -> None:
    """Passes of a float16 checkpoint are in float32 on a CPU, and may give larger values."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(7e4)
    folder = tmp_path / "model"
    model.half().save_pretrained(folder)
    teacher = Teacher(opened(folder), some_tokens(2), tmp_path / "teacher", batch_size=2)
    assert bool(logits_of(teacher, [0, 1]).isfinite().all())
    assert float(teacher.predictions([0, 1], torch.ones(2, SEQLEN, dtype=torch.bool)).stored["hidden"].max()) > 65504


class Counted:
    """Counts the blocks that are made."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == total:
            self.made.append(what)


def test_blocks_are_made_when_they_are_needed(tmp_path: Path) -> None:
    """Held-out windows first, then in the order of training; windows that are never used are not passed."""
    folder = tiny.save("llama", tmp_path / "model")
    tokens, counted = some_tokens(12), Counted()
    expected = own_logits(folder, tokens)
    order = [9, 4, 7, 1, 0, 11, 9, 7]

    def teacher(**settings: Any) -> Teacher:
        return Teacher(
            opened(folder),
            tokens,
            tmp_path / "teacher",
            batch_size=2,
            block_tokens=2 * SEQLEN,
            tick=counted,
            **settings,
        )

    used = teacher(order=order, held_out=[5, 2, 8])
    assert used.blocks == [[5, 2], [8], [9, 4], [7, 1], [0, 11]]
    for windows, made in (([8, 2, 5], 2), ([9, 4], 3), ([7, 1], 4), ([9, 4], 4), ([0, 11], 5), ([9, 7], 5)):
        torch.testing.assert_close(logits_of(used, windows), expected[windows])
        assert len(counted.made) == made
    again = teacher(order=order, held_out=[5, 2, 8])
    again.require([5, 2, 8])
    assert len(counted.made) == 5


def test_held_out_windows_are_looked_through_few_times(tmp_path: Path) -> None:
    """However many windows there are to train on."""
    looked: list[int] = []

    class HeldOut(list[int]):
        def __iter__(self) -> Iterator[int]:
            looked.append(1)
            return super().__iter__()

    dense = opened(tiny.save("llama", tmp_path / "model"))
    teacher = Teacher(dense, some_tokens(40), tmp_path / "teacher", batch_size=2, held_out=HeldOut([3, 5]))
    assert [window for block in teacher.blocks for window in block][2:] == [0, 1, 2, 4, *range(6, 40)]
    assert len(looked) < 5


def test_each_window_passes_through_the_dense_model_once(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    tokens, counted = some_tokens(4), Counted()
    first = logits_of(Teacher(opened(folder), tokens, tmp_path / "teacher", batch_size=2, tick=counted), [0, 3])
    again = Teacher(opened(folder), tokens, tmp_path / "teacher", batch_size=2, tick=counted)
    assert torch.equal(logits_of(again, [3, 0]), first.flip(0))
    assert len(counted.made) == 1
    other = Teacher(opened(folder), tokens, tmp_path / "teacher", batch_size=2, tick=counted, identity="another")
    logits_of(other, [0])
    assert len(counted.made) == 2


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, Tensor, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny.save("llama", folder / "model")
    teacher = Teacher(opened(model), some_tokens(3), folder / "teacher", batch_size=2)
    expected = logits_of(teacher, [0, 1, 2])
    return teacher, expected, {file.name: file.read_bytes() for file in sorted(teacher.folder.iterdir())}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["safetensors", "json"]), st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans())
def test_one_flipped_bit_is_found_and_the_block_made_again(
    block: tuple[Teacher, Tensor, dict[str, bytes]], suffix: str, place: float, bit: int, new_process: bool
) -> None:
    teacher, expected, files = block
    name = f"00000.{suffix}"
    damaged = bytearray(files[name])
    damaged[int(place * len(damaged))] ^= 1 << bit
    (teacher.folder / name).write_bytes(damaged)
    if new_process:
        teacher = Teacher(teacher.dense, teacher.tokens, teacher.folder, batch_size=2)
    assert torch.equal(logits_of(teacher, [0, 1, 2]), expected)
    if new_process or (suffix == "safetensors" and place > 0.5):  # what is in memory is not read again
        assert {file.name: file.read_bytes() for file in teacher.folder.iterdir()} == files
    for each, content in files.items():
        (teacher.folder / each).write_bytes(content)


@pytest.mark.parametrize("missing", ["00000.safetensors", "00000.json"])
def test_an_unfinished_block_is_made_again(block: tuple[Teacher, Tensor, dict[str, bytes]], missing: str) -> None:
    teacher, expected, files = block
    (teacher.folder / missing).unlink()
    again = Teacher(teacher.dense, teacher.tokens, teacher.folder, batch_size=2)
    assert torch.equal(logits_of(again, [0, 1, 2]), expected)
    assert {file.name: file.read_bytes() for file in teacher.folder.iterdir()} == files
    (teacher.folder / missing).write_bytes(files[missing][: len(files[missing]) // 2])
    again = Teacher(teacher.dense, teacher.tokens, teacher.folder, batch_size=2)
    assert torch.equal(logits_of(again, [0, 1, 2]), expected)
    assert {file.name: file.read_bytes() for file in teacher.folder.iterdir()} == files


def test_the_most_likely_tokens_bound_the_divergence(tmp_path: Path) -> None:
    dense = tiny.save("llama", tmp_path / "dense", seed=1, vocab_size=300)
    folder = tiny.save("llama", tmp_path / "model", seed=2, vocab_size=300)
    tokens = some_tokens(3)
    marks = torch.ones_like(tokens, dtype=torch.bool)
    nothing = torch.zeros(3, dtype=torch.int64)
    text = TrainingText(tokens, marks, nothing.bool(), nothing, ("text",), {})
    sums = {}
    for kind in ("hidden", "top128"):
        teacher = Teacher(opened(dense), tokens, tmp_path / kind, batch_size=2, kind=kind)
        objective = Objective(opened(folder), text, TokenLoss(1.0), teacher, 2, scratch_factory(None, torch.float32))
        with objective.resident():
            sums[kind] = objective.losses([0, 1, 2], lambda index, layer: [{}])[0]
            assert teacher.dense.model.get_input_embeddings().weight.is_meta == (kind == "top128")
    assert bool((sums["top128"] < sums["hidden"]).all())
    assert bool((sums["top128"] > 0.5 * sums["hidden"]).all())
    teacher.require([1])
    rows = teacher.predictions([1], torch.ones(1, SEQLEN, dtype=torch.bool)).rows(0, SEQLEN)
    assert isinstance(rows, TopTokens)
    p = own_logits(dense, tokens[1:2])[0].softmax(-1)
    torch.testing.assert_close(rows.log_p.float().exp(), p.topk(128).values, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(p.gather(1, rows.tokens.long()), p.topk(128).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows.rest, 1 - p.topk(128).values.sum(-1), rtol=1e-3, atol=1e-5)


def test_rounds_hold_only_the_windows_of_the_next_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes over the text in other orders; a run that stops anywhere goes on with the same bits."""
    removed: list[Path] = []
    unlink = Path.unlink

    def counted_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix in (".json", ".safetensors"):
            removed.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", counted_unlink)
    folder = tiny.save("llama", tmp_path / "model")
    tokens, held_out = some_tokens(10), [2, 7]
    generator = torch.Generator().manual_seed(0)
    train = torch.tensor([window for window in range(10) if window not in held_out])
    order = torch.cat([train[torch.randperm(8, generator=generator)] for _ in range(3)]).view(12, 2)

    def teacher(blocks: str, windows_on_disk: int | None = 6) -> Teacher:
        return Teacher(
            opened(folder),
            tokens,
            tmp_path / blocks,
            batch_size=2,
            order=order.flatten().tolist(),
            windows_per_step=2,
            held_out=held_out,
            windows_on_disk=windows_on_disk,
            tick=counted,
        )

    def on_disk(blocks: str) -> float:
        sizes = sum(file.stat().st_size for file in (tmp_path / blocks).glob("*.safetensors"))
        return sizes / (SEQLEN * 32 * 4)

    def passed(model: Any, tokens: Tensor, batch_size: int, *rest: Any, **more: Any) -> Any:
        passes.add(batch_size)
        return forward(model, tokens, batch_size, *rest, **more)

    monkeypatch.setattr("fistapruner.tuning.teacher.forward", passed)
    counted, passes = Counted(), set[int]()
    exact = logits_of(teacher("everything", None), range(10))
    assert passes == {2}
    passes.clear()
    counted.made.clear()
    steps: list[Tensor] = []
    rounds = teacher("rounds")
    for number, step in enumerate(order.tolist()):
        rounds.step = number + 1
        steps.append(logits_of(rounds, step))
        torch.testing.assert_close(steps[-1], exact[step])
        assert on_disk("rounds") < 6 + 2  # headers
        if number % 5 == 0:
            torch.testing.assert_close(logits_of(rounds, held_out), exact[held_out])
    assert len(counted.made) == 1 + 6  # rounds of 4 windows
    assert len(removed) == 5 * 2  # the two files of a round when the next one comes
    for begin in (0, 4, 5, 9, 11):
        counted.made.clear()
        going_on = teacher("rounds" if begin == 11 else f"from {begin}")
        for number in range(begin, 12):
            going_on.step = number + 1
            assert torch.equal(logits_of(going_on, order[number].tolist()), steps[number])
        assert len(counted.made) == (0 if begin == 11 else 6 - begin // 2)
    assert passes == {1}  # what is stored for a window does not depend on the others of its round
    with pytest.raises(FistaPrunerError, match="room for the dense model's predictions of 3 windows: 2 held-out"):
        teacher("small", 3)
