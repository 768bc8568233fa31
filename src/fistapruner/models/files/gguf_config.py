"""Restore in the config of a GGUF file what transformers does not read, or reads wrongly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ...errors import FistaPrunerError

GEMMA2_27B = 46
"""Decoder layers of Gemma 2 27B, which scales attention by width / heads where its smaller ones have the default."""

EPSILON_KEYS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")

EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
"""Names in configs of what norms add to the variance."""


def restore_config(path: Path, reader: Any, config: Any) -> None:
    """Set what ``transformers`` does not read from a GGUF file, or reads wrongly, in its config.

    Raises:
        FistaPrunerError: the config cannot take a value of the file.
    """
    _restore_sizes(reader, config)
    _restore_attention_scale(config)
    _restore_positions(path, reader, config)
    _restore_rotary_width(path, reader, config)
    _restore_epsilon(reader, config)


def _restore_sizes(reader: Any, config: Any) -> None:
    """Set the sizes that ``transformers`` does not read: of heads for most architectures, and of GPT-2."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    architecture = reader.fields["general.architecture"].contents()
    read = {"attention.key_length": ("head_dim", head_width(config))}
    if "attention.key_length" in GGUF_CONFIG_MAPPING[architecture]:
        read = {}
    if config.model_type == "gpt2":
        width = config.n_inner or 4 * config.n_embd
        read = {"feed_forward_length": ("n_inner", width), "context_length": ("n_positions", config.n_positions)}
    for key, (name, known) in read.items():
        field = reader.fields.get(f"{architecture}.{key}")
        if field is not None and type(stored := field.contents()) is int and stored != known:
            setattr(config, name, stored)


def _restore_attention_scale(config: Any) -> None:
    """Set the attention scale of Gemma 2 27B.

    No key of a GGUF file holds it: llama.cpp tells it by the number of layers.
    """
    if config.model_type == "gemma2" and config.num_hidden_layers == GEMMA2_27B:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _restore_positions(path: Path, reader: Any, config: Any) -> None:
    """Set the base of rotary positions and the sliding window as the file has them.

    ``transformers`` does not read them for some architectures.

    Raises:
        FistaPrunerError: a value differs that the config cannot take: it has one for each type of layer, or none.
    """
    architecture = reader.fields["general.architecture"].contents()
    rotary = getattr(config, "rope_parameters", None) or {}
    one_window = hasattr(config, "sliding_window") and not getattr(config, "layer_types", None)
    read = {
        "rope.freq_base": rotary.get("full_attention", rotary).get("rope_theta"),
        "rope.freq_base_swa": rotary.get("sliding_attention", {}).get("rope_theta"),
        "attention.sliding_window": getattr(config, "sliding_window", None),
    }
    for key, known in read.items():
        field = reader.fields.get(f"{architecture}.{key}")
        if field is None or (known is None and key.startswith("rope.")):  # no such positions in the model
            continue
        stored = field.contents()
        if stored == known or (not stored and not known):  # a window of 0 is none
            continue
        if key == "rope.freq_base" and known == rotary.get("rope_theta") and type(stored) is float and stored > 0:
            config.rope_parameters = {**rotary, "rope_theta": stored}
        elif key == "attention.sliding_window" and one_window and type(stored) is int:
            config.sliding_window = stored or None
        else:
            raise _not_taken(path, f"{field.name} {stored!r}", known)


def _not_taken(path: Path, stored: str, known: Any) -> FistaPrunerError:
    return FistaPrunerError(
        f"{path} has {stored}, where transformers takes {known!r}: take the model's Hugging Face checkpoint"
    )


def rotary_width(config: Any) -> int | None:
    """Count the dimensions of a head that rotary positions turn; None without one count for all layers."""
    rotary = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rotary:
        return None
    factor = rotary.get("partial_rotary_factor")
    return int(head_width(config) * (1 if factor is None else factor))


def head_width(config: Any) -> int:
    """Return the dimensions of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def epsilon(config: Any) -> float | None:
    """Return what norms add to the variance; None if the config does not say it."""
    return next((value for name in EPSILONS if type(value := getattr(config, name, None)) is float), None)


def _restore_rotary_width(path: Path, reader: Any, config: Any) -> None:
    """Set the dimensions of a head that rotary positions turn: all of them if the file does not say it.

    Raises:
        FistaPrunerError: the config cannot take them.
    """
    if (known := rotary_width(config)) is None:
        return
    head = head_width(config)
    field = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.rope.dimension_count")
    stored = head if field is None else field.contents()
    if stored == known:
        return
    fits = type(stored) is int and 0 < stored <= head and int(head * (stored / head)) == stored
    if config.rope_parameters.get("partial_rotary_factor") is None or not fits:
        raise _not_taken(path, f"rotary positions over {stored!r} dimensions of a head (rope.dimension_count)", known)
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": stored / head}


def _restore_epsilon(reader: Any, config: Any) -> None:
    """Set what norms add to the variance: ``transformers`` reads one of two keys, for some the wrong one."""
    architecture = reader.fields["general.architecture"].contents()
    for key in EPSILON_KEYS:
        field = reader.fields.get(f"{architecture}.{key}")
        for name in EPSILONS if field else ():
            known = getattr(config, name, None)
            if type(known) is float and not math.isclose(known, field.contents(), rel_tol=1e-6):
                setattr(config, name, field.contents())


def scaled_positions(reader: Any) -> str | None:
    """Return how the keys of a file say that rotary positions are scaled; None if they are not."""
    values = {key: field.contents() for key, field in reader.fields.items() if ".rope.scal" in key}
    scalings = [value for key, value in values.items() if key.endswith("rope.scaling.type")]
    scales = [value for key, value in values.items() if key.endswith(("rope.scaling.factor", "rope.scale_linear"))]
    if not scalings and any(scale not in (0, 1) for scale in scales):  # to llama.cpp 0 is 1
        scalings.append("linear")
    return next((str(scaling) for scaling in scalings if scaling != "none"), None)


def restore_llama3(config: Any, factors: torch.Tensor) -> bool:
    """Set the scaled rotary positions of Llama 3 in a config; return whether they give these factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = dict(config.rope_parameters)
    scaled = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.rope_parameters = {**plain, "rope_type": "llama3", **scaled, "original_max_position_embeddings": 8192}
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(found), 2).float() / (2 * len(found))
    wanted = plain["rope_theta"] ** -steps
    return len(found) == len(factors) and torch.allclose(found * factors, wanted, rtol=1e-3, atol=0)
