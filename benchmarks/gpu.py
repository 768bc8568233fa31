"""Everything that is to be known of a GPU, in one command and about ten minutes.

    python benchmarks/gpu.py                     # cuda:0; writes gpu.json, prints Markdown tables
    python benchmarks/gpu.py --shapes 8B         # some shapes only
    python benchmarks/gpu.py --rehearse          # tiny shapes on a stand-in GPU: does this program work?

1. *Checks*: the tests of ``tests/standin`` for solvers and whole runs, on the real device.
2. *Same bits*: a run twice, and a run that is stopped after a decoder layer and resumed.
3. *Phases*: two random decoder layers of LLaMA's shapes, pruned to 50 % with the default recipe and 2:4 with SparseGPT.
   Seconds of each phase in the second layer, and TFLOP/s of those whose operations are easily counted (:func:`counts`).
4. *Memory*: peak on the device against the plan.
5. *Waits*: how often the host waits for the device in the iterations of the default method.
6. *Whole run*: what passes take grows with the windows, what solving takes does not; times the model's layers.
7. *2:4*: dense against semi-structured products of every operator's shape, decoding and prefill.

What begins after ``--minutes`` is left out, and named as left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FISTAPRUNER_FIGURES", "0")

import fistapruner  # noqa: E402
import tiny  # noqa: E402
from fistapruner.core import LayerProblem  # noqa: E402
from fistapruner.errors import FistaPrunerError  # noqa: E402
from fistapruner.packed.semi_structured import to_semi_structured  # noqa: E402
from fistapruner.pruning.run import plan_pruning  # noqa: E402
from fistapruner.runs.log import Listener  # noqa: E402
from fistapruner.runs.records import LayerEntry, Report  # noqa: E402
from fistapruner.runtime.files import write_json_atomic  # noqa: E402
from fistapruner.runtime.machine import describe_machine, versions  # noqa: E402
from fistapruner.solvers import solve  # noqa: E402
from fistapruner.solvers.proximal import Proximal  # noqa: E402

SAMPLES = 128
"""Calibration windows of a whole run."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA.

    Args:
        width, inner: of hidden states and of the MLP.
        heads, kv: attention heads, and those of keys and values.
        layers: of the whole model; two are built.
    """

    width: int
    inner: int
    heads: int
    kv: int
    layers: int

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of each operator group, stacked."""
        narrow = self.width * self.kv // self.heads
        return [
            (self.width + 2 * narrow, self.width),
            (self.width, self.width),
            (2 * self.inner, self.width),
            (self.width, self.inner),
        ]

    @property
    def weights(self) -> int:
        """Return the number of weights of a layer's operators."""
        return sum(rows * columns for rows, columns in self.groups)


SHAPES = {
    "1B": Shape(2048, 8192, 32, 8, 16),
    "8B": Shape(4096, 14336, 32, 8, 32),
    "70B": Shape(8192, 28672, 64, 8, 80),
}
REHEARSAL = {"tiny": Shape(64, 96, 4, 2, 2)}


def counts(shape: Shape, tokens: int, batch: int, seqlen: int) -> dict[str, float]:
    """Count floating-point operations of phases of one layer with the default recipe.

    Args:
        shape: of the model.
        tokens: calibration tokens.
        batch: tokens in one batch.
        seqlen: tokens in a window.

    Returns:
        ``plain``: one batch through the layer. ``gram``: half a Gram of each group, and its cross term with drift.
        ``solve``: at each of 11 penalties a factorisation and an inverse, the drift's product and 3 iterations; one
        more factorisation; 4 steps of conjugate gradients.
    """
    attention = 2 * seqlen * shape.width  # of a token: two products, half of them masked
    gram = sum(tokens * (n * n + 2 * min(m, n) * n) for m, n in shape.groups)
    solving = sum(12 * n**3 + (11 * (1 + 3) + 4) * 2 * m * n * n for m, n in shape.groups)
    return {"plain": batch * (2.0 * shape.weights + attention), "gram": float(gram), "solve": float(solving)}


def save(folder: Path, shape: Shape, device: torch.device) -> Path:
    """Write two random decoder layers as a bf16 checkpoint."""
    sizes = {
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv,
        "num_hidden_layers": 2,
        "max_position_embeddings": 4096,
    }
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZES, **sizes)).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        drawn = torch.randn(parameter.shape, device=device, generator=generator)
        drawn = drawn / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else torch.ones_like(drawn)
        value = nn.Parameter(drawn.to(torch.bfloat16).cpu(), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, value)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def prune(folder: Path, out: Path, device: torch.device, samples: int, seqlen: int, **settings: Any) -> Report:
    """Prune on random tokens."""
    tokens = torch.randint(3, tiny.VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(0))
    return fistapruner.prune(
        str(folder),
        out,
        calibration={"source": "python", "samples": samples, "seqlen": seqlen},
        execution={"device": str(device)},
        dtype="bfloat16",
        tokens=(tokens, {"source": "random tokens"}),
        **settings,
    )


def sha256(out: Path) -> str:
    """Hash the weights of a finished run."""
    digest = hashlib.sha256()
    for path in sorted((out / "model").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Stopping(Listener):
    """Stops the run after its first layer."""

    def layer(self, entry: LayerEntry) -> None:
        raise KeyboardInterrupt


def same_bits(folder: Path, work: Path, device: torch.device, seqlen: int) -> dict[str, Any]:
    """Compare the bits of two runs, and of one that was stopped and resumed."""
    settings: dict[str, Any] = {"samples": 8, "seqlen": seqlen, "reconstruct": 16}
    hashes = {}
    for name in ("first", "second"):
        prune(folder, work / name, device, **settings)
        hashes[name] = sha256(work / name)
    try:
        prune(folder, work / "resumed", device, listener=Stopping(), **settings)
    except KeyboardInterrupt:
        fistapruner.resume(work / "resumed")
        hashes["resumed"] = sha256(work / "resumed")
    return {"sha256": hashes, "same": len(hashes) == 3 and len(set(hashes.values())) == 1}


def phases(name: str, shape: Shape, work: Path, device: torch.device, samples: int, seqlen: int) -> dict[str, Any]:
    """Prune two layers of a shape, with the default recipe and with SparseGPT; measure time and memory."""
    folder = save(work / name, shape, device)
    found: dict[str, Any] = {}
    for recipe, settings in {
        "default, 50%": {"method": "proximal", "sparsity": "50%"},
        "sparsegpt, 2:4": {"method": "sparsegpt", "sparsity": "2:4"},
    }.items():
        out = work / f"{name} {recipe.replace(', ', ' ').replace(':', '')}"
        begin = time.perf_counter()
        report = prune(folder, out, device, samples, seqlen, **settings)
        decision = json.loads((out / "run.json").read_text("utf-8"))["decision"]
        batch = min(decision["numerics"]["batch_size"], samples)
        seconds = report.layers[1].seconds  # the first layer warms up
        passing = sum(seconds.get(phase, 0.0) for phase in ("io", "capture", "gram"))
        fixed = sum(seconds.values()) - passing
        operations = counts(shape, samples * seqlen, batch * seqlen, seqlen)
        planned = plan_pruning(folder, fistapruner.Recipe.build(report.recipe)).device_memory
        measuring = decision["seconds"].get("sensitivity", 0.0) / 2 * shape.layers
        found[recipe] = {
            "seconds": seconds,
            "windows": samples,
            "batch_size": batch,
            "tflops": {
                phase: operations[phase] / seconds[phase] / 1e12
                for phase in (("plain", "gram", "solve") if recipe.startswith("default") else ("plain", "gram"))
                if seconds.get(phase)
            },
            "whole run, seconds": (passing * SAMPLES / samples + fixed) * shape.layers + measuring,
            "measuring the dense model, seconds": measuring,
            "planned": max(planned.values(), default=None),
            "peak": report.totals.peak_device_memory,
            "wall": time.perf_counter() - begin,
        }
    return found


@contextmanager
def counted_waits(device: torch.device, found: dict[str, Any]) -> Iterator[None]:
    """Count how often the host waits for the device inside the block, and the seconds that the block takes."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    found["waits"] = sum("called a synchronizing" in str(one.message) for one in caught)
    found["seconds"] = time.perf_counter() - begin


def waits(device: torch.device) -> dict[str, Any]:
    """Count how often the host waits in 3 and in 6 iterations at each penalty: no more often, if it waits for none."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 256, generator=generator)
    problem = LayerProblem(torch.randn(128, 256, generator=generator), inputs.T @ inputs / 512).to(device)
    found: dict[str, Any] = {}
    for steps in (3, 6):
        with counted_waits(device, found.setdefault(f"{steps} iterations", {})):
            solve(problem, "50%", Proximal(steps=steps))
    return found


def semi_structured(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Time dense and semi-structured products of each operator group, with one token and with 2,048."""
    rows = []
    for outputs, inputs in shape.groups:
        for tokens in (1, 2048):
            linear = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.float16)
            with torch.no_grad():
                linear.weight[:, 0::4] = 0
                linear.weight[:, 1::4] = 0
            (said,) = to_semi_structured(nn.Sequential(linear), tokens=tokens).values()
            rows.append({"shape": [outputs, inputs], "tokens": tokens, "says": said})
    return rows


def checks() -> dict[str, Any]:
    """Run the tests for stand-in GPUs on the real ones."""
    names = [f"tests/standin/test_{what}_on_gpu.py" for what in ("solvers", "runs")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *names]
    environment = {**os.environ, "REAL_GPU": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "says": lines[-1] if lines else done.stderr[-300:], "failed": failed}


def table(result: dict[str, Any]) -> Iterator[str]:
    """Write the results as Markdown."""
    yield f"{result['machine']['device_name']}, torch {result['versions']['torch']}"
    for name in ("checks", "same bits", "waits", "left out"):
        if name in result:
            yield f"{name}: {json.dumps(result[name])}"
    yield ""
    yield "| shape | recipe | seconds a layer, by phase | TFLOP/s | peak / plan, GiB | whole run, min |"
    yield "|---|---|---|---|---|---|"
    for name, recipes in result.get("phases", {}).items():
        for recipe, row in recipes.items():
            seconds = ", ".join(f"{phase} {value:.2f}" for phase, value in row["seconds"].items())
            speed = ", ".join(f"{phase} {value:.3g}" for phase, value in row["tflops"].items())
            memory = " / ".join("-" if row[key] is None else f"{row[key] / 2**30:.2f}" for key in ("peak", "planned"))
            yield f"| {name} | {recipe} | {seconds} | {speed} | {memory} | {row['whole run, seconds'] / 60:.1f} |"
    yield ""
    yield "| shape | operator | tokens | 2:4 against dense |"
    yield "|---|---|---|---|"
    for name, rows in result.get("2:4", {}).items():
        for row in rows:
            yield f"| {name} | {row['shape'][0]} x {row['shape'][1]} | {row['tokens']} | {row['says']} |"


@contextmanager
def stage(result: dict[str, Any], name: str, stop: float, out: Path) -> Iterator[bool]:
    """Give whether there is time for a stage; keep going where it fails; write the results in any case."""
    enough = time.perf_counter() <= stop
    if enough:
        print(f"{name} ...", file=sys.stderr, flush=True)
    else:
        result.setdefault("left out", {})[name] = "no time left"
    try:
        yield enough
    except (FistaPrunerError, RuntimeError, NotImplementedError) as error:
        result.setdefault("left out", {})[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        write_json_atomic(out, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--samples", type=int, default=8, help="calibration windows that are timed")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a stand-in GPU, without the tests")
    arguments = parser.parse_args()
    shapes = REHEARSAL if arguments.rehearse else {name: SHAPES[name] for name in arguments.shapes}
    samples, seqlen = (4, 32) if arguments.rehearse else (arguments.samples, arguments.seqlen)
    stop = time.perf_counter() + 60 * arguments.minutes
    from standin.gpu import StandIn

    with StandIn() if arguments.rehearse else nullcontext(), tempfile.TemporaryDirectory() as temporary:
        if not torch.cuda.is_available():
            raise SystemExit("PyTorch sees no CUDA GPU on this machine: --rehearse runs on a stand-in")
        work, device = Path(temporary), torch.device(arguments.device)
        machine = describe_machine(device).model_dump(mode="json")
        result: dict[str, Any] = {"machine": machine, "versions": versions(), "phases": {}, "2:4": {}}
        with stage(result, "checks", stop, arguments.out) as go:
            if go and not arguments.rehearse:
                result["checks"] = checks()
        with stage(result, "same bits", stop, arguments.out) as go:
            if go:
                small = save(work / "small", next(iter(shapes.values())), device)
                result["same bits"] = same_bits(small, work, device, min(seqlen, 512))
        with stage(result, "waits", stop, arguments.out) as go:
            if go:
                result["waits"] = waits(device)
        for name, shape in shapes.items():
            with stage(result, f"phases of {name}", stop, arguments.out) as go:
                if go:
                    result["phases"][name] = phases(name, shape, work, device, samples, seqlen)
            with stage(result, f"2:4 of {name}", stop, arguments.out) as go:
                if go:
                    result["2:4"][name] = semi_structured(shape, device)
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
