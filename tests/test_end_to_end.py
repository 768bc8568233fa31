"""From a checkpoint to a pruned checkpoint that transformers loads, for many architectures, through the public API."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.core import NM
from fistapruner.models.operators import discover

SOME = ("gpt2", "llama", "opt", "phi3")
"""Transposed, separate, biased and fused operators; the others are slow tests."""


@pytest.mark.parametrize("architecture", tiny.quick_first(tiny.ARCHITECTURES, SOME))
def test_every_architecture_is_pruned_exactly_and_loads(tmp_path: Path, architecture: str) -> None:
    hard = {"propagate": "pruned", "dense_target": 0.5, "residual": "correct", "method": "wanda+refit"}
    report = tiny.prune(tmp_path, architecture, {"dtype": torch.bfloat16}, sparsity="2:4", **hard)
    assert report.status == "finished"
    model, source = tiny.loaded(tmp_path / "run" / "model"), tiny.loaded(tmp_path / "model")
    layout = discover(tiny.opened(tmp_path / "model"))
    pruned = set()
    for name, operator in layout.operators():
        index = int(name.removeprefix(layout.layers_name + ".").partition(".")[0])
        weight = operator.weight(model.get_submodule(f"{layout.layers_name}.{index}"))
        assert NM(2, 4).satisfies(weight), name
        assert int((weight == 0).sum()) == weight.numel() // 2, name
        pruned.add(f"{name}.weight")
    # Everything else is untouched, tied weights stay tied.
    for name, tensor in source.state_dict().items():
        if name not in pruned:
            assert torch.equal(model.state_dict()[name], tensor), name
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
    # The pruned model is the one whose error was reported: it still behaves, and it generates.
    tokens = torch.randint(3, tiny.VOCABULARY, (1, 12))
    assert torch.isfinite(model(tokens).logits).all()
    assert model.generate(tokens, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 16)


def test_a_model_of_images_and_text_stays_one_and_its_language_model_is_pruned(tmp_path: Path) -> None:
    folder = tiny.save_image_text(tmp_path / "model")
    recipe = {"sparsity": "2:4", "method": "wanda+refit", "calibration": tiny.SMALL}
    assert fp.prune(str(folder), tmp_path / "run", **recipe).status == "finished"
    out = tmp_path / "run" / "model"
    assert (out / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()
    auto = transformers.AutoModelForImageTextToText
    model, source = auto.from_pretrained(out).eval(), auto.from_pretrained(folder).state_dict()
    linear = "model.language_model.layers.*_proj.weight"
    for name, tensor in model.state_dict().items():
        if fnmatch(name, linear):
            assert NM(2, 4).satisfies(tensor), name
        else:
            assert torch.equal(source[name], tensor), name
    tokens = torch.randint(4, tiny.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    generated = model.generate(tokens, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 16)
    fp.pack(out, tmp_path / "packed", values="bf16")
    with torch.no_grad():
        logits = model(tokens).logits
        for packed in (auto.from_pretrained(tmp_path / "packed"), fp.load(tmp_path / "packed")):
            torch.testing.assert_close(packed(tokens).logits.float(), logits, rtol=0.05, atol=0.05)  # rounded
    assert "AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text("utf-8")
    recovery = {"steps": 2, "windows_per_step": 2, "evaluate": None}
    data = {"source": "python", "seqlen": 16, "tokens": 300}
    fp.recover(out, tmp_path / "recovered", data=data, **recovery)
    trained = auto.from_pretrained(tmp_path / "recovered" / "model").state_dict()
    assert all(NM(2, 4).satisfies(tensor) for name, tensor in trained.items() if fnmatch(name, linear))


def test_targets_ignore_and_allocation_choose_operators_and_shards_keep_their_names(tmp_path: Path) -> None:
    folder, index = tiny.save("llama", tmp_path / "model", shard="40KB"), "model.safetensors.index.json"
    chosen = {"targets": ["re:mlp", "o_proj"], "ignore": ["re:layers\\.1\\.", "o_proj"]}
    asked = {"mlp.gate_proj": "70%", "mlp.up_proj": "2:4", "mlp.down_proj": "50%"}
    allocation = {"re:gate": "70%", "up_proj": "2:4"}
    report = fp.prune(folder, tmp_path / "run", method="wanda", calibration=tiny.SMALL, **chosen, allocation=allocation)
    assert [{operator.name for operator in layer.operators} for layer in report.layers] == [{*asked}, set(), {*asked}]
    for operator in (operator for layer in report.layers for operator in layer.operators):
        assert operator.zeros == fp.parse_sparsity(asked[operator.name]).zeros(*operator.shape), operator.name
    out = tmp_path / "run" / "model"
    shards, written = (sorted(path.name for path in where.glob("*.safetensors")) for where in (folder, out))
    assert written == shards
    assert len(shards) > 2
    places = [json.loads((where / index).read_text())["weight_map"] for where in (folder, out)]
    assert places[0] == places[1]
    AutoModelForCausalLM.from_pretrained(out)


def test_report_holds_what_fista_did(tmp_path: Path) -> None:
    report = tiny.prune(tmp_path, method="fista", evaluate="python", evaluate_windows=2)
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    step = stored["layers"][0]["operators"][0]["steps"][-1]
    assert {"lipschitz", "rounds", "iterations", "e_total"} <= set(step)
    assert {"lambda", "steps", "e_total", "e_fista"} <= set(step["rounds"][0])
    assert {"capture", "gram", "solve"} <= set(stored["totals"]["time_split"])
    evaluation = report.evaluations[0]
    assert evaluation.perplexity.perplexity != evaluation.reference.perplexity
    assert (tmp_path / "run" / "model" / "README.md").read_text().startswith("---")


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"sparsity": "1.5"}, ["1.5"]),
    ({"sparsity": "5:7"}, ["5:7", "32 inputs", "q_proj"]),
    ({"method": "magic"}, ["magic", "wanda"]),
    ({"method": "refit"}, ["refit"]),
    ({"method": [{"fista": {"speed": 3}}]}, ["fista", "speed"]),
    ({"nonsense": 1}, ["nonsense"]),
    ({"targets": ["no_such"]}, ["no_such", "model.layers.0.self_attn.q_proj"]),
    ({"targets": ["re:("]}, ["re:("]),
    ({"ignore": ["re:."]}, ["no operator"]),
    ({"allocation": {"re:[": "40%"}}, ["is not a regular expression"]),
    ({"calibration": {"source": "missing.txt"}}, ["missing.txt"]),
    ({"calibration": {"source": "python", "seqlen": 999999}}, ["999999"]),
    ({"calibration": {"source": "self", "seqlen": 4096}}, ["seqlen 4096 is more than"]),
    ({"evaluate": "missing.txt"}, ["'missing.txt' is neither a .txt"]),
    ({"evaluate": "python", "evaluate_windows": 0}, ["evaluate_windows: ", "(got 0)"]),
    ({"evaluate_windows": 4}, ["evaluate_windows 4 has no effect: evaluate names no text"]),
    ({"execution": {"device": "tpu:7"}}, ["tpu:7"]),
    ({"execution": {"memory_limit": "1MiB"}}, ["memory_limit 1.00 MiB is not enough"]),
    ({"tokens": torch.ones(2, 16)}, ["tokens has the shape (16,)"]),
    ({"tokens": (torch.ones(1, 16).long(), {"source": "mine"})}, ["tokens", "(1, 16)", "(4, 32)"]),
]


def test_bad_settings_are_refused_in_one_line_before_any_work(tmp_path: Path) -> None:
    """Which names thing and value."""
    folder = tiny.save("llama", tmp_path / "model")
    for settings, words in REFUSED:
        said = tiny.Said()
        with pytest.raises(fp.FistaPrunerError) as caught:
            fp.prune(folder, tmp_path / "run", listener=said, **{"calibration": tiny.SMALL, **settings})
        assert not [sentence for sentence in said.sentences if sentence.startswith(("calibration:", "measuring"))]
        assert "\n" not in str(caught.value)
        assert not [word for word in words if word not in str(caught.value)], str(caught.value)
        assert not list(tmp_path.glob("run/layers/*"))


def test_bad_weights_are_refused_and_what_was_pruned_before_is_kept(tmp_path: Path) -> None:
    with tiny.edited(tiny.save("llama", tmp_path / "model")) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    with pytest.raises(fp.FistaPrunerError, match=r"layers\.1\.mlp\.up_proj"):
        fp.prune(tmp_path / "model", tmp_path / "run", method="wanda", calibration=tiny.SMALL)
    assert (tmp_path / "run" / "layers" / "0000.json").exists()
    assert not (tmp_path / "run" / "model").exists()
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(fp.FistaPrunerError, match=r"model\.safetensors"):
        fp.prune(tmp_path / "model", tmp_path / "other", calibration=tiny.SMALL)
