"""Run parts of a training step once on the real model, and count their bytes and seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..calibration.self_generated import generation_bytes
from ..models.layerwise import Call, LayerwiseModel
from ..models.whole import whole_bytes
from ..recipes.align_settings import AlignRecipe
from ..runtime.memory import resident_memory
from ..runtime.numerics import BUDGETS, ordered_attention
from ..tuning.forms import form_of
from ..tuning.losses import Reference, TopTokens
from ..tuning.teacher import Predictions, stored_dtype
from ..tuning.trained import Trained, vectors
from ..tuning.zeroth_order import ZerothOrder
from .budget import room_for
from .footprint import kept_bytes, peak_bytes
from .sizes import RETAINED
from .training_sizes import FormSizes, ModelSizes
from .training_task import Task

GROWTH = 64 * 2**20
"""Memory of the process that comes after the plan: code loaded on first use, fragments (measured: 50 MiB)."""

Result = TypeVar("Result")


def _timed(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    """Run ``work`` on a device; return its result and the seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - begin


def largest_layer(task: Task) -> int:
    """Return the decoder layer with the most weights to train."""
    return max(range(len(task.model)), key=task.layout.weights)


@contextmanager
def _loaded(task: Task) -> Iterator[tuple[Tensor, Call]]:
    """Load the largest layer for the block; give hidden states of one window, and how it is called."""
    model, index = task.model, largest_layer(task)
    with model.embeddings_and_head(head=False):
        hidden, calls = model.embed(torch.arange(task.seqlen).remainder(model.vocabulary)[None])
    with model.layer(index):
        yield hidden, calls[index]


def measure_model(task: Task) -> ModelSizes:
    """Measure what no trained tensor changes: one window through one layer, one slice of logits."""
    model, dense, index = task.model, task.dense, largest_layer(task)
    both = [each for each in (model, dense) if each is not None]
    itemsize = model.dtype.itemsize

    def layer_bytes(each: LayerwiseModel) -> int:
        return sum(math.prod(each.checkpoint.entry(name).shape) for name in each.layer_sources(index)) * itemsize

    names = [model.layer_sources(at) for at in range(len(model))]
    uncut = 0 if isinstance(task.recipe, AlignRecipe) else task.text_bytes
    base = resident_memory() + RETAINED + GROWTH + uncut
    with room_for(model.device, "one window"), model.embeddings_and_head(head=False):
        hidden, calls = model.embed(torch.arange(task.seqlen).remainder(model.vocabulary)[None])
    begin = time.perf_counter()
    with model.layer(index), torch.no_grad():
        load_seconds = time.perf_counter() - begin
        forward = peak_bytes(lambda: model.run(index, hidden, calls[index]))
        _, forward_seconds = _timed(model.device, lambda: model.run(index, hidden, calls[index]))
        inside = 0 if task.recipe.zeroth_order else peak_bytes(lambda: _through(task, hidden, calls[index], {}))
        graph = 0 if task.recipe.zeroth_order else kept_bytes(lambda: _out(task, hidden, calls[index]))
    ends, head, head_seconds = _measure_head(task)
    text_weights = 0 if task.generator is None else whole_bytes(task.generator.checkpoint, task.generator.dtype)
    text_windows = task.windows + task.held_out
    entries = [entry for each in both for entry in each.checkpoint.stored]
    return ModelSizes(
        base=base,
        ends=ends,
        largest=max(entry.nbytes + math.prod(entry.shape) * itemsize for entry in entries),
        largest_operator=max((4 * op.rows * op.columns for _, op in task.layout.operators()), default=0),
        checkpoint=model.checkpoint.nbytes + model.checkpoint.companion_bytes,
        layer=max(map(layer_bytes, both)),
        ahead=max(each.ahead_bytes for each in both),
        weights=sum(map(model.pass_bytes, names)),
        layers=len(model),
        calls=_unique_bytes(tree_leaves(calls)),
        window=task.seqlen * model.width * itemsize,
        forward=forward,
        inside=inside,
        graph=graph,
        head=head,
        stored=stored_bytes(task),
        text=text_weights and text_weights + generation_bytes(task.generator, text_windows, task.seqlen),
        text_weights=text_weights,
        uncut=uncut,
        load_seconds=load_seconds,
        forward_seconds=forward_seconds,
        head_seconds=head_seconds,
        cuda=model.device.type == "cuda",
    )


def stored_bytes(task: Task) -> int:
    """Count the bytes that are stored of the dense model's predictions of one window."""
    if task.dense is None:
        return 0
    if task.top is not None:
        return task.seqlen * (6 * min(task.top, task.dense.vocabulary) + 4)
    return task.seqlen * task.dense.width * stored_dtype(task.dense).itemsize


def _unique_bytes(values: Sequence[object]) -> int:
    """Sum the bytes of the storages of tensors."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor) and not value.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _measure_head(task: Task) -> tuple[int, int, float]:
    """Return the bytes of the models' ends, the peak of a slice of logits, the seconds of a window."""
    model, dense, recipe = task.model, task.dense, task.recipe
    gradients = not recipe.zeroth_order
    slice_rows = max(1, BUDGETS.head // 2 // (4 * model.vocabulary))
    rows = min(slice_rows, model.max_head_rows, task.batch_size * task.seqlen)
    generator = torch.Generator().manual_seed(0)

    def rows_of(each: LayerwiseModel) -> Tensor:
        return torch.randn(rows, each.width, generator=generator).to(each.device, each.dtype)

    with ExitStack() as loaded:
        loaded.enter_context(model.resident(layers=False))
        if dense is not None:
            loaded.enter_context(dense.resident(layers=False, like=model))
        outside = [tensor for each in (model, dense) if each is not None for tensor in each.model.parameters()]
        ends = _unique_bytes(outside)
        part = rows_of(model).requires_grad_(gradients)
        targets = torch.zeros(rows, dtype=torch.int64, device=model.device)
        predicted = None if dense is None else rows_of(dense)

        def reduce() -> None:
            reference: Reference | None = None
            if dense is not None and predicted is not None:
                reference = Predictions(dense, {"hidden": predicted}).rows(0, rows)
                if task.top is not None:
                    reference = TopTokens.of(dense.head(predicted), task.top)
            logits = model.head(part, gradients=gradients)
            _, above = task.loss.tokens(logits, targets, reference, 1.0 if gradients else None)
            if gradients:
                torch.autograd.grad(logits, part, above)

        head, seconds = _timed(model.device, lambda: peak_bytes(reduce))
    return ends, head, seconds * task.seqlen / rows


def _out(task: Task, hidden: Tensor, call: Call) -> Tensor:
    """Run one window through the largest layer, so that its output can be differentiated."""
    with torch.enable_grad(), ordered_attention(task.model.device):
        weights = {name: each.detach().requires_grad_() for name, each in _weights(task).items()}
        return task.model.run(largest_layer(task), hidden.detach().requires_grad_(), call, weights)


def _weights(task: Task) -> dict[str, Tensor]:
    """Return the weights of the largest layer's operators to train, by name inside the layer."""
    index = largest_layer(task)
    names = [f"{operator.name}.weight" for operator in task.layout.in_layer(index)]
    return {name: task.model.layers[index].get_parameter(name) for name in names}


def _through(task: Task, hidden: Tensor, call: Call, values: Mapping[str, Tensor]) -> None:
    """Run one window through the largest layer and back, with gradients of some of its parameters."""
    index = largest_layer(task)
    used = {name: value.detach().requires_grad_() for name, value in values.items()}
    entering = hidden.detach().clone().requires_grad_()
    with torch.enable_grad(), ordered_attention(task.model.device):
        out = task.model.run(index, entering, call, used)
        torch.autograd.grad(out, [entering, *used.values()], torch.ones_like(out), allow_unused=True)


def measure_form(task: Task) -> FormSizes:
    """Measure a form: one layer's effective weights, a pass back through it, its optimizer step."""
    model, recipe, index = task.model, task.recipe, largest_layer(task)
    form = form_of(recipe)
    trained = Trained(model, task.layout, recipe, low_rank=task.low_rank)
    counts = [
        sum(
            form.numbers(operator.rows, operator.columns, task.survivors.get(name, operator.rows * operator.columns))
            for operator in task.layout.in_layer(at)
            if (name := task.layout.full_name(at, operator))
        )
        if form is not None
        else 0
        for at in range(len(model))
    ]
    for at, layer in enumerate(model.layers):
        chosen = vectors(layer, recipe.also)
        counts[at] += sum(tensor.numel() for name, tensor in layer.named_parameters() if name in chosen)
    frames = 0
    if recipe.optimizer == "subzero":
        frames = sum(4 * recipe.subspace * (op.rows + op.columns) for _, op in task.layout.operators())
    with room_for(model.device, "one window"), _loaded(task) as (hidden, call):
        layer = model.layers[index]
        moves = ZerothOrder(trained) if recipe.zeroth_order else None

        def update() -> None:
            if moves is None:
                trained.step(index, layer, of_trained, 1.0)
            else:
                moves.update(index, layer, 1, 1.0, 1.0)

        values = trained.values(index, layer)
        effective = _unique_bytes(list(values.values()))
        of_weights = {name: torch.zeros_like(value) for name, value in values.items()}
        of_trained = {} if moves else trained.chain(index, layer, of_weights)
        update()  # makes the state
        chain, chain_seconds = 0, 0.0
        if moves is None:
            making = peak_bytes(lambda: trained.values(index, layer))
            _, values_seconds = _timed(model.device, lambda: trained.values(index, layer))
            backward = peak_bytes(lambda: _through(task, hidden, call, values))
            _, backward_seconds = _timed(model.device, lambda: _through(task, hidden, call, values))
            chain = effective + peak_bytes(lambda: trained.chain(index, layer, of_weights))
            _, chain_seconds = _timed(model.device, lambda: trained.chain(index, layer, of_weights))
        else:
            making = peak_bytes(lambda: [None for _ in moves.variants(1)(index, layer)])
            _, values_seconds = _timed(model.device, lambda: [None for _ in moves.variants(1)(index, layer)])
            backward, backward_seconds = 0, 0.0
        stepping = peak_bytes(update)
        _, update_seconds = _timed(model.device, update)
    return FormSizes(
        trained=4 * sum(counts),
        trained_layer=4 * max(counts),
        frames=frames,
        values=making,
        effective=effective,
        chain=chain,
        backward=backward,
        update=stepping,
        values_seconds=values_seconds,
        backward_seconds=backward_seconds,
        chain_seconds=chain_seconds,
        update_seconds=update_seconds,
    )
