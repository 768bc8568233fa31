"""Read and write the widths of decoder layers in config.json, where they are not those of the config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FistaPrunerError

QUANT_METHOD = "fistapruner"
"""``quant_method`` in ``config.json`` of what plain transformers cannot read: packed folders, and free widths."""

WIDTHS_VERSION = 2
"""``version`` beside it of a folder whose decoder layers have widths of their own, stored as ordinary tensors."""

LayerWidths = dict[int, dict[str, int]]
"""By decoder layer, what its sizes are in place of the config's, by the entry of the config."""


def read_widths(config: Mapping[str, Any], folder: Path) -> LayerWidths:
    """Read the widths of decoder layers in a ``config.json``; empty where all have the config's.

    Raises:
        FistaPrunerError: they cannot be read, or are of a newer version.
    """
    section = config.get("quantization_config")
    if not isinstance(section, Mapping) or section.get("quant_method") != QUANT_METHOD or "widths" not in section:
        return {}
    place, widths = f"{folder / 'config.json'}: quantization_config", section["widths"]
    if section.get("version") not in range(1, WIDTHS_VERSION + 1):
        raise FistaPrunerError(
            f"{place} has version {str(section.get('version'))[:20]}; this program reads {WIDTHS_VERSION}"
        )
    if not isinstance(widths, Mapping) or not all(
        str(index).isdecimal()
        and isinstance(sizes, Mapping)
        and all(type(size) is int and 0 < size < 2**31 for size in sizes.values())
        for index, sizes in widths.items()
    ):
        raise FistaPrunerError(f'{place}: widths such as {{"1": {{"intermediate_size": 1216}}}} are expected')
    return {int(index): dict(sizes) for index, sizes in widths.items()}


def widths_section(widths: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """Return the ``quantization_config`` that :func:`read_widths` reads.

    The widths are written as in ``per_layer_config``, which transformers has in configs but not yet in models.
    """
    layers = {str(index): dict(sizes) for index, sizes in widths.items()}
    return {"quant_method": QUANT_METHOD, "version": WIDTHS_VERSION, "widths": layers}
