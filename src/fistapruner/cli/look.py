"""The verbs that look at runs and models, measure them, or write them in other formats."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import FistaPrunerError
from .arguments import add_common, show, trust
from .progress import choose_listener


def configure_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="run directory, or folder of a comparison")
    add_common(parser, quiet=False, code=False, pickle=False)


def status(arguments: argparse.Namespace) -> None:
    """Show the progress of a run, from another terminal or after it stopped.

    fistapruner status runs/first
    fistapruner status runs/first --json
    """
    from ..reporting.terminal import status as run_status

    show(run_status(arguments.run_directory), arguments)


def configure_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="run directory, or folder of 'fistapruner compare'")


def report(arguments: argparse.Namespace) -> None:
    """Draw report.html of a run, or compare.html of a comparison.

    For an unfinished run the page shows the layers or steps that are done.

      fistapruner report runs/first
    """
    from ..reporting.page import write_page

    show(write_page(arguments.run_directory), arguments)


def configure_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe this method and its settings")
    add_common(parser, quiet=False, code=False, pickle=False)


def methods(arguments: argparse.Namespace) -> None:
    """List the pruning methods, or describe one of them with its settings.

    Chain them with '+': --method wanda+refit, --method alps+swap. Settings of a method are given in a recipe file.

      fistapruner methods
      fistapruner methods fista
    """
    from ..solvers import methods as run_methods

    show(run_methods(arguments.name), arguments)


def configure_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="run directory, hub id, local folder, GGUF file, or smollm2")
    parser.add_argument("--against", metavar="DENSE", help="the dense model (default: the one that was pruned)")
    text = parser.add_argument_group("perplexity")
    text.add_argument("--data", metavar="TEXT", help="text (default: python, unless tasks are given)")
    text.add_argument("--seqlen", type=int, metavar="N", help="tokens in a window (default: the maximum, at most 2048)")
    text.add_argument("--windows", type=int, metavar="N", help="only the first N windows (default: all)")
    text.add_argument("--bos", default="auto", metavar="WHERE", help="BOS token: auto, none, text or window")
    tasks = parser.add_argument_group("zero-shot tasks (extra 'eval')")
    tasks.add_argument("--tasks", metavar="A,B,...", help="tasks of lm-eval, or of --tasks-dir (default: all of DIR)")
    tasks.add_argument("--tasks-dir", metavar="DIR", help="folder of .yaml files that define tasks")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    work = parser.add_argument_group("execution")
    work.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N (default: auto)")
    work.add_argument("--dtype", default="auto", metavar="DTYPE", help="auto, float32, bfloat16 or float16")
    work.add_argument("--batch-size", type=int, metavar="N", help="windows in one pass (default: by device)")
    work.add_argument("--memory-limit", metavar="SIZE", help="main memory to use, such as 8GiB (default: what is free)")
    add_common(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure perplexity, divergence from the dense model, zero-shot tasks.

    MODEL is a model as for 'prune', a packed folder, or a run directory: then the run's checkpoint is compared with the
    model it was made from, and the figures are added to RUN/report.json, the page and the model card. Perplexity reads
    one decoder layer at a time, so the model may be larger than memory. It depends on --seqlen, and is printed with
    everything it depends on. A packed folder is unpacked into a temporary one. --bos window puts a BOS token before
    every window, text once before the whole text, as the scripts of most papers do; auto is window for tokenizers that
    add one, else none. --tasks-dir is what lm-eval calls --include_path.

      fistapruner evaluate smollm2 --data wikitext2 --seqlen 1024
      fistapruner evaluate runs/first --data text.txt --windows 60
      fistapruner evaluate runs/first --tasks arc_easy,piqa --tasks-dir tasks
      fistapruner evaluate pruned-folder --against smollm2 --data wikitext2
    """
    listener = choose_listener(arguments)
    from ..measure.run import evaluate as run_evaluate

    tasks = [task.strip() for task in (arguments.tasks or "").split(",") if task.strip()]
    if arguments.tasks is not None and not tasks:
        raise FistaPrunerError(f"--tasks {arguments.tasks!r} names no task: write names separated by commas")
    names = ("against", "seqlen", "windows", "bos", "tasks_dir", "limit", "device", "dtype", "batch_size")
    settings = {name: getattr(arguments, name) for name in (*names, "memory_limit")}
    data = arguments.data
    if data is None and not tasks and arguments.tasks_dir is None:
        data = "python"
    kept: list[Any] = []  # where tasks fail, what was measured before them
    try:
        found = run_evaluate(
            arguments.model,
            data,
            tasks=tasks,
            **settings,
            **trust(arguments),
            listener=listener,
            keep=kept.append,
        )
    except BaseException:
        for result in kept[:1]:
            show(result, arguments)
        raise
    show(found, arguments)


def configure_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="run directory, or folder of a pruned or packed model")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="prompt tokens (default: 128)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new tokens in a run (default: 128)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's, within a CPU quota)")
    add_common(parser, code=False)


def bench(arguments: argparse.Namespace) -> None:
    """Measure tokens per second, memory and size of a pruned model.

    Dense, packed and packed int8 forms run each in a process of its own, in interleaved rounds. The dense forms are the
    pruned checkpoint with its zeros, since the speed of a dense product does not depend on its values. A run that
    removed channels or heads is measured as the smaller model beside the dense one that it was. fp32 and bf16 are both
    measured, because which of them is faster depends on the processor. Packed forms of a model with a low-rank part
    compute the sum of both parts, and their sizes count both.

    Of a run directory the checkpoint is measured, and the figures are added to RUN/report.json, the page and the model
    card.

      fistapruner bench runs/first
      fistapruner bench packed-folder --batch 4 --json
    """
    listener = choose_listener(arguments)
    from ..measure.run import bench as run_bench

    names = ("batch", "prompt", "tokens", "runs", "threads", "allow_pickle")
    show(run_bench(arguments.model, listener=listener, **{name: getattr(arguments, name) for name in names}), arguments)


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model folder, GGUF file, or a finished run directory")
    parser.add_argument("--pattern", metavar="2:4|50%", help="claim this of every operator")
    add_common(parser, code=False)


def inspect(arguments: argparse.Namespace) -> int:
    """Count the zeros of every operator; check whether claimed patterns hold.

    Claims are those that a pruning run wrote into the checkpoint (fistapruner.json), or --pattern. The exit status is 1
    if a claim is violated, or if weights are NaN or infinite. --quiet prints totals and violations only.

      fistapruner inspect runs/first
      fistapruner inspect ./some-model --pattern 2:4
    """
    listener = choose_listener(arguments)
    from ..reporting.inspection import inspect as run_inspect
    from ..reporting.inspection import inspection_text

    found = run_inspect(arguments.checkpoint, arguments.pattern, progress=listener.tick, **trust(arguments))
    show(inspection_text(found, operators=False) if arguments.quiet and not arguments.json else found, arguments)
    return int(bool(found.violations))


def configure_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN|MODEL", help="run directory, or folder of a pruned model")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--values", default="same", choices=("same", "bf16", "int8"), help="how kept values are stored (default: same)"
    )
    add_common(parser, quiet=False, as_json=False, code=False)


def pack(arguments: argparse.Namespace) -> None:
    """Write a pruned checkpoint without its zeros.

    Every pruned operator is stored as a bit mask and its kept values (bf16, or int8); the rest as it is, but for
    embedding and head, which become int8 with --values int8. The result loads in transformers after 'import
    fistapruner', and 'fistapruner unpack' brings the dense checkpoint back, bit for bit unless values were rounded
    (--values bf16 of wider weights, --values int8). A low-rank part is copied as it is, and the packed model is the sum
    of both.

      fistapruner pack runs/first packed
      fistapruner pack runs/first packed-int8 --values int8
    """
    listener = choose_listener(arguments)
    from ..packed.pack import pack as run_pack

    settings = {"values": arguments.values, "allow_pickle": arguments.allow_pickle}
    show(run_pack(arguments.checkpoint, arguments.out, **settings, progress=listener.tick), arguments)


def configure_unpack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", metavar="MODEL", help="folder that 'fistapruner pack' wrote")
    parser.add_argument("out", metavar="OUT", help="folder to make")


def unpack(arguments: argparse.Namespace) -> None:
    """Restore the dense checkpoint of a packed one.

    The packed folder is checked: its checksums before the first byte is written, masks and offsets of each operator as
    it is written. A damaged folder leaves nothing behind. Of a model with a low-rank part the sparse checkpoint comes
    back, with the part as OUT/adapter.

      fistapruner unpack packed dense
    """
    listener = choose_listener(arguments)
    from ..packed.pack import unpack as run_unpack

    show(run_unpack(arguments.packed, arguments.out, progress=listener.tick), arguments)


def configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run directory, or folder of a Hugging Face model")
    parser.add_argument("out", metavar="OUT", help="the .gguf file to write")
    parser.add_argument(
        "--values",
        default="bf16",
        choices=("bf16", "f16", "f32", "q8_0"),
        help="how matrices are stored (default: bf16; llama.cpp's own tool makes smaller ones of it)",
    )
    add_common(parser, quiet=False, as_json=False, code=False)


def export(arguments: argparse.Namespace) -> None:
    """Write a model as a GGUF file for llama.cpp.

    For Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Phi-3, Granite, OLMo 2 and Qwen 3 MoE; other models by llama.cpp's
    own convert_hf_to_gguf.py. A model with fewer channels or heads is faster there; zeros are stored like other
    weights.

      fistapruner export runs/small small.gguf
      fistapruner export runs/small small-q8.gguf --values q8_0
      fistapruner export ./pruned pruned.gguf
    """
    listener = choose_listener(arguments)
    from ..packed.export import export as run_export

    settings = {"allow_pickle": arguments.allow_pickle, "progress": listener.tick}
    show(run_export(arguments.model, arguments.out, arguments.values, **settings), arguments)
