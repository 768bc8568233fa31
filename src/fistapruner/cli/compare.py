"""Compare pruning methods on one model with one protocol.

All methods get the same calibration windows and are measured on the same text. METHODS are chains as in --method, or
names of recipes, separated by commas. Settings of one method follow an @, separated by commas. A published method
without settings gets the hidden states and targets of its paper; the recipe paper is FISTAPruner exactly as published:

  fistapruner compare smollm2 --methods magnitude,wanda,sparsegpt --sparsity 50%,2:4 --out compared
  fistapruner compare smollm2 --methods alps,proximal@residual=none,best --sparsity 70% --seeds 0,1,2 --out seeds

Every run has its directory in DIR/runs; the table is in DIR/compare.json and DIR/compare.md. The same command
continues an interrupted comparison.
"""

from __future__ import annotations

import argparse
import json

from ..settings.settings import Recipe
from .arguments import (
    add_evaluation,
    add_output_arguments,
    add_recipe_arguments,
    add_trust_arguments,
    read_seeds,
    recipe_settings,
    this_command,
    trust,
)

SUMMARY = "compare methods with one protocol"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder, run directory, GGUF file, or smollm2")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the comparison; one that was begun is continued"
    )
    parser.add_argument(
        "--methods", required=True, metavar="A,B@KEY=VALUE,...", help="methods, chains or recipes, with their settings"
    )
    parser.add_argument(
        "--sparsity",
        default=None,
        metavar="S,...",
        help="sparsities, separated by commas (default: that of --recipe; else 50%%, or 0%% with --structure)",
    )
    parser.add_argument(
        "--seeds",
        "--seed",
        default="0",
        metavar="N,...",
        help="seeds of the runs and their calibration windows (default: 0)",
    )
    add_evaluation(parser, "text for perplexity: wikitext2, ptb, c4, python or a file")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints")
    add_recipe_arguments(parser, single=False)
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..comparison import compare
    from ..reporting.comparison import comparison_table

    settings, seeds = recipe_settings(arguments), read_seeds(arguments.seeds)
    comparison = compare(
        arguments.model,
        arguments.methods,
        arguments.sparsity or str(Recipe.build(settings).sparsity),
        arguments.out,
        seeds=seeds,
        settings=settings,
        data=arguments.evaluate,
        windows=arguments.evaluate_windows,
        keep=arguments.keep,
        listener=listener,
        command=this_command(),
        **trust(arguments),
    )
    print(json.dumps(comparison.model_dump(mode="json")) if arguments.json else comparison_table(comparison))
    return 1 if all(row.error for row in comparison.rows) else 0
