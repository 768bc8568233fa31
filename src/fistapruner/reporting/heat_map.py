"""Draw a percentage of every operator as a heat map: decoder layers by operators."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from ..runs.layer_records import LayerEntry
from ..runtime.formatting import significant
from .drawing import HEAT, HEAT_LEVELS, INK, SURFACE, Drawing, draw, heat_level, style
from .layer_errors import short_names

MOST_NAMES = 40
"""Operators of a layer above which a heat map has one row for all experts' operators of a kind."""


def heat_map(
    key: str,
    title: str,
    layers: Sequence[LayerEntry],
    values: Mapping[tuple[Any, Any], float],
    caption: str,
    what: str,
) -> Drawing | None:
    """Draw percentages by (decoder layer, operator) as a heat map; None without any.

    Of a mixture with many experts, a row is the median over all experts' operators of a kind.

    Args:
        key, title, caption: see :class:`Drawing`.
        layers: of the run.
        values: in percent.
        what: the quantity in a word, for the description.
    """
    if not values:
        return None
    grid = _Grid.of(layers, values)
    if grid.experts:
        name = grid.names[grid.experts[0]]
        caption += f" A row such as {name} is the median of a layer's experts; the table has the largest."
    worst = max(values, key=lambda key: values[key])
    middle = significant(median(values.values()), 2)
    return draw(
        key,
        title,
        grid.plot,
        caption=caption,
        description=f"Heat map of {len(grid.layers)} decoder layers by {len(grid.rows)} operators"
        + (" or kinds of them" if grid.experts else "")
        + f". The largest {what} is {significant(values[worst], 2)} % at layer {worst[0]}, {worst[1]}; "
        f"the median is {middle} %.",
        heights=(max(150, 70 + 30 * len(grid.rows)), max(320, 150 + 15 * len(grid.layers))),
        full=True,
        table=(
            [
                "layer",
                *(grid.names[row] for row in grid.rows),
                *(f"{grid.names[kind]}, largest" for kind in grid.experts),
            ],
            [
                [
                    str(index),
                    *(significant(grid.shown.get((index, row))) for row in grid.rows),
                    *(significant(max(grid.cells.get((index, kind), ()), default=None)) for kind in grid.experts),
                ]
                for index in grid.layers
            ],
        ),
    )


@dataclass(frozen=True)
class _Grid:
    """What a heat map shows.

    Args:
        layers: numbers of the decoder layers.
        rows: operators, or kinds of experts' operators; ``names``: what to call them.
        experts: those rows that are kinds.
        cells: percentages by (layer, row), several where a row is a kind; ``shown``: their medians.
    """

    layers: list[int]
    rows: list[str]
    names: dict[Any, str]
    experts: list[str]
    cells: dict[tuple[Any, Any], list[float]]
    shown: dict[tuple[Any, Any], float]

    @classmethod
    def of(cls, layers: Sequence[LayerEntry], values: Mapping[tuple[Any, Any], float]) -> Self:
        """Gather percentages by (decoder layer, operator)."""
        full = short_names(layers)
        merged = len(full) > MOST_NAMES
        kinds = {op.name: _kind(op.name) if merged else op.name for layer in layers for op in layer.operators}
        rows = list(dict.fromkeys(kinds.values()))
        names = {kind: _kind(full[name]) if merged else full[name] for name, kind in kinds.items()}
        cells: dict[tuple[Any, Any], list[float]] = {}
        for (index, name), value in values.items():
            cells.setdefault((index, kinds[name]), []).append(value)
        shown = {place: median(found) for place, found in cells.items()}
        experts = [kind for kind in rows if kind not in kinds]
        return cls([layer.index for layer in layers], rows, names, experts, cells, shown)

    def plot(self, figure: Any, width: int) -> None:
        """Draw the cells and the scale: layers across a wide figure, down a narrow one."""
        low, high = _log_range(list(self.shown.values()))
        wide = width > 500
        axes, scale = figure.subplots(
            *((1, 2) if wide else (2, 1)), gridspec_kw={"width_ratios": [60, 1]} if wide else {"height_ratios": [60, 1]}
        )
        across, down = (self.layers, self.rows) if wide else (self.rows, self.layers)
        cell = (width - 150) / max(1, len(across))
        for column, a in enumerate(across):
            for row, d in enumerate(down):
                place = (a, d) if wide else (d, a)
                if place not in self.shown:
                    continue
                level = heat_level(math.log(max(self.shown[place], 1e-12)), low, high)
                axes.add_patch(_cell(column, row, HEAT[level]))
                if cell > 27:
                    color = INK if level < HEAT_LEVELS // 2 else SURFACE
                    axes.text(
                        column, row, _brief(self.shown[place]), ha="center", va="center", fontsize=9.5, color=color
                    )
        axes.set_xlim(-0.5, len(across) - 0.5)
        axes.set_ylim(len(down) - 0.5, -0.5)
        names_across, names_down = ([self.names.get(label, label) for label in labels] for labels in (across, down))
        _ticks(axes, "x", names_across, every=1 if not wide else max(1, round(28 / max(cell, 1))), rotate=not wide)
        _ticks(axes, "y", names_down, every=1 if wide else max(1, len(down) // 40))
        axes.set_xlabel("decoder layer" if wide else "")
        axes.set_ylabel("" if wide else "decoder layer")
        style(axes, grid=None)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        _scale(scale, low, high, vertical=wide)


def _kind(name: str) -> str:
    """Return the name that an operator shares with those of other experts: ``experts.*.down_proj``."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _log_range(values: list[float]) -> tuple[float, float]:
    """Return the ends of a logarithmic scale.

    The lowest twentieth, operators that are nearly exact, does not stretch it.
    """
    logs = sorted(math.log(max(value, 1e-12)) for value in values)
    return logs[len(logs) // 20], logs[-1]


def _brief(value: float) -> str:
    """Format a percentage in at most five characters, for a cell of the heat map."""
    return (
        "<0.01"
        if value < 0.01
        else f"{value:.2f}"
        if value < 1
        else f"{value:.1f}"
        if value < 99.95
        else f"{value:.0f}"
    )


def _cell(column: int, row: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, facecolor=color, edgecolor="none")


def _scale(axes: Any, low: float, high: float, *, vertical: bool) -> None:
    """Draw the heat map's colour scale."""
    from matplotlib.patches import Rectangle

    for level, color in enumerate(HEAT):
        corner = (0, level) if vertical else (level, 0)
        axes.add_patch(Rectangle(corner, *((1, 1.02) if vertical else (1.02, 1)), facecolor=color, edgecolor="none"))
    positions = [0, HEAT_LEVELS / 2, HEAT_LEVELS]
    labels = [f"{significant(math.exp(low + (high - low) * p / HEAT_LEVELS), 2)} %" for p in positions]
    labels[0] = f"≤ {labels[0]}"
    axes.set_xlim(0, 1 if vertical else HEAT_LEVELS)
    axes.set_ylim(0, HEAT_LEVELS if vertical else 1)
    if vertical:
        axes.set_yticks(positions, labels)
        axes.yaxis.tick_right()
        axes.set_xticks([])
    else:
        axes.set_xticks(positions, labels)
        axes.set_yticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _ticks(axes: Any, axis: str, labels: Sequence[Any], *, every: int, rotate: bool = False) -> None:
    chosen = range(0, len(labels), every)
    texts = [str(labels[i]) for i in chosen]
    if axis == "x":
        axes.set_xticks(list(chosen), texts, rotation=90 if rotate else 0)
    else:
        axes.set_yticks(list(chosen), texts)
