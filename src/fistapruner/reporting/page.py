"""Draw ``report.html`` or ``compare.html``, which load nothing, from the JSON of a folder alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..measure import QUANTISE_FIRST
from ..runs.directory import RunDirectory
from ..runs.records import DONE, FIGURES, PAGE, RemovalEntry, Report, load_comparison, load_run
from ..runtime.files import write_text_atomic
from ..runtime.show import count, percent
from .comparison import comparison_page
from .facts import facts, next_steps, title_of
from .figures import run_figures
from .measured import COST, ORIGIN, PRUNING, QUALITY, SIZE, TRAINING
from .model_card import Section, Table, fact_table, moment, page, public_recipe, yaml_text

MOST_WARNINGS = 20
"""Warnings that a page shows."""


def run_page(report: Report) -> str:
    """Draw the page of a run, finished or not, as HTML."""
    done = f"{len(report.layers)} of {report.model.layers} decoder layers are done"
    if report.recovery is not None:
        done = f"{report.recovery.steps} of {report.recovery.asked_steps} steps are done"
    done = "" if report.status == "finished" else done
    about = (report.method, report.model.architecture, done, moment(report.finished or report.started))
    listed, figures = facts(report), run_figures(report)

    def table(section: str, *, numeric: bool = False) -> list[Table]:
        found = [fact for fact in listed if fact.section == section]
        head, rows = fact_table(found, DONE[report.kind])
        places = [place for place, name in enumerate(head) if numeric and name not in ("measure", "how")]
        return [Table(head, rows, places)] if found else []

    training = [figure for figure in figures if figure.key == "training"]
    steps = Table(("command", "what it does"), next_steps(report))
    recipe = public_recipe(report.recipe)
    sizes = table(SIZE, numeric=True)
    return page(
        title_of(report),
        status=report.status,
        about=" · ".join(part for part in about if part),
        warnings=_warnings(report),
        sections=[
            Section(QUALITY, table(QUALITY, numeric=True), samples=_samples(report)),
            Section(TRAINING, table(TRAINING), training),
            Section(PRUNING, [*table(PRUNING), *_removed(report)], [each for each in figures if each not in training]),
            Section(SIZE, sizes, note=QUANTISE_FIRST if sizes and report.totals.checkpoint_bytes else ""),
            Section(COST, table(COST)),
            Section("Go on", [steps] if steps.rows else []),
            Section(
                ORIGIN,
                table(ORIGIN),
                code=[
                    *([("Command", report.command)] if report.command else []),
                    *([("Recipe", yaml_text(recipe))] if recipe else []),
                ],
            ),
        ],
    )


def _removed(report: Report) -> list[Table]:
    """Tabulate the widths and errors of every decoder layer; of a mixture's experts the means."""
    rows = []
    for layer in report.layers:
        alike: dict[str, list[RemovalEntry]] = {}
        for removal in layer.removals:
            text = f"{removal.unit} {count(removal.before)} → {count(removal.after)}"
            if removal.kept is not None:
                gone = (str(number) for number in range(removal.before) if number not in removal.kept)
                text += f", without {', '.join(gone)}"
            alike.setdefault(text, []).append(removal)
        for text, removals in alike.items():
            rows.append(
                (
                    str(layer.index),
                    f"{text}, mean of {count(len(removals))} experts" if len(removals) > 1 else text,
                    _mean([removal.dropped_error for removal in removals]),
                    _mean([removal.relative_error for removal in removals]),
                    _mean([removal.validated_error for removal in removals]),
                )
            )
    head = ("layer", "removed", "error, others as they were", "error as written", "error on fresh windows")
    return [Table(head, rows, (2, 3, 4))] if rows else []


def _mean(values: Sequence[float | None]) -> str:
    """Write the average of the values that are known."""
    known = [value for value in values if value is not None]
    return percent(sum(known) / len(known)) if known else "–"


def _samples(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """List prompts, each with the continuations of the models by name."""
    trained = report.recovery is not None
    names = ("Dense", f"Before {report.training}" if trained else "Pruned", DONE[report.kind].capitalize())
    return [
        (
            sample.prompt,
            [
                (name, re.sub(r"\n{4,}", lambda breaks: f"\n[{len(breaks[0])} line breaks]\n", text))
                for name, text in zip(names, (sample.dense, sample.pruned, sample.recovered), strict=True)
                if text is not None
            ],
        )
        for sample in report.generations
    ]


def _warnings(report: Report) -> list[str]:
    """List the error that stopped the run, then its warnings, each once."""
    lines = ([f"Stopped: {report.error}"] if report.error else []) + list(dict.fromkeys(report.warnings))
    more = len(lines) - MOST_WARNINGS
    return lines[:MOST_WARNINGS] + ([f"and {more} more in report.json"] if more > 0 else [])


def write_page(folder: str | Path) -> Path:
    """Draw ``report.html`` of a run (finished or not), or ``compare.html`` of a comparison.

    Args:
        folder: the run directory, or the folder of a comparison.

    Returns:
        The file that was written.

    Raises:
        FistaPrunerError: the folder holds neither, or its JSON is broken.
        MissingExtraError: the extra ``report`` is not installed.
    """
    folder = Path(folder)
    if (folder / FIGURES).is_file():
        text, out = comparison_page(load_comparison(folder)), folder / PAGE
    else:
        text, out = run_page(load_run(folder)), RunDirectory(folder).page_file
    write_text_atomic(out, text)
    return out


report = write_page
"""The public name: ``fistapruner.report``, as the verb is called."""
