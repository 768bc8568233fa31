"""What solvers record of every round, as the report draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trace:
    """Describe the rounds in a step's record.

    Args:
        key: key of the rounds, a list with one dictionary for each.
        value: key of a round's result, a number; ``penalty``: key of the penalty that the round used.
        value_label, penalty_label, round_label: labels of the axes.
        caption: a sentence that says what is drawn.
        search: every round is a candidate, drawn relative to the first one; else shares in %.
    """

    key: str
    value: str
    penalty: str
    value_label: str
    penalty_label: str
    round_label: str
    caption: str
    search: bool = False

    def rounds(self, stats: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Read the rounds from a step's record; empty if they are missing or incomplete."""
        rounds = stats.get(self.key)
        whole = isinstance(rounds, list) and all(
            isinstance(record, dict) and self.penalty in record and isinstance(record.get(self.value), (int, float))
            for record in rounds
        )
        return list(rounds or []) if whole else []


_SUPPORT = Trace(
    key="path",
    value="support_change",
    penalty="rho",
    value_label="support changed, %",
    penalty_label="ρ",
    round_label="step of ρ",
    caption="Share of the kept weights that another weight replaced as the penalty ρ grew, for the hardest operators. "
    "Steps where none did are left out.",
)

TRACES = {
    "proximal": _SUPPORT,
    "alps": _SUPPORT,
    "fista": Trace(
        key="rounds",
        value="e_total",
        penalty="lambda",
        value_label="error, first = 1",
        penalty_label="λ",
        round_label="round",
        caption="Error of the rounded weights in each round of the λ search, and the λ it tried, for the hardest "
        "operators.",
        search=True,
    ),
}
"""By method; others keep no record of rounds."""
