"""Do the tests see it where one comparison, sum, constant, condition or result of the package is another?

    python benchmarks/mutations.py --out mutations.json              # sixty mutants of all rooms
    python benchmarks/mutations.py --rooms core,solvers --number 30  # of these rooms only

For each mutant, one place of a temporary copy of the package is changed, and the tests that cover its room run until
one fails. The same seed draws the same places of the same source, as many of each room as of the others. Writes each
mutant with ``caught`` (by which test), ``missed`` or ``timeout``; some mutants compute the same and cannot be caught.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
OTHERS = ["papers", "structure", "packed", "reporting", "training", "measure", "models", "text", "runtime", "settings"]
TESTS = {  # room or file of the package: the tests that cover it
    **{room: room for room in OTHERS},
    **{"core": "core solvers", "solvers": "solvers core", "allocate": "allocate papers", "passes": "passes pruning"},
    **{
        "pruning": "pruning pipeline",
        "pipeline": "pipeline",
        "runs": "runs pruning",
        "planning.py": "test_planning.py",
    },
}
COMPARED: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}
COMPUTED: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
}


@dataclass(frozen=True)
class Mutant:
    """A place of a file of the package, and what stands there instead."""

    path: str
    node: ast.expr
    instead: ast.expr

    def apply(self, source: str) -> str:
        """Return the source with the other expression."""
        lines = [line.encode() for line in source.splitlines(keepends=True)]
        assert self.node.end_lineno is not None
        first, last = self.node.lineno - 1, self.node.end_lineno - 1
        before = b"".join(lines[:first]) + lines[first][: self.node.col_offset]
        after = lines[last][self.node.end_col_offset :] + b"".join(lines[last + 1 :])
        return (before + f"({ast.unparse(self.instead)})".encode() + after).decode()


def others(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield each expression below a node that has a mutant, with the mutant; annotations and texts have none."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = copy.copy(node)
        other.ops = [COMPARED[type(node.ops[0])]()]
        yield node, other
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield node, ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield node, ast.Constant(not node.value if isinstance(node.value, bool) else node.value * 2 + 1)
    elif isinstance(node, ast.If | ast.IfExp):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield node.value, ast.Constant(None)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params") or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from others(child)


def draw(rooms: list[str], number: int, seed: int) -> Iterator[tuple[str, Mutant]]:
    """Draw mutants of each room in turn."""
    source, chosen, places = REPOSITORY / "src" / "fistapruner", random.Random(seed), {}
    for room in rooms:
        files = sorted((source / room).rglob("*.py")) if (source / room).is_dir() else [source / room]
        pairs = ((file, pair) for file in files for pair in others(ast.parse(file.read_text())))
        found = [Mutant(str(file.relative_to(source)), *pair) for file, pair in pairs]
        places[room] = chosen.sample(found, min(len(found), -(-number // len(rooms))))
    for turn in range(number):
        room = rooms[turn % len(rooms)]
        if turn // len(rooms) < len(places[room]):
            yield room, places[room][turn // len(rooms)]


def check(mutant: Mutant, tests: list[str], python: list[str], timeout: float) -> tuple[str, str]:
    """Run tests on a copy of the package with a mutant; returns what became of it, and the test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(REPOSITORY / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        file = source / "fistapruner" / mutant.path
        file.write_text(mutant.apply(file.read_text()))
        command = [*python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not real", *tests]
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes) as run:
            try:
                said, _ = run.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                return "timeout", ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        became = {0: "missed", 124: "timeout"}.get(run.returncode, "caught")
        return became, failed[1] if failed else said[-300:] if run.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", default=",".join(TESTS), help="separated by commas")
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of a mutant")
    parser.add_argument("--python", default=sys.executable, help="the command that runs Python")
    parser.add_argument("--out", type=Path, default=Path("mutations.json"))
    arguments, rows = parser.parse_args(), []
    if unknown := set(arguments.rooms.split(",")) - set(TESTS):
        parser.error(f"--rooms: {', '.join(sorted(unknown))} is none of {', '.join(TESTS)}")
    for room, mutant in draw(arguments.rooms.split(","), arguments.number, arguments.seed):
        began, tests = time.monotonic(), [f"tests/{each}" for each in TESTS[room].split()]
        row = {"file": mutant.path, "line": mutant.node.lineno, "was": ast.unparse(mutant.node)}
        row |= {"is": ast.unparse(mutant.instead)}
        became, by = check(mutant, tests, shlex.split(arguments.python), arguments.timeout)
        rows.append({**row, "became": became, "by": by, "seconds": round(time.monotonic() - began, 1)})
        print(f"{became:8} {row['file']}:{row['line']}  {row['was']}  ->  {row['is']}  {by}", flush=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
