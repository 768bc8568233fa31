"""Outputs that cannot change are not computed again: the same bits with and without their cache, in fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fistapruner.passes.cached_outputs import CachedOutputs
from fistapruner.pruning import passes
from fistapruner.pruning.run import prune

SETTINGS: dict[str, Any] = {"method": "sparsegpt", "calibration": {"source": "python", "samples": 5, "seqlen": 24}}
WAYS = {
    "dense": {"propagate": "dense", "dense_target": "dense"},
    "pruned": {"propagate": "pruned", "dense_target": "pruned"},
    "mixed": {"propagate": "pruned", "dense_target": 0.5},
    "matched": {"propagate": "pruned", "dense_target": 0.5, "reconstruct": 2},
}


class Without(CachedOutputs):
    """Forgets what is done."""

    def pruned(self, number: int) -> None:
        """Nothing is settled."""


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
    given: list[str] = []
    continued: list[str] = []
    giving, going_on = CachedOutputs._giving, CachedOutputs._going_on

    def counted(self: CachedOutputs, name: str, batch: Any) -> Any:
        given.append(name)
        return giving(self, name, batch)

    def counted_on(self: CachedOutputs, ending: Any, batch: Any) -> Any:
        continued.append(ending.operator)
        return going_on(self, ending, batch)

    monkeypatch.setattr(CachedOutputs, "_giving", counted)
    monkeypatch.setattr(CachedOutputs, "_going_on", counted_on)
    execution = {"threads": 1, "batch_size": 2}
    prune(source, tmp_path / "with", **SETTINGS, **WAYS[way], execution=execution)
    if architecture == "llama":  # three layers; the last one feeds none
        assert given == ["self_attn"] * {"dense": 3, "pruned": 5, "mixed": 5, "matched": 3}[way]
        attention, mlp = "self_attn.o_proj", "mlp.down_proj"
        assert continued == ([attention] * 3 if way in ("dense", "matched") else [attention, mlp] * 2 + [attention])
    monkeypatch.setattr(passes, "CachedOutputs", Without)
    prune(source, tmp_path / "without", **SETTINGS, **WAYS[way], execution=execution)
    one, other = (tiny.tensors(tmp_path / out / "model") for out in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
