"""Keep the zeros of a pruned model while somebody else's trainer works on it.

    with fistapruner.hold_mask(model):
        train(model)

or ``Trainer(model, ..., callbacks=[fistapruner.hold_mask(model)])``. The masks are taken once, from the weights as they
are then. Gradients of pruned weights are set to 0, so that clipping and the optimizer's moments see surviving weights
only, and pruned weights are set to 0 after every optimizer step, because weight decay, momentum and rounding move
weights without a gradient too. At the end every pruned weight is checked.

Every ``torch.optim.Optimizer`` calls torch's global step hooks, also inside of ``accelerate``'s wrapper and behind a
gradient scaler; an optimizer that is made later needs no registration. Trainers that keep their own copies of the
weights (DeepSpeed, Apex O2) overwrite a model's weights after the hooks; the check at the end reports them.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError
from ..models.experts import PARTS, holds_experts
from ..models.files.folder_files import PRUNING_RECORD
from ..models.files.record import MIN_ZEROS, read_pruning_record
from ..runtime.numerics import dtype_name

WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module"
    r"|modules_to_save\.[^.]+)(?=\.|$)"
)
"""Parts of a parameter's name that wrappers add: data parallelism, compilation, checkpointing, adapters."""

PACKED = "SparseLinear"
"""Class of packed operators, by name: its package ``sparse`` is above this one."""


class _Weight(NamedTuple):
    """A parameter of a module: the weight of a linear one, or a tensor of all experts."""

    module: nn.Module
    parameter: str

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now: sharding and casting replace parameters."""
        found = getattr(self.module, self.parameter)
        assert isinstance(found, Tensor)
        return found


def hold_mask(model: nn.Module) -> HoldMask:
    """Keep every zero of a pruned model while it is trained by any PyTorch trainer.

    Args:
        model: the pruned model. Held are the operators that the ``fistapruner.json`` of its folder
            (``model.name_or_path``) lists; without one, the linear weights of numbered layers with at least 1 % zeros
            (all-zero ones are new adapters and are not held). A tensor of all experts of a mixture counts as a linear
            weight: all of its zeros are held, if any expert's are.

    Returns:
        A context manager for the training, which is also a ``transformers.TrainerCallback``. The masks take one byte
        for each held weight.

    Raises:
        FistaPrunerError: it is no model, nothing is pruned, an operator of ``fistapruner.json`` is missing or has lost
            zeros, or a weight is packed, quantised or has no values.
    """
    return HoldMask(model)


class HoldMask(TrainerCallback):  # type: ignore[misc]
    """Set gradients and weights to 0 where a model is pruned; see :func:`hold_mask`.

    The model may be moved, cast, compiled or sharded (FSDP2) after the masks were taken.

    Args:
        model: the pruned model.

    Attributes:
        operators: names of the held weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = held_weights(model)
        self._pruned = {name: _local(weight.tensor) == 0 for name, weight in self._weights.items()}
        self._handles: list[Any] = []
        self._watched: dict[str, weakref.ref[Tensor]] = {}

    @property
    def operators(self) -> tuple[str, ...]:
        """Return the names of the held weights."""
        return tuple(self._weights)

    def __enter__(self) -> Self:
        copied = _copied(self._model)
        if name := next((name for name, weight in self._weights.items() if weight.module in copied), None):
            raise FistaPrunerError(
                f"{name}: PEFT has frozen it and trains a copy (modules_to_save): call hold_mask after get_peft_model, "
                "with the model that it returns (trainer.model, where the trainer calls it)"
            )
        if not self._handles:
            self._reshard()
            own = weakref.ref(self)  # the hooks are global: they must not keep a model alive whose training failed

            def before(optimizer: Any, *_: Any) -> None:
                if (held := own()) is not None:
                    held._mask(optimizer, gradients=True)

            def after(optimizer: Any, *_: Any) -> None:
                if (held := own()) is not None:
                    held._mask(optimizer, gradients=False)

            self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
            for name, parameter in self._parameters():
                self._watch(name, parameter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if kind is None:
            self.verify()

    def release(self) -> None:
        """Stop masking."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watched = {}

    @torch.no_grad()
    def apply(self) -> None:
        """Set every pruned weight to 0.

        Where weights are sharded, no forward pass may wait for its backward pass.
        """
        self._reshard()
        for name, parameter in self._parameters():
            self._clear(name, parameter)

    @torch.no_grad()
    def verify(self) -> None:
        """Check that every pruned weight is 0. Where weights are sharded, all processes must call it.

        Raises:
            FistaPrunerError: names the first operator with lost zeros.
        """
        self._reshard()
        lost, sharded = [], None
        for name, parameter in self._parameters():
            lost.append((_local(parameter)[self._local_pruned(name, parameter)] != 0).sum())
            sharded = parameter if hasattr(parameter, "to_local") else sharded
        counts = torch.stack([count.cpu() for count in lost])
        if sharded is not None and torch.distributed.is_initialized():  # all processes come to the same verdict
            counts = counts.to(sharded.device)
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        for name, count in zip(self._weights, counts.tolist(), strict=True):
            if count:
                raise FistaPrunerError(
                    f"{name}: {count} of its pruned weights are not 0 any more: something other than a step of a "
                    "torch.optim optimizer has changed them (a merged adapter, a trainer with its own copy of the "
                    "weights); to set them back to 0, call apply() of what hold_mask returned before the training "
                    "(with fistapruner.hold_mask(model) as held)"
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to mask (called by the trainer).

        Raises:
            FistaPrunerError: the trainer trains another model, or copies of held weights.
        """
        if (model := kwargs.get("model")) is not None:
            trained = set(model.modules())
            if not any(weight.module in trained for weight in self._weights.values()):
                raise FistaPrunerError(
                    f"the trainer trains another {type(model).__name__} than hold_mask was called with: give both the "
                    "same model, without model_init, which makes a new one"
                )
        self.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop masking and check the zeros (called by the trainer)."""
        self.__exit__(None, None, None)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the held weights, which sharding and casting may have replaced since the masks were taken."""
        for name, weight in self._weights.items():
            yield name, weight.tensor

    def _reshard(self) -> None:
        """Put the shards back into their modules, which after an evaluation may hold whole copies (FSDP2)."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule

            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _watch(self, name: str, parameter: Tensor) -> None:
        """Mask a weight's gradients from now on as soon as they are computed."""
        if not parameter.requires_grad or (name in self._watched and self._watched[name]() is parameter):
            return
        own = weakref.ref(self)

        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            if (held := own()) is not None and parameter.grad is not None:
                held._clear(name, parameter.grad)

        self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        self._watched[name] = weakref.ref(parameter)

    @torch.no_grad()
    def _mask(self, optimizer: torch.optim.Optimizer, *, gradients: bool) -> None:
        """Clear the pruned places of the weights of an optimizer, or of their gradients."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._parameters():
            tensor = parameter.grad if gradients else parameter
            if id(parameter) in own and tensor is not None:
                self._clear(name, tensor)
                self._watch(name, parameter)  # sharding may have replaced the one that was watched

    def _clear(self, name: str, tensor: Tensor) -> None:
        _local(tensor).masked_fill_(self._local_pruned(name, tensor), 0.0)

    def _local_pruned(self, name: str, tensor: Tensor) -> Tensor:
        """Return the pruned places of a weight, of this process's shard if the weight is sharded."""
        pruned, local = self._pruned[name], _local(tensor)
        if pruned.shape != local.shape and hasattr(tensor, "to_local") and pruned.shape == tensor.shape:
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(tensor, DTensor)
            # Every process has the whole mask and keeps its own part: nothing is sent.
            whole = pruned.to(local.device)
            pruned = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        if pruned.shape != local.shape:
            raise FistaPrunerError(
                f"{name} has shape {list(local.shape)}, its mask {list(pruned.shape)}: weights that are flattened "
                "(FSDP1, DeepSpeed ZeRO 3) cannot be held; use FSDP2"
            )
        if pruned is not self._pruned[name] or pruned.device != local.device:
            pruned = self._pruned[name] = pruned.to(local.device)
        return pruned


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory."""
    if hasattr(tensor, "to_local"):
        part: Tensor = tensor.to_local()
        return part
    return tensor.detach()


def held_weights(model: nn.Module) -> dict[str, _Weight]:
    """Find the weights to hold, by name."""
    if not isinstance(model, nn.Module):
        raise FistaPrunerError(f"model is of the class {type(model).__name__}, and a loaded model is expected")
    for name, module in model.named_modules():
        if type(module).__name__ == PACKED:
            raise FistaPrunerError(
                f"{name} is packed, and packed weights cannot be trained: unpack the model first ('fistapruner unpack "
                "FOLDER DIR'), and load DIR"
            )
    weights = dict(_weights(model))
    names = (getattr(module, "name_or_path", None) for module in model.modules())  # of the model inside its wrappers
    folder = next((Path(name) for name in names if isinstance(name, str) and name), None)
    if folder is not None and (folder / PRUNING_RECORD).is_file():
        claims = read_pruning_record(folder).get("operators") or {}
        if claims:
            return _claimed(weights, claims, folder / PRUNING_RECORD)
    found = {}
    for name, weight in weights.items():
        numbered = re.search(r"(^|\.)\d+\.", name)
        share = int(_zeros(name, weight.tensor).sum()) / weight.tensor.numel() if numbered else 0.0
        if MIN_ZEROS <= share < 1.0:
            found[name] = weight
    if not found:
        raise FistaPrunerError(
            f"no linear weight of {type(model).__name__} has at least {MIN_ZEROS:.0%} zeros: there is no mask to hold"
        )
    return found


def _copied(model: nn.Module) -> set[nn.Module]:
    """Find the modules that PEFT keeps as they were, and trains a copy of (``modules_to_save``)."""
    wrapped = (dict(module.named_children()) for module in model.modules())
    pairs = ((children.get("original_module"), children.get("modules_to_save")) for children in wrapped)
    return {inner for kept, copies in pairs if kept is not None and copies for inner in kept.modules()}


def _weights(model: nn.Module) -> Iterator[tuple[str, _Weight]]:
    """Yield the weights of linear modules, and the tensors of all experts, with their names."""
    copied = _copied(model)
    for name, module in model.named_modules():
        if module in copied:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            yield f"{name}.weight", _Weight(module, "weight")
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if holds_experts(module, f"{name}.{key}", parameter):
                yield f"{name}.{key}", _Weight(module, key)


def _claimed(weights: dict[str, _Weight], claims: Any, origin: Path) -> dict[str, _Weight]:
    """Find the operators that ``fistapruner.json`` lists, and check that they still have their zeros."""
    if not isinstance(claims, dict) or not all(isinstance(claim, dict) for claim in claims.values()):
        raise FistaPrunerError(f"{origin} has no mapping of operators to claims")
    trained_last = sorted(weights, key=lambda name: weights[name].tensor.requires_grad)  # of the copies of one module
    plain = {WRAPPERS.sub("", name).strip("."): name for name in trained_last}

    @cache
    def find(asked: str) -> str | None:
        if asked in plain:
            return plain[asked]
        ends = (own for name, own in plain.items() if name.endswith("." + asked) or asked.endswith("." + name))
        return max(ends, key=lambda own: weights[own].tensor.requires_grad, default=None)  # not a frozen reference

    @cache
    def zeros(name: str) -> Tensor:
        return _zeros(name, weights[name].tensor)

    def place(operator: str) -> tuple[str | None, Tensor | None]:
        """Find the weight that holds an operator, and the zeros of the operator's part of it, by row."""
        if expert := re.fullmatch(r"(.+)\.(\d+)\.(\w+)", operator):
            mixture, number, part = expert[1], int(expert[2]), expert[3]
            for name, parts in ((f"{mixture}.{part}", (part,)), (f"{mixture}.gate_up_proj", PARTS)):
                if part in parts and (own := find(name)) and number < len(zeros(own)):
                    return own, zeros(own)[number].chunk(len(parts))[parts.index(part)]
        own = find(f"{operator}.weight")
        return own, None if own is None else zeros(own)

    found = set()
    for stored, claim in claims.items():
        operator = str(claim.get("operator") or stored).removesuffix(".weight")
        name, rows = place(operator)
        if name is None or rows is None:
            raise FistaPrunerError(f"{origin} lists the operator {operator}, which the model does not have")
        count, recorded = int(rows.sum()), claim.get("zeros")
        if isinstance(recorded, int) and count < recorded:
            raise FistaPrunerError(f"{operator} has {count} zeros, {origin} says {recorded}: they were lost before")
        if count:
            found.add(name)
    if not found:
        raise FistaPrunerError(f"the operators that {origin} lists have no zeros: there is no mask to hold")
    return {name: weight for name, weight in weights.items() if name in found}


@torch.no_grad()
def _zeros(name: str, weight: Tensor) -> Tensor:
    """Count the zeros of a weight along its last dimension, over all processes where it is sharded."""
    if not weight.is_floating_point():
        kind = dtype_name(weight.dtype)
        raise FistaPrunerError(f"{name} is quantised ({kind}): its zeros cannot be held; a frozen base keeps them")
    if weight.is_meta:
        raise FistaPrunerError(
            f"{name} has no values on this process (meta device): switch fsdp_cpu_ram_efficient_loading off, or call "
            "hold_mask after accelerator.prepare"
        )
    count = (weight == 0).sum(-1)
    whole: Tensor = count.full_tensor() if hasattr(count, "full_tensor") else count
    return whole.cpu()
