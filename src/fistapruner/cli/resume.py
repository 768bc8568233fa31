"""Continue an interrupted run.

Model, recipe and evaluation are read from the run directory. Finished layers or steps are kept, and the checkpoint is
bit for bit that of a run without interruption. The command that began the run (prune, recover or align), given again,
does the same. --allow-pickle and --trust-remote-code hold for one command and must be given again.

  fistapruner resume runs/first
"""

from __future__ import annotations

import argparse

from .arguments import add_begun_run, trust
from .prune import show

SUMMARY = "continue an interrupted run"


configure = add_begun_run


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..resuming import resume

    report = resume(arguments.run_directory, listener=listener, **trust(arguments))
    return show(report, arguments.run_directory, as_json=arguments.json)
