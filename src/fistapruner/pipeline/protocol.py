"""The protocol of a comparison: what its rows share, so that their figures can be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError
from ..measure.data import Windows
from ..runs.comparison_records import FIGURES, CompareRow
from ..runs.results import Perplexity
from ..settings.calibration_settings import Calibration
from ..settings.settings import Recipe
from .contenders import has_own_calibration, parse_contenders

NOT_SHARED = {"method", "sparsity", "seed", "calibration", "dtype", "execution"}
"""Settings that a row has of its own, or that are compared otherwise."""

FOLLOWED = {"method", "propagate"}
"""Settings of a row that has begun which stay where ``auto`` would depend on the executor, or on the model."""


@dataclass(frozen=True)
class Protocol:
    """What all rows of a comparison share.

    Args:
        text: the windows that all models are evaluated on.
        dtype: precision of their passes.
        calibration: where calibration windows come from, but for their seed; a method may have settings of its own.
        device: where models are evaluated, as recipes name it.
        asked_dtype: the precision as recipes name it.
        memory_limit: bytes of main memory that a run may use; None is what the machine has free.
        shared: recipe settings that all rows share; ``family``: returns the model's, for settings that depend on it.
    """

    text: Windows
    dtype: str
    calibration: Calibration
    device: str = "auto"
    asked_dtype: str = "auto"
    memory_limit: int | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    family: Callable[[], str] | None = None

    def covers(self, perplexity: Perplexity | None) -> bool:
        """Whether a figure was measured so."""
        return perplexity is not None and perplexity.measured_on == (self.text.sha256, self.dtype)

    def shares(self, calibration: Calibration) -> bool:
        """Whether a run with these settings was calibrated as all are that have none of their own."""
        return calibration.model_copy(update={"seed": self.calibration.seed}) == self.calibration

    def check(self, row: CompareRow, folder: Path, *, kept: bool) -> None:
        """Refuse a row of an earlier comparison in ``folder`` that was made by another protocol.

        Raises:
            FistaPrunerError: it was calibrated otherwise, or (where it is ``kept`` as it is) measured on other windows,
                or made with other settings than all rows share now.
        """
        where, which = (
            f"--out {folder} holds the row {row.label}, {row.sparsity}, seed {row.seed}",
            "name another folder",
        )
        if "calibration" in row.settings and not has_own_calibration(row.label or ""):
            calibration = Recipe.build({"calibration": row.settings["calibration"]}, str(folder / FIGURES)).calibration
            if not self.shares(calibration):
                raise FistaPrunerError(
                    f"{where}, calibrated on {_said(calibration)}, this comparison is on {_said(self.calibration)}: "
                    f"{which}"
                )
        if not kept or row.perplexity is None:  # a row that failed has no figures to compare
            return
        if not self.covers(row.perplexity):
            was, text = row.perplexity, self.text
            raise FistaPrunerError(
                f"{where}, measured on {was.windows} windows of {was.seqlen} tokens of {was.data} in {was.dtype}; "
                f"this comparison is on other text ({len(text.tokens)} windows of {text.seqlen} tokens of {text.data} "
                f"in {self.dtype}): {which}"
            )
        if (other := self._other_settings(row, folder)) is not None:
            raise FistaPrunerError(f"{where}, made {other[0]}, this comparison would make it {other[1]}: {which}")

    def _other_settings(self, row: CompareRow, folder: Path) -> tuple[str, ...] | None:
        """Say with which setting a row was made and would be made now; None where all are the same."""
        with suppress(FistaPrunerError):  # a recipe file that is gone, or settings of another release
            [contender] = parse_contenders([row.name])
            earlier = Recipe.build(row.settings, str(folder / FIGURES)).model_dump(mode="json")
            now = contender.recipe(self.shared, row.sparsity, row.seed).resolved(
                earlier={key: earlier[key] for key in FOLLOWED}, family=self.family
            )
            for key, value in now.model_dump(mode="json", exclude=NOT_SHARED).items():
                if key in row.settings and (was := earlier[key]) != value:
                    return _difference(key, was, value)
        return None


def _difference(key: str, *values: Any) -> tuple[str, ...]:
    """Say the two values of a setting; of two sections, those of the first setting that differs."""
    one, other = values
    if isinstance(one, dict) and isinstance(other, dict):
        inner = next((name for name in {**other, **one} if one.get(name) != other.get(name)), None)
        if inner is not None:
            return _difference(f"{key}.{inner}", one.get(inner), other.get(inner))
    return tuple(f"with {key} = {json.dumps(value)}" for value in values)


def _said(calibration: Calibration) -> str:
    return f"{calibration.samples} windows of {calibration.seqlen or 'the longest'} tokens from {calibration.name}"


def distinct_seeds(seeds: Any) -> tuple[int, ...]:
    """Read the seeds of a comparison.

    Raises:
        FistaPrunerError: no list of whole numbers, or one of them is named twice; shows them.
    """
    found = tuple(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, (str, Mapping)) else (None,)
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in found):
        raise FistaPrunerError(f"seeds {seeds!r}: a list of different whole numbers such as [0, 1, 2] is expected")
    if len(set(found)) < len(found):
        raise FistaPrunerError(
            f"--seeds {','.join(map(str, found))!r}: different whole numbers such as 0,1,2 are expected"
        )
    return found
