"""Unstructured sparsity: a share of an operator's weights is zero, wherever they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..runtime.numerics import row_blocks
from .base import Constraint, Scope
from .selection import keep_largest
from .thresholds import SampledThreshold, Threshold


@dataclass(frozen=True)
class Unstructured(Constraint):
    """Zero ``round(share * rows * columns)`` weights of an operator, wherever they are.

    Args:
        share: share of weights that become zero, in [0, 1).
    """

    share: float

    forms: ClassVar[tuple[str, ...]] = ("a share (0.5)", "a percentage (50%)")
    supports_allocation: ClassVar[bool] = True
    zeros_suffice: ClassVar[bool] = True
    exchanges: ClassVar[Literal["row", "group"] | None] = "row"

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
        """Share of zeros."""
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
        if scope != "row":
            raise FistaPrunerError(f"scope {scope!r} is not known: 'operator' or 'row'")
        mask = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
        base, extra = divmod(zeros, rows)
        for block in row_blocks(rows):
            order = torch.sort(torch.nan_to_num(scores[block], nan=-math.inf), dim=1, stable=True).indices
            few = min(max(extra - block.start, 0), len(order))  # rows of this block with one zero more
            mask[block].scatter_(1, order[:, base:], True)
            mask[block][:few].scatter_(1, order[:few, base : base + 1], False)
        return mask

    def satisfies(self, weight: Tensor) -> bool:
        return weight.numel() - int(torch.count_nonzero(weight)) >= self.zeros(*weight.shape)

    def relaxed(self, scores: Tensor, share: float) -> Tensor:
        # The mask of the general definition, with one selection.
        return keep_largest(scores, scores.numel() - round(share * self.zeros(*scores.shape)))

    def rows_independent(self, scope: Scope = "operator") -> bool:
        return scope == "row"

    def rows_block(self, rows: int, columns: int, start: int, stop: int) -> Unstructured:
        base, extra = divmod(self.zeros(rows, columns), rows)
        zeros = base * (stop - start) + max(min(stop, extra) - start, 0)
        return self.of_counts(zeros, (stop - start) * columns)

    @property
    def columnwise(self) -> bool:
        return True

    def project_columns(self, scores: Tensor, start: int) -> Tensor:
        """Keep the highest scores of a block of columns.

        Its zeros are those of all columns so far less those of the columns before. Of ties the first column is kept.
        """
        rows, columns = scores.shape
        zeros = self.zeros(rows, start + columns) - self.zeros(rows, start)
        return keep_largest(scores.T, scores.numel() - zeros).T

    def threshold(self, rows: int, columns: int) -> Threshold:
        return SampledThreshold(self.zeros(rows, columns), rows, columns)
