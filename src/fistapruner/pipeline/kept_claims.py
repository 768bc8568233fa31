"""Keep what the record of a pruned model claims, where a pruning run of it leaves it true."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import parse_sparsity
from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..execution.context import RunContext
from ..models.files.record import MIN_ZEROS, permuted_tensors, recorded_claims
from ..models.layout import Operator
from ..models.stored import operators_by_weight
from ..runs.layer_records import LayerEntry
from ..runs.records import Report
from .changed_tensors import ChangedTensors


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
