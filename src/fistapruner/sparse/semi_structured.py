"""Run 2:4 operators with torch's semi-structured CUDA kernels where a measurement shows that they pay.

Sparse tensor cores double the arithmetic throughput but not the memory bandwidth, and at small batches their overhead
often costs more. So every shape is timed on the device at the user's batch size before it is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..core import NM
from ..errors import FistaPrunerError, one_line
from ..models.experts import holds_experts
from ..runs.arguments import checked_arguments
from .linear import SparseLinear

MARGIN = 1.05
"""Speed-up from which the sparse product is used; less is within the noise of a measurement."""

REPEATS = 50


@dataclass(frozen=True)
class OperatorChoice:
    """The decision for one operator.

    Args:
        name: the operator.
        sparse: whether it runs on sparse tensor cores now.
        reason: the reason, as text.
        dense_seconds: time of the dense product, None where it was not measured.
        sparse_seconds: time of the sparse product, None where it was not measured.
    """

    name: str
    sparse: bool
    reason: str
    dense_seconds: float | None = None
    sparse_seconds: float | None = None


@checked_arguments
def to_semi_structured(
    model: nn.Module,
    *,
    tokens: int = 1,
    to_sparse: Callable[[Tensor], Tensor] | None = None,
    clock: Callable[[Callable[[], Tensor], torch.device], float] | None = None,
) -> list[OperatorChoice]:
    """Convert 2:4 operators to semi-structured ones, in place, where that is faster on their device.

    Args:
        model: a model on a CUDA device (Ampere or later), in fp16 or bf16, for inference.
        tokens: tokens in one forward pass: the batch when decoding, batch times prompt when not.
        to_sparse: makes the semi-structured weight; None takes ``torch.sparse.to_sparse_semi_structured``.
        clock: returns the seconds of a call on a device; None takes the median by CUDA events.

    Returns:
        One ``OperatorChoice`` for every linear operator: which were changed, which stay as they are, and why.
        GPT-2's ``Conv1D``, packed operators and tensors of all experts of a mixture are listed and stay as they are.

    Raises:
        FistaPrunerError: it is no model, it is not on a CUDA device, or its GPU has no sparse tensor cores.
    """
    if not isinstance(model, nn.Module):
        raise FistaPrunerError(f"model is of the class {type(model).__name__}, and a loaded model is expected")
    if type(tokens) is not int or tokens < 1:
        raise FistaPrunerError(f"tokens {tokens!r} is not a whole number of at least 1")
    operators = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if to_sparse is None:
        _check_devices(operators)
        to_sparse = torch.sparse.to_sparse_semi_structured
    clock = clock or seconds
    timed: dict[tuple[object, ...], tuple[float, float] | str] = {}
    choices = []
    for name, module in operators.items():
        weight = module.weight.detach()
        reason = _unfit(weight)
        if reason:
            choices.append(OperatorChoice(name, False, reason))
            continue
        key = (tuple(weight.shape), weight.dtype, weight.device)
        converted: Tensor | None = None
        if key not in timed:
            try:
                converted = to_sparse(weight)
                timed[key] = _time_both(weight, converted, tokens, clock)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                timed[key] = f"torch refuses: {one_line(error, 120)}"
        result = timed[key]
        if isinstance(result, str):
            choices.append(OperatorChoice(name, False, result))
            continue
        dense, sparse = result
        faster = dense > MARGIN * sparse
        if faster:
            module.weight = nn.Parameter(to_sparse(weight) if converted is None else converted, requires_grad=False)
        words = "faster" if dense > sparse else "slower"
        reason = f"{max(dense, sparse) / max(min(dense, sparse), 1e-12):.2f} times {words} at {tokens} tokens"
        if dense > sparse and not faster:
            reason = f"only {reason}, less than {MARGIN}"
        choices.append(OperatorChoice(name, faster, reason, dense, sparse))
    for name, other in model.named_modules():
        if isinstance(other, Conv1D):
            choices.append(OperatorChoice(name, False, "it is a Conv1D, whose weight is transposed"))
        elif isinstance(other, SparseLinear):
            choices.append(OperatorChoice(name, False, "its weight is packed: load the model with packed=False"))
    for name, parameter in model.named_parameters():
        if holds_experts(model.get_submodule(name.rpartition(".")[0]), name, parameter):
            choices.append(OperatorChoice(name, False, "it is one tensor of all experts, torch takes matrices"))
    return choices


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Measure the median seconds of a call on a CUDA device, with CUDA events."""
    for _ in range(5):
        call()
    times: list[float] = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        times.append(float(begin.elapsed_time(end)) / 1000)
    return sorted(times)[len(times) // 2]


def _check_devices(operators: dict[str, nn.Linear]) -> None:
    for name, module in operators.items():
        device = module.weight.device
        if device.type != "cuda":
            instead = "on a CPU load a packed checkpoint with fistapruner.load"
            raise FistaPrunerError(f"{name} is on {device}: sparse tensor cores need a CUDA device; {instead}")
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise FistaPrunerError(
                f"{torch.cuda.get_device_name(device)} has no sparse tensor cores: Ampere or later is needed"
            )


def _unfit(weight: Tensor) -> str:
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"its dtype is {weight.dtype}, sparse tensor cores take float16 and bfloat16"
    if not NM(2, 4).satisfies(weight):
        return "it is not 2:4"
    return ""


def _time_both(
    weight: Tensor, converted: Tensor, tokens: int, clock: Callable[[Callable[[], Tensor], torch.device], float]
) -> tuple[float, float]:
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        return clock(lambda: functional.linear(x, weight), weight.device), clock(
            lambda: functional.linear(x, converted), weight.device
        )
