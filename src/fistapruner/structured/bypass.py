"""Learn which heads and channels stay, by a policy gradient of forward passes (Bypass-BP).

Gao et al. 2025, ACL, arXiv 2406.10576, after their program. Every unit u (a key/value group, an MLP channel) has a
probability s_u to stay. A step draws masks from these probabilities, computes the loss of the dense model with what the
masks drop set to zero, and moves s against an estimate of the gradient of the expected loss (:func:`policy_gradient`).
Then s is projected onto the budget (:func:`project`). In the end the units with the largest s stay. No weight changes.

Differs from the program in:

1. The text is the run's calibration windows, cut into sequences of 128 tokens; the program draws from C4.
2. It takes 15,000 steps, which is 30 million tokens. Here their number is a setting, and the learning rate grows as it
   falls, unless it is given.
3. The first s come from the windows that sensitivity is measured on, 8 at most; the program takes 128.
4. The projection is bisected to rounding; the program stops at 1e-3 or after 20 halvings.
5. With equal widths every layer has a budget of its own; the program has one for all layers (``widths: free``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..activations.store import HiddenStates, Store
from ..activations.stream import Calls, Watched, embed, forward_variants, run_layer
from ..errors import FistaPrunerError
from ..models.files.safetensors import SafetensorsFile, write_tensors
from ..models.layerwise import LayerwiseModel
from ..recipes.structure_settings import Structure
from ..runtime.formatting import duration
from ..runtime.numerics import seeded
from ..runtime.progress import Tick, silent
from .units import Unit, Units

SEQUENCES, LENGTH, MASKS = 8, 128, 2
"""Sequences of a step, their tokens, and masks that are drawn in it."""

RATE, STEPS = 2e-3, 15_000
"""The paper's learning rate for LLaMA-2-7B, and its number of steps."""

MAX_RATE = 0.05
"""Largest learning rate that fewer steps are given."""

MEMORY = 0.2
"""Weight of a step's mean loss in the baseline: a window of five steps."""

EVERY = 20
"""Steps between two saved states."""

SMALL = 1e-7
"""Keeps the preconditioner finite at probabilities of 0 and 1."""


def project(keep: Tensor, budget: float) -> Tensor:
    """Project probabilities onto those in [0, 1] whose sum is at most ``budget``.

    Args:
        keep: (units,) fp64.
        budget: units that may stay.

    Returns:
        (units,) ``clip(keep - v, 0, 1)`` with the smallest v >= 0 that meets the budget.
    """
    clipped = keep.clamp(0, 1)
    if float(clipped.sum()) <= budget:
        return clipped
    low, high = 0.0, float(keep.max())
    for _ in range(64):
        middle = (low + high) / 2
        if float((keep - middle).clamp(0, 1).sum()) > budget:
            low = middle
        else:
            high = middle
    return (keep - high).clamp(0, 1)


def policy_gradient(
    keep: Tensor, masks: Sequence[Tensor], losses: Sequence[float], baseline: float | None = None
) -> Tensor:
    """Estimate the gradient of the expected loss, preconditioned by ``sqrt(s (1 - s))``.

    ``sum_k (l_k - b) (m_k - s) / sqrt(s (1 - s)) / (K - 1)``: the divisor is the root of the variance, so with a fixed
    b the mean is ``K / (K - 1) sqrt(s (1 - s))`` times the gradient.

    Args:
        keep: (units,) probabilities s.
        masks: (units,) zeros and ones m_k; ``losses``: l_k of each of them.
        baseline: b; None compares each loss with the mean of the others (leave-one-out), which needs no memory, and
            divides by K.

    Returns:
        (units,) fp64.
    """
    root = ((keep + SMALL) * (1 - keep + SMALL)).sqrt()
    count, total = len(masks), sum(losses)
    found = torch.zeros_like(keep)
    for mask, loss in zip(masks, losses, strict=True):
        against = (total - loss) / (count - 1) if baseline is None else baseline
        found += (loss - against) * (mask - keep) / root
    return found / (count if baseline is None else count - 1)


@dataclass(frozen=True)
class UnitBudget:
    """Units that share a budget.

    Args:
        members: places of them among all units.
        kept: how many may stay.
    """

    members: slice
    kept: int


class MaskLearner:
    """Probabilities to stay, and the steps that change them.

    Args:
        keep: (units,) first probabilities.
        budgets: of all units, in order.
        steps: steps in all; ``lr``: the first learning rate, which falls to zero as a cosine.
        moving: the baseline is a moving mean of the losses, as published; else each mask is compared with the others.
        seed: of the masks.
    """

    def __init__(
        self, keep: Tensor, budgets: Sequence[UnitBudget], steps: int, lr: float, *, moving: bool = True, seed: int = 0
    ) -> None:
        self.keep = keep.double()
        self.step = 0
        self.seconds = 0.0
        self.baseline = math.nan
        self._budgets, self._steps, self._lr, self._moving, self._seed = budgets, steps, lr, moving, seed

    @property
    def done(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self._steps

    def masks(self) -> list[Tensor]:
        """Draw the masks of the next step: (units,) fp64 zeros and ones."""
        generator = seeded(self._seed, "bypass masks", self.step)
        uniform = torch.rand(MASKS, len(self.keep), generator=generator, dtype=torch.float64)
        return list((uniform < self.keep).double())

    def update(self, masks: Sequence[Tensor], losses: Sequence[float]) -> None:
        """Take a step; losses that are not finite are left out."""
        kept = [(mask, loss) for mask, loss in zip(masks, losses, strict=True) if math.isfinite(loss)]
        rate = self._lr / 2 * (1 + math.cos(math.pi * self.step / self._steps))
        self.step += 1
        if len(kept) < 2:
            return
        masks, losses = [mask for mask, _ in kept], [loss for _, loss in kept]
        mean = sum(losses) / len(losses)
        self.baseline = mean if math.isnan(self.baseline) else (1 - MEMORY) * self.baseline + MEMORY * mean
        moved = self.keep - rate * policy_gradient(self.keep, masks, losses, self.baseline if self._moving else None)
        self.keep = torch.cat([project(moved[budget.members], budget.kept) for budget in self._budgets])

    def save(self, file: Path, identity: str, plan: str) -> None:
        """Write the state after the last step; ``identity``: of the run; ``plan``: kept with the state."""
        state = {"keep": self.keep, "baseline": torch.tensor([self.baseline], dtype=torch.float64)}
        write_tensors(
            file, state, {"identity": identity, "step": str(self.step), "seconds": str(self.seconds), "plan": plan}
        )

    def load(self, file: Path, identity: str) -> bool:
        """Read a state of the same run; returns whether there is one."""
        try:
            state = SafetensorsFile(file)
            if state.metadata.get("identity") != identity:
                return False
            step, seconds = int(state.metadata["step"]), float(state.metadata.get("seconds", 0))
            self.keep, self.baseline = state.read("keep"), float(state.read("baseline"))
            self.step, self.seconds = step, seconds
        except (FistaPrunerError, OSError, KeyError, ValueError):
            return False
        return True


@dataclass(frozen=True)
class Slot:
    """Units of one operator: ``places`` are theirs among all units."""

    index: int
    unit: Unit
    places: slice


def slots_of(units: Units) -> list[Slot]:
    """Number the units of a model: those of a kind one after the other, layer by layer."""
    found, start = [], 0
    for kind in dict.fromkeys(unit.kind for layer in units for unit in layer):
        for index, layer in enumerate(units):
            for unit in layer:
                if unit.kind == kind:
                    found.append(Slot(index, unit, slice(start, start + unit.before)))
                    start += unit.before
    return found


def budgets_of(slots: Sequence[Slot], *, together: bool) -> list[UnitBudget]:
    """Return a budget for every operator, or with ``together`` one for all units of a kind."""
    if not together:
        return [UnitBudget(slot.places, slot.unit.after) for slot in slots]
    found = []
    for kind in dict.fromkeys(slot.unit.kind for slot in slots):
        own = [slot for slot in slots if slot.unit.kind == kind]
        members = slice(own[0].places.start, own[-1].places.stop)
        found.append(UnitBudget(members, sum(slot.unit.after for slot in own)))
    return found


def masked(layer: nn.Module, slots: Sequence[Slot], mask: Tensor) -> dict[str, Tensor]:
    """Return the weights of a loaded layer's consumers with what ``mask`` (units,) drops set to zero."""
    found = {}
    for slot in slots:
        name = f"{slot.unit.consumer.name}.weight"
        weight = layer.get_parameter(name).detach()
        columns = mask[slot.places].to(weight.device, weight.dtype).repeat_interleave(slot.unit.columns)
        found[name] = weight * (columns[:, None] if slot.unit.consumer.transposed else columns)
    return found


class BypassLearning:
    """Learn which units of a model stay.

    Args:
        model: the dense model.
        units: of every decoder layer.
        tokens: (samples, seqlen) calibration tokens.
        settings: the recipe's ``structure``.
        seed: of the run.
        store: makes the stores of hidden states.
        say: receives sentences; ``tick``: progress.
        batch_size: windows, or sequences of a step, in one pass; at most 4 windows.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        units: Units,
        tokens: Tensor,
        settings: Structure,
        seed: int,
        store: Store,
        say: Callable[[str], None] = lambda message: None,
        tick: Tick = silent,
        *,
        batch_size: int = SEQUENCES,
    ) -> None:
        self._model, self._settings, self._seed, self._store = model, settings, seed, store
        self._batch_size = batch_size
        self._slots = slots_of(units)
        self._by_layer = [[slot for slot in self._slots if slot.index == index] for index in range(len(model))]
        self._tokens, self._say, self._tick = tokens, say, tick
        length = min(LENGTH, tokens.shape[1])
        self._pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
        self._calls: Calls | None = None

    def run(self, file: Path, identity: str, windows: int, plan: str) -> dict[tuple[int, str], Tensor]:
        """Learn, from the state in ``file`` where there is one.

        Args:
            file: where the state is saved.
            identity: of the run.
            windows: calibration windows that the first probabilities come from.
            plan: of the run, as JSON, kept with the state: what a run that is stopped needs to go on to the same bits.

        Returns:
            By decoder layer and name of the consumer, the (units,) fp32 probabilities to stay.

        Raises:
            FistaPrunerError: the dense model's loss is NaN or infinite.
        """
        begin = time.perf_counter()
        settings = self._settings
        lr = min(RATE * STEPS / settings.steps, MAX_RATE) if settings.lr is None else settings.lr
        budgets = budgets_of(self._slots, together=settings.widths == "free")
        total = self._slots[-1].places.stop
        learner = MaskLearner(
            torch.zeros(total), budgets, settings.steps, lr, moving=settings.baseline == "moving", seed=self._seed
        )
        if learner.load(file, identity):
            self._say(f"bypass: {learner.step} of {settings.steps} steps were taken before")
        else:
            if file.exists():
                self._say(
                    f"bypass: {file} cannot be read, or is of other settings, text, model files, threads, windows at a "
                    "time, device or precision: learning begins again, and replaces it"
                )
            learner.keep = self.first(windows, budgets)
        before = learner.seconds
        if not learner.done:
            self._estimate(settings.steps - learner.step)
        while not learner.done:
            masks = learner.masks()
            learner.update(masks, self.losses(self._sequences(learner.step), masks))
            self._tick("steps of bypass", learner.step, settings.steps)
            if learner.done or learner.step % EVERY == 0:
                learner.seconds = before + time.perf_counter() - begin
                learner.save(file, identity, plan)
        return {(slot.index, slot.unit.consumer.name): learner.keep[slot.places].float() for slot in self._slots}

    def _estimate(self, steps: int) -> None:
        """Say how long the steps will take, after a pass that is timed."""
        begin = time.perf_counter()
        tokens = self._sequences(0)
        (dense,) = self.losses(tokens, [torch.ones(self._slots[-1].places.stop)])
        seconds = (time.perf_counter() - begin) * MASKS * steps
        if not math.isfinite(dense):
            raise FistaPrunerError("structure: the dense model's loss is NaN or infinite: take --dtype float32")
        self._say(
            f"bypass: {steps} steps of {MASKS} x {tokens.numel()} tokens take about {duration(seconds)} (one pass of "
            f"the dense model, loss {dense:.3f}, was timed)"
        )

    def _sequences(self, step: int) -> Tensor:
        """Return the (sequences, length) tokens of a step; every piece comes once before one comes again."""
        chosen = []
        for place in range(step * SEQUENCES, (step + 1) * SEQUENCES):
            epoch, number = divmod(place, len(self._pieces))
            order = torch.randperm(len(self._pieces), generator=seeded(self._seed, "bypass text", epoch))
            chosen.append(order[number])
        return self._pieces[torch.stack(chosen)]

    def losses(self, tokens: Tensor, masks: Sequence[Tensor]) -> list[float]:
        """Compute the mean loss of the model with each of some masks.

        Args:
            tokens: (windows, seqlen) token ids, of the same shape in every call.
            masks: (units,) zeros and ones.
        """

        def variants(index: int, layer: nn.Module) -> Iterator[Mapping[str, Tensor]]:
            return (masked(layer, self._by_layer[index], mask) for mask in masks)

        states, self._calls = forward_variants(
            self._model, tokens, min(len(tokens), self._batch_size), self._store, variants, calls=self._calls
        )
        found = []
        with self._model.embeddings_and_head():
            for state in states:
                found.append(_mean_loss(self._model, state, tokens))
                state.close()
        return found

    def first(self, windows: int, budgets: Sequence[UnitBudget]) -> Tensor:
        """Make the first probabilities from what a unit adds to the outputs, each layer fed by masked ones.

        ``s = clip(sigmoid(z) + keep - mean(sigmoid(z)), 0, 1)``, with z the mean over outputs of ``|W_ij| sqrt(H_jj)``
        (summed over the columns of a group), standardised within the layer, and ``keep`` the share to keep.

        Args:
            windows: calibration windows to run.
            budgets: of all units.
        """
        model, tokens = self._model, self._tokens[:windows]
        batch = min(4, len(tokens), self._batch_size)
        states = self._store("bypass", (*tokens.shape, model.width))
        calls = embed(model, tokens, batch, states)
        keep = torch.zeros(self._slots[-1].places.stop, dtype=torch.float64)
        shares = torch.zeros_like(keep)
        for budget in budgets:
            shares[budget.members] = budget.kept / len(shares[budget.members])
        for index, slots in enumerate(self._by_layer):
            with model.layer(index) as layer:
                energy = [torch.zeros(slot.unit.consumer.columns, dtype=torch.float64) for slot in slots]

                def add(number: int, _: int, inputs: Tensor, energy: list[Tensor] = energy) -> None:
                    energy[number] += inputs.reshape(-1, inputs.shape[-1]).double().square().sum(0).cpu()

                watched = Watched([(number, (slot.unit.consumer,)) for number, slot in enumerate(slots)], add)
                # To the layer's end: a pass without output stops at the last group, and these are not in order.
                run_layer(model, index, states, calls, output=lambda *_: None, watched=watched)
                mask = torch.ones(len(keep), dtype=torch.float64)
                for number, slot in enumerate(slots):
                    weight = slot.unit.consumer.weight(layer).detach().double().cpu()
                    metric = weight.abs().mean(0) * (energy[number] / tokens.numel()).sqrt()
                    metric = metric.view(-1, slot.unit.columns).sum(1)
                    share = float(shares[slot.places.start])
                    keep[slot.places] = first_probabilities(metric, share)
                    left = metric.argsort(descending=True, stable=True)[: max(1, round(share * len(metric)))]
                    mask[slot.places] = torch.zeros_like(metric).index_fill(0, left, 1.0)
                run_layer(model, index, states, calls, output=states, values=masked(layer, slots, mask))
            self._tick("decoder layers, first probabilities", index + 1, len(model))
        states.close()
        return torch.cat([project(keep[budget.members], budget.kept) for budget in budgets])


def first_probabilities(metric: Tensor, share: float) -> Tensor:
    """Turn a metric of a layer's units, (units,) fp64, into probabilities of mean ``share``, almost."""
    spread = metric.std() if len(metric) > 1 else torch.zeros(())
    odds = torch.sigmoid((metric - metric.mean()) / spread) if float(spread) else torch.full_like(metric, 0.5)
    return (odds + share - odds.mean()).clamp(0, 1)


def _mean_loss(model: LayerwiseModel, states: HiddenStates, tokens: Tensor) -> float:
    """Return the mean cross-entropy of the next tokens; needs the model's embeddings and head."""
    total = 0.0
    with torch.no_grad():
        for window in range(len(tokens)):
            ids = tokens[window : window + 1]
            logits = model.logits(states.read(window, window + 1, model.device), ids)[0, :-1].float()
            total += float(functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
    return total / (len(tokens) * (tokens.shape[1] - 1))
