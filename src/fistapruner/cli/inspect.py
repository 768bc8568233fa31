"""Count a checkpoint's zeros, by operator and in all, and check whether claimed patterns hold exactly.

Claims are those that a pruning run wrote into the checkpoint (fistapruner.json), or --pattern. The exit status is 1 if
a claim is violated, or if weights are NaN or infinite.

  fistapruner inspect runs/first
  fistapruner inspect ./some-model --pattern 2:4
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING

from ..errors import printable
from ..runtime.show import align_columns, finite
from .arguments import add_json_argument, add_pickle_argument

if TYPE_CHECKING:
    from ..measure.inspection import Inspection

SUMMARY = "sparsity of every operator; whether claimed patterns hold"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="model folder (dense or packed), GGUF file, or a finished run directory",
    )
    parser.add_argument(
        "--pattern", metavar="2:4|50%", help="claim this of every operator, whatever the checkpoint says"
    )
    add_pickle_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="print totals and violations only")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from ..measure.inspection import inspect_checkpoint

    console = Console(stderr=True)
    with console.status("") as status:
        found = inspect_checkpoint(
            arguments.checkpoint,
            arguments.pattern,
            allow_pickle=arguments.allow_pickle,
            progress=lambda name, *_: status.update(Text(printable(name))),
        )
    if arguments.json:
        print(json.dumps(finite(found.to_json()), indent=2))
    else:
        _print(found, arguments.quiet)
    return 1 if found.violations else 0


def _claim(claim: str | None) -> str:
    """Write a claim; a share with all its digits as the share of zeros beside it."""
    try:
        return f"{float(claim or ''):.4%}"
    except ValueError:  # a pattern, or a percentage
        return printable(claim or "-")


def _print(found: Inspection, quiet: bool) -> None:
    from ..models.checkpoint import PRUNING_RECORD
    from ..reporting.facts import lineage_lines

    rows = [
        (
            printable(operator.name),
            "x".join(map(str, operator.shape)),
            f"{operator.sparsity:.4%}",
            operator.pattern or "-",
            _claim(operator.claim),
            "VIOLATED" if operator.fault else "holds" if operator.claim else "",
        )
        for operator in found.operators
    ]
    headings = ("operator", "shape", "zeros", "n:m", "claimed", "")
    if not quiet and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*headings, title=printable(str(found.folder)))
        for row in rows:
            table.add_row(*row, style="red" if row[-1] == "VIOLATED" else None)
        Console(markup=False).print(table)  # names come from the checkpoint
    elif not quiet:
        print(align_columns((headings, *rows)))
        print()
    pruned = found.pruned
    zeros, weights = sum(operator.zeros for operator in pruned), sum(operator.weights for operator in pruned)
    patterns = {operator.pattern for operator in pruned}
    every = f", {patterns.pop()} in every group of each" if len(patterns) == 1 and None not in patterns else ""
    print(f"pruned operators: {len(pruned)} of {len(found.operators)}, {_share(zeros, weights)}{every}")
    print(f"whole model: {_share(found.zeros, found.weights)}")
    for (unit, before, after), layers in Counter(width[1:] for width in found.widths).items():
        print(f"{unit}: {before} -> {after} in {layers} decoder layers")
    if found.low_rank is not None:
        more, rank = found.low_rank
        print(
            f"low-rank part beside it, not counted above: {more} weights of rank {rank} ({more / max(weights, 1):.2%})"
        )
    if found.lineage is not None:
        print("made from: " + "\n       then: ".join(lineage_lines(found.lineage)))
    for violation in found.violations:
        print(f"violated: {printable(violation)}")
    if found.violations:
        return
    if found.widths or any(operator.claim for operator in found.operators):
        print("every claim holds")
    else:
        print(
            f"no zeros were checked: {found.folder} has no {PRUNING_RECORD} that claims any; copy that of the pruned "
            "model there, or give --pattern"
        )


def _share(zeros: int, weights: int) -> str:
    return f"{zeros} of {weights} weights are zero ({zeros / max(weights, 1):.4%})"
