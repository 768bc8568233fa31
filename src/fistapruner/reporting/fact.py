"""One thing that a report says."""

from __future__ import annotations

from dataclasses import dataclass

QUALITY, TRAINING, PRUNING = "Quality", "Training", "Pruning"
SIZE, COST, ORIGIN = "Size and speed", "Time and memory", "Made from"


@dataclass(frozen=True)
class Fact:
    """One thing that a report says.

    Args:
        section: heading that it stands under; ``label``: its name.
        after: value of the result; ``dense``: of the dense model; ``before``: of the model that a training began with.
            Empty where there is none.
        how: how the value was obtained, and what it depends on.
    """

    section: str
    label: str
    after: str
    dense: str = ""
    before: str = ""
    how: str = ""

    @property
    def line(self) -> str:
        """The values in one line: ``46.53 ± 0.93 (dense 25.32 ± 0.51); 60 windows of 1024 tokens``."""
        known = [f"{name} {value}" for name, value in (("dense", self.dense), ("before", self.before)) if value]
        beside = f"({', '.join(known)})" if known else ""
        return " ".join(part for part in (self.after, beside) if part) + (f"; {self.how}" if self.how else "")

    @property
    def row(self) -> tuple[str, str]:
        """Label, in lower case unless it begins with an abbreviation, and line, for the terminal."""
        label = self.label if self.label[1:2].isupper() else self.label[:1].lower() + self.label[1:]
        return label, self.line


def file_name(source: str) -> str:
    """Cut the name of a text to its last part: cards are published, folders of a machine are not."""
    return source.rsplit("/", 1)[-1]
