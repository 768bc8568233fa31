"""Show the experts of a decoder layer as separate linear operators.

``transformers`` holds the matrices of all experts of a mixture in two tensors of three dimensions, (experts, m, n),
whatever the checkpoint has. :func:`separate_experts` replaces such a module by :class:`Experts`, in which every expert
has linear modules of its own, after both have computed the same with small random weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checkpoint import Checkpoint, Stack
from .names import StoredNames

PARTS = ("gate_proj", "up_proj")
"""Names of the two matrices that ``gate_up_proj`` joins, where the checkpoint has them apart."""

GROUPED_BYTES = 16
"""Bytes of which the rows of torch's ``grouped_mm`` must be a multiple."""

ROWS = 64
"""Products of an expert in low precision on the CPU have a multiple of so many rows."""


class ExpertLinear(nn.Linear):
    """A linear operator of an expert; zeros make its number of tokens one of few, as oneDNN needs."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the outputs (tokens, m) of the inputs (tokens, n)."""
        if input.device.type != "cpu" or input.dtype.itemsize != 2:
            return super().forward(input)
        return super().forward(functional.pad(input, (0, 0, 0, -len(input) % ROWS)))[: len(input)]


class Expert(nn.Module):
    """One expert: linear modules that read its tokens, the activation of ``fused``, and ``down_proj``.

    ``shapes`` are (outputs, inputs) of the linear modules, by name; that of ``down_proj`` is the last one.
    """

    def __init__(self, fused: Any, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self._fused: list[Any] = [fused]  # in a list: no submodule
        self.readers = tuple(shapes)[:-1]  # names of the linear modules that read its tokens
        for name, (outputs, inputs) in shapes.items():
            self.add_module(name, ExpertLinear(inputs, outputs, bias=bool(fused.has_bias), device="meta"))

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the expert's output (tokens, n)."""
        outputs = [self.get_submodule(name)(tokens) for name in self.readers]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        output: Tensor = self.get_submodule("down_proj")(self.channels(joined))
        return output

    def channels(self, outputs: Tensor) -> Tensor:
        """Compute the inputs of ``down_proj`` from the outputs (tokens, rows) of all readers."""
        (fused,) = self._fused
        channels: Tensor = fused._apply_gate(outputs) if fused.has_gate else fused.act_fn(outputs)
        return channels


class Experts(nn.Module):
    """The experts of one mixture, called with the router's choice; each runs once, also on no token.

    With ``apart`` the checkpoint has the parts of ``gate_up_proj`` of the ``fused`` module apart.

    Attributes:
        skips: experts without tokens do not run; False at first.
        number: of the experts.
        width: n of what they return, that of the hidden states.
        transposed: ``transformers`` holds the matrices as (experts, inputs, outputs).
    """

    skips = False

    def __init__(self, fused: Any, *, apart: bool) -> None:
        super().__init__()
        turn = -1 if fused.is_transposed else 1
        whole = {name: tuple(each.shape[1:][::turn]) for name, each in fused.named_parameters() if each.ndim > 2}
        down = whole.pop("down_proj")
        shapes = {part: (rows // 2, columns) for rows, columns in whole.values() for part in PARTS} if apart else whole
        self._signature = inspect.signature(type(fused).forward)
        self.number = len(fused.down_proj)
        self.width = down[0]
        self.transposed = bool(fused.is_transposed)
        for number in range(self.number):
            self.add_module(str(number), Expert(fused, {**shapes, "down_proj": down}))

    def experts(self) -> Iterator[tuple[int, Expert]]:
        """Yield (number, expert) of all experts in order."""
        for number in range(self.number):
            yield number, cast(Expert, self._modules[str(number)])

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Return the fused tensors of ``transformers``, and the linear modules whose weights each joins."""
        readers = cast(Expert, self.get_submodule("0")).readers
        return {("gate_up_proj" if readers == PARTS else readers[0]): readers, "down_proj": ("down_proj",)}

    def routed(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return a call's (tokens, n) inputs, and the (tokens, k) chosen experts and their weights."""
        inputs, chosen, weights = list(self._signature.bind(self, *args, **kwargs).arguments.values())[1:4]
        return inputs, chosen, weights

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs, (tokens, n)."""
        inputs, chosen, weights = self.routed(*args, **kwargs)
        total: Tensor | None = None
        used = set(chosen.unique().tolist()) if self.skips else range(self.number)
        for number, expert in self.experts():
            if number not in used:
                continue
            rows, places = torch.where(chosen == number)
            output = expert(inputs[rows]) * weights[rows, places, None]
            if total is None:
                total = output.new_zeros(len(inputs), output.shape[-1])
            total = total.index_add(0, rows, output)  # a token is there at most once: the order of sums is fixed
        assert total is not None
        return total.to(inputs.dtype)


def separate_experts(
    model: Any,
    layers_name: str,
    layers: Sequence[nn.Module],
    checkpoint: Checkpoint,
    found: StoredNames,
    *,
    fewer: bool = False,
) -> dict[str, str]:
    """Replace the fused experts of a model on the meta device by :class:`Experts`.

    Mixtures that are stored or called in another way are left as they are.

    Where a stored tensor holds the matrices of all experts, the checkpoint takes it apart
    (:attr:`~.checkpoint.Checkpoint.stacks`). With ``fewer`` the model may have fewer experts than the checkpoint.
    Returns the stored names of the model's tensors, with those of the new modules.
    """
    from transformers.initialization import no_init_weights

    names, proved = dict(found.whole), dict[tuple[type, bool], bool]()
    for index, layer in enumerate(layers):
        for name, module in [(name, module) for name, module in layer.named_modules() if _is_fused(module)]:
            full = f"{layers_name}.{index}.{name}"
            stacks, matrices = _stored_matrices(module, full, checkpoint, found)
            counts, wanted = {len(experts) for experts in matrices.values()}, len(module.down_proj)
            if len(counts) != 1 or not (counts == {wanted} or (fewer and max(counts) > wanted)):
                continue
            kind = type(module), f"{PARTS[0]}.weight" in matrices
            if kind not in proved:
                proved[kind] = _computes_the_same(module, apart=kind[1])
            if not proved[kind]:
                continue
            for stack in stacks:
                checkpoint.take_apart(stack)
            with no_init_weights():
                layer.set_submodule(name, Experts(module, apart=kind[1]))
            for key, _ in module.named_parameters(recurse=False):
                names.pop(f"{full}.{key}", None)
            for part, experts in matrices.items():
                names |= {f"{full}.{number}.{part}": stored for number, stored in enumerate(experts)}
    return names


def _stored_matrices(
    fused: Any, full: str, checkpoint: Checkpoint, found: StoredNames
) -> tuple[list[Stack], dict[str, list[str]]]:
    """Find how a checkpoint has the experts of a fused module.

    The result is the tensors of all experts, and the stored matrices by parameter (``up_proj.weight``) and number of
    the expert; none where they are not found.
    """
    stacks, matrices = list[Stack](), dict[str, list[str]]()
    for key, _ in fused.named_parameters(recurse=False):
        part, end = key.removesuffix("_bias"), "bias" if key.endswith("_bias") else "weight"
        if (whole := found.whole.get(f"{full}.{key}")) is not None:
            stack = Stack(whole, transposed=bool(fused.is_transposed) and end == "weight")
            stacks.append(stack)
            lists = [[stack.part(number) for number in range(checkpoint.entry(whole).shape[0])]]
        else:
            lists = found.experts.get(f"{full}.{key}", [])
            lists = [[]] if fused.is_transposed or len(lists) not in (1, len(PARTS)) else lists
        linears = PARTS if len(lists) == len(PARTS) else (part,)
        matrices |= dict(zip((f"{linear}.{end}" for linear in linears), lists, strict=True))
    return stacks, matrices


def holds_experts(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Check that a parameter, by its shape and its names, holds a matrix of each of several experts."""
    return sum(size > 1 for size in parameter.shape) > 2 and "expert" in f"{type(module).__name__}.{name}".lower()


def run_unaligned_experts(model: Any) -> None:
    """Let experts run one by one where transformers' default refuses their widths; in place."""
    for name, module in model.named_modules():
        for key, tensor in module.named_parameters(recurse=False):
            bytes_of = (size * tensor.element_size() for size in tensor.shape[-2:])
            if holds_experts(module, f"{name}.{key}", tensor) and any(each % GROUPED_BYTES for each in bytes_of):
                model.set_experts_implementation("eager")
                return


def _is_fused(module: Any) -> bool:
    """Check that a module holds the matrices of experts in tensors of three dimensions, in the known way."""
    known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))
    if not known or getattr(module, "has_post_expert_norm", False):
        return False
    fused = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    first = "gate_up_proj" if module.has_gate else "up_proj"
    expected = {first: 3, "down_proj": 3}
    if module.has_bias:
        expected |= {f"{name}_bias": 2 for name in (first, "down_proj")}
    return fused == expected


def _computes_the_same(fused: Any, *, apart: bool) -> bool:
    """Compare a fused module with its :class:`Experts` on small random weights and a random routing."""
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(fused)
    small._parameters, small._modules = dict(fused._parameters), dict(fused._modules)
    width, inner, tokens, count = 8, 4, 12, len(fused.down_proj)
    sizes = {"gate_up_proj": (2 * inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    for name, parameter in fused.named_parameters(recurse=False):
        rows, columns = sizes[name.removesuffix("_bias")]
        shape = (columns, rows) if fused.is_transposed else (rows, columns)
        drawn = torch.randn(count, *(shape if parameter.ndim == 3 else (rows,)), generator=generator)
        small._parameters[name] = nn.Parameter(drawn, requires_grad=False)
    separate = Experts(small, apart=apart)
    for name, parameter in small.named_parameters(recurse=False):
        own = parameter.transpose(1, 2) if fused.is_transposed and parameter.ndim == 3 else parameter
        key = "bias" if name.endswith("_bias") else "weight"
        whole = name.removesuffix("_bias")
        for number, expert in separate.experts():
            names = PARTS if apart and whole == "gate_up_proj" else (whole,)
            for part, values in zip(names, own[number].chunk(len(names)), strict=True):
                expert.get_submodule(part)._parameters[key] = nn.Parameter(values.clone(), requires_grad=False)
    chosen = torch.rand(tokens, count, generator=generator).topk(min(2, count), -1).indices
    weights = torch.rand(chosen.shape, generator=generator)
    inputs = torch.randn(tokens, width, generator=generator)
    with torch.no_grad():
        expected, computed = small(inputs, chosen, weights), separate(inputs, chosen, weights)
    return bool(torch.allclose(expected, computed, rtol=1e-4, atol=1e-5))
