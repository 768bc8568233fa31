"""Build a checkpoint's architecture without weights, find its decoder layers, or refuse it.

Nothing is listed by architecture: the model class comes from ``config.json``, and decoder layers are found by their
number and size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError, NoTemporaryFolderError, needs_code, one_line
from ..runtime.files import copy_atomic, temporary_folder, write_json_atomic
from ..runtime.show import shell_line
from .experts import holds_experts, separate_experts
from .files.checkpoint import Checkpoint
from .files.folder_files import PACKED_KEYS, PACKED_RECORD, read_json_in
from .files.widths import QUANT_METHOD, read_widths
from .files.writer import merge_patch
from .names import stored_names

LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
"""What configs call the longest text that a model was made for."""

BUILT_IN = {"_attn_implementation": ("eager", "sdpa"), "_experts_implementation": ("eager", "batched_mm", "grouped_mm")}
"""What a config may name for attention and experts; anything else is as if it named nothing."""


def auto_class(config: Any) -> Any:
    """Return the class of ``transformers`` that builds and loads the language model of a config.

    That is ``AutoModelForImageTextToText`` for a model of images and text that is no causal language model besides,
    and ``AutoModelForCausalLM`` for all others.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal, wrapper = AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping  # semi-private
    only_wrapper = type(config) in wrapper and type(config) not in causal
    return AutoModelForImageTextToText if only_wrapper else AutoModelForCausalLM


def auto_class_name(architecture: str) -> str:
    """Return the name of :func:`auto_class` for a model class, by its name in ``transformers``."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    wrapper = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    only_wrapper = architecture in wrapper and architecture not in causal
    return "AutoModelForImageTextToText" if only_wrapper else "AutoModelForCausalLM"


def needs_own_code(config: Mapping[str, Any]) -> bool:
    """Check whether a language model is built only with Python code that its config names."""
    from transformers.models.auto import modeling_auto

    known = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return isinstance(config.get("auto_map"), Mapping) and not any(
        str(config.get("model_type")) in table for table in known
    )


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the config of a model, so that attention and experts are computed by built-in code.

    A config may name other code than that of transformers, which the hub has or which needs a package and a GPU. It may
    also ask for what the routers of mixtures return, for a loss of training, which layers that run alone do not give.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    _leave_out(config)
    return config


def _leave_out(config: Any) -> None:
    for name, known in BUILT_IN.items():
        if getattr(config, name, None) not in (None, *known):
            setattr(config, name, None)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            _leave_out(part)


def build_model(
    checkpoint: Checkpoint,
    *,
    trust_remote_code: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Build a checkpoint's language model, with its vision tower, without weights on the meta device.

    Args:
        checkpoint: the checkpoint.
        trust_remote_code: run Python code that comes with it.
        shapes: of a packed checkpoint's tensors, as they are when it is unpacked; None refuses a packed one.
        dtype: of its parameters; None takes the config's.

    Raises:
        FistaPrunerError: ``config.json`` describes no decoder-only model with plain weights, or needs code that was
            not trusted.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    folder = checkpoint.folder
    try:
        config = read_config(folder, trust_remote_code=trust_remote_code)
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        text = config if encoder_decoder else config.get_text_config()  # an encoder-decoder may have several
    except Exception as error:  # an untrusted config can make every check of every architecture fail in its own way
        fault = FistaPrunerError(f"{folder}: config.json is not understood: {one_line(error, 300)}")
        raise needs_code(folder, error) or fault from None
    if encoder_decoder:
        raise FistaPrunerError(
            f"{folder}: {config.model_type} is an encoder-decoder; only decoder-only language models are pruned"
        )
    if not hasattr(text, "vocab_size"):
        raise FistaPrunerError(f"{folder}: {config.model_type} has no vocab_size in config.json: it predicts no text")
    own_widths = "widths" in (checkpoint.config.get("quantization_config") or ())
    free = shapes is not None or (own_widths and not (folder / PACKED_RECORD).exists())
    widths = read_widths(checkpoint.config, folder) if free else {}
    for key in PACKED_KEYS if free else ():
        vars(config).pop(key, None)
    if getattr(config, "quantization_config", None):
        if QUANT_METHOD in str(config.quantization_config):
            raise FistaPrunerError(
                f"{folder} is a packed checkpoint: make it an ordinary one first with "
                f"'{shell_line('unpack', folder, 'DIR')}'"
            )
        settings = config.quantization_config
        method = str(settings.get("quant_method") if isinstance(settings, dict) else settings)[:50]
        raise FistaPrunerError(f"{folder}: the checkpoint is quantised ({method}); prune the unquantised one")
    auto = auto_class(config)
    known = auto._model_mapping  # a semi-private table
    if text is not config and type(config) not in known and "auto_map" not in checkpoint.config:
        advice = (
            f": save its language model ({text.model_type}) as a checkpoint of its own" if type(text) in known else ""
        )
        raise FistaPrunerError(
            f"{folder}: {config.model_type} is a model of more than text, and transformers builds no causal language "
            f"model and no image-text model of it{advice}"
        )
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            precision = {} if dtype is None else {"dtype": dtype}
            model = auto.from_config(config, trust_remote_code=trust_remote_code, **precision)
    except Exception as error:  # again: sizes that are zero, negative or do not divide, names that are not known
        reason = one_line(error) or type(error).__name__
        fault = FistaPrunerError(
            f"{folder}: no {config.model_type} language model can be built from config.json: {reason}"
        )
        raise needs_code(folder, error) or fault from None
    if widths:
        set_widths(model, widths, checkpoint.shapes() if shapes is None else shapes)
    return model


def refuse_own_code(folder: Path, why: str) -> None:
    """Refuse a model that needs Python code of its own.

    Args:
        folder: of the model.
        why: what cannot be done with it, for the message.

    Raises:
        FistaPrunerError: names the folder.
    """
    if needs_own_code(read_json_in(folder, "config.json")):
        raise FistaPrunerError(f"{folder} needs Python code of its own: {why}")


def set_widths(model: Any, widths: Mapping[int, Mapping[str, int]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give tensors of decoder layers the shapes that they are stored in, which may be their own.

    The forward passes of the models that :mod:`fistapruner.structure.trial` lets pass follow these shapes.

    Args:
        model: transformers model, its tensors on the meta device.
        widths: by decoder layer, its sizes (:func:`~fistapruner.models.files.widths.read_widths`).
        shapes: of the stored tensors, by name.

    Raises:
        FistaPrunerError: a layer that the model does not have, or a tensor of another shape than its widths say.
    """
    if not widths:
        return
    layers_name, layers = find_decoder_layers(model)
    names = stored_names(model, shapes)
    for index, sizes in widths.items():
        if index >= len(layers):
            raise FistaPrunerError(
                f"config.json: widths of decoder layer {index} of {len(layers)} cannot be (the first one is 0)"
            )
        for name, parameter in list(layers[index].named_parameters()):
            full = f"{layers_name}.{index}.{name}"
            before, after = tuple(parameter.shape), shapes.get(names.get(full, ""))
            if after is None or after == before:
                continue
            changed = [(old, new) for old, new in zip(before, after, strict=False) if old != new]
            expected = len(after) == len(before) and len(changed) == 1 and changed[0][1] < changed[0][0]
            if not expected or not any(changed[0][1] % size == 0 for size in sizes.values()):
                raise FistaPrunerError(f"tensor {full!r} is {after}, the widths of its layer are {dict(sizes)}")
            parent, _, key = name.rpartition(".")
            module: Any = layers[index].get_submodule(parent)
            module._parameters[key] = nn.Parameter(parameter.new_empty(after), requires_grad=parameter.requires_grad)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
            elif isinstance(module, Conv1D) and key == "weight":
                module.nx, module.nf = after


def build_changed(checkpoint: Checkpoint, changes: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Build a checkpoint's model without weights, with a changed config and experts that are separate.

    Args:
        checkpoint: the checkpoint.
        changes: of ``config.json``, as a JSON merge patch.
        trust_remote_code: run the checkpoint's own Python code.

    Raises:
        NoTemporaryFolderError: there is no place for the config and code.
        FistaPrunerError: the changed config describes no model.
    """
    config = merge_patch(checkpoint.config, changes)
    with temporary_folder() as name:
        folder = Path(name)
        try:
            write_json_atomic(folder / "config.json", config)
            for code in (file for file in checkpoint.companions if file.endswith(".py")):
                copy_atomic(checkpoint.folder / code, folder / code)
        except FistaPrunerError as error:
            raise NoTemporaryFolderError(str(error)) from error
        changed = Checkpoint(folder, config, checkpoint.files, checkpoint.index)
        model = build_model(changed, trust_remote_code=trust_remote_code)
        separate_experts(model, *find_decoder_layers(model), changed, fewer=True)
        return model


def find_decoder_layers(model: Any) -> tuple[str, list[nn.Module]]:
    """Find the decoder layers of a model; return the name of their list and the modules.

    They are the module list that has as many modules as the config has layers, or else several of one class, and that
    holds the most weights. Lists of the text model go before those of its parts that read images or sound, which have
    other configs.

    Raises:
        FistaPrunerError: the model has no such list.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    best: tuple[tuple[bool, bool, int], str, list[nn.Module]] = ((False, False, 0), "", [])
    reads_text = {"": True}  # by the name of a module
    for name, module in model.named_modules():
        part = getattr(module, "config", None)
        own = part is not None and hasattr(part, "model_type")
        reads_text[name] = (
            isinstance(part, (type(config), type(model.config))) if own else reads_text[name.rpartition(".")[0]]
        )
        if isinstance(module, nn.ModuleList) and len(module):
            size = (reads_text[name], len(module) == count, sum(parameter.numel() for parameter in module.parameters()))
            if size > best[0] and (size[1] or len({type(item) for item in module}) == 1):
                best = (size, name, list(module))
    if not best[2]:
        raise unsupported(model, "no list of decoder layers found")
    return best[1], best[2]


def max_length(model: Any) -> int | None:
    """Return a model's maximum sequence length in tokens; None where its config states none.

    Positions that begin after that of padding (RoBERTa) are stated with those that no token has.
    """
    config = model.config.get_text_config()
    stated = (getattr(config, name, None) for name in LENGTH_NAMES)
    length = next((length for length in stated if type(length) is int and length > 0), None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not name.endswith("position_embeddings"):
            continue
        if module.padding_idx is not None and module.num_embeddings == length:
            return length - module.padding_idx - 1
    return length


def refuse_experts(model: Any, layers_name: str, layers: list[nn.Module]) -> None:
    """Refuse decoder layers whose experts are in one tensor in a form that is not understood.

    Other weights of three dimensions, such as convolutions and gates of recurrences, are no operators: they stay dense.

    Raises:
        FistaPrunerError: names the weight and its shape.
    """
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            module = layer.get_submodule(name.rpartition(".")[0])
            stacked = "expert" in type(module).__name__.lower() and sum(size > 1 for size in parameter.shape) > 1
            plain = isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
            if holds_experts(module, name, parameter) or (stacked and not plain):
                raise unsupported(
                    model,
                    f"{layers_name}.{index}.{name} is a fused mixture of experts with {parameter.ndim} dimensions "
                    f"{tuple(parameter.shape)}",
                )


def loaded_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which transformers loads a floating-point tensor of a model.

    It keeps some in fp32, such as what routes to experts. Its table of them is semi-private and used here only.

    Args:
        model: transformers model, may be on the meta device.
        name: of the tensor in the model.
        dtype: asked for.
    """
    kept: Mapping[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    return next((kept[part] for part in kept if re.search(part.replace("*", ".*"), name)), dtype)


def unsupported(model: Any, reason: str) -> FistaPrunerError:
    """Make the error that refuses an architecture, in one sentence."""
    return FistaPrunerError(f"{type(model).__name__}: {reason}: this architecture is not supported")
