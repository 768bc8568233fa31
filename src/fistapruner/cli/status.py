"""Show the progress of a run, from another terminal or after it stopped.

fistapruner status runs/first
fistapruner status runs/first --json
"""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

from ..errors import FistaPrunerError
from ..runtime.show import finite, shell_line
from .arguments import add_json_argument

SUMMARY = "progress of a run: layers or steps done, errors or losses so far, time left"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="run directory, or folder of a comparison")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..reporting.terminal import status_facts, status_text
    from ..runs.comparison_records import is_comparison
    from ..runs.lock import holder
    from ..runs.records import is_run, load_run

    folder = Path(arguments.run_directory)
    if is_comparison(folder):
        return _comparison(folder, as_json=arguments.json)
    if (folder / "log.txt").is_file() and not is_run(folder):
        at_work, said = holder(folder), "stopped before anything was decided"
        if at_work is not None:
            said = f"being prepared by process {at_work['pid']} on {at_work['host']}"
        if arguments.json:
            print(json.dumps({"status": "preparing", "working": bool(at_work)}, indent=2))
        else:
            print(f"{folder}: {said}" + ("" if at_work else "; give its command again"))
        return 0
    report, working = load_run(folder), holder(folder) is not None
    if arguments.json:
        print(json.dumps(finite({**status_facts(report, alive=working), "working": working}), indent=2))
        return 0
    print(status_text(report, alive=working, evaluates=_evaluates(folder)))
    return 0


def _comparison(folder: Path, *, as_json: bool) -> int:
    """Show the rows that a comparison has done, and the run that is at work; returns the exit status."""
    from ..runs.comparison_records import FIGURES, RUNS, load_comparison
    from ..runs.lock import holder

    rows = len(load_comparison(folder).rows) if (folder / FIGURES).is_file() else 0
    runs = sorted((folder / RUNS).glob("*"))
    at_work = next((run for run in runs if holder(run) is not None), None)
    working = holder(folder) is not None or at_work is not None
    if as_json:
        print(json.dumps({"rows_done": rows, "working": working, "run": at_work and str(at_work)}, indent=2))
        return 0
    print(f"{folder}: comparison, {rows} rows done, " + ("running" if working else "no process works on it"))
    if at_work is None:
        if runs:
            print(f"for one of its {len(runs)} runs: {shell_line('status', folder / RUNS / '...')}")
        return 0
    return run(argparse.Namespace(run_directory=at_work, json=False))


def _evaluates(folder: Path) -> bool:
    """Check that a run was asked to evaluate its result."""
    from ..runtime.files import read_json

    with suppress(FistaPrunerError):
        decision = read_json(folder / "run.json").get("decision")
        return isinstance(decision, dict) and decision.get("evaluation") is not None
    return False
