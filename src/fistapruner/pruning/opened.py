"""The context of a run: what every process needs to prune layers, opened from the run directory alone.

The process that starts a run decides everything once (:func:`fistapruner.pruning.run.prune`) and records it. Then
it, its worker processes and the nodes of a cluster open the same :class:`RunContext`, and agree on every bit.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..allocate.measure import weighs_rows
from ..core import Constraint
from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.low_rank import A, sum_of_parts
from ..models.operators import Layout, discover
from ..models.source import UNTRUSTED, ModelSource, Permissions
from ..passes.store import CPU, HiddenStates, scratch_factory
from ..passes.stream import Calls, embed, run_layer
from ..runs.directory import PruneDirectory
from ..runs.records import LayerEntry
from ..runs.settled import Numerics, fingerprint
from ..runtime.devices import choose_device, peak_memory, release_failed_memory
from ..runtime.machine import now
from ..runtime.numerics import DTYPES
from ..runtime.show import counted
from ..settings.prune import Recipe
from ..settings.train import TrainingRecipe
from ..structure.experts import fewer_experts
from ..structure.smaller import Widths, resized
from .context import LayerContext, LayerEvents, LayerMeasures, LayerStreams
from .drift import dense_windows
from .layer import prune_layer

log = logging.getLogger("fistapruner")

T = TypeVar("T")


@dataclass
class RunContext:
    """An opened pruning run.

    Args:
        run: its directory.
        recipe: all settings.
        fingerprint: identity of the run: recipe, model and calibration tokens.
        model: the dense model.
        layout: operators to prune, in the shapes that they are to have.
        sparsity: pattern of every one of them, by full name.
        tokens: (samples, seqlen) calibration tokens.
        numerics: what decides the last bits. Where the GPU's memory runs out, this process goes on with a smaller batch
            size and groups in parts; the fingerprint stays.
        on_disk: hidden states are kept in files.
        on_device: hidden states are kept in the GPU's memory.
        permissions: what the model's files may do, as the command that opened the run says.
        widths: whose channels are removed; None where none are.
    """

    run: PruneDirectory
    recipe: Recipe
    fingerprint: str
    model: LayerwiseModel
    layout: Layout
    sparsity: Mapping[str, Constraint]
    tokens: Tensor
    numerics: Numerics
    on_disk: bool
    on_device: bool = False
    permissions: Permissions = UNTRUSTED
    widths: Widths | None = None
    _reduced: bool = field(default=False, init=False)  # the batch size is no longer what the run decided
    _own_calls: Calls | None = field(default=None, init=False)  # for the reduced one

    @classmethod
    def open(
        cls,
        folder: Path,
        device: torch.device | None = None,
        permissions: Permissions = UNTRUSTED,
        model: Path | None = None,
        opened: LayerwiseModel | None = None,
    ) -> RunContext:
        """Open a run that has been prepared.

        Args:
            folder: the run directory.
            device: where to compute; None is the recipe's device.
            permissions: what the model's files may do.
            model: the dense model's folder, as this process sees it; None is the one in ``run.json``.
            opened: the dense model, where this process has opened it before.

        Raises:
            FistaPrunerError: not a prepared run, or its model, tokens or measurements are gone or have changed.
        """
        run = PruneDirectory(folder)
        record = run.begun_record()
        decision = record.decision
        recipe = Recipe.build(record.recipe, str(run.run_file))
        if opened is None:
            opened = open_model(permissions.at(model or decision.folder), recipe, device, dtype=decision.numerics.dtype)
        if decision.metrics_sha256:
            opened.checkpoint.orders = run.orders()
        tokens = run.tokens()
        if record.fingerprint != fingerprint(recipe, opened.checkpoint, tokens, decision.numerics):
            raise FistaPrunerError(
                f"{folder}: the model or the calibration tokens are not those the run began with; name another --out"
            )
        layout, widths = discover(opened).select(recipe), None
        if decision.structure is not None:
            widths = Widths.read(decision.structure)
            layout = resized(layout, widths)
        return cls(
            run=run,
            recipe=recipe,
            fingerprint=record.fingerprint,
            model=opened,
            layout=layout,
            sparsity=decision.sparsity,
            tokens=tokens,
            numerics=decision.numerics,
            on_disk=decision.on_disk,
            on_device=decision.on_device and opened.device.type == "cuda",
            permissions=permissions,
            widths=widths,
        )

    @property
    def hidden(self) -> Path:
        """Folder of the hidden states that this process keeps on disk."""
        return self.run.hidden

    def clear_hidden(self) -> None:
        """Remove the hidden states that this process, or a killed one before it, has written."""
        shutil.rmtree(self.hidden, ignore_errors=True)

    def store(self, name: str, *, samples: int | None = None, on_disk: bool | None = None) -> HiddenStates:
        """Make a store for hidden states of calibration windows.

        Args:
            name: of its file.
            samples: how many windows; None is all.
            on_disk: keep it in a file; None is what the run has decided.
        """
        shape = (len(self.tokens) if samples is None else samples, self.tokens.shape[1], self.model.width)
        on_disk = self.on_disk if on_disk is None else on_disk
        if on_disk:
            return HiddenStates(shape, self.model.dtype, self.hidden / name)
        with suppress(torch.OutOfMemoryError):
            return HiddenStates(shape, self.model.dtype, None, self._place)
        return HiddenStates(shape, self.model.dtype)

    @property
    def _place(self) -> torch.device:
        """Return the device whose memory keeps hidden states that are not in files."""
        return self.model.device if self.on_device else CPU

    def dense_windows(self) -> int:
        """Return the number of windows that the dense model runs on."""
        samples, seqlen = self.tokens.shape
        return dense_windows(self.recipe, self.layout, samples, seqlen, self.numerics.batch_size)

    def calls(self) -> Calls:
        """Record the arguments that decoder layers are called with."""
        samples, seqlen = self.tokens.shape
        with self.model.embeddings_and_head(head=False):
            return Calls.of(self.model, samples, seqlen, self.numerics.batch_size)

    def embed(self, name: str = "embedded", *, on_disk: bool | None = None) -> tuple[HiddenStates, Calls]:
        """The input of the first decoder layer for all calibration windows, and how layers are called.

        Args:
            name: of its file.
            on_disk: as for :meth:`store`.
        """
        hidden = self.store(name, on_disk=on_disk)
        return hidden, self._fitting(
            "embeddings",
            lambda: embed(self.model, self.tokens, self.numerics.batch_size, hidden),
            LayerStreams(hidden, None, None, None),
        )

    def prune(self, index: int, streams: LayerStreams, calls: Calls, events: LayerEvents) -> LayerEntry:
        """Prune decoder layer ``index`` and journal it.

        Args:
            index: which decoder layer.
            streams: hidden states in and out.
            calls: arguments of the decoder layers.
            events: functions that are called on the way.

        Raises:
            FistaPrunerError: bad data, or too little memory on the GPU.
        """
        warnings: list[str] = []
        return self._fitting(
            f"layer {index}", lambda: self._prune(index, streams, calls, events, warnings), streams, warnings
        )

    def _prune(
        self,
        index: int,
        streams: LayerStreams,
        calls: Calls,
        events: LayerEvents,
        warnings: list[str],
    ) -> LayerEntry:
        """Do what :meth:`prune` does, once; ``warnings`` are added to the layer's."""
        context = LayerContext(
            model=self.model,
            layout=self.layout,
            recipe=self.recipe,
            sparsity=self.sparsity,
            calls=self._own_calls or calls,
            scratch=scratch_factory(self.hidden if self.on_disk else None, self.model.dtype, self._place),
            widths=self.widths,
        )
        names = [name for group in self.layout.layers[index] for name in context.names(index, group)]
        learned = self.recipe.structure.method == "bypass" and self.widths is not None and self.widths.channels(index)
        measures = LayerMeasures(
            metric=self.run.metric(index) if self.recipe.reconstruct else None,
            importance=self.run.measured("rows", names) if weighs_rows(self.recipe) else None,
            scores=self.run.measured("scores", names) if learned else {},
        )
        result = prune_layer(context, index, streams, measures, events)
        result.entry.warnings += warnings
        result.entry.peak_memory = peak_memory()
        result.entry.finished = now()
        self.run.journal.write(self.fingerprint, result.weights, result.entry)
        return result.entry

    def advance(self, index: int, streams: LayerStreams, calls: Calls) -> None:
        """Pass the hidden states through an already pruned decoder layer ``index``."""
        self._fitting(f"layer {index}", lambda: self._advance(index, streams, self._own_calls or calls), streams)

    def _advance(self, index: int, streams: LayerStreams, calls: Calls) -> None:
        """Do what :meth:`advance` does, once."""
        if streams.dense is not None and streams.dense_out is not None:
            with self.model.layer(index):
                run_layer(self.model, index, streams.dense, calls, output=streams.dense_out)
        if streams.pruned_out is not None:
            saved = self.run.journal.weights(index)
            pruned = self._summed({name: saved.read(name) for name in saved.entries}, index)
            mixtures = () if self.widths is None else self.widths.mixtures(index)
            with ExitStack() as loaded:
                layer = loaded.enter_context(self.model.layer(index, pruned))
                for unit in mixtures:
                    loaded.enter_context(fewer_experts(layer, unit))
                run_layer(self.model, index, streams.seen, calls, output=streams.pruned_out)

    def _summed(self, tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """Add the low-rank parts in a decoder layer's journal to its operators."""
        for operator in self.layout.in_layer(index):
            name = self.layout.full_name(index, operator)
            if name + A in tensors:
                source = self.model.source(f"{name}.weight")
                tensors[source] = sum_of_parts(tensors[source], tensors, name, transposed=operator.transposed)
        return tensors

    def _fitting(self, what: str, work: Callable[[], T], streams: LayerStreams, warnings: list[str] | None = None) -> T:
        """Work; where the GPU's memory runs out, work again with less.

        Hidden states are then in main memory, and the batch size is halved.
        It divides the one before, so that batches end at the same windows.

        Args:
            what: names the work, in messages.
            work: may be done again from its beginning.
            streams: hidden states in and out.
            warnings: receives a sentence where memory ran out.

        Raises:
            FistaPrunerError: memory runs out with one window at a time.
        """
        while True:
            try:
                if self._reduced and self._own_calls is None:
                    self._own_calls = self.calls()
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
            self.on_device = False
            for store in (streams.dense, streams.pruned, streams.dense_out, streams.pruned_out):
                if store is not None:
                    store.to_main_memory()
            fewer = before // _smallest_divisor(before)
            self.numerics = self.numerics.model_copy(update={"batch_size": fewer})
            self._reduced, self._own_calls = True, None
            warning = f"{what}: the memory of {self.model.device} ran out; it goes on with {counted(fewer, 'window')}"
            log.warning("%s", warning := f"{warning} at a time instead of {before}")
            if warnings is not None:
                warnings.append(warning)


def _smallest_divisor(number: int) -> int:
    """Return the smallest divisor above 1, or 1 of 1."""
    return next((divisor for divisor in range(2, number + 1) if number % divisor == 0), 1)


def open_model(
    source: ModelSource,
    recipe: Recipe | TrainingRecipe,
    device: torch.device | None = None,
    *,
    dtype: str | None = None,
) -> LayerwiseModel:
    """Open a model as a recipe wants it run.

    Args:
        source: its folder.
        recipe: names device and precision.
        device: where to compute; None is the recipe's device.
        dtype: precision of forward passes that the run has decided on; None is the recipe's.
    """
    return LayerwiseModel(
        source.checkpoint(),
        device or choose_device(recipe.execution.device),
        DTYPES.get(dtype or recipe.dtype),
        trust_remote_code=source.trust_remote_code,
    )
