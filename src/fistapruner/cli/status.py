"""Show the progress of a run, from another terminal or after it stopped.

fistapruner status runs/first
fistapruner status runs/first --json
"""

from __future__ import annotations

import argparse
import json

SUMMARY = "progress of a run: layers or steps done, errors or losses so far, time left"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from ..reporting.status_text import status_facts, status_text
    from ..runs.lock import holders
    from ..runs.records import load_run

    folder = Path(arguments.run_directory)
    report = load_run(folder)
    alive = bool(holders(folder))
    print(
        json.dumps({**status_facts(report), "working": alive}, indent=2)
        if arguments.json
        else status_text(report, alive=alive)
    )
    return 0
