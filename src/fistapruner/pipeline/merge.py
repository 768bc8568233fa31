"""Merge an adapter of another library into a pruned checkpoint, with every zero kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.architecture import build_model, checkpoint_names, find_decoder_layers
from ..models.discovery import Operator, linear_modules
from ..models.files.checkpoint import PRUNING_RECORD, Checkpoint
from ..models.files.folder import require_new
from ..models.files.low_rank import refuse_low_rank
from ..models.files.record import MIN_ZEROS, permuted_tensors, read_pruning_record, recorded_claims
from ..models.files.writer import write_checkpoint
from ..models.source import Permissions
from ..runs.directory import CARD
from ..runs.lineage import read_lineage
from ..runs.records import Stage, StageFigures
from ..runtime.formatting import percent
from ..runtime.machine import now
from ..tuning.adapters import KINDS, Adapter
from .measure import is_run


@dataclass(frozen=True)
class MergedOperator:
    """What a merge did to one operator.

    Args:
        name: in the model.
        rank: of the adapter's change.
        weights: of the operator; ``zeros``: that it had and has, 0 where it is not pruned.
        refilled: zeros that the adapter would have filled without the mask.
        change: squared Frobenius norm of the adapter's change of the weight; ``masked``: of its part at zeros.
        restored: surviving weights that the adapter would have made 0; they keep their values.
    """

    name: str
    rank: int
    weights: int
    zeros: int
    refilled: int
    change: float
    masked: float
    restored: int


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_adapter` did.

    Args:
        model: folder of the pruned checkpoint; ``adapter``: of the adapter; ``out``: of the result.
        kind: ``LORA``, ``HIRA`` or ``IA3``.
        operators: that the adapter changes, in order of the adapter's file.
    """

    model: Path
    adapter: Path
    out: Path
    kind: str
    operators: tuple[MergedOperator, ...]

    @property
    def densification(self) -> float:
        """Return the share of the operators' zeros that the adapter would have filled without the mask."""
        return sum(operator.refilled for operator in self.operators) / max(1, self.zeros)

    @property
    def masked_share(self) -> float:
        """Return the share of the squared norm of the adapter's change that the mask took."""
        change = sum(operator.change for operator in self.operators)
        return sum(operator.masked for operator in self.operators) / change if change else 0.0

    @property
    def zeros(self) -> int:
        """Return the zeros of the operators, before as after."""
        return sum(operator.zeros for operator in self.operators)

    def __str__(self) -> str:
        weights, count = sum(operator.weights for operator in self.operators), len(self.operators)
        ranks = sorted({operator.rank for operator in self.operators})
        rank = "" if self.kind == "IA3" else f" of rank {'-'.join(map(str, ranks[:: max(1, len(ranks) - 1)]))}"
        lines = [
            f"merged the {KINDS[self.kind]} adapter {self.adapter}{rank} into {count} operators of {self.model}: "
            f"{self.out}",
            f"zeros of these operators: {self.zeros} of {weights} ({percent(self.zeros / weights)}), all kept; without "
            f"the mask the adapter fills {percent(self.densification)} of them",
        ]
        if self.zeros:
            pruned = [operator for operator in self.operators if operator.zeros and operator.change]
            shares = {operator.name: operator.masked / operator.change for operator in pruned}
            most = max(shares, key=lambda name: shares[name], default="")
            at_most = f", at most {percent(shares[most])} ({most})" if shares and shares[most] else ""
            lines.append(f"the mask took {percent(self.masked_share)} of the squared norm of the change{at_most}")
        if restored := sum(operator.restored for operator in self.operators):
            lines.append(f"{restored} surviving weights that the adapter makes 0 keep their values")
        return "\n".join(lines)


def merge_adapter(
    folder: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    progress: Callable[[str], None] | None = None,
    command: str | None = None,
    **permissions: Any,
) -> MergeReport:
    """Merge a PEFT adapter (LoRA, HiRA, (IA)³) into a pruned checkpoint, with every zero kept.

    The adapter's effective weight is masked, computed in fp32 and rounded once. A surviving weight that becomes 0 keeps
    its value. One tensor is in memory at a time.

    Args:
        folder: a pruned Hugging Face folder, or a finished run.
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: folder to make; it must not exist.
        progress: called with the name of every operator.
        command: shell line for the lineage.
        permissions: ``allow_pickle``, ``trust_remote_code``; see :func:`fistapruner.prune`.

    Returns:
        What the adapter changed, what share of the zeros it would have filled, and what the mask took from it; its
        ``str`` is a summary.

    Raises:
        FistaPrunerError: the adapter has settings or tensors that are not understood, or changes something that is not
            an operator of a decoder layer; the channels of an operator were reordered since the adapter was trained;
            the checkpoint does not keep what its ``fistapruner.json`` claims; ``out`` exists.
    """
    if is_run(folder):
        folder = Path(folder) / "model"
        if not folder.is_dir():
            raise FistaPrunerError(f"{folder.parent} has no finished model: fistapruner resume {folder.parent}")
    source, found, out = Permissions(**permissions).find(folder), Adapter(adapter), Path(out)
    refuse_low_rank(source.folder, "merge")
    checkpoint = source.checkpoint()
    require_new(out, source.folder)
    record = read_pruning_record(source.folder)
    merge = _Merge(checkpoint, found, record, trust_remote_code=source.trust_remote_code, progress=progress)
    record = _record(record, found, command)
    report = f"merged the {KINDS[found.kind]} adapter {found.folder.name} into {source.folder.name}, its zeros kept"
    documents = {CARD: _card(source.license(), report)}
    if record:
        documents[PRUNING_RECORD] = json.dumps(record, indent=2) + "\n"
    # The figures are measured while tensors are written: the shards of a killed attempt would leave theirs out.
    write_checkpoint(checkpoint, out, merge.tensor, documents=documents, resume=False)
    merge.verify(Checkpoint.open(out))
    operators = tuple(merge.done[name] for name in found.operators)
    return MergeReport(source.folder, found.folder, out, found.kind, operators)


class _Merge:
    """Merged tensors of a checkpoint, and what was measured while they were made.

    Args:
        checkpoint: the pruned checkpoint.
        adapter: the adapter.
        record: content of the checkpoint's ``fistapruner.json``.

    Attributes:
        done: what was done, by the operator's name in the adapter.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        record: Mapping[str, Any],
        *,
        trust_remote_code: bool,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._checkpoint, self._adapter, self._progress = checkpoint, adapter, progress
        self._claims, faults = recorded_claims(record, checkpoint, checkpoint.folder)
        if faults:
            raise FistaPrunerError(f"{checkpoint.folder / PRUNING_RECORD}: {faults[0]}")
        self._operators: dict[str, tuple[str, Operator]] = {}  # by stored weight: name in the adapter, operator
        self._biases: dict[str, str] = {}  # by stored bias: name in the adapter
        self.done: dict[str, MergedOperator] = {}
        model = build_model(checkpoint, trust_remote_code=trust_remote_code)
        stored = checkpoint_names(model, checkpoint)
        layers_name, layers = find_decoder_layers(model)
        operators = {
            f"{layers_name}.{index}.{name}": Operator.of(f"{layers_name}.{index}.{name}", module)
            for index, layer in enumerate(layers)
            for name, module in linear_modules(layer)
        }
        for name in adapter.operators:
            operator = self._find(name, operators, model.base_model_prefix + ".")
            weight, bias = stored[f"{operator.name}.weight"], stored.get(f"{operator.name}.bias")
            if weight in self._operators:
                raise FistaPrunerError(f"{adapter.folder}: {name} and {self._operators[weight][0]} are one operator")
            self._refuse_permuted(operator, weight, record)
            change = adapter.read(name)
            if not change.fits(operator.rows, operator.columns):
                shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in change.tensors.items())
                raise FistaPrunerError(
                    f"{adapter.folder}: {name} has {shapes}, but the operator has {operator.rows} outputs and "
                    f"{operator.columns} inputs: the adapter belongs to another model"
                )
            self._operators[weight] = name, operator
            if bias is not None:
                self._biases[bias] = name

    def tensor(self, stored: str) -> Tensor | None:
        """Return the merged tensor of the checkpoint's tensor ``stored``; None where it stays as it is."""
        if stored in self._biases:
            return self._adapter.read(self._biases[stored]).bias(self._checkpoint.read(stored).float())
        if stored not in self._operators:
            return None
        name, operator = self._operators[stored]
        change = self._adapter.read(name)
        if self._progress is not None:
            self._progress(operator.name)
        old = self._checkpoint.read(stored)
        zero = self._zeros(stored, old)
        weight = old.float()
        effective = change.weight(weight.T).T if operator.transposed else change.weight(weight)
        filled = effective.to(old.dtype)
        squares = (effective - weight).square()
        new = torch.where(zero, torch.zeros_like(filled), filled)
        lost = ~zero & (new == 0) & bool(zero.any())
        self.done[name] = MergedOperator(
            operator.name,
            self._adapter.rank(name),
            weights=old.numel(),
            zeros=int(zero.sum()),
            refilled=int((zero & (filled != 0)).sum()),
            change=float(squares.sum(dtype=torch.float64)),
            masked=float((squares * zero).sum(dtype=torch.float64)),
            restored=int(lost.sum()),
        )
        return torch.where(lost, old, new)

    def _zeros(self, stored: str, weight: Tensor) -> Tensor:
        """Return where the mask of a weight is 0; nowhere if the operator is not pruned."""
        zero = weight == 0
        count, claimed = int(zero.sum()), self._claims.get(stored, {}).get("zeros")
        if type(claimed) is int and count < claimed:
            raise FistaPrunerError(
                f"{stored} has {count} zeros, {PRUNING_RECORD} claims {claimed}: fistapruner inspect "
                f"{self._checkpoint.folder} shows more"
            )
        pruned = stored in self._claims or count >= MIN_ZEROS * weight.numel()
        return zero if pruned else torch.zeros_like(zero)

    def verify(self, written: Checkpoint) -> None:
        """Check on the written files that the zeros are those of the input.

        Raises:
            FistaPrunerError: names the tensor.
        """
        for stored, (name, _) in self._operators.items():
            if self.done[name].zeros and not torch.equal(written.read(stored) == 0, self._checkpoint.read(stored) == 0):
                raise FistaPrunerError(f"{written.folder}: {stored} does not have the zeros of the input")

    def _find(self, name: str, operators: Mapping[str, Operator], base: str) -> Operator:
        """Find an operator by its name in the adapter, whose model may have had another prefix."""
        for candidate in (name, name.removeprefix(base), base + name):
            if candidate in operators:
                return operators[candidate]
        ends = [operator for full, operator in operators.items() if full.endswith("." + name)]
        if len(ends) != 1:
            raise FistaPrunerError(
                f"{self._adapter.folder} changes {name[:200]}, which is no operator of a decoder layer of "
                f"{self._checkpoint.folder}; the first one is called {next(iter(operators), None)}"
            )
        return ends[0]

    def _refuse_permuted(self, operator: Operator, weight: str, record: Mapping[str, Any]) -> None:
        """Refuse an operator whose channels were reordered after the adapter was trained."""
        base, folder = self._adapter.base, self._checkpoint.folder
        own = base and Path(base).resolve() == folder.resolve()
        if not own and weight in permuted_tensors(record):
            raise FistaPrunerError(
                f"{operator.name}: its channels were reordered for the n:m pattern, and the adapter was trained on "
                f"{base or 'an unnamed model'}: only an adapter trained on {folder} itself fits"
            )


def _record(record: dict[str, Any], adapter: Adapter, command: str | None) -> dict[str, Any]:
    """Return the record of the result: the claims of the input, and one more stage in its lineage."""
    lineage, _ = read_lineage(record, Path())
    if lineage is None:
        return record
    before = lineage.stages[-1].figures if lineage.stages else StageFigures()
    figures = StageFigures(operator_weights=before.operator_weights, operator_zeros=before.operator_zeros)
    settings = {"adapter": adapter.folder.name, "type": adapter.kind, "trained_on": adapter.base or None}
    lineage.stages.append(Stage(kind="merge", command=command, finished=now(), settings=settings, figures=figures))
    return {**record, "lineage": lineage.model_dump(mode="json")}


def _card(license_name: str | None, text: str) -> str:
    """Write the model card of the result."""
    licence = f"license: {license_name}\n" if license_name else ""
    return f"""---
{licence}library_name: transformers
pipeline_tag: text-generation
tags: [pruning, sparsity, fistapruner]
---
# A pruned model with a merged adapter

fistapruner {text}. Nothing was measured since; `fistapruner evaluate` does it, and `fistapruner inspect` counts the
zeros and lists how the model was made.
"""
