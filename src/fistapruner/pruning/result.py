"""What pruning and training share at the end of a run: the written checkpoint, the closed report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.checkpoint import PRUNING_RECORD, Checkpoint
from ..models.layers import LayerwiseModel
from ..models.low_rank import write_adapter
from ..models.operators import Layout
from ..models.record import LOW_RANK
from ..models.safetensors import LazyTensors
from ..models.write import write_checkpoint
from ..runs.directory import CARD, RunDirectory
from ..runs.log import Listener, Times
from ..runs.records import VERSION, Report, Totals, load_run
from ..runtime.files import disk_errors
from ..runtime.machine import now


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


def refuse_foreign_files(run: RunDirectory, fingerprint: str) -> None:
    """Refuse others' files in a checkpoint that must be made again, before the work for it.

    Arguments as for :func:`write_model`.

    Raises:
        FistaPrunerError: names the first of them.
    """
    if run.model.exists() and run.model_fault(fingerprint):
        run.check_model()


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
    if run.model.exists():
        if run.model_fault(fingerprint) is None:
            if run.model_record() is None:  # a kill came between the two
                run.write_model_record(fingerprint)
            return
        run.remove_model()  # it is damaged, or its writing was interrupted
    with disk_errors(run.model_file):
        run.model_file.unlink(missing_ok=True)  # until the new checkpoint is whole
    listener.say("writing the checkpoint")
    write_checkpoint(
        checkpoint,
        run.model,
        replacement,
        shapes=shapes,
        dropped=dropped,
        config_changes=config_changes,
        documents=documents(),
    )
    run.write_model_record(fingerprint)


def write_low_rank(
    run: RunDirectory, factors: LazyTensors, rank: int, layout: Layout, totals: Totals
) -> dict[str, Any]:
    """Write the low-rank part of a run and count it; return what the checkpoint's record says of it.

    Args:
        run: the run directory.
        factors: by name in the model; ``rank``: of every part.
        layout: operators of the run.
        totals: receives rank, weights and bytes.
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


def checkpoint_record(report: Report, claims: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Describe a checkpoint (``fistapruner.json``): the run that has made it, and what ``inspect`` checks.

    Args:
        report: of the run.
        claims: about the zeros of every operator, by the name of its stored weight.
        **more: stands between these and the lineage.
    """
    return {
        "version": VERSION,
        "fingerprint": report.fingerprint,
        "recipe": report.recipe,
        "model": report.model.source,
        "versions": report.versions,
        "operators": claims,
        **more,
        "lineage": report.lineage.model_dump(mode="json") if report.lineage else None,
    }


def model_documents(card: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the text files beside a model's weights: its card, and its record unless that is empty."""
    return {CARD: card} | ({PRUNING_RECORD: json.dumps(record, indent=2) + "\n"} if record else {})


def stored_weights(model: LayerwiseModel, layout: Layout) -> list[str]:
    """List the stored weights of all operators."""
    return [model.source(f"{name}.weight") for name, _ in layout.operators()]


def check_zeros(folder: Path, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Compare the zeros of stored weights in the written files with those of the input.

    Args:
        folder: of the written checkpoint.
        checkpoint: the input; ``names``: its weights that were changed.

    Raises:
        FistaPrunerError: names the weight.
    """
    written = Checkpoint.open(folder)
    for stack in checkpoint.stacks.values():
        written.take_apart(stack)
    for name in names:
        if not torch.equal(checkpoint.read(name) == 0, written.read(name) == 0):
            raise FistaPrunerError(f"{folder}: {name} does not have the zeros of the input (a fault in fistapruner)")


def close_report(run: RunDirectory, report: Report, earlier: Report | None, times: Times, begin: float) -> None:
    """Close the report of a run whose checkpoint is written, with its times and its bytes.

    Args:
        run: the run directory.
        report: of the run.
        earlier: report of the finished run whose checkpoint was written again: its measurements stay.
        times: wall time of the run so far.
        begin: when the writing of the checkpoint began, by ``time.perf_counter``.
    """
    times.note()  # before the report calls the run finished: what a kill leaves half-written is then written again
    if earlier is not None:
        report.evaluations, report.generations, report.speed = earlier.evaluations, earlier.generations, earlier.speed
        report.totals.compressed_bytes = earlier.totals.compressed_bytes
        if report.recovery is not None and earlier.recovery is not None:
            report.recovery.before = earlier.recovery.before
    report.status = "finished"
    report.finished = now()
    report.totals.seconds = times.total()
    report.totals.time_split["write"] = time.perf_counter() - begin
    report.totals.checkpoint_bytes = Checkpoint.open(run.model).file_bytes
