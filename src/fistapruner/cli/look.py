"""The verbs status, report and methods, which need no torch."""

from __future__ import annotations

import argparse

from .arguments import add_common, show


def configure_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="run directory, or folder of a comparison")
    add_common(parser, quiet=False, code=False, pickle=False)


def status(arguments: argparse.Namespace) -> int:
    """Show the progress of a run, from another terminal or after it stopped.

    fistapruner status runs/first
    fistapruner status runs/first --json
    """
    from ..reporting.terminal import status as run_status

    show(run_status(arguments.run_directory), arguments)
    return 0


def configure_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="run directory, or folder of 'fistapruner compare'")


def report(arguments: argparse.Namespace) -> int:
    """Draw report.html of a run, or compare.html of a comparison.

    For an unfinished run the page shows the layers or steps that are done.

      fistapruner report runs/first
    """
    from ..reporting.page import write_page

    print(write_page(arguments.run_directory))
    return 0


def configure_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe this method and its settings")
    add_common(parser, quiet=False, code=False, pickle=False)


def methods(arguments: argparse.Namespace) -> int:
    """List the pruning methods, or describe one of them with its settings.

    Chain them with '+': --method wanda+refit, --method alps+swap. Settings of a method are given in a recipe file.

      fistapruner methods
      fistapruner methods fista
    """
    from ..solvers.catalogue import methods as run_methods

    show(run_methods(arguments.name), arguments)
    return 0
