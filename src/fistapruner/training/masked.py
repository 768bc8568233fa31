"""Train parameters behind a mask: fp32 masters beside the loaded weights, every zero kept.

A *master* is an fp32 tensor that is trained. A *form* makes the effective weight of a pruned operator from its masters;
it is the pruned weight W at the start of training, and zero wherever W is. Two forms stand here, SPP's in
:mod:`fistapruner.papers.spp`:

=====  ======================  =====================  ==============================
form   effective weight        trained                start
=====  ======================  =====================  ==============================
full   V, zeros kept           V (m, n)               W
lora   W + c (BA) * (W != 0)   A (r, n), B (m, r)     A uniform in +-1/sqrt(n), B = 0
=====  ======================  =====================  ==============================

The zeros of ``full`` are kept by masking the gradients: AdamW without weight decay leaves an entry alone whose gradient
was always 0. Masked LoRA is in PERP (arXiv 2312.15230), SQFT (2410.03750) and LoRS (2501.08582).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import Call, LayerwiseModel, hidden_of
from ..models.low_rank import LowRankAdapter
from ..models.operators import Layout, router_check
from ..runtime.numerics import seeded
from ..settings.train import TrainingRecipe
from .loop import OURS, Descent

ITSELF = ""  # short name of a master that stands for the tensor itself

SHARE = 5e-4
"""First learning rate of ``full``, norms and biases, as a share of a tensor's root mean square at the start (measured
on SmolLM2-135M, one window a step: 2e-3 is too high, 4e-4 and 5e-4 are equally good)."""

LORA_RATE = 2e-3  # first learning rate of ``lora`` (measured on SmolLM2-135M)


@dataclass(frozen=True)
class Form:
    """A form of an operator; this one, ``full``, trains every surviving weight."""

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Make the fp32 masters of an (m, n) pruned weight, fp32, by short name; ``generator`` is of the CPU."""
        return {ITSELF: weight.clone()}

    def weight(self, weight: Tensor, masters: Mapping[str, Tensor]) -> Tensor:
        """Compute the (m, n) effective weight, differentiable, from the pruned weight and the masters."""
        return masters[ITSELF]

    def rate(self, columns: int) -> float | None:
        """Return the first learning rate for an operator with so many inputs; None is :data:`SHARE`."""
        return None


@dataclass(frozen=True)
class Lora(Form):
    """A masked low-rank change: rank r, at most min(m, n), and scale c."""

    rank: int
    scale: float

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        rank = min(self.rank, *weight.shape)
        return {"A": uniform(rank, weight, generator), "B": weight.new_zeros(len(weight), rank)}

    def weight(self, weight: Tensor, masters: Mapping[str, Tensor]) -> Tensor:
        change = masters["B"].to(weight.dtype) @ masters["A"].to(weight.dtype)
        return torch.addcmul(weight, change, weight.sign().abs_(), value=self.scale)

    def rate(self, columns: int) -> float | None:
        return LORA_RATE


def uniform(rank: int, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a (rank, n) matrix uniform in +-1/sqrt(n), as LoRA starts A of an (m, n) weight."""
    n = weight.shape[1]
    return torch.rand(rank, n, generator=generator).mul_(2).sub_(1).div_(math.sqrt(n)).to(weight)


def form_of(recipe: TrainingRecipe) -> Form | None:
    """Return the form of the operators that a recipe trains; None for norms and biases only."""
    from ..papers.spp import Spp

    if recipe.parameters in ("lora", "spp"):
        return (Lora if recipe.parameters == "lora" else Spp)(recipe.rank, recipe.scale)
    return Form() if recipe.parameters == "full" else None


def descent_of(recipe: TrainingRecipe) -> Descent:
    """Return how the learning rate of a recipe changes, and AdamW's constants."""
    from ..papers import mezo, spp

    return mezo.PUBLISHED if recipe.zeroth_order else spp.PUBLISHED if recipe.as_published else OURS


class TrainedLayer(nn.Module):
    """A loaded decoder layer and the masters of what is trained in it.

    ``pruned`` has the form of each pruned weight by its name inside the layer, and whether it is held as (n, m); with
    ``also`` the layer's :func:`vectors` are trained, too. A fixed low-rank part is added to effective weights.

    Attributes:
        forms: of all trained tensors, as ``pruned`` has them; vectors are trained as they are.
        masters: by key, a unique name with ``/`` for its dots; ``keys``: those of each tensor, by its name inside the
            layer and their short names; ``masked``: keys of those whose zeros are kept by masking gradients.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        index: int,
        pruned: Mapping[str, tuple[Form, bool]],
        also: bool = True,
        seed: int = 0,
        low_rank: LowRankAdapter | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.pruned, self._low_rank = model.layers[index], set(pruned), low_rank
        self.forms = {**pruned, **dict.fromkeys(sorted(vectors(self.layer)) if also else (), (Form(), False))}
        self._full = {name: model.full_name(index, name) for name in self.forms}
        self.masters, self.keys = nn.ParameterDict(), dict[str, dict[str, str]]()
        for name, (form, _) in self.forms.items():
            source, start = model.source_of(index, name), self.layer.get_parameter(name).detach().float()
            self.keys[name] = {}
            for short, master in form.start(self.matrix(name, start), seeded(seed, "start", source)).items():
                self.keys[name][short] = key = (f"{source}.{short}" if short else source).replace(".", "/")
                self.masters[key] = nn.Parameter(master.contiguous())
        self.masked = {self.keys[name][ITSELF] for name in pruned if ITSELF in self.keys[name]}

    def matrix(self, name: str, tensor: Tensor) -> Tensor:
        """Turn a pruned weight as the layer holds it into (m, n), and back."""
        return tensor.T if self.forms[name][1] else tensor

    def exact(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute one effective tensor without a fixed low-rank part; products of lora are in ``dtype``."""
        masters: dict[str, Tensor] = {short: whole(self.masters[key]) for short, key in self.keys[name].items()}
        start = self.matrix(name, whole(self.layer.get_parameter(name).detach()))
        return self.matrix(name, self.forms[name][0].weight(start.to(dtype), masters))

    def values(self) -> dict[str, Tensor]:
        """Compute all effective tensors as the passes use them, differentiable, by name inside the layer."""
        found = {}
        for name in self.keys:
            dtype = self.layer.get_parameter(name).dtype
            value = self.exact(name, torch.float32 if self._low_rank else dtype)
            if self._low_rank:
                value = self._low_rank.added(self._full[name], value, transposed=self.forms[name][1])
            found[name] = value.to(dtype)
        return found

    def forward(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the layer with its effective tensors: hidden states (batch, seqlen, width) in and out."""
        return hidden_of(torch.func.functional_call(self.layer, self.values(), (hidden, *args), kwargs))


def trained_layer(
    model: LayerwiseModel, layout: Layout, index: int, recipe: TrainingRecipe, low_rank: LowRankAdapter | None = None
) -> TrainedLayer:
    """Make the masters of a decoder layer that a recipe wants; without values where it has no weights."""
    form = form_of(recipe)
    pruned = {f"{each.name}.weight": (form, each.transposed) for each in layout.in_layer(index)} if form else {}
    return TrainedLayer(model, index, pruned, not recipe.as_published, recipe.seed, low_rank)


class Masters:
    """Masters of one or several layers by unique names, and AdamW's state (Loshchilov & Hutter 2019).

    ``rates`` are first learning rates; the zeros of those named in ``masked`` are kept by masking gradients.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        masked: Iterable[str],
        descent: Descent = OURS,
    ) -> None:
        self.parameters, self.rates, self.descent = dict(parameters), dict(rates), descent
        self._masks = {name: local(self.parameters[name]) != 0 for name in masked}
        self._best: dict[str, Tensor] = {}
        self._new_moments()

    def _new_moments(self) -> None:
        groups = [
            {"params": [each], "name": name, "weight_decay": self.descent.decay if each.ndim > 1 else 0.0}
            for name, each in self.parameters.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=self.descent.betas, fused=True)

    def step(self, factor: float) -> float:
        """Take a step at ``factor`` times the first rates, unless the returned gradient norm is not finite."""
        for name, mask in self._masks.items():
            if (gradient := self.parameters[name].grad) is not None:
                local(gradient).mul_(mask)
        gradients = [each.grad for each in self.parameters.values() if each.grad is not None]
        if math.isfinite(size := float(whole(torch.nn.utils.get_total_norm(gradients)))):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[group["name"]] * factor
            self.optimizer.step()
        self.optimizer.zero_grad()
        return size

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the masters as the best so far."""
        self._best = {name: each.detach().clone() for name, each in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best masters, with new moments."""
        for name, value in self._best.items():
            local(self.parameters[name]).copy_(local(value))
        self._new_moments()

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a snapshot holds, by name: masters, moments, the best masters."""
        found = {f"trained/{name}": each.detach() for name, each in self.parameters.items()}
        found |= {f"best/{name}": value for name, value in self._best.items()}
        for name, each in self.parameters.items():
            found |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(each, {}).items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned."""
        self._new_moments()
        for full in tensors:
            kind, _, name = full.partition("/")
            parameter = self.parameters[name]
            if kind == "trained":
                parameter.copy_(tensors[full])
            elif kind == "best":
                self._best[name] = tensors[full].to(parameter.device, copy=True)
            else:
                self.optimizer.state[parameter][kind] = tensors[full].clone().to(parameter.device)


class Trained(Masters):
    """The masters of all decoder layers of a resident pruned model, as a recipe wants them.

    Operators outside of ``layout`` stay as they are, and so does the low-rank part that belongs to the model.
    ``prepare`` loads a decoder layer; ``shard`` divides it among several processes. ``numbers`` counts what is trained:
    of a masked tensor what is not zero.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        layout: Layout,
        recipe: TrainingRecipe,
        low_rank: LowRankAdapter | None = None,
        prepare: Callable[[int], Any] = lambda index: None,
        shard: Callable[[TrainedLayer], Any] = lambda layer: None,
    ) -> None:
        self.model, self.layers, self.numbers = model, list[TrainedLayer](), 0
        part, form = None if low_rank is None else low_rank.loaded(model.device), form_of(recipe)
        typical = form.rate(model.width) if form else None
        parameters, rates, masked = dict[str, nn.Parameter](), dict[str, float](), set[str]()
        for index in range(len(model)):
            prepare(index)
            layer = trained_layer(model, layout, index, recipe, part)
            for name, keys in layer.keys.items():
                columns = layer.matrix(name, layer.layer.get_parameter(name)).shape[-1]
                own = layer.forms[name][0].rate(columns)
                for key in keys.values():
                    master = layer.masters[key].detach()
                    rates[key] = first_rate(recipe, own, typical, master)
                    self.numbers += int((master != 0).sum()) if key in layer.masked else master.numel()
            shard(layer)  # which replaces the parameters
            parameters |= dict(layer.masters.items())
            masked |= layer.masked
            self.layers.append(layer)
        super().__init__(parameters, rates, masked, descent_of(recipe))

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Run decoder layer ``index`` with its effective tensors."""
        found: Tensor = self.layers[index](hidden, *call)
        return found

    def result(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the changed tensors, as :func:`changes`."""
        values = (
            (self.model.source_of(index, name), layer.exact(name).contiguous(), name in layer.pruned)
            for index, layer in enumerate(self.layers)
            for name in layer.keys
        )
        return changes(self.model, values)


@torch.no_grad()
def changes(model: LayerwiseModel, values: Iterable[tuple[str, Tensor, bool]]) -> Iterator[tuple[str, Tensor]]:
    """Yield those (checkpoint name, tensor, is pruned) that differ, on the CPU, rounded as stored.

    Zeros are those of the file that was read, and ``+0.0``; a weight that would be rounded to 0 stays as it was.
    """
    for source, value, pruned in values:
        before = model.checkpoint.read(source)
        after = model.result(source, value).to(before.dtype)
        if pruned:
            after = torch.where((before == 0) | (after == 0), before + 0.0, after)
        if not torch.equal(after, before):
            yield source, after


def first_rate(recipe: TrainingRecipe, own: float | None, typical: float | None, master: Tensor) -> float:
    """Compute the first learning rate of a master from its start values.

    ``own`` is the rate of the operator's form (:meth:`Form.rate`), ``typical`` that of a typical operator. A given
    ``lr`` is absolute for low-rank masters, and a share of the root mean square for others; norms and biases beside
    low-rank masters take :data:`SHARE` times ``lr / typical``. Of ``lr: auto`` an alignment takes a share.
    """
    size = root_mean_square(master)
    if recipe.lr == "auto":
        return recipe.rate_share * (SHARE * size if own is None else own)
    if own is not None:
        return recipe.lr
    return recipe.lr * size if typical is None else recipe.lr / typical * SHARE * size


def root_mean_square(tensor: Tensor) -> float:
    """Compute the root mean square of a tensor over its values that are not zero; 0 without any."""
    return float((tensor.square().sum() / (tensor != 0).sum().clamp_min(1)).sqrt())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be divided among processes as a whole; then all of them must ask for it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return part


def vectors(layer: nn.Module) -> set[str]:
    """Return the names of a decoder layer's norms and biases, but for those of routers."""
    routes = router_check(layer)
    tensors = layer.named_parameters()
    return {n for n, each in tensors if each.ndim <= 1 and each.is_floating_point() and not routes(n, each.numel())}
