"""Adapters of the PEFT library are merged as it merges them, and the zeros are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.measure.inspection import inspect_checkpoint

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "mixtral": ["q_proj", "o_proj"]}


def tokens() -> Tensor:
    return torch.randint(0, tiny.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


def adapter(model: Path, folder: Path, architecture: str, kind: str = "LoraConfig", **settings: Any) -> Path:
    """Train an adapter for a few steps, and save it."""
    torch.manual_seed(0)
    config = getattr(peft, kind)(target_modules=TARGETS[architecture], **settings)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([each for each in wrapped.parameters() if each.requires_grad], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "kind", "settings"),
    [
        ("llama", "LoraConfig", {"r": 4, "lora_alpha": 16}),
        ("llama", "LoraConfig", {"r": 4, "use_dora": True}),
        ("gpt2", "LoraConfig", {"r": 4, "use_rslora": True, "fan_in_fan_out": True}),
        ("mixtral", "LoraConfig", {"r": 4}),
        ("llama", "IA3Config", {"feedforward_modules": ["down_proj"]}),
    ],
)
def test_the_merge_is_pefts_with_the_zeros_kept(
    bench: tiny.Bench, tmp_path: Path, architecture: str, kind: str, settings: dict[str, Any]
) -> None:
    run = bench.pruned(architecture)
    adapter(run / "model", tmp_path / "adapter", architecture, kind, **settings)
    report = fp.merge_adapter(run, tmp_path / "adapter", tmp_path / "out")
    start, found = (
        AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (run / "model", tmp_path / "out")
    )
    whole = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload().state_dict()
    assert found.keys() == start.keys() == expected.keys()
    refilled = 0
    for name, value in found.items():
        kept = start[name] != 0
        assert torch.equal(value != 0, kept), name
        torch.testing.assert_close(value.float()[kept], expected[name].float()[kept], rtol=1e-2, atol=1e-3)
        refilled += int((expected[name][~kept] != 0).sum())
    assert report.refilled == refilled
    assert (report.masked_share > 0.1) == (kind != "IA3Config")
    assert not inspect_checkpoint(tmp_path / "out").violations
    assert main(["inspect", str(tmp_path / "out"), "--quiet"]) == 0
    assert "all kept" in str(report)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_lineage_has_one_more_stage(bench: tiny.Bench, tmp_path: Path, cli: tiny.Cli) -> None:
    made = adapter(bench.pruned() / "model", tmp_path / "adapter", "llama")
    assert "the mask took" in cli("recover", bench.pruned(), "--merge", made, "--out", tmp_path / "out").out
    found = inspect_checkpoint(tmp_path / "out")
    assert [stage.kind for stage in found.lineage.stages] == ["prune", "merge"]


def test_bad_input_is_refused(bench: tiny.Bench, tmp_path: Path) -> None:
    with pytest.raises(fp.FistaPrunerError, match=r"adapter_config\.json"):
        fp.merge_adapter(bench.pruned(), tmp_path, tmp_path / "out")
    made = adapter(bench.pruned() / "model", tmp_path / "adapter", "llama")
    with pytest.raises(fp.FistaPrunerError, match="there is no mask to hold"):
        fp.merge_adapter(bench.dense(), made, tmp_path / "out")
    (made / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(fp.FistaPrunerError, match="peft cannot merge"):
        fp.merge_adapter(bench.pruned(), made, tmp_path / "out")
    with pytest.raises(fp.FistaPrunerError, match="exists already"):
        fp.merge_adapter(bench.pruned(), made, bench.dense())
