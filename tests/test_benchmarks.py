"""Programs of ``benchmarks/`` on tiny problems: they run, keep what they measured, and do not mix measurements."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import beside_quantisation
import decode
import growth
import layer_error
import llama_cpp
import memory
import other_programs
import power_scheduling
import preference_pairs
import quality
import real_problems
import scaling
import torch
import workload_allocation
from alps_reference import alps_reference

from fistapruner.core import parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.runs.comparison_records import Comparison
from fistapruner.runtime.machine import Machine
from fistapruner.solvers import solve
from layer_problems import make_problem

BENCHMARKS = Path(decode.__file__).parent


@pytest.mark.parametrize("program", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_one_command_that_can_be_pasted(program: Path) -> None:
    """A line of an example begins a command, or the line before it ends with a backslash."""
    lines = (ast.get_docstring(ast.parse(program.read_text("utf-8"))) or "").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("    "):
            begins = line.strip().startswith(("python benchmarks/", "fistapruner ", "llama-quantize "))
            assert begins != before.endswith("\\"), line
            assert line.count("python benchmarks/") <= 1, line


def refusal(program: Any, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program that stops with a message."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *options])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code != 0


def test_a_program_says_which_package_it_needs_before_it_measures(
    beside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (llama_cpp, decode, beside_quantisation, scaling):
        monkeypatch.setattr(name, "find_spec", lambda package: None)
    refusal(llama_cpp, ["dense.gguf"], monkeypatch)
    assert "xllamacpp is not installed" in capsys.readouterr().err
    refusal(scaling, ["folder"], monkeypatch)
    assert "ray is not installed" in capsys.readouterr().err
    refusal(decode, ["model", "--openvino"], monkeypatch)
    assert "openvino is not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="xllamacpp is not installed"):
        beside("--dense", "dense.gguf")
    with pytest.raises(SystemExit, match="openvino is not installed"):
        beside("--dense", "dense.gguf", "--openvino", "--quality")
    refusal(other_programs, ["--data", "x", "--out", "y", "--python", sys.executable], monkeypatch)
    assert "no interpreter that has llm-compressor" in capsys.readouterr().err


def test_an_option_that_names_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal(other_programs, ["--data", "x", "--out", "y", "--methods", "magnitude"], monkeypatch)
    assert "--methods: 'magnitude' is none of sparsegpt, wanda, alps" in capsys.readouterr().err
    refusal(power_scheduling, ["--seeds", "0"], monkeypatch)
    assert "--seeds 0: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"no c4/\*\.jsonl"):
        real_problems.calibration_files(tmp_path)


def test_memory_makes_the_folder_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path] = []
    monkeypatch.setattr(memory, "paper", lambda folder, arguments: given.append(folder.parent))
    monkeypatch.setattr(sys, "argv", ["memory.py", "paper", "--folder", str(tmp_path / "new" / "folder")])
    memory.main()
    assert given == [tmp_path / "new" / "folder"]


def test_texts_with_line_separators_inside_them_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "c4").mkdir()
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a\u2028b", "ä\x85")]
    (tmp_path / "c4" / "texts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    assert real_problems._text(str(tmp_path)) == "a\u2028b\n\nä\x85"


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_the_yardstick_prunes_to_the_pattern(sparsity: str) -> None:
    problem, pattern = make_problem(), parse_sparsity(sparsity)
    weight, _ = alps_reference(problem.weight, problem.gram, pattern)
    assert pattern.satisfies(weight)
    wanda = solve(problem, pattern, "wanda").weight
    assert problem.relative_error(weight) < problem.relative_error(wanda)


def test_layer_errors_are_kept_after_each_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second operator cannot be pruned: what the first one gave is in the file."""
    problems = {"0.o_proj": make_problem(8, 16), "0.down_proj": make_problem(8, 18)}
    monkeypatch.setattr(layer_error.real_problems, "load", lambda arguments: problems)
    out = tmp_path / "rows.json"
    options = ["--sparsity", "2:4", "--methods", "magnitude,wanda", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["layer_error.py", *options])
    with pytest.raises(FistaPrunerError, match="18 inputs"):
        layer_error.main()
    assert [(row["operator"], row["method"]) for row in json.loads(out.read_text())] == [
        ("0.o_proj", "magnitude"),
        ("0.o_proj", "wanda"),
    ]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call ``beside_quantisation.py`` with measurements made up and two runs of the same name; what it kept."""

    def quality(row: dict[str, Any], arguments: Any) -> dict[str, float]:
        return {"perplexity": 30.0, "reference": 25.0, "gap": 0.2, "kl": 0.3}

    monkeypatch.setattr(beside_quantisation, "quality", quality)
    (tmp_path / "dense.gguf").touch()
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["beside_quantisation.py", "rows.json", *options])
        beside_quantisation.main()
        rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
        return rows

    return call


MEASURE = ("--dense", "dense.gguf", "--runs", "a/50", "b/50", "--quality")


def test_runs_of_one_name_and_the_dense_model_are_rows(beside: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = beside(*MEASURE, "--windows", "7")
    assert [row["name"] for row in rows] == ["dense", "a/50, bf16", "a/50, int8", "b/50, bf16", "b/50, int8"]
    assert all("kl" in row and row["quality settings"]["windows"] == 7 for row in rows)
    assert "quality: data wikitext2, windows 7, seqlen 1024, dense " in capsys.readouterr().out.splitlines()[0]


def test_every_kept_file_has_the_dense_row(beside: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped after the first row: the dense model's figures are beside it."""
    made_up, calls = beside_quantisation.quality, iter(range(2))

    def stopped(row: dict[str, Any], arguments: Any) -> dict[str, Any]:
        if next(calls):
            raise KeyboardInterrupt
        return made_up(row, arguments)

    monkeypatch.setattr(beside_quantisation, "quality", stopped)
    with pytest.raises(KeyboardInterrupt):
        beside(*MEASURE)
    dense, first, *_ = json.loads((tmp_path / "rows.json").read_text())
    assert (dense["perplexity"], first["perplexity"]) == (25.0, 30.0)


def test_other_settings_are_refused_beside_kept_rows(beside: Any) -> None:
    kept = beside(*MEASURE)
    with pytest.raises(SystemExit, match=r"quality of dense was measured with .*windows 60.*, not with .*windows 7"):
        beside(*MEASURE, "--windows", "7")
    assert beside(*MEASURE) == kept


def test_a_picture_leaves_out_what_was_not_measured(beside: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    rows = beside(*MEASURE)
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "bytes": 100} for row in rows]))
    beside("--picture", "picture.png")
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("question", ["model", "operator", "prefill"])
def test_decoding_keeps_and_prints_what_came_before_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    """Stopped in the second round, or at the second operator: the first is in the file and on the screen."""
    calls = iter(range(5 if question == "model" else 1))

    def generation(*_: Any) -> SimpleNamespace:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return SimpleNamespace(tokens_per_second=40.0, first_token=0.1)

    def rounds(names: dict[str, Any], seconds: float) -> dict[str, float]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return dict.fromkeys(names, 0.001)

    variants = dict.fromkeys(["dense bfloat16", "dense int8, dynamic"])
    monkeypatch.setattr(decode, "model_variants", lambda *_: variants)
    monkeypatch.setattr(decode, "prompts", lambda *_: None)
    monkeypatch.setattr(decode, "time_generation", generation)
    monkeypatch.setattr(decode, "rounds", rounds)
    out = tmp_path / "times.json"
    monkeypatch.setattr(sys, "argv", ["decode.py", question, "--json", str(out)])
    with pytest.raises(KeyboardInterrupt):
        decode.main()
    found = json.loads(out.read_text())
    if question == "model":
        assert found["rates"] == {name: [40.0] for name in variants}
        assert "round 1 of 5, tokens/s: dense bfloat16 40.0" in capsys.readouterr().out
    else:
        assert [(row["rows"], row["columns"]) for row in found] == [(576, 576)]
        assert "576x576" in capsys.readouterr().out


def test_gathered_problems_are_those_of_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache tells folders of texts apart, however they are spelled."""
    gathered: list[str | None] = []

    def gather(layers: list[int], samples: int, data: str | None, held_out: bool) -> dict[str, Any]:
        gathered.append(data)
        return {}

    monkeypatch.setattr(real_problems, "_gather", gather)
    monkeypatch.chdir(tmp_path)
    for data in ("first", "second", str(tmp_path / "first"), None, None):
        real_problems.load(SimpleNamespace(layers="0", samples=1, data=data, cache="cache"))
    assert gathered == ["first", "second", None]


def first_line(
    program: Any, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a program; the first line that it prints."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *options])
    program.main()
    return capsys.readouterr().out.splitlines()[0]


def test_times_of_solvers_say_what_they_depend_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = first_line(growth, ["--sizes", "16", "--methods", "wanda"], monkeypatch, capsys)
    assert f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; 50%" in line


def test_the_gain_of_executors_says_what_was_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"weights": [], "seconds": 1.0, "start": 0.0, "memory": [(0.0, 1)], "layers": [(1.0, 2.0)]}
    monkeypatch.setattr(scaling, "measure", lambda *_: {**result, "hidden_bytes": 1})
    line = first_line(
        scaling, ["folder", "--samples", "5", "--method", "wanda", "--executors", "serial"], monkeypatch, capsys
    )
    assert line.startswith("folder, layers all, wanda, 5 windows of 256 tokens; one thread a process, torch ")


def test_the_quality_study_says_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Comparison(machine=Machine(cpu="a CPU", threads=3), versions={"torch": "2.0"})
    monkeypatch.setattr(quality, "compare", lambda *_, **__: done)
    monkeypatch.delenv("FISTAPRUNER_DATA", raising=False)
    line = first_line(quality, ["--out", "out", "--seeds", "0,1"], monkeypatch, capsys)
    assert "calibration python, 32 windows of 1024 tokens, seeds 0,1; text python, 60 windows" in line
    assert line.endswith("a CPU, 3 thread(s), torch 2.0")


def test_pairs_of_a_task_with_line_separators_inside_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"query": "a\u2028b", "choices": ["x", "y\x85"], "gold": 0}
    (tmp_path / "task.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", "utf-8")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "task.jsonl"), str(tmp_path / "pairs.jsonl")])
    preference_pairs.main()
    assert json.loads((tmp_path / "pairs.jsonl").read_text("utf-8"))["prompt"] == "a\u2028b"


def test_one_draw_of_days_has_no_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(power_scheduling, "run", lambda seed, *_: {"two-stage": (0.5 + seed, "")})
    for seeds, first in (("1", "| two-stage | 0.500 | 0.000 |"), ("2", "| two-stage | 1.000 ± 0.500 |")):
        monkeypatch.setattr(sys, "argv", ["power_scheduling.py", "--seeds", seeds, "--noise", "0.01"])
        power_scheduling.main()
        shown = capsys.readouterr().out
        assert first in shown
        assert ("standard error" in shown) == (seeds == "2")


def test_one_draw_of_a_workload_has_no_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workload_allocation, "regrets", lambda kind, seed: {"two-stage": 0.5 + seed, "so-ebm": 0.25})
    for draws, first in (("1", "| two-stage | 0.500 |"), ("2", "| two-stage | 1.000 ± 0.500 |")):
        monkeypatch.setattr(sys, "argv", ["workload_allocation.py", "--draws", draws, "--noise", "switch"])
        workload_allocation.main()
        shown = capsys.readouterr().out
        assert first in shown
        assert ("standard error" in shown) == (draws == "2")
    for wrong in (["--draws", "0"], ["--noise", "switch,other"]):
        monkeypatch.setattr(sys, "argv", ["workload_allocation.py", *wrong])
        with pytest.raises(SystemExit):
            workload_allocation.main()
        assert f"error: {wrong[0]} " in capsys.readouterr().err
