"""Find the stored names of a model's tensors: other prefixes, and names that transformers has changed.

transformers' table of changed names is semi-private and used in this file only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def stored_names(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Find the checkpoint's name of every parameter and persistent buffer of a model.

    Base models are saved without the head model's prefix ("h.0.…" for "transformer.h.0.…"), and multi-part models with
    one more; both are the same name up to a prefix.

    Args:
        model: transformers model, may be on the meta device.
        stored: tensor names in a checkpoint.

    Returns:
        The stored name by the model's name, for all that were found, in the model's order.
    """
    known = {name: name for name in stored} | _renamed(model, stored)
    base = model.base_model_prefix + "."
    names = {}
    for name in model.state_dict(keep_vars=True):
        candidates = (name, name.removeprefix(base), base + name)
        found = next((known[candidate] for candidate in candidates if candidate in known), None)
        if found is None:
            ends = [candidate for candidate in stored if candidate.endswith("." + name.removeprefix(base))]
            found = ends[0] if len(ends) == 1 else None
        if found is not None:
            names[name] = found
    return names


def _renamed(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Map today's name of every stored tensor that transformers renames to its stored name.

    If transformers has no such table, renamed tensors are not found, and the error names them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
        return {new: old for old in stored if (new := apply_renamings(old, renamings)) != old}
    except (ImportError, AttributeError, TypeError):
        return {}
