"""Write the checkpoint of a run whose layers were pruned in parts.

Each part is a prune command with --only-layers, on any machine with access to the run directory. When all layers are
done, this verb writes the checkpoint, evaluates it and writes the report. For a model of 32 layers:

  fistapruner prune MODEL --out RUN --only-layers 0-15     on one machine
  fistapruner prune MODEL --out RUN --only-layers 16-31    on another
  fistapruner finish RUN
"""

from __future__ import annotations

import argparse

from .arguments import add_begun_run, trust
from .prune import show

SUMMARY = "write the checkpoint of a run that was pruned in parts"


configure = add_begun_run


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..pipeline.prune import finish_run

    report = finish_run(arguments.run_directory, listener=listener, **trust(arguments))
    return show(report, arguments.run_directory, as_json=arguments.json)
