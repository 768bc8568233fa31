"""Measure a model: perplexity, divergence from the dense model, zero-shot tasks.

MODEL is a model as for 'prune', a packed folder, or a run directory: then the run's checkpoint is compared with the
model it was made from, and the figures are added to RUN/report.json, the page and the model card. Perplexity reads one
decoder layer at a time, so the model may be larger than memory. It depends on --seqlen, and is printed with everything
it depends on. A packed folder is unpacked into a temporary one.

  fistapruner evaluate smollm2 --data wikitext2 --seqlen 1024
  fistapruner evaluate runs/first --data text.txt --windows 60
  fistapruner evaluate runs/first --tasks arc_easy,piqa --tasks-dir tasks
  fistapruner evaluate pruned-folder --against smollm2 --data wikitext2
"""

from __future__ import annotations

import argparse
import json

from ..errors import FistaPrunerError
from .arguments import add_output_arguments, add_trust_arguments, trust

SUMMARY = "perplexity, divergence from the dense model, zero-shot tasks"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="run directory, hub id, local folder, GGUF file, or smollm2")
    parser.add_argument(
        "--against",
        metavar="DENSE",
        help="the dense model: adds its figures, KL divergence and paired tests (default for a run: the model it "
        "was made from; figures against another are not kept with the run)",
    )
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--data",
        help="wikitext2, ptb, c4, python, or a .txt, .raw, .md, .jsonl or .parquet file (default: python, unless "
        "tasks are given)",
    )
    text.add_argument(
        "--seqlen", type=int, metavar="N", help="tokens in a window (default: the model's maximum, at most 2048)"
    )
    text.add_argument("--windows", type=int, metavar="N", help="only the first N windows (default: all)")
    text.add_argument(
        "--bos",
        default="auto",
        choices=("auto", "none", "text", "window"),
        help="position of the BOS token: auto is 'window' for tokenizers that add one, else 'none'; 'text' puts "
        "it once before the whole text, as the scripts of most papers do",
    )
    tasks = parser.add_argument_group("zero-shot tasks")
    tasks.add_argument(
        "--tasks", metavar="A,B,...", help="lm-eval tasks (extra 'eval'); with --tasks-dir names of its files, or all"
    )
    tasks.add_argument(
        "--tasks-dir",
        metavar="DIR",
        help="folder of local .jsonl tasks, all of them without --tasks; needs the extra 'eval' and no network",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    work = parser.add_argument_group("execution")
    work.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    work.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision (default: the checkpoint's, or float32 on CPUs slow with it)",
    )
    work.add_argument("--batch-size", type=int, metavar="N", help="windows in one forward pass (default: by device)")
    work.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="main memory to use; hidden states that take more than half of it go to a file (default: what is free)",
    )
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..measure.evaluate import evaluate
    from ..measure.run import evaluate_run
    from ..reporting.measured import evaluation_text
    from ..runs.records import is_run
    from ..runs.results import Evaluation

    tasks = [task.strip() for task in (arguments.tasks or "").split(",") if task.strip()]
    if arguments.tasks is not None and not tasks:
        raise FistaPrunerError(f"--tasks {arguments.tasks!r} names no task: write names separated by commas")
    data = arguments.data
    if data is None and not tasks and arguments.tasks_dir is None:
        data = "python"
    settings = {
        "seqlen": arguments.seqlen,
        "windows": arguments.windows,
        "against": arguments.against,
        "tasks": tasks,
        "tasks_dir": arguments.tasks_dir,
        "limit": arguments.limit,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "memory_limit": arguments.memory_limit,
        "bos": arguments.bos,
        **trust(arguments),
        "tick": listener.tick,
    }
    done: list[Evaluation] = []
    try:
        if is_run(arguments.model):
            done = [evaluate_run(arguments.model, data, listener=listener, **settings)]
        else:
            done = [evaluate(arguments.model, data, keep=done.append, **settings)]
    finally:  # where tasks fail, what was measured before them
        for result in done:
            print(json.dumps(result.to_dict(), indent=2) if arguments.json else evaluation_text(result))
    return 0
