"""Write a checkpoint of one of :data:`FAMILIES` as a GGUF file; memory holds one tensor.

Names of tensors and keys, and the special tokens, are those of the ``gguf`` package; all tokens come from
``tokenizer.json``. Models of which llama.cpp would compute something else are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from ..errors import FistaPrunerError, MissingExtraError
from ..runtime.files import disk_errors, existing_folder, require_space
from ..runtime.show import Tick, silent
from .checkpoint import Checkpoint
from .layers import LayerwiseModel
from .source import load_tokenizer

GGUFValues = Literal["bf16", "f16", "f32", "q8_0"]
"""How matrices are stored."""

BLOCK = 32
"""Weights in a block of q8_0; matrices whose rows are no multiple of it are stored as f16."""

Array = np.ndarray[Any, np.dtype[Any]]


class Family(NamedTuple):
    """What llama.cpp calls a family, and how its tensors differ from those of ``transformers``."""

    name: str
    turned: bool = False  # the rows of queries and keys are in the order of the original rotary embedding
    shift: int = 0  # what is added to the weights of norms
    period: int = 0  # of the layers that attend to all tokens, where others have a window


FAMILIES = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "granite": Family("granite", turned=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe"),
    "gemma2": Family("gemma2", shift=1, period=2),
    "gemma3_text": Family("gemma3", shift=1, period=6),
    "phi3": Family("phi3"),
    "olmo2": Family("olmo2"),
}
"""By ``model_type`` of the config."""


def export_gguf(
    folder: str | Path,
    out: str | Path,
    values: GGUFValues = "bf16",
    *,
    allow_pickle: bool = False,
    progress: Tick = silent,
) -> Path:
    """Write a checkpoint as a GGUF file; arguments, result and errors as of :func:`fistapruner.export`."""
    folder, out = Path(folder), Path(out)
    fault = None if values in get_args(GGUFValues) else f"values {values!r}: one of {', '.join(get_args(GGUFValues))}"
    if out.suffix != ".gguf" or out.exists():
        ending = f"{out} is the file to write: its name must end in .gguf"
        fault = f"{out} exists already: remove it, or write to another file" if out.exists() else ending
    if fault:
        raise FistaPrunerError(fault)
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "writing a GGUF file") from None
    checkpoint = Checkpoint.open(folder, allow_pickle)
    if (kind := str(checkpoint.config.get("model_type"))) not in FAMILIES:
        raise _not_exported(folder, f"{kind} is not exported, only {', '.join(FAMILIES)}")
    family, model = FAMILIES[kind], LayerwiseModel(checkpoint, torch.device("cpu"))
    config, sources = model.config, _sources(model, family)
    with closing(gguf.GGUFWriter(None, family.name)) as writer:
        writer.add_name(out.stem)
        file_type = "ALL_F32" if values == "f32" else f"MOSTLY_{values.upper()}"
        writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
        _add_sizes(writer, folder, config, family)
        extra = _add_rotary(writer, folder, config)
        _add_vocabulary(writer, folder, config.vocab_size)
        forms = {}
        for name, parts in sources.items():
            shape = checkpoint.entry(parts[0]).shape
            shape = (len(parts), *shape) if "_exps." in name else shape
            forms[name] = _add_tensor(writer, name, shape, values)
        for name, array in extra.items():
            _add_tensor(writer, name, array.shape, "f32")
        with disk_errors(out), TemporaryDirectory(dir=existing_folder(out), prefix=".gguf-") as scratch:
            require_space(out, sum(info.nbytes for info in writer.tensors[0].values()))
            writer.write_header_to_file(Path(scratch) / out.name)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (name, parts) in enumerate(sources.items()):
                progress("tensors written", done, len(sources))
                arrays = [_array(checkpoint, part, name, family, config) for part in parts]
                array = np.stack(arrays) if "_exps." in name else arrays[0]
                writer.write_tensor_data(_packed(f"{folder}: tensor {parts[0]!r}", array, forms[name]))
            for array in extra.values():
                writer.write_tensor_data(array)
            writer.close()
            out.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(scratch) / out.name, out)
    return out


def _not_exported(folder: Path, why: str) -> FistaPrunerError:
    """Make the error of a model of which llama.cpp would compute something else."""
    return FistaPrunerError(f"{folder}: {why}: use llama.cpp's convert_hf_to_gguf.py")


def _sources(model: LayerwiseModel, family: Family) -> dict[str, list[str]]:
    """Map the names of the file's tensors to the checkpoint's: of an expert's matrices, one for each."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    table = gguf.get_tensor_name_map(architecture, len(model))
    found: dict[str, list[str]] = {}
    for name in model.parameters:
        place = table.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", name), (".weight", ".bias"))
        if place is None:
            raise _not_exported(model.checkpoint.folder, f"llama.cpp has no place for {name!r} of {family.name}")
        found.setdefault(place, []).append(model.source(name))
    return found


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_sizes(writer: Any, folder: Path, config: Any, family: Family) -> None:
    """Add the sizes of a model; refuse one of which llama.cpp would compute something else."""
    head, heads, layers = _head_width(config), config.num_attention_heads, config.num_hidden_layers
    scale, fault = getattr(config, "query_pre_attn_scalar", None), None
    largest = layers in (46, 62) and scale == config.hidden_size // heads  # of Gemma 2 and 3, which llama.cpp knows
    if scale not in (None, head) and not largest:
        fault = f"query_pre_attn_scalar is {scale}, but llama.cpp takes {head}"
    if config.model_type == "qwen3_moe" and not config.norm_topk_prob:
        fault = "norm_topk_prob is false, and llama.cpp norms the experts' weights always"
    kinds = ["sliding" if family.period and (index + 1) % family.period else "full" for index in range(layers)]
    if family.period and [f"{kind}_attention" for kind in kinds] != list(config.layer_types):
        fault = f"llama.cpp takes full attention in every {family.period}th layer only"
    if fault:
        raise _not_exported(folder, fault)
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for add, name in (
        (writer.add_expert_count, "num_experts"),
        (writer.add_expert_used_count, "num_experts_per_tok"),
        (writer.add_expert_feed_forward_length, "moe_intermediate_size"),
        (writer.add_attn_logit_softcapping, "attn_logit_softcapping"),
        (writer.add_final_logit_softcapping, "final_logit_softcapping"),
        (writer.add_attention_scale, "attention_multiplier"),
        (writer.add_embedding_scale, "embedding_multiplier"),
        (writer.add_residual_scale, "residual_multiplier"),
        (writer.add_logit_scale, "logits_scaling"),
        *([(writer.add_sliding_window, "sliding_window")] if family.period or family.name == "phi3" else []),
    ):
        if getattr(config, name, None) is not None:
            add(getattr(config, name))


def _add_rotary(writer: Any, folder: Path, config: Any) -> dict[str, Array]:
    """Add rotary positions, and return the tensors by which llama.cpp scales those of Llama 3 and Phi-3."""
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = config.rope_parameters.get("full_attention", config.rope_parameters)
    base, kind = found["rope_theta"], found.get("rope_type") or "default"
    stated = found.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = stated or config.max_position_embeddings
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(int(_head_width(config) * (found.get("partial_rotary_factor") or 1)))
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(found["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "longrope":
        if (factor := config.max_position_embeddings / original) > 1:
            own = found.get("attention_factor")
            writer.add_rope_scaling_attn_factors(own or math.sqrt(1 + math.log(factor) / math.log(original)))
        lists = {f"rope_factors_{each}.weight": found[f"{each}_factor"] for each in ("long", "short")}
        return {name: np.array(factors, dtype=np.float32) for name, factors in lists.items()}
    if kind == "llama3":
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        steps = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
        return {"rope_freqs.weight": (base**-steps / frequencies.double()).float().numpy()}
    if kind not in ("default", "dynamic", "linear", "yarn"):  # llama.cpp has no scale by the length of a text
        raise _not_exported(folder, f"rope_type {kind!r} is not exported")
    return {}


def _add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Add the tokens of ``tokenizer.json``, its merges, special tokens and chat template."""
    from gguf import SpecialVocab, TokenType

    tokenizer = load_tokenizer(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = bool(state["model"].get("byte_fallback"))  # SentencePiece
    tokens, types = [f"[PAD{number}]" for number in range(size)], [TokenType.UNUSED] * size
    for token, number in state["model"]["vocab"].items() if state["model"]["type"] == "BPE" else ():
        tokens[number] = token
        types[number] = TokenType.BYTE if pieces and re.fullmatch("<0x..>", token) else TokenType.NORMAL
    for added in state["added_tokens"]:
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    special = SpecialVocab(folder, load_merges=not pieces, n_vocab=size)
    first = tokenizer("a")["input_ids"][0]
    special.add_special_token = {"bos": first == tokenizer.bos_token_id}
    if not pieces:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(folder, state))
    else:
        writer.add_tokenizer_model("llama")
        # llama.cpp joins the pair whose token has the highest score first, and tokenizers the pair of the first merge.
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(state["model"]["merges"]):
            ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
        spaced = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581")
        writer.add_add_space_prefix(spaced)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _split_name(folder: Path, state: Mapping[str, Any]) -> str:
    """Name in llama.cpp's way how a byte-level tokenizer splits text."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    found = state["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    for name in ("llama-bpe" if state["model"].get("ignore_merges") else "dbrx", "qwen2", "tekken", "gpt-4o"):
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == GGUF_PRE_TOKENIZER_SPLITS[name]:
            return name
    raise _not_exported(folder, "the tokenizer's split has no known name")


def _add_tensor(writer: Any, name: str, shape: Sequence[int], values: str) -> Any:
    """Announce a tensor; return its ``gguf.GGMLQuantizationType``, which for vectors and routers is fp32."""
    import gguf

    form = "f32" if len(shape) == 1 or "ffn_gate_inp" in name else values
    form = "f16" if form == "q8_0" and shape[-1] % BLOCK else form
    kind = gguf.GGMLQuantizationType[form.upper()]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * nbytes, kind)
    return kind


def _array(checkpoint: Checkpoint, source: str, name: str, family: Family, config: Any) -> Array:
    """Read a tensor of the checkpoint in fp32 and in llama.cpp's order."""
    array: Array = checkpoint.read(source).float().numpy()
    if family.shift and name.endswith("norm.weight"):
        return array + np.float32(family.shift)
    if family.turned and re.search(r"attn_[qk]\.", name):
        pairs = array.reshape(-1, 2, _head_width(config) // 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)
    return array


def _packed(what: str, array: Array, form: Any) -> Array:
    """Round a tensor to the form that is written; refuse values that the form cannot hold."""
    import gguf

    with np.errstate(over="ignore", invalid="ignore"):
        packed: Array = gguf.quantize(array, form)
        if np.isfinite(array).all() and not np.isfinite(gguf.dequantize(packed, form)).all():
            raise FistaPrunerError(f"{what} has values that {form.name.lower()} cannot hold: try bf16")
    return packed
