"""Quick verbs answer without torch and transformers; lazily imported names are complete."""

import json
import subprocess
import sys
from pathlib import Path

import fistapruner as fp
from fistapruner.reporting import Report
from fistapruner.solvers import CATALOGUE, METHODS

CHECK = """
import sys
from fistapruner.cli import main
for command in {commands}:
    try:
        status = main(command)
    except SystemExit as stopped:
        status = stopped.code
    if status or (heavy := {{"torch", "transformers", "numpy", "scipy"}} & set(sys.modules)):
        sys.exit(f"{{command}}: status {{status}}, imported {{sorted(heavy)}}")
"""


def test_quick_verbs_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    report = {"version": 1, "status": "running", "model": {"source": "small", "layers": 3}, "layers": [{"index": 0}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    commands = [["--help"], ["--version"], ["prune", "--help"], ["methods"], ["methods", "--json"]]
    commands += [["status", str(tmp_path)], ["status", str(tmp_path), "--json"]]
    said = subprocess.check_output([sys.executable, "-c", CHECK.format(commands=commands)], text=True)
    for word in ("evaluate", fp.__version__, "--set", "2408.03728", "refines", "1 of 3 decoder layers", '"layers": 3'):
        assert word in said


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(fp, name) is not None for name in fp.__all__)
    assert set(fp.__all__) <= set(dir(fp))
    assert fp.Report is Report


def test_the_catalogue_describes_the_classes() -> None:
    assert [(entry.name, entry.refines) for entry in CATALOGUE] == [
        (name, method.refines) for name, method in METHODS.items()
    ]
    assert all(entry.name == METHODS[entry.name].name and entry.summary and entry.reference for entry in CATALOGUE)
