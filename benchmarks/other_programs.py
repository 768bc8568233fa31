"""Are the published methods here as good as in the programs that people prune with?

One checkpoint is pruned on the same calibration windows by another program, by the method of the same name here as that
program applies it (without error correction inside a layer), and by the same method as ``prune`` applies it. All three
are measured on the same text. The other program runs in a process of its own, and in an environment of its own if
``--python`` names one: llm-compressor has ``sparsegpt`` and ``wanda``; fmchisel has ``alps`` and needs transformers
4.51. Printed are perplexity and gap = ln(perplexity) - ln(dense perplexity). What is finished in OUT is kept: the same
command goes on.

    python benchmarks/other_programs.py --data DATA --out runs/others --methods sparsegpt,wanda --sparsity 50%,2:4
    python benchmarks/other_programs.py --data DATA --out runs/others --methods alps --python fmchisel-env/bin/python

DATA holds c4/*.jsonl (calibration text) and wikitext2/test_joined.txt (the test split joined by blank lines).
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = {"sparsegpt": "llm-compressor", "wanda": "llm-compressor", "alps": "fmchisel"}
LAYERS = r"re:model.layers.\d+$"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, type=Path, help="folder of texts")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--methods", default="sparsegpt", help=f"of {', '.join(PROGRAMS)}; commas between")
    parser.add_argument("--sparsity", default="50%,2:4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the other program")
    arguments = parser.parse_args()
    python = shutil.which(arguments.python)
    for method in arguments.methods.split(","):
        if method not in PROGRAMS:
            parser.error(f"--methods: {method!r} is none of {', '.join(PROGRAMS)}")
        module = PROGRAMS[method].replace("-", "")
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if python is None or subprocess.run([python, "-c", look], check=False).returncode:
            parser.error(f"--python {arguments.python}: no interpreter that has {PROGRAMS[method]}")
    import real_problems  # not above: the interpreter of the other program may not have this package

    import fistapruner as fp
    from fistapruner.runs.directory import PruneDirectory

    calibration = {
        "source": str(real_problems.calibration_files(arguments.data)[0]),
        "samples": arguments.samples,
        "seqlen": arguments.seqlen,
    }
    text = str(arguments.data / "wikitext2" / "test_joined.txt")
    print(f"{'sparsity':>8}  {'method':<10} {'by':<34} {'perplexity':>10}  {'gap':>6}")
    for method in arguments.methods.split(","):
        for sparsity in arguments.sparsity.split(","):
            name = f"{method}-{sparsity.replace(':', '-').replace('%', '')}"
            for correction in (False, True):
                run = arguments.out / f"{name}{'-corrected' if correction else ''}"
                report = fp.prune(
                    arguments.model,
                    run,
                    sparsity=sparsity,
                    method=method,
                    calibration=calibration,
                    error_correction=correction,
                    evaluate=text,
                    evaluate_windows=arguments.windows,
                )
                by = f"fistapruner{'' if correction else ', no error correction'}"
                show(sparsity, method, by, report.evaluations[-1])
            theirs = arguments.out / f"{name}-elsewhere"
            if not (theirs / "config.json").is_file():
                dense = PruneDirectory(run).begun_record().decision.folder
                words = [dense, run / "calibration.safetensors", theirs, method, sparsity]
                subprocess.run([arguments.python, __file__, "--elsewhere", *map(str, words)], check=True)
            found = fp.evaluate(
                theirs, text, seqlen=arguments.seqlen, windows=arguments.windows, against=arguments.model
            )
            show(sparsity, method, PROGRAMS[method], found)


def show(sparsity: str, method: str, by: str, found: Any) -> None:
    """Print the line of one model from its evaluation."""
    perplexity, dense = found.perplexity.perplexity, found.reference.perplexity
    gap = math.log(perplexity / dense)
    print(f"{sparsity:>8}  {method:<10} {by:<34} {perplexity:>10.2f}  {gap:>6.3f}", flush=True)


def prune_elsewhere(folder: str, windows: str, out: str, method: str, sparsity: str) -> None:
    """Prune a checkpoint with another program, on windows of token ids.

    Args:
        folder: the dense checkpoint.
        windows: the ``calibration.safetensors`` of a run.
        out: the pruned checkpoint.
        method: one of :data:`PROGRAMS`.
        sparsity: a share such as ``50%``, or 2:4 or 4:8.
    """
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_file(windows)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    share = None if ":" in sparsity else float(sparsity.rstrip("%")) / 100
    settings = {
        "targets": [LAYERS],
        "ignore": ["re:.*lm_head"],
        "sparsity": 0.5 if share is None else share,
        "mask_structure": "0:0" if share is not None else sparsity,
    }
    if method == "alps":
        from fmchisel.pruning.alps.base import ALPSModifier

        modifier, how = ALPSModifier(**settings, sequential_update=True), {}
    else:
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

        modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method](**settings)
        how = {"pipeline": "sequential", "shuffle_calibration_samples": False}
    seqlen = tokens.shape[1]
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=modifier,
        max_seq_length=seqlen,
        num_calibration_samples=len(tokens),
        **how,
    )
    model.save_pretrained(out, save_compressed=False, disable_sparse_compression=True)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--elsewhere"]:
        prune_elsewhere(*sys.argv[2:])
    else:
        main()
