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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.discovery import linear_modules, router_check
from ..models.files.low_rank import LowRankAdapter
from ..models.layerwise import LayerwiseModel, hidden_of
from ..models.layout import Layout
from ..runtime.numerics import seeded
from ..settings.train import TrainingRecipe
from .loop import OURS, Descent

ITSELF = ""
"""Short name of a master that stands for the tensor itself."""

SHARE = 5e-4
"""First learning rate of ``full``, norms and biases, as a share of a tensor's root mean square at the start.

Measured with ``full`` on SmolLM2-135M, one window a step: 2e-3 is too high, 4e-4 and 5e-4 are equally good.
"""

LORA_RATE = 2e-3
"""First learning rate of ``lora`` (measured on SmolLM2-135M)."""


class Form(ABC):
    """Interface of a form."""

    @abstractmethod
    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Make the fp32 masters at the start, by short name.

        Args:
            weight: (m, n) pruned weight, fp32.
            generator: of the CPU, for random values.
        """

    @abstractmethod
    def weight(self, weight: Tensor, masters: Mapping[str, Tensor]) -> Tensor:
        """Compute the (m, n) effective weight, differentiable, from the pruned weight and the masters."""

    @abstractmethod
    def rate(self, columns: int) -> float | None:
        """Return the first learning rate for an operator with so many inputs; None is :data:`SHARE`."""


@dataclass(frozen=True)
class Full(Form):
    """Every surviving weight."""

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {ITSELF: weight.clone()}

    def weight(self, weight: Tensor, masters: Mapping[str, Tensor]) -> Tensor:
        return masters[ITSELF]

    def rate(self, columns: int) -> float | None:
        return None


@dataclass(frozen=True)
class Lora(Form):
    """A masked low-rank change.

    Args:
        rank: r; at most min(m, n) is used.
        scale: c.
    """

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
    if recipe.parameters == "spp":
        from ..papers.spp import Spp

        return Spp(recipe.rank, recipe.scale)
    return {"lora": Lora(recipe.rank, recipe.scale), "full": Full(), "norms": None}[recipe.parameters]


def descent_of(recipe: TrainingRecipe) -> Descent:
    """Return how the learning rate of a recipe changes, and AdamW's constants."""
    if recipe.zeroth_order:
        from ..papers.mezo import PUBLISHED

        return PUBLISHED
    if recipe.as_published:
        from ..papers.spp import PUBLISHED

        return PUBLISHED
    return OURS


class TrainedLayer(nn.Module):
    """A loaded decoder layer and the masters of what is trained in it.

    Args:
        layer: the layer, its parameters frozen.
        pruned: form of each pruned weight by its name inside the layer, and whether the layer holds it as (n, m).
        others: names inside the layer of tensors that are trained as they are.
        generator: makes the generator of a tensor's random start values from its name.
        added: adds a fixed low-rank part to an effective weight, by its name inside the layer; None adds nothing.
    """

    def __init__(
        self,
        layer: nn.Module,
        pruned: Mapping[str, tuple[Form, bool]],
        others: Iterable[str],
        generator: Callable[[str], torch.Generator],
        added: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.pruned, self._added = layer, dict(pruned), added
        self.masters = nn.ParameterDict()
        self.keys: dict[str, dict[str, str]] = {}
        for name in (*self.pruned, *others):
            exact = layer.get_parameter(name).detach().float()
            if name in self.pruned:
                started = self.pruned[name][0].start(self.matrix(name, exact), generator(name))
            else:
                started = {ITSELF: exact.clone()}
            self.keys[name] = {short: f"{name}/{short}".replace(".", "/") for short in started}
            for short, value in started.items():
                self.masters[self.keys[name][short]] = nn.Parameter(value.contiguous())

    def matrix(self, name: str, tensor: Tensor) -> Tensor:
        """Turn a pruned weight as the layer holds it into (m, n), and back."""
        return tensor.T if name in self.pruned and self.pruned[name][1] else tensor

    def start(self, name: str) -> Tensor:
        """Return a tensor as the layer holds it, (m, n) where it is pruned."""
        return self.matrix(name, whole(self.layer.get_parameter(name).detach()))

    def exact(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute one effective tensor, differentiable; a fixed low-rank part is left out.

        The pruned weight, and the masked product of lora, are in ``dtype``.
        """
        masters: dict[str, Tensor] = {short: whole(self.masters[key]) for short, key in self.keys[name].items()}
        if name not in self.pruned:
            return masters[ITSELF]
        weight: Tensor = self.pruned[name][0].weight(self.start(name).to(dtype), masters)
        return self.matrix(name, weight)

    def values(self) -> dict[str, Tensor]:
        """Compute all effective tensors as the passes use them, by name inside the layer."""
        found = {}
        for name in self.keys:
            dtype = self.layer.get_parameter(name).dtype
            if self._added is not None and name in self.pruned:
                found[name] = self._added(name, self.exact(name)).to(dtype)
            else:
                found[name] = self.exact(name, dtype).to(dtype)
        return found

    def forward(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the layer with its effective tensors: hidden states (batch, seqlen, width) in and out."""
        return hidden_of(torch.func.functional_call(self.layer, self.values(), (hidden, *args), kwargs))


class Masters:
    """Masters of one or several layers, and AdamW's state for them (Loshchilov & Hutter 2019).

    Args:
        parameters: the masters, by unique names.
        rates: first learning rate of each.
        masked: names of those whose zeros are kept by masking gradients.
        descent: AdamW's constants.
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
        self.optimizer = torch.optim.AdamW(groups, betas=self.descent.betas, fused=True) if groups else None

    def step(self, factor: float, scale: float = 1.0) -> float:
        """Take one step at ``factor`` times the first learning rates; gradients, ``scale`` times, are used up.

        Returns:
            The norm of the gradient. Where it is not finite, no step is taken.
        """
        for name, mask in self._masks.items():
            if (gradient := self.parameters[name].grad) is not None:
                local(gradient).mul_(mask)
        gradients = [each.grad for each in self.parameters.values() if each.grad is not None]
        for gradient in gradients if scale != 1.0 else ():
            gradient.div_(scale)
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if self.optimizer is not None:
            if math.isfinite(size):
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
            state = self.optimizer.state.get(each, {}) if self.optimizer is not None else {}
            found |= {f"{key}/{name}": value for key, value in state.items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned.

        Raises:
            FistaPrunerError: a tensor that is not trained here.
        """
        self._new_moments()
        for full in tensors:
            kind, _, name = full.partition("/")
            if name not in self.parameters:
                raise FistaPrunerError(f"the snapshot's tensor {full!r} is not trained by this recipe")
            parameter = self.parameters[name]
            if kind == "trained":
                parameter.copy_(tensors[full])
            elif kind == "best":
                self._best[name] = tensors[full].to(parameter.device, copy=True)
            elif self.optimizer is not None:
                value = tensors[full].clone()
                self.optimizer.state[parameter][kind] = value.to(parameter.device)


class Trained(Masters):
    """The masters of all decoder layers of a resident pruned model.

    Args:
        model: the pruned model, resident (:meth:`~fistapruner.models.layerwise_weights.LayerwiseWeights.resident`), or
            its decoder layers still to be loaded.
        layout: operators to train; others stay as they are.
        recipe: form, rates, seed.
        low_rank: the low-rank part that belongs to the model, which stays as it is.
        loaded: keeps the decoder layers loaded that are not yet.
        shard: divides each layer among several processes; None leaves it as it is.

    Attributes:
        numbers: how many are trained; of a masked tensor those that are not zero.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        layout: Layout,
        recipe: TrainingRecipe,
        low_rank: LowRankAdapter | None = None,
        loaded: ExitStack | None = None,
        shard: Callable[[TrainedLayer], None] | None = None,
    ) -> None:
        self.model, self.form = model, form_of(recipe)
        part = None if low_rank is None else low_rank.loaded(model.device)
        self.layers: list[TrainedLayer] = []
        parameters: dict[str, nn.Parameter] = {}
        rates: dict[str, float] = {}
        masked: list[str] = []
        self.numbers = 0
        self._sources: list[dict[str, str]] = []
        for index, layer in enumerate(model.layers):
            if loaded is not None:
                loaded.enter_context(model.layer(index))
            operators = layout.in_layer(index) if self.form else ()
            pruned = {f"{each.name}.weight": (self.form, each.transposed) for each in operators if self.form}
            others = sorted(vectors(layer, recipe.also))
            sources = {name: model.source_of(index, name) for name in (*pruned, *others)}

            def generator(name: str, sources: Mapping[str, str] = sources) -> torch.Generator:
                return seeded(recipe.seed, "start", sources[name])

            def added(name: str, value: Tensor, index: int = index, pruned: Mapping[str, Any] = pruned) -> Tensor:
                assert part is not None
                return part.added(model.full_name(index, name), value, transposed=pruned[name][1])

            trained = TrainedLayer(layer, pruned, others, generator, None if part is None else added)
            places = {
                f"{sources[name]}.{short}" if short else sources[name]: (name, short, key)
                for name, keys in trained.keys.items()
                for short, key in keys.items()
            }
            for full, (name, short, key) in places.items():
                master = trained.masters[key].detach()
                columns = trained.start(name).shape[-1] if name in pruned else None
                rates[full] = first_rate(recipe, self.form, columns, model.width, master)
                self.numbers += int((master != 0).sum()) if name in pruned and not short else master.numel()
            if shard is not None:
                shard(trained)
            parameters |= {full: trained.masters[key] for full, (_, _, key) in places.items()}
            masked += [full for full, (name, short, _) in places.items() if name in pruned and not short]
            self.layers.append(trained)
            self._sources.append(sources)
        super().__init__(parameters, rates, masked, descent_of(recipe))

    def run(self, index: int, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """Run decoder layer ``index`` with its effective tensors."""
        found: Tensor = self.layers[index](hidden, *call)
        return found

    @torch.no_grad()
    def result(self, index: int) -> dict[str, Tensor]:
        """Return the changed tensors of a layer by checkpoint name, on the CPU.

        They are rounded as the checkpoint stores them. Zeros are those of the file that was read, and ``+0.0``; a
        weight that would be rounded to 0 stays as it was.
        """
        found, layer = {}, self.layers[index]
        for name, source in self._sources[index].items():
            before = self.model.checkpoint.read(source)
            after = self.model.result(source, layer.exact(name).contiguous()).to(before.dtype)
            if name in layer.pruned:
                after = torch.where((before == 0) | (after == 0), before + 0.0, after)
            if not torch.equal(after, before):
                found[source] = after
        return found


def first_rate(recipe: TrainingRecipe, form: Form | None, columns: int | None, width: int, master: Tensor) -> float:
    """Compute the first learning rate of a master.

    ``lr: auto`` is the form's own rate, or :data:`SHARE` of the root mean square of what is trained; an alignment takes
    :attr:`~fistapruner.settings.train.TrainingRecipe.rate_share` of it. A given ``lr`` is absolute for
    low-rank masters and a share for all others; norms and biases beside low-rank masters take the share that stands to
    :data:`SHARE` as ``lr`` to the form's own rate.

    Args:
        recipe: settings.
        form: of the operators.
        columns: n of a pruned operator; None for norms and biases.
        width: n of a typical operator.
        master: start values.
    """
    own = None if form is None or columns is None else form.rate(columns)
    size = root_mean_square(master)
    if recipe.lr == "auto":
        return recipe.rate_share * (SHARE * size if own is None else own)
    if own is not None:
        return recipe.lr
    typical = None if form is None else form.rate(width)
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


def vectors(layer: nn.Module, also: tuple[str, ...]) -> set[str]:
    """Return the names of a decoder layer's vectors: biases of linear operators, and others, called norms.

    Those of routers are left out, as their weights are.

    Args:
        layer: the layer; its weights may be on the meta device.
        also: ``norms``, ``biases``.
    """
    biases = {f"{name}.bias" for name, module in linear_modules(layer) if module.bias is not None}
    routes = router_check(layer)
    found = {
        name
        for name, tensor in layer.named_parameters()
        if tensor.ndim <= 1 and tensor.is_floating_point() and not routes(name, tensor.numel())
    }
    return {name for name in found if ("biases" if name in biases else "norms") in also}
