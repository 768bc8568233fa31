"""Measure the dense model before a run: channels to keep, sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..allocate.fisher import DensePasses
from ..allocate.measure import Decision, decide, needs_measuring, permutes, windows_measured
from ..core import Constraint
from ..errors import FistaPrunerError
from ..models.files.checkpoint import Orders
from ..papers.bypass import SEQUENCES, Bypass
from ..passes.store import scratch_factory
from ..runs.decision import PlannedRun
from ..runs.identity import fingerprint
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.workload_records import WorkloadFacts
from ..runtime.devices import cpu_threads
from ..runtime.files import scratch_folder, sha256_file
from ..runtime.memory import release_failed_memory
from ..settings.settings import Recipe
from .prune_inputs import PruneInputs

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """What was measured on the dense model, and decided from it.

    Args:
        sparsity: pattern of every operator, by full name.
        permuted: operators whose input channels are reordered or rotated, as in
            :class:`~fistapruner.runs.records.Report`.
        workload: how sparsities were allocated for a workload; None where they were not.
        metrics_sha256: of the file with the measurements; None where there is none.
    """

    sparsity: Mapping[str, Constraint]
    permuted: Mapping[str, tuple[float, float]]
    workload: WorkloadFacts | None = None
    metrics_sha256: str | None = None


@dataclass(frozen=True)
class DenseMeasurements:
    """What is measured on the dense model before the first layer, on the calibration windows.

    Args:
        run: the run directory.
        recipe: all settings.
        tokens: (samples, seqlen) calibration tokens.
        plan: what was planned before.
        states: folder for hidden states; None keeps them in memory.
        listener: receives progress.
    """

    run: PruneDirectory
    recipe: Recipe
    tokens: Tensor
    plan: PlannedRun
    states: Path | None
    listener: Listener

    def _identity(self, inputs: PruneInputs) -> str:
        return fingerprint(self.recipe, inputs.model.checkpoint, self.tokens, self.plan.numerics)

    def learn_channels(self, inputs: PruneInputs) -> dict[str, Tensor]:
        """Learn which channels stay, where the recipe asks for it.

        Returns:
            By full name of the operator that reads them, the probabilities of its channels to stay.
        """
        if self.recipe.structure.method != "bypass" or inputs.widths is None:
            return {}
        units = inputs.widths.units
        notes = {"identity": self._identity(inputs), "plan": self.plan.model_dump_json()}

        def learn(batch_size: int) -> dict[tuple[int, str], Tensor]:
            store = scratch_factory(self.states, inputs.model.dtype)
            steps, seed = self.recipe.structure.steps, self.recipe.seed
            learning = Bypass(inputs.model, units, self.tokens, steps, seed, store, self.listener, batch_size)
            return learning.learn(self.run.bypass_file, windows_measured(len(self.tokens)), notes)

        advice = "take --structure-method obs, which learns nothing"
        found = self._fitting(inputs, "learn which channels stay", learn, SEQUENCES, advice)
        return {inputs.layout.full_name(index, name): scores for (index, name), scores in found.items()}

    def measure(self, inputs: PruneInputs, scores: Mapping[str, Tensor]) -> Measured:
        """Measure on the dense model what the recipe's allocation, weighting and channel order need.

        Args:
            inputs: with the final widths.
            scores: :meth:`learn_channels`.
        """
        if not needs_measuring(self.recipe):
            if not scores:
                return Measured(inputs.sparsity, {})
            return Measured(inputs.sparsity, {}, metrics_sha256=self._store([], {}, {}, scores))
        self.listener.say("measuring sensitivity on the dense model")

        def decide_all(batch_size: int) -> Decision:
            return decide(
                self.recipe,
                inputs.layout,
                inputs.model,
                self.tokens,
                inputs.sparsity,
                DensePasses(scratch_factory(self.states, inputs.model.dtype), batch_size, self.listener.tick),
                inputs.smaller,
            )

        advice = "take --allocation uniform and --weighting none, which need none"
        found = self._fitting(inputs, "measure sensitivity", decide_all, min(4, self.plan.numerics.batch_size), advice)
        digest = None
        if found.metrics or found.importance or found.orders or scores:
            digest = self._store(found.metrics or [], found.importance or {}, found.orders, scores)
        if permutes(self.recipe):
            self.listener.say(_say_permuted(found.permuted))
        return Measured(found.sparsity or inputs.sparsity, found.permuted, found.workload, digest)

    def _store(
        self,
        metrics: Sequence[Tensor],
        importance: Mapping[str, Tensor],
        orders: Orders,
        scores: Mapping[str, Tensor],
    ) -> str:
        """Store what was measured; returns the checksum of the file."""
        self.run.write_metrics(metrics, importance, orders, scores)
        return sha256_file(self.run.metrics_file)

    def _fitting(self, inputs: PruneInputs, what: str, work: Callable[[int], T], batch_size: int, advice: str) -> T:
        """Measure; where the GPU's memory runs out, measure again with one window at a time.

        Args:
            inputs: the checked input.
            what: names the work, in the message.
            work: receives the windows in one pass; may be done again from its beginning.
            batch_size: windows in one pass at first.
            advice: what the user can choose instead, in the message.

        Raises:
            FistaPrunerError: memory runs out with one window at a time.
        """
        device = inputs.model.device
        with cpu_threads(self.plan.numerics.threads), scratch_folder(self.states):
            for count in dict.fromkeys((batch_size, 1)):
                try:
                    return work(count)
                except torch.OutOfMemoryError:
                    self.listener.say(f"the memory of {device} ran out with {count} windows at a time")
                release_failed_memory()
        raise FistaPrunerError(
            f"the memory of {device} is not enough to {what}: free some of it, shorten --seqlen, or {advice}"
        )


def _say_permuted(permuted: Mapping[str, tuple[float, float]]) -> str:
    if not permuted:
        return "channels: no operator with an n:m pattern has input channels that can be reordered or rotated"
    before, after = (sum(shares[i] for shares in permuted.values()) / len(permuted) for i in (0, 1))
    return (
        f"channels of {len(permuted)} operators reordered or rotated: of their weights' importance the pattern now "
        f"loses {1 - after:.1%} instead of {1 - before:.1%}"
    )
