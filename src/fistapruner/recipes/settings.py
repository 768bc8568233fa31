"""The one settings object: what a YAML recipe, the command line and the API can say.

Everything that decides the pruned weights is in :class:`Recipe`; everything that only decides how the work is carried
out (device, memory, executor) is in its ``execution`` section and never changes which run a recipe belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, field_validator, model_validator

from ..errors import FistaPrunerError, explain
from .loading import parse_bytes, parse_yaml
from .patterns import check_pattern
from .renamed import RENAMED_SETTINGS

if TYPE_CHECKING:
    from ..constraints import Constraint
    from ..solvers.base import Method

MAX_SEED = 2**63 - 1
"""What the random generators take."""

ALLOCATIONS = ("uniform", "owl", "error", "auto")


def _sparsity(value: Any) -> Constraint:
    """Parse a sparsity. pydantic collects ValueErrors; ours carry the sentence for the user."""
    from ..constraints import parse_sparsity  # imports torch, which reading the settings' descriptions does not need

    try:
        return parse_sparsity(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None


def _method(value: Any) -> tuple[Method, ...]:
    from ..solvers import parse_method

    try:
        return parse_method(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None


def _target(value: Any) -> Any:
    value = {"dense": 1.0, "pruned": 0.0}.get(value, value) if isinstance(value, str) else value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 <= value <= 1):
        raise ValueError("dense, pruned, auto, or a share of the dense output from 0 to 1 is expected")
    return value


def _seed(value: Any) -> Any:
    if isinstance(value, int) and not 0 <= value <= MAX_SEED:
        raise ValueError(f"a whole number from 0 to {MAX_SEED} is expected")
    return value


def _allocation(value: Any) -> Any:
    if not isinstance(value, dict) and value not in ALLOCATIONS:
        raise ValueError(f"{', '.join(ALLOCATIONS)} or a mapping such as 're:mlp: 60%' is expected")
    return value


def _dump_method(steps: tuple[Method, ...]) -> list[Any]:
    return [{step.name: step.model_dump()} for step in steps]


SparsitySetting = Annotated[Any, BeforeValidator(_sparsity), PlainSerializer(str)]
Seed = Annotated[int, BeforeValidator(_seed)]
MethodSetting = Annotated[Any, BeforeValidator(_method), PlainSerializer(_dump_method)]


class Settings(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(Settings):
    """Where the calibration tokens come from.

    Args:
        source: ``self`` (text the model generates itself), ``python`` (the language reference every Python ships
            with), a ``.txt``, ``.jsonl`` or ``.parquet`` file, or a data set known to the ``datasets`` extra (``c4``,
            ``wikitext2``, ``ptb``).
        samples: number of token windows. 128 is the papers' choice.
        seqlen: tokens in a window; None takes the model's maximum length, at most 2048.
        seed: draws the windows (and the self-generated text).
    """

    source: str = "self"
    samples: int = Field(128, ge=1)
    seqlen: int | None = Field(None, ge=8)
    seed: Seed = 0

    @property
    def file(self) -> Path | None:
        """The file that ``source`` names, None where it is a known name: those have no suffix."""
        return Path(self.source) if Path(self.source).suffix else None


class Execution(Settings):
    """How the work is carried out. Never part of a run's identity.

    Args:
        device: ``auto`` takes a CUDA GPU when there is one.
        batch_size: calibration windows in one forward pass; None chooses by memory.
        memory_limit: bytes of main memory the run may use, as a number or ``"8GiB"``; None takes what the machine has free. A GPU is
            taken for what it has free.
        executor: ``serial``, ``process`` or ``ray``.
        workers: layer jobs at once (``process``, ``ray``); None takes one per GPU, or one per core group.
        threads: CPU threads for each worker; None divides the machine's cores.
        address: ``HOST:PORT`` of a Ray cluster's head, or ``auto`` for the one that runs on this machine; None starts one.
    """

    device: str = "auto"
    batch_size: int | None = Field(None, ge=1)
    memory_limit: int | None = None
    executor: Literal["serial", "process", "ray"] = "serial"
    workers: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)
    address: str | None = None

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value


RESOLVED = ("propagate", "dense_target", "residual")
"""Settings that a run writes out before it begins, where they are ``auto`` (:meth:`Recipe.resolved`)."""


class Recipe(Settings):
    """All settings of a pruning run.

    Args:
        sparsity: pattern of every pruned operator: ``50%``, ``0.5``, ``2:4``, ``4:8``.
        method: a method, or a chain of a solver and refinements.
        propagate: which hidden states feed a decoder layer: the ``dense`` model's (layers are then independent and can
            be pruned in parallel; FISTAPruner) or those of the already ``pruned`` layers (SparseGPT, ALPS). ``auto`` is
            what the method was published with, ``pruned`` for this project's own (``proximal``), but ``dense`` where layers are
            to be pruned apart from each other: with an executor other than ``serial``, or a part of the layers only.
        dense_target: which output an operator reproduces from its inputs: ``dense`` (FISTAPruner), ``pruned`` (the dense
            weight on the drifted inputs; SparseGPT, Wanda, ALPS), or a share of the dense one in [0, 1]. ``auto`` is what the
            method was published with, 0.5 for this project's own, and ``dense`` where ``propagate`` is not the method's.
        residual: ``correct`` lets operators whose output is added to the hidden states (``o_proj``, ``down_proj``) also take
            back, with the share ``dense_target`` and as far as their inputs can tell, how far these have drifted from the dense
            model's; it needs ``error_correction`` and a ``dense_target`` above 0. ``none`` does not; ``auto`` is ``correct`` for this
            project's own method and ``none`` for published ones.
        error_correction: inside a decoder layer, recompute each operator's inputs with the operators before it already
            pruned (FISTAPruner's intra-layer error correction). False gathers the Grams of all operators in one pass of the
            unpruned layer, as the programs of Wanda, SparseGPT, ALPS and ADMM do; layers before it are pruned or not, as
            ``propagate`` says.
        targets: operators to prune, by name or ``re:`` pattern; default is every linear operator of the decoder layers.
        ignore: operators to leave dense, by name or ``re:`` pattern.
        allocation: how the sparsity is spread: ``uniform``, ``owl``, ``error``, a mapping of patterns to sparsities, or ``auto``:
            ``error`` for this project's own method (``proximal``), ``uniform`` for published ones and for n:m patterns, which
            know nothing else.
        weighting: how the errors of an operator's output rows are weighed where rows compete for the weights that are kept:
            ``none`` counts them alike; ``fisher`` by how much the model's predictions feel them, measured on the dense model
            (no rows compete in an n:m pattern, or where each row has its own sparsity, so nothing is measured then); ``auto``
            is ``fisher`` for this project's own method (``proximal``) and ``none`` for published ones.
        permutation: ``channels`` puts the hidden channels of MLPs and of attention heads into the order in which an n:m pattern
            loses least, without changing what the model computes; adapters (LoRA) and other files that refer to the dense
            model's channels no longer fit then. ``none`` keeps the order; ``auto`` is ``channels`` for this project's own method
            (``proximal``) and ``none`` for published ones. Does nothing to unstructured patterns.
        reconstruct: steps of block reconstruction after each decoder layer, each on one calibration window; 0 is none.
        calibration: calibration data.
        dtype: precision of the forward passes; ``auto`` is the checkpoint's own, or fp32 on CPUs without matrix
            units for it.
        seed: seeds everything random that is not calibration data.
        execution: how the work is carried out.
    """

    sparsity: SparsitySetting = "50%"
    method: MethodSetting = "proximal"
    propagate: Literal["auto", "dense", "pruned"] = "auto"
    dense_target: Annotated[Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"], BeforeValidator(_target)] = "auto"
    residual: Literal["auto", "none", "correct"] = "auto"
    error_correction: bool = True
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    allocation: Annotated[Literal["uniform", "owl", "error", "auto"] | dict[str, SparsitySetting], BeforeValidator(_allocation)] = "auto"
    weighting: Literal["auto", "none", "fisher"] = "auto"
    permutation: Literal["auto", "none", "channels"] = "auto"
    reconstruct: int = Field(0, ge=0)
    calibration: Calibration = Calibration()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: Seed = 0
    execution: Execution = Execution()

    # Defaults are written as users write them; validate them into patterns and methods too.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, value: Any) -> Any:
        for old, new in RENAMED_SETTINGS.items():
            if isinstance(value, dict) and old in value:
                raise ValueError(f"the setting {old!r} is called {new!r}")
        return value

    @field_validator("targets", "ignore", "allocation", mode="after")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        for pattern in () if isinstance(value, str) else value:
            check_pattern(pattern)
        return value

    @property
    def pattern(self) -> Constraint:
        """The sparsity, parsed."""
        return self.sparsity  # type: ignore[no-any-return]

    @property
    def steps(self) -> tuple[Method, ...]:
        """The method chain, parsed."""
        return self.method  # type: ignore[no-any-return]

    @property
    def dense_share(self) -> float:
        """``dense_target`` of a :meth:`resolved` recipe as a number: the share of the dense target."""
        assert not isinstance(self.dense_target, str)
        return self.dense_target

    @property
    def corrects_drift(self) -> bool:
        """Whether ``residual: correct`` of a :meth:`resolved` recipe has something to work with."""
        return self.residual == "correct" and self.dense_share > 0.0 and self.error_correction

    def resolved(
        self,
        *,
        apart: bool = False,
        earlier: Mapping[str, Any] | None = None,
        family: Callable[[], str] | None = None,
    ) -> Recipe:
        """This recipe with ``propagate``, ``dense_target`` and ``residual`` written out where they are ``auto``.

        The path of a calibration file is written out from the root, so that a run can go on from another folder.

        Args:
            apart: only a part of the decoder layers will be pruned, apart from the others.
            earlier: the resolved recipe of the run that is continued; its choices stay.
            family: tells the model's family, for settings of methods that depend on it. None leaves these open.
        """
        solver = [step for step in self.steps if not step.refines][-1]
        asked = {key: getattr(self, key) for key in RESOLVED}
        chosen = {key: (earlier or {}).get(key, value) if value == "auto" else value for key, value in asked.items()}
        if chosen["propagate"] == "auto":
            chosen["propagate"] = "dense" if apart or self.execution.executor != "serial" else solver.propagate
        if chosen["dense_target"] == "auto":
            chosen["dense_target"] = solver.dense_target if chosen["propagate"] == solver.propagate else 1.0
        if chosen["residual"] == "auto":
            chosen["residual"] = "none" if solver.auto_keeps_paper_settings else "correct"
        if family is not None:
            before = _method(earlier["method"]) if earlier else ()
            chosen["method"] = tuple(
                step.for_model(family, was) for step, was in zip(self.steps, chain(before, repeat(None)), strict=False)
            )
        if (file := self.calibration.file) is not None:
            chosen["calibration"] = self.calibration.model_copy(update={"source": os.path.abspath(file)})
        return self.model_copy(update=chosen)

    @property
    def method_name(self) -> str:
        """The chain as the command line writes it: ``wanda+refit``."""
        return "+".join(step.name for step in self.steps)

    def fingerprint(self) -> str:
        """Hash of everything that decides the pruned weights."""
        identity = json.dumps(self.model_dump(mode="json", exclude={"execution"}), sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The recipe as YAML, every setting written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str, origin: str = "recipe") -> Recipe:
        """Read a recipe.

        Raises:
            FistaPrunerError: not YAML, not a mapping, unknown or wrong settings.
        """
        return cls.build(parse_yaml(text, origin), origin)

    @classmethod
    def build(cls, settings: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Validate a mapping of settings.

        Raises:
            FistaPrunerError: one line that names every wrong setting.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise FistaPrunerError(f"{origin}: {explain(error)}") from None
