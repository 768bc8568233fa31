"""Run 2:4 operators on a GPU with torch's own semi-structured tensors, where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.benchmark import Timer

from ..core import NM
from ..errors import FistaPrunerError, one_line

MARGIN = 1.05
"""Speed-up from which the sparse product is used; less is within the noise of a measurement."""


def to_semi_structured(model: nn.Module, *, tokens: int = 1) -> dict[str, str]:
    """Convert 2:4 linear operators to semi-structured ones, in place, where that is faster.

    Sparse tensor cores double the arithmetic throughput but not the memory bandwidth: so every shape is timed first.

    Args:
        model: a model on a CUDA device (Ampere or later), in fp16 or bf16, for inference.
        tokens: tokens in one forward pass: the batch when decoding, batch times prompt when not.

    Returns:
        What was found of every 2:4 ``nn.Linear``, by its name, such as ``converted: 1.31 times as fast at 512 tokens``.

    Raises:
        FistaPrunerError: an operator is not on a CUDA device.
    """
    ratios: dict[tuple[object, ...], float] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not NM(2, 4).satisfies(weight := module.weight.detach()):
            continue
        if not weight.is_cuda:
            raise FistaPrunerError(f"{name} is on {weight.device}: on a CPU load a packed model with fistapruner.load")
        key = weight.shape, weight.dtype, weight.device
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            if key not in ratios:
                ratios[key] = _seconds(weight, weight, tokens) / _seconds(weight, sparse, tokens)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            found[name] = f"left dense: torch refuses it ({one_line(error, 120)})"
            continue
        if ratios[key] > MARGIN:
            module.weight = nn.Parameter(sparse, requires_grad=False)
        done = "converted" if ratios[key] > MARGIN else "left dense"
        found[name] = f"{done}: {ratios[key]:.2f} times as fast at {tokens} tokens"
    return found


def _seconds(weight: Tensor, held: Tensor, tokens: int) -> float:
    """Return the median seconds of a product of the weight, held densely or sparsely, on its device."""
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    timer = Timer("linear(x, held)", globals={"linear": functional.linear, "x": x, "held": held})
    with torch.inference_mode():
        return float(timer.blocked_autorange(min_run_time=0.05).median)
