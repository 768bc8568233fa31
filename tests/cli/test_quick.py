"""Quick verbs answer without torch and transformers; lazily imported names are complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fistapruner as fp
from fistapruner.reporting import Report
from fistapruner.solvers import CATALOGUE, METHODS

CHECK = """
import sys
from fistapruner.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stopped:
    status = stopped.code
heavy = {"torch", "transformers", "numpy", "scipy"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else status)
"""


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--help"], "evaluate"),
        (["--version"], fp.__version__),
        (["prune", "--help"], "--set"),
        (["methods"], "2408.03728"),
        (["methods", "--json"], "refines"),
        (["status", "RUN"], "1 of 3 decoder layers"),
        (["status", "RUN", "--json"], '"layers": 3'),
    ],
    ids=" ".join,
)
def test_quick_verbs_import_neither_torch_nor_transformers(tmp_path: Path, arguments: list[str], word: str) -> None:
    report = {"version": 1, "status": "running", "model": {"source": "small", "layers": 3}, "layers": [{"index": 0}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    command = [str(tmp_path) if argument == "RUN" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", CHECK, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert word in done.stdout


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(fp, name) is not None for name in fp.__all__)
    assert set(fp.__all__) <= set(dir(fp))
    assert fp.Report is Report


def test_the_catalogue_describes_the_classes() -> None:
    assert [(entry.name, entry.refines) for entry in CATALOGUE] == [
        (name, method.refines) for name, method in METHODS.items()
    ]
    assert all(entry.name == METHODS[entry.name].name and entry.summary and entry.reference for entry in CATALOGUE)
