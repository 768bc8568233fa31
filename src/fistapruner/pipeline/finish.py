"""After the last layer: the checkpoint, and the report of what was done."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..execution.context import RunContext
from ..models.files.checkpoint import PRUNING_RECORD, Checkpoint
from ..models.files.writer import write_checkpoint
from ..models.layerwise import LayerwiseModel
from ..planning.plan import check_plan
from ..reporting.model_card import model_card
from ..runs.directory import CARD, RunDirectory
from ..runs.listener import Listener
from ..runs.records import VERSION, LayerEntry, Report, Totals, load_run, parse
from ..runs.times import Times
from ..runtime.files import PARTIAL, sha256_file, write_json_atomic
from ..runtime.machine import now
from ..runtime.memory import peak_memory


def finish(run: RunDirectory, work: RunContext, times: Times, listener: Listener, earlier: Report | None = None) -> Report:
    """Write the checkpoint and the report of a run whose layers are all journaled.

    Args:
        run: the run directory.
        work: the opened run.
        times: wall time of the run so far.
        listener: told of progress.
        earlier: report of the finished run whose checkpoint is made again: what was measured then still holds.

    Raises:
        FistaPrunerError: layers are missing.
    """
    entries = [run.finished(index, work.fingerprint) for index in range(len(work.skeleton))]
    missing = [str(index) for index, entry in enumerate(entries) if entry is None]
    if missing:
        raise FistaPrunerError(f"{run.folder}: decoder layers {', '.join(missing)} are not pruned yet; run the same command again")
    begin = time.perf_counter()
    layers = [entry for entry in entries if entry is not None]
    facts = run.facts()
    report = parse(Report, {key: value for key, value in facts.items() if key != "decided"}, str(run.run_file))
    report.layers = layers
    checkpoint = work.skeleton.checkpoint
    report.totals = _totals(layers, work, times.total())
    report.warnings += [warning for layer in layers for warning in layer.warnings]

    places = {name: index for index in range(len(layers)) for name in run.weights(index).entries}

    def replacement(name: str) -> Tensor | None:
        if name in places:
            return run.weights(places[name]).read(name)
        return checkpoint.read(name) if name in checkpoint.orders else None

    if run.model.exists() and run.model_fault(work.fingerprint):
        run.remove_model()  # it is damaged, or of a model or calibration text that has changed since
    if not run.model.exists():
        listener.say("writing the checkpoint")
        documents = {
            CARD: model_card(report),
            PRUNING_RECORD: json.dumps(_record(report, work.skeleton), indent=2) + "\n",
        }
        digests = write_checkpoint(checkpoint, run.model, replacement, identity=work.fingerprint, documents=documents)
        run.write_model_record(work.fingerprint, digests)
    elif run.model_record() is None:  # a kill came between the checkpoint and its record
        (run.model / PARTIAL).unlink(missing_ok=True)
        digests = {name: sha256_file(file.path) for name, file in Checkpoint.open(run.model).files.items()}
        run.write_model_record(work.fingerprint, digests)
    times.note()  # before the report calls the run finished: what a kill leaves half-written is then written anew
    if earlier is not None:
        report.evaluations, report.generations, report.speed = earlier.evaluations, earlier.generations, earlier.speed
        report.totals.compressed_bytes = earlier.totals.compressed_bytes
    report.status = "finished"
    report.finished = now()
    report.totals.seconds = times.total()
    if measuring := facts["decided"].get("sensitivity_seconds"):
        report.totals.time_split["sensitivity"] = measuring
    report.totals.time_split["write"] = time.perf_counter() - begin
    report.totals.checkpoint_bytes = sum(path.stat().st_size for path in run.model.iterdir() if path.is_file())
    disk = sum(path.stat().st_size for folder in (run.layers, run.model) for path in folder.iterdir() if path.is_file())
    report.plan = check_plan(report.plan, report.totals, layers, disk)
    write_report(run, report)
    return report


def write_report(run: RunDirectory, report: Report) -> None:
    """Write ``report.json``."""
    write_json_atomic(run.report_file, report.model_dump(mode="json"))


def write_failure(run: RunDirectory, error: BaseException, times: Times) -> None:
    """Write the report of a run that stops with an error: what is done so far, and why it ends there."""
    report = load_run(run.folder)
    report.status, report.error, report.finished = "failed", str(error) or type(error).__name__, now()
    report.totals.seconds = times.total()
    write_report(run, report)


def _totals(layers: list[LayerEntry], work: RunContext, seconds: float) -> Totals:
    checkpoint, tokens, device = work.skeleton.checkpoint, work.tokens, work.skeleton.device
    split: dict[str, float] = {}
    for layer in layers:
        for phase, value in layer.seconds.items():
            split[phase] = split.get(phase, 0.0) + value
    operators = [operator for layer in layers for operator in layer.operators]
    zeros = sum(operator.zeros for operator in operators)
    # Every layer timed one unwatched pass of its first batch: together, one plain forward pass of these windows.
    plain = [layer.seconds["plain"] for layer in layers if "plain" in layer.seconds]
    windows, seqlen = min(work.numerics["batch_size"], tokens.shape[0]), tokens.shape[1]
    return Totals(
        operator_weights=sum(math.prod(operator.shape) for operator in operators),
        operator_zeros=zeros,
        model_weights=sum(math.prod(checkpoint.entry(name).shape) for name in checkpoint.names()),
        model_zeros=zeros,
        seconds=seconds,
        time_split=split,
        peak_memory=peak_memory(),
        capture_tokens_per_second=tokens.numel() / split["capture"] if split.get("capture") else None,
        forward_tokens_per_second=windows * seqlen / sum(plain) if len(plain) == len(layers) and sum(plain) > 0 else None,
        peak_device_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _record(report: Report, skeleton: LayerwiseModel) -> dict[str, Any]:
    """What the checkpoint says of itself (``fistapruner.json``): the claims that ``inspect`` checks, by stored tensor."""
    operators = {}
    for layer in report.layers:
        for operator in layer.operators:
            name = f"{layer.name}.{operator.name}"
            claim = {"operator": name, "sparsity": operator.sparsity, "zeros": operator.zeros, "shape": list(operator.shape)}
            operators[skeleton.source(f"{name}.weight")] = claim
    return {
        "version": VERSION,
        "fingerprint": report.fingerprint,
        "recipe": report.recipe,
        "model": report.model.source,
        "versions": report.versions,
        "operators": operators,
    }
