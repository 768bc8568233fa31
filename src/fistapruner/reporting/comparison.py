"""Show a comparison of many methods: as a table for the terminal, in Markdown, and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from ..core import parse_sparsity
from ..errors import FistaPrunerError
from ..runs.records import CompareRow, Comparison
from ..runtime.show import align_columns, counted, duration, percent, significant, size, with_error
from .facts import base_model_name
from .figures import SERIES, WIDTH, Drawing, draw, plain_log, style
from .measured import file_name
from .model_card import Section, Table, markdown_table, moment, page, plain_markdown

HEADER = (
    "method",
    "sparsity",
    "seed",
    "perplexity",
    "gap",
    "mean relative error",
    "time",
    "of it solving",
    "peak memory",
    "zeros",
)


def comparison_table(comparison: Comparison) -> str:
    """Write the rows in aligned columns, the protocol above them."""
    table = align_columns([HEADER, *map(_cells, by_quality(comparison.rows))])
    failed = failures(comparison)
    return "\n".join([*comparison_lines(comparison), "", table, *(["", *failed] if failed else [])])


def comparison_markdown(comparison: Comparison) -> str:
    """Write the comparison as Markdown, ``DIR/compare.md``."""
    protocol = [f"{plain_markdown(line)}  " for line in comparison_lines(comparison)]
    table = markdown_table(HEADER, list(map(_cells, by_quality(comparison.rows))))
    title = f"# {plain_markdown(comparison.model.source or 'Comparison')}: methods compared"
    return "\n".join([title, "", *protocol, "", table, "", *map(plain_markdown, failures(comparison))]).rstrip() + "\n"


def comparison_page(comparison: Comparison) -> str:
    """Draw the page of a comparison, finished or not, as HTML."""
    found, rows = points(comparison.rows), list(map(_cells, by_quality(comparison.rows)))
    drawing = quality_against_sparsity(found)
    machine, versions = comparison.machine, comparison.versions
    protocol = [
        *(line.partition(": ")[::2] for line in comparison_lines(comparison)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("processor", machine.cpu if machine.device_name else ""),
    ]
    return page(
        f"Pruning methods on {base_model_name(comparison.model) or 'a model'}",
        status=comparison.status,
        about=moment(comparison.finished or comparison.started),
        warnings=[*comparison.warnings, *(f"failed: {failure}" for failure in failures(comparison))],
        sections=[
            Section("Perplexity by method and sparsity", [_overview(comparison, found)], note=OVERVIEW_NOTE),
            Section("Quality against sparsity", figures=[] if drawing is None else [drawing]),
            Section("Every run", [Table(HEADER, rows, range(3, len(HEADER)))]),
            Section(
                "Protocol",
                [Table(("what", "value"), [row for row in protocol if row[1]])],
                code=[("Command", comparison.command)] if comparison.command else [],
            ),
        ],
    )


MARKERS = "osD^vPX*"
"""Marks of methods in figures."""


def by_quality(rows: Sequence[CompareRow]) -> list[CompareRow]:
    """Sort rows by sparsity, in the order of first appearance, then by gap; failed rows last."""
    seen = list(dict.fromkeys(row.sparsity for row in rows))
    return sorted(rows, key=lambda row: (seen.index(row.sparsity), math.inf if row.gap is None else row.gap))


def comparison_lines(comparison: Comparison) -> list[str]:
    """Say what all rows share, one sentence a line."""
    lines = []
    if (dense := comparison.dense) is not None:
        lines.append(
            f"dense: perplexity {dense.perplexity:.2f} on {dense.data} ({dense.split}), "
            f"{counted(dense.windows, 'window')} of {dense.seqlen} tokens, {dense.dtype}; "
            "gap = ln(perplexity) - ln(dense perplexity)"
        )
    if (used := comparison.calibration) is not None:
        text = f"{file_name(used.source)}, {used.samples} windows of {used.seqlen} tokens, {used.how}"
        lines.append(f"calibration: {text}, seed as in the table")
    machine = comparison.machine
    if machine.cpu or machine.device_name:
        threads = f", {counted(machine.threads, 'thread')}" if machine.threads else ""
        lines.append(f"machine: {machine.device_name or machine.cpu}{threads}")
    return lines


def failures(comparison: Comparison) -> list[str]:
    """List the rows that failed, and why."""
    return [f"{row.name}, {row.sparsity}, seed {row.seed}: {row.error}" for row in comparison.rows if row.error]


def _cells(row: CompareRow) -> tuple[str, ...]:
    return (
        row.name,
        row.sparsity,
        str(row.seed),
        "failed" if row.error else ("–" if row.perplexity is None else f"{row.perplexity.perplexity:.2f}"),
        "–" if row.gap is None else f"{row.gap:z.4f}",
        percent(row.relative_error),
        duration(row.seconds),
        duration(row.time_split.get("solve")),
        size(row.peak_memory),
        percent(row.zeros_share, 6) + row.beside_zeros,
    )


@dataclass(frozen=True)
class Point:
    """A method at one sparsity, over its seeds.

    Args:
        method: its label; ``sparsity``: as written.
        seeds: how many runs have a finite gap; ``asked``: how many were asked for.
        gap: mean of ln(perplexity / dense perplexity); ``spread``: its standard deviation over seeds, None for one.
        perplexity: exp of the mean NLL; ``windows``: NLL of each window, the mean over seeds, empty where not recorded.
        seconds: mean wall time, None if not recorded.
        kept: weights that are not zero and those of low-rank parts, as a share of the operators' weights before
            structure was removed; None if not recorded.
    """

    method: str
    sparsity: str
    seeds: int
    asked: int
    gap: float
    spread: float | None = None
    perplexity: float = math.nan
    windows: tuple[float, ...] = ()
    seconds: float | None = None
    kept: float | None = None


def points(rows: Sequence[CompareRow]) -> list[Point]:
    """Gather rows over their seeds, in the order of first appearance; only groups that have a finite gap."""
    groups: dict[tuple[str, str], list[CompareRow]] = {}
    for row in rows:
        groups.setdefault((row.name, row.sparsity), []).append(row)
    whole = max((row.operator_weights or 0 for row in rows), default=0)
    made = []
    for (method, sparsity), members in groups.items():
        gaps = [row.gap for row in members if row.gap is not None and math.isfinite(row.gap)]
        if not gaps:
            continue
        texts = [row.perplexity for row in members if row.perplexity is not None and math.isfinite(row.perplexity.nll)]
        windows = [text.window_nlls for text in texts]
        alike = len(windows) == len(gaps) and len(set(map(len, windows))) == 1
        seconds = [row.seconds for row in members if row.seconds is not None]
        shares = [share for row in members if (share := _kept(row, whole)) is not None]
        made.append(
            Point(
                method,
                sparsity,
                len(gaps),
                len(members),
                mean(gaps),
                stdev(gaps) if len(gaps) > 1 else None,
                math.exp(mean(text.nll for text in texts)) if texts else math.nan,
                tuple(map(mean, zip(*windows, strict=True))) if alike else (),
                mean(seconds) if seconds else None,
                mean(shares) if shares else None,
            )
        )
    return made


def _kept(row: CompareRow, whole: int) -> float | None:
    """Return the share of its weights that a row keeps; ``whole``: their number before structure went."""
    weights, zeros = row.operator_weights, row.operator_zeros
    if not weights or zeros is None:
        return None
    structure = (row.settings.get("structure") or {}).get("remove")
    return (weights - zeros + (row.low_rank_weights or 0)) / (whole if structure else weights)


def patterns(found: Sequence[Point]) -> list[str]:
    """List the sparsities that occur: shares of zeros from low to high, then n:m patterns."""
    return sorted(dict.fromkeys(point.sparsity for point in found), key=_kind)


def short_labels(found: Sequence[Point]) -> dict[str, str]:
    """Shorten methods for figures: the settings after ``@`` go; methods that become alike are numbered."""
    labels = list(dict.fromkeys(point.method for point in found))
    bases = [label.partition("@")[0] for label in labels]
    return {
        label: base if bases.count(base) == 1 else f"{base} ({bases[:place].count(base) + 1})"
        for place, (label, base) in enumerate(zip(labels, bases, strict=True))
    }


OVERVIEW_NOTE = (
    "Gap: ln(pruned / dense perplexity), nats a token, ± one standard deviation over seeds. Above the lowest: its "
    "difference from the lowest gap at the same sparsity, ± one standard error, paired over windows. Compare methods "
    "that keep as many weights and have as many runs."
)


def _overview(comparison: Comparison, found: Sequence[Point]) -> Table:
    """Tabulate every method at every sparsity, from the lowest gap to the highest."""
    rows: list[tuple[str, ...]] = []
    if found and comparison.dense is not None:
        rows.append(("dense", "–", "–", f"{comparison.dense.perplexity:.2f}", *"––––"))
    for pattern in patterns(found):
        here = sorted((point for point in found if point.sparsity == pattern), key=lambda point: point.gap)
        for point in here:
            rows.append(
                (
                    point.method,
                    pattern,
                    str(point.seeds) if point.seeds == point.asked else f"{point.seeds} of {point.asked}",
                    f"{point.perplexity:.2f}",
                    with_error(point.gap, point.spread, 3),
                    "–" if point is here[0] else with_error(*_above(here[0], point), 3),
                    percent(point.kept),
                    duration(point.seconds),
                )
            )
    head = ("method", "sparsity", "runs", "perplexity", "gap", "above the lowest", "weights kept", "time")
    return Table(head, rows, range(3, len(head)))


def _above(first: Point, second: Point) -> tuple[float, float | None]:
    """Return how much higher the NLL of ``second`` is, and the standard error, paired over windows."""
    apart = [b - a for a, b in zip(first.windows, second.windows, strict=False)]
    known = len(apart) > 1 and len(first.windows) == len(second.windows)
    return second.gap - first.gap, stdev(apart) / math.sqrt(len(apart)) if known else None


def quality_against_sparsity(found: Sequence[Point]) -> Drawing | None:
    """Draw the gap of every method by sparsity."""
    order, short = patterns(found), short_labels(found)
    if len(order) < 2:
        return None

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for index, method in enumerate(short):
            for nm in (False, True):  # n:m patterns stand apart
                mine = [p for each in order for p in found if (p.method, p.sparsity) == (method, each)]
                mine = [p for p in mine if _kind(p.sparsity)[0] is nm]
                beside = 0.06 * (index - (len(short) - 1) / 2)
                _marks(axes, index, mine, [order.index(p.sparsity) + beside for p in mine], line="" if nm else "-")
        axes.set_xticks(range(len(order)), order)
        axes.set_xlim(-0.5, len(order) - 0.5)
        if min(point.gap for point in found) > 0:  # a logarithmic axis has no place for the others
            axes.set_yscale("log")
            plain_log(axes.yaxis)
        axes.set_xlabel("sparsity")
        axes.set_ylabel("gap, nats a token")
        style(axes)
        for index, name in enumerate(short.values()):
            axes.plot([], [], MARKERS[index % 8], color=SERIES[index % len(SERIES)], label=name)
        columns = max(1, WIDTH // (60 + 7 * max(map(len, short.values()))))
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.2)

    return draw(
        "gap-sparsity",
        "Quality against sparsity",
        plot,
        caption="Gap: ln(pruned / dense perplexity), lower is better. Bars are one standard deviation over seeds.",
        description="; ".join(f"{p.method} at {p.sparsity}: {significant(p.gap)}" for p in found),
        height=340 + 18 * (len(short) // 4),
        head=["method", "sparsity", "gap"],
        rows=[[p.method, p.sparsity, with_error(p.gap, p.spread, 3)] for p in found],
    )


def _marks(axes: Any, index: int, found: Sequence[Point], places: Sequence[float], line: str = "") -> None:
    """Draw the gaps of a method, by its number, with the spread of each."""
    look = {"fmt": MARKERS[index % 8] + line, "color": SERIES[index % len(SERIES)], "markersize": 6, "capsize": 2}
    if found:
        axes.errorbar(places, [p.gap for p in found], yerr=[p.spread or 0.0 for p in found], **look)


def _kind(pattern: str) -> tuple[bool, float]:
    """Return whether a sparsity is an n:m pattern, and its share of zeros."""
    try:
        found = parse_sparsity(pattern)
    except FistaPrunerError:  # of another version
        return False, 0.0
    return not found.supports_allocation, found.fraction
