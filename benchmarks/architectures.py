"""Which architectures of the installed `transformers` are pruned?

Builds every decoder-only language model, and every model of images and text, tiny and random, and looks what becomes
of it on text. An architecture works if the log-likelihood of a text computed layer by layer is, to 1e-5, that of the
model as transformers loads it (where that has other weights than the file, which the row says, that of the model as it
was saved), and the model, its operators pruned by magnitude, packed and unpacked again, has the same tensors bit for
bit and is loaded from the packed checkpoint with the same logits. A mixture of experts, which is not packed here, works
if the checkpoint that is written pruned has, loaded again, the log-likelihood that is computed layer by layer. Or an
architecture is refused in one sentence. Anything else is a defect: it is marked, and the exit status is 1. Types that
transformers cannot build that small, or not without another package, are told apart. Prints a Markdown table.

    python benchmarks/architectures.py                        # all, a few seconds each
    python benchmarks/architectures.py llama xlm openai-gpt   # some
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import fistapruner as fp
from fistapruner.measure.logits import score_windows
from fistapruner.models.build import auto_class
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import Layout, discover
from fistapruner.models.write import write_checkpoint

TYPES = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
"""The class of each type."""

WORKS, REFUSED, DEFECT, UNBUILT = "works", "refused", "DEFECT", "not built"
VOCABULARY, TOLERANCE, LARGEST = 128, 1e-5, 20_000_000

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "ffn_dim": 64,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "word_embed_proj_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "state_size": 8,
    "rescale_every": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "is_decoder": True,
}
"""Sizes of tiny models, where a configuration has such a setting; parts of a model get them, too."""

TRIED: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 4, "num_key_value_heads": 4},
    {"head_dim": 8},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": None, "v_head_dim": None},
    {"rotary_dim": 4},
    {"mamba_n_heads": 8},
    {"num_heads": 8},
    {"num_layers": 3},
    {"topk_method": "greedy"},
    {"num_experts_per_tok": 1},
    {"default_language": "en_XX"},
    {"attention_types": [[["global", "local"], 2]]},
    {"decoder_attention_heads": 4, "num_hidden_layers": None},
    {"num_decoder_layers": 4, "num_hidden_layers": None},
    {"max_position_embeddings": None},
    {"num_hidden_layers": None},
)
"""Further settings, of which the first that a model of a type can be built with is taken; None leaves a setting out."""

BY_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
NOT_BY_LAYER = {**BY_LAYER, "hidden_size_per_layer_input": 0}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
NGRAMS = {
    "ngram_vocab_size_base": 64,
    "hc_lowrank": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "split_ngram_parts": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
IN_THREE = {"text_config": {"rope_parameters": ROPE}}  # positions in time, height and width

CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": ROPE, "moe_intermediate_size": [16, 16]}},
    "gemma3n_text": BY_LAYER,
    "gemma4": {"text_config": NOT_BY_LAYER},
    "gemma4_text": NOT_BY_LAYER,
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {**INDEXER, **NGRAMS},
    "qwen4_exp": {"text_config": {**INDEXER, **NGRAMS}},
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), IN_THREE),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), IN_THREE),
    "glm4v_moe": {"text_config": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attn_layers": ["local", "lsh"] * 2,
        "num_hidden_layers": None,
    },
    "xlnet": {"max_position_embeddings": None, "d_head": 8},
}
"""What a tiny model of a type needs besides."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, bidirectional": ("bert", {"is_decoder": False}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4, per-layer inputs": ("gemma4", {"text_config": BY_LAYER}),
    "gemma4_text, per-layer inputs": ("gemma4_text", BY_LAYER),
    "gemma4_text, experts": (
        "gemma4_text",
        {**NOT_BY_LAYER, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "gemma4_text, keys as values": ("gemma4_text", {**NOT_BY_LAYER, "attention_k_eq_v": True}),
    "gemma4_unified_text, shared K/V": (
        "gemma4_unified_text",
        {
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
        },
    ),
    "gemma4_unified_text, shared K/V, own order": ("gemma4_unified_text", {"num_kv_shared_layers": 2}),
    "glm_moe_dsa, shared indexers": ("glm_moe_dsa", {"indexer_types": ["full", "shared"] * 2}),
}
"""Further configs that are tried: the type and what such a tiny model needs besides, by the name of the row."""


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture: one of the constants above, and why where it does not work."""

    type: str
    architecture: str
    outcome: str
    reason: str = ""


def try_architecture(model_type: str, folder: Path) -> Outcome:
    """Build an architecture tiny in ``folder`` and see what becomes of it; a type or one of :data:`VARIANTS`."""
    row, (model_type, changes) = model_type, VARIANTS.get(model_type, (model_type, CHANGES.get(model_type, {})))
    name = TYPES[model_type]
    try:
        model = tiny_model(model_type, changes)
        model.save_pretrained(folder / "model")
    except Exception as error:  # of the installed transformers, each in its own way
        return Outcome(row, name, UNBUILT, one_line(f"{type(error).__name__}: {error}"))
    try:
        return Outcome(row, name, *_walk_and_pack(model, folder))
    except fp.FistaPrunerError as error:
        message = str(error).replace(str(folder / "model"), "MODEL")
        return Outcome(row, name, DEFECT if "\n" in message else REFUSED, message)
    except Exception as error:
        traceback.print_exc()
        return Outcome(row, name, DEFECT, one_line(f"{type(error).__name__}: {error}"))


def _walk_and_pack(model: Any, folder: Path) -> tuple[str, str]:
    walked = LayerwiseModel(Checkpoint.open(folder / "model"), torch.device("cpu"))
    layout = discover(walked)
    loaded = auto_class(walked.config).from_pretrained(folder / "model")
    others = loaded.state_dict()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, others[name])]
    reason = f"transformers loads {changed[0]} with other values than the file's" if changed else ""
    sums, own = score_windows(walked, text())[0], own_sums(model if changed else loaded, text())
    if not torch.allclose(sums, own, rtol=TOLERANCE, atol=0):
        return DEFECT, f"log-likelihood {sums.tolist()} and not {own.tolist()}"
    if any(operator.experts for _, operator in layout.operators()):
        return _write_and_load(walked, layout, folder)
    prune(model, layout)
    model.bfloat16().save_pretrained(folder / "pruned")  # values are packed in bf16
    pruned = load_file(folder / "pruned" / "model.safetensors")
    fp.pack(folder / "pruned", folder / "packed")
    fp.unpack(folder / "packed", folder / "unpacked")
    again = load_file(folder / "unpacked" / "model.safetensors")
    if pruned.keys() != again.keys() or not all(torch.equal(tensor, again[key]) for key, tensor in pruned.items()):
        return DEFECT, "unpacked, its tensors are others"
    loaded, plain = (
        fp.load(folder / "packed", packed=False),
        auto_class(walked.config).from_pretrained(folder / "pruned"),
    )
    plain.load_state_dict(model.state_dict())
    if not torch.equal(own_sums(loaded, text()), own_sums(plain, text())):
        return DEFECT, "loaded from the packed checkpoint, its predictions are others"
    return WORKS, reason


def _write_and_load(walked: LayerwiseModel, layout: Layout, folder: Path) -> tuple[str, str]:
    """Write a mixture of experts pruned, as a run does, and load it with transformers."""
    pruned = {}
    for name, _ in layout.operators():
        stored = walked.source(f"{name}.weight")
        weight = walked.checkpoint.read(stored)
        pruned[stored] = weight.masked_fill(weight.abs() < weight.abs().median(), 0)
    write_checkpoint(walked.checkpoint, folder / "pruned", pruned.get)
    again = LayerwiseModel(Checkpoint.open(folder / "pruned"), torch.device("cpu"))
    sums = score_windows(again, text())[0]
    own = own_sums(auto_class(walked.config).from_pretrained(folder / "pruned"), text())
    if not torch.allclose(sums, own, rtol=TOLERANCE, atol=0):
        return DEFECT, f"written and loaded again, log-likelihood {sums.tolist()} and not {own.tolist()}"
    return WORKS, "mixture of experts"


def tiny_model(model_type: str, changes: dict[str, Any]) -> Any:
    """A tiny model with random weights, so wide that layers really do something.

    Raises:
        Exception: of transformers, where it can be built with none of :data:`TRIED`; the first one's.
    """
    first: Exception | None = None
    built: Any = None
    for tried in TRIED:
        try:
            kind = CONFIG_MAPPING[model_type]
            wrapper = model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "text_config" in kind.sub_configs
            config = shrunk(kind, {**({"text_config": tried} if wrapper else tried), **changes})
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in auto_class(config).from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size} parameters are not tiny")
            torch.manual_seed(0)
            model = auto_class(config).from_config(config).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.normal_(0, 0.15)
        except Exception as error:
            first = first or error
            continue
        built = built or model
        try:
            own_sums(model, text())
            return model
        except Exception as error:
            first = first or error
    if built is None:
        assert first is not None
        raise first
    return built


def shrunk(kind: Any, changes: dict[str, Any]) -> Any:
    """A configuration of class ``kind`` with tiny sizes."""
    default = kind()
    settings = {key: value for key, value in SMALL.items() if key == "pad_token_id" or _has(default, key)}
    for name in getattr(kind, "sub_configs", {}):
        if getattr(default, name, None) is not None:
            settings[name] = shrunk(type(getattr(default, name)), changes.get(name, {})).to_dict()
    settings |= {
        key: value for key, value in changes.items() if key not in settings or not isinstance(settings[key], dict)
    }
    return kind(**{key: value for key, value in settings.items() if value is not None})


def _has(config: Any, key: str) -> bool:
    try:
        return getattr(config, key, None) is not None
    except Exception:  # one that differs from layer to layer
        return True


def text() -> Tensor:
    """(2, 24) token ids."""
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def own_sums(model: Any, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each of the windows ``tokens`` from the model's own forward pass."""
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), tokens[:, 1:], reduction="none").sum(1)


def prune(model: Any, layout: Layout) -> None:
    """Zero the smaller half of every operator's weights."""
    with torch.no_grad():
        for name, _ in layout.operators():
            weight = model.get_submodule(name).weight
            weight[weight.abs() < weight.abs().median()] = 0


def one_line(message: str) -> str:
    """The beginning of an error message on one line."""
    return " ".join(message.split())[:200]


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table, its totals first."""
    totals = Counter(outcome.outcome for outcome in outcomes)
    counted = ", ".join(f"{totals[key]} {key}" for key in (WORKS, REFUSED, UNBUILT, DEFECT) if totals[key])
    lines = [f"transformers {transformers.__version__}, {len(outcomes)} rows: {counted}."]
    lines += ["", "| type | class | outcome | reason |", "|---|---|---|---|"]
    lines += [
        f"| {row.type} | {row.architecture} | {row.outcome} | {row.reason.replace('|', '/')} |" for row in outcomes
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    arguments = parser.parse_args()
    outcomes = []
    for model_type in arguments.types or sorted([*TYPES, *VARIANTS]):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(try_architecture(model_type, Path(folder)))
        print(outcomes[-1], file=sys.stderr, flush=True)
    print(table(outcomes))
    return int(any(outcome.outcome == DEFECT for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
