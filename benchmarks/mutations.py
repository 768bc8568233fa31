"""Do the tests see it where one comparison, sum, constant, condition or result of the package is another?

    python benchmarks/mutations.py --out mutations.json
    python benchmarks/mutations.py --areas solver,loss --number 20 --beside ../before --out mutations.json

For each mutant, one place of a temporary copy of the package is changed, and the tests of its area run until one
fails. The same seed draws the same places as long as their statements stand, as many of each area as of the others.
``--beside`` gives the mutants that are missed to the tests of an older checkout: those that only these catch are what
was lost. Only places that stand in both are drawn.
A row that the file of ``--out`` has already is not computed again. Some mutants compute the same and cannot be caught.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
AREAS = {  # files or folders of the package, and the folders of the tests that cover them
    "solver": ("core/problem.py core/sums.py core/linalg.py solvers", "solvers core"),
    "mask": ("core/constraints.py training/masked.py training/hold_mask.py", "core training"),
    "journal": ("runs/store.py runs/steps.py runs/directory.py runs/settled.py", "runs pipeline faults"),
    "writer": (
        "models/write.py models/safetensors.py models/checkpoint.py pruning/write.py",
        "models pruning pipeline",
    ),
    "loss": ("training/loss.py measure/logits.py papers/mezo.py papers/mrpo.py", "training papers measure"),
    "kernel": ("packed", "packed"),
}
COMPARED: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}
COMPUTED: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
}
UNCHANGED = ("annotation", "returns", "decorator_list", "type_params")
PARTS = ast.stmt | ast.ExceptHandler | ast.match_case  # have statements of their own


@dataclass(frozen=True)
class Mutant:
    """A place of a file of the package, and what stands there instead."""

    path: str
    name: str  # statement, expression, its number in the statement, and what stands instead: the same in any checkout
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
    """Yield each expression of a statement that has a mutant, with the mutant; annotations and texts have none."""
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
    if isinstance(node, ast.JoinedStr):
        return
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in UNCHANGED and not isinstance(child, PARTS):
                yield from others(child)


def find_mutants(source: Path, files: str) -> dict[str, Mutant]:
    """Return the mutants of files or folders of a package by their names."""
    found: dict[str, Mutant] = {}
    for each in (source / part for part in files.split()):
        for file in sorted(each.rglob("*.py")) if each.is_dir() else [each] * each.exists():
            seen: Counter[str] = Counter()
            for statement in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.stmt)):
                for node, instead in others(statement):
                    head = re.sub(r"\s+", " ", ast.unparse(statement))[:160]
                    name = f"{head} | {ast.unparse(node)} -> {ast.unparse(instead)}"
                    seen[name] += 1
                    name = f"{name} | {seen[name]}"
                    found.setdefault(name, Mutant(str(file.relative_to(source)), name, node, instead))
    return found


def check(checkout: Path, mutant: Mutant, tests: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Run tests on a copy of a checkout's package with a mutant; returns what became of it, and which test failed."""
    stem, folders = Path(mutant.path).stem, [Path("tests") / each for each in tests.split()]
    folders = [each for each in folders if (checkout / each).exists()]
    near = [file.relative_to(checkout) for each in folders for file in (checkout / each).glob(f"test_{stem}*.py")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(checkout / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        file = source / "fistapruner" / mutant.path
        file.write_text(mutant.apply(file.read_text()))
        options = ["-x", "-q", "-p", "no:cacheprovider"]
        command = [*shlex.split(arguments.python), "-m", "pytest", *options, "-m", "not slow and not real"]
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command += [str(each) for each in [*near, *folders]]
        with subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True, **pipes) as run:
            try:
                said, _ = run.communicate(timeout=arguments.timeout)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                return {"became": "timeout", "by": ""}
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return {
            "became": "caught" if run.returncode else "missed",
            "by": failed[1] if failed else said[-300:] if run.returncode else "",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--areas", default=",".join(AREAS), help="separated by commas")
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", type=Path, help="an older checkout, whose tests are given the missed mutants")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of a mutant")
    parser.add_argument("--python", default=sys.executable, help="the command that runs Python")
    parser.add_argument("--out", type=Path, default=Path("mutations.json"))
    arguments = parser.parse_args()
    if unknown := set(arguments.areas.split(",")) - set(AREAS):
        parser.error(f"--areas: {', '.join(sorted(unknown))} is none of {', '.join(AREAS)}")
    checkouts = {"now": REPOSITORY, **({"before": arguments.beside.resolve()} if arguments.beside else {})}
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    chosen: list[tuple[str, str]] = []
    found: dict[str, dict[str, Mutant]] = {}
    for area in arguments.areas.split(","):
        files = {"now": AREAS[area][0], "before": "."}
        found |= {
            f"{when} {area}": find_mutants(each / "src/fistapruner", files[when]) for when, each in checkouts.items()
        }
        names = set.intersection(*(set(found[f"{when} {area}"]) for when in checkouts))
        drawn = sorted(names, key=lambda name: hashlib.sha256(f"{arguments.seed} {name}".encode()).digest())
        chosen += [(area, name) for name in drawn[: -(-arguments.number // len(arguments.areas.split(",")))]]
    for area, name in chosen:
        row = rows.setdefault(name, {"area": area})
        for when, checkout in checkouts.items():
            if when == "before" and row["now"]["became"] != "missed":
                continue
            mutant = found[f"{when} {area}"][name]
            if when not in row:
                row[when] = {"file": f"{mutant.path}:{mutant.node.lineno}"} | check(
                    checkout, mutant, AREAS[area][1], arguments
                )
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{when:6} {row[when]['became']:8} {row[when]['file']}  {name}  {row[when]['by']}", flush=True)
    for when in checkouts:
        print(when, dict(Counter(rows[name][when]["became"] for _, name in chosen if when in rows[name])))


if __name__ == "__main__":
    main()
