"""What pruning works on: the opened run, the hidden states of a layer, and what is made of it.

The process that starts a run decides everything once (:func:`fistapruner.pruning.run.prune`) and records it. Then it,
its worker processes and the nodes of a cluster open the same :class:`RunContext`, and agree on every bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..core import Constraint
from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.low_rank import A, sum_of_parts
from ..models.operators import Group, Layout, discover
from ..models.source import ModelSource, Permissions
from ..passes.store import CPU, HiddenStates, Store, scratch_factory
from ..passes.stream import Calls, embed, run_layer
from ..runs.directory import PruneDirectory
from ..runs.records import LayerEntry
from ..runs.settled import Numerics, fingerprint
from ..runtime.devices import choose_device, release_failed_memory
from ..runtime.numerics import DTYPES
from ..runtime.show import counted
from ..settings.prune import Recipe
from ..settings.train import TrainingRecipe
from ..structure.experts import fewer_experts
from ..structure.smaller import Widths, resized

log = logging.getLogger("fistapruner")

T = TypeVar("T")


@dataclass
class LayerContext:
    """Settings and model of a run: the same for all its decoder layers.

    Args:
        layout: the operators to prune, in the shapes that they are to have.
        sparsity: pattern of every operator, by full name.
        widths: whose channels and experts are removed, and how many stay.
    """

    model: LayerwiseModel
    layout: Layout
    recipe: Recipe
    sparsity: Mapping[str, Constraint]
    widths: Widths = field(default_factory=Widths)
    calls: Calls = field(default_factory=lambda: Calls(0, {}))
    scratch: Store = field(kw_only=True)

    def names(self, index: int, group: Group) -> list[str]:
        """Return the full names of a group's operators."""
        return [self.layout.full_name(index, operator) for operator in group]

    def solved(self, index: int) -> list[int]:
        """Return the numbers of the groups that are solved: all, or where structure goes those that get zeros."""
        layout, sparsity = self.layout, self.sparsity
        return [
            number
            for number, group in enumerate(layout.layers[index])
            if not self.widths.units
            or any(sparsity[layout.full_name(index, each)].zeros(each.rows, each.columns) for each in group)
        ]

    def narrowed(self, index: int) -> Counter[int]:
        """Count for each group of decoder layer ``index`` how many units take outputs from it."""
        groups = [{operator.name for operator in group} for group in self.layout.layers[index]]
        return Counter(
            number
            for unit in self.widths.channels(index)
            for number, names in enumerate(groups)
            if not names.isdisjoint(unit.producers)
        )

    def fitted(self, index: int) -> Counter[int]:
        """Count for each group how many units fit it to the dense outputs before they lose channels (goa)."""
        return self.narrowed(index) if self.recipe.structure.method == "goa" else Counter()


@dataclass(frozen=True)
class LayerStreams:
    """Stores of the hidden states into and out of one decoder layer.

    Args:
        dense: the layer's input in the dense model; None where neither target nor propagation needs the dense model.
            With ``pruned`` it may hold the first windows only (:func:`~.drift.dense_windows`).
        pruned: the layer's input in the pruned model; None with ``propagate=dense``, where ``dense`` is the input.
        dense_out: receives the dense layer's output; None where it is not needed.
        pruned_out: receives the pruned layer's output; None where it is not needed.
    """

    dense: HiddenStates | None
    pruned: HiddenStates | None = None
    dense_out: HiddenStates | None = None
    pruned_out: HiddenStates | None = None

    @property
    def seen(self) -> HiddenStates:
        """Return the input that the layer problems are solved on."""
        stream = self.pruned or self.dense
        assert stream is not None
        return stream


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of one decoder layer of the dense model (:mod:`fistapruner.allocate.measure`).

    Args:
        metric: metric of output errors in block reconstruction (:mod:`fistapruner.training.reconstruct`).
        importance: weights of the rows of every operator, by full name; None counts all rows alike.
        scores: by full name of the operator that reads them, scores of its channels that were learned (bypass).
    """

    metric: Tensor | None = None
    importance: Mapping[str, Tensor] | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class LayerResult:
    """What is gathered of a decoder layer while it is pruned.

    Args:
        weights: pruned tensors by checkpoint name, in the checkpoint's orientation, rounded as it will hold them.
        rows: kept rows of the operators that lost some, by name inside the layer.
        parts: sparse and low-rank parts of the operators whose sum the layer holds, by name in checkpoint and journal.
    """

    entry: LayerEntry
    weights: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class RunContext(LayerContext):
    """An opened pruning run.

    Where the GPU's memory runs out, this process goes on with fewer windows at a time; the fingerprint stays.

    Args:
        tokens: (samples, seqlen) calibration tokens.
        on_disk: hidden states are kept in files; ``on_device``: in the GPU's memory.
        warnings: sentences on memory that ran out, for the report of the layer at work.
    """

    run: PruneDirectory
    fingerprint: str
    tokens: Tensor
    numerics: Numerics
    on_disk: bool
    on_device: bool
    permissions: Permissions
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        folder: Path,
        device: torch.device,
        permissions: Permissions,
        model: Path,
        opened: LayerwiseModel | None = None,
    ) -> RunContext:
        """Open a run that has been prepared.

        ``model``: the dense model's folder; ``opened``: the same, where this process has opened it before.
        """
        run = PruneDirectory(folder)
        record = run.begun_record()
        decision = record.decision
        recipe = Recipe.build(record.recipe, str(run.run_file))
        if opened is None:
            opened = open_model(permissions.at(model), recipe, device, dtype=decision.numerics.dtype)
        if decision.metrics_sha256:
            opened.checkpoint.orders = run.orders()
        tokens = run.tokens()
        if record.fingerprint != fingerprint(recipe, opened.checkpoint, tokens, decision.numerics):
            raise FistaPrunerError(
                f"{folder}: the model or the calibration tokens are not those the run began with; name another --out"
            )
        widths = Widths() if decision.structure is None else Widths.read(decision.structure)
        on_device = decision.on_device and opened.device.type == "cuda"
        return cls(
            model=opened,
            layout=resized(discover(opened).select(recipe), widths),
            recipe=recipe,
            sparsity=decision.sparsity,
            widths=widths,
            scratch=_scratch(run, opened, decision.on_disk, on_device),
            run=run,
            fingerprint=record.fingerprint,
            tokens=tokens,
            numerics=decision.numerics,
            on_disk=decision.on_disk,
            on_device=on_device,
            permissions=permissions,
        )

    def store(self, name: str, *, samples: int | None = None, on_disk: bool = False) -> HiddenStates:
        """Make a store for the hidden states of the first ``samples`` windows; None is all."""
        shape = (len(self.tokens) if samples is None else samples, self.tokens.shape[1], self.model.width)
        if on_disk:
            return HiddenStates(shape, self.model.dtype, self.run.hidden / name)
        with suppress(torch.OutOfMemoryError):
            return self.scratch(name, shape)
        return HiddenStates(shape, self.model.dtype)

    def embed(self, name: str, *, on_disk: bool = False) -> HiddenStates:
        """Return the input of the first decoder layer for all windows; record how layers are called."""
        hidden = self.store(name, on_disk=on_disk)

        def work() -> None:
            self.calls = embed(self.model, self.tokens, self.numerics.batch_size, hidden)

        self.fitting("embeddings", work, LayerStreams(hidden))
        return hidden

    def record_calls(self) -> None:
        """Record the arguments that decoder layers are called with, unless they are known."""
        if not self.calls.by_size:
            with self.model.embeddings_and_head(head=False):
                samples, seqlen = self.tokens.shape
                self.calls = Calls.of(self.model, samples, seqlen, self.numerics.batch_size)

    def advance(self, index: int, streams: LayerStreams) -> None:
        """Pass the hidden states through an already pruned decoder layer ``index``."""

        def work() -> None:
            self.record_calls()
            if streams.dense is not None and streams.dense_out is not None:
                with self.model.layer(index):
                    run_layer(self.model, index, streams.dense, self.calls, output=streams.dense_out)
            if streams.pruned_out is not None:
                with ExitStack() as loaded:
                    layer = loaded.enter_context(self.model.layer(index, self._journaled(index)))
                    for unit in self.widths.mixtures(index):
                        loaded.enter_context(fewer_experts(layer, unit))
                    run_layer(self.model, index, streams.seen, self.calls, output=streams.pruned_out)

        self.fitting(f"layer {index}", work, streams)

    def _journaled(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a pruned decoder layer, low-rank parts added to their operators."""
        saved = self.run.journal.weights(index)
        tensors = {name: saved.read(name) for name in saved.entries}
        for operator in self.layout.in_layer(index):
            name = self.layout.full_name(index, operator)
            if name + A in tensors:
                source = self.model.source(f"{name}.weight")
                tensors[source] = sum_of_parts(tensors[source], tensors, name, transposed=operator.transposed)
        return tensors

    def fitting(self, what: str, work: Callable[[], T], streams: LayerStreams) -> T:
        """Do ``work``; where the GPU's memory runs out, do it again with less.

        The hidden states of ``streams`` are then in main memory, and the batch size is halved. It divides the one
        before, so that batches end at the same windows.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                before = min(self.numerics.batch_size, len(self.tokens))
                if before == 1 and not self.on_device:
                    raise FistaPrunerError(
                        f"{what}: the memory of {self.model.device} ran out, even with one window at a time: free "
                        "some of it and resume, or give the same prune command again with --device cpu; or begin "
                        "another run with a shorter --seqlen or a lighter --method"
                    ) from None
            release_failed_memory()
            for store in (streams.dense, streams.pruned, streams.dense_out, streams.pruned_out):
                if store is not None:
                    store.to_main_memory()
            fewer = before // next((divisor for divisor in range(2, before + 1) if before % divisor == 0), 1)
            self.numerics = self.numerics.model_copy(update={"batch_size": fewer})
            self.calls, self.on_device = Calls(0, {}), False
            self.scratch = _scratch(self.run, self.model, self.on_disk, False)
            warning = f"{what}: the memory of {self.model.device} ran out; it goes on with {counted(fewer, 'window')}"
            self.warnings.append(f"{warning} at a time instead of {before}")
            log.warning("%s", self.warnings[-1])


def _scratch(run: PruneDirectory, model: LayerwiseModel, on_disk: bool, on_device: bool) -> Store:
    """Return what makes the temporary stores of a run."""
    return scratch_factory(run.hidden if on_disk else None, model.dtype, model.device if on_device else CPU)


def open_model(
    source: ModelSource,
    recipe: Recipe | TrainingRecipe,
    device: torch.device | None = None,
    *,
    dtype: str | None = None,
) -> LayerwiseModel:
    """Open a model as a recipe wants it run.

    A ``device`` or ``dtype`` of passes that the run has decided on goes before the recipe's.
    """
    return LayerwiseModel(
        source.checkpoint(),
        device or choose_device(recipe.execution.device),
        DTYPES.get(dtype or recipe.dtype),
        trust_remote_code=source.trust_remote_code,
    )
