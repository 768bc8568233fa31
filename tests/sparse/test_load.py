"""Packed folders as transformers models: the same logits, the same text, on every architecture."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pruned import save_pruned
from transformers import AutoModelForCausalLM

import fistapruner
from fistapruner import FistaPrunerError, SparseLinear
from fistapruner.models.whole import load_whole
from tiny import ARCHITECTURES, VOCABULARY

IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_way_of_loading_agrees(tmp_path, architecture):
    source = save_pruned(tmp_path / "m", architecture)
    fistapruner.pack(source, tmp_path / "p")
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")
    assert torch.equal(logits(through_transformers), expected)
    assert torch.equal(logits(fistapruner.load(tmp_path / "p", packed=False)), expected)
    packed = fistapruner.load(tmp_path / "p")
    count = sum(isinstance(module, SparseLinear) for module in packed.modules())
    assert count >= 9
    torch.testing.assert_close(logits(packed), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_casts_as_it_is_told(tmp_path, dtype):
    source = save_pruned(tmp_path / "m")
    fistapruner.pack(source, tmp_path / "p")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=dtype))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load_whole(tmp_path / "p", torch.device("cpu"), dtype)), expected)


def test_unpacked_by_transformers_is_an_ordinary_model(tmp_path):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_generates_the_same_text(tmp_path, sparsity, dtype):
    source = save_pruned(tmp_path / "m", sparsity=sparsity, dtype=dtype)
    fistapruner.pack(source, tmp_path / "p")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    packed = fistapruner.load(tmp_path / "p", dtype=torch.float32)
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(dense.generate(IDS, **settings), packed.generate(IDS, **settings))


def test_int8_stays_close(tmp_path):
    source = save_pruned(tmp_path / "m", dtype=torch.float32)
    fistapruner.pack(source, tmp_path / "p", values="int8")
    fistapruner.pack(source, tmp_path / "q")
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    for model in (fistapruner.load(tmp_path / "p"), fistapruner.load(tmp_path / "q", int8=True)):
        error = (logits(model) - expected).norm() / expected.norm()
        assert error < 0.05


def test_import_is_all_it_takes(tmp_path):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    code = (
        "import sys, fistapruner; assert 'transformers.quantizers.auto' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=True, capture_output=True, timeout=120)


def test_another_architecture_is_refused(tmp_path):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    config = (tmp_path / "p" / "config.json").read_text()
    (tmp_path / "p" / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(FistaPrunerError, match="is not in it"):
        fistapruner.load(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(FistaPrunerError, match="not part of"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")
