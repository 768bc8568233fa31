"""The low-rank part of a pruned checkpoint: a LoRA adapter of the PEFT library beside it.

``RUN/model`` is the sparse part S of every operator, ``RUN/adapter`` the low-rank part ``B A`` of those with zeros, and
the model is their sum: ``PeftModel.from_pretrained(model, "RUN/adapter")``. The checkpoint's record names the adapter,
so that no verb takes the sparse part for the model. Packed and unpacked checkpoints have it in their own folder.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError
from ..runtime.files import (
    copy_atomic,
    disk_errors,
    entries,
    read_json,
    remove_folder,
    sampled_sha256,
    write_json_atomic,
)
from ..runtime.numerics import exact_products
from .record import CONFIG, FOLDER, LOW_RANK, WEIGHTS, adapter_folder, read_pruning_record
from .safetensors import LazyTensors, SafetensorsFile, write_tensors
from .write import checkpoint_folder

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's modules."""

A, B = ".lora_A.weight", ".lora_B.weight"
"""What follows an operator's name in the names of its factors: A (r, n) and B (m, r)."""


def sum_of_parts(sparse: Tensor, a: Tensor, b: Tensor, *, transposed: bool) -> Tensor:
    """Add an operator's low-rank part to its sparse part (m, n), or ``transposed``: fp32, on its device."""
    with exact_products():
        product = b.float() @ a.float()
    return sparse.float() + (product.T if transposed else product)


def journaled_factors(layers: Iterable[SafetensorsFile]) -> LazyTensors:
    """Return the factors in the journal of a run, by name."""
    places = {name: file for file in layers for name in file.entries if name.endswith((A, B))}
    entries = {name: file.entries[name] for name, file in places.items()}
    return LazyTensors(entries, lambda name: places[name].read(name))


def write_adapter(folder: Path, factors: LazyTensors, rank: int, *, transposed: bool) -> dict[str, Any]:
    """Write the low-rank parts of all operators as a LoRA adapter, in place of an earlier one.

    The factors are by name in the model, which stores ``transposed`` operators as (inputs, outputs), as GPT-2 does.
    Returns what the checkpoint's record says of the adapter: rank, weights, bytes and checksum.
    """
    remove_adapter(folder)
    found = factors.entries.values()
    tensors = LazyTensors(
        {PREFIX + name: replace(each, name=PREFIX + name) for name, each in factors.entries.items()},
        lambda name: factors[name.removeprefix(PREFIX)],
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # a path would make other bytes of the same run in another folder
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(name.removesuffix(A) for name in factors if name.endswith(A)),
    }
    with checkpoint_folder(folder, sum(entry.nbytes for entry in found)) as partial:
        write_tensors(partial / WEIGHTS, tensors, {"format": "pt"})
        write_json_atomic(partial / CONFIG, config)
    return {
        "rank": rank,
        "weights": sum(math.prod(entry.shape) for entry in found),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "sampled": sampled_sha256(folder / WEIGHTS),
    }


def remove_adapter(folder: Path) -> None:
    """Remove an adapter that a run has written, or what a kill has left; refuse other files."""
    if others := [path.name for path in entries(folder) if path.name not in (CONFIG, WEIGHTS)]:
        raise FistaPrunerError(f"{folder / others[0]} was not written by this run: move it away, and run it again")
    remove_folder(folder)


class LowRankAdapter:
    """The low-rank part that belongs to a checkpoint; its tensors are on disk until they are read.

    It is refused where it is gone, damaged, or not the one that the checkpoint's record claims. ``factors`` are A and B
    of every operator, by :data:`A` and :data:`B` behind its name in the model.
    """

    def __init__(self, folder: Path, claim: Mapping[str, Any]) -> None:
        self.folder, path = folder, folder / WEIGHTS
        lost = next((file for file in (path, folder / CONFIG) if not file.is_file()), None)
        self.sampled = sampled_sha256(path) if lost is None else ""
        if self.sampled != claim.get("sampled"):
            gone = f"the low-rank part of the model, {lost}, is gone: its checkpoint is the sparse part only"
            raise FistaPrunerError(f"{path} is damaged, or is the low-rank part of another model" if not lost else gone)
        read_json(folder / CONFIG)  # PEFT needs it
        file = SafetensorsFile(path)
        entries = {name.removeprefix(PREFIX): entry for name, entry in file.entries.items()}
        self.factors = LazyTensors(entries, lambda name: file.read(PREFIX + name))
        self.operators = sorted(name.removesuffix(A) for name in entries if name.endswith(A))
        self.rank = max((entry.shape[0] for name, entry in entries.items() if name.endswith(A)), default=0)
        self.weights = sum(math.prod(entry.shape) for entry in entries.values())
        self.nbytes = sum(entry.nbytes for entry in entries.values())

    @classmethod
    def beside(cls, checkpoint: Path, record: Mapping[str, Any] | None = None) -> LowRankAdapter | None:
        """Open the low-rank part that belongs to a checkpoint, by its ``record``; None where that names none."""
        folder = adapter_folder(checkpoint) if record is None else checkpoint / FOLDER  # packed ones hold it
        claim = (read_pruning_record(checkpoint) if record is None else record).get(LOW_RANK)
        return None if claim is None else cls(folder, claim if isinstance(claim, dict) else {})

    @property
    def file_bytes(self) -> int:
        """Bytes of the adapter's files."""
        return sum((self.folder / name).stat().st_size for name in (CONFIG, WEIGHTS))

    def copy_into(self, checkpoint: Path) -> None:
        """Copy the adapter's files into the folder of a packed or unpacked checkpoint."""
        with disk_errors(checkpoint / FOLDER):
            (checkpoint / FOLDER).mkdir()
        for name in (CONFIG, WEIGHTS):
            copy_atomic(self.folder / name, checkpoint / FOLDER / name)

    def of(self, parameter: str) -> tuple[Tensor, Tensor] | None:
        """Read A and B of an operator by the name of its weight; None where it has no low-rank part."""
        operator = parameter.removesuffix(".weight")
        return (self.factors[operator + A], self.factors[operator + B]) if operator + A in self.factors else None

    def added(self, parameter: str, weight: Tensor, *, transposed: bool) -> Tensor:
        """Add an operator's low-rank part to its stored weight, in fp32; return others as they are."""
        if (factors := self.of(parameter)) is None:
            return weight
        a, b = (factor.to(weight.device) for factor in factors)
        return sum_of_parts(weight, a, b, transposed=transposed)

    def require_fit(self, model: nn.Module) -> dict[str, Any]:
        """Return the modules of a model, or of its base model, by operator."""
        modules, base = dict(model.named_modules()), f"{getattr(model, 'base_model_prefix', '')}."
        found = {name: modules.get(name, modules.get(name.removeprefix(base))) for name in self.operators}
        shapes = {name: entry.shape for name, entry in self.factors.entries.items()}
        for name, module in found.items():
            a, b = shapes[name + A], shapes.get(name + B, ())
            weight = tuple(getattr(getattr(module, "weight", None), "shape", ()))
            shape = weight[::-1] if isinstance(module, Conv1D) else weight
            if not len(a) == len(b) == len(shape) == 2 or (*b, *a) != (shape[0], a[0], a[0], shape[1]):
                raise FistaPrunerError(
                    f"{self.folder / WEIGHTS} is of another model: {name} has factors {list(a)} and {list(b)}, and "
                    f"{type(model).__name__} {f'has {list(weight)}' if weight else 'has no such operator'}"
                )
        return found

    def add_to(self, model: nn.Module) -> None:
        """Add the low-rank parts to the operators of a whole model that holds the sparse part, in place."""
        with torch.no_grad():
            for name, module in self.require_fit(model).items():
                transposed = isinstance(module, Conv1D)
                module.weight.copy_(self.added(f"{name}.weight", module.weight, transposed=transposed))

    def loaded(self, device: torch.device) -> LowRankAdapter:
        """Return the adapter with all factors on a device."""
        part, kept = copy(self), {name: factor.to(device) for name, factor in self.factors.items()}
        part.factors = LazyTensors(self.factors.entries, kept.__getitem__)
        return part

    def without(self, operators: Container[str]) -> LowRankAdapter:
        """Return the adapter with :meth:`added` changing no weight of these operators."""
        part, entries = copy(self), self.factors.entries
        kept = {name: each for name, each in entries.items() if name.removesuffix(A).removesuffix(B) not in operators}
        part.factors = LazyTensors(kept, self.factors.__getitem__)
        return part
