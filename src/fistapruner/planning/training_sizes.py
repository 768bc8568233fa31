"""Count the memory, disk and time of a run that trains from measured sizes of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..runs.snapshots import KEPT, snapshot_interval
from ..tuning.pair_objective import AT_ONCE
from ..tuning.teacher import BLOCK_TOKENS
from .sizes import GENERATING, UNCOUNTED
from .training_task import Task, TrainingChoice

TRAINING, STEP = "training", "one step"
"""Quantities of time in the report: all steps, checks and predictions of the dense model; a step without a check."""

CUTTING = "cutting the training text"
"""The stage of text that is read, as opposed to :data:`~.sizes.GENERATING`."""

DISK_RATE = 500e6
"""Assumed bytes a second of files that are written, or read again: nothing is written to measure it."""


@dataclass(frozen=True)
class ModelSizes:
    """Hold bytes and seconds of all but the trained tensors; see :func:`.training_probe.measure_model`."""

    base: int
    """Main memory of the process before the run, and of the training text."""

    ends: int
    """Embeddings, final norms and heads of both models; what they share counts once."""

    largest: int
    """Largest tensor of the checkpoints, as stored and in the passes' precision."""

    largest_operator: int
    """Largest operator's weight in fp32."""

    checkpoint: int
    layer: int
    """Weights of the largest decoder layer, of either model, in the passes' precision."""

    ahead: int
    """Main memory of a layer that is read ahead for a GPU; see :attr:`.LayerwiseModel.ahead_bytes`."""

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
    """The whole dense model and what generating text takes beside its weights; 0 where it generates none."""

    text_weights: int
    """Its weights alone, which go through main memory on their way to a GPU."""

    uncut: int
    """Training text that is cut after the plan, which takes twice its bytes; 0 of pairs, which are there before."""

    load_seconds: float
    forward_seconds: float
    """Of one window through one layer."""

    head_seconds: float
    """Of one window, with the gradient."""

    cuda: bool


@dataclass(frozen=True)
class FormSizes:
    """Hold bytes and seconds of the trained tensors; see :func:`.training_probe.measure_form`."""

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
class TrainingSizes:
    """Predict memory, disk and time of a run that trains from measured parts."""

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
        step = self.task.step_windows
        held_out = min(self.task.held_out, max(AT_ONCE, step))
        if self.task.recipe.zeroth_order:
            return {"held out": 2 * held_out, "forwards": 3 * step, "head": 2 * step}
        layers = self.model.layers
        return {
            "held out": 2 * held_out,
            "forwards": (layers + 1) * step,
            "head": (layers + 2) * step,
            "backwards": (layers + 1) * step,
        }

    def stages(self, choice: TrainingChoice) -> dict[str, int]:
        """Compute the peak bytes of every stage, by the stage's name in messages.

        The bytes are of main memory on a CPU, or of the GPU.
        """
        model, form, batch = self.model, self.form, choice.batch_size
        base = 0 if model.cuda else model.base
        hidden = {name: windows * model.window for name, windows in self._stores().items()}
        state = self.state + (0 if self.task.low_rank is None else self.task.low_rank.nbytes)
        loaded = base + model.ends + state + form.frames + (2 * batch + 1) * model.calls + model.weights
        passing = model.forward * batch + 2 * batch * model.window
        changing = max(form.values, form.effective + passing)
        found = {
            "the embeddings": base + model.ends + model.largest,
            "the held-out loss": loaded + hidden["held out"] + changing,
        }
        if not model.cuda:
            found[CUTTING] = base + model.uncut
        if model.text:
            found[GENERATING] = base + model.text
        if model.stored:
            together = 1 if choice.teacher_windows is not None else batch
            block = 0 if model.cuda else self._block(choice) * model.window  # in main memory
            found["the dense model's predictions"] = (
                loaded + model.layer + block + together * (model.forward + 2 * model.window)
            )
        rows = 5 * batch * model.window  # hidden states, their rows with loss, gradient, and the dense model's
        if self.task.recipe.zeroth_order:
            found["the passes of a step"] = loaded + hidden["forwards"] + changing + 3 * form.trained_layer
            found["the head"] = loaded + max(hidden["head"], hidden["held out"]) + rows + model.head
            found["the step of a layer"] = loaded + form.update
        elif choice.keep_graphs:
            kept = model.layers * (batch * model.graph + form.effective) + form.trained
            inside = max(rows + model.head, form.backward + (batch - 1) * model.inside, form.chain + form.trained_layer)
            found["the step, with the graphs of all layers"] = loaded + kept + max(inside, form.values, form.update)
        else:
            found["the forward pass of a step"] = loaded + hidden["forwards"] + changing
            found["the head"] = loaded + max(hidden["head"], hidden["held out"]) + rows + model.head
            inside = max(form.backward + (batch - 1) * model.inside, form.chain + form.trained_layer, form.update)
            found["the gradient of a layer"] = (
                loaded
                + hidden["backwards"]
                + form.effective
                + form.trained_layer  # sum over the passes
                + 3 * batch * model.window
                + inside
            )
        found["writing a snapshot"] = loaded
        found["writing the checkpoint"] = (
            base + state + model.layer + form.values + form.effective + max(model.largest, 5 * model.largest_operator)
        )
        return {name: round(each + UNCOUNTED * (each - base)) for name, each in found.items()}

    def host_stages(self, choice: TrainingChoice) -> dict[str, int]:
        """Compute the peak bytes of main memory of every stage of a run on a GPU."""
        model, form = self.model, self.form
        moving = 2 * choice.batch_size * model.window
        found = {
            CUTTING: model.uncut,
            "the embeddings": model.largest,
            "a step": moving + 2 * model.largest_operator,
            "writing a snapshot": form.trained_layer,
            "writing the checkpoint": form.effective + max(model.largest, 5 * model.largest_operator),
        }
        if model.text:
            found[GENERATING] = model.text_weights
        if model.stored:
            block = self._block(choice) * model.window
            found["the dense model's predictions"] = block + moving + model.ahead + model.largest
        return {name: round(model.base + (1 + UNCOUNTED) * each) for name, each in found.items()}

    def peak(self, choice: TrainingChoice) -> int:
        """Compute the peak bytes of the run where its layers are."""
        return max(self.stages(choice).values())

    def _block(self, choice: TrainingChoice) -> int:
        """Count the windows of a block of the dense model's predictions."""
        task = self.task
        most = self.used_windows() if choice.teacher_windows is None else choice.teacher_windows
        return min(max(1, BLOCK_TOKENS // (task.seqlen * choice.batch_size)) * choice.batch_size, most)

    def used_windows(self) -> int:
        """Windows that pass through the dense model, at most."""
        task = self.task
        return min(task.windows, task.steps * task.step_windows) + task.held_out

    def disk(self, choice: TrainingChoice) -> dict[str, int]:
        """Compute the peak bytes of the run directory's parts, by name in messages."""
        task, model = self.task, self.model
        windows = self.used_windows() if choice.teacher_windows is None else choice.teacher_windows
        return {
            "the dense model's predictions": windows * model.stored,
            "snapshots": (KEPT + 1) * self.state,
            "the checkpoint": model.checkpoint + (0 if task.low_rank is None else task.low_rank.nbytes),
            "the training text": task.text_bytes,
        }

    def step_seconds(self, choice: TrainingChoice) -> float:
        """Estimate the seconds of one step, without a check."""
        task, model, form = self.task, self.model, self.form
        passes, windows = math.ceil(task.step_windows / choice.batch_size), task.step_windows * task.fill
        if task.recipe.zeroth_order:
            seconds = model.layers * (form.values_seconds + 2 * windows * model.forward_seconds + form.update_seconds)
            seconds += windows * model.head_seconds
        else:
            walks = 1 if choice.keep_graphs else 2
            passing = windows * ((walks - 1) * model.forward_seconds + form.backward_seconds)
            passing += passes * form.chain_seconds
            seconds = model.layers * (walks * form.values_seconds + passing + form.update_seconds)
            seconds += windows * model.head_seconds
        return seconds

    def seconds(self, choice: TrainingChoice) -> float:
        """Estimate the seconds of all steps, checks, snapshots and predictions of the dense model."""
        task, model, form = self.task, self.model, self.form
        checks = 1 + min(task.steps, task.recipe.validation_checks)
        held_out, step = task.held_out, task.step_windows
        walks = math.ceil(held_out / max(AT_ONCE, step))
        check = model.layers * (walks * form.values_seconds + held_out * task.fill * model.forward_seconds)
        check += held_out * task.fill * model.head_seconds / 2
        dense = 0.0
        if model.stored:
            windows = self.used_windows()
            if choice.teacher_windows is not None:  # a round is one block
                windows = task.steps * task.step_windows + task.held_out
            blocks = math.ceil(windows / self._block(choice))
            dense = model.layers * (windows * model.forward_seconds + blocks * model.load_seconds)
        training, once = task.steps * self.step_seconds(choice), 2 * self.state / DISK_RATE  # written and hashed
        between = max(1, math.ceil(training / (checks - 1) / snapshot_interval(once)))  # of one check and the next
        writing = self.state / DISK_RATE + min(task.steps, (checks - 1) * between) * once  # the first one is empty
        return training + checks * check + dense + writing

    def seconds_in_all(self, choice: TrainingChoice) -> float:
        """Estimate the seconds of :meth:`seconds`, and of the log-probabilities of the pairs beside them."""
        task, model = self.task, self.model
        window = model.layers * model.forward_seconds + model.head_seconds / 2
        walks = sum(math.ceil(windows / max(task.held_out, task.step_windows)) for windows in task.answers)
        answers = sum(task.answers) * task.fill * window + walks * model.layers * model.load_seconds
        return self.seconds(choice) + answers
