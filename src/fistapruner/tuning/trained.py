"""The trained tensors and the optimizer's state of all decoder layers of a pruned model.

Decoder layers are visited one at a time. A layer that is visited is loaded with the weights of the input checkpoint,
which are only read: masks and start values come from it. A trained tensor that was never updated is not kept anywhere,
since its start value can be made again. Everything goes by names of the checkpoint, so the order of visits does not
matter.

Several processes may divide the layers among them: layer l is kept, and takes its steps, on rank ``l mod size`` alone,
which sends its trained tensors to the others when the walks of a step come to it. So each holds its share of the
optimizer state, with the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..models.discovery import linear_modules, router_check
from ..models.files.low_rank import LowRankAdapter
from ..models.files.safetensors import LazyTensors, TensorEntry
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..recipes.training_settings import TrainingRecipe
from ..runtime.numerics import seeded
from ..runtime.ranks import ALONE, Ranks
from .adamw import adamw_step
from .forms import Hira, first_rate, form_of
from .masked import MaskedParameters, root_mean_square
from .states import FileStates, MemoryStates

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
        folder: keeps everything in files there, and one layer at a time in memory; None keeps it in memory. The bits
            are the same.
        low_rank: the low-rank part that belongs to the model, which stays as it is. ``model`` adds it to the weights
            that it loads from now on, but for the operators to train, whose values are the sum of both parts.
        ranks: the processes that divide the layers among them; alone, this one keeps all. All of them visit the same
            layers in the same order.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        layout: Layout,
        recipe: TrainingRecipe,
        folder: Path | None = None,
        low_rank: LowRankAdapter | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.form = form_of(recipe)
        self._pruned: list[set[str]] = []
        self._transposed: list[set[str]] = []
        self._sources: list[dict[str, str]] = []  # parameter inside the layer -> name in the checkpoint
        self._low_rank = low_rank.loaded(model.device) if low_rank is not None and folder is None else low_rank
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
        self._states = MemoryStates() if folder is None else FileStates(folder, model.device)
        self._steps = [0 for _ in model.layers]
        self._rates: list[dict[str, float]] = [{} for _ in model.layers]
        self._ranks = ranks
        self._visited: tuple[int, dict[str, Tensor]] = (-1, {})  # the layer that all have, and its trained tensors

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def divided(self) -> bool:
        """Whether several processes keep the layers, each its own."""
        return self._ranks.size > 1

    def owner(self, index: int) -> int:
        """Return the rank that keeps a layer."""
        return index % self._ranks.size

    def owns(self, index: int) -> bool:
        """Return whether this process keeps a layer."""
        return self.owner(index) == self._ranks.rank

    def _received(self, kind: str, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer on all processes, sent by the one that keeps them."""
        return self._ranks.send(self._states.get(kind, index), self.owner(index), self.model.device)

    def visit(self, index: int) -> None:
        """Receive the trained tensors of a layer, as all processes that divide the layers do."""
        if self.divided:
            self._visited = -1, {}  # freed before others take their place
            self._visited = index, self._received("trained", index)

    def values(self, index: int, layer: nn.Module) -> dict[str, Tensor]:
        """Return the trained parameters of a layer as the passes use them, by name inside the layer.

        They are rounded as the checkpoint will hold them, so the passes are those of the model that will be written.

        Args:
            index: number of the layer.
            layer: the loaded layer of the input checkpoint.
        """
        self.visit(index)
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

        Of the layer whose values were asked for last, where processes divide the layers.

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
        """Take one step of AdamW with the trained tensors of a layer, where it is kept.

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
        if not self.owns(index):
            return norms
        # Copied, since the best tensors may be these.
        masters = {name: tensor.clone() for name, tensor in self._states.get("trained", index).items()}
        parameters = self.parameters(index, layer, masters)
        firsts, seconds = self._states.get("first_moment", index), self._states.get("second_moment", index)
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
        self._states.put("first_moment", index, firsts)
        self._states.put("second_moment", index, seconds)
        return norms

    def result(self, index: int, layer: nn.Module) -> dict[str, Tensor]:
        """Return the changed tensors of a layer by checkpoint name, rounded once, in main memory.

        Zeros are those of the file that was read, and ``+0.0``.
        """
        if not self._states.lazy("trained", index):
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

    def digest(self) -> int:
        """Return a CRC-32 of the trained tensors that all processes hold, to compare these."""
        crc = 0
        for index in range(0 if self.divided else len(self)):
            for _, tensor in sorted(self._states.get("trained", index).items()):
                crc = zlib.crc32(tensor.contiguous().cpu().numpy().data, crc)
        return crc

    def rescalings(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (r, n) and B (m, r) of the operators that hira or spp train, by name in the model.

        Their effective weight is ``W * (1 + B A)``; where no step was kept B is 0. Other forms have none.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        form = self.form
        if not isinstance(form, Hira):
            return found
        for index, sources in enumerate(self._sources):
            self.visit(index)
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
            masters: trained tensors in place of the present ones, which processes that divide the layers have of the
                layer that they came to last (:meth:`visit`).
        """
        if masters is None and not self.divided:
            masters = self._states.get("trained", index)
        elif masters is None:
            visited, masters = self._visited
            if visited != index:
                raise ValueError(f"layer {index} is asked for after layer {visited} was visited")
        return MaskedParameters(
            {source: layer.get_parameter(name) for name, source in self._sources[index].items()},
            self._pruned[index],
            self.form,
            transposed=self._transposed[index],
            masters=masters,
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
        """Set the trained tensors of a layer that this process keeps; they are not copied."""
        self._states.put("trained", index, trained)

    def keep(self) -> None:
        """Remember the trained tensors as the best so far."""
        self._states.copy("trained", BEST, len(self))

    def restore(self) -> None:
        """Go back to the best trained tensors (the start, if none were kept), with new moments."""
        self._states.copy(BEST, "trained", len(self))
        self._steps = [0 for _ in self._steps]
        for kind in ("first_moment", "second_moment"):
            self._states.drop(kind, len(self))

    def kept(self, index: int) -> dict[str, Tensor]:
        """Return the trained tensors of a layer that this process keeps; none where none was updated."""
        return self._states.get("trained", index)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return everything that a snapshot holds, by names that do not depend on any order.

        Tensors are not copied; those in files are read one by one, as they are asked for, before the next step.
        Processes that divide the layers must all ask for all of them, in their order.
        """
        own = {
            (kind, index): self._states.lazy(kind, index)
            for kind in KINDS
            for index in range(len(self))
            if self.owns(index)
        }
        parts = self._ranks.gather({place: found.entries for place, found in own.items()})
        entries: dict[str, TensorEntry] = {}
        places: dict[str, tuple[str, int]] = {}
        for kind in KINDS:
            for index in range(len(self)):
                for name, entry in parts[self.owner(index)][kind, index].items():
                    full = f"{kind}/{name}"
                    entries[full], places[full] = replace(entry, name=full), (kind, index)
        entries[STEPS] = TensorEntry.of(STEPS, torch.int64, (len(self),))
        received: dict[tuple[str, int], Mapping[str, Tensor]] = {}

        def read(name: str) -> Tensor:
            if name == STEPS:
                return torch.tensor(self._steps)
            place = places[name]
            if self.divided and place not in received:
                received.clear()
                received[place] = self._received(*place)
            return (received if self.divided else own)[place][name.partition("/")[2]]

        return LazyTensors(entries, read)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned, copied, one layer at a time.

        Layers that another process keeps are left out.

        Raises:
            FistaPrunerError: a tensor that this recipe does not train.
        """
        owner = {source: index for index, sources in enumerate(self._sources) for source in sources.values()}
        found: dict[tuple[str, int], list[str]] = {}
        for full in tensors:
            kind, _, name = full.partition("/")
            index = owner.get(name, owner.get(name.rpartition(".")[0]))
            if kind in KINDS and index is not None:
                found.setdefault((kind, index), []).append(name)
            elif full != STEPS:
                raise FistaPrunerError(f"the snapshot's tensor {full!r} is not trained by this recipe")
        self._steps = [int(step) for step in tensors[STEPS]]
        for kind in KINDS:
            self._states.drop(kind, len(self))
        for (kind, index), names in found.items():
            if not self.owns(index):
                continue
            # Copied: products of tensors in a mapped file may round otherwise, since they are not aligned in memory.
            copies = {name: tensors[f"{kind}/{name}"].to(self.model.device, copy=True) for name in names}
            self._states.put(kind, index, copies)


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
