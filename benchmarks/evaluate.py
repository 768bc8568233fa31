"""How much does evaluation cost beyond the forward passes it needs?

Times, in one process and alternating, (a) the bare forward passes of the whole model in memory over the same windows
(logits made, nothing done with them), and (b) ``fistapruner``'s streamed perplexity of the same windows, including
reading every decoder layer from the checkpoint. Prints the ratio of each round and of the best times.

    python benchmarks/evaluate.py --model smollm2 --windows 16 --seqlen 1024
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from fistapruner.measure.data import load_windows
from fistapruner.measure.logits import perplexity_of, score_windows
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.source import load_tokenizer, resolve_model
from fistapruner.runtime.numerics import windows_at_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="python", help="as for 'fistapruner evaluate'")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=None)
    arguments = parser.parse_args()

    folder = resolve_model(arguments.model)
    device = torch.device("cpu")
    skeleton = LayerwiseModel(Checkpoint.open(folder), device)
    windows = load_windows(arguments.data, load_tokenizer(folder), arguments.seqlen, arguments.windows)
    size = arguments.batch_size or windows_at_once(arguments.seqlen, device)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=skeleton.dtype).eval()

    def bare() -> None:
        with torch.no_grad():
            for batch in windows.tokens.split(size):
                model(batch, use_cache=False).logits.sum().item()

    times: dict[str, list[float]] = {"bare": [], "evaluation": []}
    sums = score_windows(skeleton, windows.tokens[:size], batch_size=size)
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        bare()
        middle = time.perf_counter()
        sums = score_windows(skeleton, windows.tokens, batch_size=size)
        times["bare"].append(middle - begin)
        times["evaluation"].append(time.perf_counter() - middle)
        print(
            f"bare {times['bare'][-1]:.2f} s, evaluation {times['evaluation'][-1]:.2f} s", file=sys.stderr, flush=True
        )
    text = perplexity_of(sums[0], windows, skeleton.dtype)
    print(
        json.dumps(
            {
                "model": arguments.model,
                "windows": len(windows.tokens),
                "seqlen": windows.seqlen,
                "batch_size": size,
                "dtype": str(skeleton.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "perplexity": text.perplexity,
                "bare_seconds": times["bare"],
                "evaluation_seconds": times["evaluation"],
                "ratio_by_round": [e / b for e, b in zip(times["evaluation"], times["bare"], strict=True)],
                "ratio_of_best": min(times["evaluation"]) / min(times["bare"]),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
