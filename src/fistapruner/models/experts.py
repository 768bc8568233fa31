"""Show the experts of a decoder layer as separate linear operators.

``transformers`` holds the matrices of all experts of a mixture in two tensors of three dimensions, (experts, m, n),
whatever the checkpoint has. :func:`separate_experts` replaces such a module by :class:`Experts`, in which every expert
has linear modules of its own; so what is done to linear modules, hooks and pruning among it, is done to experts.

The module's own activation joins the outputs of ``gate_proj`` and ``up_proj``. That both modules compute the same is
not believed but tried, with small random weights, before any work.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .files.checkpoint import Checkpoint, Stack
from .names import expert_sources, stored_names

PARTS = ("gate_proj", "up_proj")
"""Names of the two matrices that ``gate_up_proj`` joins, where the checkpoint has them apart."""


GROUPED_BYTES = 16
"""Bytes of which the rows of torch's ``grouped_mm`` must be a multiple."""

ROWS = 64
"""Products of an expert in low precision on the CPU have a multiple of so many rows."""


class ExpertLinear(nn.Linear):
    """A linear operator of an expert, whose number of tokens is another one in every batch.

    oneDNN keeps a program for every number of rows in low precision, of about 0.6 MiB: so zeros are added to make it
    one of few.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute the outputs (tokens, m) of the inputs (tokens, n)."""
        if input.device.type != "cpu" or input.dtype.itemsize != 2:
            return super().forward(input)
        return super().forward(functional.pad(input, (0, 0, 0, -len(input) % ROWS)))[: len(input)]


class Expert(nn.Module):
    """One expert: linear modules that read its tokens, an activation, and ``down_proj``.

    Args:
        fused: the module of ``transformers`` whose activation joins what the linear modules return.
        readers: (name, outputs, inputs) of these modules.
        down: (outputs, inputs) of ``down_proj``.
        biased: linear modules have a bias.
    """

    def __init__(
        self, fused: Any, readers: Sequence[tuple[str, int, int]], down: tuple[int, int], *, biased: bool
    ) -> None:
        super().__init__()
        self._fused: list[Any] = [fused]  # in a list: no submodule
        self._readers = [name for name, _, _ in readers]
        for name, outputs, inputs in readers:
            self.add_module(name, ExpertLinear(inputs, outputs, bias=biased, device="meta"))
        self.down_proj = ExpertLinear(down[1], down[0], bias=biased, device="meta")

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the expert's output (tokens, n)."""
        outputs = [self.get_submodule(name)(tokens) for name in self._readers]
        output: Tensor = self.down_proj(self.channels(outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)))
        return output

    @property
    def readers(self) -> tuple[str, ...]:
        """Return the names of the linear modules that read its tokens, in order."""
        return tuple(self._readers)

    def channels(self, outputs: Tensor) -> Tensor:
        """Compute the inputs of ``down_proj`` from the outputs of the readers; it takes no weights.

        Args:
            outputs: (tokens, rows) of all readers, beside one another.
        """
        (fused,) = self._fused
        channels: Tensor = fused._apply_gate(outputs) if fused.has_gate else fused.act_fn(outputs)
        return channels


class Experts(nn.Module):
    """The experts of one mixture, called with what the router has chosen.

    Every expert runs in every pass, in order, also where no token is routed to it (it then gets a batch of none): so
    each of its operators runs once.

    Args:
        fused: the module of ``transformers``.
        apart: the checkpoint has the parts of ``gate_up_proj`` apart.

    Attributes:
        skips: experts without tokens do not run; False at first.
        number: of the experts.
        width: n of what they return, that of the hidden states.
        transposed: ``transformers`` holds the matrices as (experts, inputs, outputs).
    """

    skips = False

    def __init__(self, fused: Any, *, apart: bool) -> None:
        super().__init__()
        shapes = {name: _matrix(fused, parameter) for name, parameter in fused.named_parameters() if parameter.ndim > 2}
        (first,) = (name for name in shapes if name != "down_proj")
        rows, columns = shapes[first]
        readers = [(name, rows // 2, columns) for name in PARTS] if apart else [(first, rows, columns)]
        self._signature = inspect.signature(type(fused).forward)
        self.number = len(fused.down_proj)
        self.width = shapes["down_proj"][0]
        self.transposed = bool(fused.is_transposed)
        for number in range(self.number):
            expert = Expert(fused, readers, shapes["down_proj"], biased=bool(fused.has_bias))
            self.add_module(str(number), expert)

    def experts(self) -> Iterator[tuple[int, Expert]]:
        """Yield (number, expert) of all experts in order."""
        for number in range(self.number):
            expert = self._modules[str(number)]
            assert isinstance(expert, Expert)
            yield number, expert

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Return the fused tensors of ``transformers``, and the linear modules whose weights each joins."""
        names = [name for name, _ in self.get_submodule("0").named_children()]
        apart = {"gate_up_proj": PARTS} if set(PARTS) <= set(names) else {}
        return {**apart, **{name: (name,) for name in names if not apart or name not in PARTS}}

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
            output = expert(inputs[rows])
            output = output * weights[rows, places, None]
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
    *,
    names: Collection[str] | None = None,
    fewer: bool = False,
) -> dict[str, str]:
    """Replace the fused experts of a model on the meta device by :class:`Experts`.

    Mixtures that are stored or called in another way are left as they are.

    Args:
        model: the model.
        layers_name: name of its list of decoder layers.
        layers: the decoder layers.
        checkpoint: where a tensor holds the matrices of all experts, it is taken apart
            (:attr:`~.checkpoint.Checkpoint.stacks`).
        names: of the stored tensors; None takes the checkpoint's, which packed ones are not among.
        fewer: the model may have fewer experts than the checkpoint.

    Returns:
        The stored name of every parameter of the new modules, by its name in the model.
    """
    from transformers.initialization import no_init_weights

    found = [
        (f"{layers_name}.{index}.{name}", layer, name, module)
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if _is_fused(module)
    ]
    if not found:
        return {}
    names = checkpoint.names() if names is None else names
    apart, whole = expert_sources(model, names), stored_names(model, names)
    sources: dict[str, str] = {}
    proved: set[tuple[type, bool]] = set()
    for full, layer, name, module in found:
        count, fused = len(module.down_proj), dict(module.named_parameters(recurse=False))
        parts = {key: apart.get(f"{full}.{key}", []) for key in fused}
        if all(f"{full}.{key}" in whole for key in fused):
            held = {key: whole[f"{full}.{key}"] for key in fused}
            if not all(_enough(checkpoint.entry(tensor).shape[0], count, fewer=fewer) for tensor in held.values()):
                continue
            own, separate = _whole_sources(module, full, held, checkpoint), False
        elif (
            not module.is_transposed
            and all(parts.values())
            and all(_enough(len(experts), count, fewer=fewer) for lists in parts.values() for experts in lists)
        ):
            own, separate = _apart_sources(full, parts), len(parts.get("gate_up_proj", ())) == len(PARTS)
        else:
            continue
        if (type(module), separate) not in proved:
            if not _computes_the_same(module, apart=separate):
                continue
            proved.add((type(module), separate))
        parent, _, last = name.rpartition(".")
        with no_init_weights():
            setattr(layer.get_submodule(parent), last, Experts(module, apart=separate))
        sources |= own
    return sources


def holds_experts(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Check that a parameter, by its shape and its names, holds a matrix of each of several experts.

    Args:
        module: that it belongs to.
        name: of the parameter in the model or decoder layer.
        parameter: the parameter.
    """
    return sum(size > 1 for size in parameter.shape) > 2 and "expert" in f"{type(module).__name__}.{name}".lower()


def run_unaligned_experts(model: Any) -> None:
    """Let experts run one by one where transformers' default refuses their widths; in place."""
    for name, module in model.named_modules():
        for key, tensor in module.named_parameters(recurse=False):
            bytes_of = (size * tensor.element_size() for size in tensor.shape[-2:])
            if holds_experts(module, f"{name}.{key}", tensor) and any(each % GROUPED_BYTES for each in bytes_of):
                model.set_experts_implementation("eager")
                return


def _enough(stored: int, count: int, *, fewer: bool) -> bool:
    return stored == count or (fewer and stored > count)


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


def _matrix(fused: Any, parameter: Tensor) -> tuple[int, int]:
    """Return (outputs, inputs) of one expert's part of a parameter."""
    _, rows, columns = parameter.shape
    return (columns, rows) if fused.is_transposed else (rows, columns)


def _apart_sources(full: str, parts: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, str]:
    """Name the stored matrices of experts that the checkpoint has one by one."""
    sources: dict[str, str] = {}
    for key, stored in parts.items():
        names = PARTS if len(stored) == len(PARTS) else (key,)
        for name, experts in zip(names, stored, strict=True):
            sources |= {f"{full}.{number}.{name}.weight": matrix for number, matrix in enumerate(experts)}
    return sources


def _whole_sources(module: Any, full: str, stored: Mapping[str, str], checkpoint: Checkpoint) -> dict[str, str]:
    """Take the stored tensors of all experts apart, and name their matrices and biases."""
    sources: dict[str, str] = {}
    for key, tensor in stored.items():
        bias = key.endswith("_bias")
        stack = Stack(tensor, transposed=bool(module.is_transposed) and not bias)
        name = f"{key.removesuffix('_bias')}.{'bias' if bias else 'weight'}"
        for number, part in enumerate(checkpoint.take_apart(stack)):
            sources[f"{full}.{number}.{name}"] = part
    return sources


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
