"""What ``spp`` trains is also an adapter: merged into the input, it gives the recovered checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM

import fistapruner as fp
import tiny


def test_the_adapter_of_a_recovery_merged_into_its_input_gives_its_checkpoint(tmp_path: Path) -> None:
    dense = tiny.save("llama", tmp_path / "dense", num_hidden_layers=1)
    calibration = {"source": "python", "samples": 2, "seqlen": 32}
    fp.prune(dense, tmp_path / "pruned", method="magnitude", calibration=calibration)
    data = {"tokens": 256, "seqlen": 32}
    settings: dict[str, Any] = {"parameters": "spp", "also": "none", "data": data, "windows_per_step": 2}
    fp.recover(tmp_path / "pruned", tmp_path / "run", **settings)
    fp.merge_adapter(tmp_path / "pruned", tmp_path / "run" / "adapter", tmp_path / "merged")
    before, trained, merged = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "pruned" / "model", tmp_path / "run" / "model", tmp_path / "merged")
    )
    for name in before:
        torch.testing.assert_close(merged[name], trained[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(merged[name] == 0, trained[name] == 0)
    # Where it is written again, files of others beside it are kept, and stop the run.
    notes = tmp_path / "run" / "adapter" / "notes.txt"
    notes.write_text("years of work")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(fp.FistaPrunerError, match=r"notes\.txt was not written by this run"):
        fp.recover(tmp_path / "pruned", tmp_path / "run", **settings)
    notes.unlink()
    assert fp.recover(tmp_path / "pruned", tmp_path / "run", **settings).status == "finished"


@pytest.mark.parametrize("form", ["spp", "hira"])
def test_an_adapter_is_written_where_no_step_helped(tmp_path: Path, form: str) -> None:
    dense = tiny.save("llama", tmp_path / "dense", num_hidden_layers=1)
    calibration = {"source": "python", "samples": 2, "seqlen": 32}
    fp.prune(dense, tmp_path / "pruned", method="magnitude", calibration=calibration)
    settings: dict[str, Any] = {"parameters": form, "also": "none", "lr": 1e30, "steps": 1}
    report = fp.recover(tmp_path / "pruned", tmp_path / "run", data={"tokens": 64, "seqlen": 32}, **settings)
    assert report.recovery is not None
    assert report.recovery.kept_step == 0
    fp.merge_adapter(tmp_path / "pruned", tmp_path / "run" / "adapter", tmp_path / "merged")
    assert tiny.weights(tmp_path / "run") == tiny.weights(tmp_path / "pruned")
    merged, before = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "pruned/model"))
    assert all(torch.equal(merged[name], before[name]) for name in before)
    assert "it changes nothing" in (tmp_path / "run" / "log.txt").read_text()


def test_modules_that_contain_operators_are_not_replaced_by_an_adapter(tmp_path: Path) -> None:
    """Mamba's mixers have vectors of their own (D, biases of conv1d and dt_proj) beside their operators."""
    config = MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=8)
    tiny.spread(MambaForCausalLM(config)).save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    calibration = {"source": "python", "samples": 2, "seqlen": 32}
    fp.prune(tmp_path / "dense", tmp_path / "pruned", method="magnitude", calibration=calibration)
    data = {"tokens": 64, "seqlen": 32}
    fp.recover(tmp_path / "pruned", tmp_path / "run", parameters="hira", data=data, windows_per_step=2)
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["backbone.layers.0.norm"]
    assert "without 3 trained vectors" in (tmp_path / "run" / "log.txt").read_text()
