"""Draw figures as inline SVG that follow the page's theme, at any width.

Matplotlib draws with place-holder colours that are then replaced by CSS variables, so one drawing serves the light and
the dark theme and prints well. Every figure is drawn twice, for a wide page and for a phone, at the same size of type;
the page shows the one that fits. With ``FISTAPRUNER_FIGURES=0`` in the environment nothing is drawn: titles, captions
and the numbers behind the figures remain.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MissingExtraError

INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#1100{index:02x}" for index in range(1, 9))
HEAT_LEVELS = 24
HEAT = tuple(f"#2200{index:02x}" for index in range(HEAT_LEVELS))

NARROW, HALF, FULL = 340, 540, 1120
"""Widths in pixels of drawings: on phones, in half of a page, over a full page."""

Plot = Callable[[Any, int], None]
"""Draws on a matplotlib ``Figure`` of a given width in pixels."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Args:
        key: short unique name.
        title: heading above it.
        caption: how to read it, in a sentence or two.
        description: what is seen, for readers who cannot see it.
        wide, narrow: SVG.
        full: whether it takes the full width of the page.
        table: column names and rows of the numbers behind it.
    """

    key: str
    title: str
    caption: str
    description: str
    wide: str
    narrow: str
    full: bool = False
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


def draw(
    key: str,
    title: str,
    plot: Plot,
    *,
    caption: str,
    description: str,
    heights: tuple[int, int] = (300, 300),
    full: bool = False,
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> Drawing:
    """Draw a figure in both widths.

    Args:
        key, title, caption, description, full, table: see :class:`Drawing`.
        plot: draws on a figure; called once for each width.
        heights: pixels of the wide and of the narrow drawing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    wide = _svg(f"{key}-w", plot, FULL if full else HALF, heights[0])
    narrow = _svg(f"{key}-n", plot, NARROW, heights[1])
    return Drawing(key, title, caption, description, wide, narrow, full, table)


def style(axes: Any, *, grid: str | None = "y") -> None:
    """Style axes: no box, a light grid behind the data, no tick marks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, which="major", linewidth=0.8)
    axes.tick_params(length=0, which="both")


def plain_log(axis: Any, steps: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Label a logarithmic axis with plain numbers: ``steps`` times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_right(axes: Any, x: float, y: float, text: str) -> None:
    """Write ``text`` just right of a point."""
    axes.annotate(
        text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", ha="left", color=INK, fontsize=11
    )


def heat_level(value: float, low: float, high: float) -> int:
    """Return the level of ``value`` on the heat scale from ``low`` to ``high``."""
    if not high > low:
        return 0
    return min(HEAT_LEVELS - 1, max(0, int((value - low) / (high - low) * HEAT_LEVELS)))


def _svg(key: str, plot: Plot, width: int, height: int) -> str:
    if os.environ.get("FISTAPRUNER_FIGURES") == "0":
        return ""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing a report") from None
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.family": "sans-serif",
        "font.size": 11.5,
        "axes.titlesize": 12,
        "axes.labelsize": 11.5,
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
        "legend.fontsize": 11,
        "axes.unicode_minus": True,
        "lines.linewidth": 1.8,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        plot(figure, width)
        out = io.StringIO()
        # What savefig calls, without its first trial drawing: half the time of a page.
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), key, width)


def _inline(svg: str, key: str, width: int) -> str:
    """Turn an SVG document into an element of a page: no header, unique ids, the page's colours and type."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{key}-", svg)
    svg = re.sub(r"xlink:href=", "href=", svg)
    svg = re.sub(r'\sxmlns:xlink="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg aria-hidden="true" style="max-width:{width}px"', 1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"#[0-9a-f]{6}", _variable, svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _variable(match: re.Match[str]) -> str:
    color = match[0]
    names = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"}
    if color in names:
        return f"var(--{names[color]})"
    if color in SERIES:
        return f"var(--series-{SERIES.index(color) + 1})"
    if color in HEAT:
        return f"var(--heat-{HEAT.index(color)})"
    return color
