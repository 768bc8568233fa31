"""The command line: output that nobody reads, and messages for what is mistyped."""

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

SETTINGS = ["--calibration", "python", "--samples", "4", "--seqlen", "32", "--method", "magnitude"]
SETTINGS += ["--evaluate", "none"]


def test_a_reader_that_leaves_does_not_stop_the_work(tmp_path: Path) -> None:
    """``prune … 2>&1 | head -1``: the run ends as if its output had been read."""
    model, out = tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    command = [sys.executable, "-m", "fistapruner", "prune", str(model), "--out", str(out), *SETTINGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert json.loads((out / "report.json").read_text())["status"] == "finished"
    assert (out / "model" / "config.json").exists()


VERB = """
import os, signal, sys
from fistapruner.cli import look, main
from fistapruner.cli.progress import PlainListener
def run(given):
    'Run.'
    {work}
    return 0
look.methods = run
sys.exit(main(['methods']))
"""
"""A program of one verb."""


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_full_disk_under_a_stream_or_no_reader_does_not_stop_the_work(stream: str, full: bool) -> None:
    """Messages are dropped; where results cannot be written, the exit status and one line say so."""
    work = "sys.stdin.read(); PlainListener().say('said'); look.show('result', given)"
    streams = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    if full and not Path("/dev/full").exists():
        pytest.skip("Linux has this device")
    with open("/dev/full" if full else os.devnull, "w") as file:
        streams |= {stream: file} if full else {}
        command = [sys.executable, "-c", VERB.format(work=work)]
        with subprocess.Popen(command, text=True, **streams) as process:  # type: ignore[call-overload]
            if not full:
                getattr(process, stream).close()
            process.stdin.close()
            said = (process.stdout if stream == "stderr" else process.stderr).read().splitlines()
    full_disk = "fistapruner: standard output cannot be written: No space left on device; the work is done"
    if stream == "stderr":
        assert (process.returncode, said) == (0, ["result"])
    else:
        assert (process.returncode, said) == ((2, ["said", full_disk]) if full else (0, ["said"]))


@pytest.mark.parametrize(
    "error",
    [MemoryError("no memory for the kernel's vectors"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_ran_out_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, cli: tiny.Cli, error: Exception
) -> None:
    monkeypatch.setattr("fistapruner.cli.look.methods", Mock(side_effect=error, __doc__="Fail."))
    (line,) = cli("methods", status=2).err.splitlines()
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
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup may have run the tests
    program += VERB.format(work=f"os.kill(os.getpid(), signal.{name}); print('worked on')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if elastic and name == "SIGHUP":
        assert done.returncode == -signal.SIGHUP
        return
    assert (done.returncode, done.stdout) == (status, "" if status else "worked on\n")
    assert done.stderr == ("fistapruner: interrupted\n" if status else "")


@pytest.mark.parametrize("rank", ["1", "gold"])
def test_a_rank_without_a_number_of_processes_is_none(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: tiny.Cli
) -> None:
    """Somebody's own variable ``RANK`` does not silence a run."""
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    said = cli("prune", model, "--out", tmp_path / "run", *SETTINGS)
    assert "checkpoint" in said.out
    assert "1 decoder layer\n" in said.err


def test_verbs_that_only_read_work_under_a_launcher_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: tiny.Cli
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "model" / "log.txt").touch()  # as of a run that was stopped early
    for command in (["methods"], ["inspect", model], ["status", model]):
        assert cli(*command).out
    assert "pack is done by one" in cli("pack", model, tmp_path / "out", status=2).err


def test_status_of_a_run_that_has_decided_nothing(tmp_path: Path, cli: tiny.Cli) -> None:
    (tmp_path / "log.txt").touch()
    with hold(tmp_path):
        assert f": being prepared by process {os.getpid()} on" in cli("status", tmp_path).out
        assert json.loads(cli("status", tmp_path, "--json").out) == {"status": "preparing", "working": True}
    assert "stopped before anything was decided; give its command again" in cli("status", tmp_path).out
    (tmp_path / "log.txt").unlink()
    cli("status", tmp_path, status=2)


def test_status_of_a_comparison(tmp_path: Path, cli: tiny.Cli) -> None:
    run = tmp_path / "runs" / "wanda"
    run.mkdir(parents=True)
    rows = [{"method": "wanda", "sparsity": "50%"}] * 2
    (tmp_path / "compare.json").write_text(json.dumps({"kind": "compare", "rows": rows}))
    (run / "run.json").write_text('{"model": {"source": "small", "layers": 3}}')
    said = cli("status", tmp_path).out
    assert "comparison, 2 rows done, no process works on it\nfor one of its 1 runs:" in said
    with hold(run):
        said, facts = cli("status", tmp_path).out, json.loads(cli("status", tmp_path, "--json").out)
    assert "2 rows done, running\nsmall: " in said
    assert "0 of 3 decoder layers" in said
    assert facts == {"rows_done": 2, "working": True, "run": str(run)}


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


def test_allocations_and_seeds_that_are_right(tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match="dense_target"):
        Recipe.build({"dense_target": True})
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
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
        ("prune x --out OUT --set dense_target=2", "dense_target … 'auto' … less than or equal to 1 … 2"),
        ("prune x --out OUT --set dense_target=dnese", "dense_target … 'auto' … a valid number … dnese"),
        ("prune x --out OUT --set allocation=unifrom", "allocation … uniform, owl, error, auto … unifrom"),
        (f"prune x --out OUT --seed {2**64}", f"seed … less than or equal to {MAX_SEED} … {2**64}"),
        ("prune x --out OUT --seed -1", "seed … greater than or equal to 0 … -1"),
        ("prune x --plan --out FILE", "--out FILE is a file; name a folder"),
        ("recover x --plan --out FILE", "--out FILE is a file; name a folder"),
        ("align --data pairs.jsonl x --plan --out FILE", "--out FILE is a file; name a folder"),
        ("prune x --out=", "out '' is empty: give the path of a folder"),
        ("status ", "RUN '' is empty: give the path of a folder"),
        ("recover x --out OUT --merge=", "--merge '' is empty: name the folder of an adapter"),
        ("prune x --out OUT --recipe=", "recipe '' is neither a file nor a shipped recipe"),
        ("evaluate x --tasks=", "--tasks '' names no task"),
        ("evaluate x --memory-limit=", "memory_limit: '' is not a size"),
    ],
)
def test_what_is_mistyped_empty_or_without_effect_is_named_with_what_would_be_right(
    tmp_path: Path, command: str, said: str, cli: tiny.Cli
) -> None:
    """In one line."""
    (file := tmp_path / "file").touch()
    words = command.replace("OUT", str(tmp_path / "out")).replace("FILE", str(file)).split(" ")
    (line,) = cli(*words, status=2).err.splitlines()
    assert not [part for part in said.replace("FILE", str(file)).split(" … ") if part not in line], line


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
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, cli: tiny.Cli
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    places = {"MODEL": tmp_path / "none", "OUT": tmp_path / "out", "DATA": "c4"}
    said = cli(*(places.get(word, word) for word in command.split()), status=2).err
    assert "reading c4 needs the package 'datasets': pip install" in said


@pytest.mark.parametrize(("methods", "named"), [("methods: wanda", True), ("method: wanda", False)])
def test_a_fault_of_a_recipe_file_names_the_file(tmp_path: Path, cli: tiny.Cli, methods: str, named: bool) -> None:
    """That of a flag does not."""
    (file := tmp_path / "mine.yaml").write_text(methods)
    said = cli("prune", "model", "--out", tmp_path / "run", "--recipe", file, "--sparsity", "5:4", status=2).err
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: tiny.Cli
) -> None:
    model, run = tiny.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    fault = Mock(side_effect=FileNotFoundError(2, "No such file or directory", "/a/file"))
    monkeypatch.setattr("fistapruner.pruning.run.settle", fault)
    command = ["prune", model, "--out", run, "--calibration", "python", "--evaluate", "none", "--quiet"]
    assert cli(*command, status=2).err == "fistapruner: /a/file: No such file or directory\n"
    assert "Traceback" in cli(*command, "--debug", status=2).err
