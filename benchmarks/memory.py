"""How does the memory of a run grow with the model? Prunes checkpoints of random weights and real shapes.

    python benchmarks/memory.py depth    # 6, 24 and 48 layers of one width: the same peak (--plot FILE: as curves)
    python benchmarks/memory.py large    # a 7B-shaped checkpoint under a memory limit far below its size
    python benchmarks/memory.py paper    # LLaMA-70B shapes, by the plan's own calculation
    python benchmarks/memory.py gpu      # Llama-3-8B shapes and the default on a stand-in GPU, by the same calculation

Each run is a process of its own; its peak is the resident set's high-water mark that the kernel kept (VmHWM). Curves
are samples of the resident set, ten a second, from the process's start to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "vocab_size": 8192},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("depth", "large", "paper", "gpu"))
    parser.add_argument(
        "--layers", type=int, default=12, help="decoder layers of the large checkpoint (default: %(default)s)"
    )
    parser.add_argument("--limit", default="3GiB", help="its memory limit (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--dense-target", default="dense", help="as of 'fistapruner prune' (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="write the memory curves here (depth, large)")
    parser.add_argument("--folder", type=Path, help="where checkpoints and runs are put (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.what == "depth":
            depth(Path(folder), arguments)
        elif arguments.what == "large":
            large(Path(folder), arguments)
        elif arguments.what == "paper":
            paper(Path(folder), arguments)
        else:
            gpu(Path(folder), arguments)


def depth(folder: Path, arguments: argparse.Namespace) -> None:
    """Peaks of three depths."""
    peaks, curves = {}, {}
    for layers in (6, 24, 48):
        model = write_checkpoint(folder / f"model-{layers}", "small", layers)
        report, curves[f"{layers} layers, checkpoint {size_of(model) / GIB:.2f} GiB"] = prune(
            model, folder / f"run-{layers}", arguments
        )
        peaks[layers] = report["totals"]["peak_memory"]
        print(f"{layers:3d} layers, checkpoint {size_of(model) / GIB:.3f} GiB: {describe(report)}", flush=True)
    spread = max(peaks.values()) / min(peaks.values()) - 1
    print(f"largest peak over smallest: +{100 * spread:.2f} %")
    if arguments.plot:
        plot(curves, {}, arguments.plot)


def large(folder: Path, arguments: argparse.Namespace) -> None:
    """A checkpoint that does not fit the limit."""
    model = write_checkpoint(folder / "model", "7b", arguments.layers)
    report, curve = prune(model, folder / "run", arguments, "--set", f"execution.memory_limit={arguments.limit}")
    print(
        f"7B shapes, {arguments.layers} layers, checkpoint {size_of(model) / GIB:.2f} GiB, limit {arguments.limit}: "
        f"{describe(report)}"
    )
    print(
        f"time {report['totals']['seconds']:.0f} s, zeros "
        f"{report['totals']['operator_zeros'] / report['totals']['operator_weights']:.4%}"
    )
    if arguments.plot:
        from fistapruner.settings.parse import parse_bytes

        lines = {
            f"checkpoint, {size_of(model) / GIB:.2f} GiB": size_of(model),
            f"limit, {arguments.limit}": parse_bytes(arguments.limit),
        }
        plot({f"7B shapes, {arguments.layers} layers": curve}, lines, arguments.plot)


def paper(folder: Path, arguments: argparse.Namespace) -> None:
    """Peak of LLaMA-70B shapes as a run would plan it."""
    from fistapruner.planning import Choice

    model = write_checkpoint(folder / "model", "70b", 80, holes=True)
    settings = {"method": arguments.method, "propagate": "dense", "dense_target": arguments.dense_target}
    sizes = planned(model, "cpu", "50%", settings, arguments)
    print(
        f"LLaMA-70B shapes, checkpoint {size_of(model) / GIB:.0f} GiB, {arguments.method}, {arguments.samples} x "
        f"{arguments.seqlen} tokens"
    )
    choice = Choice(1, on_disk=True)
    stages = sizes.stages(choice)
    worst = max(stages, key=lambda name: stages[name])
    print(f"{choice}: peak {stages[worst] / GIB:.1f} GiB, {worst}; {sizes.disk(choice, 1) / GIB:.0f} GiB of disk")


def gpu(folder: Path, arguments: argparse.Namespace) -> None:
    """Peaks of Llama-3-8B shapes and the default method on a stand-in GPU, as a run would plan them."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from fistapruner.planning import Choice
    from standin.gpu import StandIn

    # Every layer is alike, so two say what all need but for the disk, which grows with them.
    model, two = (write_checkpoint(folder / f"model-{layers}", "8b", layers, holes=True) for layers in (32, 2))
    with StandIn(1):
        sizes = planned(two, "cuda:0", "2:4", {}, arguments)
    layers = 2 * size_of(model) - 2 * size_of(two)  # in the run's layer files and in its checkpoint
    print(
        f"Llama-3-8B shapes, checkpoint {size_of(model) / GIB:.0f} GiB, {arguments.samples} x {arguments.seqlen} tokens"
    )
    for choice in (Choice(4), Choice(4, on_disk=True)):
        on_gpu, in_main = (max(found.values()) / GIB for found in (sizes.stages(choice), sizes.host(choice)))
        disk = (sizes.disk(choice, 1) + layers) / GIB
        print(f"{choice}: {on_gpu:.1f} GiB of GPU memory, {in_main:.1f} GiB of main memory, {disk:.0f} GiB of disk")


def planned(model: Path, device: str, pattern: str, settings: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """Sizes of a run, of a checkpoint that may be a file of holes: sizes without bytes."""
    from fistapruner import Recipe
    from fistapruner.core import parse_sparsity
    from fistapruner.models.checkpoint import Checkpoint
    from fistapruner.models.layers import LayerwiseModel
    from fistapruner.models.operators import discover
    from fistapruner.passes.store import scratch_factory
    from fistapruner.planning import Bound
    from fistapruner.pruning.context import LayerContext

    skeleton = LayerwiseModel(Checkpoint.open(model), torch.device(device))
    layout = discover(skeleton)
    recipe = Recipe.build(
        {**settings, "calibration": {"samples": arguments.samples, "seqlen": arguments.seqlen}}
    ).resolved()
    sparsity = {name: parse_sparsity(pattern) for name, _ in layout.operators()}
    return Bound(LayerContext(skeleton, layout, recipe, sparsity, scratch=scratch_factory(None, skeleton.dtype)))


def write_checkpoint(folder: Path, shape: str, layers: int, *, holes: bool = False) -> Path:
    """A Llama checkpoint of random bf16 weights, written tensor by tensor; with ``holes``, of zeros that take no
    disk."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fistapruner.models.safetensors import LazyTensors, TensorEntry, write_tensors

    folder.mkdir(parents=True)
    settings = {
        **SHAPES[shape],
        "num_hidden_layers": layers,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    config = LlamaConfig(**settings)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with init_empty_weights():
        names = {
            name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    entries = [TensorEntry.of(name, torch.bfloat16, sizes) for name, sizes in names.items()]
    generator = torch.Generator().manual_seed(0)
    if holes:
        write_holes(folder / "model.safetensors", entries)
        return folder

    def drawn(name: str) -> torch.Tensor:
        sizes = names[name]
        tensor = torch.ones(sizes) if len(sizes) == 1 else torch.randn(sizes, generator=generator) * sizes[-1] ** -0.5
        return tensor.to(torch.bfloat16)

    tensors = LazyTensors({entry.name: entry for entry in entries}, drawn)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_holes(path: Path, entries: list[Any]) -> None:
    """A safetensors file whose data is one hole."""
    header, end = {}, 0
    for entry in entries:
        header[entry.name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: the text does not matter here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        symbol: 3 + i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


Curve = list[tuple[float, int]]
"""(seconds since the start, resident bytes)."""


def prune(model: Path, out: Path, arguments: argparse.Namespace, *more: str) -> tuple[dict[str, Any], Curve]:
    """Run the command line in a process of its own; its report and its memory."""
    command = [
        sys.executable,
        "-m",
        "fistapruner",
        "prune",
        str(model),
        "--out",
        str(out),
        "--calibration",
        "python",
        "--device",
        "cpu",
    ]
    command += [
        "--method",
        arguments.method,
        "--set",
        "propagate=dense",
        "--set",
        f"dense_target={arguments.dense_target}",
        "--evaluate",
        "none",
    ]
    command += ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen)]
    begin, curve = time.perf_counter(), []
    with psutil.Popen(
        [*command, *more], stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as process:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                curve.append((time.perf_counter() - begin, process.memory_info().rss))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report, curve


def plot(curves: dict[str, Curve], lines: dict[str, int], path: Path) -> None:
    """Resident memory over time, with horizontal lines for other sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for label, curve in curves.items():
        axes.plot([seconds for seconds, _ in curve], [size / GIB for _, size in curve], label=label)
    for (label, size), style in zip(lines.items(), ("--", ":"), strict=False):
        axes.axhline(size / GIB, color="black", linestyle=style, label=label)
    axes.set(xlabel="seconds", ylabel="resident memory, GiB")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, loc="upper right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def describe(report: dict[str, Any]) -> str:
    return f"peak {report['totals']['peak_memory'] / GIB:.3f} GiB"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
