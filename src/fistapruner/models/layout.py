"""Hold the linear operators of decoder layers, their groups and their execution order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError
from ..settings.parse import matches


@dataclass(frozen=True)
class Operator:
    """A linear operator of a decoder layer.

    Args:
        name: name inside the decoder layer, such as ``self_attn.q_proj``.
        rows: outputs m.
        columns: inputs n.
        transposed: stored as (n, m), as in GPT-2's ``Conv1D``.
        experts: of an expert's operator, the name of the module of all experts, such as ``mlp.experts``: the operator
            reads the tokens that are routed to its expert, and no others. Empty for all other operators.
    """

    name: str
    rows: int
    columns: int
    transposed: bool
    experts: str = ""

    @classmethod
    def of(cls, name: str, module: nn.Linear | Conv1D) -> Operator:
        """Describe a linear module."""
        transposed = isinstance(module, Conv1D)
        rows, columns = tuple(module.weight.shape)[:: -1 if transposed else 1]
        return cls(name, rows, columns, transposed)

    @property
    def expert(self) -> int:
        """Return the number of the expert that a routed operator belongs to."""
        return int(self.name.removeprefix(self.experts + ".").partition(".")[0])

    def weight(self, layer: nn.Module) -> Tensor:
        """Return an (m, n) view of the operator's weight in a loaded decoder layer."""
        weight = layer.get_submodule(self.name).weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight


Group = tuple[Operator, ...]
"""Operators that read the same tensor."""


class Selection(Protocol):
    """Settings that select operators by name or ``re:`` pattern."""

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def ignore(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class OutputProjection:
    """The operator whose output a child module of a decoder layer returns: ``o_proj`` of ``self_attn``.

    Args:
        operator: its name inside the decoder layer.
        others: number of None after the output in the tuple that the child returns; None where it returns no tuple.
    """

    operator: str
    others: int | None


@dataclass(frozen=True)
class Layout:
    """The prunable operators of every decoder layer of a model.

    Args:
        layers_name: name of the list of decoder layers, such as ``model.layers``.
        layers: groups of each decoder layer, in execution order.
        residual_writers: for each decoder layer, in execution order, the operators (selected or not) whose output is
            only added to the residual stream: ``self_attn.o_proj``, ``mlp.down_proj``. A mixture of experts is one of
            them as a whole: ``mlp``.
        output_projections: for each decoder layer, the last operator of its child modules, by the child's name.
        left_out: full names of the operators that targets and ignore leave out.
    """

    layers_name: str
    layers: tuple[tuple[Group, ...], ...]
    residual_writers: tuple[tuple[str, ...], ...]
    output_projections: tuple[Mapping[str, OutputProjection], ...]
    left_out: tuple[str, ...] = ()

    def full_name(self, index: int, inside: Operator | str) -> str:
        """Return the name in the model: ``model.layers.3.self_attn.q_proj``."""
        name = inside if isinstance(inside, str) else inside.name
        return f"{self.layers_name}.{index}.{name}"

    def in_layer(self, index: int) -> tuple[Operator, ...]:
        """Return the operators of one decoder layer, in order."""
        return tuple(operator for group in self.layers[index] for operator in group)

    def operators(self) -> list[tuple[str, Operator]]:
        """Return the full name and the operator of all operators, in order."""
        return [
            (self.full_name(index, operator), operator)
            for index in range(len(self.layers))
            for operator in self.in_layer(index)
        ]

    @property
    def transposed(self) -> bool:
        """Return whether an operator is stored as (n, m)."""
        return any(operator.transposed for _, operator in self.operators())

    def weights(self, index: int) -> int:
        """Count the weights of the operators of one decoder layer."""
        return sum(operator.rows * operator.columns for operator in self.in_layer(index))

    def select(self, recipe: Selection, purpose: str = "prune") -> Layout:
        """Select operators by the recipe's ``targets`` and ``ignore``.

        Args:
            recipe: names them.
            purpose: what is done with them, for messages.

        Raises:
            FistaPrunerError: a pattern matches no operator, or nothing is left to prune.
        """
        names = [name for name, _ in self.operators()]
        if not names:
            raise FistaPrunerError(f"{self.layers_name} has no operator to {purpose}")
        for key, patterns in (("targets", recipe.targets), ("ignore", recipe.ignore)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    raise FistaPrunerError(
                        f"{key}: {pattern!r} matches no operator; the first one is called {names[0]!r}"
                    )

        def chosen(name: str) -> bool:
            wanted = not recipe.targets or any(matches(name, pattern) for pattern in recipe.targets)
            return wanted and not any(matches(name, pattern) for pattern in recipe.ignore)

        left_out = tuple(name for name in names if not chosen(name))
        selected = replace(self.only(set(names).difference(left_out)), left_out=left_out)
        if not any(selected.layers):
            raise FistaPrunerError(f"targets and ignore leave no operator to {purpose}")
        return selected

    def only(self, names: Collection[str]) -> Layout:
        """Return the layout with the named operators only."""
        layers = []
        for index, groups in enumerate(self.layers):
            kept = (
                tuple(operator for operator in group if self.full_name(index, operator) in names) for group in groups
            )
            layers.append(tuple(group for group in kept if group))
        return replace(self, layers=tuple(layers))
