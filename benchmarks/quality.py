"""How much of ALPS's gap do our settings leave, and at what share of SparseGPT's time?

gap = ln(perplexity) - ln(dense perplexity). Every setting is pruned and measured by ``fistapruner compare`` with one
calibration set for each seed; ALPS and SparseGPT run as published (pruned hidden states, pruned targets) but for error
correction inside a layer, which their programs lack. Printed are, for each setting and sparsity, the gap, its ratio to
ALPS's gap and the whole run's time as a multiple of SparseGPT's, all of this one comparison. Finished runs are kept:
the same command goes on.

    python benchmarks/quality.py --data DATA --out runs/quality --sparsity 50%,2:4 --seeds 0,1,2
    python benchmarks/quality.py --data DATA --out runs/search \\
        --settings proximal@residual=none,proximal@allocation=uniform

DATA holds c4/*.jsonl (training text) and wikitext2/test_joined.txt (the test split joined by blank lines). Without it,
text that comes with Python is used for both; the numbers are then of that text.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean
from typing import Any

import real_problems

from fistapruner.cli.progress import choose_listener
from fistapruner.comparison import compare
from fistapruner.runs.records import Comparison

ALPS = "alps"
SPARSEGPT = "sparsegpt"
SETTINGS = "proximal,proximal@propagate=dense,best"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", required=True, help="folder of the comparison")
    parser.add_argument(
        "--data", default=os.environ.get("FISTAPRUNER_DATA"), help="folder of texts (default: $FISTAPRUNER_DATA)"
    )
    parser.add_argument("--settings", default=SETTINGS, help="as --methods of 'fistapruner compare'")
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=60)
    arguments = parser.parse_args()
    calibration: dict[str, Any] = {"source": "python", "samples": arguments.samples, "seqlen": arguments.seqlen}
    text = "python"
    if arguments.data:
        calibration["source"] = str(real_problems.calibration_files(arguments.data)[0])
        text = str(Path(arguments.data, "wikitext2", "test_joined.txt"))
    comparison = compare(
        arguments.model,
        f"{SPARSEGPT},{ALPS},{arguments.settings}",
        arguments.sparsity.split(","),
        arguments.out,
        seeds=[int(seed) for seed in arguments.seeds.split(",")],
        settings={"calibration": calibration},
        data=text,
        windows=arguments.windows,
        listener=choose_listener(argparse.Namespace(quiet=False, json=False)),
    )
    machine = comparison.machine
    print(
        f"{arguments.model}; calibration {calibration['source']}, {arguments.samples} windows of {arguments.seqlen} "
        f"tokens, seeds {arguments.seeds}; text {text}, {arguments.windows} windows; "
        f"{machine.device_name or machine.cpu}, {machine.threads} thread(s), torch {comparison.versions.get('torch')}"
    )
    print(ratios(comparison))


def ratios(comparison: Comparison) -> str:
    """A line for each setting and sparsity, means over seeds."""
    lines = [f"{'sparsity':>8}  {'gap':>7}  {'to ALPS':>7}  {'time to SparseGPT':>17}  setting"]
    cells: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in comparison.rows:
        if row.gap is not None and row.seconds is not None:
            cells.setdefault((row.sparsity, row.label or row.method), []).append((row.gap, row.seconds))
    means = {
        key: (mean(gap for gap, _ in values), mean(seconds for _, seconds in values)) for key, values in cells.items()
    }
    for (sparsity, label), (gap, seconds) in means.items():
        alps, sparsegpt = means.get((sparsity, ALPS)), means.get((sparsity, SPARSEGPT))
        to_alps = f"{gap / alps[0]:.3f}" if alps else "–"
        to_sparsegpt = f"{seconds / sparsegpt[1]:.2f}" if sparsegpt else "–"
        lines.append(f"{sparsity:>8}  {gap:7.4f}  {to_alps:>7}  {to_sparsegpt:>17}  {label}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
