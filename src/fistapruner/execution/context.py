"""What every process of a run needs to prune layers, opened from the run directory alone.

The process that starts a run decides everything once (:func:`fistapruner.pipeline.prune.prune`) and writes it down; then it,
a worker process or a node of a cluster opens the same :class:`RunContext` from the same directory and agrees on every bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations.store import HiddenStates, scratch_factory
from ..activations.stream import Calls, embed, run_layer
from ..constraints import Constraint, parse_sparsity
from ..errors import FistaPrunerError
from ..models.discovery import Layout, discover
from ..models.files.checkpoint import Checkpoint
from ..models.layerwise import LayerwiseModel
from ..pruning.layer import LayerStreams, Progress, Solver, prune_layer
from ..pruning.partition import solve_apart
from ..recipes.settings import Recipe
from ..runs.directory import RunDirectory
from ..runs.identity import fingerprint
from ..runs.records import LayerEntry
from ..runtime.devices import choose_device
from ..runtime.memory import peak_memory
from ..runtime.numerics import DTYPES
from ..sensitivity.decision import weighs_rows
from ..solvers import solve


@dataclass
class RunContext:
    """An opened run.

    Args:
        run: its directory.
        recipe: all settings.
        fingerprint: identity of the run: recipe, model and calibration tokens.
        skeleton: the model.
        layout: operators to prune.
        sparsity: pattern of every one of them, by full name.
        tokens: (samples, seqlen) calibration tokens.
        numerics: what decides the order of sums, and with it the last bits: ``batch_size`` (windows in one forward
            pass), ``threads`` of a worker, ``by_operator`` (groups are solved in parts,
            :mod:`~fistapruner.pruning.partition`), kind of ``device``. Part of the run.
        on_disk: whether hidden states are kept in files.
        part: subfolder of ``RUN/hidden`` this process works in.
        trust: ``allow_pickle`` and ``trust_remote_code``, as whoever opened the run said; the run directory is not asked.
    """

    run: RunDirectory
    recipe: Recipe
    fingerprint: str
    skeleton: LayerwiseModel
    layout: Layout
    sparsity: Mapping[str, Constraint]
    tokens: Tensor
    numerics: Mapping[str, Any]
    on_disk: bool
    part: str = ""
    trust: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: Path,
        device: torch.device | None = None,
        part: str = "",
        *,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> RunContext:
        """Open a run that has been prepared.

        Args:
            folder: the run directory.
            device: where to work; default is the recipe's.
            part: subfolder of ``RUN/hidden`` to work in, if this is one of several processes that share the run.
            allow_pickle: read legacy ``.bin`` weights.
            trust_remote_code: run Python code that comes with the checkpoint.

        Raises:
            FistaPrunerError: not a prepared run, or its model or calibration tokens are gone or not those it began with.
        """
        run = RunDirectory(folder)
        facts = run.facts()
        decided: dict[str, Any] = facts.get("decided", {})
        if not decided:
            raise FistaPrunerError(f"{folder} is not a prepared run")
        recipe = Recipe.build(facts["recipe"], str(run.run_file))
        trust = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        skeleton = open_model(Path(decided["folder"]), recipe, device, dtype=decided["numerics"]["dtype"], **trust)
        if decided.get("metrics_sha256"):
            skeleton.checkpoint.orders = run.orders()
        tokens = run.tokens()
        if facts["fingerprint"] != fingerprint(recipe, skeleton.checkpoint, tokens, decided["numerics"]):
            raise FistaPrunerError(f"{folder}: the model or the calibration tokens are not those the run began with; name another --out")
        return cls(
            run=run,
            recipe=recipe,
            fingerprint=facts["fingerprint"],
            skeleton=skeleton,
            layout=discover(skeleton).select(recipe),
            sparsity={name: parse_sparsity(pattern) for name, pattern in decided["sparsity"].items()},
            tokens=tokens,
            numerics=decided["numerics"],
            on_disk=decided["on_disk"],
            part=part,
            trust=trust,
        )

    @property
    def hidden(self) -> Path:
        """Where this process keeps hidden states that memory does not hold."""
        return self.run.hidden / self.part

    def clear_hidden(self) -> None:
        """Remove the hidden states that this process or a killed one left."""
        shutil.rmtree(self.hidden, ignore_errors=True)

    def store(self, name: str, *, samples: int | None = None, on_disk: bool | None = None) -> HiddenStates:
        """A store for hidden states of calibration windows.

        Args:
            name: of its file.
            samples: how many windows; None is all.
            on_disk: whether it is a file; None does what the run decided.
        """
        seqlen = self.tokens.shape[1]
        samples = len(self.tokens) if samples is None else samples
        on_disk = self.on_disk if on_disk is None else on_disk
        return HiddenStates((samples, seqlen, self.skeleton.width), self.skeleton.dtype, self.hidden / name if on_disk else None)

    def calls(self) -> Calls:
        """How decoder layers are called."""
        samples, seqlen = self.tokens.shape
        with self.skeleton.embeddings_and_head(head=False):
            return Calls.of(self.skeleton, samples, seqlen, self.numerics["batch_size"])

    def embed(self, name: str = "embedded", *, on_disk: bool | None = None) -> tuple[HiddenStates, Calls]:
        """The input of the first decoder layer for all calibration windows, and how layers are called.

        Args:
            name: of its file.
            on_disk: as for :meth:`store`.
        """
        hidden = self.store(name, on_disk=on_disk)
        return hidden, embed(self.skeleton, self.tokens, self.numerics["batch_size"], hidden)

    def prune(
        self,
        index: int,
        streams: LayerStreams,
        calls: Calls,
        progress: Progress,
        inspect: Callable[..., None] | None = None,
        passed: Callable[[], None] = lambda: None,
        solver: Solver | None = None,
    ) -> LayerEntry:
        """Prune decoder layer ``index`` and journal it."""
        scratch = scratch_factory(self.hidden if self.on_disk else None, self.skeleton.dtype)
        metric = self.run.metric(index) if self.recipe.match else None
        names = [self.layout.full_name(index, operator) for group in self.layout.layers[index] for operator in group]
        importance = self.run.importance(names) if weighs_rows(self.recipe) else None
        result = prune_layer(
            self.skeleton,
            self.layout,
            index,
            self.recipe,
            self.sparsity,
            streams,
            calls,
            scratch,
            progress,
            inspect,
            metric,
            importance,
            passed,
            solver or (solve_apart if self.numerics["by_operator"] else solve),
        )
        result.entry.peak_memory = peak_memory()
        self.run.write_layer(self.fingerprint, result.weights, result.entry)
        return result.entry

    def advance(self, index: int, streams: LayerStreams, calls: Calls) -> None:
        """Pass the hidden states through an already pruned decoder layer ``index``."""
        if streams.dense is not None and streams.dense_out is not None:
            with self.skeleton.layer(index):
                run_layer(self.skeleton, index, streams.dense, calls, output=streams.dense_out)
        if streams.pruned_out is not None:
            saved = self.run.weights(index)
            pruned = {name: saved.read(name) for name in saved.entries}
            with self.skeleton.layer(index, pruned):
                run_layer(self.skeleton, index, streams.seen, calls, output=streams.pruned_out)


def open_model(
    folder: Path,
    recipe: Recipe,
    device: torch.device | None = None,
    *,
    dtype: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LayerwiseModel:
    """Open a checkpoint folder as a recipe wants it run; ``dtype`` is what the run decided for the passes, if it has begun."""
    checkpoint = Checkpoint.open(folder, allow_pickle=allow_pickle)
    return LayerwiseModel(
        checkpoint, device or choose_device(recipe.execution.device), DTYPES.get(dtype or recipe.dtype), trust_remote_code=trust_remote_code
    )


def model_family(folder: Path, *, allow_pickle: bool = False) -> str:
    """``model_type`` of a checkpoint's config, such as ``llama`` or ``opt``."""
    return str(Checkpoint.open(folder, allow_pickle=allow_pickle).config.get("model_type", ""))
