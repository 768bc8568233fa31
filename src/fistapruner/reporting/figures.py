"""Draw figures as inline SVG that follow the page's theme.

Matplotlib draws with place-holder colours that are then replaced by CSS variables, so one drawing serves the light and
the dark theme and prints well. It is drawn at one width, :data:`WIDTH`, with type that can be read on a phone, and the
page scales it. With ``FISTAPRUNER_FIGURES=0`` in the environment nothing is drawn: titles, captions and the numbers
behind the figures remain.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..errors import MissingExtraError
from ..runs.records import LayerEntry, Report
from ..runtime.show import significant

WIDTH = 420
"""Width of drawings in pixels."""

INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#1100{index:02x}" for index in range(1, 9))
HEAT = tuple(f"#2200{index:02x}" for index in range(24))
COLORS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"}
COLORS |= {color: f"var(--series-{index})" for index, color in enumerate(SERIES, 1)}
COLORS |= {
    color: f"color-mix(in srgb, var(--heat) {round(6 + 94 * level / 23)}%, var(--surface))"
    for level, color in enumerate(HEAT)
}

MOST_NAMES = 40
"""Operators of a layer above which the heat map has one column for all experts' operators of a kind."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page, with the numbers behind it as a table of ``head`` and ``rows``.

    ``description`` says what is seen to readers who cannot see it; ``svg`` is empty where figures are left out.
    """

    key: str
    title: str
    caption: str
    description: str
    svg: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def run_figures(report: Report) -> list[Drawing]:
    """Draw the figures of a run that there is data for."""
    drawings = [losses(report), operator_map(report), layer_errors(report.layers), layer_sparsity(report)]
    return [drawing for drawing in drawings if drawing is not None]


def losses(report: Report) -> Drawing | None:
    """Draw the training loss of every step, the held-out loss of every check, and the step that is kept."""
    found = report.recovery
    if found is None or not (found.curve or found.checks):
        return None
    checks = [(check.step, check.held_out) for check in found.checks if math.isfinite(check.held_out)]

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*_columns(found.curve), color=SERIES[2], linewidth=1.2, label="training")
        axes.plot(*_columns(checks), "o-", color=SERIES[0], markersize=6, label="held out")
        if found.best is not None:
            label = f"kept: step {found.kept_step}"
            axes.axvline(found.kept_step, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=label)
        _by_number(axes, "optimizer step", f"loss ({found.loss})")
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.4)

    names = list(found.checks[0].by_task) if found.checks else []
    return draw(
        "training",
        "Training and held-out loss",
        plot,
        caption="Means, in nats a token or a pair. The training loss is that of each step, before it. The weights with "
        "the lowest held-out loss are kept, those before training included.",
        description=f"Lines over {found.steps} of {found.asked_steps} steps.",
        head=["step", "held-out loss", *names],
        rows=[
            [str(at.step), *(significant(loss, 5) for loss in (at.held_out, *map(at.by_task.get, names)))]
            for at in found.checks
        ],
    )


def operator_map(report: Report) -> Drawing | None:
    """Draw the relative error of every operator, or of a training how far its weights moved."""
    errors = {
        (layer.index, op.name): 100 * op.relative_error
        for layer in report.layers
        for op in layer.operators
        if op.relative_error is not None and math.isfinite(op.relative_error)
    }
    if errors:
        caption = "Squared error of the outputs as a share of their energy, in %, on calibration tokens."
        if any(operator.dense_error for operator in report.operators):
            caption += " Drift of an operator's inputs counts: its dense weights would have part of this error too."
        return heat_map("error-map", "Relative error of every operator", report.layers, errors, caption)
    changes = {(at.index, op.name): 100 * op.change for at in report.layers for op in at.operators if op.change}
    caption = "‖ΔW‖ / ‖W‖ in %: norm of the change of an operator's weights over their norm before."
    return heat_map("change-map", "Change of every operator", report.layers, changes, caption)


def heat_map(
    key: str, title: str, layers: Sequence[LayerEntry], values: Mapping[tuple[int, str], float], caption: str
) -> Drawing | None:
    """Draw percentages by decoder layer and operator; None without any.

    Of a mixture with many experts, a column is the median over all experts' operators of a kind.
    """
    if not values:
        return None
    names = short_names(layers)
    merged = len(names) > MOST_NAMES
    if merged:
        names = {name: re.sub(r"\.\d+\.", ".*.", short) for name, short in names.items()}
        caption += " A column with * is the median of a layer's experts."
    cells: dict[tuple[int, str], list[float]] = {}
    for (index, name), value in values.items():
        cells.setdefault((index, names[name]), []).append(value)
    shown = {place: median(found) for place, found in cells.items()}
    columns = list(dict.fromkeys(names[operator.name] for layer in layers for operator in layer.operators))
    rows = sorted({index for index, _ in shown})
    positive = sorted(value for value in shown.values() if value > 0) or [1.0]
    low = positive[len(positive) // 20]  # nearly exact operators do not stretch the scale
    top = max(positive[-1], 1.01 * low)

    def plot(figure: Any) -> None:
        from matplotlib.colors import ListedColormap, LogNorm

        axes = figure.subplots()
        grid = [[shown.get((row, column), math.nan) for column in columns] for row in rows]
        norm = LogNorm(low, top, clip=True)
        drawn = axes.pcolormesh(grid, cmap=ListedColormap(HEAT), norm=norm, edgecolor=SURFACE, linewidth=1)
        axes.invert_yaxis()
        axes.set_xticks([place + 0.5 for place in range(len(columns))], columns, rotation=90)
        every = math.ceil(len(rows) / 40)
        axes.set_yticks([place + 0.5 for place in range(0, len(rows), every)], [str(row) for row in rows[::every]])
        axes.set_ylabel("decoder layer")
        style(axes, grid=False)
        scale = figure.colorbar(drawn, ax=axes, location="top", aspect=40)
        ticks = [low, math.sqrt(low * top), top]
        scale.set_ticks(ticks, labels=[f"{significant(value, 2)} %" for value in ticks])
        scale.ax.minorticks_off()
        scale.outline.set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    worst = max(values, key=lambda place: values[place])
    return draw(
        key,
        title,
        plot,
        caption=f"{caption} Logarithmic scale.",
        description=f"Heat map of {len(rows)} decoder layers by {len(columns)} operators. The largest value is "
        f"{significant(values[worst], 2)} % at layer {worst[0]}, {worst[1]}.",
        height=190 + round(len(rows) * max(6, min(16, 640 / len(rows)))),
        head=["layer", *columns, *(["largest"] if merged else [])],
        rows=[
            [
                str(row),
                *(significant(shown.get((row, column))) for column in columns),
                *([significant(max(values[place] for place in values if place[0] == row))] if merged else []),
            ]
            for row in rows
        ],
    )


def layer_errors(layers: Sequence[LayerEntry]) -> Drawing | None:
    """Draw the error of every decoder layer's output, beside the mean of its operators."""
    means = [(layer.index, 100 * mean) for layer in layers if (mean := mean_error(layer)) is not None]
    output = {layer.index: 100 * layer.relative_error for layer in layers if layer.relative_error is not None}
    if not means:
        return None

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*_columns(means), "o-", color=SERIES[0], markersize=4.5, label="mean of its operators")
        axes.plot(*_columns(list(output.items())), "s-", color=SERIES[1], markersize=4.5, label="output of the layer")
        axes.set_ylim(bottom=0)
        _by_number(axes, "decoder layer", "relative error, %")
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.4)

    of = next((layer.relative_error_of for layer in layers if layer.relative_error_of), None)
    return draw(
        "layer-errors",
        "Error by decoder layer",
        plot,
        caption="Mean over the operators of a layer" + (f"; and of the layer's output, {of}." if of else "."),
        description=f"Lines over {len(means)} decoder layers.",
        head=["layer", "mean of operators, %", "output, %"],
        rows=[[str(index), significant(value), significant(output.get(index))] for index, value in means],
    )


def layer_sparsity(report: Report) -> Drawing | None:
    """Draw the share of zeros of every decoder layer; None where all layers have the same."""
    rows = []
    for layer in report.layers:
        if weights := sum(math.prod(operator.shape) for operator in layer.operators):
            rows.append((layer.index, 100 * sum(operator.zeros for operator in layer.operators) / weights))
    if report.only_structure or len({round(share, 1) for _, share in rows}) < 2:
        return None

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        axes.bar(*_columns(rows), width=0.72, color=SERIES[0])
        axes.set_ylim(0, 100)
        _by_number(axes, "decoder layer", "zeros, %")

    return draw(
        "layer-sparsity",
        "Sparsity by decoder layer",
        plot,
        caption="Exact share of zeros in the operators.",
        description=f"Bars over {len(rows)} decoder layers.",
        head=["layer", "zeros, %"],
        rows=[[str(index), significant(share, 5)] for index, share in rows],
    )


def _by_number(axes: Any, what: str, value: str) -> None:
    """Label axes of values by whole numbers, of layers or steps."""
    axes.set_xlabel(what)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(value)
    style(axes)


def mean_error(layer: LayerEntry) -> float | None:
    """Return the mean relative error of a layer's operators, without those that were kept as they were."""
    errors = [operator.relative_error or 0.0 for operator in layer.judged]
    return sum(errors) / len(errors) if errors else None


def short_names(layers: Sequence[LayerEntry]) -> dict[str, str]:
    """Shorten names of operators as far as each still names one of a layer.

    ``attn.c_proj`` becomes ``c_proj`` where it is the only one. A short name does not begin with a number: of an
    expert it is ``experts.17.down_proj``.
    """
    endings = {}
    for name in dict.fromkeys(operator.name for layer in layers for operator in layer.operators):
        parts = name.split(".")
        starts = [place for place in reversed(range(len(parts))) if not parts[place].isdigit()]
        endings[name] = [".".join(parts[place:]) for place in starts]
    found = Counter(ending for several in endings.values() for ending in several)
    return {name: next((end for end in several if found[end] == 1), name) for name, several in endings.items()}


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def style(axes: Any, *, grid: bool = True) -> None:
    """Style axes: no box, a light grid behind the data, no tick marks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis="y", which="major", linewidth=0.8)
    axes.tick_params(length=0, which="both")


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw(
    key: str,
    title: str,
    plot: Callable[[Any], None],
    *,
    caption: str,
    description: str,
    height: int = 300,
    head: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
) -> Drawing:
    """Draw a figure of ``height`` pixels; ``plot`` draws on a matplotlib ``Figure``."""
    svg = "" if os.environ.get("FISTAPRUNER_FIGURES") == "0" else _svg(key, plot, height)
    return Drawing(key, title, caption, description, svg, head, rows)


def _svg(key: str, plot: Callable[[Any], None], height: int) -> str:
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing a report") from None
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 13,
        "text.color": INK,
        "text.parse_math": False,  # a name may have two dollar signs
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": GRID,
        "legend.frameon": False,
        "legend.fontsize": 13,
        "lines.linewidth": 1.8,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
        plot(figure)
        out = io.StringIO()
        # What savefig calls, without its first trial drawing: half the time of a page.
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), key)


def _inline(svg: str, key: str) -> str:
    """Turn an SVG document into an element of a page: no header, unique ids, the page's colours and type."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{key}-", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\sxmlns:xlink="[^"]*"', "", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?)\s{size}="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"#[0-9a-f]{6}", lambda match: COLORS.get(match[0], match[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
