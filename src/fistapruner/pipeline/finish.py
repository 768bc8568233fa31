"""After the last layer: the checkpoint, and the report of what was done."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import FistaPrunerError
from ..execution.context import RunContext
from ..models.discovery import expert_modules
from ..models.files.low_rank import journaled_factors
from ..models.files.record import stack_of
from ..models.layerwise import LayerwiseModel
from ..planning.plan import check_plan
from ..reporting.model_card import model_card
from ..runs.layer_records import LayerEntry
from ..runs.lineage import add_stage, update_stage
from ..runs.listener import Listener
from ..runs.records import Report, Totals
from ..runs.times import Times
from ..runtime.files import folder_bytes
from ..runtime.formatting import listed, shell_line
from ..runtime.machine import now
from ..runtime.memory import peak_device_memory, peak_memory
from ..structure.experts import chosen_experts
from ..structure.smaller import changed_config
from .changed_tensors import ChangedTensors
from .kept_claims import claimed_zeros, kept_claims, kept_permuted, kept_widths, moved_experts
from .result import checkpoint_record, close_report, model_documents, operator_claims, write_low_rank, write_model


def finish(
    context: RunContext, times: Times, listener: Listener, earlier: Report | None = None, *, alone: bool = False
) -> Report:
    """Write the checkpoint and the report of a run whose layers are all journaled.

    Args:
        context: the opened run.
        times: wall time of the run so far.
        listener: receives progress.
        earlier: report of the finished run whose checkpoint is written again; see :func:`.result.close_report`.
        alone: this process has pruned all layers, so that the GPU memory it took is that of the run.

    Raises:
        FistaPrunerError: layers are missing.
    """
    begin, run = time.perf_counter(), context.run
    record = run.begun_record()
    report = record.report()
    report.layers = _finished_layers(context)
    report.permuted = _of_kept_experts(report.permuted, report.layers)
    report.warnings += [warning for layer in report.layers for warning in layer.warnings]
    changed = ChangedTensors.of(context)
    report.totals = _totals(report, context, times.total(), changed, alone=alone)
    own = operator_claims(report, context.model)
    pruned = {name for name, claim in own.items() if claim["sparsity"] != "0%"}
    kept = kept_claims(context, report, pruned, changed)
    report.totals.model_zeros = claimed_zeros({**own, **kept})
    report.stacked_experts = any(stack_of(name) for name in (*own, *kept))
    if record.decision.sensitivity_seconds:
        report.totals.time_split["sensitivity"] = record.decision.sensitivity_seconds
    if record.decision.calibration_seconds:
        report.totals.time_split["calibration"] = record.decision.calibration_seconds
    report.finished = now()
    add_stage(report)
    _write_model(context, report, {**own, **kept}, changed, listener)
    close_report(run, report, earlier, times, begin)
    adapter = report.totals.low_rank_bytes or 0
    disk = folder_bytes(run.journal.folder) + folder_bytes(run.model) + adapter
    disk += run.metrics_file.stat().st_size if run.metrics_file.is_file() else 0
    report.plan = check_plan(report.plan, report.totals, report.layers, disk)
    update_stage(report)
    run.write_report(report)
    return report


def _finished_layers(context: RunContext) -> list[LayerEntry]:
    journal = context.run.journal
    entries = [journal.finished(index, context.fingerprint) for index in range(len(context.model))]
    if missing := [index for index, entry in enumerate(entries) if entry is None]:
        layers = f"{listed('decoder layer', missing)} {'is' if len(missing) == 1 else 'are'}"
        raise FistaPrunerError(
            f"{context.run.folder}: {layers} not pruned yet: '{shell_line('resume', context.run.folder)}' prunes "
            f"{'it' if len(missing) == 1 else 'them'}"
        )
    return [entry for entry in entries if entry is not None]


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
