"""Do the tests on the stand-in GPU see it where the package forgets a device?

    python benchmarks/device_mutations.py                          # every mutant
    python benchmarks/device_mutations.py --only solvers --every 3  # every third one of these files
    python benchmarks/device_mutations.py --quick                   # solvers and --quality best only

A mutant is the package with one ``.to(device)``, ``device=...`` or ``.cpu()`` removed; on a CPU most of them compute
the same, so that no other test can see them. Each runs the tests of solvers and of whole runs in ``tests/standin``
until one fails; its other tests do not run. Prints each mutant with ``caught`` or ``missed`` and, at the end, a
Markdown table by room of the package. What is missed is code that these tests do not reach on a GPU, or a place where
the removal changes nothing (the tensor is on the device before).
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "fistapruner"
TESTS = REPOSITORY / "tests" / "standin"
STAGES = (
    ["test_runs_on_gpu.py::test_best_quality", "test_solvers_on_gpu.py"],
    ["test_runs_on_gpu.py", "--deselect", "tests/standin/test_runs_on_gpu.py::test_best_quality"],
)
"""Tests that run one after the other: those that reach most first."""


@dataclass(frozen=True)
class Mutant:
    """One removal.

    Args:
        path: file, in the package.
        line: of the removal.
        start, stop: bytes of the file that are removed.
        removed: the text that is gone, for the reader.
    """

    path: Path
    line: int
    start: int
    stop: int
    removed: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {self.removed}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Find the removals in a file of the package."""
    text = path.read_text("utf-8")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data = text.encode()

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    def mutant(line: int, start: int, stop: int) -> Mutant:
        return Mutant(path.relative_to(PACKAGE), line, start, stop, data[start:stop].decode())

    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        end = place(node.end_lineno or 0, node.end_col_offset or 0)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cpu"):
            of = node.func.value
            after = data.index(b".", place(of.end_lineno or 0, of.end_col_offset or 0))
            first = ast.unparse(node.args[0]) if node.args else ""
            if node.func.attr == "cpu" or ("device" in first and len(node.args) == 1 and not node.keywords):
                yield mutant(node.lineno, after, end)
            elif "device" in first and len(node.args) > 1:
                begin = place(node.args[0].lineno, node.args[0].col_offset)
                yield mutant(node.lineno, begin, place(node.args[1].lineno, node.args[1].col_offset))
        for keyword in node.keywords:
            if keyword.arg == "device" and _of_torch(node):
                begin = place(keyword.lineno, keyword.col_offset)
                stop = place(keyword.end_lineno or 0, keyword.end_col_offset or 0)
                yield mutant(keyword.lineno, begin, stop + 2 * (data[stop : stop + 2] == b", "))


def _of_torch(node: ast.Call) -> bool:
    """Return whether a call makes a tensor: of a function of torch, or a method."""
    return ast.unparse(node.func).startswith("torch.") or (
        isinstance(node.func, ast.Attribute) and node.func.attr == "to"
    )


def caught(mutant: Mutant, folder: Path, stages: Sequence[list[str]]) -> bool:
    """Return whether a test fails with the mutant."""
    file = folder / "fistapruner" / mutant.path
    whole = file.read_bytes()
    changed = whole[: mutant.start] + whole[mutant.stop :]
    ast.parse(changed)
    file.write_bytes(changed)
    try:
        return any(_fails(stage, folder) for stage in stages)
    finally:
        file.write_bytes(whole)


def _fails(tests: list[str], folder: Path) -> bool:
    """Run tests with the package in ``folder``; return whether one fails."""
    names = [str(TESTS / name) if name.startswith("test_") else name for name in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *names]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="files with this in their path; may be repeated")
    parser.add_argument("--every", type=int, default=1, help="take every N-th mutant")
    parser.add_argument("--quick", action="store_true", help="take the first of the two stages of tests only")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    found = [mutant for path in sorted(PACKAGE.rglob("*.py")) for mutant in mutants(path)]
    found = [one for one in found if not arguments.only or any(part in str(one.path) for part in arguments.only)]
    found = found[:: arguments.every]
    if arguments.list:
        print(*found, sep="\n")
        return
    seen, all_of = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(PACKAGE, folder / "fistapruner", ignore=shutil.ignore_patterns("__pycache__"))
        stages = STAGES[: 1 if arguments.quick else None]
        if any(_fails(stage, folder) for stage in stages):
            raise SystemExit("the tests fail without a mutant")
        for one in found:
            room = one.path.parts[0]
            killed = caught(one, folder, stages)
            all_of[room] += 1
            seen[room] += killed
            print("caught" if killed else "missed", one, flush=True)
    print("\n| room | mutants | caught |\n|---|---|---|")
    for room in all_of:
        print(f"| `{room}` | {all_of[room]} | {seen[room]} |")
    print(f"| all | {sum(all_of.values())} | {sum(seen.values())} |")


if __name__ == "__main__":
    main()
