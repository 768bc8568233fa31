"""How much memory and time does it take to remove a quarter of a mixture's experts, and what does it cost?

    python benchmarks/experts.py --shape qwen3-30b-a3b --out runs/experts --json benchmarks/results/experts.json
    python benchmarks/experts.py --train c4.jsonl --out runs/experts --json benchmarks/results/experts.json

``--shape``: weights are random and the decoder layers few, but each has the real shape: memory is that of one layer,
and time that of one layer for each. Writes the model, prunes it with ``--structure experts=25%``, and exports the
result as GGUF. Quality is not measured: a random mixture has none.

``--train``: a mixture of 4 layers with 16 experts of which 4 see a token, and its tokenizer, are trained on nine tenths
of the texts for some minutes. On the last tenth, the perplexities of the dense model and of models without 4 and 8
experts a layer are compared: REAP's choice, three random ones, and REAP's after ``recover`` towards the dense model.
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

import tokenizers
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fistapruner.core.linalg import has_bf16_units
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

WINDOW = 256
TRAINED: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "output_router_logits": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
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


def train(texts: list[str], folder: Path, *, steps: int) -> None:
    """Train a small mixture and its tokenizer, and write both."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=4096, special_tokens=["<|end|>"], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>")
    tokens = torch.tensor(fast("<|end|>".join(texts))["input_ids"])
    tokens = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**TRAINED), dtype=torch.float32)
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        batch = tokens[torch.randint(len(tokens), (16,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_units(torch.device("cpu"))):
            loss = model(batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def keep_random(model: Any, gone: int, seed: int) -> None:
    """Remove experts of a loaded mixture at random, the same number in each layer."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        gate, experts = layer.mlp.gate, layer.mlp.experts
        stay = torch.randperm(experts.num_experts, generator=generator)[gone:].sort().values
        for module, name in ((gate, "weight"), (experts, "gate_up_proj"), (experts, "down_proj")):
            setattr(module, name, torch.nn.Parameter(getattr(module, name).detach()[stay]))
        gate.num_experts = experts.num_experts = len(stay)


def perplexity(model: Any, held_out: Tensor) -> float:
    """Return the perplexity of windows."""
    model.eval().set_experts_implementation("eager")
    with torch.no_grad():
        return math.exp(sum(float(model(row[None], labels=row[None]).loss) for row in held_out) / len(held_out))


def measure_quality(file: Path, out: Path, steps: int) -> dict[str, Any]:
    """Train a small mixture, remove experts of it in several ways, and return the perplexities."""
    texts = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]
    folder, part = out / "trained", len(texts) * 9 // 10
    if not folder.exists():
        train(texts[:part], folder, steps=steps)
    seen = out / "seen.txt"
    seen.write_text("\n\n".join(texts[:part]))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("<|end|>".join(texts[part:]))["input_ids"]
    held_out = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)

    def of(model: Path) -> float:
        return perplexity(AutoModelForCausalLM.from_pretrained(model), held_out)

    budget = ["--tokens", "128k", "--set", "parameters=full", "--set", f"data.seqlen={WINDOW}", "--evaluate", "none"]
    found = {"dense": of(folder)}
    for gone in (4, 8):
        pruned, recovered = out / f"trained-{gone}", out / f"recovered-{gone}"
        text = ["--calibration", str(seen), "--samples", "64", "--seqlen", str(WINDOW), "--evaluate", "none"]
        run("prune", str(folder), "--structure", f"experts={gone}", *text, "--out", str(pruned), "--quiet")
        run("recover", str(pruned), "--data", str(seen), *budget, "--out", str(recovered), "--quiet")
        found[f"{gone} by REAP"] = of(pruned / "model")
        found[f"{gone} by REAP, recovered"] = of(recovered / "model")
        for seed in range(3):
            model = AutoModelForCausalLM.from_pretrained(folder)
            keep_random(model, gone, seed)
            found[f"{gone} at random, seed {seed}"] = perplexity(model, held_out)
    return {"shape": "trained", **TRAINED, "steps": steps, "perplexity": found}


def measure_size(shape: str, layers: int, out: Path) -> dict[str, Any]:
    """Remove a quarter of the experts of a random mixture of real shape; return bytes and seconds."""
    folder, out_run = out / f"{shape}-model", out / f"{shape}-run"
    if not folder.exists():
        make(SHAPES[shape], layers, folder)
    text = ["--calibration", "python", "--samples", "8", "--seqlen", "512", "--evaluate", "none"]
    run("prune", str(folder), "--structure", "experts=25%", *text, "--out", str(out_run), "--quiet")
    report = json.loads((out_run / "report.json").read_text())
    file = out / f"{shape}.gguf"
    exported = run("export", str(out_run), str(file)) if shape != "gpt-oss-20b" else None
    totals = report["totals"]
    return {
        "shape": shape,
        "layers": layers,
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
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=SHAPES)
    what.add_argument("--train", type=Path, help="texts, one JSON object with `text` a line")
    parser.add_argument("--layers", type=int, default=2, help="of --shape")
    parser.add_argument("--steps", type=int, default=600, help="of --train, with 4,096 tokens each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.train:
        found = measure_quality(arguments.train, arguments.out, arguments.steps)
    else:
        found = measure_size(arguments.shape, arguments.layers, arguments.out)
    found["command"] = " ".join(["python", "benchmarks/experts.py", *sys.argv[1:]])
    print(json.dumps(found, indent=1))
    if arguments.json:
        rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        rows = [row for row in rows if row["shape"] != found["shape"]]
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
