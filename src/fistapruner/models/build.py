"""Build an architecture without weights, find its decoder layers, or refuse it; load a whole model.

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

from ..errors import FistaPrunerError, needs_code, one_line
from ..runtime.devices import free_device_memory, free_memory, resident_memory
from ..runtime.numerics import pass_dtype
from ..runtime.show import shell_line, size
from .checkpoint import PACKED_KEYS, QUANT_METHOD, Checkpoint, read_json_in
from .experts import holds_experts, separate_experts
from .low_rank import LowRankAdapter
from .names import stored_names
from .write import merge_patch

LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
"""What configs call the longest text that a model was made for."""

ROOM = 0.75
"""Share of the free memory that a whole model may take where the rest of what it needs is not counted."""

BUILT_IN = {"_attn_implementation": ("eager", "sdpa"), "_experts_implementation": ("eager", "batched_mm", "grouped_mm")}
"""What a config may name for attention and experts; anything else is as if it named nothing."""


def auto_class(config: Any) -> Any:
    """Return the class of ``transformers`` that builds and loads the language model of a config."""
    import transformers

    return getattr(transformers, auto_class_name(config.model_type))


def auto_class_name(known: str) -> str:
    """Return the name of :func:`auto_class`, by ``model_type`` or the name of a model class.

    That is ``AutoModelForImageTextToText`` for a model of images and text that is no causal language model besides,
    and ``AutoModelForCausalLM`` for all others.
    """
    causal, wrapper = (known in table or known in table.values() for table in _known_types())
    return "AutoModelForImageTextToText" if wrapper and not causal else "AutoModelForCausalLM"


def _known_types() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the names of the model classes of text, and of images and text, by ``model_type``."""
    from transformers.models.auto import modeling_auto as known

    return known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def needs_own_code(config: Mapping[str, Any]) -> bool:
    """Check whether a language model is built only with Python code that its config names."""
    kind = str(config.get("model_type"))
    return isinstance(config.get("auto_map"), Mapping) and not any(kind in table for table in _known_types())


def refuse_own_code(folder: Path, why: str) -> None:
    """Refuse a model that needs Python code of its own; ``why`` says what cannot be done with it."""
    if needs_own_code(read_json_in(folder, "config.json")):
        raise FistaPrunerError(f"{folder} needs Python code of its own: {why}")


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the config of a model, with built-in code for attention and experts."""
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
    packed: bool = False,
    dtype: torch.dtype | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """Build a checkpoint's language model, with its vision tower, without weights on the meta device.

    A packed checkpoint is refused unless ``packed``. The ``dtype`` is that of its parameters, None the config's;
    ``changes`` are those of ``config.json``, as a JSON merge patch.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    folder, said = checkpoint.folder, "config.json is not understood"
    try:
        config = read_config(folder, trust_remote_code=trust_remote_code)
        if changes:
            config = type(config).from_dict(merge_patch(checkpoint.config, changes), name_or_path=str(folder))
            _leave_out(config)
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        text = config if encoder_decoder else config.get_text_config()  # an encoder-decoder may have several
        for key in PACKED_KEYS if packed else ():
            vars(config).pop(key, None)
        if fault := _fault(config, text, checkpoint):
            raise FistaPrunerError(f"{folder}: {fault}")
        said = f"no {config.model_type} language model can be built from config.json"
        with no_init_weights(), init_empty_weights(include_buffers=False):
            precision = {} if dtype is None else {"dtype": dtype}
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **precision)
        for module in model.modules():  # as from_pretrained does, which fills buffers that are not stored in fp32
            module._is_hf_initialized = not module._non_persistent_buffers_set
        model.initialize_weights()
        return model
    except FistaPrunerError:
        raise
    except Exception as error:  # an untrusted config makes every check of every architecture fail in its own way
        reason = one_line(error, 300) or type(error).__name__
        raise needs_code(folder, error) or FistaPrunerError(f"{folder}: {said}: {reason}") from None


def _fault(config: Any, text: Any, checkpoint: Checkpoint) -> str | None:
    """Say why a model is not built: what it is, or how its weights are stored; None if it is."""
    kind, stored = config.model_type, getattr(config, "quantization_config", None)
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder; only decoder-only language models are pruned"
    if not hasattr(text, "vocab_size"):
        return f"{kind} has no vocab_size in config.json: it predicts no text"
    if stored and QUANT_METHOD in str(stored):
        unpack = shell_line("unpack", checkpoint.folder, "DIR")
        return f"it is a packed checkpoint: make it an ordinary one first with '{unpack}'"
    if stored:
        method = str(stored.get("quant_method") if isinstance(stored, dict) else stored)[:50]
        return f"the checkpoint is quantised ({method}); prune the unquantised one"
    if text is config or any(kind in table for table in _known_types()) or "auto_map" in checkpoint.config:
        return None
    return (
        f"{kind} is a model of more than text, and transformers builds no language model of it: save its language "
        f"model ({text.model_type}) as a checkpoint of its own"
    )


def build_changed(checkpoint: Checkpoint, changes: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Build a model with a changed config and separate experts, of which the checkpoint may have more."""
    model = build_model(checkpoint, trust_remote_code=trust_remote_code, changes=changes)
    found = stored_names(model, [entry.name for entry in checkpoint.stored])
    separate_experts(model, *find_decoder_layers(model), checkpoint, found, fewer=True)
    return model


def find_decoder_layers(model: Any) -> tuple[str, list[nn.Module]]:
    """Find the decoder layers of a model; return the name of their list and the modules.

    They are the module list that holds the most weights, has as many modules as the config has layers or else several
    of one class, and is of the text model, if there is such a list.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    found: dict[tuple[bool, bool, int], tuple[str, list[nn.Module]]] = {}
    reads_text = {"": True}  # by the name of a module
    for name, module in model.named_modules():
        part = getattr(module, "config", None)
        reads_text[name] = reads_text[name.rpartition(".")[0]]
        if hasattr(part, "model_type"):
            reads_text[name] = isinstance(part, (type(config), type(model.config)))
        kinds = {type(item) for item in module} if isinstance(module, nn.ModuleList) else set()
        if (fits := bool(kinds) and len(module) == count) or len(kinds) == 1:
            weights = sum(parameter.numel() for parameter in module.parameters())
            found.setdefault((reads_text[name], fits, weights), (name, list(module)))
    if not found:
        raise unsupported(model, "no list of decoder layers found")
    return found[max(found)]


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
    """Refuse decoder layers with experts in one tensor whose form is not understood, by its name.

    Other weights of three dimensions, such as convolutions and gates of recurrences, are no operators: they stay dense.
    """
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            module = layer.get_submodule(name.rpartition(".")[0])
            stacked = "expert" in type(module).__name__.lower() and sum(size > 1 for size in parameter.shape) > 1
            plain = isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
            if holds_experts(module, name, parameter) or (stacked and not plain):
                what = f"a fused mixture of experts with {parameter.ndim} dimensions {tuple(parameter.shape)}"
                raise unsupported(model, f"{layers_name}.{index}.{name} is {what}")


def loaded_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which transformers loads a floating-point tensor where ``dtype`` is asked for.

    It keeps some in fp32, such as what routes to experts. Its table of them is semi-private and used here only.
    """
    kept: Mapping[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    return next((kept[part] for part in kept if re.search(part.replace("*", ".*"), name)), dtype)


def unsupported(model: Any, reason: str) -> FistaPrunerError:
    """Make the error that refuses an architecture, in one sentence."""
    return FistaPrunerError(f"{type(model).__name__}: {reason}: this architecture is not supported")


def whole_fits(checkpoint: Checkpoint, device: torch.device, limit: int | None) -> bool:
    """Check whether a model fits into :data:`ROOM` of what the process may still take; arguments as below."""
    return whole_bytes(checkpoint, pass_dtype(checkpoint.dtype, device)) <= ROOM * _left(device, limit)


def whole_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Count the bytes of a model's weights in the precision of its passes."""
    return checkpoint.nbytes * dtype.itemsize // checkpoint.dtype.itemsize


def require_whole(nbytes: int, device: torch.device, limit: int | None, option: str, instead: str) -> None:
    """Refuse to load a whole model that does not fit.

    ``nbytes`` are those of its weights and of what is needed beside them, ``limit`` the bytes of main memory that the
    process may use, ``option`` what asks for the model (``--calibration self``), ``instead`` what to do without it.
    """
    if nbytes > (left := _left(device, limit)):
        needed = f"{option} needs the whole model on {device}, {size(nbytes)}, and {size(left)} are left there"
        raise FistaPrunerError(f"{needed}: {instead}")


def _left(device: torch.device, limit: int | None) -> int:
    """Measure the bytes that this process may still take, within ``limit`` bytes of main memory."""
    if device.type == "cuda":
        return free_device_memory(device)
    return free_memory() if limit is None else max(0, min(free_memory(), limit - resident_memory()))


def load_whole(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Load a ``transformers`` model, dense or packed, with the low-rank part of its checkpoint.

    None as ``dtype`` is :func:`~fistapruner.runtime.numerics.pass_dtype` of the stored weights.
    """
    dtype = dtype or pass_dtype(Checkpoint.open(folder, allow_pickle=True).dtype, device)
    try:
        config = read_config(folder, trust_remote_code=trust_remote_code)
        settings = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
        model = auto_class(config).from_pretrained(str(folder), **settings)
    except (OSError, ValueError) as error:
        said = f"{folder} cannot be loaded by transformers: {one_line(error)}"
        raise needs_code(folder, error) or FistaPrunerError(said) from None
    model = model.to(device)
    if (low_rank := LowRankAdapter.beside(folder)) is not None:
        low_rank.add_to(model)
    return model.eval()
