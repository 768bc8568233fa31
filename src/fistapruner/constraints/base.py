"""What a constraint is: which weights of an operator may differ from zero, as an object with methods.

To add one, write one file with one class and name it in ``constraints/__init__.py``. It then exists in recipes, on the
command line and in the property tests, and is pruned by every method that supports it. Code outside this folder asks
a constraint through the methods below and never for its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from .selection import keep_largest
from .thresholds import ProjectedThreshold, Threshold

Scope = Literal["operator", "row"]
"""Where scores compete, for constraints that leave it open: in the whole operator, or within each row."""


class Constraint(ABC):
    """Sparsity pattern of one operator: ``rows`` outputs by ``columns`` inputs.

    Constraints are frozen values: equal where they mean the same, and ``parse_sparsity(str(c)) == c``. Projections are
    exact: the promised number of zeros, ties broken by position, NaN smallest, the same mask on every call.
    """

    forms: ClassVar[tuple[str, ...]]
    """How users write it, for messages: ``("a share (0.5)", "a percentage (50%)")``."""
    supports_allocation: ClassVar[bool] = False
    """Whether its share of zeros is free, so that a budget of zeros can be split among operators."""
    zeros_suffice: ClassVar[bool] = False
    """Whether every weight with :meth:`zeros` zeros satisfies it, wherever they are."""
    exchanges: ClassVar[Literal["row", "group"] | None] = None
    """Where a kept and a dropped weight may change places: within a row, within a group of inputs, or nowhere."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """Read the constraint as users write it.

        Args:
            text: without white space around it.

        Returns:
            The constraint, or None if the text is of another form.

        Raises:
            FistaPrunerError: the form is this one, but a value is out of range.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The text that :meth:`parse` reads as this constraint."""

    @property
    @abstractmethod
    def fraction(self) -> float:
        """Share of zeros, in [0, 1)."""

    @abstractmethod
    def zeros(self, rows: int, columns: int) -> int:
        """Exact number of zeros of a ``rows x columns`` operator."""

    def neighbours(self, reach: float) -> tuple[Constraint, ...]:
        """Return the patterns that an operator may have instead, from the densest to the sparsest.

        Args:
            reach: by how much of the weights a pattern may have more zeros than this one; fewer are always allowed.

        Returns:
            Them and this one; empty where there are none, or where :attr:`supports_allocation`.
        """
        return ()

    @abstractmethod
    def project(self, scores: Tensor, scope: Scope = "operator") -> Tensor:
        """Choose the weights to keep.

        Args:
            scores: (rows, columns) importance of each weight; larger is kept.
            scope: where scores compete, if the constraint leaves it open.

        Returns:
            (rows, columns) boolean mask with exactly :meth:`zeros` False entries.

        Raises:
            FistaPrunerError: the constraint does not fit the columns, or the scope is unknown.
        """

    @abstractmethod
    def satisfies(self, weight: Tensor) -> bool:
        """Return whether ``weight`` (rows, columns) has the zeros that the constraint asks for, or more.

        A mask of bytes, 0 where weights go, is taken as a weight.
        """

    def check(self, columns: int, name: str = "operator") -> None:
        """Refuse an operator whose inputs are not a multiple of the group length.

        Raises:
            FistaPrunerError: names the operator, its inputs and the constraint.
        """
        if columns % self.group_length:
            raise FistaPrunerError(
                f"pattern {self} does not fit {name}: its {columns} inputs are not a multiple of {self.group_length}"
            )

    def relaxed(self, scores: Tensor, share: float) -> Tensor:
        """Choose the weights to keep on the way from dense (share 0) to the constraint (share 1).

        Weights that the projection keeps stay; of all others the lowest scores of the operator go.

        Args:
            scores: (rows, columns) importance of each weight; larger is kept.
            share: share of the constraint's zeros, in [0, 1].

        Returns:
            (rows, columns) boolean mask with ``round(share * zeros)`` False entries.
        """
        zeros = round(share * self.zeros(*scores.shape))
        return keep_largest(scores.masked_fill(self.project(scores), torch.inf), scores.numel() - zeros)

    @property
    def group_length(self) -> int:
        """Consecutive inputs that are constrained together; 1 where there are no groups."""
        return 1

    @property
    def group_rows(self) -> int:
        """Consecutive outputs that are constrained together; 1 where there are no groups."""
        return 1

    @property
    def nm(self) -> tuple[int, int] | None:
        """(n, m) if all weights have an n:m pattern: for packing, permutation and sparse tensor cores."""
        return None

    def rows_independent(self, scope: Scope = "operator") -> bool:
        """Return whether each row of a projection depends on the scores of that row alone."""
        return False

    def rows_block(self, rows: int, columns: int, start: int, stop: int) -> Constraint:
        """Restrict the constraint of a ``rows x columns`` operator to rows ``start`` to ``stop``.

        Projecting the block with scope ``"row"`` gives these rows of the whole operator's mask. Defined where
        :meth:`rows_independent` is true of that scope.
        """
        return self

    @property
    def columnwise(self) -> bool:
        """Whether :meth:`project_columns` is defined: columns may be decided one block after another."""
        return self.group_length > 1

    def project_columns(self, scores: Tensor, start: int) -> Tensor:
        """Choose the weights to keep in some columns, all columns before them being decided.

        Args:
            scores: (rows, k) scores of columns ``start`` to ``start + k``, in whole groups.
            start: number of columns before these.

        Returns:
            (rows, k) boolean mask. The masks of blocks from left to right have :meth:`zeros` False entries together.
        """
        return self.project(scores)

    def threshold(self, rows: int, columns: int) -> Threshold:
        """Make a projection for use inside iterations, which may be faster than :meth:`project` and inexact.

        It works on columns in strided order: member i of group g is column ``i * columns / group_length + g``.
        """
        return ProjectedThreshold(self.project, self.group_length)


class Grouped(Constraint):
    """A constraint that keeps ``n`` of every ``m`` consecutive inputs of a row.

    Args:
        n: weights kept in every group.
        m: group length along the inputs.
    """

    n: int
    m: int

    @property
    def fraction(self) -> float:
        """Share of zeros, ``1 - n/m``."""
        return 1.0 - self.n / self.m

    def zeros(self, rows: int, columns: int) -> int:
        return rows * columns // self.m * (self.m - self.n)

    @property
    def group_length(self) -> int:
        """Inputs of a group, ``m``."""
        return self.m

    @property
    def nm(self) -> tuple[int, int]:
        return self.n, self.m
