"""Write the checkpoint and the report of a pruning run whose layers are all journaled."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import parse_sparsity
from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..models.checkpoint import Checkpoint
from ..models.layers import LayerwiseModel
from ..models.low_rank import journaled_factors
from ..models.operators import Operator, expert_modules, operators_by_weight
from ..models.record import MIN_ZEROS, permuted_tensors, read_pruning_record, recorded_claims, stack_of
from ..models.safetensors import SafetensorsFile
from ..pipeline.result import (
    checkpoint_record,
    close_report,
    model_documents,
    operator_claims,
    write_low_rank,
    write_model,
)
from ..reporting.model_card import model_card
from ..runs.layer_records import LayerEntry
from ..runs.lineage import add_stage, update_stage
from ..runs.listener import Listener
from ..runs.records import Report, Totals
from ..runs.times import Times
from ..runtime.machine import now
from ..runtime.memory import peak_device_memory, peak_memory
from ..structure.experts import chosen_experts
from ..structure.smaller import changed_config, dropped_tensors, unread_tensors
from .opened import RunContext


@dataclass(frozen=True)
class ChangedTensors:
    """What the checkpoint of a run has in place of its input's tensors.

    Args:
        checkpoint: the input; ``earlier``: its record, empty where there is none, or it cannot be read.
        places: the file of the journal that holds a new tensor, by checkpoint name.
        shapes: new shapes of the tensors that lost channels or experts, by checkpoint name.
        dropped: stored tensors that are left out: of removed experts, and of layers that the model does not read and
            the new config does not fit.
        gone: these, and the parts of removed experts in tensors that hold all experts.
    """

    checkpoint: Checkpoint
    earlier: Mapping[str, Any]
    places: Mapping[str, SafetensorsFile]
    shapes: Mapping[str, tuple[int, ...]]
    dropped: Collection[str]
    gone: Collection[str]

    @classmethod
    def of(cls, context: RunContext) -> ChangedTensors:
        """Collect them of a run whose layers are all journaled."""
        checkpoint, widths, journal = context.model.checkpoint, context.widths, context.run.journal
        places = {name: file for file in map(journal.weights, range(len(context.model))) for name in file.entries}
        dropped = set(unread_tensors(context.model, widths))
        cut: dict[str, tuple[int, ...]] = {}
        stacked: dict[str, tuple[int, ...]] = {}
        if widths is not None:
            of_experts, stacked = dropped_tensors(context.model, widths)
            dropped |= of_experts
        for name, file in places.items() if widths is not None else ():
            shape, stack = file.entries[name].shape, checkpoint.stack_of(name)
            if shape == checkpoint.entry(name).shape:
                continue
            if stack is None:
                cut[name] = shape
            else:  # every expert that stays has this shape
                count = stacked.get(stack.name, checkpoint.entry(stack.name).shape)[0]
                stacked[stack.name] = (count, *shape[:: -1 if stack.transposed else 1])
        parts = {part for name in stacked for part in checkpoint.parts(name)}
        stay = {checkpoint.stacks[name].part(index) for name, shape in stacked.items() for index in range(shape[0])}
        try:
            earlier = read_pruning_record(checkpoint.folder)
        except FistaPrunerError:  # the report says so: the lineage is in the same file
            earlier = {}
        return cls(checkpoint, earlier, places, stacked | cut, dropped, dropped | (parts - stay))

    def replacement(self, name: str) -> Tensor | None:
        """Read a tensor of the new checkpoint; None where it is as it was."""
        if name in self.places:
            return self.places[name].read(name)
        return self.checkpoint.read(name) if name in self.checkpoint.orders else None


def write(
    context: RunContext, times: Times, listener: Listener, earlier: Report | None = None, *, alone: bool = False
) -> Report:
    """Write the checkpoint and the report of a run whose layers are all journaled.

    Args:
        context: the opened run.
        times: wall time of the run so far.
        listener: receives progress.
        earlier: report of the finished run whose checkpoint is written again: its measurements stay.
        alone: this process has pruned all layers, so that the GPU memory it took is that of the run.
    """
    begin, run = time.perf_counter(), context.run
    record = run.begun_record()
    report = record.report()
    entries = [run.journal.finished(index, context.fingerprint) for index in range(len(context.model))]
    report.layers = [entry for entry in entries if entry is not None]
    report.permuted = _of_kept_experts(report.permuted, report.layers)
    report.warnings += [warning for layer in report.layers for warning in layer.warnings]
    changed = ChangedTensors.of(context)
    report.totals = _totals(report, context, times.total(), changed, alone=alone)
    own = operator_claims(report, context.model)
    pruned = {name for name, claim in own.items() if claim["sparsity"] != "0%"}
    kept = kept_claims(context, report, pruned, changed)
    report.totals.model_zeros = claimed_zeros({**own, **kept})
    report.stacked_experts = any(stack_of(name) for name in (*own, *kept))
    report.totals.time_split |= record.decision.seconds
    report.finished = now()
    add_stage(report)
    _write_model(context, report, {**own, **kept}, changed, listener)
    close_report(run, report, earlier, times, begin)
    update_stage(report)
    run.write_report(report)
    return report


def _of_kept_experts(
    permuted: Mapping[str, tuple[float, float]], layers: Sequence[LayerEntry]
) -> dict[str, tuple[float, float]]:
    """Name operators by the numbers that kept experts have now; leave out those of removed ones."""
    kept, found = moved_experts(layers), {}
    for name, shares in permuted.items():
        prefix = next((prefix for prefix in kept if name.startswith(prefix)), None)
        if prefix is None:
            found[name] = shares
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if int(number) in kept[prefix]:
            found[f"{prefix}{kept[prefix].index(int(number))}.{rest}"] = shares
    return found


def _write_model(
    context: RunContext,
    report: Report,
    claims: Mapping[str, Any],
    changed: ChangedTensors,
    listener: Listener,
) -> None:
    """Write the checkpoint, unless a whole one of this run is there."""
    run, journal, checkpoint = context.run, context.run.journal, context.model.checkpoint
    low_rank: dict[str, Any] = {}
    if rank := context.recipe.low_rank:
        factors = journaled_factors(journal.weights(index) for index in range(len(context.model)))
        low_rank = write_low_rank(run, factors, rank, context.layout, report.totals)

    def documents() -> dict[str, str]:
        return model_documents(model_card(report), _record(report, context, claims, changed) | low_rank)

    write_model(
        run,
        checkpoint,
        context.fingerprint,
        changed.replacement,
        documents,
        listener,
        shapes=changed.shapes,
        dropped=changed.dropped,
        config_changes=None if context.widths is None else changed_config(context.model, context.widths),
    )


def _flops(model: LayerwiseModel, gone: int, narrowed: Mapping[str, int]) -> tuple[int, int]:
    """Count the floating-point operations of a token in the dense model, and in one with fewer parameters.

    Those of the matrices of the decoder layers and of the output head: two for each weight. Of a mixture's experts a
    token passes through those that the router chooses. Attention between tokens comes on top, the same in both.

    Args:
        model: the dense model.
        gone: weights of matrices of the decoder layers that were removed, those of experts left out.
        narrowed: weights that every expert that stays has lost, by the name of its mixture.
    """
    parameters = dict(model.model.named_parameters())
    matrices = {name: parameter.numel() for name, parameter in parameters.items() if parameter.ndim > 1}

    def weights(prefix: str) -> int:
        return sum(count for name, count in matrices.items() if name.startswith(f"{prefix}."))

    used = weights(model.layers_name)
    mixtures = {
        model.full_name(index, name): experts.number
        for index, layer in enumerate(model.layers)
        for name, experts in expert_modules(layer).items()
    }
    for name, chosen in chosen_experts(model).items() if mixtures else ():
        used -= weights(name) * (mixtures[name] - chosen) // mixtures[name]
        gone += chosen * narrowed.get(name, 0)
    head = model.model.get_output_embeddings()
    used += 0 if head is None else head.weight.numel()
    return 2 * used, 2 * (used - gone)


def _totals(
    report: Report,
    context: RunContext,
    seconds: float,
    changed: ChangedTensors,
    *,
    alone: bool,
) -> Totals:
    checkpoint, tokens, device = context.model.checkpoint, context.tokens, context.model.device
    layers = report.layers
    split: dict[str, float] = {}
    for layer in layers:
        for phase, value in layer.seconds.items():
            split[phase] = split.get(phase, 0.0) + value
    # Every layer timed one pass of its first batch without hooks: together, a plain forward pass of these windows.
    plain = [layer.seconds["plain"] for layer in layers if "plain" in layer.seconds]
    windows, seqlen = min(context.numerics.batch_size, tokens.shape[0]), tokens.shape[1]
    shapes = changed.shapes
    gone = {name: math.prod(checkpoint.entry(name).shape) - math.prod(shape) for name, shape in shapes.items()}
    narrowed: dict[str, int] = {}
    for index, units in enumerate(context.widths.units if context.widths else ()):
        for unit in (unit for unit in units if unit.reader is not None and unit.reader.experts):
            lost = 0
            for name in unit.names:
                gone.pop(context.model.source_of(index, f"{name}.weight"), None)
                lost += context.model.layers[index].get_parameter(f"{name}.weight").numel() // unit.before
            narrowed[context.model.full_name(index, unit.consumer.experts)] = lost * (unit.before - unit.after)
    dense_flops, flops = (
        _flops(
            context.model,
            sum(n for name, n in gone.items() if len(shapes[name]) > 1 and name not in checkpoint.stacks),
            narrowed,
        )
        if shapes
        else (None, None)
    )
    return Totals(
        operator_weights=report.operator_weights,
        operator_zeros=report.operator_zeros,
        model_weights=context.model.parameter_count(shapes, changed.dropped),
        model_zeros=report.operator_zeros,
        dense_flops_per_token=dense_flops,
        flops_per_token=flops,
        seconds=seconds,
        time_split=split,
        peak_memory=max(peak_memory(), *(layer.peak_memory or 0 for layer in layers)),
        capture_tokens_per_second=tokens.numel() / split["capture"] if split.get("capture") else None,
        forward_tokens_per_second=windows * seqlen / sum(plain)
        if len(plain) == len(layers) and sum(plain) > 0
        else None,
        peak_device_memory=peak_device_memory(device) if alone else None,
    )


def _record(report: Report, context: RunContext, claims: Mapping[str, Any], changed: ChangedTensors) -> dict[str, Any]:
    """Describe the checkpoint (``fistapruner.json``): the claims that ``inspect`` checks, and the lineage."""
    cut: dict[tuple[int, str], dict[str, Any]] = {}  # experts of a layer are one entry
    for index, units in enumerate(context.widths.units if context.widths else ()):
        for unit in units:
            entry = {
                "layer": f"{context.layout.layers_name}.{index}",
                "unit": unit.kind,
                "before": unit.before,
                "after": unit.after,
                "sizes": {},
            }
            sizes = cut.setdefault((index, unit.kind), entry)["sizes"]
            sizes |= {name: part.block * part.copies for name, part in unit.producers.items()}
            if unit.reader is not None:
                sizes[unit.name] = unit.columns
    widths = kept_widths(changed.earlier, list(cut.values()))
    more = {"widths": widths} if widths else {}
    return checkpoint_record(report, claims, permuted=kept_permuted(context, report, changed), **more)


def kept_claims(
    context: RunContext, report: Report, pruned: Collection[str], changed: ChangedTensors
) -> dict[str, dict[str, Any]]:
    """Return the claims of the run's input about operators that get no zeros in this run.

    Zeros are counted again: a tensor may have lost channels, or be of another expert, or never have had them.

    Args:
        context: the run.
        report: of its layers.
        pruned: names of the stored weights that get zeros.
        changed: what the new checkpoint has in place of the input's tensors.
    """
    checkpoint = context.model.checkpoint
    try:
        claims, _ = recorded_claims(changed.earlier, checkpoint, checkpoint.folder)
    except FistaPrunerError:
        return {}
    if not claims:
        return {}
    operators = _operators(context)
    before = _names_before(context, report, operators)
    kept = {}
    for name in {**claims, **before}:
        claim = claims.get(before.get(name, name))
        if claim is None or name in pruned or name in changed.gone:
            continue
        tensor = changed.replacement(name)
        found = _counted(claim, checkpoint.read(name) if tensor is None else tensor, operators.get(name))
        if found is not None:
            kept[name] = found
    return kept


def claimed_zeros(claims: Mapping[str, Mapping[str, Any]]) -> int:
    """Add up the zeros of operators that are claimed to have some."""
    pruned = (claim for claim in claims.values() if claim.get("sparsity") != "0%")
    return sum(zeros for claim in pruned if type(zeros := claim.get("zeros")) is int)


def kept_permuted(context: RunContext, report: Report, changed: ChangedTensors) -> list[str]:
    """List the tensors whose channels are reordered or rotated, unlike those of the dense model.

    This run or an earlier one has reordered them. Arguments as for :func:`kept_claims`.
    """
    permuted = permuted_tensors(changed.earlier) | set(context.model.checkpoint.orders)
    before = _names_before(context, report, _operators(context)) if permuted else {}
    reordered = {name for name in permuted | set(before) if before.get(name, name) in permuted}
    return sorted(reordered.difference(changed.gone))


def kept_widths(record: Mapping[str, Any], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the widths of a run's result: its own, and those of its input that stay.

    Args:
        record: of the input.
        own: widths that the run itself has changed; the numbers before are then those of the first run.
    """
    listed = record.get("widths")
    earlier = {
        (entry["layer"], entry["unit"]): entry
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("layer", "unit"))
    }
    merged = []
    for entry in own:
        before = earlier.pop((entry["layer"], entry["unit"]), entry)
        merged.append({**entry, "before": before.get("before", entry["before"])})
    return [*earlier.values(), *merged]


def moved_experts(layers: Iterable[LayerEntry]) -> dict[str, Sequence[int]]:
    """Return the numbers that kept experts had, by what the names of their mixture's experts begin with."""
    return {
        f"{layer.name}.{removal.consumer}.": removal.kept
        for layer in layers
        for removal in layer.removals
        if removal.kept is not None
    }


def _operators(context: RunContext) -> dict[str, Operator]:
    return operators_by_weight(context.model.layers_name, context.model.layers, context.model.source)


def _names_before(context: RunContext, report: Report, operators: Mapping[str, Operator]) -> dict[str, str]:
    """Return the stored names that the weights of moved experts had in the input, by those they have now."""
    before = {}
    for prefix, kept in moved_experts(report.layers).items():
        for stored, operator in operators.items():
            place, _, part = operator.name.removeprefix(prefix).partition(".")
            if operator.name.startswith(prefix) and int(place) < len(kept):
                before[stored] = context.model.source(f"{prefix}{kept[int(place)]}.{part}.weight")
    return before


def _counted(claim: Mapping[str, Any], tensor: Tensor, operator: Operator | None) -> dict[str, Any] | None:
    """Make a claim of what a tensor has in place of an earlier one; None where its zeros are gone."""
    weight = (tensor.T if operator is not None and operator.transposed else tensor).contiguous()
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    try:
        pattern = parse_sparsity(claim["sparsity"])
    except (FistaPrunerError, KeyError):
        return None
    if weight.ndim != 2 or (pattern.fraction and zeros < MIN_ZEROS * weight.numel()):
        return None
    promised = claim.get("zeros")
    if pattern.supports_allocation and type(promised) is int:
        holds = zeros >= promised or not pattern.fraction
    else:
        holds = pattern.satisfies(weight)
    sparsity = str(claim["sparsity"]) if holds else counted_sparsity(zeros, weight.numel())
    named = {} if operator is None else {"operator": operator.name}
    return {**claim, **named, "sparsity": sparsity, "zeros": zeros, "shape": list(weight.shape)}
