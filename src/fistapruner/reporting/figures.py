"""Draw figures of a run's decoder layers, solver and time.

Each function returns None when the report lacks what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from ..runs.labels import PHASES
from ..runs.layer_records import LayerEntry
from ..runs.records import Report
from ..runtime.formatting import duration, significant
from .drawing import INK, NARROW, SERIES, Drawing, draw, plain_log, style
from .heat_map import heat_map
from .layer_errors import hardest, mean_error, short_names
from .traces import TRACES, Trace

MOST_DOTS = 2000
"""Dots of a figure, about."""

COLOURED_PHASES = ("capture", "gram", "problem", "structure", "solve", "reconstruct", "io")
"""Phases of a decoder layer that have a color; the others are short."""


def layer_figures(report: Report) -> dict[str, Drawing]:
    """Draw all figures that the report has data for, by key."""
    drawings = [
        change_map(report.layers),
        error_map(report.layers),
        layer_errors(report.layers),
        None if report.only_structure else layer_sparsity(report.layers),
        chain_errors(report.layers),
        solver_path(report.layers),
        time_by_layer(report.layers),
    ]
    return {drawing.key: drawing for drawing in drawings if drawing is not None}


def error_map(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw the relative error of every operator: decoder layers by operators."""
    values = {
        (layer.index, op.name): 100 * op.relative_error
        for layer in layers
        for op in layer.operators
        if op.relative_error is not None
    }
    caption = "Squared error of the outputs as a share of their energy, in %, on calibration tokens; logarithmic scale."
    if any(operator.dense_error for layer in layers for operator in layer.operators):
        caption += " Drift of an operator's inputs counts: its dense weights would have part of this error too."
    return heat_map("error-map", "Relative error of every operator", layers, values, caption, "error")


def change_map(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw how far recovery moved the weights of every operator: decoder layers by operators."""
    values = {
        (layer.index, op.name): 100 * op.change for layer in layers for op in layer.operators if op.change is not None
    }
    if not any(values.values()):  # the input's weights were kept
        return None
    caption = "‖ΔW‖ / ‖W‖ in %: norm of the change of an operator's weights over their norm before; logarithmic scale."
    return heat_map("change-map", "Change of every operator", layers, values, caption, "change")


def layer_errors(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw the error of every decoder layer's output, beside the mean of its operators."""
    output = [(layer.index, 100 * layer.relative_error) for layer in layers if layer.relative_error is not None]
    means = [(layer.index, 100 * mean) for layer in layers if (mean := mean_error(layer)) is not None]
    if not means:
        return None

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        _line(axes, means, SERIES[0], "mean of its operators", "o")
        if output:
            _line(axes, output, SERIES[1], "output of the layer", "s")
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("relative error, %")
        axes.set_ylim(bottom=0)
        _whole_numbers(axes)
        style(axes)
        if output:
            figure.legend(loc="outside upper left", ncols=2 if width > NARROW else 1)

    of = next((layer.relative_error_of for layer in layers if layer.relative_error_of), None)
    worst = max(means, key=lambda pair: pair[1])
    return draw(
        "layer-errors",
        "Error by decoder layer",
        plot,
        caption="Mean over the operators of a layer" + (f"; and of the layer's output, {of}." if of else "."),
        description=f"Line plot over {len(means)} layers. Largest mean {significant(worst[1], 2)} %, layer {worst[0]}.",
        table=(
            ["layer", "mean of operators, %", "output, %"],
            [[str(i), significant(value), significant(dict(output).get(i))] for i, value in means],
        ),
    )


def layer_sparsity(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw the share of zeros of every decoder layer: mean and span over its operators."""
    rows = []
    for layer in layers:
        weights = [math.prod(operator.shape) for operator in layer.operators]
        if sum(weights):
            shares = [100 * operator.zeros / size for operator, size in zip(layer.operators, weights, strict=True)]
            rows.append(
                (
                    layer.index,
                    100 * sum(operator.zeros for operator in layer.operators) / sum(weights),
                    min(shares),
                    max(shares),
                )
            )
    if not rows:
        return None

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        axes.bar(
            [row[0] for row in rows],
            [row[1] for row in rows],
            width=0.72,
            color=SERIES[0],
            label="all operators of the layer",
        )
        for index, _, least, most in rows:
            if most - least > 0.05:
                axes.plot([index, index], [least, most], color=INK, linewidth=1.2)
        axes.set_ylim(0, 100)
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("zeros, %")
        _whole_numbers(axes)
        style(axes)

    least, most = (significant(end([row[1] for row in rows])) for end in (min, max))
    return draw(
        "layer-sparsity",
        "Sparsity by decoder layer",
        plot,
        caption="Exact share of zeros in the operators. A line spans a layer's operators where they differ.",
        description=f"Bars over {len(rows)} layers, from {least} % to {most} % zeros.",
        table=(
            ["layer", "zeros, %", "least", "most"],
            [[str(row[0]), *(significant(v, 5) for v in row[1:])] for row in rows],
        ),
    )


def chain_errors(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw the error after each step of the method chain, over all operators."""
    chains = [
        [(str(s.get("method", "?")), s.get("relative_error")) for s in op.steps]
        for layer in layers
        for op in layer.operators
    ]
    chains = [chain for chain in chains if chain and all(isinstance(error, (int, float)) for _, error in chain)]
    if not chains or max(len(chain) for chain in chains) < 2:
        return None
    names = [name for name, _ in max(chains, key=len)]
    columns = [[100 * float(chain[i][1]) for chain in chains if len(chain) > i] for i in range(len(names))]  # type: ignore[arg-type]
    every = math.ceil(sum(map(len, columns)) / MOST_DOTS)

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        for position, values in enumerate(columns):
            dots = values if every == 1 else sorted(values)[::-every]
            spread = [position + 0.4 * ((0.618034 * k) % 1 - 0.5) for k in range(len(dots))]
            axes.plot(spread, dots, "o", markersize=3.2, alpha=0.45, color=SERIES[0], markeredgewidth=0)
            axes.plot([position - 0.28, position + 0.28], [median(values)] * 2, color=SERIES[1], linewidth=2.6)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_yscale("log")
        axes.set_ylabel("relative error, %")
        plain_log(axes.yaxis)
        style(axes)

    medians = [median(values) for values in columns]
    return draw(
        "chain-errors",
        "Error after each step",
        plot,
        caption="A dot is an operator, the bar their median, after each step of the method chain."
        + (f" Of {len(columns[0]):,} operators, ordered by error, one in {every} is drawn." if every > 1 else ""),
        description="Medians: "
        + ", ".join(f"{name} {significant(value)} %" for name, value in zip(names, medians, strict=True))
        + ".",
        table=(
            ["step", "median error, %", "largest, %"],
            [[name, significant(median(v)), significant(max(v))] for name, v in zip(names, columns, strict=True)],
        ),
    )


def solver_path(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw how the solver converged on the hardest operators: error by round, and the penalty's path."""
    short = short_names(layers)
    found = []
    for layer, operator in hardest(layers, 10_000):
        path = next((path for step in operator.steps if (path := solver_records(step)) is not None), None)
        if path is not None:
            found.append((f"{layer.index} {short[operator.name]}", *path))
    if not found:
        return None
    trace = found[0][1]
    chosen = [(name, values, penalties) for name, other, values, penalties in found if other == trace][:4]

    def plot(figure: Any, width: int) -> None:
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
        for color, (name, errors, knob) in zip(SERIES, chosen, strict=False):
            finite = [value if value is not None and value > 0 else math.nan for value in errors]
            above.plot(range(1, len(finite) + 1), finite, "o-", color=color, markersize=4, label=name)
            positive = [value if value is not None and value > 0 else math.nan for value in knob]
            below.plot(range(1, len(positive) + 1), positive, "o-", color=color, markersize=4)
        above.set_ylabel(trace.value_label)
        if not trace.search:
            above.set_yscale("log")
            plain_log(above.yaxis, (1.0,))
        below.set_yscale("log")
        if _decades(value for _, _, knob in chosen for value in knob) < 2:
            plain_log(below.yaxis)
        below.set_ylabel(trace.penalty_label)
        below.set_xlabel(trace.round_label)
        _whole_numbers(below)
        style(above)
        style(below)
        above.legend(loc="best", title=None, ncols=2 if width > 500 else 1)

    return draw(
        "solver-path",
        "Solver convergence and its penalty",
        plot,
        caption=trace.caption,
        description=trace.caption + " Operators: " + ", ".join(name for name, *_ in chosen) + ".",
        heights=(360, 360),
        table=(
            ["operator", "round", trace.penalty_label, trace.value_label],
            [
                [name, str(i + 1), significant(k), significant(e, 4)]
                for name, errors, knob in chosen
                for i, (e, k) in enumerate(zip(errors, knob, strict=True))
            ],
        ),
    )


def solver_records(step: dict[str, Any]) -> tuple[Trace, list[float | None], list[float | None]] | None:
    """Read (trace, results, penalties) by round of a step's records; None if its solver records no rounds."""
    trace = TRACES.get(str(step.get("method")))
    rounds = [] if trace is None else trace.rounds(step)
    if trace is None or len(rounds) < 2:
        return None
    values, penalties = [record[trace.value] for record in rounds], [record[trace.penalty] for record in rounds]
    if not trace.search:
        return trace, [_percentage(value) for value in values], [_number(value) for value in penalties]
    first = next((value for value in values if value), 1.0)
    return trace, [_number(value / first) for value in values], [_number(value) for value in penalties]


def time_by_layer(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw the wall time of every decoder layer by phase."""
    timed = [layer for layer in layers if layer.seconds]
    if not timed:
        return None
    found = {
        phase: values for phase in COLOURED_PHASES if any(values := [layer.seconds.get(phase, 0.0) for layer in timed])
    }
    found["other"] = [sum(s for phase, s in layer.seconds.items() if phase not in COLOURED_PHASES) for layer in timed]

    def plot(figure: Any, width: int) -> None:
        axes = figure.subplots()
        base = [0.0] * len(timed)
        for color, (phase, values) in zip(SERIES, found.items(), strict=False):
            name = PHASES.get(phase, phase)
            axes.bar([layer.index for layer in timed], values, bottom=base, width=0.82, color=color, label=name)
            base = [b + v for b, v in zip(base, values, strict=True)]
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("seconds")
        axes.set_ylim(0, 1.05 * max(*base, 1e-9))
        _whole_numbers(axes)
        style(axes)
        figure.legend(loc="outside upper left", ncols=2 if width > 500 else 1, handlelength=1.2)

    totals = {phase: sum(values) for phase, values in found.items()}
    return draw(
        "time-by-layer",
        "Time by decoder layer",
        plot,
        caption="Wall time by phase.",
        description="Stacked bars. In all: "
        + ", ".join(f"{PHASES.get(phase, phase)} {duration(value)}" for phase, value in totals.items())
        + ".",
        table=(
            ["phase", "seconds"],
            [[PHASES.get(name, name), significant(value)] for name, value in totals.items()],
        ),
    )


def _percentage(share: Any) -> float | None:
    number = _number(share)
    return None if number is None else 100 * number


def _decades(values: Iterable[float | None]) -> float:
    """Return the powers of ten that positive values span."""
    logs = [math.log10(value) for value in values if value is not None and value > 0]
    return max(logs, default=0.0) - min(logs, default=0.0)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _line(axes: Any, pairs: Sequence[tuple[int, float]], color: str, label: str, marker: str) -> None:
    axes.plot([x for x, _ in pairs], [y for _, y in pairs], marker + "-", color=color, markersize=4.5, label=label)


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
