"""Programs of ``benchmarks/`` on tiny problems: their examples can be pasted, and they keep what they measured."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import decode
import layer_error
import mutations
import other_programs
import power_scheduling
import preference_pairs
import real_problems
import record
import workload_allocation
from alps_reference import alps_reference

from fistapruner.core import parse_sparsity
from fistapruner.errors import FistaPrunerError
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
    assert [(row["operator"], row["method"]) for row in json.loads(out.read_text())["rows"]] == [
        ("0.o_proj", "magnitude"),
        ("0.o_proj", "wanda"),
    ]


def test_records_that_differ_are_told_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"sha256": "a", "perplexity": 30.0, "errors": {"0.q_proj": 0.01, "0.k_proj": 0.02}}
    other = {**one, "errors": {"0.q_proj": 0.01, "0.k_proj": 0.0203}}
    assert record.compare_records({"runs": {"alps 50%": one}}, {"runs": {"alps 50%": one}}) == 0
    assert "<-" not in capsys.readouterr().out
    assert record.compare_records({"runs": {"alps 50%": one}}, {"runs": {"alps 50%": other}}) == 1
    assert "1.5000%" in capsys.readouterr().out


def test_texts_with_line_separators_inside_them_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"query": "a\u2028b", "choices": ["x", "y\x85"], "gold": 0, "text": "a\u2028b\x85"}
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "texts.jsonl").write_text(f"{json.dumps(item, ensure_ascii=False)}\n" * 2, "utf-8")
    assert real_problems._text(str(tmp_path)) == "a\u2028b\x85\n\na\u2028b\x85"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "c4" / "texts.jsonl"), str(tmp_path / "pairs.jsonl")])
    preference_pairs.main()
    assert json.loads((tmp_path / "pairs.jsonl").read_text("utf-8").split("\n")[0])["prompt"] == "a\u2028b"


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (other_programs, ["--data", "x", "--out", "y", "--methods", "magnitude"]),
        (power_scheduling, ["--seeds", "0"]),
        (workload_allocation, ["--noise", "switch,other"]),
        (mutations, ["--areas", "nowhere"]),
    ],
)
def test_an_option_that_names_nothing_is_refused(
    program: Any, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, *options])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2
    assert options[-2] in capsys.readouterr().err


def test_every_mutant_is_another_program_and_has_the_same_name_in_any_checkout() -> None:
    source = mutations.REPOSITORY / "src" / "fistapruner"
    found = mutations.find_mutants(source, "solvers/sparsegpt.py")
    assert set(found) <= set(mutations.find_mutants(source, "."))
    text = (source / "solvers" / "sparsegpt.py").read_text("utf-8")
    changed = {ast.dump(ast.parse(mutant.apply(text))) for mutant in found.values()}
    assert ast.dump(ast.parse(text)) not in changed
    assert len(changed) > len(found) // 2 > 5
