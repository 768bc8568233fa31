"""GGUF files: converted to the model that the file holds, or refused in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fistapruner import FistaPrunerError
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.gguf import convert_gguf, open_gguf
from fistapruner.models.source import ModelSource, converted_gguf, resolve_model

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
from tiny_gguf import write_gguf  # noqa: E402


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


def test_conversion_is_kept_and_follows_the_file(tmp_path: Path) -> None:
    path, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(path, settings={"general.license": "apache-2.0"})
    first = resolve_model(str(path), cache)
    assert Checkpoint.open(first).dtype == torch.bfloat16
    assert ModelSource(first).license() == "apache-2.0"
    stamp = (first / "config.json").stat().st_mtime_ns
    assert resolve_model(str(path), cache) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    write_gguf(path, kind="F16")
    assert resolve_model(str(path), cache) != first


def test_a_part_of_a_split_file_says_how_to_join_it(tmp_path: Path) -> None:
    for number in range(3):
        write_gguf(tmp_path / f"m-{number + 1:05d}-of-00003.gguf", part=(number, 3))
    said = r"m-0000{}-of-00003\.gguf is part {} of 3: join them with 'llama-gguf-split --merge"
    with pytest.raises(FistaPrunerError, match=said.format(2, 2)):
        open_gguf(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(FistaPrunerError, match=said.format(1, 1)):
        resolve_model(tmp_path / "m-00001-of-00003.gguf", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["Ġab", "ĠĠ", "Ġ1234", ",", "Ġ5"]),
        ("smollm", ["Ġab", "ĠĠĠ", "1", "2", "3", "4", ",", "Ġ", "5"]),
        ("llama-bpe", ["Ġab", "ĠĠ", "Ġ", "123", "4", ",", "Ġ", "5"]),
    ],
)
def test_text_is_split_as_the_file_names_it(tmp_path: Path, name: str, pieces: list[str]) -> None:
    """transformers takes GPT-2's split where it does not know the name: smollm's is one."""
    write_gguf(tmp_path / "tiny.gguf", settings={"tokenizer.ggml.pre": name})
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    split = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str(" ab   1234, 5")] == pieces


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


FACTORS = {"rope_freqs.weight": np.full(8, 2, np.float32)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"settings": {"tokenizer.ggml.pre": "unheard-of"}}, "splits text by 'unheard-of'"),
        ({"settings": {"llama.rope.scaling.type": "yarn"}}, "has scaled rotary positions"),
        ({"more": FACTORS}, "has scaled rotary positions"),
        ({"architecture": "llaxa"}, "cannot be converted with transformers .*llaxa"),
    ],
)
def test_what_transformers_does_not_understand_is_refused(
    tmp_path: Path, settings: dict[str, dict[str, str]], said: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **settings)  # type: ignore[arg-type]
    with pytest.raises(FistaPrunerError, match=said) as caught:
        converted_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    shapes = {each.name: [*map(int, each.shape)] for each in open_gguf(tmp_path / "tiny.gguf").tensors}
    assert shapes["token_embd.weight"] == [64, 31]
    for size in (200, 10, 0):
        os.truncate(tmp_path / "tiny.gguf", size)
        with pytest.raises(FistaPrunerError, match=r"tiny.gguf is truncated, damaged or not a GGUF file") as caught:
            resolve_model(tmp_path / "tiny.gguf", tmp_path / "cache")
        assert "\n" not in str(caught.value)
