"""Keep the zeros of a pruned model while somebody else's trainer works on it.

    with fistapruner.hold_mask(model):
        train(model)

or ``Trainer(model, ..., callbacks=[fistapruner.hold_mask(model)])``. The masks are taken once, from the weights as they
are then. Gradients of pruned weights are set to 0, so that clipping and moments see surviving weights only, and pruned
weights after every optimizer step: weight decay, momentum and rounding move weights without a gradient, too. At the end
every pruned weight is checked: trainers with their own copies of the weights (DeepSpeed, Apex O2) overwrite the model's
after torch's global step hooks, which every ``torch.optim.Optimizer`` calls.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError
from ..models.experts import holds_experts
from ..models.record import MIN_ZEROS
from .masked import local, whole


class hold_mask(TrainerCallback):  # type: ignore[misc]
    """Keep every zero of a pruned model while it is trained by any PyTorch trainer.

    A context manager for the training, and a ``transformers.TrainerCallback``. Held are the linear weights, and tensors
    of all experts of a mixture, in numbered layers with at least 1 % zeros (all-zero ones are new adapters). The masks
    take one byte for each held weight; the model may be moved, cast, compiled or sharded (FSDP2) afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._weights = model, held_weights(model)
        self._pruned = {name: local(tensor) == 0 for name, tensor in self._tensors().items()}
        self._handles: list[Any] = []
        self._watched: dict[str, weakref.ref[Tensor]] = {}

    @property
    def operators(self) -> tuple[str, ...]:
        """Return the names of the held weights."""
        return tuple(self._weights)

    def __enter__(self) -> Self:
        if not self._handles:
            self._reshard()
            before, after = _weak(self._step, True), _weak(self._step, False)
            self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
            for name, tensor in self._tensors().items():
                self._watch(name, tensor)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], {}
        if kind is None:
            self.verify()

    def apply(self) -> None:
        """Set every pruned weight to 0; of sharded weights no forward pass may wait for its backward pass."""
        self._reshard()
        for name, tensor in self._tensors().items():
            self._clear(name, tensor)

    @torch.no_grad()
    def verify(self) -> None:
        """Check that every pruned weight is 0. Where weights are sharded, all processes must call it."""
        self._reshard()
        tensors = self._tensors()
        lost = [(local(tensor)[self._mask(name, tensor)] != 0).sum() for name, tensor in tensors.items()]
        counts = torch.stack([count.to(lost[0].device) for count in lost])
        if any(hasattr(tensor, "to_local") for tensor in tensors.values()):  # all processes come to the same verdict
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        for name, count in zip(tensors, counts.tolist(), strict=True):
            if count:
                raise FistaPrunerError(
                    f"{name}: {count} of its pruned weights are not 0 any more, and no step of a torch.optim optimizer "
                    "did it (but a merged adapter, or a trainer with its own copy of the weights): apply() of what "
                    "hold_mask returned before the training (with hold_mask(model) as held) sets them to 0"
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to mask (called by the trainer, whose model must be the one that is held)."""
        trained = None if kwargs.get("model") is None else set(kwargs["model"].modules())
        if trained is not None and not any(module in trained for module, _ in self._weights.values()):
            raise FistaPrunerError(
                f"the trainer trains another {type(kwargs['model']).__name__} than hold_mask was called with: give "
                "both the same model, without model_init, which makes a new one"
            )
        self.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop masking and check the zeros (called by the trainer)."""
        self.__exit__(None)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the held weights as they are now: sharding and casting replace parameters."""
        return {name: getattr(module, key) for name, (module, key) in self._weights.items()}

    def _reshard(self) -> None:
        """Put the shards back into their modules, which after an evaluation may hold whole copies (FSDP2)."""
        for module in self._model.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()

    def _watch(self, name: str, parameter: Tensor) -> None:
        """Mask a weight's gradients from now on as soon as they are computed, before they are clipped."""
        if parameter.requires_grad and (name not in self._watched or self._watched[name]() is not parameter):
            hook = _weak(self._accumulated, name)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
            self._watched[name] = weakref.ref(parameter)

    def _accumulated(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._clear(name, parameter.grad)

    def _step(self, before: bool, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Mask the gradients ``before`` a step of an optimizer, the weights after it."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._tensors().items():
            if id(parameter) in own:
                self._watch(name, parameter)  # sharding may have replaced the one that was watched
                (self._accumulated if before else self._clear)(name, parameter)

    @torch.no_grad()
    def _clear(self, name: str, tensor: Tensor) -> None:
        local(tensor).masked_fill_(self._mask(name, tensor), 0.0)

    def _mask(self, name: str, tensor: Tensor) -> Tensor:
        """Return the pruned places of a weight, of this process's shard if the weight is sharded."""
        pruned, part = self._pruned[name].to(tensor.device), local(tensor)
        if pruned.shape != part.shape and pruned.shape == tensor.shape:
            from torch.distributed.tensor import distribute_tensor

            # Every process has the whole mask and keeps its own part: nothing is sent.
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            pruned = distribute_tensor(pruned, mesh, placements, src_data_rank=None).to_local()
        if pruned.shape != part.shape:
            raise FistaPrunerError(
                f"{name} has shape {list(part.shape)}, its mask {list(pruned.shape)}: weights that are flattened "
                "(FSDP1, DeepSpeed ZeRO 3) cannot be held; use FSDP2"
            )
        self._pruned[name] = pruned
        return pruned


def _weak(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """Make a hook of a method that does not keep its object alive, as after a training that failed."""
    known = weakref.WeakMethod(method)

    def hook(*given: Any) -> None:
        if (found := known()) is not None:
            found(*first, *given)

    return hook


@torch.no_grad()
def held_weights(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Find the weights to hold, linear ones and experts in numbered layers: by name, module and key."""
    found, fault = dict[str, tuple[nn.Module, str]](), None
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}"
            linear = isinstance(module, (nn.Linear, Conv1D)) and key == "weight"
            held = parameter.is_floating_point() and re.search(r"(^|\.)\d+\.", name)
            if not held or not (linear or holds_experts(module, name, parameter)):
                continue
            if parameter.is_meta:
                told = "switch fsdp_cpu_ram_efficient_loading off, or call hold_mask after accelerator.prepare"
                fault = fault or f"{name} has no values on this process (meta device): {told}"
            elif MIN_ZEROS <= int(whole((parameter == 0).sum())) / parameter.numel() < 1.0:  # over all processes
                found[name] = module, key
    if not found and fault is None:
        fault = f"no linear weight of {type(model).__name__} has at least {MIN_ZEROS:.0%} zeros: there is no mask to "
        fault += "hold (packed weights must be unpacked first; quantised ones are not trained)"
    if fault is not None:
        raise FistaPrunerError(fault)
    return found
