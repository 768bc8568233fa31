"""Define the settings of a run, for YAML recipes, the command line and the API.

Everything that determines the pruned weights is in :class:`Recipe`. Its section ``execution`` (device, memory,
executor) only says how the work is carried out and is not part of a run's identity. A setting is described once, on its
field: the command line and the reference page are made from the fields.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from ..errors import FistaPrunerError
from .base import RunRecipe, Seed
from .calibration_settings import Calibration
from .execution_settings import Execution
from .patterns import Patterns
from .structure_settings import Structure, removes_nothing
from .values import (
    WORKLOAD,
    AllocationSetting,
    DenseTarget,
    MethodSetting,
    SparsitySetting,
    StructureSetting,
)

if TYPE_CHECKING:
    from ..core import Constraint
    from ..solvers.base import Method

RESOLVED = ("propagate", "dense_target", "residual")
"""Settings whose ``auto`` is resolved before a run begins (:meth:`Recipe.resolved`)."""

OWN = "proximal"
"""The solver whose ``auto`` settings are those that measured best; those of others are their paper's."""

PAPERS = {"fista": ("dense", 1.0), OWN: ("pruned", 0.5)}
"""``propagate`` and ``dense_target`` that ``auto`` stands for by solver; all others have ("pruned", 0)."""


class Recipe(RunRecipe):
    """Hold all settings of a pruning run."""

    sparsity: SparsitySetting = Field(
        "50%",
        description="Sparsity of the pruned operators: 50%, 0.5, 2:4, 4:8, ... A share is that of all of them "
        "together, which allocation distributes; a pattern is that of each, unless allocation gives them others. Where "
        "allocation is a mapping of names, it is that of each operator that no name matches. With "
        "structure the default is 0%: the result is then a smaller model without zeros.",
    )
    method: MethodSetting = Field(
        "proximal",
        description="A solver, or a chain of a solver and refinements such as wanda+refit; 'fistapruner methods' "
        "lists them.",
    )
    propagate: Literal["auto", "dense", "pruned"] = Field(
        "auto",
        description="Hidden states that feed a decoder layer: the dense model's (layers are then independent "
        "and can be pruned in parallel; FISTAPruner), or those of the layers pruned before it "
        "(SparseGPT, ALPS). auto is the paper's choice, pruned for proximal, and dense if layers "
        "are pruned in parallel.",
    )
    dense_target: DenseTarget = Field(
        "auto",
        description="Output that an operator reproduces: dense (the dense model's; FISTAPruner), pruned (the "
        "dense weight's on the drifted inputs; SparseGPT, Wanda, ALPS), or a share of the dense "
        "one from 0 to 1. auto is the paper's choice, 0.5 for proximal, and dense if propagate is "
        "not the method's own.",
    )
    residual: Literal["auto", "none", "correct"] = Field(
        "auto",
        description="Residual-drift correction: operators whose output is added to the hidden states (o_proj, "
        "down_proj) also correct, with the share dense_target, the drift of these hidden states "
        "from the dense model's. Needs error_correction and a dense_target above 0. auto is "
        "correct for proximal and none for published methods.",
    )
    error_correction: bool = Field(
        True,
        description="Intra-layer error correction (FISTAPruner): recompute each operator's inputs with the "
        "operators before it in the decoder layer already pruned. Without it the Grams of all "
        "operators come from one pass of the unpruned layer, as in the programs of Wanda, "
        "SparseGPT, ALPS and ADMM.",
    )
    targets: Patterns = Field(
        (),
        description="Operators to prune: the last dotted parts of a full name (down_proj, mlp.down_proj), or re: and a "
        "regular expression that is found anywhere in it; without it every linear operator of the decoder layers.",
    )
    ignore: Patterns = Field(
        (),
        description="Operators to leave dense, by names as targets takes them.",
    )
    allocation: AllocationSetting = Field(
        "auto",
        description="Distribution of the sparsity over layers and operators: uniform, owl, error (by measured "
        "error), workload:FILE (by measured error in several tasks; their weights, and the losses that earlier "
        "deployments tolerated, are in the file), or a mapping of names, as targets takes them, to sparsities: of "
        "several that match the last counts. "
        "auto is error for proximal, and uniform for published methods and for n:m patterns.",
    )
    weighting: Literal["auto", "none", "fisher"] = Field(
        "auto",
        description="Weights of an operator's output rows where rows compete for the kept weights: none "
        "(equal), or fisher (Fisher sensitivity of the predictions, measured on the dense model). "
        "auto is fisher for proximal and none for published methods.",
    )
    permutation: Literal["auto", "none", "channels"] = Field(
        "auto",
        description="Hidden channels of MLPs and attention heads under an n:m pattern: none (as they are), or "
        "channels (those of MLPs reordered, those of heads rotated, so that the pattern loses least; the model "
        "computes the same, but adapters of the dense model no longer fit). auto is channels for proximal and none "
        "for published methods.",
    )
    structure: StructureSetting = Field(
        Structure(),
        description="Whole channels that are removed.",
    )
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
    calibration: Calibration = Field(
        Calibration(),
        description="Calibration data.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the forward passes; auto is the checkpoint's own, or float32 on CPUs without "
        "matrix units for it.",
    )
    seed: Seed = Field(
        0,
        description="Seed of everything random that is not calibration data; as a flag also that of the calibration "
        "windows.",
    )
    execution: Execution = Field(
        Execution(),
        description="How the work is carried out; not part of a run's identity.",
    )

    no_identity: ClassVar[tuple[str, ...]] = ("execution",)

    @model_validator(mode="wrap")
    @classmethod
    def _only_structure(cls, value: Any, read: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Without a sparsity, a recipe that removes structure sets no weights to zero."""
        if not isinstance(value, dict) or "sparsity" in value:
            return read(value)
        section = value.get("structure")
        amount = section.remove if isinstance(section, Structure) else section
        amount = amount.get("remove") if isinstance(amount, Mapping) else amount
        if removes_nothing(amount):
            return read(value)
        recipe = read({**value, "sparsity": "0%"})
        recipe.model_fields_set.discard("sparsity")  # a default: without the structure it is another one
        return recipe

    @model_validator(mode="after")
    def _low_rank_alone(self) -> Recipe:
        if not self.low_rank:
            return self
        if self.structure.remove is not None:
            raise ValueError(f"low_rank {self.low_rank} with structure: a smaller model has no low-rank part")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the weights, an allocation by name as pairs in its order."""
        found = super().identity()
        if isinstance(found["allocation"], dict):  # of several names that match the last counts
            found["allocation"] = [list(pair) for pair in found["allocation"].items()]
        return found

    @property
    def pattern(self) -> Constraint:
        """The sparsity, parsed."""
        return self.sparsity  # type: ignore[no-any-return]

    @property
    def patterns(self) -> tuple[Constraint, ...]:
        """The sparsity, and those of an allocation that is a mapping."""
        return (self.pattern, *(self.allocation.values() if isinstance(self.allocation, dict) else ()))

    @property
    def workload(self) -> Path | None:
        """The workload file that the allocation names; None where it names none."""
        said = self.allocation
        return Path(said.removeprefix(WORKLOAD)) if isinstance(said, str) and said.startswith(WORKLOAD) else None

    @property
    def steps(self) -> tuple[Method, ...]:
        """The method chain, parsed."""
        return self.method  # type: ignore[no-any-return]

    @property
    def dense_share(self) -> float:
        """Share of the dense target: ``dense_target`` of a ``resolved`` recipe as a number."""
        assert not isinstance(self.dense_target, str)
        return self.dense_target

    @property
    def corrects_drift(self) -> bool:
        """Whether ``residual: correct`` has an effect; for a ``resolved`` recipe."""
        return self.residual == "correct" and self.dense_share > 0.0 and self.error_correction

    def resolved(
        self,
        *,
        earlier: Mapping[str, Any] | None = None,
        family: Callable[[], str] | None = None,
    ) -> Recipe:
        """Return this recipe with ``auto`` of passes, targets and the choice of channels resolved.

        Paths of calibration and workload files become absolute, so that a run can be continued from another folder.

        Args:
            earlier: the resolved recipe of the run that is continued; its choices stay.
            family: returns the model's family, for settings of methods that depend on it. None leaves these unresolved.

        Raises:
            FistaPrunerError: a residual correction that was asked for and has no effect.
        """
        solver = [step for step in self.steps if not step.refines][-1].name
        propagate, dense_target = PAPERS.get(solver, ("pruned", 0.0))
        asked = {key: getattr(self, key) for key in RESOLVED}
        chosen = {key: (earlier or {}).get(key, value) if value == "auto" else value for key, value in asked.items()}
        goa = self.structure.remove is not None and self.structure.method == "goa"  # its paper's settings
        if chosen["propagate"] == "auto":
            apart = self.execution.executor != "serial"
            chosen["propagate"] = "dense" if apart else "pruned" if goa else propagate
        if chosen["dense_target"] == "auto":
            own = chosen["propagate"] == propagate and not goa
            chosen["dense_target"] = dense_target if own else 1.0
        idle = self._idle_residual(chosen["dense_target"])
        if self.residual == "correct" and idle and (earlier or {}).get("residual") != "correct":
            raise FistaPrunerError(f"residual correct has no effect {idle}, or leave residual out")
        if chosen["residual"] == "auto":
            chosen["residual"] = "none" if idle or solver != OWN or goa else "correct"
        if family is not None:
            from ..solvers import parse_method

            before = parse_method(earlier["method"]) if earlier else ()  # a run that goes on need not find its model
            settled = next((start for step in before if (start := getattr(step, "warm_start", "auto")) != "auto"), None)
            chosen["method"] = tuple(
                replace(step, warm_start=settled or ("sparsegpt" if family() == "opt" else "wanda"))  # type: ignore[call-arg]
                if getattr(step, "warm_start", None) == "auto"
                else step
                for step in self.steps
            )
        chosen["calibration"] = self.calibration.with_absolute_files()
        chosen["structure"] = self.structure.resolved((earlier or {}).get("structure", {}).get("method"))
        if self.workload is not None:
            chosen["allocation"] = WORKLOAD + os.path.abspath(self.workload)
        return self.model_copy(update=chosen)

    def _idle_residual(self, dense_target: float) -> str | None:
        """Say why a residual correction would have no effect, and what to give instead; None where it has one."""
        if not self.error_correction:
            return "without error correction: leave --no-error-correction out"
        if dense_target > 0:
            return None
        auto = self.dense_target == "auto"
        cause = f"method {self.method_name}, whose dense_target auto is 0" if auto else "dense_target pruned"
        return f"with {cause}: give --dense-target dense or a share"

    @property
    def method_name(self) -> str:
        """Name of the chain as on the command line: ``wanda+refit``."""
        return "+".join(step.name for step in self.steps)
