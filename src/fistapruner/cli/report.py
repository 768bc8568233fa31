"""Draw the page of a run or a comparison again, from its JSON.

For an unfinished run the page shows the layers or steps that are done.

  fistapruner report runs/first      writes runs/first/report.html
"""

from __future__ import annotations

import argparse

SUMMARY = "draw report.html of a run, or compare.html of a comparison"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="run directory, or folder of 'fistapruner compare'")


def run(arguments: argparse.Namespace) -> int:
    from ..reporting.page import write_page

    print(write_page(arguments.run_directory))
    return 0
