"""Define the settings of a pruning run; flags and the reference page are made from the fields."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from ..errors import FistaPrunerError
from .base import Execution, RunRecipe, Seed, Texts
from .parse import Patterns, check_patterns, parse_value
from .structure import Structure

if TYPE_CHECKING:
    from ..core import Constraint
    from ..solvers.base import Method

ALLOCATIONS = ("uniform", "owl", "error", "auto")
WORKLOAD = "workload:"
"""What an allocation for a workload begins with; the path of its file follows."""

RESOLVED = ("propagate", "dense_target", "residual")
"""Settings whose ``auto`` is resolved before a run begins (:meth:`Recipe.resolved`)."""

OWN = "proximal"
"""The solver whose ``auto`` settings are those that measured best; those of others are their paper's."""

PAPERS = {"fista": ("dense", 1.0), OWN: ("pruned", 0.5)}
"""``propagate`` and ``dense_target`` that ``auto`` stands for by solver; all others have ("pruned", 0)."""


def _sparsity(value: Any) -> Constraint:
    """Parse a sparsity; the error is a ValueError, which pydantic collects."""
    # imports torch, which reading the settings' descriptions does not need
    from ..core import parse_sparsity

    try:
        return parse_sparsity(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None


def read_method(value: Any) -> tuple[Method, ...]:
    """Parse a method or a chain of them; the error is a ValueError, which pydantic collects."""
    from ..solvers import METHODS, parse_method

    try:
        steps = parse_method(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None
    for step in steps:
        kind = type(step) if step.reference else METHODS.get(step.name)
        if kind is not type(step) or kind(**step.settings()) != step:
            raise ValueError(f"{step!r} is more than a recipe keeps; give FILE.py:CLASS, or take fp.solve")
    return steps


def _dense_target(value: Any) -> Any:
    return {"dense": 1.0, "pruned": 0.0}.get(value, value) if isinstance(value, str) else value


def _allocation(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(WORKLOAD):
        if file := value.removeprefix(WORKLOAD).strip():
            return WORKLOAD + file
        raise ValueError("workload: names no file: write workload:FILE")
    if isinstance(value, str) and value not in ALLOCATIONS:
        value = parse_value(value, repr(value))
    if not isinstance(value, dict) and value not in ALLOCATIONS:
        known = ", ".join(ALLOCATIONS)
        raise ValueError(f"{known}, workload:FILE or a mapping such as 're:mlp: 60%' is expected")
    return value if isinstance(value, str) else _sparsities(value)


def _sparsities(named: Mapping[Any, Any]) -> dict[str, Constraint]:
    """Parse the sparsities of operators, by names of these; the first fault is a ValueError."""
    found = {}
    for name, value in named.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r}: names of operators are expected, such as down_proj or 're:layers\\.0\\.'")
        try:
            found[name] = _sparsity(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return check_patterns(found)


def _dump_method(steps: tuple[Method, ...]) -> list[Any]:
    return [{step.reference or step.name: step.settings()} for step in steps]


SparsitySetting = Annotated[Any, BeforeValidator(_sparsity), PlainSerializer(str)]
MethodSetting = Annotated[Any, BeforeValidator(read_method), PlainSerializer(_dump_method)]
AllocationSetting = Annotated[
    Literal["uniform", "owl", "error", "auto"] | str | dict[str, SparsitySetting], BeforeValidator(_allocation)
]
DenseTarget = Annotated[Literal["auto"] | Annotated[float, Field(ge=0.0, le=1.0)], BeforeValidator(_dense_target)]


class Calibration(Texts):
    """Set where the calibration tokens come from."""

    source: str | dict[str, str] = Field(
        "self",
        description="Text: self, python, c4, wikitext2, ptb or a file; self is text that the model generates, python "
        "the language reference of Python, the next three need the extra 'data', and a file is .txt, .raw, .md, .jsonl "
        "or .parquet. Several by name, {chat: a.jsonl, code: b.jsonl}, give the same number of windows each.",
    )
    samples: int = Field(128, ge=1, lt=2**31, description="Number of calibration windows. 128 is the papers' choice.")
    seqlen: int | None = Field(
        None,
        ge=8,
        description="Tokens in a window; without it the model's maximum length, at most 2048, or 1024 for self on a "
        "CPU.",
    )
    seed: Seed = Field(0, exclude=True)

    @model_validator(mode="after")
    def _a_window_each(self) -> Calibration:
        if self.samples < len(self.sources):
            raise ValueError(f"samples is {self.samples}, and each of the {len(self.sources)} texts needs a window")
        return self

    @property
    def name(self) -> str:
        """The source, or the names of several."""
        return ", ".join(self.sources)


class Recipe(RunRecipe):
    """Hold all settings of a pruning run."""

    text: ClassVar[str] = "calibration"

    sparsity: SparsitySetting = Field(
        "50%",
        description="Sparsity of the pruned operators: 50%, 0.5, 2:4 or 4:8. A share is that of all together, which "
        "allocation distributes; a pattern, or any beside an allocation by names, is that of each operator. With "
        "structure the default is 0%: the result is then a smaller model without zeros.",
    )
    method: MethodSetting = Field(
        "proximal",
        description="A solver, a chain (wanda+refit), or ./mine.py:CLASS; 'fistapruner methods' lists "
        "solvers and refinements.",
    )
    propagate: Literal["auto", "dense", "pruned"] = Field(
        "auto",
        description="Hidden states that feed a decoder layer: the dense model's (layers can then be pruned in "
        "parallel; FISTAPruner), or those of the layers pruned before it (SparseGPT, ALPS). auto is the paper's "
        "choice, pruned for proximal, and dense if layers are pruned in parallel.",
    )
    dense_target: DenseTarget = Field(
        "auto",
        description="Output that an operator reproduces: dense (the dense model's; FISTAPruner), pruned (the dense "
        "weight's on the drifted inputs; SparseGPT, Wanda, ALPS), or a share of the dense one from 0 to 1. auto is "
        "the paper's choice, 0.5 for proximal, and dense if propagate is not the method's own.",
    )
    residual: Literal["auto", "none", "correct"] = Field(
        "auto",
        description="Residual-drift correction: operators whose output is added to the hidden states (o_proj, "
        "down_proj) also correct the drift of these, with the share dense_target, which must be above 0. auto is "
        "correct for proximal and none for published methods.",
    )
    error_correction: bool = Field(
        True,
        description="Intra-layer error correction (FISTAPruner): recompute each operator's inputs with the operators "
        "before it in the decoder layer already pruned. Without it all Grams come from one pass of the unpruned layer, "
        "as in the programs of Wanda, SparseGPT, ALPS and ADMM.",
    )
    targets: Patterns = Field(
        (),
        description="Operators to prune: the last dotted parts of a full name (down_proj, mlp.down_proj), or re: and a "
        "regular expression that is found anywhere in it; without it every linear operator of the decoder layers.",
    )
    ignore: Patterns = Field((), description="Operators to leave dense, by names as targets takes them.")
    allocation: AllocationSetting = Field(
        "auto",
        description="Distribution of the sparsity over layers and operators: uniform, owl, error (by measured error), "
        "workload:FILE (by measured error in the tasks of a file), or a mapping of names, as targets takes them, to "
        "sparsities: of several that match the last counts. auto is error for proximal, and uniform for published "
        "methods and for n:m patterns.",
    )
    weighting: Literal["auto", "none", "fisher"] = Field(
        "auto",
        description="Weights of an operator's output rows where rows compete for the kept weights: none "
        "(equal), or fisher (Fisher sensitivity of the predictions, measured on the dense model). "
        "auto is fisher for proximal and none for published methods.",
    )
    permutation: Literal["auto", "none", "channels"] = Field(
        "auto",
        description="Under an n:m pattern: none, or channels (those of MLPs reordered, those of heads rotated, so that "
        "the pattern loses least; adapters of the dense model no longer fit). auto is channels for proximal and none "
        "for published methods.",
    )
    structure: Structure = Field(Structure(), description="What is removed whole.")
    low_rank: int = Field(
        0,
        ge=0,
        description="Rank of a low-rank part beside the zeros of every pruned operator, solved together with them; it "
        "is written as a LoRA adapter, RUN/adapter, and its weights come on top. 0 is none.",
    )
    reconstruct: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Steps of block reconstruction after each decoder layer, each on one calibration window; 0 is "
        "none.",
    )
    calibration: Calibration = Field(Calibration(), description="Calibration data.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the forward passes; auto is the checkpoint's own, or float32 on CPUs without "
        "matrix units for it.",
    )
    seed: Seed = Field(0, description="Seed of everything random, such as the calibration windows.")
    execution: Execution = Field(Execution(), description="How the work is carried out; not part of a run's identity.")

    @model_validator(mode="after")
    def _only_structure(self) -> Recipe:
        """Without a sparsity, a recipe that removes structure sets no weights to zero."""
        if "sparsity" not in self.model_fields_set and self.structure.remove is not None:
            self.__dict__["sparsity"] = _sparsity("0%")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the weights, an allocation by name as pairs in its order."""
        found = super().identity()
        if isinstance(found["allocation"], dict):  # of several names that match the last counts
            found["allocation"] = [list(pair) for pair in found["allocation"].items()]
        return found

    @property
    def patterns(self) -> tuple[Constraint, ...]:
        """The sparsity, and those of an allocation that is a mapping."""
        return (self.sparsity, *(self.allocation.values() if isinstance(self.allocation, dict) else ()))

    @property
    def workload(self) -> Path | None:
        """The workload file that the allocation names; None where it names none."""
        said = self.allocation
        return Path(said.removeprefix(WORKLOAD)) if isinstance(said, str) and said.startswith(WORKLOAD) else None

    @property
    def dense_share(self) -> float:
        """Share of the dense target: ``dense_target`` of a ``resolved`` recipe as a number."""
        assert not isinstance(self.dense_target, str)
        return self.dense_target

    @property
    def corrects_drift(self) -> bool:
        """Whether ``residual: correct`` has an effect; for a ``resolved`` recipe."""
        return self.residual == "correct" and self.dense_share > 0.0 and self.error_correction

    def resolved(self, *, earlier: Mapping[str, Any] | None = None, family: Callable[[], str] | None = None) -> Recipe:
        """Return this recipe with ``auto`` of passes, targets and the choice of channels resolved.

        Paths of calibration and workload files become absolute, so that a run can be continued from another folder.

        Args:
            earlier: the resolved recipe of the run that is continued; its choices stay.
            family: returns the model's family, for settings of methods that depend on it. None leaves these unresolved.
        """
        solver = [step for step in self.method if not step.refines][-1].name
        propagate, dense_target = PAPERS.get(solver, ("pruned", 0.0))
        before = earlier or {}
        chosen = {key: before.get(key, asked) if (asked := getattr(self, key)) == "auto" else asked for key in RESOLVED}
        goa = self.structure.remove is not None and self.structure.method == "goa"  # its paper's settings
        if chosen["propagate"] == "auto":
            apart = self.execution.executor != "serial"
            chosen["propagate"] = "dense" if apart else "pruned" if goa else propagate
        if chosen["dense_target"] == "auto":
            own = chosen["propagate"] == propagate and not goa
            chosen["dense_target"] = dense_target if own else 1.0
        if self.residual == "correct" and not chosen["dense_target"]:
            raise FistaPrunerError("residual correct needs a dense_target above 0 (dense, or a share), and it is 0")
        if chosen["residual"] == "auto":
            idle = not chosen["dense_target"] or not self.error_correction
            chosen["residual"] = "none" if idle or solver != OWN or goa else "correct"
        if family is not None:
            chosen["method"] = tuple(self._by_family(step, before, family) for step in self.method)
        chosen["calibration"] = self.calibration.with_absolute_files()
        chosen["structure"] = self.structure.resolved
        if self.workload is not None:
            chosen["allocation"] = WORKLOAD + os.path.abspath(self.workload)
        return self.model_copy(update=chosen)

    @staticmethod
    def _by_family(step: Method, earlier: Mapping[str, Any], family: Callable[[], str]) -> Method:
        """Resolve a warm start ``auto``; a run that goes on need not find its model."""
        if getattr(step, "warm_start", None) != "auto":
            return step
        settled = [named["fista"]["warm_start"] for named in earlier.get("method", ()) if "fista" in named]
        start = settled[0] if settled else "sparsegpt" if family() == "opt" else "wanda"
        return replace(step, warm_start=start)  # type: ignore[call-arg]
