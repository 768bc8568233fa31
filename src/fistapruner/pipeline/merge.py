"""Merge an adapter of another library into a pruned checkpoint, with every zero kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import A_FOLDER, FistaPrunerError, out_path, path_text
from ..models.architecture import build_model, find_decoder_layers
from ..models.discovery import expert_modules, linear_modules
from ..models.experts import Experts, separate_experts
from ..models.files.checkpoint import Checkpoint
from ..models.files.folder import require_new
from ..models.files.folder_files import PRUNING_RECORD
from ..models.files.low_rank import refuse_low_rank
from ..models.files.record import MIN_ZEROS, permuted_tensors, read_pruning_record, recorded_claims
from ..models.files.writer import write_checkpoint
from ..models.layout import Operator
from ..models.names import checkpoint_names
from ..models.source import Permissions
from ..reporting.model_card import plain_card
from ..runs.arguments import checked_arguments
from ..runs.directory import checkpoint_of
from ..runs.lineage import record_with_stage
from ..runs.records import Stage
from ..runtime.formatting import percent, shell_line
from ..runtime.machine import now
from ..runtime.numerics import undisturbed
from ..training.adapters import KINDS, Adapter, OperatorAdapter
from .result import check_zeros, model_documents


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
    """What ``merge_adapter`` did.

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

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "model": str(self.model),
            "adapter": str(self.adapter),
            "out": str(self.out),
            "kind": self.kind,
            "zeros": self.zeros,
            "densification": self.densification,
            "masked_share": self.masked_share,
            "operators": [asdict(operator) for operator in self.operators],
        }

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


@checked_arguments
@undisturbed()
def merge_adapter(
    folder: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    progress: Callable[[str], None] | None = None,
    command: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge a PEFT adapter (LoRA, HiRA, (IA)³) into a pruned checkpoint, with every zero kept.

    The adapter's effective weight is masked, computed in fp32 and rounded once. A surviving weight that becomes 0 keeps
    its value. One tensor is in memory at a time. Experts of mixtures may be among a LoRA's targets
    (``target_parameters``).

    Args:
        folder: a pruned Hugging Face folder, or a finished run.
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: folder to make; it must not exist.
        progress: called with the name of every operator.
        command: shell line for the lineage.
        allow_pickle, trust_remote_code: see ``fistapruner.prune``.

    Returns:
        What the adapter changed, what share of the zeros it would have filled, and what the mask took from it; its
        ``str`` is a summary.

    Raises:
        FistaPrunerError: the adapter has settings or tensors that are not understood, or changes something that is not
            an operator of a decoder layer; the channels of an operator were reordered since the adapter was trained;
            the checkpoint does not keep what its ``fistapruner.json`` claims; the run is not finished, or its
            checkpoint is damaged; ``out`` exists.
    """
    adapter, out = path_text("adapter", adapter, A_FOLDER), out_path(out)
    source = Permissions(allow_pickle, trust_remote_code).find(checkpoint_of(folder))
    found = Adapter(adapter)
    refuse_low_rank(source.folder, "merge")
    checkpoint = source.checkpoint()
    require_new(out, source.folder)
    record = read_pruning_record(source.folder)
    merge = _Merge(checkpoint, found, record, trust_remote_code=source.trust_remote_code, progress=progress)
    record = _record(record, found, command)
    names = found.folder.resolve().name, source.folder.resolve().name  # "." has none
    report = f"merged the {KINDS[found.kind]} adapter {names[0]} into {names[1]}, its zeros kept"
    documents = model_documents(plain_card(source.license(), "A pruned model with a merged adapter", report), record)
    # The figures are measured while tensors are written: the shards of a killed attempt would leave theirs out.
    write_checkpoint(checkpoint, out, merge.tensor, documents=documents, resume=False)
    check_zeros(out, checkpoint, merge.zeroed)
    return MergeReport(source.folder, found.folder, out, found.kind, merge.operators)


@dataclass(frozen=True)
class _Change:
    """A change of one operator.

    Args:
        name: in the adapter.
        operator: of the model.
        rank: of the change.
        read: reads the change.
    """

    name: str
    operator: Operator
    rank: int
    read: Callable[[], OperatorAdapter]


class _Merge:
    """Merged tensors of a checkpoint, and what was measured while they were made.

    Args:
        checkpoint: the pruned checkpoint.
        adapter: the adapter.
        record: content of the checkpoint's ``fistapruner.json``.

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
        self._changes: dict[str, _Change] = {}  # by stored weight
        self._biases: dict[str, str] = {}  # by stored bias: name in the adapter
        self._done: dict[str, MergedOperator] = {}  # by stored weight
        self._read = lru_cache(maxsize=2)(adapter.read)  # of one tensor of all experts, many operators are changed
        model = build_model(checkpoint, trust_remote_code=trust_remote_code)
        layers_name, layers = find_decoder_layers(model)
        stored = checkpoint_names(model, checkpoint, separate_experts(model, layers_name, layers, checkpoint))
        self._claims, faults = recorded_claims(record, checkpoint, checkpoint.folder)
        if faults:
            raise FistaPrunerError(f"{checkpoint.folder / PRUNING_RECORD}: {faults[0]}")
        places: dict[str, Operator | Experts] = {}
        for index, layer in enumerate(layers):
            prefix = f"{layers_name}.{index}."
            places |= {prefix + name: Operator.of(prefix + name, module) for name, module in linear_modules(layer)}
            places |= {prefix + name: experts for name, experts in expert_modules(layer).items()}
        for name in adapter.operators:
            place, found = self._find(name, places, model.base_model_prefix + ".")
            if isinstance(found, Operator):
                changes = [self._of_operator(name, found)]
                if (bias := stored.get(f"{found.name}.bias")) is not None:
                    self._biases[bias] = name
            else:
                changes = self._of_experts(name, place, found)
            for change in changes:
                weight = stored[f"{change.operator.name}.weight"]
                if weight in self._changes:
                    raise FistaPrunerError(
                        f"{adapter.folder}: {name} and {self._changes[weight].name} are one operator"
                    )
                self._refuse_permuted(change.operator, weight, record)
                self._changes[weight] = change

    @property
    def operators(self) -> tuple[MergedOperator, ...]:
        """Return what was done to each operator, in the order of the adapter's file."""
        return tuple(self._done[weight] for weight in self._changes)

    def _of_operator(self, name: str, operator: Operator) -> _Change:
        """Check what the adapter does to one operator."""
        change = self._read(name)
        if not change.fits(operator.rows, operator.columns):
            raise self._misfit(name, f"the operator has {operator.rows} outputs and {operator.columns} inputs")
        self._adapter.check_rank(name)
        return _Change(name, operator, self._adapter.rank(name), lambda: self._read(name))

    def _of_experts(self, name: str, place: str, experts: Experts) -> list[_Change]:
        """Find the tensor of all experts that the adapter changes, by its shape, and take it apart."""
        if self._adapter.kind != "LORA":
            raise FistaPrunerError(
                f"{self._adapter.folder} changes {name[:200]}, the experts of a mixture: of these, LoRA is merged and "
                f"{KINDS[self._adapter.kind]} is not"
            )
        count, change = experts.number, self._read(name)
        first = experts.get_submodule("0")
        readings: list[tuple[list[Operator], bool]] = []  # the operators, and whether the change is transposed
        shapes = []
        for parts in experts.fused.values():
            linear = [Operator.of(part, first.get_submodule(part)) for part in parts]
            rows, columns = sum(operator.rows for operator in linear), linear[0].columns
            shapes.append(f"{rows} outputs and {columns} inputs")
            readings += [(linear, False)] if change.fits(rows, columns) else []
            readings += [(linear, True)] if change.fits(columns, rows) else []
        if not readings:
            wrote = f"peft_version is {self._adapter.peft!r}"
            raise self._misfit(name, f"the tensors of its experts have {' or '.join(shapes)} ({wrote})")
        if len(readings) > 1:
            known = self._adapter.turned(transposed=experts.transposed)
            readings = [(linear, turned) for linear, turned in readings if turned == known]
        if len(readings) != 1:
            raise FistaPrunerError(
                f"{self._adapter.folder}: {name} fits the matrices of its experts and their transposes, and "
                f"peft_version in its config, {self._adapter.peft!r}, does not tell which were trained: a release of "
                "PEFT is expected, 0.18.0 or later"
            )
        ((linear, turned),) = readings
        self._adapter.check_rank(name, count)
        changes, end = [], 0
        for operator in linear:
            start, end = end, end + operator.rows
            for number in range(count):
                own = replace(operator, name=f"{place}.{number}.{operator.name}")
                make = partial(self._of_expert, name, number, count, slice(start, end), turned=turned)
                changes.append(_Change(name, own, self._adapter.rank(name) // count, make))
        return changes

    def _of_expert(self, name: str, number: int, experts: int, rows: slice, *, turned: bool) -> OperatorAdapter:
        return self._read(name).of_expert(number, experts, rows, turned=turned)

    def _misfit(self, name: str, said: str) -> FistaPrunerError:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in self._read(name).tensors.items())
        return FistaPrunerError(
            f"{self._adapter.folder}: {name} has {shapes}, but {said}: the adapter belongs to another model"
        )

    def tensor(self, stored: str) -> Tensor | None:
        """Return the merged tensor of the checkpoint's tensor ``stored``; None where it stays as it is."""
        if stored in self._biases:
            return self._read(self._biases[stored]).bias(self._checkpoint.read(stored).float())
        if stored not in self._changes:
            return None
        operator, change = self._changes[stored].operator, self._changes[stored].read()
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
        self._done[stored] = MergedOperator(
            operator.name,
            self._changes[stored].rank,
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
                f"{stored} has {count} zeros, {PRUNING_RECORD} claims {claimed}: "
                f"'{shell_line('inspect', self._checkpoint.folder)}' shows more"
            )
        pruned = stored in self._claims or count >= MIN_ZEROS * weight.numel()
        return zero if pruned else torch.zeros_like(zero)

    @property
    def zeroed(self) -> list[str]:
        """The changed weights that have zeros to keep."""
        return [stored for stored, done in self._done.items() if done.zeros]

    def _find(self, name: str, places: Mapping[str, Operator | Experts], base: str) -> tuple[str, Operator | Experts]:
        """Find an operator, or experts, by the name in the adapter, whose model may have had another prefix."""
        plain = re.sub(r"(\.base_layer)+$", "", name)
        for candidate in (plain, plain.removeprefix(base), base + plain):
            if candidate in places:
                return candidate, places[candidate]
        ends = [(full, found) for full, found in places.items() if full.endswith("." + plain)]
        if len(ends) != 1:
            raise FistaPrunerError(
                f"{self._adapter.folder} changes {name[:200]}, which is no operator of a decoder layer of "
                f"{self._checkpoint.folder}; the first one is called {next(iter(places), None)}"
            )
        return ends[0]

    def _refuse_permuted(self, operator: Operator, weight: str, record: Mapping[str, Any]) -> None:
        """Refuse an operator whose channels were reordered after the adapter was trained."""
        base, folder = self._adapter.base, self._checkpoint.folder
        own = base and Path(base).resolve() == folder.resolve()
        if not own and weight in permuted_tensors(record):
            raise FistaPrunerError(
                f"{operator.name}: its channels were reordered or rotated for the n:m pattern, and the adapter was "
                f"trained on {base or 'an unnamed model'}: only an adapter trained on {folder} itself fits"
            )


def _record(record: dict[str, Any], adapter: Adapter, command: str | None) -> dict[str, Any]:
    """Return the record of the result: the claims of the input, and one more stage in its lineage."""
    settings = {"adapter": adapter.folder.resolve().name, "type": adapter.kind, "trained_on": adapter.base or None}
    return record_with_stage(record, Stage(kind="merge", command=command, finished=now(), settings=settings))
