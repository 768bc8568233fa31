"""Tell from a model's code how its checkpoint stores the operators."""

from __future__ import annotations

from ..errors import FistaPrunerError
from .architecture import build_model, checkpoint_names, find_decoder_layers
from .discovery import Operator, linear_modules
from .experts import separate_experts
from .files.checkpoint import Checkpoint


def stored_operators(checkpoint: Checkpoint) -> dict[str, Operator] | None:
    """Find the operators of the decoder layers, by the names of their stored weights.

    Tensors that hold the matrices of all experts are taken apart, and those matrices are among the operators. No weight
    is read, and no code of the checkpoint runs.

    Args:
        checkpoint: the checkpoint.

    Returns:
        The operators; None where the model cannot be built, or its tensors are not those of the checkpoint.
    """
    try:
        model = build_model(checkpoint)
        prefix, layers = find_decoder_layers(model)
        names = checkpoint_names(model, checkpoint, separate_experts(model, prefix, layers, checkpoint))
    except FistaPrunerError:
        return None
    return {
        names[f"{prefix}.{index}.{name}.weight"]: Operator.of(f"{prefix}.{index}.{name}", module)
        for index, layer in enumerate(layers)
        for name, module in linear_modules(layer)
    }
