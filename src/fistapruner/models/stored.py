"""Tell from a model's code how its checkpoint stores the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import FistaPrunerError
from .architecture import build_model, find_decoder_layers
from .discovery import linear_modules
from .experts import separate_experts
from .files.checkpoint import Checkpoint
from .layout import Operator
from .names import checkpoint_names, parameter_names, stored_names


@dataclass(frozen=True)
class StoredModel:
    """What the code of a model says of the tensors of its checkpoint.

    Args:
        operators: those of the decoder layers, by the names of their stored weights.
        parameters: names of the stored tensors that hold parameters, each shared one once; None where not all of the
            model's were found.
    """

    operators: dict[str, Operator]
    parameters: set[str] | None


def stored_model(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    same: Callable[[str, str], bool] | None = None,
) -> StoredModel | None:
    """Find the operators of the decoder layers, and the parameters, by the names of the stored tensors.

    Tensors that hold the matrices of all experts are taken apart, and those matrices are among the operators. No weight
    is read, but a tied head that is stored beside its embedding; and no code of the checkpoint runs.

    Args:
        checkpoint: the checkpoint.
        shapes: of a packed checkpoint's tensors, as they are when it is unpacked; None for one that is not packed.
        same: compares two tensors of a packed checkpoint.

    Returns:
        Both; None where the model cannot be built, or its tensors are not those of the checkpoint.
    """
    try:
        model = build_model(checkpoint, shapes=shapes)
        prefix, layers = find_decoder_layers(model)
        experts = separate_experts(model, prefix, layers, checkpoint, names=shapes)
        if shapes is None:
            names = checkpoint_names(model, checkpoint, experts)
        else:
            names = {**stored_names(model, list(shapes), skipped=experts), **experts}
        operators = operators_by_weight(prefix, layers, names.__getitem__)
        found = parameter_names(model, names, checkpoint, same or checkpoint.same)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        complete = all(name in names or name in tied for name, _ in model.named_parameters())
        return StoredModel(operators, found if complete else None)
    except (FistaPrunerError, KeyError):  # a weight without a stored name
        return None


def operators_by_weight(
    layers_name: str, layers: Iterable[nn.Module], stored: Callable[[str], str]
) -> dict[str, Operator]:
    """Return the operators of decoder layers, with their full names, by the names of their stored weights.

    Args:
        layers_name: name of the list of layers.
        layers: the layers; their weights may be on the meta device.
        stored: gives the name of a parameter in the checkpoint.
    """
    return {
        stored(f"{name}.weight"): Operator.of(name, module)
        for index, layer in enumerate(layers)
        for name, module in ((f"{layers_name}.{index}.{name}", module) for name, module in linear_modules(layer))
    }
