"""Tensor names that changed between releases of transformers; its table of them is semi-private and only used here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def renamed_tensors(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Which stored tensors have another name in ``model`` today.

    Without the table only names that changed since the checkpoint was saved are not found, which is an error that names
    the tensor.

    Args:
        model: transformers model, may be on the meta device.
        stored: tensor names in a checkpoint.

    Returns:
        From today's name to the stored one.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
        return {new: old for old in stored if (new := apply_renamings(old, renamings)) != old}
    except (ImportError, AttributeError, TypeError):
        return {}
