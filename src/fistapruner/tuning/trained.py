"""The trained tensors and the optimizer's state of all decoder layers of a pruned model.

Decoder layers are visited one at a time. A layer that is visited is loaded with the weights of the input checkpoint,
which are only read: masks and start values come from it. A trained tensor that was never updated is not kept anywhere,
since its start value can be made again. Everything goes by names of the checkpoint, so the order of visits does not
matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.discovery import linear_modules, router_check
from ..models.files.low_rank import LowRankAdapter
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..recipes.training_settings import TrainingRecipe
from ..runtime.numerics import seeded
from .adamw import adamw_step
from .forms import Hira, first_rate, form_of
from .masked import MaskedParameters, root_mean_square

BEST = "best"
KINDS = ("trained", "first_moment", "second_moment", BEST)
"""What is kept of each trained tensor: its value, AdamW's moments, its value at the best step."""

STEPS = "steps"
"""Name of the numbers of steps since the moments of each layer were zero."""


class Trained:
    """Trained tensors and optimizer state, layer by layer.

    Args:
        model: the pruned model.
        layout: operators to train; others stay as they are.
        recipe: form, optimizer, rates, seed.
        low_rank: the low-rank part that belongs to the model, which stays as it is. ``model`` adds it to the weights
            that it loads from now on, but for the operators to train, whose values are the sum of both parts.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        layout: Layout,
        recipe: TrainingRecipe,
        low_rank: LowRankAdapter | None = None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.form = form_of(recipe)
        self._pruned: list[set[str]] = []
        self._transposed: list[set[str]] = []
        self._sources: list[dict[str, str]] = []  # parameter inside the layer -> name in the checkpoint
        self._low_rank = None if low_rank is None else low_rank.loaded(model.device)
        for index, layer in enumerate(model.layers):
            operators = layout.in_layer(index) if self.form else ()
            chosen = {f"{operator.name}.weight" for operator in operators} | vectors(layer, recipe.also)
            sources = {name: model.source_of(index, name) for name, _ in layer.named_parameters() if name in chosen}
            self._sources.append(sources)
            self._pruned.append({sources[f"{operator.name}.weight"] for operator in operators})
            self._transposed.append(
                {sources[f"{operator.name}.weight"] for operator in operators if operator.transposed}
            )
        if low_rank is not None:
            model.low_rank = low_rank.without({name for name, _ in layout.operators()} if self.form else ())
        self._states: dict[tuple[str, int], dict[str, Tensor]] = {}  # by kind and layer
        self._steps = [0 for _ in model.layers]
        self._rates: list[dict[str, float]] = [{} for _ in model.layers]

    def __len__(self) -> int:
        return len(self._sources)

    def _state(self, kind: str, index: int) -> dict[str, Tensor]:
        """Return what is kept of a layer, by name; nothing where none of it was updated."""
        return self._states.setdefault((kind, index), {})

    def values(self, index: int, layer: nn.Module) -> dict[str, Tensor]:
        """Return the trained parameters of a layer as the passes use them, by name inside the layer.

        They are rounded as the checkpoint will hold them, so the passes are those of the model that will be written.

        Args:
            index: number of the layer.
            layer: the loaded layer of the input checkpoint.
        """
        return self.inside(index, self.parameters(index, layer).rounded(self.model.rounded))

    def inside(self, index: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors of a layer from names in the checkpoint to names inside it; low-rank parts are added."""
        found = {name: values[source] for name, source in self._sources[index].items()}
        if self._low_rank is not None:
            for name, source in self._sources[index].items():
                if source in self._pruned[index]:
                    transposed = source in self._transposed[index]
                    whole = self._low_rank.added(self.model.full_name(index, name), found[name], transposed=transposed)
                    found[name] = whole.to(found[name].dtype)
        return found

    def chain(self, index: int, layer: nn.Module, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn gradients with respect to :meth:`values` into those with respect to trained tensors.

        Args:
            index: number of the layer.
            layer: the loaded layer of the input checkpoint.
            gradients: by name inside the layer.
        """
        sources = self._sources[index]
        if not sources:
            return {}
        found = {sources[name]: gradient for name, gradient in gradients.items()}
        return self.parameters(index, layer).chain(found)

    def step(self, index: int, layer: nn.Module, gradients: Mapping[str, Tensor], factor: float) -> list[Tensor]:
        """Take one step of AdamW with the trained tensors of a layer.

        Args:
            index: number of the layer.
            layer: the loaded layer of the input checkpoint.
            gradients: of the step's loss with respect to the trained tensors (:meth:`chain`), in their order.
            factor: of the first learning rate: schedule and patience.

        Returns:
            The norm of each tensor's gradient, 0-dim fp64 on the device.
        """
        if not self._sources[index]:
            return []
        self._steps[index] += 1
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients.values()]
        # Copied, since the best tensors may be these.
        masters = {name: tensor.clone() for name, tensor in self._state("trained", index).items()}
        parameters = self.parameters(index, layer, masters)
        firsts, seconds = self._state("first_moment", index), self._state("second_moment", index)
        rates = self.rates(index, parameters)
        trained = {}
        for name, master in parameters.masters.items():
            gradient = gradients[name]
            for moments in (firsts, seconds):
                if name not in moments:
                    moments[name] = torch.zeros_like(gradient)
            adamw_step(
                master,
                gradient,
                firsts[name],
                seconds[name],
                self._steps[index],
                rates[name] * factor,
                self.recipe.betas,
                self.decay(index, parameters.origin[name]),
            )
            trained[name] = master.detach()
        self.replace(index, trained)
        return norms

    def result(self, index: int, layer: nn.Module) -> dict[str, Tensor]:
        """Return the changed tensors of a layer by checkpoint name, rounded once, in main memory.

        Zeros are those of the file that was read, and ``+0.0``.
        """
        if not self._state("trained", index):
            return {}
        found = {}
        for source, value in self.parameters(index, layer).rounded(self.model.rounded).items():
            before = self.model.checkpoint.read(source)
            after = self.model.result(source, value).to(before.dtype)
            if source in self._pruned[index]:
                # A weight of the file may be zero in the passes' dtype only.
                after = torch.where((before == 0) | (after == 0), before + 0.0, after)
            if not torch.equal(after, before):
                found[source] = after
        return found

    def describe(self, index: int, layer: nn.Module) -> tuple[int, list[float]]:
        """Count the trained numbers of a layer, and list their tensors' first learning rates."""
        if not self._sources[index]:
            return 0, []
        parameters = self.parameters(index, layer)
        numbers = sum(master.numel() for master in parameters.masters.values())
        return numbers, list(self.rates(index, parameters).values())

    def rescalings(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (r, n) and B (m, r) of the operators that hira or spp train, by name in the model.

        Their effective weight is ``W * (1 + B A)``; where no step was kept B is 0. Other forms have none.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        form = self.form
        if not isinstance(form, Hira):
            return found
        for index, sources in enumerate(self._sources):
            with self.model.layer(index) as layer:  # for the start, where no step was kept
                trained = self.parameters(index, layer).masters
            for name, source in sources.items():
                if source in self._pruned[index]:
                    factors = form.as_hira({short: trained[f"{source}.{short}"] for short in form.names})
                    operator = self.model.full_name(index, name.removesuffix(".weight"))
                    found[operator] = (factors["A"], factors["B"])
        return found

    def parameters(self, index: int, layer: nn.Module, masters: Mapping[str, Tensor] | None = None) -> MaskedParameters:
        """Return the masked parameters of a loaded layer, by names in the checkpoint.

        Args:
            index: number of the layer.
            layer: the loaded layer of the input checkpoint.
            masters: trained tensors in place of the present ones.
        """
        return MaskedParameters(
            {source: layer.get_parameter(name) for name, source in self._sources[index].items()},
            self._pruned[index],
            self.form,
            transposed=self._transposed[index],
            masters=self._state("trained", index) if masters is None else masters,
            generator=lambda name: seeded(self.recipe.seed, "start", name),
        )

    def rates(self, index: int, parameters: MaskedParameters) -> dict[str, float]:
        """Return the first learning rate of each trained tensor of a layer; computed once."""
        rates, starts = self._rates[index], parameters.starts()
        for name, source in parameters.origin.items() if not rates else ():
            if name == source:  # a weight or vector itself
                rates[name] = first_rate(self.recipe, None, self.model.width, root_mean_square(starts[source].float()))
            else:
                n = parameters.masks[source].shape[1]
                rates[name] = first_rate(self.recipe, n, self.model.width, (3 * n) ** -0.5)
        return rates

    def decay(self, index: int, source: str) -> float:
        """Return the weight decay of the trained tensors of a tensor: none for vectors."""
        return self.recipe.decay if source in self._pruned[index] else 0.0

    def replace(self, index: int, trained: Mapping[str, Tensor]) -> None:
        """Set the trained tensors of a layer; they are not copied."""
        self._states["trained", index] = dict(trained)

    def keep(self) -> None:
        """Remember the trained tensors as the best so far."""
        for index in range(len(self)):
            self._states[BEST, index] = dict(self._state("trained", index))

    def restore(self) -> None:
        """Go back to the best trained tensors (the start, if none were kept), with new moments."""
        best = [self._state(BEST, index) for index in range(len(self))]
        self._states = {(kind, index): dict(found) for kind in ("trained", BEST) for index, found in enumerate(best)}
        self._steps = [0 for _ in self._steps]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a snapshot holds, by names that do not depend on any order; not copied."""
        found = {
            f"{kind}/{name}": tensor
            for kind in KINDS
            for index in range(len(self))
            for name, tensor in self._state(kind, index).items()
        }
        return {**found, STEPS: torch.tensor(self._steps)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned, copied.

        Raises:
            FistaPrunerError: a tensor that this recipe does not train.
        """
        owner = {source: index for index, sources in enumerate(self._sources) for source in sources.values()}
        self._steps, self._states = [int(step) for step in tensors[STEPS]], {}
        for full in tensors:
            kind, _, name = full.partition("/")
            index = owner.get(name, owner.get(name.rpartition(".")[0]))
            if kind in KINDS and index is not None:
                # Copied: products of tensors in a mapped file may round otherwise, since they are not aligned.
                self._state(kind, index)[name] = tensors[full].to(self.model.device, copy=True)
            elif full != STEPS:
                raise FistaPrunerError(f"the snapshot's tensor {full!r} is not trained by this recipe")


def has_vectors(layers: Iterable[nn.Module], also: tuple[str, ...]) -> bool:
    """Return whether any decoder layer has :func:`vectors`."""
    return any(vectors(layer, also) for layer in layers)


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
