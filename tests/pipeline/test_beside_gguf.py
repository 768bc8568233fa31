"""GGUF files beside a run: what llama.cpp is timed on, and what quality stands beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.measure.speed import Run, Speed, Variant, bench, compare
from fistapruner.runs.records import load_run

pytest.importorskip("gguf", reason="needs the extra 'gguf'")
from fistapruner.models.files.gguf import convert_gguf
from tiny_gguf import write_gguf

TEXT = " ".join(["the cat sat on a mat and saw the dog run by it"] * 40)
FORMS = ["packed int8", "llama.cpp dense-Q8"]
"""What is evaluated."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a model that a GGUF file holds, evaluated on a text, and that model in 8 bits."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    write_gguf(folder / "dense.gguf")
    convert_gguf(folder / "dense.gguf", folder / "dense")
    fp.prune(
        folder / "dense",
        folder / "run",
        method="magnitude",
        sparsity="70%",
        calibration={"source": "self", "samples": 2, "seqlen": 16},
        evaluate=folder / "text.txt",
        evaluate_windows=4,
    )
    fp.export(folder / "dense", folder / "dense-Q8.gguf", values="q8_0")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run; the package that brings llama.cpp seems to be there."""
    monkeypatch.setattr("fistapruner.measure.speed.find_spec", lambda package: object())
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def timed(variants: Sequence[Variant], **_: Any) -> list[Speed]:
    """Give every form the same speed."""
    sizes = {"peak_memory": 2**20, "batch": 1, "prompt": 4, "tokens": 3, "threads": 1, "device": "cpu"}
    return [Speed.of(variant.name, [Run(0.1, 10.0)], file_size=9, **sizes) for variant in variants]


def test_quality_stands_beside_size_and_speed(made: Path, run: Path) -> None:
    """Forms of the run's own weights have its figures; int8 values and files are evaluated on the same windows."""
    listener, blob = tiny.Said(), run.parent / "dense-Q8"
    shutil.copy(made / "dense-Q8.gguf", blob)  # what a file is called says nothing
    found = fp.bench(run, gguf=[blob], measure=timed, listener=listener)
    by_name = {speed.variant: speed for speed in found}
    (own,) = load_run(run).evaluations
    assert own.perplexity is not None
    assert own.reference is not None
    assert own.divergence is not None
    for name, speed in by_name.items():
        if name.startswith("dense"):
            assert (speed.perplexity, speed.kl) == (own.reference.perplexity, 0.0)
        elif name not in FORMS:
            assert (speed.perplexity, speed.kl) == (own.perplexity.perplexity, own.divergence.kl)
    assert list(by_name)[-2:] == FORMS
    text, same = str(made / "text.txt"), {"against": made / "dense", "windows": 4, "seqlen": 16}
    fp.pack(run / "model", run.parent / "int8", values="int8")
    for name, model in zip(FORMS, (run.parent / "int8", made / "dense-Q8.gguf"), strict=True):
        expected = fp.evaluate(model, text, **same)
        assert expected.perplexity is not None
        assert expected.divergence is not None
        assert by_name[name].perplexity == pytest.approx(expected.perplexity.perplexity, rel=1e-12)
        assert by_name[name].kl == pytest.approx(expected.divergence.kl, rel=1e-12)
    assert 0 < by_name[FORMS[1]].kl < by_name["packed"].kl  # type: ignore[operator]
    report = load_run(run)
    assert report.speed is not None
    assert report.speed["speeds"][-1]["kl"] == by_name[FORMS[1]].kl
    assert [line for line in listener.sentences if line.startswith("evaluating")] == [
        f"evaluating {name} on text.txt" for name in FORMS
    ]
    assert fp.bench(run, measure=timed)[-1].kl == by_name["packed int8"].kl  # without files, too


def test_speeds_are_kept_before_quality_is_measured(made: Path, run: Path) -> None:
    class Stops(tiny.Said):
        def say(self, sentence: str) -> None:
            if sentence.startswith("evaluating"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp.bench(run, gguf=[made / "dense-Q8.gguf"], measure=timed, listener=Stops())
    report = load_run(run)
    assert report.speed is not None
    assert [row["tokens_per_second"] for row in report.speed["speeds"]] == [10.0] * len(report.speed["speeds"])


def test_what_cannot_be_evaluated_is_said_and_its_speed_kept(made: Path, run: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", vocabulary="llama")  # another vocabulary
    for change, said in (
        (lambda: None, "no quality of llama.cpp other: "),
        (
            lambda: (made / "text.txt").rename(tmp_path / "gone.txt"),
            "no quality of packed int8, llama.cpp other: the text text.txt ",
        ),
        (
            lambda: forget_evaluation(run),
            "no quality of packed int8, llama.cpp other: the run was not evaluated against its dense",
        ),
    ):
        change()
        listener = tiny.Said()
        found = fp.bench(run, gguf=[tmp_path / "other.gguf"], measure=timed, listener=listener)
        assert (found[-1].tokens_per_second, found[-1].kl) == (10.0, None)
        assert any(line.startswith(said) for line in listener.sentences), listener.sentences
    (tmp_path / "gone.txt").rename(made / "text.txt")


def forget_evaluation(run: Path) -> None:
    report = load_run(run)
    report.evaluations = []
    (run / "report.json").write_text(report.model_dump_json(), "utf-8")


def test_files_that_cannot_be_timed_are_refused_before_packing(
    made: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made / "dense-Q8.gguf"
    (tmp_path / "text.gguf").write_text("text")
    for files, settings, said in (
        ([tmp_path / "none.gguf"], {}, "none.gguf"),
        ([tmp_path / "text.gguf"], {}, "text.gguf is truncated, damaged or not a GGUF file"),
        ([whole], {"batch": 2}, "batch 2: with GGUF files one sequence at once is timed"),
        ([7], {}, "gguf is of the class int, and a GGUF file is expected"),
    ):
        with pytest.raises(FistaPrunerError, match=said):
            bench(run / "model", gguf=files, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr("fistapruner.measure.speed.find_spec", lambda package: None)
    with pytest.raises(FistaPrunerError, match=r"needs the package 'xllamacpp': pip install 'fistapruner\[bench\]'"):
        bench(run / "model", gguf=[whole])


def test_llama_cpp_decodes_in_a_process_of_its_own(made: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    torch.manual_seed(0)
    file = made / "dense-Q8.gguf"
    (found,) = compare([Variant("llama.cpp dense-Q8", file)], prompt=5, tokens=6, runs=2, threads=1)
    assert found.first_token > 0
    assert found.tokens_per_second > 0
    assert found.file_size == file.stat().st_size
    unknown = made / "unknown.gguf"
    unknown.write_bytes(file.read_bytes().replace(b"llama", b"llamx"))
    with pytest.raises(FistaPrunerError, match=r"llama\.cpp unknown: llama\.cpp cannot load .*unknown\.gguf: "):
        compare([Variant("llama.cpp unknown", unknown)], prompt=5, tokens=6, runs=2, threads=1)
