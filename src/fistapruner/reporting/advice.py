"""Name the commands to go on with."""

from __future__ import annotations

from pathlib import Path

from ..runs.records import Report
from ..runtime.formatting import shell_line
from .size_and_speed import becomes_smaller_packed, speeds


def next_steps(report: Report, folder: str | Path = "RUN") -> list[tuple[str, str]]:
    """List commands that go on from a finished run, and what each does.

    Args:
        report: of the run.
        folder: the run directory.
    """
    if report.status != "finished":
        return []
    found = []
    if report.recovery is None:
        kept = "" if report.only_structure else ", every zero kept"
        found.append((shell_line("recover", folder, "--out", "NEW"), f"trains what is left{kept}"))
    if not report.evaluations:
        found.append((shell_line("evaluate", folder), "measures quality and adds it to the report"))
    if not report.stacked_experts and not speeds(report):
        found.append((shell_line("bench", folder), "measures speed and adds it to the report"))
    if becomes_smaller_packed(report):
        found.append((shell_line("pack", folder, "NEW"), "writes the file without its zeros"))
    return found


def length_setting(report: Report) -> str:
    """Name the setting that makes a training longer: steps, where they are given, override the others."""
    if report.recipe.get("steps") is not None:
        return "--steps"
    return "--epochs" if report.kind == "align" else "--tokens"
