"""Read and write adapter folders of the PEFT library, without the library.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Three kinds are read, each of which can be
written as an effective weight (m, n) of its operator, or of each expert's (``target_parameters``), with ``c`` a factor:

    LoRA    W + c·BA          arXiv 2106.09685; c = alpha / r, or alpha / √r (arXiv 2312.03732)
    HiRA    W⊙(1 + BA)        ICLR 2025 (Huang et al.), peft 0.21
    (IA)³   W⊙l               arXiv 2205.05638; l scales the outputs (m, 1) and their bias, or the inputs (1, n)

LoRA fills the zeros of a pruned weight, the other two keep them. A setting or a tensor that is not understood is
refused by name, since leaving it out would give another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import FistaPrunerError
from ..models.files.folder import checkpoint_folder
from ..models.files.folder_files import inside, read_json_in
from ..models.files.low_rank import CONFIG, PREFIX, WEIGHTS
from ..models.files.safetensors import SafetensorsFile, write_tensors
from ..runtime.files import write_json_atomic

PICKLE = "adapter_model.bin"

KINDS = {"LORA": "LoRA", "HIRA": "HiRA", "IA3": "(IA)³"}
"""Kinds of adapters by their ``peft_type``."""

HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
    *("base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "feedforward_modules", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
    *("lora_dropout", "hira_dropout", "init_weights", "init_ia3_weights", "init_lora_weights", "eva_config"),
    *("megatron_core", "qalora_group_size", "target_parameters"),
}
"""Settings that are used here, or that say nothing beyond the tensors of a trained adapter."""

CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")
"""Values of ``init_lora_weights`` that change the base model's weights before the training."""

TENSOR = re.compile(
    re.escape(PREFIX).join(("(?:", ")?"))
    + r"(?P<operator>.+?)\.(?:(?P<lora>lora_[AB])(?:\.[^.]+)??\.weight|(?P<other>hira_[AB]|ia3_l)(?:\.[^.]+)?)"
)
"""Name of an adapter's tensor; the adapter's own name (``lora_A.default.weight``) may stand in it."""


def _cut(value: object, most: int = 60) -> str:
    """Write a value of a config for a message, with an ellipsis where it is long."""
    text = str(value)
    return text if len(text) <= most else text[:most] + "…"


@dataclass(frozen=True)
class OperatorAdapter:
    """What an adapter does to one operator.

    Args:
        kind: its ``peft_type``: ``LORA``, ``HIRA``, ``IA3``.
        tensors: fp32: ``A`` (r, n) and ``B`` (m, r), or ``l`` (m, 1) or (1, n).
        scale: factor c of LoRA.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0

    def weight(self, weight: Tensor) -> Tensor:
        """Return the effective weight, without a mask: fp32.

        Args:
            weight: (m, n) fp32.
        """
        if self.kind == "IA3":
            return weight * self.tensors["l"]
        product = self.tensors["B"] @ self.tensors["A"]
        return weight + (self.scale * product if self.kind == "LORA" else weight * product)

    def bias(self, bias: Tensor) -> Tensor | None:
        """Return the effective bias (m,), fp32; None where the adapter leaves it as it is."""
        factor = self.tensors.get("l")
        return bias * factor[:, 0] if factor is not None and factor.shape == (len(bias), 1) else None

    def of_expert(self, number: int, experts: int, rows: slice, *, turned: bool) -> OperatorAdapter:
        """Return what a LoRA of a tensor of all experts does to some output rows of one expert.

        PEFT stores A as (experts · r, n), by expert, and B as (m, r · experts), by rank.

        Args:
            number: of the expert.
            experts: how many there are.
            rows: of the outputs.
            turned: the adapter was trained on transposed matrices: its change is (BA)ᵀ.
        """
        a = self.tensors["A"].unflatten(0, (experts, -1))[number]
        b = self.tensors["B"].unflatten(1, (-1, experts))[:, :, number]
        if turned:
            a, b = b.T, a.T
        return OperatorAdapter(self.kind, {"A": a, "B": b[rows]}, self.scale)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the tensors fit an operator of ``rows`` outputs and ``columns`` inputs."""
        if self.kind == "IA3":
            return self.tensors["l"].shape in ((rows, 1), (1, columns))
        return (self.tensors["B"].shape[0], self.tensors["A"].shape[1]) == (rows, columns)


class Adapter:
    """An opened adapter folder: names and settings in memory, tensors on disk until they are read.

    Args:
        folder: an adapter folder of the PEFT library.

    Attributes:
        folder: the folder.
        kind: ``peft_type``.
        base: the model that it was trained on, as its config names it.
        peft: PEFT's version that wrote it, such as ``0.19.1``; empty in configs of versions before 0.18.
        operators: names of the operators that it changes, as modules of the model; of a tensor of all experts the name
            of the experts, behind which PEFT writes ``.base_layer`` for all of its tensors but the last.

    Raises:
        FistaPrunerError: no adapter there, a damaged one, or a setting or a tensor that is not understood.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / CONFIG).is_file():
            raise FistaPrunerError(f"{self.folder} is not the folder of a PEFT adapter: it has no {CONFIG}")
        self._config = read_json_in(self.folder, CONFIG)
        self.kind = str(self._config.get("peft_type"))
        base = self._config.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) and base.isprintable() else ""
        self.peft = str(self._config.get("peft_version") or "")[:40]
        self._check_config()
        self._stacked = bool(self._config.get("target_parameters"))
        if not (self.folder / WEIGHTS).exists() and (self.folder / PICKLE).exists():
            raise FistaPrunerError(f"{self.folder} has only {PICKLE}, which can carry code: save it as safetensors")
        self._file = SafetensorsFile(inside(self.folder, WEIGHTS))
        self._places: dict[str, dict[str, str]] = {}
        for name in self._file.entries:
            operator, part = self._parse(name)
            if self._places.setdefault(operator, {}).setdefault(part, name) != name:
                raise FistaPrunerError(f"{self._file.path} has two tensors {part} of {operator}: save one adapter only")
        self.operators = tuple(self._places)
        if not self.operators:
            raise FistaPrunerError(f"{self._file.path} has no tensors")
        for operator in self.operators:
            self._check_shapes(operator)

    def read(self, operator: str) -> OperatorAdapter:
        """Read what the adapter does to one of its operators.

        Raises:
            FistaPrunerError: the file was damaged, or has NaN or infinite values.
        """
        tensors = {}
        for part, name in self._places[operator].items():
            tensors[part] = self._file.read(name).float()
            if not bool(torch.isfinite(tensors[part]).all()):
                raise FistaPrunerError(f"{self._file.path}: {name} has NaN or infinite values")
        return OperatorAdapter(self.kind, tensors, self._scale(operator))

    def rank(self, operator: str) -> int:
        """Return the rank of an operator's change, or of all experts' together; 1 for (IA)³."""
        return 1 if self.kind == "IA3" else self._file.entries[self._places[operator]["A"]].shape[0]

    def turned(self, *, transposed: bool) -> bool | None:
        """Tell whether a LoRA of experts was trained on the transposed matrices; None if it is unknown.

        PEFT before 0.19.1 took every tensor for (experts, inputs, outputs), and 0.19.0 the others.

        Args:
            transposed: the model holds its experts as (experts, inputs, outputs).
        """
        found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", self.peft)  # a development version may be before or after
        version = tuple(map(int, found.groups())) if found else None
        if transposed:
            return version == (0, 19, 0)
        return None if version is None else version < (0, 19, 1)

    def check_rank(self, operator: str, experts: int = 1) -> None:
        """Compare the rank of a LoRA with the config's, which its factor follows.

        Args:
            operator: one of :attr:`operators`.
            experts: whose tensor is changed.

        Raises:
            FistaPrunerError: they differ.
        """
        rank = self.rank(operator) / experts
        if self.kind == "LORA" and rank != (recorded := self._of("rank_pattern", operator)):
            raise FistaPrunerError(f"{self._file.path}: {operator} has rank {rank:g}, but {CONFIG} says {recorded:.0f}")

    def _check_config(self) -> None:
        path = self.folder / CONFIG
        if self.kind not in KINDS:
            raise FistaPrunerError(f"{path}: adapters of type {_cut(self.kind)} are not read: {', '.join(KINDS)} are")
        init = self._config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
            raise FistaPrunerError(
                f"{path}: init_lora_weights {_cut(init)!r} changed the base model's weights before the training: "
                "convert the adapter to a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if modules := self._config.get("modules_to_save"):
            raise FistaPrunerError(
                f"{path}: modules_to_save is {_cut(modules)}: whole modules, such as norms, are not merged: train "
                "without them, as 'recover' does with --also none; RUN/model of a recovery has its own merged already"
            )
        for key, value in self._config.items():
            if key not in HARMLESS and value and not (key == "bias" and value == "none"):
                raise FistaPrunerError(
                    f"{path}: the setting {_cut(key)} is {_cut(value)!r}, which is not understood: only adapters "
                    "that change nothing but the weights of linear operators are merged: train without it"
                )
        if self._config.get("target_parameters") and (self.kind != "LORA" or self._patterns()):
            raise FistaPrunerError(
                f"{path}: target_parameters is understood for LoRA with one rank and one alpha: without rank_pattern "
                "and alpha_pattern"
            )
        if self.kind == "LORA":
            self._number("r", least=1)
            self._number("lora_alpha")
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = self._config.get(key) or {}
            if not isinstance(patterns, dict):
                raise FistaPrunerError(f"{path}: {key} is not a mapping of names to numbers")
            for pattern, value in patterns.items():
                self._check_number(f"{key}[{_cut(pattern)!r}]", value, least=1 if key == "rank_pattern" else None)
                try:
                    re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    raise FistaPrunerError(f"{path}: {key}: {_cut(pattern)!r} is no pattern: {error}") from None

    def _patterns(self) -> bool:
        return any(self._config.get(key) for key in ("rank_pattern", "alpha_pattern"))

    def _number(self, key: str, least: int | None = None) -> float:
        return self._check_number(key, self._config.get(key), least)

    def _check_number(self, key: str, value: Any, least: int | None = None) -> float:
        wanted = (int,) if least is not None else (int, float)
        if type(value) not in wanted or not abs(value) <= 1e9 or (least is not None and value < least):
            kind = f"a whole number from {least}" if least is not None else "a number"
            raise FistaPrunerError(f"{self.folder / CONFIG}: {key} is {_cut(value)!r}, {kind} is expected")
        return float(value)

    def _of(self, key: str, operator: str) -> float:
        """A number of one operator: that of the first pattern that its name ends with, else the common one."""
        name = "r" if key == "rank_pattern" else "lora_alpha"
        for pattern, value in (self._config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", operator):
                return float(value)
        return float(self._config[name])

    def _scale(self, operator: str) -> float:
        if self.kind != "LORA":
            return 1.0
        rank = self._of("rank_pattern", operator)
        return self._of("alpha_pattern", operator) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _parse(self, name: str) -> tuple[str, str]:
        """Split a tensor's name into operator and part: ``A``, ``B``, ``l``."""
        found = TENSOR.fullmatch(name)
        part = (found["lora"] or found["other"]) if found else ""
        if found is None or not part.startswith(self.kind.lower() + "_"):
            raise FistaPrunerError(
                f"{self._file.path}: the tensor {name[:200]} is no part of a {KINDS[self.kind]} adapter of a linear "
                "operator: it would be left out"
            )
        return found["operator"], part.rpartition("_")[2]

    def _check_shapes(self, operator: str) -> None:
        parts = self._places[operator]
        entries = {part: self._file.entries[name] for part, name in parts.items()}
        shapes = {part: entry.shape for part, entry in entries.items()}
        shown = ", ".join(f"{part} {list(shape)}" for part, shape in sorted(shapes.items()))
        if not all(entry.dtype.is_floating_point for entry in entries.values()):
            raise FistaPrunerError(f"{self._file.path}: the tensors of {operator} are not floating-point")
        if self.kind == "IA3":
            if len(shapes["l"]) != 2 or 1 not in shapes["l"]:
                raise FistaPrunerError(f"{self._file.path}: {operator} has {shown}, a column or a row is expected")
            return
        if set(shapes) != {"A", "B"}:
            raise FistaPrunerError(f"{self._file.path}: {operator} has {shown}, both A and B are expected")
        if len(shapes["A"]) != 2 or len(shapes["B"]) != 2 or shapes["A"][0] != shapes["B"][1]:
            raise FistaPrunerError(f"{self._file.path}: {operator} has {shown}, A (r, n) and B (m, r) are expected")
        # The rank in the config matters for LoRA's factor only; peft 0.21 ignores the rank_pattern of HiRA.
        if not self._stacked:  # else the model tells what is a tensor of all experts
            self.check_rank(operator)


def write_hira_adapter(
    folder: str | Path,
    base: str | Path,
    operators: Mapping[str, tuple[Tensor, Tensor]],
    *,
    whole: Mapping[str, Tensor] | None = None,
    transposed: bool = False,
) -> None:
    """Write trained rescalings ``W⊙(1 + B A)`` as a PEFT HiRA adapter, which peft ≥ 0.21 loads.

    Args:
        folder: folder to make; it must not exist.
        base: the pruned checkpoint that the adapter belongs to, written into its config.
        operators: ``A`` (r, n) and ``B`` (m, r) by the operator's name in the model, such as
            ``model.layers.0.mlp.up_proj``; for SPP see :meth:`.forms.Spp.as_hira`. All are written with the highest
            rank, filled up with zeros: peft 0.21 ignores the ``rank_pattern`` of HiRA.
        whole: trained parameters of other modules (norms) by name, such as ``model.norm.weight``. PEFT replaces
            whole modules (``modules_to_save``), so all parameters of a module must be there.
        transposed: the model stores weights as (inputs, outputs), as GPT-2 does.

    Raises:
        FistaPrunerError: ``folder`` exists, or the disk is full.
        ValueError: no operators, shapes that do not fit, or in ``whole`` a parameter of an adapted operator or
            of a module around one.
    """
    for name, (a, b) in operators.items():
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise ValueError(f"{name}: A {list(a.shape)} and B {list(b.shape)} do not fit: (r, n) and (m, r)")
    if not operators:
        raise ValueError("there are no operators")
    modules = sorted({name.rpartition(".")[0] for name in whole or {}})
    for module in modules:
        if any(f"{name}.".startswith(f"{module}.") for name in operators):
            raise ValueError(f"{module} or an operator inside of it is adapted: PEFT cannot replace it whole, too")
    rank = max(len(a) for a, _ in operators.values())
    config = {
        "peft_type": "HIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "target_modules": sorted(operators),
        "modules_to_save": modules or None,
        "hira_dropout": 0.0,
        "fan_in_fan_out": transposed,
        "init_weights": True,
    }
    tensors = {}
    for name, (a, b) in operators.items():
        more = rank - len(a)
        tensors[f"{PREFIX}{name}.hira_A"] = pad(a.detach().float(), (0, 0, 0, more))
        tensors[f"{PREFIX}{name}.hira_B"] = pad(b.detach().float(), (0, more))
    tensors |= {PREFIX + name: tensor.detach() for name, tensor in (whole or {}).items()}
    with checkpoint_folder(Path(folder), sum(tensor.nbytes for tensor in tensors.values())) as partial:
        write_tensors(partial / WEIGHTS, tensors, {"format": "pt"})
        write_json_atomic(partial / CONFIG, config)
