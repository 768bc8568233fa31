"""Plan a run that trains: one bound on its memory, one measured step for its time.

The bound adds the model in the precision of the passes, the masters with gradients, moments and best values, the
activations of the windows that pass at once, and a slice of logits. Activations are those of the largest decoder layer,
which runs once forwards and back on real weights, with its bytes counted and its time taken. Where memory does not hold
the activations of all layers, layers run twice (checkpointing); where it does not hold those of all windows, fewer pass
at once.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..planning.budget import DEVICE, DEVICE_RESERVE, DISK, MEMORY, RESERVE
from ..planning.footprint import kept_bytes
from ..runs.records import PlanRow
from ..runtime.files import existing_folder
from ..runtime.formatting import counted, duration, size
from ..runtime.memory import free_device_memory, free_memory, release_memory, resident_memory
from ..runtime.numerics import BUDGETS, ordered_attention, windows_at_once
from ..settings.training_settings import TrainingRecipe
from .loop import CHECKS
from .loss import TokenLoss
from .masked import TrainedLayer, form_of, vectors

TRAINING, STEP = "training", "one step"

GROWTH = 128 * 2**20
"""Memory of the process that comes after the plan: code loaded on first use, the text, fragments."""

MASTER_BYTES = 4 + 4 + 8 + 4
"""Bytes of a trained number: fp32 value, gradient, both moments of AdamW, the best value."""


@dataclass(frozen=True)
class Task:
    """A run that trains, as its plan sees it.

    Args:
        model: the pruned model; ``layout``: its operators to train.
        dense: the dense model, whose predictions are needed; None where the loss does not need them.
        recipe: all settings, resolved.
        seqlen: tokens in a window.
        steps: optimizer steps; ``step_windows``: windows of one.
        stored: windows whose predictions by the dense model are stored, at most; ``held_out``: windows held out.
        together: windows that no pass may part.
        out: the run directory; its disk must have the space.
    """

    model: LayerwiseModel
    layout: Layout
    dense: LayerwiseModel | None
    recipe: TrainingRecipe
    seqlen: int
    steps: int
    step_windows: int
    stored: int
    held_out: int
    together: int = 1
    out: Path = Path()


@dataclass(frozen=True)
class Plan:
    """What a run that trains will need.

    Args:
        parameters: the form.
        batch_size: windows in one pass; ``checkpointing``: layers run twice.
        memory: bytes at the peak, by part; ``kind``: of memory; ``limit``: bytes that the run may use.
        disk: bytes of the run directory; ``free``: of its disk.
        step_seconds: of one step; ``seconds``: of all steps and checks.
        steps: of training.
    """

    parameters: str
    batch_size: int
    checkpointing: bool
    memory: dict[str, int]
    kind: str
    limit: int
    disk: int
    free: int
    step_seconds: float
    seconds: float
    steps: int

    @property
    def refusal(self) -> str | None:
        """Say why the run cannot work; None where it can."""
        if (needed := sum(self.memory.values())) > self.limit:
            most = max(self.memory, key=lambda name: self.memory[name])
            return (
                f"training {self.parameters} needs {size(needed)} of {self.kind}, {size(self.memory[most])} of it for "
                f"{most}, and {size(self.limit)} may be used: take --parameters lora, or shorter windows"
            )
        if self.disk > self.free:
            return f"the run needs {size(self.disk)} of disk, and {size(self.free)} are free: take another --out"
        return None

    @property
    def rows(self) -> list[PlanRow]:
        """The predictions, for the report."""
        quantity = DEVICE if self.kind == "GPU memory" else MEMORY
        return [
            PlanRow(quantity=quantity, unit="bytes", planned=sum(self.memory.values())),
            PlanRow(quantity=DISK, unit="bytes", planned=self.disk),
            PlanRow(quantity=STEP, unit="seconds", planned=self.step_seconds),
            PlanRow(quantity=TRAINING, unit="seconds", planned=self.seconds),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        rows = [row.model_dump(mode="json", exclude={"actual"}) for row in self.rows]
        how = {"batch_size": self.batch_size, "checkpointing": self.checkpointing}
        return {"parameters": self.parameters, "refusal": self.refusal, **how, "rows": rows, "memory": self.memory}

    def __str__(self) -> str:
        again = "decoder layers run twice, " if self.checkpointing else ""
        return (
            f"plan: {self.parameters}, {size(sum(self.memory.values()))} of {self.kind} at its peak, {size(self.disk)} "
            f"of disk, {again}{counted(self.batch_size, 'window')} at once, about {duration(self.seconds)} "
            f"({counted(self.steps, 'step')} of {duration(self.step_seconds)})"
        )


def plan_training(task: Task) -> Plan:
    """Plan a run that trains; the plan says where it does not fit."""
    model, execution, device = task.model, task.recipe.execution, task.model.device
    cuda = device.type == "cuda"
    base = 0 if cuda else resident_memory() + GROWTH
    if cuda:
        limit = max(1, free_device_memory(device) - DEVICE_RESERVE)
    else:
        limit = execution.memory_limit or int((free_memory() + resident_memory()) * RESERVE)
    layer = _measure_layer(task)
    inside = set().union(*map(model.layer_sources, range(len(model))))
    ends = set(model.sources()) - inside
    weights = model.pass_bytes(inside | ends)
    zeroth = task.recipe.zeroth_order
    window = task.seqlen * model.width * model.dtype.itemsize
    most = execution.batch_size or min(task.step_windows, windows_at_once(task.seqlen, device))
    sizes = [max(task.together, most // task.together * task.together)]
    while sizes[-1] > task.together and not execution.batch_size:
        sizes.append(max(task.together, sizes[-1] // 2 // task.together * task.together))

    def memory(batch: int, again: bool) -> dict[str, int]:
        graphs = batch * (layer.graph + len(model) * window if again else len(model) * layer.graph)
        return {
            "this process": base,
            "the model": weights + (model.pass_bytes(ends) if task.dense is not None else 0),
            "masters and optimizer": model.pass_bytes(ends) + layer.weights if zeroth else layer.numbers * MASTER_BYTES,
            "activations": batch * 4 * layer.graph if zeroth else graphs,
            "logits": min(4 * BUDGETS.head, 16 * batch * task.seqlen * model.vocabulary) + 4 * batch * window,
        }

    choices = [(size, again) for again in (False, True) for size in (sizes if again else sizes[:1])]
    batch, again = next(
        ((size, again) for size, again in choices if sum(memory(size, again).values()) <= limit), choices[-1]
    )
    place, trained = existing_folder(task.out), weights if zeroth else 16 * layer.numbers
    step = task.step_windows * (layer.seconds * len(model) * (4 / 3 if again else 1) + layer.head_seconds)
    checks = (1 + min(CHECKS, task.steps)) * task.held_out * (layer.seconds * len(model) + layer.head_seconds) / 3
    if zeroth:
        step = 2 / 3 * step
    return Plan(
        parameters="all weights" if zeroth else str(task.recipe.parameters),
        batch_size=batch,
        checkpointing=again and not zeroth,
        memory=memory(batch, again),
        kind="GPU memory" if cuda else "memory",
        limit=limit,
        disk=2 * trained + model.checkpoint.nbytes + task.stored * window,
        free=shutil.disk_usage(place).free,
        step_seconds=step,
        seconds=task.steps * step + checks,
        steps=task.steps,
    )


@dataclass(frozen=True)
class _Layer:
    """What one window through the largest decoder layer needs.

    Args:
        numbers: trained numbers of all layers; ``weights``: bytes of the largest layer.
        graph: bytes kept for the way back; ``seconds``: there and back; ``head_seconds``: through the head.
    """

    numbers: int
    weights: int
    graph: int
    seconds: float
    head_seconds: float


def _measure_layer(task: Task) -> _Layer:
    model, recipe = task.model, task.recipe
    model.check()
    index = max(range(len(model)), key=task.layout.weights)
    form, numbers = form_of(recipe), 0
    for number, layer in enumerate(model.layers):
        numbers += sum(math.prod(layer.get_parameter(name).shape) for name in vectors(layer, recipe.also))
        for operator in task.layout.in_layer(number) if form else ():
            empty = torch.empty(operator.rows, operator.columns, device="meta")
            started = form.start(empty, torch.Generator()) if form else {}
            numbers += sum(each.numel() for each in started.values())
    with model.embeddings_and_head():
        hidden, calls = model.embed(torch.arange(task.seqlen).remainder(model.embedded_tokens)[None])
        head = _timed(model.device, lambda: _through_head(model, hidden[0]))
    with model.layer(index) as layer:
        operators = task.layout.in_layer(index) if form else ()
        pruned = {f"{operator.name}.weight": (form, operator.transposed) for operator in operators if form}
        trained = TrainedLayer(layer, pruned, sorted(vectors(layer, recipe.also)), lambda name: torch.Generator())
        run = partial(trained, hidden, *calls[index])
        with ordered_attention(model.device):
            graph, seconds = kept_bytes(run), _timed(model.device, lambda: run().sum().backward())
    release_memory()
    return _Layer(numbers, model.pass_bytes(model.layer_sources(index)), graph, seconds, head)


def _through_head(model: LayerwiseModel, hidden: Tensor) -> None:
    """Pass one window through the head and back, in slices."""
    rows = max(1, min(BUDGETS.head // 2 // (4 * model.vocabulary), model.max_head_rows))
    targets = torch.zeros(rows, dtype=torch.int64, device=model.device)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows].detach().requires_grad_()
        logits = model.head(part, gradients=True)
        _, above = TokenLoss(0.0).tokens(logits, targets[: len(part)], None, 1.0)
        torch.autograd.grad(logits, part, above)


def _timed(device: torch.device, work: Callable[[], None]) -> float:
    """Return the seconds that ``work`` takes on a device, the second time."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - begin
