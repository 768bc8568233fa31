"""A tiny Llama as a GGUF file, written with the ``gguf`` package, and the model that the file must become."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny

tiny.need_transformers("5.24")  # as the extra 'gguf' does: 5.9 reads some tokenizers in another way

HEADS, KEY_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "Ġ"]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp orders them for its rotary embedding."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    *,
    tied: bool = False,
    kind: str = "Q8_0",
    architecture: str = "llama",
    part: tuple[int, int] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, bool | int | float | str] | None = None,
    vocabulary: str = "gpt2",
) -> LlamaForCausalLM:
    """A tiny Llama as a GGUF file; returns the model with the very values that de-quantising the file must give.

    Args:
        path: the file.
        tied: without an output head; ``kind``: type of the matrices.
        architecture: name in the header.
        part: number, from 0, and count of parts, as llama-gguf-split writes them; a part has the first tensors only.
        more: fp32 tensors beside the model's; ``settings``: further keys of the header.
        vocabulary: ``gpt2``, or ``llama`` for SentencePiece.
    """
    torch.manual_seed(0)
    tokens = TOKENS if vocabulary == "gpt2" else [token.replace("Ġ", "▁") for token in TOKENS]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (settings or {}).items():
        add[type(value)](key, value)
    if part is not None:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        writer.add_int32("split.tensors.count", 21)
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    quantised = gguf.GGMLQuantizationType[kind]
    state = model.state_dict()
    for name, tensor in state.items():
        if (tied and name == "lm_head.weight") or (part is not None and name != "model.embed_tokens.weight"):
            continue
        values = tensor.numpy().astype(np.float32)
        stem, last = name.rsplit(".", 1)
        flat = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        if stem in flat:
            short = flat[stem]
        else:
            _, _, index, rest = stem.split(".", 3)
            short = f"blk.{index}.{NAMES[rest]}"
        heads = HEADS if "attn_q" in short else KEY_HEADS if "attn_k." in short + "." else 0
        if heads and tensor.ndim == 2:
            values = permuted(values, heads)
        if tensor.ndim == 1:
            writer.add_tensor(f"{short}.{last}", values)
            continue
        packed = gguf.quantize(values, quantised)
        writer.add_tensor(f"{short}.{last}", packed, raw_dtype=quantised)
        back = gguf.dequantize(packed, quantised)
        if heads:  # undo the permutation
            back = back.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(back)))
    for name, array in (more or {}).items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
