"""Outputs that cannot change are not computed again: the same bits with and without their cache, in fewer passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import tiny
from fistapruner.passes.store import CachedOutputs
from fistapruner.pruning.run import prune

SETTINGS: dict[str, Any] = {"method": "sparsegpt", "calibration": {"source": "python", "samples": 5, "seqlen": 24}}
WAYS = {
    "dense": {"propagate": "dense", "dense_target": "dense"},
    "pruned": {"propagate": "pruned", "dense_target": "pruned"},
    "mixed": {"propagate": "pruned", "dense_target": 0.5},
    "matched": {"propagate": "pruned", "dense_target": 0.5, "reconstruct": 2},
}
CASES = [
    pytest.param(architecture, way, marks=() if architecture == "llama" or way == "mixed" else pytest.mark.slow)
    for architecture in ("llama", "opt", "gpt_neox", "gpt2", "falcon", "gemma2")
    for way in WAYS
]


@pytest.mark.parametrize(("architecture", "way"), CASES)
def test_the_same_bits_in_fewer_passes(
    tmp_path: Path, architecture: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16))
    computed: list[str] = []

    def counted(module: type) -> None:
        forward = module.forward
        monkeypatch.setattr(
            module, "forward", lambda self, *a, **k: (computed.append(module.__name__), forward(self, *a, **k))[1]
        )

    counted(LlamaAttention)
    counted(LlamaMLP)
    execution = {"threads": 1, "batch_size": 2}
    prune(source, tmp_path / "with", **SETTINGS, **WAYS[way], execution=execution)
    cached = [computed.count("LlamaAttention"), computed.count("LlamaMLP")]
    computed.clear()
    monkeypatch.setattr(CachedOutputs, "pruned", lambda *_: None)  # nothing is final
    prune(source, tmp_path / "without", **SETTINGS, **WAYS[way], execution=execution)
    if architecture == "llama":
        assert cached[0] < computed.count("LlamaAttention")
        assert cached[1] < computed.count("LlamaMLP") or way in ("dense", "matched")  # without a pass after the MLP
    one, other = (tiny.tensors(tmp_path / out / "model") for out in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
