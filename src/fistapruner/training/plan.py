"""Plan a run that trains: one bound on its memory, one measured step for its time.

    memory = this process + the model + 20 bytes a trained number + activations + a slice of logits

A trained number has an fp32 value, its gradient, two moments of AdamW and the best value. Activations are the measured
peak of one window's forward pass through the largest decoder layer, all of which may be kept for the way back, times
the layers and the windows that pass at once. Where memory does not hold them, decoder layers run twice (checkpointing),
then fewer windows pass at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.operators import Layout
from ..runtime.devices import free_device_memory, free_memory, peak_bytes, release_memory, resident_memory
from ..runtime.files import existing_folder
from ..runtime.numerics import BUDGETS, ordered_attention, windows_at_once
from ..runtime.show import counted, duration, size
from ..settings.train import TrainingRecipe
from .loop import CHECKS
from .loss import HeadLoss
from .masked import trained_layer

GROWTH, RESERVE = 256 * 2**20, 0.9  # memory that comes after the plan, and share of the free that a run may take

MASTER_BYTES = 4 + 4 + 8 + 4  # of a trained number


@dataclass
class Plan:
    """What a run that trains will need: bytes, windows in one pass, and seconds."""

    parameters: str
    batch_size: int
    checkpointing: bool  # decoder layers run twice
    memory: dict[str, int]  # the peak by part
    kind: str  # of memory, of which the run may use ``limit``
    limit: int
    disk: int  # of the run directory
    free: int
    steps: int
    step_seconds: float
    seconds: float  # of everything

    def check(self) -> None:
        """Refuse a run that does not fit."""
        if (needed := sum(self.memory.values())) > self.limit:
            most = max(self.memory, key=self.memory.__getitem__)
            raise FistaPrunerError(
                f"training {self.parameters} needs {size(needed)} of {self.kind}, {size(self.memory[most])} of it for "
                f"{most}, and {size(self.limit)} may be used: take --parameters lora, or shorter windows"
            )
        if self.disk > self.free:
            few = f"{size(self.free)} are free: take another --out"
            raise FistaPrunerError(f"the run needs {size(self.disk)} of disk, and {few}")

    def __str__(self) -> str:
        again = "decoder layers run twice, " if self.checkpointing else ""
        return (
            f"plan: {self.parameters}, {size(sum(self.memory.values()))} of {self.kind} at its peak, {size(self.disk)} "
            f"of disk, {again}{counted(self.batch_size, 'window')} at once, about {duration(self.seconds)} "
            f"({counted(self.steps, 'step')} of {duration(self.step_seconds)})"
        )


def plan_training(
    model: LayerwiseModel,
    layout: Layout,
    recipe: TrainingRecipe,
    out: Path,
    *,
    seqlen: int,
    steps: int,
    stored: int,
    held_out: int,
    together: int = 1,
) -> Plan:
    """Plan a run that trains on windows of ``seqlen`` tokens.

    ``stored`` windows have predictions of the dense model on disk; ``together`` windows are in one pass.
    """
    device, zeroth, layers = model.device, recipe.zeroth_order, len(model)
    cuda = device.type == "cuda"
    base = 0 if cuda else resident_memory() + GROWTH
    limit = None if cuda else recipe.execution.memory_limit
    limit = limit or int(RESERVE * (free_device_memory(device) if cuda else free_memory() + resident_memory()))
    numbers, graph, layer_seconds, head_seconds = _measure(model, layout, recipe, seqlen)
    inside = set().union(*map(model.layer_sources, range(layers)))
    weights, ends = model.pass_bytes(set(model.sources()) | inside), model.pass_bytes(set(model.sources()) - inside)
    window = seqlen * model.width * model.dtype.itemsize

    def memory(batch: int, again: bool) -> dict[str, int]:
        kept = graph if zeroth else graph + layers * window if again else layers * graph
        return {
            "this process": base,
            "the model": weights + (ends if stored else 0),
            "masters and optimizer": ends + (weights - ends) // layers if zeroth else numbers * MASTER_BYTES,
            "activations": batch * kept,
            "logits": min(4 * BUDGETS.head, 16 * batch * seqlen * model.vocabulary) + 4 * batch * window,
        }

    asked = recipe.execution.batch_size
    sizes = [max(together, (asked or min(recipe.step_windows, windows_at_once(seqlen, device))) // together * together)]
    while sizes[-1] > together and asked is None:
        sizes.append(max(together, sizes[-1] // 2 // together * together))
    choices = [(sizes[0], False), *((batch, not zeroth) for batch in sizes)]
    batch, again = next((each for each in choices if sum(memory(*each).values()) <= limit), choices[-1])
    forward = layer_seconds * layers + head_seconds
    passes = (2 / 3 if zeroth else 4 / 3 if again else 1) * layer_seconds * layers + head_seconds
    return Plan(
        parameters="all weights" if zeroth else str(recipe.parameters),
        batch_size=batch,
        checkpointing=again,
        memory=memory(batch, again),
        kind="GPU memory" if cuda else "memory",
        limit=limit,
        disk=2 * (weights if zeroth else 16 * numbers) + model.checkpoint.nbytes + stored * window,
        free=shutil.disk_usage(existing_folder(out)).free,
        steps=steps,
        step_seconds=recipe.step_windows * passes,
        seconds=steps * recipe.step_windows * passes + (1 + min(CHECKS, steps)) * held_out * forward / 3,
    )


def _measure(
    model: LayerwiseModel, layout: Layout, recipe: TrainingRecipe, seqlen: int
) -> tuple[int, int, float, float]:
    """Pass one window through the largest decoder layer and the head, there and back.

    Returns trained numbers of all layers, peak bytes of the layer's forward pass, seconds of the layer and of the head.
    """
    model.check()
    layers = [trained_layer(model, layout, index, recipe) for index in range(len(model))]  # without weights
    numbers = sum(each.numel() for layer in layers for each in layer.masters.values())
    index, targets = max(range(len(model)), key=layout.weights), torch.zeros(seqlen, dtype=torch.int64)

    def layer() -> Any:
        return trained(hidden, *calls[index])

    def head() -> Any:
        return HeadLoss.apply(rows, model, targets.to(model.device), 0.0, None, 1.0)

    def seconds(part: Callable[[], Any]) -> float:
        """Time a part there and back."""
        timer = Timer("part().sum().backward()", globals={"part": part}, num_threads=torch.get_num_threads())
        return float(timer.timeit(1).mean)

    with model.embeddings_and_head(), model.layer(index), ordered_attention(model.device):
        trained = trained_layer(model, layout, index, recipe)
        hidden, calls = model.embed(torch.arange(seqlen).remainder(model.embedded_tokens)[None])
        rows = hidden[0].detach().requires_grad_()
        found = numbers, peak_bytes(layer), seconds(layer), seconds(head)
    release_memory()
    return found
