"""Which solver leaves the lowest layer error, and what does it cost?

On real Grams (gathered by the benchmark itself), each solver prunes each operator of some decoder layers at each
sparsity. Errors and times are given as ratios to what the public ALPS program computes on the same Gram in the same
run. The Gram is taken as exact (no shrinkage for its sampling error): what is compared is the optimisation. --held-out
judges the weights on the Gram of other text instead, with the shrinkage that a run has.

    python benchmarks/layer_error.py
    python benchmarks/layer_error.py --layers 14 --sparsity 50%,2:4 --methods wanda,sparsegpt,proximal
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import real_problems
import torch
from alps_reference import alps_reference

from fistapruner.core import parse_sparsity
from fistapruner.runtime.files import write_json_atomic
from fistapruner.solvers import solve

METHODS = "magnitude,wanda,wanda+refit,sparsegpt,sparsegpt+refit,admm,admm+refit,fista,fista+refit,alps,proximal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real_problems.add_arguments(parser)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--sparsity", default="50%,60%,70%,2:4,4:8")
    parser.add_argument("--operators", default="", help="only those whose name contains this")
    parser.add_argument("--held-out", action="store_true", help="judge on the Gram of the text's last third")
    parser.add_argument("--json", type=Path, help="write every single figure to this file, after each operator")
    arguments = parser.parse_args()
    problems = {name: p for name, p in real_problems.load(arguments).items() if arguments.operators in name}
    judges = real_problems.load(arguments, held_out=True) if arguments.held_out else problems
    if not arguments.held_out:
        problems = {name: dataclasses.replace(problem, tokens=None) for name, problem in problems.items()}
    methods = arguments.methods.split(",")
    rows: list[dict[str, Any]] = []
    solve(next(iter(problems.values())), "50%", "proximal")  # warm up the thread pool and the product kernels
    for name, problem in problems.items():
        for text in arguments.sparsity.split(","):
            pattern = parse_sparsity(text)
            judge, begin = judges[name], time.perf_counter()
            weight, _ = alps_reference(problem.weight, problem.gram, pattern)
            seconds = time.perf_counter() - begin
            reference = judge.relative_error(weight)
            for method in methods:
                begin = time.perf_counter()
                solution = solve(problem, pattern, method)
                took = time.perf_counter() - begin
                rows.append(
                    {
                        "operator": name,
                        "sparsity": text,
                        "method": method,
                        "ratio": judge.relative_error(solution.weight) / reference,
                        "reference": reference,
                        "time": took / seconds,
                        "reference_seconds": seconds,
                    }
                )
            line = " ".join(f"{row['method']} {row['ratio']:.3f}" for row in rows[-len(methods) :])
            print(f"{name} {text}: public ALPS {seconds:.2f} s; error ratios: {line}", flush=True)
            if arguments.json:
                write_json_atomic(arguments.json, rows)
    print(f"\nRatios to the public ALPS program, {torch.get_num_threads()} threads, {len(problems)} operators")
    print(f"{'method':<18}{'error (mean)':>13}{'worst':>8}{'time (mean)':>13}{'worst':>8}{'of all':>9}")
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        ratios = [row["ratio"] for row in mine]
        times = [row["time"] for row in mine]
        share = sum(row["time"] * row["reference_seconds"] for row in mine) / sum(
            row["reference_seconds"] for row in mine
        )
        print(
            f"{method:<18}{statistics.mean(ratios):>13.4f}{max(ratios):>8.3f}{statistics.mean(times):>13.4f}{max(times):>8.3f}{share:>9.4f}"
        )


if __name__ == "__main__":
    main()
