"""After the last layer: the checkpoint, and the report of what was done."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..execution.context import RunContext
from ..models.discovery import expert_modules
from ..models.files.checkpoint import PRUNING_RECORD, Checkpoint
from ..models.files.low_rank import RECORD as LOW_RANK
from ..models.files.low_rank import write_adapter
from ..models.files.writer import write_checkpoint
from ..models.layerwise import LayerwiseModel
from ..planning.plan import check_plan
from ..reporting.model_card import model_card
from ..runs.base import VERSION
from ..runs.directory import CARD, RunDirectory
from ..runs.layer_records import LayerEntry
from ..runs.lineage import add_stage, update_stage
from ..runs.listener import Listener
from ..runs.records import Report, Totals, load_run
from ..runs.times import Times
from ..runtime.files import PARTIAL, disk_errors, sha256_file
from ..runtime.formatting import shell_line
from ..runtime.machine import now
from ..runtime.memory import peak_memory
from ..structured.experts import EXPERTS, chosen_experts, dropped_tensors
from ..structured.units import changed_config, unread_tensors
from .kept_claims import claimed_zeros, earlier_record, kept_claims, kept_permuted, kept_widths, moved_experts


def finish(
    context: RunContext, times: Times, listener: Listener, earlier: Report | None = None, *, alone: bool = False
) -> Report:
    """Write the checkpoint and the report of a run whose layers are all journaled.

    Args:
        context: the opened run.
        times: wall time of the run so far.
        listener: receives progress.
        earlier: report of the finished run whose checkpoint is written again; its measurements still hold.
        alone: this process has pruned all layers, so that the GPU memory it took is that of the run.

    Raises:
        FistaPrunerError: layers are missing.
    """
    begin, run = time.perf_counter(), context.run
    record = run.record()
    assert record is not None  # the context was opened with it
    report = record.report()
    report.layers = _finished_layers(context)
    report.permuted = _of_kept_experts(report.permuted, report.layers)
    report.warnings += [warning for layer in report.layers for warning in layer.warnings]
    dropped, stacked = _dropped(context)
    shapes = stacked | _new_shapes(context)
    report.totals = _totals(report.layers, context, times.total(), shapes, dropped, alone=alone)
    own = operator_claims(report, context.model)
    replacement, gone = _replacement(context), _gone(context, dropped, stacked)
    pruned = {name for name, claim in own.items() if claim["sparsity"] != "0%"}
    kept = kept_claims(context, report, pruned, replacement, gone)
    report.totals.model_zeros = claimed_zeros({**own, **kept})
    report.stacked_experts = any(name.endswith("]") for name in (*own, *kept))
    if record.decision.sensitivity_seconds:
        report.totals.time_split["sensitivity"] = record.decision.sensitivity_seconds
    report.finished = now()
    add_stage(report)
    _write_model(context, report, {**own, **kept}, replacement, gone, shapes, dropped, listener)
    times.note()  # before the report calls the run finished: what a kill leaves half-written is then written again
    if earlier is not None:
        keep_measurements(report, earlier)
    report.status = "finished"
    report.finished = now()
    report.totals.seconds, report.totals.parts = times.total(), times.parts()
    report.totals.time_split["write"] = time.perf_counter() - begin
    report.totals.checkpoint_bytes = folder_bytes(run.model)
    adapter = report.totals.low_rank_bytes or 0
    disk = folder_bytes(run.journal.folder) + report.totals.checkpoint_bytes + adapter
    disk += run.metrics_file.stat().st_size if run.metrics_file.is_file() else 0
    report.plan = check_plan(report.plan, report.totals, report.layers, disk)
    update_stage(report)
    run.write_report(report)
    return report


@contextmanager
def reporting_failure(run: RunDirectory, times: Times) -> Iterator[None]:
    """Let ``report.json`` say why the run fails, if it does; that of an earlier attempt is removed."""
    with disk_errors(run.report_file):
        run.report_file.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if run.run_file.exists():
            with suppress(FistaPrunerError):  # a full disk, most likely the very error
                _write_failure(run, error, times)
        raise


def _write_failure(run: RunDirectory, error: BaseException, times: Times) -> None:
    """Write the report of a run that stops with an error: what is done so far, and the reason."""
    report = load_run(run.folder)
    report.status, report.error, report.finished = "failed", str(error) or type(error).__name__, now()
    report.totals.seconds = times.total()
    run.write_report(report)


def _finished_layers(context: RunContext) -> list[LayerEntry]:
    journal = context.run.journal
    entries = [journal.finished(index, context.fingerprint) for index in range(len(context.model))]
    if missing := [str(index) for index, entry in enumerate(entries) if entry is None]:
        raise FistaPrunerError(
            f"{context.run.folder}: decoder layers {', '.join(missing)} are not pruned yet: "
            f"'{shell_line('resume', context.run.folder)}' prunes them here, the prune command with --only-layers "
            "elsewhere"
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


def _replacement(context: RunContext) -> Callable[[str], Tensor | None]:
    """Return a function that gives a tensor of the new checkpoint by name; None where it is as it was."""
    journal, checkpoint = context.run.journal, context.model.checkpoint
    files = [journal.weights(index) for index in range(len(context.model))]
    places = {name: file for file in files for name in file.entries}

    def replacement(name: str) -> Tensor | None:
        if name in places:
            return places[name].read(name)
        return checkpoint.read(name) if name in checkpoint.orders else None

    return replacement


def _gone(context: RunContext, dropped: set[str], shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], bool]:
    """Return a function that tells whether the result lacks a tensor; takes :func:`_dropped`."""
    stacks = context.model.checkpoint.stacks
    stay = {part for name, shape in shapes.items() for part in map(stacks[name].part, range(shape[0]))}
    all_gone = dropped | ({part for name in shapes for part in context.model.checkpoint.parts(name)} - stay)
    return lambda name: name in all_gone


def _write_model(
    context: RunContext,
    report: Report,
    claims: Mapping[str, Any],
    replacement: Callable[[str], Tensor | None],
    gone: Callable[[str], bool],
    shapes: Mapping[str, tuple[int, ...]],
    dropped: Collection[str],
    listener: Listener,
) -> None:
    """Write the checkpoint, unless a whole one of this run is there."""
    run, journal, checkpoint = context.run, context.run.journal, context.model.checkpoint
    layers = range(len(context.model))
    low_rank = None
    if context.recipe.low_rank:
        operators = [operator for layer in context.layout.layers for group in layer for operator in group]
        low_rank = write_adapter(
            run.adapter,
            [journal.weights(index) for index in layers],
            context.recipe.low_rank,
            transposed=any(operator.transposed for operator in operators),
        )
        report.totals.low_rank_weights, report.totals.low_rank_bytes = low_rank["weights"], low_rank["bytes"]

    def documents() -> dict[str, str]:
        content = _record(report, context, claims, gone) | ({} if low_rank is None else {LOW_RANK: low_rank})
        return {CARD: model_card(report), PRUNING_RECORD: json.dumps(content, indent=2) + "\n"}

    write_model(
        run,
        checkpoint,
        context.fingerprint,
        replacement,
        documents,
        listener,
        shapes=shapes,
        dropped=dropped,
        config_changes=None if context.widths is None else changed_config(context.model, context.widths),
    )


def write_model(
    run: RunDirectory,
    checkpoint: Checkpoint,
    fingerprint: str,
    replacement: Callable[[str], Tensor | None],
    documents: Callable[[], Mapping[str, str]],
    listener: Listener,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dropped: Collection[str] = (),
    config_changes: Mapping[str, Any] | None = None,
) -> None:
    """Write a run's checkpoint, unless a whole one of this run is there.

    Args:
        run: the run directory.
        checkpoint: the model that the run has changed.
        fingerprint: of the run.
        replacement: returns a tensor of the new checkpoint by name; None keeps the old one.
        documents: returns the text files beside the weights.
        listener: receives progress.
        shapes: new shapes of tensors, by name; ``dropped``: names of those left out.
        config_changes: of ``config.json``, as a JSON merge patch.
    """
    if run.model.exists() and run.model_fault(fingerprint):
        run.remove_model(checkpoint)  # it is damaged, or of a model or calibration text that has changed since
    if not run.model.exists():
        listener.say("writing the checkpoint")
        digests = write_checkpoint(
            checkpoint,
            run.model,
            replacement,
            shapes=shapes,
            dropped=dropped,
            config_changes=config_changes,
            identity=fingerprint,
            documents=documents(),
        )
        run.write_model_record(fingerprint, digests)
    elif run.model_record() is None:  # a kill came between the checkpoint and its record
        (run.model / PARTIAL).unlink(missing_ok=True)
        digests = {name: sha256_file(file.path) for name, file in Checkpoint.open(run.model).files.items()}
        run.write_model_record(fingerprint, digests)


def _new_shapes(context: RunContext) -> dict[str, tuple[int, ...]]:
    """Return the new shapes of the journaled tensors that lost channels or experts, by checkpoint name."""
    if context.widths is None:
        return {}
    return {
        name: entry.shape
        for index in range(len(context.model))
        for name, entry in context.run.journal.weights(index).entries.items()
        if entry.shape != context.model.checkpoint.entry(name).shape
    }


def _dropped(context: RunContext) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the stored tensors that the result lacks, and new shapes of those that hold all experts.

    The former are of removed experts, and of layers that the model does not read and the new config does not fit.
    """
    unread = set(unread_tensors(context.model, context.widths))
    if context.widths is None or not context.widths.experts:
        return unread, {}
    dropped, shapes = dropped_tensors(context.model, context.widths.experts)
    return dropped | unread, shapes


def _flops(model: LayerwiseModel, gone: int) -> tuple[int, int]:
    """Count the floating-point operations of a token in the dense model, and in one with fewer parameters.

    Those of the matrices of the decoder layers and of the output head: two for each weight. Of a mixture's experts a
    token passes through those that the router chooses. Attention between tokens comes on top, the same in both.

    Args:
        model: the dense model.
        gone: weights of matrices of the decoder layers that were removed, those of experts left out.
    """
    parameters = dict(model.model.named_parameters())
    matrices = {name: parameter.numel() for name, parameter in parameters.items() if parameter.ndim > 1}

    def weights(prefix: str) -> int:
        return sum(count for name, count in matrices.items() if name.startswith(f"{prefix}."))

    used = weights(model.layers_name)
    mixtures = {
        f"{model.layers_name}.{index}.{name}": experts.number
        for index, layer in enumerate(model.layers)
        for name, experts in expert_modules(layer).items()
    }
    for name, chosen in chosen_experts(model).items() if mixtures else ():
        used -= weights(name) * (mixtures[name] - chosen) // mixtures[name]
    head = model.model.get_output_embeddings()
    used += 0 if head is None else head.weight.numel()
    return 2 * used, 2 * (used - gone)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _totals(
    layers: list[LayerEntry],
    context: RunContext,
    seconds: float,
    shapes: Mapping[str, tuple[int, ...]],
    dropped: Collection[str],
    *,
    alone: bool,
) -> Totals:
    checkpoint, tokens, device = context.model.checkpoint, context.tokens, context.model.device
    split: dict[str, float] = {}
    for layer in layers:
        for phase, value in layer.seconds.items():
            split[phase] = split.get(phase, 0.0) + value
    operators = [operator for layer in layers for operator in layer.operators]
    zeros = sum(operator.zeros for operator in operators)
    # Every layer timed one pass of its first batch without hooks: together, a plain forward pass of these windows.
    plain = [layer.seconds["plain"] for layer in layers if "plain" in layer.seconds]
    windows, seqlen = min(context.numerics.batch_size, tokens.shape[0]), tokens.shape[1]
    gone = {name: math.prod(checkpoint.entry(name).shape) - math.prod(shape) for name, shape in shapes.items()}
    dense_flops, flops = (
        _flops(
            context.model,
            sum(n for name, n in gone.items() if len(shapes[name]) > 1 and name not in checkpoint.stacks),
        )
        if shapes
        else (None, None)
    )
    return Totals(
        operator_weights=sum(math.prod(operator.shape) for operator in operators),
        operator_zeros=zeros,
        model_weights=sum(math.prod(checkpoint.entry(name).shape) for name in checkpoint.names())
        - sum(gone.values())
        - sum(math.prod(checkpoint.entry(name).shape) for name in dropped),
        model_zeros=zeros,
        dense_flops_per_token=dense_flops,
        flops_per_token=flops,
        seconds=seconds,
        time_split=split,
        peak_memory=max(peak_memory(), *(layer.peak_memory or 0 for layer in layers)),
        capture_tokens_per_second=tokens.numel() / split["capture"] if split.get("capture") else None,
        forward_tokens_per_second=windows * seqlen / sum(plain)
        if len(plain) == len(layers) and sum(plain) > 0
        else None,
        peak_device_memory=torch.cuda.max_memory_allocated(device) if alone and device.type == "cuda" else None,
    )


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


def keep_measurements(report: Report, earlier: Report) -> None:
    """Take over what was measured of a finished checkpoint that is written again, and still holds."""
    report.evaluations, report.generations, report.speed = earlier.evaluations, earlier.generations, earlier.speed
    report.totals.compressed_bytes = earlier.totals.compressed_bytes
    if report.recovery is not None and earlier.recovery is not None:
        report.recovery.before = earlier.recovery.before


def record_head(report: Report) -> dict[str, Any]:
    """Say in ``fistapruner.json`` which run has made the checkpoint."""
    return {
        "version": VERSION,
        "fingerprint": report.fingerprint,
        "recipe": report.recipe,
        "model": report.model.source,
        "versions": report.versions,
    }


def _record(
    report: Report, context: RunContext, claims: Mapping[str, Any], gone: Callable[[str], bool]
) -> dict[str, Any]:
    """Describe the checkpoint (``fistapruner.json``): the claims that ``inspect`` checks, and the lineage."""
    model, earlier = context.model, earlier_record(context)
    widths = [
        {
            "layer": f"{context.layout.prefix}.{index}",
            "unit": unit.kind,
            "before": unit.before,
            "after": unit.after,
            "sizes": {name: len(rows) for name, rows in unit.kept_rows(torch.tensor([0])).items()}
            | {unit.consumer.name: unit.columns},
        }
        for index, units in enumerate(context.widths.units if context.widths else ())
        for unit in units
    ] + [
        {
            "layer": f"{context.layout.prefix}.{index}",
            "unit": EXPERTS,
            "before": unit.before,
            "after": unit.after,
            "sizes": {name.removesuffix(".weight"): 1 for name in unit.tensors if name.endswith(".weight")},
        }
        for index in range(len(model))
        for unit in (context.widths.mixtures(index) if context.widths else ())
    ]
    widths = kept_widths(earlier, widths)
    return {
        **record_head(report),
        "operators": claims,
        "permuted": kept_permuted(context, report, gone),
        **({"widths": widths} if widths else {}),
        "lineage": report.lineage.model_dump(mode="json") if report.lineage else None,
    }
