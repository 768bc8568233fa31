"""Write the results of runs: the checkpoint and the report, of pruning as of training."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import parse_sparsity
from ..core.constraints import counted_sparsity
from ..errors import FistaPrunerError
from ..models.checkpoint import PRUNING_RECORD, Checkpoint
from ..models.layers import LayerwiseModel
from ..models.low_rank import journaled_factors, write_adapter
from ..models.operators import Layout, Operator, operators_by_weight
from ..models.record import LOW_RANK, MIN_ZEROS, read_pruning_record, recorded_claims, stack_of
from ..models.safetensors import LazyTensors, SafetensorsFile
from ..models.write import write_checkpoint
from ..reporting.model_card import model_card
from ..runs.directory import CARD, RunDirectory
from ..runs.lineage import update_stage
from ..runs.log import Listener, Times
from ..runs.records import VERSION, Report, Totals, load_run
from ..runtime.devices import peak_device_memory, peak_memory
from ..runtime.files import disk_errors
from ..runtime.machine import now
from ..structure.smaller import changed_config, dropped_tensors, unread_tensors
from .context import RunContext

# --- the result of a pruning run


@dataclass(frozen=True)
class ChangedTensors:
    """What the checkpoint of a run has in place of its input's tensors.

    Args:
        checkpoint: the input; ``earlier``: its record, empty where there is none.
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
        cut: dict[str, tuple[int, ...]] = {}
        dropped, stacked = dropped_tensors(context.model, widths)
        dropped |= set(unread_tensors(context.model, widths))
        for name, file in places.items() if widths.units else ():
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
        earlier = read_pruning_record(checkpoint.folder)
        return cls(checkpoint, earlier, places, stacked | cut, dropped, dropped | (parts - stay))

    def replacement(self, name: str) -> Tensor | None:
        """Read a tensor of the new checkpoint; None where it is as it was."""
        if name in self.places:
            return self.places[name].read(name)
        return self.checkpoint.read(name) if name in self.checkpoint.orders else None


def write(context: RunContext, times: Times, listener: Listener, *, alone: bool = False) -> Report:
    """Write the checkpoint and the report of a run whose layers are all journaled.

    ``alone`` says that this process has pruned all layers, so that the GPU memory it took is that of the run.
    """
    run, model = context.run, context.model
    record = run.begun_record()
    report = record.report()
    entries = [run.journal.finished(index, context.fingerprint) for index in range(len(model))]
    report.layers = [entry for entry in entries if entry is not None]
    report.warnings += [warning for layer in report.layers for warning in layer.warnings]
    changed = ChangedTensors.of(context)
    report.totals = _totals(report, context, changed)
    report.totals.time_split |= record.decision.seconds
    report.totals.seconds = times.total()
    report.totals.peak_device_memory = peak_device_memory(model.device) if alone else None
    own = operator_claims(report, model)
    claims = {**own, **_kept_claims(context, own, changed)}
    pruned = [claim.get("zeros") for claim in claims.values() if claim.get("sparsity") != "0%"]
    report.totals.model_zeros = sum(zeros for zeros in pruned if type(zeros) is int)
    more: dict[str, Any] = {}
    rank, journals = context.recipe.low_rank, map(run.journal.weights, range(len(model)))
    if rank and (factors := journaled_factors(journals)):
        more = write_low_rank(run, factors, rank, context.layout, report.totals)
    if widths := _widths(context, changed.earlier):
        more["widths"] = widths
    # Of the tensors whose channels were reordered, by this run or an earlier one, those that are left.
    permuted = (set(changed.earlier.get("permuted", [])) | set(model.checkpoint.orders)).difference(changed.gone)
    more["permuted"] = sorted(permuted)
    finish(
        run,
        context.fingerprint,
        report,
        {**more, "operators": claims},
        times,
        listener,
        source=model.checkpoint,
        replacement=changed.replacement,
        shapes=changed.shapes,
        dropped=changed.dropped,
        config_changes=changed_config(model, context.widths) if context.widths.units else None,
    )
    run.write_report(report)
    return report


def _totals(report: Report, context: RunContext, changed: ChangedTensors) -> Totals:
    """Add up weights, times and memory of the layers."""
    split: Counter[str] = Counter()
    for layer in report.layers:
        split.update(layer.seconds)
    return Totals(
        operator_weights=report.operator_weights,
        operator_zeros=report.operator_zeros,
        model_weights=context.model.parameter_count(changed.shapes, changed.dropped),
        time_split=dict(split),
        peak_memory=max(peak_memory(), *(layer.peak_memory or 0 for layer in report.layers)),
    )


def _widths(context: RunContext, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe the widths that this run, or an earlier one by the input's record, has changed.

    Experts of a layer are one entry. Numbers before are those of the first run.
    """
    listed = record.get("widths")
    found = {
        (entry["layer"], entry["unit"]): entry
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("layer", "unit"))
    }
    for index, units in enumerate(context.widths.units):
        layer, own = f"{context.layout.layers_name}.{index}", dict[str, dict[str, Any]]()
        for unit in units:
            before = found.pop((layer, unit.kind), {}).get("before", unit.before)
            entry = {"layer": layer, "unit": unit.kind, "before": before, "after": unit.after, "sizes": {}}
            sizes = own.setdefault(unit.kind, entry)["sizes"]
            sizes |= {name: part.block * part.copies for name, part in unit.producers.items()}
            if unit.reader is not None:
                sizes[unit.name] = unit.columns
        found |= {(layer, kind): entry for kind, entry in own.items()}
    return list(found.values())


def _kept_claims(
    context: RunContext, own: Mapping[str, Mapping[str, Any]], changed: ChangedTensors
) -> dict[str, dict[str, Any]]:
    """Return the claims of the run's input about operators that get no zeros in this run.

    Zeros are counted again: a tensor may have lost channels, or be of another expert. ``own``: claims of the run.
    """
    model, kept = context.model, dict[str, dict[str, Any]]()
    claims, _ = recorded_claims(changed.earlier, model.checkpoint)
    operators = operators_by_weight(model) if claims else {}
    for name, claim in claims.items():
        if name in changed.gone or own.get(name, {}).get("sparsity", "0%") != "0%":
            continue
        tensor = changed.replacement(name)
        tensor = model.checkpoint.read(name) if tensor is None else tensor
        if (found := _counted(claim, tensor, operators.get(name))) is not None:
            kept[name] = found
    return kept


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


# --- what pruning and training share


@contextmanager
def reporting_failure(run: RunDirectory, times: Times) -> Iterator[None]:
    """Let ``report.json`` say why the run fails, if it does; that of an earlier attempt is removed."""
    with disk_errors(run.report_file):
        run.report_file.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        with suppress(FistaPrunerError):  # such as a full disk, most likely the very error
            report = load_run(run.folder)
            report.status, report.error, report.finished = "failed", str(error) or type(error).__name__, now()
            report.totals.seconds = times.total()
            run.write_report(report)
        raise


def finish(
    run: RunDirectory,
    fingerprint: str,
    report: Report,
    record: Mapping[str, Any],
    times: Times,
    listener: Listener,
    **changes: Any,
) -> None:
    """Write a run's checkpoint, unless that of this run is there, and close its report.

    Args:
        record: what ``fistapruner.json`` says beside the run: ``operators`` are claims about zeros, by stored weight.
        **changes: arguments of :func:`fistapruner.models.write.write_checkpoint`.
    """
    begin = time.perf_counter()
    report.stacked_experts = any(map(stack_of, record["operators"]))
    report.finished = now()
    update_stage(report)
    if not run.has_model(fingerprint):
        listener.say("writing the checkpoint")
        own = {
            "version": VERSION,
            "fingerprint": report.fingerprint,
            "recipe": report.recipe,
            "model": report.model.source,
            "versions": report.versions,
            "operators": record["operators"],
            "lineage": report.lineage.model_dump(mode="json") if report.lineage else None,
        }
        more = {key: value for key, value in record.items() if key not in own}
        documents = model_documents(model_card(report), own | more)
        write_checkpoint(out=run.model, documents=documents, **changes)
    times.note()
    report.status = "finished"
    report.finished = now()
    report.totals.seconds = times.total()
    report.totals.time_split["write"] = time.perf_counter() - begin
    report.totals.checkpoint_bytes = Checkpoint.open(run.model).file_bytes
    update_stage(report)


def write_low_rank(
    run: RunDirectory, factors: LazyTensors, rank: int, layout: Layout, totals: Totals
) -> dict[str, Any]:
    """Write the low-rank part of a run, its ``factors`` by name in the model, and count it in ``totals``.

    Returns what the checkpoint's record says of it.
    """
    found = write_adapter(run.adapter, factors, rank, transposed=layout.transposed)
    totals.low_rank, totals.low_rank_weights, totals.low_rank_bytes = rank, found["weights"], found["bytes"]
    return {LOW_RANK: found}


def operator_claims(report: Report, model: LayerwiseModel) -> dict[str, dict[str, Any]]:
    """Describe the zeros of every operator in a report, by the name of its stored weight."""
    claims = {}
    for layer in report.layers:
        for operator in layer.operators:
            name = f"{layer.name}.{operator.name}"
            claim = {
                "operator": name,
                "sparsity": operator.sparsity,
                "zeros": operator.zeros,
                "shape": list(operator.shape),
            }
            stored = model.source(f"{name}.weight")
            stack = model.checkpoint.stack_of(stored)
            claims[stored] = claim if stack is None else {**claim, "transposed": stack.transposed}
    return claims


def model_documents(card: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the text files beside a model's weights: its card, and its record unless that is empty."""
    return {CARD: card} | ({PRUNING_RECORD: json.dumps(record, indent=2) + "\n"} if record else {})


def check_zeros(folder: Path, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Compare the zeros of stored weights in the written files with those of the input.

    Args:
        folder: of the written checkpoint.
        checkpoint: the input; ``names``: its weights that were changed.
    """
    written = Checkpoint.open(folder)
    for stack in checkpoint.stacks.values():
        written.take_apart(stack)
    for name in names:
        if not torch.equal(checkpoint.read(name) == 0, written.read(name) == 0):
            raise FistaPrunerError(f"{folder}: {name} does not have the zeros of the input (a fault in fistapruner)")
