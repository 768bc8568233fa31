"""Grams of which only one half is multiplied out."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner import LayerProblem, solve
from fistapruner.core.linalg import fast_products
from fistapruner.core.sums import add_gram, mirror
from fistapruner.runs.log import Listener


@pytest.mark.parametrize("n", [1, 7, 255, 512, 700, 1100, 2304])
def test_half_a_gram_is_the_whole_one_once_mirrored(n: int) -> None:
    first, second = torch.randn(2, 40, n, generator=torch.Generator().manual_seed(n))
    sums = torch.zeros(n, n)
    add_gram(sums, first)
    add_gram(sums, second)
    mirror(sums)
    assert torch.equal(sums, sums.T)
    both = torch.cat([first, second]).double()
    torch.testing.assert_close(sums, (both.T @ both).float(), rtol=1e-4, atol=1e-4)


def precisions() -> list[str]:
    """Of products on a CPU, and of products and convolutions on CUDA."""
    backends = torch.backends
    return [
        str(backend.fp32_precision)
        for backend in (backends.mkldnn.matmul, backends.cuda.matmul, backends.cudnn.conv)  # type: ignore[attr-defined]
    ]


def test_the_precision_comes_back_when_the_last_of_overlapping_blocks_ends() -> None:
    before = precisions()
    first, second = fast_products(), fast_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert precisions()[0] == "bf16"
    second.__exit__(None, None, None)
    assert precisions() == before


def test_solves_in_several_threads_give_the_bits_of_solves_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    problems = [LayerProblem.from_activations(torch.randn(96, 96, generator=generator), inputs) for _ in range(12)]
    before = precisions()
    alone = [solve(problem, "50%").weight for problem in problems]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda problem: solve(problem, "50%").weight, problems))
    assert precisions() == before
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_what_the_calling_program_has_set_changes_no_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 32, generator=generator, dtype=torch.float32) for rows in (16, 200))
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times. " * 40)
    dense, data = tiny.save("llama", tmp_path / "dense"), {"source": str(text), "samples": 2, "seqlen": 16}
    few = {"steps": 2, "windows_per_step": 2, "data": {"source": str(text), "seqlen": 16, "tokens": 200}}

    def found(place: str) -> list[Any]:
        solved = solve(LayerProblem.from_activations(weight, inputs, inputs + 0.1), "50%").weight
        perplexity = fp.evaluate(dense, str(text), seqlen=16).perplexity
        fp.prune(dense, tmp_path / place, method="wanda", calibration=data)
        fp.recover(tmp_path / place, tmp_path / f"{place}-recovered", **few)
        files = tuple(tmp_path / name for name in (f"{place}/model", f"{place}-recovered/model", f"{place}-packed"))
        fp.pack(files[0], files[2], values="bf16")
        parameters = list(fp.load(files[2]).parameters())
        assert {(each.device.type, each.dtype) for each in parameters} == {("cpu", torch.float32)}  # the checkpoint's
        return [solved.tolist(), perplexity, *((folder / "model.safetensors").read_bytes() for folder in files)]

    expected = found("plain")
    for dtype, mode in ((torch.bfloat16, torch.inference_mode), (torch.float64, torch.no_grad)):
        with default_dtype(dtype), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), mode():
            before = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
            state = torch.get_rng_state()
            assert found(mode.__name__) == expected
            assert (torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == before
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_default_device() == torch.device("meta")


def test_runs_in_several_threads_run_one_after_another(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times. " * 40)
    dense, data = tiny.save("llama", tmp_path / "dense"), {"source": str(text), "samples": 2, "seqlen": 16}
    before, level = precisions(), logging.getLogger("fistapruner").level
    with ThreadPoolExecutor(2) as threads:
        runs = [tmp_path / "first", tmp_path / "second"]
        list(threads.map(lambda out: fp.prune(dense, out, method="wanda", calibration=data), runs))
    assert precisions() == before
    assert logging.getLogger("fistapruner").level == level
    models = [tiny.weights(out) for out in runs]
    assert models[0] == models[1]
    logs = [(out / "log.txt").read_text() for out in runs]
    assert [log.count("decoder layers, 0 already done") for log in logs] == [1, 1]


@pytest.fixture
def high() -> Iterator[None]:
    """The precision of a script that lets products run in TF32."""
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


def test_products_are_fp32_whatever_the_calling_program_has_set(high: None, tmp_path: Path) -> None:
    """In recovery, with the measurements after it, and in evaluation as in pruning."""
    seen: dict[str, list[list[str]]] = {"evaluate": [], "prune": [], "recover": []}

    class Listening(Listener):
        def __init__(self, verb: str) -> None:
            self.verb = verb

        def tick(self, what: str, done: int, total: int) -> None:
            if "layer" in what or "step" in what:
                seen[self.verb].append(precisions())

        def operators(self, index: int, names: str, error: float | None) -> None:
            seen[self.verb].append(precisions())

    before = precisions()
    assert before == ["tf32"] * 3
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times. " * 40)
    dense, data = tiny.save("llama", tmp_path / "dense"), {"source": str(text), "samples": 2, "seqlen": 16}
    fp.evaluate(dense, str(text), seqlen=16, tick=lambda *_: seen["evaluate"].append(precisions()))
    fp.prune(dense, tmp_path / "run", method="magnitude", calibration=data, listener=Listening("prune"))
    few = {"steps": 2, "windows_per_step": 2, "data": {"source": str(text), "seqlen": 16, "tokens": 200}}
    fp.recover(tmp_path / "run", tmp_path / "more", listener=Listening("recover"), evaluate=str(text), **few)
    for verb, found in seen.items():
        assert found, verb
        assert all(one == ["ieee"] * 3 for one in found), verb
    assert precisions() == before


def test_only_the_upper_half_is_read() -> None:
    square = torch.arange(9.0).view(3, 3)
    assert mirror(square.clone()).tolist() == [[0, 1, 2], [1, 4, 5], [2, 5, 8]]
