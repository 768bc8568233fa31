"""Run 2:4 operators on a GPU with torch's own semi-structured tensors, where that is faster."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.benchmark import Timer

from ..core import NM
from ..errors import FistaPrunerError, one_line
from ..runs.arguments import checked_arguments

MARGIN = 1.05
"""Speed-up from which the sparse product is used; less is within the noise of a measurement."""


@checked_arguments
def to_semi_structured(model: nn.Module, *, tokens: int = 1) -> dict[str, str]:
    """Convert 2:4 linear operators to semi-structured ones, in place, where that is faster on their device.

    Sparse tensor cores double the arithmetic throughput but not the memory bandwidth, and at small batches their
    overhead often costs more: so every shape is timed first.

    Args:
        model: a model on a CUDA device (Ampere or later), in fp16 or bf16, for inference.
        tokens: tokens in one forward pass: the batch when decoding, batch times prompt when not.

    Returns:
        What was found of every 2:4 ``nn.Linear``, by its name, such as ``converted: 1.31 times as fast at 512 tokens``.

    Raises:
        FistaPrunerError: an operator is not on a CUDA device with sparse tensor cores.
    """
    ratios: dict[tuple[object, ...], float | str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not NM(2, 4).satisfies(weight := module.weight.detach()):
            continue
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
            instead = "on a CPU load a packed checkpoint with fistapruner.load"
            raise FistaPrunerError(f"{name} is on {weight.device}, without sparse tensor cores; {instead}")
        key = weight.shape, weight.dtype, weight.device
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            ratio = (
                ratios[key] if key in ratios else _seconds(weight, weight, tokens) / _seconds(weight, sparse, tokens)
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            ratio = one_line(error, 120)
        ratios[key] = ratio
        if isinstance(ratio, str):
            found[name] = f"left dense: torch refuses it ({ratio})"
            continue
        if ratio > MARGIN:
            module.weight = nn.Parameter(sparse, requires_grad=False)
        done = "converted" if ratio > MARGIN else "left dense"
        found[name] = f"{done}: {ratio:.2f} times as fast at {tokens} tokens"
    return found


def _seconds(weight: torch.Tensor, held: torch.Tensor, tokens: int) -> float:
    """Return the median seconds of a product of a shape, on its device."""
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    timer = Timer("linear(x, held)", globals={"linear": functional.linear, "x": x, "held": held})
    with torch.inference_mode():
        return float(timer.blocked_autorange(min_run_time=0.05).median)
