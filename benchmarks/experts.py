"""How much memory and time does it take to remove a quarter of the experts of a mixture of real size?

    python benchmarks/experts.py --shape qwen3-30b-a3b --out runs/experts --json benchmarks/results/experts.json

Weights are random and the decoder layers few, but each has the real shape: memory is that of one layer, and time that
of one layer for each. Quality is not measured here: a random mixture has none. Writes the model, prunes it with
``--structure experts=25%``, and exports the result as GGUF.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from fistapruner.models.source import resolve_model

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def make(shape: dict[str, Any], layers: int, folder: Path) -> None:
    """Write a mixture with random weights and the tokenizer of the small model; its vocabulary is that one's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    known = dict(shape)
    config = AutoConfig.for_model(known.pop("model_type"), **known, num_hidden_layers=layers, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(*arguments: str) -> float:
    """Run a verb in a process of its own; return its seconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fistapruner", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder, out = arguments.out / f"{arguments.shape}-model", arguments.out / f"{arguments.shape}-run"
    if not folder.exists():
        make(SHAPES[arguments.shape], arguments.layers, folder)
    text = ["--calibration", "python", "--samples", "8", "--seqlen", "512", "--evaluate", "none"]
    run("prune", str(folder), "--structure", "experts=25%", *text, "--out", str(out), "--quiet")
    report = json.loads((out / "report.json").read_text())
    file = arguments.out / f"{arguments.shape}.gguf"
    exported = run("export", str(out), str(file)) if arguments.shape != "gpt-oss-20b" else None
    totals = report["totals"]
    found = {
        "shape": arguments.shape,
        "layers": arguments.layers,
        "experts": [report["layers"][0]["removals"][0][key] for key in ("before", "after")],
        "bytes_before": report["model"]["bytes"],
        "bytes_after": totals["checkpoint_bytes"],
        "bytes_of_a_layer": layer_bytes(folder),
        "peak_memory": totals["peak_memory"],
        "seconds": totals["seconds"],
        "seconds_of_a_layer": sum(report["layers"][-1]["seconds"].values()),
        "gguf_seconds": exported,
        "gguf_bytes": file.stat().st_size if file.exists() else None,
        "machine": report["machine"],
        "versions": report["versions"],
        "command": " ".join(["python", "benchmarks/experts.py", *sys.argv[1:]]),
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        rows = [row for row in rows if row["shape"] != arguments.shape]
        arguments.json.write_text(json.dumps([*rows, found], indent=1) + "\n")


def layer_bytes(folder: Path) -> int:
    """Count the bytes of the first decoder layer of a bf16 checkpoint."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys() if "layers.0." in name]  # noqa: SIM118
            count += sum(2 * math.prod(shape) for shape in shapes)
    return count


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
