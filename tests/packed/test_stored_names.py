"""Checkpoints whose tensors are not called as in the model: pruned, inspected, packed, loaded, unpacked and evaluated
like others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pruned import logits
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from tiny import GQA, SIZES, configure, edited, save, spread, store, write_text

TWO = {**SIZES, **GQA, "num_hidden_layers": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}

GEMMA = {"text_config": {**TWO, "head_dim": 8, "sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4}
GEMMA |= {"image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102}
GPT = {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
Q = "layers.0.self_attn.q_proj"

# Configuration, whether the base model alone is stored, and the first operator's name in the model and in the file.
CASES: dict[str, tuple[str, dict[str, Any], bool, str, str]] = {
    "GPT-2": ("GPT2Config", GPT, True, "transformer.h.0.attn.c_attn", "h.0.attn.c_attn.weight"),
    "base Llama": ("LlamaConfig", {**TWO, "tie_word_embeddings": True}, True, f"model.{Q}", f"{Q}.weight"),
    "Exaone": ("ExaoneConfig", TWO, False, f"model.{Q}", "transformer.h.0.attn.attention.q_proj.weight"),
    "Gemma 3": ("Gemma3Config", GEMMA, False, f"model.language_model.{Q}", f"language_model.model.{Q}.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_stored_names(tmp_path: Path, case: str) -> None:
    name, arguments, base, operator, stored = CASES[case]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = spread(AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments)).eval())
    folder = tmp_path / "dense"
    model.bfloat16()  # as values are packed
    store(model.base_model if base else model, folder)
    configure(folder, architectures=[type(model).__name__])
    text = str(write_text(tmp_path / "text.jsonl"))
    calibration = {"source": text, "samples": 2, "seqlen": 16}
    fp.prune(folder, tmp_path / "run", method="magnitude", calibration=calibration)
    pruned, packed = tmp_path / "run" / "model", tmp_path / "packed"

    record = json.loads((pruned / "fistapruner.json").read_text())
    assert record["operators"][stored]["operator"] == operator
    assert set(record["operators"]) <= set(Checkpoint.open(pruned).names())
    report = fp.pack(pruned, packed)
    assert report.operators == len(record["operators"])
    unpacked = fp.unpack(packed, tmp_path / "unpacked")
    for place in (pruned, packed, unpacked):
        found = inspect_checkpoint(place)
        assert (found.violations, len(found.pruned)) == ([], report.operators)
        assert found.pruned[0].claim == "50%"

    expected = logits(AutoModelForCausalLM.from_pretrained(pruned))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(packed)), expected)
    assert torch.equal(logits(type(model).from_pretrained(packed)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(unpacked)), expected)
    assert torch.equal(logits(fp.load(packed, packed=False)), expected)
    sparse = fp.load(packed)
    assert sum(isinstance(module, fp.SparseLinear) for module in sparse.modules()) == report.operators
    torch.testing.assert_close(logits(sparse), expected, rtol=1e-4, atol=1e-4)
    sparse.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)

    assert fp.evaluate(unpacked, text, against=pruned, seqlen=16).divergence.kl == 0


def test_a_missing_tensor_is_not_another_one_with_its_ending(tmp_path: Path) -> None:
    """All tensors have one prefix, which may be any."""
    folder, prefix = save("llama", tmp_path / "dense", num_hidden_layers=1), "part."
    with edited(folder) as tensors:
        for name in [*tensors]:
            tensors[prefix + name] = tensors.pop(name)
    assert fp.prune(folder, tmp_path / "run", method="magnitude", calibration=tiny.SMALL).status == "finished"
    with edited(folder) as tensors:
        tensors["vision_tower.norm.weight"] = tensors.pop(f"{prefix}model.norm.weight") + 1
    with pytest.raises(fp.FistaPrunerError, match=r"tensor 'model\..*weight'.* of LlamaForCausalLM is not in it"):
        fp.prune(folder, tmp_path / "other", method="magnitude", calibration=tiny.SMALL)
