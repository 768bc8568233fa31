"""Draw the README's picture from the figures of the quality study.

python benchmarks/picture.py docs/quality.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = {
    "Wanda": ("Wanda", "#8f8f8f", 0),
    "SparseGPT": ("SparseGPT", "#6f6f6f", 0),
    "ALPS": ("ALPS", "#4f779f", 0),
    "`proximal`, the default": ("the default", "#c8741c", 4),
    "`--recipe best`": ("best", "#b0301c", -4),
}
"""Of a row: its label, its colour, and how far the label stands above its point."""
DENSE = 25.32


def main(path: str) -> None:
    """Draw perplexity against the share of zeros."""
    study = json.loads((Path(__file__).parent / "results" / "study.json").read_text("utf-8"))
    rows = study["tables"]["quality"]["rows"]
    figure, axes = plt.subplots(figsize=(6.4, 3.2), dpi=130)
    for row, (label, colour, above) in ROWS.items():
        values = [rows[row][f"{share} %"] for share in (50, 60, 70)]
        axes.plot((50, 60, 70), values, marker="o", color=colour, linewidth=2)
        name = f"{label}  {values[-1]:,.0f}"
        axes.annotate(name, (70, values[-1]), (6, above), textcoords="offset points", va="center", color=colour)
    axes.axhline(DENSE, color="black", linewidth=1, linestyle=":")
    axes.annotate(f"dense  {DENSE:.0f}", (70, DENSE), (6, 6), textcoords="offset points", va="center")
    axes.set(yscale="log", xlim=(49, 76), ylim=(20, 2000), xlabel="zeros, % of the operators' weights")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_xticks((50, 60, 70))
    axes.set_yticks((25, 50, 100, 200, 500, 1000), ("25", "50", "100", "200", "500", "1000"))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
