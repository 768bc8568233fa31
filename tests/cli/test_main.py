"""The command line: output that nobody reads, and messages for what is mistyped."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import fistapruner
import tiny
from fistapruner.cli import VERBS, build_parser, main
from fistapruner.errors import FistaPrunerError
from fistapruner.runs.log import hold
from fistapruner.settings.base import MAX_SEED
from fistapruner.settings.prune import Recipe

PACKAGE = Path(fistapruner.__file__).parent

SETTINGS = [
    "--calibration",
    "python",
    "--samples",
    "4",
    "--seqlen",
    "32",
    "--method",
    "magnitude",
    "--evaluate",
    "none",
]


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_reader_that_leaves_does_not_stop_the_work(tmp_path: Path, stream: str) -> None:
    """``prune … 2>&1 | head -1``: the run ends as if its output had been read."""
    model, out = tiny.save("llama", tmp_path / "model"), tmp_path / "run"
    command = [sys.executable, "-m", "fistapruner", "prune", str(model), "--out", str(out), *SETTINGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        pipe = getattr(process, stream)
        if stream == "stderr":
            assert pipe.readline()
        pipe.close()
        other = process.stdout if stream == "stderr" else process.stderr
        read = other.read()
        assert process.wait() == 0
    assert "BrokenPipe" not in read
    assert json.loads((out / "report.json").read_text())["status"] == "finished"
    assert (out / "model" / "config.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
@pytest.mark.parametrize(("stream", "status"), [("stderr", 0), ("stdout", 2)])
def test_a_full_disk_under_a_stream_does_not_stop_the_work(stream: str, status: int) -> None:
    """Messages are dropped; where results cannot be written, the exit status and one line say so."""
    program = (
        "import sys\nfrom fistapruner.cli import look, main\nfrom fistapruner.cli.progress import PlainListener\n"
        "def run(given):\n    'Run.'\n    PlainListener().say('said')\n    look.show('result', given)\n    return 0\n"
        "look.methods = run\nsys.exit(main(['methods']))"
    )
    other = "stdout" if stream == "stderr" else "stderr"
    with open("/dev/full", "w") as full:
        streams = {stream: full, other: subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", program], check=False, text=True, **streams)  # type: ignore[call-overload]
    full_disk = "fistapruner: standard output cannot be written: No space left on device; the work is done"
    said = ["result"] if stream == "stderr" else ["said", full_disk]
    assert (done.returncode, getattr(done, other).splitlines()) == (status, said)


@pytest.mark.parametrize(
    "error",
    [MemoryError("no memory for the kernel's vectors"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_ran_out_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr("fistapruner.cli.look.methods", Mock(side_effect=error, __doc__="Fail."))
    assert main(["methods"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fistapruner: main memory ran out: ")
    monkeypatch.setattr("fistapruner.cli.look.methods", Mock(side_effect=RuntimeError("a defect"), __doc__="Fail."))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["methods"])


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_stream_that_was_closed_before_does_not_stop_the_work(
    tmp_path: Path, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``inspect MODEL >&-``: Python then has no such stream."""
    model = str(tiny.save("llama", tmp_path / "model", num_hidden_layers=1))
    monkeypatch.setattr(sys, stream, None)
    assert main(["inspect", model]) == 0
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert main(["evaluate", model, "--data", "python", "--windows", "1", "--seqlen", "16"]) == 0
    assert getattr(sys, stream) is None


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 0), ("SIGTERM", 143)])
def test_a_closed_terminal_does_not_stop_the_work_and_a_kill_interrupts_it(
    name: str, status: int, *, elastic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ``torchrun`` a kill interrupts, too, so that the lock is released; a closed terminal ends it."""
    if elastic:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    work = f"os.kill(os.getpid(), signal.{name}); print('worked on'); return 0"
    program = (
        "import os, signal, sys\nfrom fistapruner.cli import look, main\n"
        f"def run(_):\n    'Run.'\n    {work}\nlook.methods = run\nsys.exit(main(['methods']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if elastic and name == "SIGHUP":
        assert done.returncode == -signal.SIGHUP
        return
    assert (done.returncode, done.stdout) == (status, "" if status else "worked on\n")
    assert done.stderr == ("fistapruner: interrupted\n" if status else "")


@pytest.mark.parametrize("rank", ["1", "gold"])
def test_a_rank_without_a_number_of_processes_is_none(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody's own variable ``RANK`` does not silence a run."""
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["prune", str(model), "--out", str(tmp_path / "run"), *SETTINGS]) == 0
    said = capsys.readouterr()
    assert "checkpoint" in said.out
    assert "1 decoder layer\n" in said.err


@pytest.mark.parametrize(
    ("own", "size"), [("3", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("0", "-1"), ("gold", "2"), ("1", "2.0")]
)
def test_a_rank_that_is_none_of_its_processes_is_refused_at_once(
    own: str, size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", own)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["recover", "run", "--out", "recovered"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fistapruner: environment variables RANK and WORLD_SIZE are {own} and {size}: ")


def test_status_of_a_run_that_has_decided_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").touch()
    with hold(tmp_path):
        assert main(["status", str(tmp_path)]) == 0
        assert f": being prepared by process {os.getpid()} on" in capsys.readouterr().out
        assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "preparing", "working": True}
    assert main(["status", str(tmp_path)]) == 0
    assert "stopped before anything was decided; give its command again" in capsys.readouterr().out
    (tmp_path / "log.txt").unlink()
    assert main(["status", str(tmp_path)]) == 2


def test_status_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "wanda"
    run.mkdir(parents=True)
    (tmp_path / "compare.json").write_text(
        json.dumps({"kind": "compare", "rows": [{"method": "wanda", "sparsity": "50%"}] * 2})
    )
    (run / "run.json").write_text('{"model": {"source": "small", "layers": 3}}')
    assert main(["status", str(tmp_path)]) == 0
    assert "comparison, 2 rows done, no process works on it\nfor one of its 1 runs:" in capsys.readouterr().out
    with hold(run):
        assert main(["status", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert main(["status", str(tmp_path), "--json"]) == 0
    assert "2 rows done, running\nsmall: " in said
    assert "0 of 3 decoder layers" in said
    assert json.loads(capsys.readouterr().out) == {"rows_done": 2, "working": True, "run": str(run)}


def test_commands_that_messages_advise_are_understood() -> None:
    """Commands in messages, with ``x`` for the values that a message fills in."""
    parser, found = build_parser(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "x" for part in node.values]
                found += re.findall(rf"fistapruner ((?:{'|'.join(VERBS)}) [^'`:;,()]+)", "".join(map(str, parts)))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "shell_line":
                parts = [part.value if isinstance(part, ast.Constant) else "x" for part in node.args]
                found.append(" ".join(map(str, parts)))
    assert "unpack x DIR" in found
    for command in found:
        parser.parse_args(command.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "dense_target=2"], ["dense_target", "'auto'", "less than or equal to 1", "2"]),
        (["--set", "dense_target=dnese"], ["dense_target", "'auto'", "a valid number", "dnese"]),
        (["--set", "allocation=unifrom"], ["allocation", "uniform, owl, error, auto", "unifrom"]),
        (["--seed", str(2**64)], ["seed", f"less than or equal to {MAX_SEED}", str(2**64)]),
        (["--seed", "-1"], ["seed", "greater than or equal to 0", "-1"]),
    ],
)
def test_what_is_mistyped_is_named_with_what_would_be_right(
    tmp_path: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "nowhere", "--out", str(tmp_path / "run"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_allocations_and_seeds_that_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Recipe.build({"dense_target": "dense"}).dense_target == 1.0
    with pytest.raises(FistaPrunerError, match="dense_target"):
        Recipe.build({"dense_target": True})
    model = tiny.save("llama", tmp_path / "model")
    command = ["prune", str(model), *SETTINGS, "--quiet", "--seed", str(MAX_SEED), "--set", "allocation=re:mlp: 60%"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert main([*command[:-2], "--set", "reconstruct=2", "--out", str(tmp_path / "matched")]) == 0
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert recipe["allocation"] == {"re:mlp": "60%"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "prune x --out OUT --set execution.workers=4",
            "execution.workers 4 needs execution.executor process or ray, and that is serial",
        ),
        (
            "prune x --out run --plan --set execution.executor=process --set execution.address=foo",
            "execution.address foo needs execution.executor ray, and that is process",
        ),
        ("prune OUT/x --out OUT --set execution.executor=process --set execution.workers=4", "out/x' does not exist"),
        ("evaluate x --limit 5", "limit 5 has no effect, because no task is given"),
        ("evaluate x --tasks piqa --seqlen 1024", "seqlen 1024 has no effect, because no text to cut is"),
        ("prune x --out=", "out '' is empty: give the path of a folder"),
        ("status ", "RUN '' is empty: give the path of a folder"),
        ("recover x --out OUT --merge=", "--merge '' is empty: name the folder of an adapter"),
        ("prune x --out OUT --recipe=", "recipe '' is neither a file nor a shipped recipe"),
        ("evaluate x --data=", "data '' is neither a .txt"),
        ("evaluate x --tasks=", "--tasks '' names no task"),
        ("evaluate x --memory-limit=", "memory_limit: '' is not a size"),
    ],
)
def test_a_flag_that_is_empty_or_without_effect_is_refused(
    tmp_path: Path, command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.replace("OUT", str(tmp_path / "out")).split(" ")) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "prune MODEL --out OUT --calibration DATA",
        "prune MODEL --out OUT --recipe paper",  # its penalty goes by the model's family
        "prune MODEL --out OUT --calibration python --evaluate DATA",
        "compare MODEL --methods wanda --out OUT --calibration DATA",
        "compare MODEL --methods wanda --out OUT --calibration python --evaluate DATA",
        "recover MODEL --out OUT --data DATA",
        "recover MODEL --out OUT --data python --evaluate DATA",
        "evaluate MODEL --data DATA",
        "prune MODEL --out OUT --plan --calibration DATA",
        "recover MODEL --plan --out OUT --data DATA",
    ],
)
def test_a_missing_extra_shows_before_a_model_is_looked_for(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    places = {"MODEL": str(tmp_path / "none"), "OUT": str(tmp_path / "out"), "DATA": "c4"}
    assert main([places.get(word, word) for word in command.split()]) == 2
    assert "reading c4 needs the package 'datasets': pip install" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["prune", "recover", "align --data pairs.jsonl"])
def test_a_plan_refuses_a_file_to_write_into(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "file").touch()
    assert main([*verb.split(), "x", "--plan", "--out", str(file)]) == 2
    assert f"--out {file} is a file; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("methods", "named"), [("methods: wanda", True), ("method: wanda", False)])
def test_a_fault_of_a_recipe_file_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], methods: str, named: bool
) -> None:
    """That of a flag does not."""
    (tmp_path / "mine.yaml").write_text(methods)
    words = ["prune", "model", "--out", str(tmp_path / "run"), "--recipe", str(tmp_path / "mine.yaml")]
    assert main([*words, "--sparsity", "5:4"]) == 2
    said = capsys.readouterr().err
    assert ("mine.yaml: unknown setting 'methods': did you mean 'method'?" in said) == named
    assert ("recipe: sparsity: " in said) != named


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("prunee m", "invalid choice: 'prunee': did you mean prune?"),
        ("prune m --out o --sampels 4", "unrecognized arguments: --sampels: did you mean --samples?"),
        ("pack x --out y", "pack: error: unrecognized arguments: --out"),
        ("status x y", "status: error: unrecognized arguments: y"),
        ("prune m --output o", "unrecognized arguments: --output: did you mean --out?"),
        ("prune m", "the following arguments are required: --out"),
    ],
)
def test_wrong_arguments_get_one_line_that_says_what_would_be_right(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    shown = capsys.readouterr().err
    assert (stopped.value.code, shown.count("\n")) == (2, 1)
    assert said in shown


@pytest.mark.parametrize("verb", ["methods", "inspect {0}", "status {0}"])
def test_verbs_that_only_read_work_under_a_launcher(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "model" / "log.txt").touch()  # as of a run that was stopped early
    assert main(verb.format(model).split()) == 0
    assert capsys.readouterr().out


def test_the_home_folder_is_found_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave the ~ of --like=~/file and NAME=~/text; in a recipe and a call nobody else would replace it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe.build({"calibration": {"source": {"one": "~/one.txt"}}, "ignore": ["~"]})
    assert recipe.calibration.tasks == {"one": str(tmp_path / "one.txt")}
    assert recipe.ignore == ("~",)
    for command in (
        "evaluate smollm2 --data=~/text.txt",
        "export ~/run ~/out.gguf",
        "recover ~/run --out=~/out --data one=~/one.txt --dense=~/dense",
    ):
        assert "~" not in str(seen(command, monkeypatch))


def seen(command: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments that a verb gets."""
    found: dict[str, Any] = {}
    with monkeypatch.context() as patched:
        verb = command.split(maxsplit=1)[0]
        run = Mock(side_effect=lambda given: found.update(vars(given)) or 0, __doc__="Look.")
        patched.setattr(f"fistapruner.cli.{VERBS[verb]}.{verb}", run)
        assert main(command.split()) == 0
    return found


def test_a_fault_of_the_program_leaves_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    fault = Mock(side_effect=FileNotFoundError(2, "No such file or directory", "/a/file"))
    monkeypatch.setattr("fistapruner.pruning.run.settle", fault)
    command = ["prune", str(model), "--out", str(run), "--calibration", "python", "--evaluate", "none", "--quiet"]
    assert main(command) == 2
    assert capsys.readouterr().err == "fistapruner: /a/file: No such file or directory\n"
    assert main([*command, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
