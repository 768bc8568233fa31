"""Sparsity patterns: which weights of an operator may differ from zero, as objects with methods.

To add one, write a class here and add it to :data:`KINDS`. It then exists in recipes, on the command line and in the
property tests, and every method prunes to it. Other code asks a constraint through its methods and never for its class.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .linalg import row_blocks
from .selection import GroupThreshold, SampledThreshold, Threshold, keep_largest, keep_n_of_m

Scope = Literal["operator", "row"]
"""Where scores compete, for constraints that leave it open: in the whole operator, or within each row."""


class Constraint(ABC):
    """Sparsity pattern of one operator: ``rows`` outputs by ``columns`` inputs.

    Constraints are frozen values: equal where they mean the same, and ``parse_sparsity(str(c)) == c``. Projections are
    exact: the promised number of zeros, the first of equal scores kept, NaN smallest, the same mask on every call.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    """How users write it, for messages: ``("a share (0.5)", "a percentage (50%)")``."""
    supports_allocation: ClassVar[bool] = False
    """Whether its share of zeros is free, and zeros may be anywhere, so that a budget can be split among operators."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read the constraint as users write it; None for a text of another form."""
        return None

    @property
    @abstractmethod
    def fraction(self) -> float:
        """Share of zeros, in [0, 1)."""

    @abstractmethod
    def zeros(self, rows: int, columns: int) -> int:
        """Exact number of zeros of a ``rows x columns`` operator."""

    @abstractmethod
    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        """Choose the weights to keep.

        Args:
            scores: (rows, columns) importance of each weight; larger is kept.
            scope: where scores compete, if the constraint leaves it open.

        Returns:
            (rows, columns) boolean mask, True where kept, with exactly :meth:`zeros` False entries.
        """

    @abstractmethod
    def satisfies(self, weight: Tensor) -> bool:
        """Return whether ``weight`` (rows, columns) has the zeros that the constraint asks for, or more."""

    @abstractmethod
    def threshold(self, rows: int, columns: int) -> Threshold:
        """Make a projection for use inside iterations: faster than ``project``, perhaps inexact.

        It works on columns in strided order: member i of group g is column ``i * columns / group_length + g``.
        """

    @property
    def group_length(self) -> int:
        """Consecutive inputs that are constrained together; 1 where there are no groups."""
        return 1

    @property
    def nm(self) -> tuple[int, int] | None:
        """(n, m) if all weights have an n:m pattern: for packing, permutation and sparse tensor cores."""
        return None

    def neighbours(self, reach: float) -> tuple[Constraint, ...]:
        """Return the patterns that an operator may have instead, and this one, from the densest on.

        Args:
            reach: by how much of the weights a pattern may have more zeros than this one; fewer are always allowed.
        """
        return ()

    def check(self, columns: int, name: str = "operator") -> None:
        """Refuse an operator whose inputs are not a multiple of the group length; the error names it."""
        if columns % self.group_length:
            raise FistaPrunerError(
                f"pattern {self} does not fit {name}: its {columns} inputs are not a multiple of {self.group_length}"
            )

    def relaxed(self, scores: Tensor, share: float) -> Tensor:
        """Choose the weights to keep on the way from dense (share 0) to the constraint (share 1).

        Weights that the projection keeps stay; of all others the lowest scores go.

        Args:
            scores: (rows, columns) importance of each weight; larger is kept.
            share: share of the constraint's zeros, in [0, 1].

        Returns:
            (rows, columns) boolean mask with ``round(share * zeros)`` False entries.
        """
        zeros = round(share * self.zeros(*scores.shape))
        return keep_largest(scores.masked_fill(self.project(scores), torch.inf), scores.numel() - zeros)

    def project_columns(self, scores: Tensor, start: int) -> Tensor:
        """Choose the weights to keep in some columns, all columns before them being decided.

        Args:
            scores: (rows, k) scores of columns ``start`` to ``start + k``, in whole groups.
            start: number of columns before these.

        Returns:
            (rows, k) boolean mask. The masks of blocks from left to right have :meth:`zeros` False entries together.
        """
        return self.project(scores)


@dataclass(frozen=True)
class Unstructured(Constraint):
    """Zero ``round(share * rows * columns)`` weights of an operator, wherever they are.

    Args:
        share: share of weights that become zero, in [0, 1).
    """

    share: float

    forms: ClassVar[tuple[str, ...]] = ("a share (0.5)", "a percentage (50%)")
    supports_allocation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.share, (int, float)) and 0.0 <= self.share < 1.0):
            raise FistaPrunerError(
                f"sparsity {self.share!r} is out of range: a share of zeros in [0, 1), such as 0.5 or 50%"
            )

    @classmethod
    def of_counts(cls, zeros: int, weights: int) -> Unstructured:
        """Make the constraint with exactly ``zeros`` zeros among ``weights`` weights; all of them may be zero."""
        return cls(min(zeros / weights, math.nextafter(1.0, 0.0)))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        try:
            number = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None
        if math.isfinite(number) and number >= 1 and not text.endswith("%"):
            raise FistaPrunerError(
                f"sparsity {text} is out of range: a share of zeros in [0, 1), or write '{number:g}%'"
            )
        return cls(number)

    def __str__(self) -> str:
        """Write a percentage where four decimals suffice, else the share with all its digits."""
        percent = f"{100 * self.share:.4f}".rstrip("0").rstrip(".")
        return f"{percent}%" if float(percent) / 100.0 == self.share else repr(float(self.share))

    @property
    def fraction(self) -> float:
        return self.share

    def zeros(self, rows: int, columns: int) -> int:
        return min(round(self.share * rows * columns), rows * columns)

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        """Choose the weights to keep.

        Scores compete in the whole operator (magnitude, FISTAPruner, ALPS) or within each row (Wanda). Within rows,
        zeros that do not divide evenly go to the first rows, so that both scopes have the same number of zeros.
        """
        rows, columns = scores.shape
        zeros = self.zeros(rows, columns)
        if scope == "operator":
            return keep_largest(scores, rows * columns - zeros)
        mask = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
        base, extra = divmod(zeros, rows)
        for block in row_blocks(rows):
            values = torch.nan_to_num(scores[block], nan=-math.inf)
            order = torch.sort(values, dim=1, descending=True, stable=True).indices
            few = min(max(extra - block.start, 0), len(order))  # rows of this block with one zero more
            mask[block].scatter_(1, order[:, : columns - base], True)
            mask[block][:few].scatter_(1, order[:few, columns - base - 1 : columns - base], False)
        return mask

    def satisfies(self, weight: Tensor) -> bool:
        return weight.numel() - int(torch.count_nonzero(weight)) >= self.zeros(*weight.shape)

    def relaxed(self, scores: Tensor, share: float) -> Tensor:
        # The mask of the general definition, with one selection.
        return keep_largest(scores, scores.numel() - round(share * self.zeros(*scores.shape)))

    def project_columns(self, scores: Tensor, start: int) -> Tensor:
        """Keep the highest scores of a block of columns.

        Its zeros are those of all columns so far less those of the columns before. Of ties the first column is kept.
        """
        rows, columns = scores.shape
        zeros = self.zeros(rows, start + columns) - self.zeros(rows, start)
        return keep_largest(scores.T, scores.numel() - zeros).T

    def threshold(self, rows: int, columns: int) -> Threshold:
        return SampledThreshold(self.zeros(rows, columns), rows, columns)


@dataclass(frozen=True)
class NM(Constraint):
    """Keep the ``n`` best of every ``m`` consecutive inputs of a row: ``NM(2, 4)`` is 2:4.

    Args:
        n: weights kept in every group, 1 <= n < m.
        m: group length along the inputs.
    """

    n: int
    m: int

    forms: ClassVar[tuple[str, ...]] = ("a pattern (2:4)",)

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise FistaPrunerError(f"pattern {self.n}:{self.m} is not n:m with 1 <= n < m, such as 2:4 or 4:8")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = re.fullmatch(r"(\d+)\s*:\s*(\d+)", text)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def fraction(self) -> float:
        return 1.0 - self.n / self.m

    @property
    def group_length(self) -> int:
        return self.m

    @property
    def nm(self) -> tuple[int, int]:
        return self.n, self.m

    def zeros(self, rows: int, columns: int) -> int:
        return rows * columns // self.m * (self.m - self.n)

    def neighbours(self, reach: float) -> tuple[Constraint, ...]:
        sparsest = max(1, self.n - max(1, round(reach * self.m)))
        return (Unstructured(0.0), *(NM(kept, self.m) for kept in range(self.m - 1, sparsest - 1, -1)))

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        self.check(scores.shape[1])
        return keep_n_of_m(scores, self.n, self.m)

    def satisfies(self, weight: Tensor) -> bool:
        rows, columns = weight.shape
        if columns % self.m:
            return False
        count = torch.uint8 if self.m < 256 else torch.int64
        return bool(((weight.reshape(rows, -1, self.m) != 0).sum(-1, dtype=count) <= self.n).all())

    def threshold(self, rows: int, columns: int) -> Threshold:
        return GroupThreshold(self.n, self.m)


@dataclass(frozen=True)
class Stacked:
    """The constraints of several operators on the same inputs, stacked by rows.

    ``fistapruner.solvers.solve`` solves the operators of a stack one after another; what depends on their Gram alone is
    computed once.

    Args:
        constraints: one for each operator.
        rows: rows of each operator.
        names: of the operators, for messages. Default: ``operator 0``, ``operator 1``, ...
    """

    constraints: tuple[Constraint, ...]
    rows: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(f"operator {number}" for number in range(len(self.rows))))
        if not len(self.constraints) == len(self.rows) == len(self.names):
            raise FistaPrunerError(
                f"a stack has {len(self.constraints)} constraints, {len(self.rows)} numbers of rows and "
                f"{len(self.names)} names: as many of each are expected"
            )

    def parts(self) -> Iterator[tuple[str, slice, Constraint]]:
        """Go through the operators: name, rows and constraint of each."""
        start = 0
        for name, rows, constraint in zip(self.names, self.rows, self.constraints, strict=True):
            yield name, slice(start, start + rows), constraint
            start += rows

    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        """Choose the weights to keep of the stacked operators (rows, columns), each by its own constraint."""
        return torch.cat([constraint.project(scores[rows], scope) for _, rows, constraint in self.parts()])

    def satisfies(self, weight: Tensor) -> bool:
        """Return whether every operator of the stack has the zeros that its constraint asks for, or more."""
        return all(constraint.satisfies(weight[rows]) for _, rows, constraint in self.parts())


KINDS: dict[str, type[Constraint]] = {"unstructured": Unstructured, "n:m": NM}
"""Every constraint by name; a text is read by the first one whose form it has."""


def parse_sparsity(value: str | float | Constraint) -> Constraint:
    """Read a constraint as users write it: ``0.5``, ``"50%"``, ``"2:4"``.

    Args:
        value: a share of zeros, a percentage, an ``n:m`` pattern (n kept of every m inputs), or a constraint.

    Raises:
        FistaPrunerError: the value is none of these, or out of range.
    """
    if isinstance(value, Constraint):
        return value
    text = str(value).strip()
    for kind in KINDS.values():
        found = kind.parse(text)
        if found is not None:
            return found
    forms = [form for kind in KINDS.values() for form in kind.forms]
    raise FistaPrunerError(f"sparsity {value!r} is not understood: write {', '.join(forms[:-1])} or {forms[-1]}")


def stack(sparsity: str | float | Constraint | Sequence[str | float | Constraint], rows: Sequence[int]) -> Stacked:
    """Stack one constraint for every operator, or one for all of them, in any form that users write."""
    if isinstance(sparsity, str) or not isinstance(sparsity, Sequence):
        sparsity = [sparsity] * len(rows)
    return Stacked(tuple(parse_sparsity(each) for each in sparsity), tuple(rows))


def counted_sparsity(zeros: int, weights: int) -> str:
    """Write a counted share of zeros as :func:`parse_sparsity` reads it, which is never 100%."""
    return f"{min(zeros / max(weights, 1), 0.999999):.4%}"


def patterns_met(weight: Tensor, longest: int) -> list[NM]:
    """Find the sparsest n:m pattern that a weight has for each m of 2, 4, 8 up to ``longest``.

    Args:
        weight: (rows, columns), not empty.
        longest: at most 128.
    """
    nonzero, m, found = (weight != 0).to(torch.uint8), 1, []
    while m < longest and nonzero.shape[1] % 2 == 0:
        nonzero, m = nonzero[:, ::2] + nonzero[:, 1::2], 2 * m
        if (most := max(1, int(nonzero.max()))) < m:
            found.append(NM(most, m))
    return found
