"""Go on with an interrupted run.

Model, recipe and evaluation stand in the run directory; layers that are done are not done again, and the checkpoint is
the same, bit for bit, as that of a run that nothing stopped. Giving the prune command again does the same. Whether the
model's own code may run, or its pickles be read, is said with every command anew.

  fistapruner resume runs/first
"""

from __future__ import annotations

import argparse

from .arguments import add_output_arguments, add_trust_arguments

SUMMARY = "go on with an interrupted run"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="the run directory")
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.prune import resume
    from .progress import choose_listener
    from .prune import show

    report = resume(
        arguments.run_directory,
        allow_pickle=arguments.allow_pickle,
        trust_remote_code=arguments.trust_remote_code,
        listener=choose_listener(quiet=arguments.quiet or arguments.json),
    )
    show(report, arguments.run_directory, as_json=arguments.json)
    return 0
