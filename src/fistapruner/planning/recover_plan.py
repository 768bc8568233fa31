"""Plan a recovery run before it begins: predict memory, disk and time, and choose settings that fit.

Memory is counted from the model's sizes and from parts of a step that are run once on the real model, with their bytes
counted (:mod:`fistapruner.planning.footprint`): one window through one decoder layer and back, that layer's effective
weights and its optimizer step, one slice of logits. The same parts are timed. What a run may change to fit changes no
bit of the result, except the windows in one pass: decoder layers read when they are needed, trained tensors in files,
hidden states in files. Where the disk is small, the dense model's predictions go in rounds.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..calibration import SELF
from ..calibration.training_text import MAX_HELD_OUT_WINDOWS
from ..errors import FistaPrunerError
from ..models.discovery import Layout
from ..models.layerwise import Call, LayerwiseModel
from ..models.whole import whole_bytes
from ..recipes.recover_settings import PARAMETERS, RecoverRecipe
from ..runs.records import PlanRow
from ..runs.snapshots import KEPT
from ..runtime.formatting import duration, size
from ..runtime.memory import resident_memory
from ..runtime.numerics import BUDGETS, ordered_attention, windows_at_once
from ..tuning.forms import form_of
from ..tuning.losses import Loss, Reference, TopTokens
from ..tuning.teacher import BLOCK_TOKENS, TOP, Predictions
from ..tuning.trained import Trained, vectors
from ..tuning.zeroth_order import ZerothOrder
from .footprint import kept_bytes, peak_bytes
from .plan import DEVICE, DEVICE_RESERVE, DISK, MEMORY, Budget, Resources, existing_folder, room_for
from .sizes import RETAINED, UNCOUNTED

TRAINING, STEP = "training", "one step"
"""Quantities of time in the report: all steps, checks and predictions of the dense model; a step without a check."""

DISK_RATE = 500e6
"""Assumed bytes a second of files that are written, or read again: nothing is written to measure it."""

GROWTH = 64 * 2**20
"""Memory of the process that comes after the plan: code loaded on first use, the text, fragments (measured: 50 MiB)."""

DISK_SHARE = 0.95
"""Share of the free disk that a plan may use."""


@dataclass(frozen=True)
class RecoverChoice:
    """Settings that a plan may change to make a recovery run fit.

    Args:
        batch_size: windows in one pass.
        resident: the decoder layers stay in memory; else each is read when it is needed.
        states_on_disk: trained tensors and optimizer state in files instead of memory.
        hidden_on_disk: hidden states in files instead of memory.
        teacher_windows: windows whose predictions by the dense model the disk holds at once; None is all.
        keep_graphs: no decoder layer runs twice for a gradient: the activations of all of them stay in memory.
    """

    batch_size: int
    resident: bool = True
    states_on_disk: bool = False
    hidden_on_disk: bool = False
    teacher_windows: int | None = None
    keep_graphs: bool = False

    def words(self) -> list[str]:
        """List what differs from a run that keeps layers, trained tensors and hidden states in memory."""
        return [
            *(["no layer runs twice"] if self.keep_graphs else []),
            *([] if self.resident else ["one decoder layer in memory at a time"]),
            *(["trained tensors in files"] if self.states_on_disk else []),
            *(["hidden states in files"] if self.hidden_on_disk else []),
            *([] if self.teacher_windows is None else ["the dense model's predictions in rounds"]),
        ]


@dataclass(frozen=True)
class Task:
    """What is to be planned.

    Args:
        model: the pruned model; ``layout``: its operators to train.
        dense: the dense model; None where the loss does not need it.
        recipe: all settings, resolved.
        survivors: weights of each operator that are not zero, by full name; an operator that is missing has all.
        seqlen: tokens in a window.
        out: the run directory; its disk must have the free space.
    """

    model: LayerwiseModel
    layout: Layout
    dense: LayerwiseModel | None
    recipe: RecoverRecipe
    survivors: Mapping[str, int]
    seqlen: int
    out: Path

    @property
    def windows(self) -> int:
        """Windows to train on, at most."""
        return max(1, math.ceil(self.recipe.data.tokens / self.seqlen))

    @property
    def held_out(self) -> int:
        """Held-out windows, at most: whole documents are held out, so a small share may fill many windows."""
        return max(MAX_HELD_OUT_WINDOWS, len(self.recipe.data.tasks))

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        recipe = self.recipe
        return recipe.steps or max(1, round(recipe.data.tokens / (recipe.windows_per_step * self.seqlen)))

    @property
    def batch_size(self) -> int:
        """Windows in one pass, if they fit."""
        asked = self.recipe.execution.batch_size or windows_at_once(self.seqlen, self.model.device)
        return min(self.recipe.windows_per_step, asked)


@dataclass(frozen=True)
class ModelSizes:
    """Bytes and seconds of what does not depend on the trained tensors; see :meth:`measure`."""

    base: int
    """Main memory of the process before the run."""

    ends: int
    """Embeddings, final norms and heads of both models; what they share counts once."""

    largest: int
    """Largest tensor of the checkpoints, as stored and in the passes' precision."""

    largest_operator: int
    """Largest operator's weight in fp32."""

    checkpoint: int
    layer: int
    """Weights of the largest decoder layer, of either model, in the passes' precision."""

    weights: int
    """Weights of all decoder layers of the model."""

    layers: int
    calls: int
    """Arguments of the decoder layers beside hidden states, for one window."""

    window: int
    """Hidden states of one window, in the passes' precision."""

    forward: int
    """Peak of a forward pass of one window through a layer."""

    inside: int
    """Peak of a forward and backward pass of one window, without gradients of weights."""

    graph: int
    """Activations of one window in one layer that are kept for the way back."""

    head: int
    """Peak of the loss of one slice of logits, with its gradient where steps need it."""

    stored: int
    """What is stored of the dense model's predictions of one window; 0 without it."""

    text: int
    """The dense model as a whole, where it generates the training text; else 0."""

    load_seconds: float
    forward_seconds: float
    """Of one window through one layer."""

    head_seconds: float
    """Of one window, with the gradient."""

    cuda: bool


@dataclass(frozen=True)
class FormSizes:
    """Bytes and seconds of the trained tensors; see :meth:`measure`."""

    trained: int
    """Trained numbers of all layers, in fp32."""

    trained_layer: int
    frames: int
    """Subspaces of subzero; else 0."""

    values: int
    """Peak of computing a layer's effective weights, with the result."""

    effective: int
    """Effective weights of a layer, in the passes' precision."""

    chain: int
    """Peak of turning the gradients of a layer's weights into those of its trained tensors, with them."""

    backward: int
    """Peak of a forward and backward pass of one window through a layer, with gradients of its weights."""

    update: int
    """Peak of one optimizer step of a layer, beside its state."""

    values_seconds: float
    backward_seconds: float
    chain_seconds: float
    update_seconds: float


@dataclass(frozen=True)
class RecoverSizes:
    """Predict memory, disk and time of a recovery run from measured parts."""

    task: Task
    model: ModelSizes
    form: FormSizes

    @property
    def copies(self) -> int:
        """Copies of the trained numbers at the peak: values, two moments, best values."""
        recipe = self.task.recipe
        best = min(self.task.steps, recipe.validation_checks) > 1
        return (1 if recipe.zeroth_order else 3) + best

    @property
    def state(self) -> int:
        """Bytes of trained tensors and optimizer state."""
        return self.copies * self.form.trained

    def _stores(self) -> dict[str, int]:
        """Count windows of hidden states that are kept in each stage."""
        step, held_out = self.task.recipe.windows_per_step, self.task.held_out
        if self.task.recipe.zeroth_order:
            return {"held out": 2 * held_out, "forwards": 3 * step, "head": 2 * step}
        layers = self.model.layers
        return {
            "held out": 2 * held_out,
            "forwards": (layers + 1) * step,
            "head": (layers + 2) * step,
            "backwards": (layers + 1) * step,
        }

    def stages(self, choice: RecoverChoice) -> dict[str, int]:
        """Compute the peak bytes of every stage, by the stage's name in messages.

        The bytes are of main memory on a CPU, or of the GPU.
        """
        model, form, batch = self.model, self.form, choice.batch_size
        base = 0 if model.cuda else model.base
        hidden = {
            name: 0 if choice.hidden_on_disk else windows * model.window for name, windows in self._stores().items()
        }
        state = 0 if choice.states_on_disk else self.state
        at_hand = 3 * form.trained_layer if choice.states_on_disk else 0  # of the layer at work, read from its files
        loaded = base + model.ends + state + form.frames + (2 * batch + 1) * model.calls
        layer = loaded + (model.weights if choice.resident else model.layer)
        loaded += model.weights if choice.resident else 0
        passing = model.forward * batch + 2 * batch * model.window
        changing = at_hand + max(form.values, form.effective + passing)
        found = {
            "the embeddings": base + model.ends + model.largest,
            "the held-out loss": layer + hidden["held out"] + changing,
        }
        if model.stored:
            together = 1 if choice.teacher_windows is not None else batch
            block = 0 if model.cuda else self._block(choice) * model.window  # in main memory
            found["the dense model's predictions"] = (
                loaded + model.layer + block + together * (model.forward + 2 * model.window)
            )
        rows = 5 * batch * model.window  # hidden states, their rows with loss, gradient, and the dense model's
        if self.task.recipe.zeroth_order:
            found["the passes of a step"] = layer + hidden["forwards"] + changing + 3 * form.trained_layer
            found["the head"] = loaded + max(hidden["head"], hidden["held out"]) + rows + model.head
            found["the step of a layer"] = layer + at_hand + form.update
        elif choice.keep_graphs:
            kept = model.layers * (batch * model.graph + form.effective) + form.trained
            inside = max(rows + model.head, form.backward + (batch - 1) * model.inside, form.chain + form.trained_layer)
            found["the step, with the graphs of all layers"] = layer + kept + max(inside, form.values, form.update)
        else:
            found["the forward pass of a step"] = layer + hidden["forwards"] + changing
            found["the head"] = loaded + max(hidden["head"], hidden["held out"]) + rows + model.head
            inside = max(form.backward + (batch - 1) * model.inside, form.chain + form.trained_layer, form.update)
            found["the gradient of a layer"] = (
                layer
                + hidden["backwards"]
                + at_hand
                + form.effective
                + form.trained_layer  # sum over the passes
                + 3 * batch * model.window
                + inside
            )
        found["writing a snapshot"] = loaded + at_hand
        found["writing the checkpoint"] = (
            base
            + state
            + model.layer
            + at_hand
            + form.values
            + form.effective
            + max(model.largest, 5 * model.largest_operator)
        )
        return {name: round(each + UNCOUNTED * (each - base)) for name, each in found.items()}

    def host_stages(self, choice: RecoverChoice) -> dict[str, int]:
        """Compute the peak bytes of main memory of every stage of a run on a GPU."""
        model, form = self.model, self.form
        moving = 2 * choice.batch_size * model.window
        found = {
            "the embeddings": model.largest,
            "a step": moving + 2 * model.largest_operator,
            "writing a snapshot": form.trained_layer,
            "writing the checkpoint": form.effective + max(model.largest, 5 * model.largest_operator),
        }
        if model.stored:
            found["the dense model's predictions"] = self._block(choice) * model.window + moving + model.largest
        return {name: round(model.base + (1 + UNCOUNTED) * each) for name, each in found.items()}

    def peak(self, choice: RecoverChoice) -> int:
        """Compute the peak bytes of the run where its layers are, with the drawing of its text."""
        return max(*self.stages(choice).values(), (0 if self.model.cuda else self.model.base) + self.model.text)

    def _block(self, choice: RecoverChoice) -> int:
        """Count the windows of a block of the dense model's predictions."""
        task = self.task
        most = self.used_windows() if choice.teacher_windows is None else choice.teacher_windows
        return min(max(1, BLOCK_TOKENS // (task.seqlen * choice.batch_size)) * choice.batch_size, most)

    def used_windows(self) -> int:
        """Windows that pass through the dense model, at most."""
        task = self.task
        return min(task.windows, task.steps * task.recipe.windows_per_step) + task.held_out

    def disk(self, choice: RecoverChoice) -> dict[str, int]:
        """Compute the peak bytes of the run directory's parts, by name in messages."""
        task, model = self.task, self.model
        windows = self.used_windows() if choice.teacher_windows is None else choice.teacher_windows
        tokens = (task.windows + task.held_out) * task.seqlen
        return {
            "the dense model's predictions": windows * model.stored,
            "snapshots": (KEPT + 1) * self.state,
            "trained tensors": (self.state + self.form.trained_layer) * choice.states_on_disk,
            "hidden states": max(self._stores().values()) * model.window * choice.hidden_on_disk,
            "the checkpoint": model.checkpoint,
            "the training text": 9 * tokens,
        }

    def step_seconds(self, choice: RecoverChoice) -> float:
        """Estimate the seconds of one step, without a check."""
        task, model, form = self.task, self.model, self.form
        windows = task.recipe.windows_per_step
        traffic = 0.0
        if task.recipe.zeroth_order:
            seconds = model.layers * (form.values_seconds + 2 * windows * model.forward_seconds + form.update_seconds)
            seconds += windows * model.head_seconds
        else:
            walks = 1 if choice.keep_graphs else 2
            passing = windows * ((walks - 1) * model.forward_seconds + form.backward_seconds)
            passing += math.ceil(windows / choice.batch_size) * form.chain_seconds
            seconds = model.layers * (walks * form.values_seconds + passing + form.update_seconds)
            seconds += windows * model.head_seconds
        if not choice.resident:
            seconds += 2 * model.layers * model.load_seconds
        if choice.states_on_disk:
            chains = math.ceil(windows / choice.batch_size) * (not task.recipe.zeroth_order)
            traffic += (8 + chains) * form.trained  # values are read on both ways, with the moments, and written
        if choice.hidden_on_disk:
            traffic += 2 * self._stores()["forwards"] * model.window
        return seconds + traffic / DISK_RATE

    def seconds(self, choice: RecoverChoice) -> float:
        """Estimate the seconds of all steps, checks, snapshots and predictions of the dense model."""
        task, model, form = self.task, self.model, self.form
        checks = 1 + min(task.steps, task.recipe.validation_checks)
        check = model.layers * (form.values_seconds + task.held_out * model.forward_seconds)
        check += task.held_out * model.head_seconds / 2
        check += 0 if choice.resident else model.layers * model.load_seconds
        dense = 0.0
        if model.stored:
            windows = self.used_windows()
            if choice.teacher_windows is not None:
                windows = task.steps * task.recipe.windows_per_step + task.held_out
            blocks = math.ceil(windows / self._block(choice))
            dense = model.layers * (windows * model.forward_seconds + blocks * model.load_seconds)
        writing = (1 + (checks - 1) * 2) * self.state / DISK_RATE  # written and hashed; the first one is empty
        return task.steps * self.step_seconds(choice) + checks * check + dense + writing


@dataclass(frozen=True)
class FormPlan:
    """The plan of one form.

    Args:
        parameters: the form.
        choice: settings that fit, or the smallest ones.
        fits: whether they do; ``refusal``: why not, one line.
        changed: sentence on what was changed to fit; None where nothing was.
        needs: the sizes that it is made from.
    """

    parameters: str
    choice: RecoverChoice
    fits: bool
    refusal: str | None
    changed: str | None
    needs: RecoverSizes

    @property
    def rows(self) -> list[PlanRow]:
        """The predictions, for the report."""
        needs, choice = self.needs, self.choice
        rows = []
        if needs.model.cuda:
            peak = max(needs.host_stages(choice).values())
            rows.append(PlanRow(quantity=DEVICE, unit="bytes", planned=needs.peak(choice)))
            rows.append(PlanRow(quantity=MEMORY, unit="bytes", planned=peak))
        else:
            rows.append(PlanRow(quantity=MEMORY, unit="bytes", planned=needs.peak(choice)))
        rows.append(PlanRow(quantity=DISK, unit="bytes", planned=sum(needs.disk(choice).values())))
        rows.append(PlanRow(quantity=STEP, unit="seconds", planned=needs.step_seconds(choice)))
        rows.append(PlanRow(quantity=TRAINING, unit="seconds", planned=needs.seconds(choice)))
        return rows

    @property
    def stages(self) -> dict[str, int]:
        """Peak bytes of each stage; on a GPU those of main memory have it in their names."""
        found = self.needs.stages(self.choice)
        if self.needs.model.cuda:
            found |= {f"{name} (main memory)": each for name, each in self.needs.host_stages(self.choice).items()}
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "parameters": self.parameters,
            "fits": self.fits,
            "refusal": self.refusal,
            "choice": asdict(self.choice),
            "rows": [row.model_dump(mode="json", exclude={"actual"}) for row in self.rows],
            "stages": self.stages,
            "disk": self.needs.disk(self.choice),
        }

    @property
    def says(self) -> list[str]:
        """Say what was changed to fit; then memory, disk and time."""
        needs, choice = self.needs, self.choice
        stages = needs.stages(choice)
        worst = max(stages, key=lambda name: stages[name])
        kind = "GPU memory" if needs.model.cuda else "memory"
        host = f", {size(max(needs.host_stages(choice).values()))} of main memory" if needs.model.cuda else ""
        return [
            *([] if self.changed is None else [self.changed]),
            f"plan: {self.parameters}, {size(stages[worst])} of {kind} at its peak ({worst}){host}, "
            f"{size(sum(needs.disk(choice).values()))} of disk, about {duration(needs.seconds(choice))} "
            f"({needs.task.steps} steps of {duration(needs.step_seconds(choice))})",
        ]


def plan_recovery(task: Task, measured: ModelSizes | None = None) -> FormPlan:
    """Plan a recovery run.

    Args:
        task: what is to be planned.
        measured: sizes of the model; None measures them.

    Raises:
        FistaPrunerError: no choice fits the memory (main or the GPU's) or the disk; names the stage and the bytes, and
            what would fit.
    """
    measured = measured or measure_model(task)
    resources = Resources.of_this_machine(task.recipe, task.model.device, 1)
    found = fit(RecoverSizes(task, measured, measure_form(task)), resources)
    if found.fits:
        return found
    others = [form for form in plan_forms(task, measured, [name for name in PARAMETERS if name != found.parameters])]
    fitting = [f"--parameters {other.parameters}" for other in others if other.fits]
    raise FistaPrunerError(f"{found.refusal}; {' and '.join(fitting)} would fit" if fitting else str(found.refusal))


def plan_forms(task: Task, measured: ModelSizes | None = None, names: Sequence[str] = PARAMETERS) -> list[FormPlan]:
    """Plan a run with each form; those that do not fit say why."""
    measured = measured or measure_model(task)
    resources = Resources.of_this_machine(task.recipe, task.model.device, 1)
    found = []
    for name in names:
        other = replace(task, recipe=task.recipe.model_copy(update={"parameters": name}))
        if name == "norms" and not task.recipe.also:
            continue
        found.append(fit(RecoverSizes(other, measured, measure_form(other)), resources))
    return found


def fit(needs: RecoverSizes, resources: Resources, free: int | None = None) -> FormPlan:
    """Choose settings of a run that fit into memory and onto the disk.

    If memory holds the graphs of all layers, no layer runs twice. Else decoder layers stay in memory if they can; then
    trained tensors, if they can; then as many windows pass at once as fit; then hidden states stay in memory, if they
    can.

    Args:
        needs: sizes of the parts.
        resources: memory that the run may use.
        free: free bytes of the disk; None measures them.
    """
    task = needs.task
    parameters = str(task.recipe.parameters)
    sizes = [task.batch_size]
    while sizes[-1] > 1 and not task.recipe.execution.batch_size:
        sizes.append(sizes[-1] // 2)
    choices = [] if task.recipe.zeroth_order else [RecoverChoice(sizes[0], keep_graphs=True)]
    choices += [
        RecoverChoice(count, resident, in_files, hidden)
        for resident, in_files in ((True, False), (False, False), (False, True))
        for count in sizes
        for hidden in (False, True)
    ]
    budgets = _budgets(needs, resources)
    chosen = next((choice for choice in choices if all(budget.holds(choice) for budget in budgets)), None)
    if chosen is None:
        least = min(choices, key=lambda choice: max(budget.peak(choice) / budget.limit for budget in budgets))
        over = next(budget for budget in budgets if not budget.holds(least))
        return FormPlan(parameters, least, False, str(over.refusal(least)), None, needs)
    place = existing_folder(task.out)
    free = shutil.disk_usage(place).free if free is None else free
    room = round(free * DISK_SHARE)
    parts = needs.disk(chosen)
    if sum(parts.values()) > room and needs.model.stored:
        others = sum(parts.values()) - parts["the dense model's predictions"]
        windows = (room - others) // needs.model.stored
        if windows >= task.held_out + task.recipe.windows_per_step:
            chosen = replace(chosen, teacher_windows=windows)
    parts = needs.disk(chosen)
    if sum(parts.values()) > room:
        worst = max(parts, key=lambda name: parts[name])
        refusal = (
            f"{task.out} needs {size(sum(parts.values()))} of disk, {size(parts[worst])} for {worst}, and {place} has "
            f"{size(free)} free"
        )
        return FormPlan(parameters, chosen, False, refusal, None, needs)
    first = RecoverChoice(task.batch_size)
    given = [budget.given for budget in budgets if not budget.holds(first) and not chosen.keep_graphs]
    given += [] if chosen.teacher_windows is None else [f"the {size(free)} that are free in {place}"]
    words = chosen.words()
    if chosen.batch_size != task.batch_size:
        words.append(f"{chosen.batch_size} windows at a time instead of {task.batch_size}")
    changed = f"to fit {' and '.join(given)}: {', '.join(words)}" if given else None
    return FormPlan(parameters, chosen, True, None, changed, needs)


def _budgets(needs: RecoverSizes, resources: Resources) -> list[Budget[RecoverChoice]]:
    """Make the budget of the GPU, if there is one, and of main memory."""
    limited = needs.task.recipe.execution.memory_limit
    limit, device = resources.limit, resources.device
    given = f"--memory-limit {size(limit)}" if limited else f"the {size(limit)} that are free"
    lighter = f"or shorten --seqlen, for --parameters {needs.task.recipe.parameters}"
    even = "one decoder layer at a time, trained tensors and hidden states in files and one window at a time"
    if not needs.model.cuda:
        return [Budget(given, limit, 1, needs.stages, even=even, lighter=lighter)]
    free = max(1, resources.free[device] - DEVICE_RESERVE)
    return [
        Budget(
            f"the {size(free)} that are free on {device}",
            free,
            1,
            needs.stages,
            kind="GPU memory",
            even=even,
            more="free some of it",
            lighter=lighter,
        ),
        Budget(f"{given} of main memory", limit, 1, needs.host_stages, even="hidden states in files", lighter=lighter),
    ]


Result = TypeVar("Result")


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Run ``work``; return its result and the seconds."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    found = work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
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
    layers = [sorted({each.source(name) for name in each.layer_parameters(at)}) for each in both for at in (index,)]
    itemsize = model.dtype.itemsize

    def nbytes(each: LayerwiseModel, names: Sequence[str]) -> int:
        return sum(math.prod(each.checkpoint.entry(name).shape) for name in names) * itemsize

    names = [{model.source(name) for name in model.layer_parameters(at)} for at in range(len(model))]
    base = resident_memory() + RETAINED + GROWTH
    with room_for(model.device, "one window"), model.embeddings_and_head(head=False):
        hidden, calls = model.embed(torch.arange(task.seqlen).remainder(model.vocabulary)[None])
    begin = time.perf_counter()
    with model.layer(index), torch.no_grad():
        load_seconds = time.perf_counter() - begin
        forward = peak_bytes(lambda: model.run(index, hidden, calls[index]))
        _, forward_seconds = _timed(lambda: model.run(index, hidden, calls[index]))
        inside = 0 if task.recipe.zeroth_order else peak_bytes(lambda: _through(task, hidden, calls[index], {}))
        graph = 0 if task.recipe.zeroth_order else kept_bytes(lambda: _out(task, hidden, calls[index]))
    ends, head, head_seconds = _measure_head(task)
    entries = [each.checkpoint.entry(name) for each in both for name in each.checkpoint.names()]
    return ModelSizes(
        base=base,
        ends=ends,
        largest=max(entry.nbytes + math.prod(entry.shape) * itemsize for entry in entries),
        largest_operator=max((4 * op.rows * op.columns for _, op in task.layout.operators()), default=0),
        checkpoint=model.checkpoint.nbytes,
        layer=max(nbytes(each, layer) for each, layer in zip(both, layers, strict=True)),
        weights=sum(nbytes(model, sorted(each)) for each in names),
        layers=len(model),
        calls=_unique_bytes(tree_leaves(calls)),
        window=task.seqlen * model.width * itemsize,
        forward=forward,
        inside=inside,
        graph=graph,
        head=head,
        stored=_stored(task),
        text=whole_bytes(dense.checkpoint, dense.device) if dense is not None and _generates(task) else 0,
        load_seconds=load_seconds,
        forward_seconds=forward_seconds,
        head_seconds=head_seconds,
        cuda=model.device.type == "cuda",
    )


def _generates(task: Task) -> bool:
    data = task.recipe.data
    return SELF in (data.tasks.values() or (data.source,))


def _stored(task: Task) -> int:
    """Count the bytes that are stored of the dense model's predictions of one window."""
    if task.dense is None:
        return 0
    if task.recipe.teacher == "top128":
        return task.seqlen * (6 * min(TOP, task.dense.vocabulary) + 4)
    return task.seqlen * task.dense.width * task.dense.checkpoint.dtype.itemsize


def _unique_bytes(values: Sequence[object]) -> int:
    """Sum the bytes of the storages of tensors."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor) and not value.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _measure_head(task: Task) -> tuple[int, int, float]:
    """Return the bytes of the models' ends, the peak of a slice of logits, the seconds of a window."""
    model, dense, recipe = task.model, task.dense, task.recipe
    loss = Loss.named(str(recipe.loss), recipe.mix)
    gradients = not recipe.zeroth_order
    slice_rows = max(1, BUDGETS.head // 2 // (4 * model.vocabulary))
    rows = min(slice_rows, model.max_length, task.batch_size * task.seqlen)
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
                if recipe.teacher == "top128":
                    reference = TopTokens.of(dense.head(predicted), TOP)
            logits = model.head(part, gradients=gradients)
            _, above = loss.tokens(logits, targets, reference, 1.0 if gradients else None)
            if gradients:
                torch.autograd.grad(logits, part, above)

        head, seconds = _timed(lambda: peak_bytes(reduce))
    return ends, head, seconds * task.seqlen / rows


def _out(task: Task, hidden: Tensor, call: Call) -> Tensor:
    """Run one window through the largest layer, so that its output can be differentiated."""
    with torch.enable_grad(), ordered_attention(task.model.device):
        weights = {name: each.detach().requires_grad_() for name, each in _weights(task).items()}
        return task.model.run(largest_layer(task), hidden.detach().requires_grad_(), call, weights)


def _weights(task: Task) -> dict[str, Tensor]:
    """Return the weights of the largest layer's operators to train, by name inside the layer."""
    index = largest_layer(task)
    names = [f"{operator.name}.weight" for group in task.layout.layers[index] for operator in group]
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
    trained = Trained(model, task.layout, recipe)
    counts = [
        sum(
            form.numbers(operator.rows, operator.columns, task.survivors.get(name, operator.rows * operator.columns))
            for group in task.layout.layers[at]
            for operator in group
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
            _, values_seconds = _timed(lambda: trained.values(index, layer))
            backward = peak_bytes(lambda: _through(task, hidden, call, values))
            _, backward_seconds = _timed(lambda: _through(task, hidden, call, values))
            chain = effective + peak_bytes(lambda: trained.chain(index, layer, of_weights))
            _, chain_seconds = _timed(lambda: trained.chain(index, layer, of_weights))
        else:
            making = peak_bytes(lambda: [None for _ in moves.variants(1)(index, layer)])
            _, values_seconds = _timed(lambda: [None for _ in moves.variants(1)(index, layer)])
            backward, backward_seconds = 0, 0.0
        stepping = peak_bytes(update)
        _, update_seconds = _timed(update)
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
