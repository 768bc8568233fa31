"""Find the linear operators of decoder layers, their groups and their execution order.

No architecture is listed by name: one small batch runs through one decoder layer with hooks on its modules. Operators
that read the same tensor form a group (q, k, v; gate, up) and are solved together. Groups are in execution order,
which is the order of intra-layer error correction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError
from ..settings.parse import matches
from .experts import Experts
from .layers import Call, LayerwiseModel

if TYPE_CHECKING:
    from ..settings.prune import Recipe
    from ..settings.train import TrainingRecipe


@dataclass(frozen=True)
class Operator:
    """A linear operator of a decoder layer.

    Args:
        name: name inside the decoder layer, such as ``self_attn.q_proj``.
        rows: outputs m; ``columns``: inputs n.
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


@dataclass(frozen=True)
class OutputProjection:
    """The operator whose output a child module of a decoder layer returns: ``o_proj`` of ``self_attn``.

    After the output, the child returns a tuple with so many ``others``, which are None; None where it is no tuple.
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
        layers = range(len(self.layers))
        return [(self.full_name(index, each), each) for index in layers for each in self.in_layer(index)]

    @property
    def transposed(self) -> bool:
        """Return whether an operator is stored as (n, m)."""
        return any(operator.transposed for _, operator in self.operators())

    def weights(self, index: int) -> int:
        """Count the weights of the operators of one decoder layer."""
        return sum(operator.rows * operator.columns for operator in self.in_layer(index))

    def select(self, recipe: Recipe | TrainingRecipe, purpose: str = "prune") -> Layout:
        """Select operators by the recipe's ``targets`` and ``ignore``; ``purpose`` is what is done with them."""
        names = [name for name, _ in self.operators()]
        matched: dict[str, set[str]] = {"targets": set(), "ignore": set()}
        fault = None if names else f"{self.layers_name} has no operator to {purpose}"
        for key, patterns in (("targets", recipe.targets), ("ignore", recipe.ignore)):
            for pattern in patterns if names else ():
                if not (found := {name for name in names if matches(name, pattern)}):
                    fault = fault or f"{key}: {pattern!r} matches no operator; the first one is called {names[0]!r}"
                matched[key] |= found
        kept = (matched["targets"] if recipe.targets else set(names)) - matched["ignore"]
        if fault is None and not kept:
            fault = f"targets and ignore leave no operator to {purpose}"
        if fault:
            raise FistaPrunerError(fault)
        return replace(self.only(kept), left_out=tuple(name for name in names if name not in kept))

    def only(self, names: Collection[str]) -> Layout:
        """Return the layout with the named operators only."""
        layers = []
        for index, groups in enumerate(self.layers):
            kept = (tuple(each for each in group if self.full_name(index, each) in names) for group in groups)
            layers.append(tuple(group for group in kept if group))
        return replace(self, layers=tuple(layers))


NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num")
"""Attributes of modules that hold the number of their decoder layer."""

ALIKE = 1e-3
"""Largest relative squared difference of outputs that differ in the order of summation only."""

UNUSED = {"expert": " (a mixture of experts)", "cross": " (cross-attention)", "encoder_attn": " (cross-attention)"}
"""Reasons why an operator does not run exactly once in a pass over text, by a part of its name."""


def discover(model: LayerwiseModel) -> Layout:
    """Find the operators of every decoder layer with hooks in one small forward pass.

    Layers with the same operators are run once. Loads the embeddings, then one decoder layer at a time.
    """
    model.check()
    with model.failures_explained():
        hidden, calls = model.probe()
    known: dict[Any, Any] = {}
    found = []
    for index, layer in enumerate(model.layers):
        signature = tuple((name, tuple(module.weight.shape)) for name, module in linear_modules(layer))
        if signature not in known:
            with model.failures_explained():
                known[signature] = _watch(model, index, hidden, calls[index])
        found.append(known[signature])
    return Layout(model.layers_name, *zip(*found, strict=True))


def linear_modules(layer: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    """Return the name and module of every linear operator in a decoder layer; routers are none."""
    routes = router_check(layer)
    return [
        (name, module)
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not routes(name, Operator.of(name, module).rows)
    ]


def layer_signature(layer: nn.Module) -> Any:
    """Describe modules, shapes and plain attributes of a decoder layer, but for its number."""
    parts = []
    for name, module in layer.named_modules():
        shapes = {key: tuple(value.shape) for key, value in module._parameters.items() if value is not None}
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        kept = tuple((key, value) for key, value in plain.items() if key not in NUMBERS)
        parts.append((name, type(module), tuple(shapes.items()), kept))
    return tuple(parts)


def router_check(layer: nn.Module) -> Callable[[str, int], bool]:
    """Return a check, by name and outputs, for what routes or weighs a decoder layer's experts.

    It stands beside the experts, is no MLP (which leads from another width back to that of the hidden states), and has
    no more outputs than there are experts. Beside experts at the root of the layer (Gemma 4) stand attention and MLP,
    too: there it is what is called a router, whole, or a gate with as many outputs.
    """
    mixtures = []
    for name, experts in expert_modules(layer).items():
        block, mlps = name.rpartition(".")[0], set()
        for child, module in layer.get_submodule(block).named_children():
            parts = [Operator.of(child, part) for part in module.modules() if isinstance(part, (nn.Linear, Conv1D))]
            if any(part.rows == experts.width != part.columns for part in parts):
                mlps.add(child)
        mixtures.append((block, mlps, experts.number))

    def routes(name: str, outputs: int) -> bool:
        for block, mlps, number in mixtures:
            if block and not name.startswith(f"{block}."):
                continue
            child, _, _ = name.removeprefix(f"{block}.").partition(".")
            gate = child not in mlps and outputs in (1, number) and (block or "gate" in child)
            if gate or (not block and "router" in child):
                return True
        return False

    return routes


def expert_modules(layer: nn.Module) -> dict[str, Experts]:
    """Return the modules of experts in a decoder layer, by name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, Experts)}


def alike(a: Tensor, b: Tensor, most: float = ALIKE) -> bool:
    """Check whether two tensors of one shape are equal up to the order of summation, at any precision."""
    a, b = a.float(), b.float()
    return float((a - b).square().sum()) <= most * float(a.square().sum())


def _watch(
    model: LayerwiseModel, index: int, hidden: Tensor, call: Call
) -> tuple[tuple[Group, ...], tuple[str, ...], Mapping[str, OutputProjection]]:
    """Find the groups, residual writers and output projections of decoder layer ``index``."""
    seen: list[tuple[str, Tensor]] = []
    answers: dict[str, Tensor] = {}
    returned: dict[str, Tensor] = {}  # not copies: while they are alive, their addresses differ
    projections: dict[str, OutputProjection] = {}

    def entered(name: str, _: object, args: tuple[Tensor, ...]) -> None:
        seen.append((name, args[0]))

    def answered(name: str, _: object, __: object, output: Any) -> None:
        if isinstance(output, Tensor):
            answers[name], returned[name] = output.clone(), output

    def child_answered(child: str, _: object, __: object, output: Any) -> None:
        others = len(output) - 1 if isinstance(output, tuple) else None
        value = output if others is None else output[0]
        nothing_else = others is None or all(other is None for other in output[1:])
        if not isinstance(value, Tensor) or value.shape[:-1] != hidden.shape[:-1] or not nothing_else:
            return
        for name, own in returned.items():
            same = name.startswith(child + ".") and own.data_ptr() == value.data_ptr() and own.shape == value.shape
            if same and torch.equal(answers[name], value):
                projections[child] = OutputProjection(name, others)

    def run() -> Tensor:
        return model.run(index, hidden.clone(), call)

    writers: tuple[str, ...] = ()
    with model.layer(index) as layer:
        operators = linear_modules(layer)
        # Modules that hold a mixture whole: router, experts, shared experts; experts at the root are their own.
        blocks = list({name.rpartition(".")[0] or name: None for name in expert_modules(layer)})
        with ExitStack() as hooks, torch.no_grad():
            for name, module in operators:
                hooks.enter_context(module.register_forward_pre_hook(partial(entered, name)))
                hooks.enter_context(module.register_forward_hook(partial(answered, name)))
            for name in blocks:
                hooks.enter_context(layer.get_submodule(name).register_forward_hook(partial(answered, name)))
            for name, child in layer.named_children():
                hooks.enter_context(child.register_forward_hook(partial(child_answered, name)))
            out = run()
        if len({name for name, _ in seen}) == len(seen):
            inside = tuple(block + "." for block in blocks)
            outer = {name: value for name, value in answers.items() if not name.startswith(inside)}
            writers = _residual_writers(layer, hidden, outer, out, run)
        fired = [name for name, _ in seen]
        # A recurrence may multiply by a module's weight and not call it: then it is no operator, and stays dense.
        dense = {name for name, module in operators if name not in fired and _is_read(module, run)}
    for name, _ in operators:
        if fired.count(name) != 1 and name not in dense:
            cause = next((cause for part, cause in UNUSED.items() if part in name.lower()), "")
            times = f"ran {fired.count(name)} times in one forward pass{cause}, and not once"
            raise model.unsupported(f"{model.layers_name}.{index}.{name} {times}")
    return _groups(layer, seen), writers, projections


def _groups(layer: nn.Module, seen: list[tuple[str, Tensor]]) -> tuple[Group, ...]:
    """Group operators by what they read; ``seen`` are their names and inputs, in execution order."""
    mixtures = expert_modules(layer)
    groups: list[tuple[Tensor, list[Operator]]] = []
    for name, tensor in seen:
        within = next((mixture for mixture in mixtures if name.startswith(mixture + ".")), "")
        module: Any = layer.get_submodule(name)
        operator = replace(Operator.of(name, module), experts=within)
        for other, members in groups:
            # Both tensors are alive, so equal addresses and shapes mean the same values. Those of experts without
            # tokens have no address.
            if other is tensor or (other.data_ptr() == tensor.data_ptr() != 0 and other.shape == tensor.shape):
                members.append(operator)
                break
        else:
            groups.append((tensor, [operator]))
    return tuple(tuple(members) for _, members in groups)


def _is_read(module: nn.Module, run: Callable[[], Tensor]) -> bool:
    """Check whether NaN in a module's weight reach the output of its decoder layer: it is read."""
    weight = module.get_parameter("weight")
    kept = weight.detach().clone()
    with torch.no_grad():
        try:
            weight.fill_(float("nan"))
            return bool(run().isnan().any())
        finally:
            weight.copy_(kept)


def _residual_writers(
    layer: nn.Module, hidden: Tensor, answers: dict[str, Tensor], out: Tensor, run: Callable[[], Tensor]
) -> tuple[str, ...]:
    """Find the operators whose output is only added to the residual stream; none if more is added.

    Noise on such an output, with the outputs of later operators fixed, appears unchanged in the layer's output.
    ``answers`` are the operators' outputs, in execution order.
    """
    found = []
    names = list(answers)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    noise *= out.float().square().mean().sqrt().to(out)
    for place, name in enumerate(names):
        if answers[name].numel() != out.numel() or answers[name].shape[-1] != out.shape[-1]:
            continue
        more = {name: answers[name] + noise.reshape(answers[name].shape)}
        more |= {later: answers[later] for later in names[place + 1 :]}
        with ExitStack() as hooks, torch.no_grad():
            for key, value in more.items():
                module = layer.get_submodule(key)
                hooks.enter_context(module.register_forward_hook(lambda *_, value=value: value.clone()))
            moved = run()
        if alike(out.float() + noise.float(), moved):
            found.append(name)
    total = hidden.float() + sum(answers[name].reshape(out.shape).float() for name in found)
    return tuple(found) if alike(out, total) else ()


def operators_by_weight(model: LayerwiseModel) -> dict[str, Operator]:
    """Return the operators of all decoder layers, with full names, by the names of their stored weights."""
    return {
        model.source(f"{full}.weight"): Operator.of(full, module)
        for index, layer in enumerate(model.layers)
        for full, module in ((model.full_name(index, name), module) for name, module in linear_modules(layer))
    }
