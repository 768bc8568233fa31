"""Do the tests on the stand-in GPU see it where the package forgets a device?

    python benchmarks/device_mutations.py                          # every mutant
    python benchmarks/device_mutations.py --only solvers --every 3  # every third one of these files
    python benchmarks/device_mutations.py --tests test_solvers_on_gpu.py  # these tests only

A mutant is the package without one ``.to(device)``, ``device=...`` or ``.cpu()``; on a CPU most of them compute the
same, so that no other test can see them. All of them are in one copy of the package, in which a variable of the
environment says which is at work. First all tests of ``tests/standin`` run without one, and it is noted which test
moves a tensor at which of these places, or makes one on a GPU there. Then, for each mutant, the tests that were noted
run, the quickest first, until one fails, in a copy of the process that has imported them all. Prints each mutant with
``caught``, ``missed`` or ``not reached`` (no test moves anything there) and, at the end, a Markdown table by room of
the package. Calls that name more than a device by keywords, such as ``non_blocking``, are not among the mutants.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _pytest.main import pytest_runtestloop

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "fistapruner"
TESTS = REPOSITORY / "tests" / "standin"
SWITCH = '''
import os
import torch

def made(number, device):
    """Forget the device of a new tensor, if the mutant of this number is at work."""
    if device is not None and torch.device(device).type != "cpu":
        note(number)
    return None if at_work(number) else device

def moved(number, value, method):
    """Forget to move a value, if the mutant of this number is at work; note where that would matter."""
    def move(*arguments, **keywords):
        if at_work(number):
            return value.to(*arguments[1:], **keywords) if arguments[1:] or keywords else value
        before = device_of(value)
        after = getattr(value, method)(*arguments, **keywords)
        if before is None or device_of(after) != before:
            note(number)
        return after
    return move

def at_work(number):
    return os.environ.get("MUTANT") == str(number)

def device_of(value):
    return next(value.parameters()).device if isinstance(value, torch.nn.Module) else getattr(value, "device", None)

def note(number):
    if "MUTANT" not in os.environ and (test := os.environ.get("PYTEST_CURRENT_TEST")):
        with open(os.environ["NOTED"], "a") as file:
            file.write(f"{number} {test.rpartition(' ')[0]}\\n")
'''
"""A module beside the copy of the package, also for the processes that tests start."""


@dataclass(frozen=True)
class Mutant:
    """One removal.

    Args:
        path: file, in the package.
        node: where it is: a call of ``to`` or ``cpu``, or a keyword.
        removed: the text that is gone, for the reader.
    """

    path: Path
    node: ast.Call | ast.keyword
    removed: str

    def __str__(self) -> str:
        return f"{self.path}:{self.node.lineno}  {self.removed}"


def mutants(path: Path, tree: ast.Module) -> Iterator[Mutant]:
    """Find the removals in a file of the package."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cpu"):
            first = ast.unparse(node.args[0]) if node.args else ""
            if node.func.attr == "cpu" or ("device" in first and len(node.args) == 1 and not node.keywords):
                yield Mutant(path, node, f".{node.func.attr}({first})")
            elif "device" in first and len(node.args) > 1:
                yield Mutant(path, node, f".to({first}, ...)")
        for keyword in node.keywords:
            if keyword.arg == "device" and _of_torch(node):
                yield Mutant(path, keyword, ast.unparse(keyword))


def _of_torch(node: ast.Call) -> bool:
    """Return whether a call makes a tensor: of a function of torch, or a method."""
    return ast.unparse(node.func).startswith("torch.") or (
        isinstance(node.func, ast.Attribute) and node.func.attr == "to"
    )


def add_switch(number: int, mutant: Mutant) -> None:
    """Make the place of a mutant ask whether it is at work."""

    def call(name: str, *given: ast.expr) -> ast.expr:
        function = ast.parse(f"__import__('switch').{name}", mode="eval").body
        return ast.Call(function, [ast.Constant(number), *given], [])

    if isinstance(mutant.node, ast.keyword):
        mutant.node.value = call("made", mutant.node.value)
    else:
        assert isinstance(mutant.node.func, ast.Attribute)
        mutant.node.func = call("moved", mutant.node.func.value, ast.Constant(mutant.node.func.attr))


class Runner:
    """A plugin of pytest that runs the collected tests without a mutant, and those that are noted with each.

    Args:
        found: the mutants.
        folder: for notes.
    """

    def __init__(self, found: Sequence[Mutant], folder: Path) -> None:
        self.found, self.folder = found, folder
        self.seconds = Counter[str]()
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        self.failed += f"{report.nodeid}\n{report.longreprtext}\n" if report.failed else ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from transformers import LlamaForCausalLM  # noqa: F401  (here, once, and not in every copy of the process)

        from standin.operators import facts

        facts(torch.ops.aten.add.Tensor)
        noted, times = self.folder / "noted", self.folder / "times"
        noted.touch()
        os.environ["NOTED"] = str(noted)

        def write_times() -> None:
            times.write_text("".join(f"{seconds} {test}\n" for test, seconds in self.seconds.items()))

        if failed := self.failure(session, session.items, write_times):
            print(f"the tests fail without a mutant:\n{failed}", flush=True)
            pytest.exit("they fail", 1)
        seconds = {test: float(taken) for taken, test in _pairs(times)}
        reached = set(_pairs(noted))
        print(f"{len(seconds)} tests in {sum(seconds.values()):.0f} s", flush=True)
        counts = defaultdict[str, Counter[str]](Counter)
        for number, mutant in enumerate(self.found):
            tests = [item for item in session.items if (str(number), item.nodeid) in reached]
            tests.sort(key=lambda item: seconds[item.nodeid])
            os.environ["MUTANT"] = str(number)
            failed = self.failure(session, tests)
            result = "not reached" if not tests else "caught" if failed else "missed"
            counts[mutant.path.parts[0]][result] += 1
            print(result, mutant, "by " * bool(failed) + failed.partition("\n")[0], flush=True)
        print("\n| room | mutants | caught | missed | not reached |\n|---|---|---|---|---|")
        counts["all"] = sum(counts.values(), Counter())
        for room, of in counts.items():
            numbers = of.total(), of["caught"], of["missed"], of["not reached"]
            print(f"| `{room}` |", " | ".join(map(str, numbers)), "|")
        return True

    def failure(
        self, session: pytest.Session, tests: Sequence[pytest.Item], done: Callable[[], None] = lambda: None
    ) -> str:
        """Run tests in a copy of this process until one fails; return its name and its error, or nothing."""
        file = self.folder / "failed"
        file.write_text("")
        if tests and not (child := os.fork()):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            session.items = list(tests)
            try:
                pytest_runtestloop(session)
            except session.Failed:
                file.write_text(self.failed)
            done()
            os._exit(0)
        if tests and (code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])):
            return f"a process that ended with {code}"
        return file.read_text()


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    """Read lines of a word and a text."""
    for line in file.read_text().splitlines():
        word, _, rest = line.partition(" ")
        yield word, rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="files with this in their path; may be repeated")
    parser.add_argument("--every", type=int, default=1, help="take every N-th mutant")
    parser.add_argument("--tests", action="append", help="a file of tests/standin, or FILE::TEST; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    trees = {path.relative_to(PACKAGE): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    found = [mutant for path, tree in trees.items() for mutant in mutants(path, tree)]
    found = [one for one in found if not arguments.only or any(part in str(one.path) for part in arguments.only)]
    found = found[:: arguments.every]
    if arguments.list:
        print(*found, sep="\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(PACKAGE, folder / "fistapruner", ignore=shutil.ignore_patterns("__pycache__"))
        for number, mutant in enumerate(found):
            add_switch(number, mutant)
        for path, tree in trees.items():
            (folder / "fistapruner" / path).write_text(ast.unparse(tree), "utf-8")
        (folder / "switch.py").write_text(SWITCH)
        sys.path.insert(0, str(folder))
        os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        os.chdir(REPOSITORY)
        options = ["-x", "-s", "-m", "not slow", "-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts="]
        tests = [str(TESTS / name) for name in arguments.tests or [""]]
        if code := pytest.main([*options, f"--basetemp={folder / 'tests'}", *tests], [Runner(found, folder)]):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
