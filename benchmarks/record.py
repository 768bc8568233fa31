"""Does this version prune, train and align as the recorded one did?

    python benchmarks/record.py make record.json --data DATA                  # go through all runs, or go on
    python benchmarks/record.py make now.json --data DATA --only "alps*"      # some of them, by name
    python benchmarks/record.py compare benchmarks/results/record.json now.json

Every run uses SmolLM2-135M, 16 calibration windows of 1,024 tokens of C4, seed 0, one thread, and is measured on the
first four windows of WikiText-2's test split. Recorded are the SHA-256 of the checkpoint's tensors, the relative error
of every operator and the perplexity; of training the held-out loss. ``compare`` prints both versions of every run that
both records have. It exits with status 1 where an operator's error differs by more than 0.1 %, perplexity by more than
0.3 % or a held-out loss by more than 1 %. Bits depend on the processor and on torch: hashes are for one machine.

DATA holds c4/*.jsonl and wikitext2/test_joined.txt, as for ``benchmarks/quality.py``. ``swap`` prunes ``k_proj`` only:
its exact exchanges on every operator of the model would take hours on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

METHODS = ["magnitude", "wanda", "sparsegpt", "admm", "alps", "fista", "proximal", "wanda+refit"]
PRESETS = ["best", "fast", "fista", "paper", "paper-sparsegpt"]
PATTERNS = ["50%", "2:4"]
TRAINED = {pattern: f"proximal {pattern}" for pattern in PATTERNS}
"""The runs whose models are recovered and aligned."""

RUNS: dict[str, list[str]] = {
    **{f"{method} {p}": ["prune", "--method", method, "--sparsity", p] for p in PATTERNS for method in METHODS},
    **{
        f"alps+swap {p}": ["prune", "--method", "alps+swap", "--sparsity", p, "--set", "targets=[k_proj]"]
        for p in PATTERNS
    },
    **{f"recipe {name} {p}": ["prune", "--recipe", name, "--sparsity", p] for p in PATTERNS for name in PRESETS},
    **{
        f"structure {method}": ["prune", "--structure", "25%", "--set", f"structure.method={method}"]
        for method in ("obs", "energy", "flap", "magnitude", "goa")
    },
    "structure bypass": [
        "prune",
        "--structure",
        "25%",
        "--set",
        "structure.method=bypass",
        "--set",
        "structure.steps=20",
    ],
    **{
        f"recover {form} {p}": ["recover", "--parameters", form, "--tokens", "16k"]
        for p in PATTERNS
        for form in ("lora", "full")
    },
    "align 50%": ["align", "--steps", "8"],
}
"""Name of a run: verb and arguments."""

TOLERANCES = {"relative error": 0.001, "perplexity": 0.003, "held-out loss": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make")
    make.add_argument("record", type=Path)
    make.add_argument("--data", type=Path, required=True)
    make.add_argument("--runs", type=Path, default=Path("runs/record"), help="run directories, kept")
    make.add_argument("--only", action="append", help="names of runs, * allowed")
    compare = verbs.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "compare":
        sys.exit(compare_records(*(json.loads(path.read_text()) for path in (arguments.before, arguments.after))))
    record = json.loads(arguments.record.read_text()) if arguments.record.exists() else about()
    for name, command in RUNS.items():
        wanted = any(fnmatch(name, pattern) for pattern in arguments.only or ["*"])
        if wanted and name not in record["runs"]:
            record["runs"][name] = run(name, command, arguments.data, arguments.runs)
            arguments.record.write_text(json.dumps(record, indent=1) + "\n")
            print(name, {key: value for key, value in record["runs"][name].items() if key != "errors"}, flush=True)


def about() -> dict[str, Any]:
    """Describe the machine and the version."""
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {"commit": commit, "cpu": cpu, "torch": torch.__version__, "runs": {}}


def run(name: str, command: list[str], data: Path, runs: Path) -> dict[str, Any]:
    """Make one run and read its results."""
    verb, *options = command
    out = folder(runs, name)
    calibration = str(next((data / "c4").glob("*.jsonl")))
    text = ["--evaluate", str(data / "wikitext2" / "test_joined.txt"), "--evaluate-windows", "4"]
    pruned = folder(runs, TRAINED[name.rsplit(maxsplit=1)[-1]]) if verb != "prune" else None
    if verb == "prune":
        size = ["--calibration", calibration, "--samples", "16", "--seqlen", "1024"]
        options = ["smollm2", *size, "--seed", "0", *options, *text]
    elif verb == "recover":
        options = [str(pruned), "--data", calibration, "--set", "data.seqlen=512", "--seed", "0", *options, *text]
    else:
        options = [str(pruned), "--data", str(pairs_file(runs, Path(calibration))), "--seed", "0", *options, *text]
    begin = time.perf_counter()
    arguments = [sys.executable, "-m", "fistapruner", verb, *options, "--out", str(out), "--quiet", "--json"]
    threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(arguments, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    report = json.loads((out / "report.json").read_text())
    found = {"seconds": round(time.perf_counter() - begin), "sha256": weights_sha256(out / "model")}
    if report["evaluations"]:
        found["perplexity"] = report["evaluations"][-1]["perplexity"]["perplexity"]
    if verb == "prune":
        operators = {f"{layer['index']}.{op['name']}": op for layer in report["layers"] for op in layer["operators"]}
        found["errors"] = {key: op["relative_error"] for key, op in operators.items()}
    else:
        found["held_out"] = min(check["held_out"] for check in report["recovery"]["checks"])
    if name not in TRAINED.values():
        shutil.rmtree(out)
    return found


def folder(runs: Path, name: str) -> Path:
    """Return the run directory of a run."""
    return runs / name.replace(" ", "-").replace(":", "of").replace("%", "")


def pairs_file(runs: Path, calibration: Path) -> Path:
    """Write 64 preference pairs: how a document goes on, and how another one does."""
    path = runs / "pairs.jsonl"
    if not path.exists():
        documents = [json.loads(line)["text"].split() for line in calibration.read_text().splitlines()]
        documents = [words for words in documents if len(words) > 80][:65]
        rows = [
            {"prompt": " ".join(words[:40]), "chosen": " ".join(words[40:80]), "rejected": " ".join(other[40:80])}
            for words, other in itertools.pairwise(documents)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights_sha256(folder: Path) -> str:
    """Hash every tensor of a checkpoint by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def compare_records(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs between two records; returns 1 where that is more than the tolerances."""
    worst = 0
    print(f"{'run':28} {'bits':9} {'largest error change':>21} {'mean':>8} {'perplexity':>25} {'held-out loss':>19}")
    for name in (name for name in before["runs"] if name in after["runs"]):
        old, new = before["runs"][name], after["runs"][name]
        changes = [new["errors"][key] / max(error, 1e-12) - 1 for key, error in old.get("errors", {}).items()]
        largest = max(changes, key=abs, default=0.0)
        differ = [abs(largest) > TOLERANCES["relative error"]]
        cells = []
        for key, limit in (("perplexity", TOLERANCES["perplexity"]), ("held_out", TOLERANCES["held-out loss"])):
            pair = old.get(key), new.get(key)
            differ.append(None not in pair and abs(pair[1] / pair[0] - 1) > limit)
            cells.append(f"{pair[0]:.4f} {pair[1]:.4f}" if None not in pair else "")
        worst |= any(differ)
        mean = sum(changes) / len(changes) if changes else 0.0
        bits = "same" if old.get("sha256") == new.get("sha256") else "differ"
        flag = "  <- too far" if any(differ) else ""
        print(f"{name:28} {bits:9} {largest:>20.4%} {mean:>9.4%} {cells[0]:>25} {cells[1]:>19}{flag}")
    return worst


if __name__ == "__main__":
    main()
