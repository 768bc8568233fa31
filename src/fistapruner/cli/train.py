"""The verbs recover and align."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..errors import FistaPrunerError
from ..settings.align import AlignRecipe
from ..settings.base import RunRecipe
from ..settings.train import RecoverRecipe
from .arguments import add_common, add_evaluation, add_recipe, read_recipe, run_options, show, this_command, trust
from .progress import choose_listener
from .prune import PLAN, finish


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

    plan = plan_recovery(model, recipe, out, dense=dense, permissions=Permissions(**trust(arguments)))
    show(plan, arguments)
    if plan.refusal:
        raise FistaPrunerError(plan.refusal)
    return 0
