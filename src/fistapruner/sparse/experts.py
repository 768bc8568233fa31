"""Run the experts of mixtures with packed weights.

:class:`~fistapruner.models.experts.Experts` gives every expert linear modules, so each is packed like any operator. The
state dict keeps the names and shapes of the tensors of all experts that ``transformers`` has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.experts import Experts


def serve_experts(model: nn.Module) -> None:
    """Skip experts without tokens, and keep the names of fused experts in the state dict; in place."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.skips = True
            module.register_state_dict_post_hook(_join)
            module.register_load_state_dict_pre_hook(_split)


def _join(experts: Experts, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Join the weights of single experts in a state dict."""
    for name, parts in experts.fused.items():
        state[prefix + name] = torch.stack(
            [
                torch.cat([state.pop(f"{prefix}{number}.{part}.weight") for part in parts])
                for number in range(experts.number)
            ]
        )


def _split(experts: Experts, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Split the tensors of all experts in a state dict that is loaded."""
    for name, parts in experts.fused.items():
        whole: Tensor | None = state.pop(prefix + name, None)
        for number in range(experts.number if whole is not None else 0):
            assert whole is not None
            for part, weight in zip(parts, whole[number].chunk(len(parts)), strict=True):
                state[f"{prefix}{number}.{part}.weight"] = weight
