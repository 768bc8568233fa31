"""Packed folders as transformers models: the same logits, the same text, on every architecture."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from pruned import save_pruned
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fistapruner
from fistapruner import FistaPrunerError, SparseLinear
from fistapruner.models.build import load_whole
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.packed import kernel
from fistapruner.packed.checkpoint import PackedCheckpoint
from fistapruner.packed.linear import Int8Embedding
from tiny import ARCHITECTURES, VOCABULARY, store_head

IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


SOME = ("gpt2", "llama", "opt", "phi3")
"""Transposed, separate, biased and fused operators; the others are slow tests."""


@pytest.mark.parametrize("values", ["same", "int8"])
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[] if each in SOME else pytest.mark.slow) for each in sorted(ARCHITECTURES)],
)
def test_every_way_of_loading_agrees(tmp_path, architecture, values):
    source = save_pruned(tmp_path / "m", architecture)
    fistapruner.pack(source, tmp_path / "p", values=values)
    exact = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    fistapruner.unpack(tmp_path / "p", tmp_path / "u")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "u", dtype="auto"))
    assert torch.equal(expected, exact) == (values == "same")
    assert float((expected - exact).norm() / exact.norm()) < 0.05
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")
    assert not any(parameter.is_meta for parameter in through_transformers.parameters())
    assert torch.equal(logits(through_transformers), expected)
    assert torch.equal(logits(fistapruner.load(tmp_path / "p", packed=False)), expected)
    packed = fistapruner.load(tmp_path / "p")
    count = sum(isinstance(module, SparseLinear) for module in packed.modules())
    assert count >= 9 + (values == "int8")
    torch.testing.assert_close(logits(packed), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("head", ["tied", "other"])
def test_int8_embedding_and_head_share_their_rows_where_they_are_tied(tmp_path, head):
    source = save_pruned(tmp_path / "m", tie_word_embeddings=True)
    if head != "tied":
        store_head(source, head)
    fistapruner.pack(source, tmp_path / "p", values="int8")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=torch.float32)
    packed = fistapruner.load(tmp_path / "p", dtype=torch.float32)
    embedding, output = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert (type(embedding), type(output)) == (Int8Embedding, SparseLinear)
    assert (embedding.operator is output.operator) == (head != "other")
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0.05, atol=0.05)  # which has rounded to bf16
    packed.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(saved), logits(dense))
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == (head != "other")
    expected = logits(packed)
    torch.save(packed, tmp_path / "pickle.pt")
    assert packed.load_state_dict(packed.state_dict()) == ([], [])
    for model in (packed, copy.deepcopy(packed), torch.load(tmp_path / "pickle.pt", weights_only=False)):
        assert torch.equal(logits(model), expected)
    compiled = torch.compile(embedding, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDS), embedding(IDS))


def test_a_dtype_is_taken_by_its_name(tmp_path):
    fistapruner.pack(save_pruned(tmp_path / "m", "llama"), tmp_path / "p")
    half = logits(fistapruner.load(tmp_path / "p", dtype=torch.bfloat16))
    assert torch.equal(logits(fistapruner.load(tmp_path / "p", dtype="bfloat16")), half)
    assert torch.equal(logits(fistapruner.load(tmp_path / "p", dtype="auto")), logits(fistapruner.load(tmp_path / "p")))
    for wrong in ("bf16", "", 3, torch.int8):
        with pytest.raises(FistaPrunerError, match=r"^dtype .* is no floating-point dtype .* or 'bfloat16'$"):
            fistapruner.load(tmp_path / "p", dtype=wrong)


def test_a_kernel_that_is_slower_than_torch_is_told(tmp_path, monkeypatch):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    monkeypatch.setenv("FISTAPRUNER_KERNEL", "portable")
    monkeypatch.setattr(kernel, "best_level", kernel.best_level.__wrapped__)
    with pytest.warns(UserWarning, match=r"FISTAPRUNER_KERNEL forbids .*: load with packed=False") as told:
        fistapruner.load(tmp_path / "p")
    assert told[0].filename == __file__


@pytest.mark.parametrize("head", ["other", "alone"])
def test_a_stored_head_of_a_tied_model_is_that_of_transformers(tmp_path, head):
    """It is the model's own where its values are not the embedding's, whatever the config says."""
    source = store_head(save_pruned(tmp_path / "m", tie_word_embeddings=True), head)
    fistapruner.pack(source, tmp_path / "p")
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")), expected)
    packed = fistapruner.load(tmp_path / "p")
    for model in (fistapruner.load(tmp_path / "p", packed=False), packed):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head != "other")
        torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.1)
    packed.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")), expected)


@pytest.mark.parametrize("alone", [False, True])
def test_a_stored_head_of_a_tied_model_may_be_packed(tmp_path, alone):
    source = store_head(save_pruned(tmp_path / "m", tie_word_embeddings=True), "alone" if alone else "other")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] *= torch.arange(tensors["lm_head.weight"].shape[1]) % 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    fistapruner.pack(source, tmp_path / "p")
    assert "lm_head.weight" in PackedCheckpoint(tmp_path / "p").specs
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    packed = fistapruner.load(tmp_path / "p")
    assert (packed.lm_head.weight is packed.model.embed_tokens.weight) == alone
    torch.testing.assert_close(logits(packed), expected, rtol=0.05, atol=0.1)


APART = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3"]
"""Mixtures whose experts are stored one by one."""


@pytest.mark.parametrize(
    ("architecture", "some"),
    [
        *(("qwen3_moe", True), ("mixtral", False)),
        *(pytest.param(each, some, marks=pytest.mark.slow) for each in APART for some in (False, True)),
    ],
)
def test_every_way_of_loading_a_mixture_agrees(tmp_path, architecture, some):
    """Where a few experts are not packed, too."""
    source = save_pruned(tmp_path / "m", architecture)
    matrices = [name for name in Checkpoint.open(source).names() if ".experts." in name]
    if some:
        tensors = load_file(source / "model.safetensors")
        for name in matrices[::5]:
            tensors[name] = torch.randn_like(tensors[name]) * 0.1
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    fistapruner.pack(source, tmp_path / "p")
    specs = PackedCheckpoint(tmp_path / "p").specs
    assert sum(name in specs for name in matrices) == len(matrices) - (len(matrices[::5]) if some else 0)
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")
    assert not any(parameter.is_meta for parameter in through_transformers.parameters())
    assert torch.equal(logits(through_transformers), expected)
    assert torch.equal(logits(fistapruner.load(tmp_path / "p", packed=False)), expected)
    packed = fistapruner.load(tmp_path / "p")
    routed = [
        name for name, module in packed.named_modules() if ".experts." in name and isinstance(module, SparseLinear)
    ]
    assert len(routed) == sum(name in specs for name in matrices)
    torch.testing.assert_close(logits(packed), expected, rtol=0.05, atol=0.1)
    exact = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    torch.testing.assert_close(
        logits(fistapruner.load(tmp_path / "p", dtype=torch.float32)), exact, rtol=1e-4, atol=1e-4
    )
    fistapruner.unpack(tmp_path / "p", tmp_path / "u")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "u"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_packed_mixture_has_the_state_of_the_dense_one(tmp_path):
    """And generates what it does, decoding token by token, where most experts have none."""
    source = save_pruned(tmp_path / "m", "qwen3_moe")
    fistapruner.pack(source, tmp_path / "p")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    packed = fistapruner.load(tmp_path / "p", dtype=torch.float32)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(dense.generate(IDS, **settings), packed.generate(IDS, **settings))
    state = packed.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(state[name].float(), tensor) for name, tensor in dense.state_dict().items())
    expected = logits(packed)
    packed.save_pretrained(tmp_path / "saved")
    assert sorted(Checkpoint.open(tmp_path / "saved").names()) == sorted(Checkpoint.open(source).names())
    assert packed.load_state_dict(state) == ([], [])
    torch.save(packed, tmp_path / "pickle.pt")
    for model in (packed, copy.deepcopy(packed), torch.load(tmp_path / "pickle.pt", weights_only=False)):
        assert torch.equal(logits(model), expected)
    name = next(name for name in state if name.endswith("experts.down_proj"))
    state[name] = state[name].clone()
    state[name][1] *= 2
    packed.load_state_dict(state)
    assert not torch.equal(logits(packed), expected)
    assert torch.equal(packed.state_dict()[name], state[name])


def test_a_packed_mixture_that_does_not_fit_its_config_is_refused(tmp_path):
    fistapruner.pack(save_pruned(tmp_path / "m", "qwen3_moe"), tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    (tmp_path / "p" / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 8}))
    with pytest.raises(FistaPrunerError, match=r"experts\.(gate_up|down)_proj is .* the config asks for"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    for packed in (True, False):
        with pytest.raises(FistaPrunerError, match=r"does not fit Qwen3MoeForCausalLM"):
            fistapruner.load(tmp_path / "p", packed=packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transformers_casts_as_it_is_told(tmp_path, dtype):
    source = save_pruned(tmp_path / "m")
    fistapruner.pack(source, tmp_path / "p")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=dtype))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load_whole(tmp_path / "p", torch.device("cpu"), dtype)), expected)


def test_a_map_of_several_devices_is_refused(tmp_path):
    """Operators are loaded when the model is placed already."""
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    parts = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(FistaPrunerError, match=rf"{tmp_path / 'p'}: .* one device, and device_map names cpu, disk: "):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p", device_map=parts, offload_folder=tmp_path / "offload")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p", device_map="auto", dtype="auto")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")))


def test_a_packed_model_on_the_hub_says_how_to_get_all_of_it(tmp_path):
    """transformers downloads config and weights only."""
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    (tmp_path / "p" / "packed.json").unlink()
    message = r"no packed\.json\. .* 'hf download NAME --local-dir DIR'"
    with pytest.raises(FistaPrunerError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    with pytest.raises(FistaPrunerError, match=message):
        fistapruner.load("someone/packed")


def test_import_is_all_it_takes(tmp_path):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    code = (
        "import sys, fistapruner; assert 'transformers.quantizers.auto' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    settings = {"capture_output": True, "timeout": 120, "text": True}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=True, **settings)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    without = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=False, **settings)
    assert without.returncode == 1  # no model of random weights
    assert "'import fistapruner' before the model is loaded" in without.stderr.splitlines()[-1]


@pytest.mark.parametrize(("architecture", "values"), [("llama", "int8"), ("gpt2", "int8"), ("bloom", "same")])
def test_a_packed_model_is_saved_copied_and_pickled_whole(tmp_path, architecture, values):
    source = save_pruned(tmp_path / "m", architecture)
    fistapruner.pack(source, tmp_path / "p", values=values)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")
    packed = fistapruner.load(tmp_path / "p")
    expected, state = logits(packed), packed.state_dict()
    assert state.keys() == dense.state_dict().keys()
    if values == "same" or architecture != "gpt2":  # int8 along the stored rows, the inputs of GPT-2, is rounded again
        assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    packed.save_pretrained(tmp_path / "saved")
    assert sorted(Checkpoint.open(tmp_path / "saved").names()) == sorted(Checkpoint.open(source).names())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    assert packed.load_state_dict(state) == ([], [])
    torch.save(packed, tmp_path / "pickle.pt")
    for model in (packed, copy.deepcopy(packed), torch.load(tmp_path / "pickle.pt", weights_only=False)):
        assert sum(isinstance(module, SparseLinear) for module in model.modules()) >= 9
        assert torch.equal(logits(model), expected)


def test_weights_loaded_into_a_packed_model_are_packed(tmp_path):
    for seed in (0, 1):
        fistapruner.pack(save_pruned(tmp_path / f"m{seed}", seed=seed), tmp_path / f"p{seed}")
    packed, other = fistapruner.load(tmp_path / "p0"), fistapruner.load(tmp_path / "p1")
    short = IDS[:, :4]  # few enough for the kernel, which keeps addresses
    with torch.no_grad():
        assert not torch.equal(packed(short).logits, other(short).logits)
        packed.load_state_dict(other.state_dict())
        assert torch.equal(packed(short).logits, other(short).logits)
    state = other.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].T
    with pytest.raises(RuntimeError, match=r"up_proj.weight: the new weight is \[32, 48\]"):
        packed.load_state_dict(state)
    del state[name]
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj.weight"):
        packed.load_state_dict(state)
    assert packed.load_state_dict(state, strict=False).missing_keys == [name]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": [32]},
        {"num_attention_heads": 0},
        {"hidden_act": "nope"},
        {"model_type": "t5"},
        {"rope_parameters": "x"},
        {"vocab_size": 77},
    ],
)
def test_an_odd_config_is_refused_in_one_line(tmp_path, changes):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    path = tmp_path / "p" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(FistaPrunerError, match=str(tmp_path / "p")) as caught:
        fistapruner.load(tmp_path / "p")
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(tmp_path):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    config = (tmp_path / "p" / "config.json").read_text()
    (tmp_path / "p" / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(FistaPrunerError, match="is not in it"):
        fistapruner.load(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(FistaPrunerError, match="not part of"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")
