"""A config that describes no model is refused; whole models run in the precision of passes layer by layer."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fistapruner.errors import FistaPrunerError
from fistapruner.measure.run import generate_side_by_side
from fistapruner.models import build
from fistapruner.models.build import load_whole, whole_bytes
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.source import load_tokenizer
from fistapruner.runtime.numerics import pass_dtype

CPU = torch.device("cpu")


AUDIO = {"model_type": "qwen2_audio", "text_config": {"model_type": "qwen2", **tiny.SIZES}}
PARTS = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"model_type": "nonsense"}, "nonsense"),
    "no heads": ({"num_attention_heads": 0}, "llama|config"),
    "negative width": ({"hidden_size": -32}, "llama|config"),
    "text for a number": ({"hidden_size": "x"}, "llama|config"),
    "other width": ({"hidden_size": 64}, "the config asks for"),
    "unknown activation": ({"hidden_act": "nonsense"}, "no llama language model can be built .*nonsense"),
    "more layers than stored": ({"num_hidden_layers": 5}, r"tensor 'model\.layers\.3\..* is not in it"),
    "other vocabulary": ({"vocab_size": 64}, "the config asks for"),
    "quantised": ({"quantization_config": {"quant_method": "bitnet"}}, r"is quantised \(bitnet\); prune the unquanti"),
    "sound and text": (AUDIO, r"qwen2_audio is a model of more than text, .*: save its language model \(qwen2\) as"),
    "encoder and decoder": (PARTS | {"model_type": "musicgen"}, "musicgen is an encoder-decoder"),
    "two texts": ({"text_encoder": {}, "decoder": {}}, r"config\.json is not understood: Multiple valid text configs"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_config_is_refused_by_name(tmp_path: Path, wrong: str) -> None:
    """One line that names it, before any work."""
    entries, said = WRONG[wrong]
    tiny.build("llama").save_pretrained(tmp_path)
    if wrong in ("sound and text", "encoder and decoder"):
        (tmp_path / "config.json").write_text("{}")
    tiny.configure(tmp_path, **entries)
    with pytest.raises(FistaPrunerError, match=said) as caught:
        tiny.opened(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("units", [False, True])
def test_the_precision_is_that_of_the_weights_whatever_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, units: bool
) -> None:
    bf16 = stored == torch.bfloat16
    assert pass_dtype(stored, CPU, units) == (torch.bfloat16 if units and bf16 else torch.float32)
    assert pass_dtype(stored, torch.device("cuda"), True) == stored
    before_ampere = pass_dtype(stored, torch.device("cuda"), False)
    assert before_ampere == (torch.float32 if bf16 else stored)
    monkeypatch.setattr("fistapruner.runtime.numerics.has_bf16_units", lambda device: units)
    folder = tiny.save("llama", tmp_path / "model", dtype=stored)
    tiny.configure(folder, dtype="float32" if bf16 else "bfloat16")
    checkpoint, model = Checkpoint.open(folder), load_whole(folder, CPU)
    assert model.dtype == LayerwiseModel(checkpoint, CPU).dtype == pass_dtype(stored, CPU)
    assert not model.training
    assert load_whole(folder, CPU, stored).dtype == stored
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert nbytes == whole_bytes(checkpoint, pass_dtype(stored, CPU))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, checkpoint.read(name).to(parameter.dtype)), name


@pytest.mark.parametrize(
    ("named", "taken"),
    [("flash_attention_2", "sdpa"), ("evil/kernel", "sdpa"), ("flex_attention", "sdpa"), ("eager", "eager")],
)
def test_a_config_does_not_choose_other_code_for_attention(tmp_path: Path, named: str, taken: str) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    tiny.configure(folder, attn_implementation=named, experts_implementation="deepgemm")
    for model in (load_whole(folder, CPU), tiny.opened(folder).model):
        assert model.config._attn_implementation == taken
        assert model.config._experts_implementation != "deepgemm"


def test_nothing_is_generated_where_the_model_would_not_fit_in_the_precision_it_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "resident_memory", lambda: 0)
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    needed = whole_bytes(Checkpoint.open(folder), pass_dtype(torch.bfloat16, CPU))
    assert needed == sum(parameter.nbytes for parameter in load_whole(folder, CPU).parameters())
    assert generate_side_by_side({"dense": folder, "pruned": folder}, CPU, memory_limit=int(needed / 0.75) - 1) == []
    small = tiny.save("llama", tmp_path / "small", dtype=torch.bfloat16, num_hidden_layers=1)
    limit = int(whole_bytes(Checkpoint.open(small), pass_dtype(torch.bfloat16, CPU)) / 0.75) + 1
    for models in ({"dense": folder, "pruned": small}, {"dense": small, "pruned": folder}):
        assert generate_side_by_side(models, CPU, memory_limit=limit) == []


def test_a_limit_is_of_all_that_the_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it uses already counts, on the host; the message names the option of the verb."""
    monkeypatch.setattr(build, "resident_memory", lambda: 3 * 2**20)
    build.require_whole(2**20, CPU, 2**22, "--data self", "")
    with pytest.raises(
        FistaPrunerError,
        match=r"^--data self needs the whole model on cpu, 1\.50 MiB, and 1\.00 MiB are left there: take c4$",
    ):
        build.require_whole(3 * 2**19, CPU, 2**22, "--data self", "take c4")


def test_what_transformers_cannot_load_is_said_in_one_line(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FistaPrunerError, match=r"model cannot be loaded by transformers: .*no file named[^\n]*$"):
        load_whole(folder, CPU, torch.float32)


def test_a_vocabulary_of_sentencepiece_says_which_packages_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("fistapruner.models.source.Distribution.discover", lambda name: iter(()))
    with pytest.raises(FistaPrunerError, match=r"needs other packages: pip install sentencepiece protobuf$"):
        load_tokenizer(tmp_path)
