"""Train a pruned model on preference pairs, with every zero kept.

MODEL is a run directory of prune, recover or align, or a pruned checkpoint. DATA is a .jsonl file in the format of
TRL: chosen, rejected and perhaps prompt, each a text or a list of messages. One tenth of the prompts is held out, to
choose the step that is kept, and one tenth measures the result. The finished checkpoint is in RUN/model. With --compare
every loss is run from one cache of references, and the table is in RUN/compare.md.

  fistapruner align runs/recovered --data pairs.jsonl --out runs/aligned
  fistapruner align runs/recovered --data pairs.jsonl --out runs/both --loss geometric --weights held-out
  fistapruner align runs/recovered --data pairs.jsonl --out runs/kept --anchor 0.1
  fistapruner align runs/recovered --data pairs.jsonl --out compared --compare --seeds 0,1,2
  fistapruner align ./pruned --dense meta-llama/Llama-3.2-1B --data pairs.jsonl --out runs/mine --parameters full
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import FistaPrunerError
from ..recipes.align_settings import AlignRecipe
from ..runtime.formatting import align_columns
from .arguments import (
    add_dense_argument,
    add_evaluation_of_result,
    add_model_and_run,
    add_output_arguments,
    add_training_arguments,
    add_trust_arguments,
    read_recipe,
    read_seeds,
    run_options,
)
from .prune import show

if TYPE_CHECKING:
    from ..runs.comparison_records import AlignComparison

SUMMARY = "train a pruned model on preference pairs, every zero kept"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_and_run(parser, "run directory, or a pruned checkpoint")
    add_dense_argument(parser)
    compare = parser.add_argument_group("comparison")
    compare.add_argument("--compare", action="store_true", help="run every loss, and tabulate them")
    compare.add_argument(
        "--seeds", default=None, metavar="N,...", help="with --compare: runs of every loss (default: that of --seed)"
    )
    compare.add_argument(
        "--keep", action="store_true", help="with --compare: keep the checkpoints and states of training"
    )
    add_training_arguments(parser, AlignRecipe)
    add_evaluation_of_result(parser)
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..pipeline.align import align
    from ..pipeline.align_compare import align_compare

    recipe = read_recipe(arguments, AlignRecipe)
    common: dict[str, Any] = {
        "recipe": recipe,
        "dense": arguments.dense,
        **run_options(arguments, listener),
    }
    if arguments.compare:
        seeds = None if arguments.seeds is None else read_seeds(arguments.seeds)
        found = align_compare(arguments.model, arguments.out, seeds=seeds, keep=arguments.keep, **common)
        print(json.dumps(found.model_dump(mode="json")) if arguments.json else _table(found))
        return 1 if any(row.error for row in found.rows) else 0
    if arguments.seeds is not None or arguments.keep:
        raise FistaPrunerError("--seeds and --keep: settings of a comparison, made with --compare")
    report = align(arguments.model, arguments.out, **common)
    return show(report, arguments.out, as_json=arguments.json)


def _table(found: AlignComparison) -> str:
    """Write the table for the terminal, with the rows that failed below it."""
    from ..reporting.align_table import HEAD, align_failures, align_rows

    return "\n".join([align_columns([HEAD, *align_rows(found)]), *align_failures(found)])
