"""Draw ``compare.html``, many methods under one protocol, from ``compare.json`` alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from ..core import parse_sparsity
from ..errors import FistaPrunerError
from ..runs.comparison_records import CompareRow, Comparison
from ..runtime.formatting import duration, percent, significant, size, with_error
from .comparison import by_quality, failures
from .drawing import INK, SERIES, Drawing, draw, plain_log, style
from .evaluation_text import kl_text, perplexity_conditions, perplexity_text
from .model_card import base_model_name
from .rendering import Table, moment, present, render, versions_text

ROUNDING = 0.002
"""Shares of kept weights that differ by less are the same."""


@dataclass(frozen=True)
class Point:
    """A method at one sparsity, over its seeds.

    Args:
        method: its label; ``sparsity``: as written.
        seeds: how many runs have a finite gap; ``missing``: how many have none, or a seed that only others at its
            sparsity have.
        gap: mean of ln(perplexity / dense perplexity); ``spread``: its standard deviation over seeds, 0 for one seed.
        perplexity: exp of the mean NLL; ``windows``: NLL of each window, the mean over seeds, empty where not recorded.
        seconds: mean wall time, None if not recorded.
        kept: weights that are not zero and those of low-rank parts, as a share of the operators' weights before
            structure was removed; None if not recorded. ``extra``: how much more that is than the method has whose
            share is nearest to that of the sparsity.
    """

    method: str
    sparsity: str
    seeds: int
    gap: float
    spread: float
    seconds: float | None
    missing: int = 0
    kept: float | None = None
    extra: float = 0.0
    perplexity: float = math.nan
    windows: tuple[float, ...] = ()

    @property
    def uneven(self) -> bool:
        """Whether other methods at its sparsity keep another share of the weights, beyond rounding."""
        return abs(self.extra) > ROUNDING

    @property
    def runs(self) -> str:
        """Write how many runs the figures are of: ``3``, or ``2 of 3``."""
        return f"{self.seeds} of {self.seeds + self.missing}" if self.missing else str(self.seeds)

    @property
    def weights(self) -> str:
        """Say that other methods keep fewer weights, or more: `` (+4.6 % weights)``; else nothing."""
        return f" ({100 * self.extra:+.1f} % weights)".replace("-", "−") if self.uneven else ""

    @property
    def note(self) -> str:
        """Say all that keeps it from being compared with others, `` (2 of 3 seeds)``; else nothing."""
        return (f" ({self.runs} seeds)" if self.missing else "") + self.weights


def comparison_page(comparison: Comparison) -> str:
    """Draw the page of a comparison, finished or not, as HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    found = points(comparison.rows)
    drawings = [quality_against_sparsity(found), *(quality_against_time(found, pattern) for pattern in patterns(found))]
    return render(
        "compare.html.j2",
        title=f"Pruning methods on {base_model_name(comparison.model) or 'a model'}",
        status=comparison.status,
        about=moment(comparison.finished or comparison.started),
        verdict=verdict(comparison, found),
        program=f"fistapruner {comparison.versions.get('fistapruner', '')}".strip(),
        overview=_overview(comparison, found),
        drawings=[drawing for drawing in drawings if drawing is not None],
        results=_results(comparison),
        warnings=[*comparison.warnings, *(f"failed: {failure}" for failure in failures(comparison))],
        protocol=_protocol(comparison),
    )


def points(rows: Sequence[CompareRow]) -> list[Point]:
    """Gather rows over their seeds, in the order of first appearance; only groups that have a finite gap."""
    groups: dict[tuple[str, str], list[CompareRow]] = {}
    for row in rows:
        groups.setdefault((row.name, row.sparsity), []).append(row)
    whole = max((row.operator_weights or 0 for row in rows), default=0)
    finite = {(row.sparsity, row.seed) for row in rows if row.gap is not None and math.isfinite(row.gap)}
    made = []
    for (method, sparsity), members in groups.items():
        measured = [row for row in members if row.gap is not None and math.isfinite(row.gap)]
        if not measured:
            continue
        gaps = [row.gap for row in measured if row.gap is not None]
        seconds = [row.seconds for row in measured if row.seconds is not None]
        texts = [row.perplexity for row in measured if row.perplexity is not None]
        windows = [text.window_nlls for text in texts]
        alike = len(windows) == len(gaps) and len(set(map(len, windows))) == 1
        spread, time = stdev(gaps) if len(gaps) > 1 else 0.0, mean(seconds) if seconds else None
        shares = [share for row in members if (share := _kept(row, whole)) is not None]
        kept = mean(shares) if shares else None
        asked = finite.union((sparsity, row.seed) for row in members)
        missing = sum(pattern == sparsity for pattern, _ in asked) - len(gaps)
        made.append(
            Point(
                method,
                sparsity,
                len(gaps),
                mean(gaps),
                spread,
                time,
                missing,
                kept,
                perplexity=math.exp(mean(text.nll for text in texts)) if texts else math.nan,
                windows=tuple(map(mean, zip(*windows, strict=True))) if alike else (),
            )
        )
    return [replace(point, extra=_extra(point, made)) for point in made]


def _kept(row: CompareRow, whole: int) -> float | None:
    """Return the share of its weights that a row keeps; ``whole``: their number before structure went."""
    weights, zeros = row.operator_weights, row.operator_zeros
    if not weights or zeros is None:
        return None
    structure = (row.settings.get("structure") or {}).get("remove")
    return (weights - zeros + (row.low_rank_weights or 0)) / (whole if structure else weights)


def _extra(point: Point, found: Sequence[Point]) -> float:
    """Return by how much a point's share of weights is above that of its sparsity's nearest point."""
    shares = [other.kept for other in found if other.sparsity == point.sparsity and other.kept is not None]
    asked = 1 - _zeros(point.sparsity)
    return point.kept - min(shares, key=lambda share: abs(share - asked)) if point.kept is not None else 0.0


def short_labels(found: Sequence[Point]) -> dict[str, str]:
    """Shorten labels to fit into figures: of the settings after ``@`` only ``+recover`` stays.

    Methods that this makes alike are numbered.
    """
    labels = methods(found)
    bases = [_short(label) for label in labels]
    return {
        label: base if bases.count(base) == 1 else f"{base} ({bases[:place].count(base) + 1})"
        for place, (label, base) in enumerate(zip(labels, bases, strict=True))
    }


def _short(method: str) -> str:
    """Return a label without its settings: ``proximal+recover`` of ``proximal@recover=500k``."""
    name, _, settings = method.partition("@")
    return name + ("+recover" if re.search(r"(^|,)recover[.=]", settings) else "")


def patterns(found: Sequence[Point]) -> list[str]:
    """List the sparsities that occur, in order of first appearance."""
    return list(dict.fromkeys(point.sparsity for point in found))


def methods(found: Sequence[Point]) -> list[str]:
    """List the methods that occur, in order of first appearance."""
    return list(dict.fromkeys(point.method for point in found))


def verdict(comparison: Comparison, found: Sequence[Point]) -> str:
    """Say which of the methods that compare has the lowest perplexity at each sparsity, or that none wins.

    Methods that have a lower one and keep another share of the weights are named, too.
    """
    sentences = []
    for pattern in patterns(found):
        here = sorted(_comparable(found, pattern), key=lambda point: point.gap)
        if len(here) > 1:
            first, second = here[:2]
            apart = f"{with_error(*_lead(first, second), 3)} nats a token, paired over windows"
            named = [f"{point.method} ({point.perplexity:.2f})" for point in (first, second)]
            if _winner(found, pattern) is None:
                sentences.append(f"At {pattern}, no winner: {named[0]} and {named[1]} differ by {apart}.")
            else:
                sentences.append(f"At {pattern}, {named[0]} has the lowest perplexity: below {named[1]} by {apart}.")
        sentences += [
            f"{point.method}{point.note} has {point.perplexity:.2f} at {pattern}."
            for point in found
            if point.sparsity == pattern and not point.missing and here and point.gap < here[0].gap
        ]
    if comparison.status == "running":
        sentences.append("The comparison is not finished.")
    return " ".join(sentences)


def _lead(first: Point, second: Point) -> tuple[float, float]:
    """Return how much lower the NLL of ``first`` is, with standard error, paired over windows, or NaN."""
    apart = [b - a for a, b in zip(first.windows, second.windows, strict=False)]
    known = len(apart) > 1 and len(first.windows) == len(second.windows)
    return second.gap - first.gap, stdev(apart) / math.sqrt(len(apart)) if known else math.nan


def _winner(found: Sequence[Point], pattern: str) -> Point | None:
    """Return the point with the smallest gap if it leads by more than two standard errors; else None."""
    here = sorted(_comparable(found, pattern), key=lambda point: point.gap)
    if len(here) < 2:
        return None
    lead, error = _lead(here[0], here[1])
    return here[0] if lead > 2 * error else None


def quality_against_sparsity(found: Sequence[Point]) -> Drawing | None:
    """Draw the gap of every method by sparsity."""
    order = sorted(patterns(found), key=lambda pattern: (_is_nm(pattern), _zeros(pattern)))
    if len(order) < 2:
        return None
    places = {pattern: index for index, pattern in enumerate(order)}
    short = short_labels(found)

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        for index, method in enumerate(methods(found)):
            color = SERIES[index % len(SERIES)]
            for nm in (False, True):
                mine = sorted(
                    (p for p in found if p.method == method and _is_nm(p.sparsity) is nm),
                    key=lambda p: places[p.sparsity],
                )
                label = (
                    short[method]
                    if not nm or not any(p.method == method and not _is_nm(p.sparsity) for p in found)
                    else None
                )
                axes.errorbar(
                    [places[p.sparsity] for p in mine],
                    [p.gap for p in mine],
                    yerr=[p.spread for p in mine],
                    fmt=_marker(index) + ("-" if not nm else ""),
                    color=color,
                    markersize=6,
                    capsize=2,
                    label=label if mine else None,
                )
        axes.set_xticks(range(len(order)), order)
        axes.set_xlim(-0.4, len(order) - 0.6)
        if min(point.gap for point in found) > 0:  # a logarithmic axis has no place for the others
            axes.set_yscale("log")
            plain_log(axes.yaxis)
        axes.set_ylabel("gap, nats a token (lower is better)")
        axes.set_xlabel("sparsity")
        style(axes)
        figure.legend(loc="outside upper left", ncols=4 if width > 500 else 2)

    return draw(
        "gap-sparsity",
        "Quality against sparsity",
        plot,
        caption="Gap: ln(pruned perplexity / dense perplexity). Lines are one standard deviation over seeds.",
        description="; ".join(f"{p.method} at {p.sparsity}: {significant(p.gap)}{p.note}" for p in found),
        heights=(360, 420),
        table=(
            ["method", "sparsity", "seeds", "gap"],
            [[p.method, p.sparsity, p.runs, with_error(p.gap, p.spread or None, 3) + p.weights] for p in found],
        ),
    )


def quality_against_time(found: Sequence[Point], pattern: str) -> Drawing | None:
    """Draw the gap of every method at one sparsity against the time of its whole run."""
    labels = methods(found)
    here = [point for point in found if point.sparsity == pattern and point.seconds]
    short = short_labels(found)
    if not here:
        return None

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        for order, point in enumerate(sorted(here, key=lambda point: (point.seconds or 0.0, point.gap))):
            index = labels.index(point.method)
            axes.errorbar(
                point.seconds,
                point.gap,
                yerr=point.spread,
                fmt=_marker(index),
                color=SERIES[index % len(SERIES)],
                markersize=8,
                capsize=2,
            )
            shift, side = (
                ((0, 8), "bottom") if order % 2 == 0 else ((0, -8), "top")
            )  # neighbours' labels on opposite sides
            axes.annotate(
                short[point.method] + point.note,
                (point.seconds, point.gap),
                xytext=shift,
                textcoords="offset points",
                ha="center",
                va=side,
                color=INK,
            )
        axes.set_xscale("log")
        axes.margins(x=0.2, y=0.2)
        plain_log(axes.xaxis)
        axes.set_xlabel("seconds of the whole run")
        axes.set_ylabel("gap, nats a token")
        style(axes, grid="both")

    return draw(
        "gap-time-" + "".join(character if character.isalnum() else "-" for character in pattern),
        f"Quality against time at {pattern}",
        plot,
        caption="Down and to the left is better.",
        description="; ".join(f"{p.method}: gap {significant(p.gap)} in {duration(p.seconds)}{p.note}" for p in here),
        heights=(360, 360),
        table=(
            ["method", "seeds", "seconds", "gap"],
            [
                [p.method, p.runs, significant(p.seconds), with_error(p.gap, p.spread or None, 3) + p.weights]
                for p in here
            ],
        ),
    )


def _comparable(found: Sequence[Point], pattern: str) -> list[Point]:
    """Choose the points at a sparsity that keep the same share of weights and whose runs all have a gap."""
    return [point for point in found if point.sparsity == pattern and not (point.missing or point.uneven)]


def _overview(comparison: Comparison, found: Sequence[Point]) -> Table:
    """Tabulate mean perplexity and gap by method and sparsity, the best first; ★ marks a winner."""
    columns = sorted(patterns(found), key=lambda pattern: (_is_nm(pattern), _zeros(pattern)))
    best = [_winner(found, pattern) for pattern in columns]
    gaps, cells = {(p.method, p.sparsity): p.gap for p in found}, {}
    for p in found:
        note = p.note or (" ★" if p in best else "")
        cells[p.method, p.sparsity] = f"{p.perplexity:.2f}, gap {with_error(p.gap, p.spread or None, 3)}{note}"
    labels = sorted(methods(found), key=lambda method: [gaps.get((method, each), math.inf) for each in columns])
    short = short_labels(found)
    names = {
        method: method if short[method] in (method, _short(method)) else f"{short[method]}: {method}"
        for method in labels
    }
    rows = [(names[method], *(cells.get((method, pattern), "–") for pattern in columns)) for method in labels]
    if rows and comparison.dense is not None:
        rows.insert(0, ("dense", *(f"{comparison.dense.perplexity:.2f}" for _ in columns)))
    return Table("Perplexity by method and sparsity", ("method", *columns), rows, numeric=range(1, len(columns) + 1))


def _results(comparison: Comparison) -> Table:
    head: tuple[str, ...] = (
        "method",
        "sparsity",
        "seed",
        "perplexity",
        "gap",
        "KL",
        "mean relative error",
        "time",
        "of it solving",
        "peak memory",
        "zeros",
    )
    rows: list[tuple[str, ...]] = []
    if comparison.dense is not None:
        rows.append(("dense", "–", "–", perplexity_text(comparison.dense), "0", "0", "0", "–", "–", "–", "–"))
    for row in by_quality(comparison.rows):
        rows.append(
            (
                row.name,
                row.sparsity,
                str(row.seed),
                "failed" if row.error else perplexity_text(row.perplexity),
                with_error(row.gap, None, 3),
                kl_text(row.divergence, 3),
                percent(row.relative_error),
                duration(row.seconds),
                duration(row.time_split.get("solve")),
                size(row.peak_memory),
                percent(row.zeros_share, 4) + row.beside_zeros,
            )
        )
    if not any(row.divergence for row in comparison.rows):  # a comparison measures perplexity alone
        head, rows = _without(head, 5), [_without(row, 5) for row in rows]
    return Table("Results", head, rows, numeric=range(3, len(head)))


def _without(row: tuple[str, ...], column: int) -> tuple[str, ...]:
    return (*row[:column], *row[column + 1 :])


def _protocol(comparison: Comparison) -> list[tuple[str, str]]:
    used, machine = comparison.calibration, comparison.machine
    text = comparison.dense or next((row.perplexity for row in comparison.rows if row.perplexity), None)
    pairs = [
        ("model", comparison.model.source),
        ("evaluated on", perplexity_conditions(text) if text else None),
        ("calibration", used.description if used is not None else None),
        ("machine", ", ".join(part for part in (machine.cpu, machine.device_name or "") if part)),
        ("threads", str(machine.threads) if machine.threads else None),
        ("versions", versions_text(comparison.versions)),
        ("command", comparison.command),
    ]
    return present(pairs)


def _is_nm(pattern: str) -> bool:
    try:
        return not parse_sparsity(pattern).supports_allocation
    except FistaPrunerError:
        return False


def _zeros(pattern: str) -> float:
    try:
        return parse_sparsity(pattern).fraction
    except FistaPrunerError:
        return 0.0


def _marker(index: int) -> str:
    return "osD^vPX*"[index % 8]
