"""Define the settings of a run, for YAML recipes, the command line and the API.

Everything that determines the pruned weights is in :class:`Recipe`. Its section ``execution`` (device, memory,
executor) only says how the work is carried out and is not part of a run's identity. A setting is described once, on its
field: the command line and the reference page are made from the fields.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    SerializationInfo,
    model_validator,
)

from ..errors import FistaPrunerError
from .base import PATHS_TOO, RunRecipe, Seed, Settings, absolute_file, word_or_number
from .execution_settings import Execution
from .loading import parse_value, read_share
from .patterns import Patterns, check_patterns
from .recover_settings import RecoverRecipe
from .structure_settings import Structure, removes_nothing

if TYPE_CHECKING:
    from ..constraints import Constraint
    from ..solvers.base import Method

ALLOCATIONS = ("uniform", "owl", "error", "auto")
WORKLOAD = "workload:"
"""What an allocation for a workload begins with; the path of its file follows."""

TOTAL = "error:"
"""What an allocation by error to a total begins with; the share of zeros follows."""


def _sparsity(value: Any) -> Constraint:
    """Parse a sparsity; the error is a ValueError, which pydantic collects."""
    # imports torch, which reading the settings' descriptions does not need
    from ..constraints import CONSTRAINTS, parse_sparsity

    try:
        found = parse_sparsity(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None
    if type(found) not in CONSTRAINTS.values():
        raise ValueError(
            f"sparsity {str(found)!r} of the class {type(found).__name__} is not in CONSTRAINTS of "
            "constraints/__init__.py, where worker processes and a resumed run find it; fp.solve takes it as it is"
        )
    return found


def _method(value: Any) -> tuple[Method, ...]:
    from ..solvers import METHODS, parse_method

    try:
        steps = parse_method(value)
    except FistaPrunerError as error:
        raise ValueError(str(error)) from None
    for step in steps:
        if METHODS.get(step.name) is not type(step):
            raise ValueError(
                f"method {step.name!r} of the class {type(step).__name__} is not in solvers/catalogue.py, where worker "
                "processes and a resumed run find it; fp.solve takes it as it is"
            )
    return steps


def _recover(value: Any) -> Any:
    """Parse a recovery recipe, or the tokens of one."""
    if value is None or isinstance(value, RecoverRecipe):
        return value
    if isinstance(value, bool):
        raise ValueError("tokens such as 500k, or the settings of a recovery, are expected")
    if not isinstance(value, Mapping):
        value = {"data": {"tokens": value}}
    try:
        return RecoverRecipe.build(dict(value))
    except FistaPrunerError as error:
        raise ValueError(str(error).removeprefix("recipe: ")) from None


def _dump_recover(value: Any, info: SerializationInfo) -> Any:
    """Write a recovery recipe, without its unset settings where those of the run are left out, too."""
    if value is None:
        return None
    return value.model_dump(mode="json", exclude={"execution"}, exclude_unset=info.exclude_unset)


def _dense_target(value: Any) -> Any:
    return {"dense": 1.0, "pruned": 0.0}.get(value, value) if isinstance(value, str) else value


def _allocation(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(WORKLOAD):
        if file := value.removeprefix(WORKLOAD).strip():
            return WORKLOAD + file
        raise ValueError("workload: names no file: write workload:FILE")
    if isinstance(value, str) and value.startswith(TOTAL):
        if (share := read_share(value.removeprefix(TOTAL))) is None:
            raise ValueError("error: is followed by the share of zeros of all operators together: error:46%")
        return f"{TOTAL}{100 * share:.10g}%"
    if isinstance(value, str) and value not in ALLOCATIONS:
        value = parse_value(value, repr(value))
    if not isinstance(value, dict) and value not in ALLOCATIONS:
        known = ", ".join(ALLOCATIONS)
        raise ValueError(f"{known}, error:46%, workload:FILE or a mapping such as 're:mlp: 60%' is expected")
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
    return [{step.name: step.model_dump()} for step in steps]


def _structure(value: Any) -> Any:
    """Read an amount alone, ``25%``, as the section with this amount."""
    return value if value is None or isinstance(value, (Mapping, Structure)) else {"remove": value}


SparsitySetting = Annotated[Any, BeforeValidator(_sparsity), PlainSerializer(str)]
MethodSetting = Annotated[Any, BeforeValidator(_method), PlainSerializer(_dump_method)]


DenseTarget = Annotated[
    Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"],
    word_or_number(
        "auto",
        "dense, pruned, auto, or a share of the dense output from 0 to 1 is expected",
        lambda share: 0 <= share <= 1,
    ),
    BeforeValidator(_dense_target),
]


class Calibration(Settings):
    """Set where the calibration tokens come from."""

    source: Annotated[str | None, PATHS_TOO] = Field(
        "self",
        description="Calibration text: self (text that the model generates), python (the language reference "
        "that comes with every Python), a .txt, .raw, .md, .jsonl or .parquet file, or a data set of the "
        "extra 'data': c4, wikitext2, ptb.",
    )
    tasks: Annotated[dict[str, str], PATHS_TOO] = Field(
        {},
        description="Several calibration texts by name instead of one source; each gives the same number of windows.",
    )
    samples: int = Field(
        128,
        ge=1,
        lt=2**31,
        description="Number of calibration windows. 128 is the papers' choice.",
    )
    seqlen: int | None = Field(
        None,
        ge=8,
        description="Tokens in a window; without it the model's maximum length, at most 2048.",
    )
    seed: Seed = Field(
        0,
        description="Seed that draws the windows, and generates the text of self.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("tasks"):
            if value.get("source") is not None:
                raise ValueError("give either one source or tasks, not both")
            return {**value, "source": None}
        return {key: inner for key, inner in value.items() if key != "source" or inner is not None}

    @model_validator(mode="after")
    def _a_window_each(self) -> Calibration:
        if self.samples < len(self.tasks):
            raise ValueError(f"samples is {self.samples}, and each of the {len(self.tasks)} tasks needs a window")
        return self

    @property
    def sources(self) -> dict[str, str]:
        """The sources by name; a single one is called as it is."""
        return self.tasks if self.source is None else {self.source: self.source}

    @property
    def name(self) -> str:
        """The source, or the names of the tasks."""
        return ", ".join(self.sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files among the sources; known names have no suffix."""
        return tuple(Path(source) for source in self.sources.values() if Path(source).suffix)

    def with_absolute_files(self) -> Calibration:
        """Return these settings with the absolute path of every file."""
        paths = {name: absolute_file(text) for name, text in self.sources.items()}
        return self.model_copy(update={"tasks": paths} if self.tasks else {"source": paths[self.name]})


RESOLVED = ("propagate", "dense_target", "residual")
"""Settings whose ``auto`` is resolved before a run begins (:meth:`Recipe.resolved`)."""


class Recipe(RunRecipe):
    """Hold all settings of a pruning run."""

    sparsity: SparsitySetting = Field(
        "50%",
        description="Sparsity of the pruned operators: 50%, 0.5, 2:4, 4:8, 64:2:8, ... A share is that of all of them "
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
        "are pruned in parallel or in parts.",
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
    allocation: Annotated[
        Literal["uniform", "owl", "error", "auto"] | str | dict[str, SparsitySetting], BeforeValidator(_allocation)
    ] = Field(
        "auto",
        description="Distribution of the sparsity over layers and operators: uniform, owl, error (by measured "
        "error), error:46% (for n:m patterns: by measured error, to this share of zeros in all), workload:FILE (by "
        "measured error in several tasks; their weights, and the losses that earlier deployments tolerated, are in the "
        "file), or a mapping of names, as targets takes them, to sparsities: of several that match the last counts. "
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
    structure: Annotated[Structure, BeforeValidator(_structure)] = Field(
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
    recover: Annotated[Any, BeforeValidator(_recover), PlainSerializer(_dump_recover)] = Field(
        None,
        description="Recovery after pruning: tokens to train on, such as 500k, or the settings of 'recover'; its "
        "result is in RUN/recovered. Not part of the pruning run's identity.",
    )
    seed: Seed = Field(
        0,
        description="Seed of everything random that is not calibration data, and of a recovery for which recover names "
        "none; as a flag also that of the calibration windows.",
    )
    execution: Execution = Field(
        Execution(),
        description="How the work is carried out; not part of a run's identity.",
    )

    no_identity: ClassVar[tuple[str, ...]] = ("execution", "recover")

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
    def _structure_of_something(self) -> Recipe:
        """Refuse settings of a removal that would have no effect."""
        for name, field in Structure.model_fields.items():
            value = getattr(self.structure, name)
            if value != field.default and (why := self.structure.no_effect(name)):
                raise ValueError(f"structure.{name} is {value}, but {why}")
        return self

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
    def total(self) -> float | None:
        """The share of zeros of all operators together that the allocation names; None where it names none."""
        said = self.allocation
        return read_share(said.removeprefix(TOTAL)) if isinstance(said, str) and said.startswith(TOTAL) else None

    @property
    def steps(self) -> tuple[Method, ...]:
        """The method chain, parsed."""
        return self.method  # type: ignore[no-any-return]

    @property
    def dense_share(self) -> float:
        """Share of the dense target: ``dense_target`` of a :meth:`resolved` recipe as a number."""
        assert not isinstance(self.dense_target, str)
        return self.dense_target

    @property
    def corrects_drift(self) -> bool:
        """Whether ``residual: correct`` has an effect; for a :meth:`resolved` recipe."""
        return self.residual == "correct" and self.dense_share > 0.0 and self.error_correction

    def resolved(
        self,
        *,
        in_parts: bool = False,
        earlier: Mapping[str, Any] | None = None,
        family: Callable[[], str] | None = None,
    ) -> Recipe:
        """Return this recipe with ``auto`` of ``propagate``, ``dense_target`` and ``residual`` resolved.

        Paths of calibration and workload files become absolute, so that a run can be continued from another folder.
        Seeds that ``recover`` does not name become those of this recipe.

        Args:
            in_parts: only a part of the decoder layers is pruned (``--only-layers``), independently of the others.
            earlier: the resolved recipe of the run that is continued; its choices stay.
            family: returns the model's family, for settings of methods that depend on it. None leaves these unresolved.

        Raises:
            FistaPrunerError: a residual correction that was asked for and has no effect.
        """
        solver = [step for step in self.steps if not step.refines][-1]
        asked = {key: getattr(self, key) for key in RESOLVED}
        chosen = {key: (earlier or {}).get(key, value) if value == "auto" else value for key, value in asked.items()}
        goa = self.structure.remove is not None and self.structure.method == "goa"  # its paper's settings
        if chosen["propagate"] == "auto":
            apart = in_parts or self.execution.executor != "serial"
            chosen["propagate"] = "dense" if apart else "pruned" if goa else solver.propagate
        if chosen["dense_target"] == "auto":
            own = chosen["propagate"] == solver.propagate and not goa
            chosen["dense_target"] = solver.dense_target if own else 1.0
        idle = self._idle_residual(chosen["dense_target"])
        if self.residual == "correct" and idle and (earlier or {}).get("residual") != "correct":
            raise FistaPrunerError(f"residual correct has no effect {idle}, or leave residual out")
        if chosen["residual"] == "auto":
            chosen["residual"] = "none" if idle or solver.auto_keeps_paper_settings or goa else "correct"
        if family is not None:
            before = _method(earlier["method"]) if earlier else ()
            chosen["method"] = tuple(
                step.for_model(family, was) for step, was in zip(self.steps, chain(before, repeat(None)), strict=False)
            )
        chosen["calibration"] = self.calibration.with_absolute_files()
        if self.recover is not None:
            chosen["recover"] = self.recover.with_seed(self.seed)
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
