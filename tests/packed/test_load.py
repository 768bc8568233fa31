"""Packed folders as transformers models: the same logits, the same text, on every architecture."""

import copy
import subprocess
import sys

import pytest
import torch
from pruned import IDS, logits, save_pruned
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import fistapruner
from fistapruner import FistaPrunerError, SparseLinear
from fistapruner.models.build import load_whole
from fistapruner.models.checkpoint import QUANT_METHOD, Checkpoint
from fistapruner.packed import kernel
from fistapruner.packed.checkpoint import PackedCheckpoint
from fistapruner.packed.linear import Int8Embedding
from tiny import ARCHITECTURES, configure, edited, store_head

SOME = ("gpt2", "llama", "opt", "phi3")
"""Transposed, separate, biased and fused operators; the others are slow tests."""

APART = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3")
"""Mixtures whose experts are stored one by one."""

CASES = [(each, values) for each in sorted(ARCHITECTURES) for values in ("same", "int8")]
CASES += [(each, values) for each in APART for values in ("same", "some experts")]
QUICK = [("qwen3_moe", "some experts"), ("mixtral", "same"), *(case for case in CASES if case[0] in SOME)]


@pytest.mark.parametrize(
    ("architecture", "values"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_every_way_of_loading_agrees(tmp_path, architecture, values):
    """Where a few experts are not packed, too."""
    source = save_pruned(tmp_path / "m", architecture)
    if values == "some experts":
        with edited(source) as tensors:
            for name in [name for name in tensors if ".experts." in name][::5]:
                tensors[name] = torch.randn_like(tensors[name]) * 0.1
    fistapruner.pack(source, tmp_path / "p", values="int8" if values == "int8" else "same")
    exact = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    fistapruner.unpack(tmp_path / "p", tmp_path / "u")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "u", dtype="auto"))
    assert torch.equal(expected, exact) == (values != "int8")
    assert float((expected - exact).norm() / exact.norm()) < 0.05
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")
    assert not any(parameter.is_meta for parameter in through_transformers.parameters())
    assert torch.equal(logits(through_transformers), expected)
    assert torch.equal(logits(fistapruner.load(tmp_path / "p", packed=False)), expected)
    packed = fistapruner.load(tmp_path / "p")
    operators = sum(not spec.dense for spec in PackedCheckpoint(tmp_path / "p").specs.values())
    assert operators >= 9
    assert sum(isinstance(module, SparseLinear) for module in packed.modules()) == operators + (values == "int8")
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
@pytest.mark.parametrize("zeros", [False, True])
def test_a_stored_head_of_a_tied_model_is_that_of_transformers(tmp_path, head, zeros):
    """It is the model's own where its values are not the embedding's, whatever the config says; it may be packed."""
    source = store_head(save_pruned(tmp_path / "m", tie_word_embeddings=True), head)
    if zeros:
        with edited(source) as tensors:
            tensors["lm_head.weight"] *= torch.arange(tensors["lm_head.weight"].shape[1]) % 2
    fistapruner.pack(source, tmp_path / "p")
    assert ("lm_head.weight" in PackedCheckpoint(tmp_path / "p").specs) == zeros
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype="auto")), expected)
    packed = fistapruner.load(tmp_path / "p")
    for model in (fistapruner.load(tmp_path / "p", packed=False), packed):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head == "alone")
        torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.1)
    packed.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")), expected)


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


def test_import_is_all_it_takes(tmp_path, monkeypatch):
    fistapruner.pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    code = (
        "import sys, fistapruner; assert 'transformers.quantizers.auto' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=True, timeout=120)
    for methods in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(methods, QUANT_METHOD)  # as without the import
    with pytest.raises(
        (OSError, ValueError), match="'import fistapruner' before the model is loaded"
    ):  # no random weights
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")


@pytest.mark.parametrize(
    ("architecture", "values"), [("llama", "int8"), ("gpt2", "int8"), ("bloom", "same"), ("qwen3_moe", "same")]
)
def test_a_packed_model_is_saved_copied_and_pickled_whole(tmp_path, architecture, values):
    """And generates what the dense one does, decoding token by token, where most experts have none."""
    source, exact = save_pruned(tmp_path / "m", architecture), values == "same"
    fistapruner.pack(source, tmp_path / "p", values=values)
    dtype = torch.float32 if exact else "auto"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=dtype)
    packed = fistapruner.load(tmp_path / "p", dtype=dtype)
    expected, state = logits(packed), packed.state_dict()
    assert state.keys() == dense.state_dict().keys()
    if exact or architecture != "gpt2":  # int8 along the stored rows, the inputs of GPT-2, is rounded again
        assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in dense.state_dict().items())
    packed.save_pretrained(tmp_path / "saved")
    assert sorted(Checkpoint.open(tmp_path / "saved").names()) == sorted(Checkpoint.open(source).names())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").state_dict()
    assert all(torch.equal(saved[name].to(tensor.dtype), tensor) for name, tensor in state.items())
    assert packed.load_state_dict(state) == ([], [])
    torch.save(packed, tmp_path / "pickle.pt")
    for model in (packed, copy.deepcopy(packed), torch.load(tmp_path / "pickle.pt", weights_only=False)):
        assert sum(isinstance(module, SparseLinear) for module in model.modules()) >= 9
        assert torch.equal(logits(model), expected)
    if not exact:
        return
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(dense.generate(IDS, **settings), packed.generate(IDS, **settings))
    name = next(name for name in state if name.endswith(("experts.down_proj", "dense_4h_to_h.weight")))
    state[name] = state[name].clone()
    state[name][1] *= 2
    packed.load_state_dict(state)
    assert not torch.equal(logits(packed), expected)
    assert torch.equal(packed.state_dict()[name], state[name])


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


def save_odd(folder, changes, architecture="llama"):
    """A packed folder whose config was changed."""
    fistapruner.pack(save_pruned(folder / "m", architecture), folder / "p")
    return configure(folder / "p", **changes)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"hidden_size": [32]}),
        ("llama", {"num_attention_heads": 0}),
        ("llama", {"hidden_act": "nope"}),
        ("llama", {"model_type": "t5"}),
        ("llama", {"rope_parameters": "x"}),
        ("llama", {"vocab_size": 77}),
        ("llama", {"num_hidden_layers": 4}),
        ("qwen3_moe", {"moe_intermediate_size": 8}),
    ],
)
def test_an_odd_config_is_refused_in_one_line(tmp_path, architecture, changes):
    folder = save_odd(tmp_path, changes, architecture)
    for packed in (True, False):
        with pytest.raises(FistaPrunerError, match=str(folder)) as caught:
            fistapruner.load(folder, packed=packed)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("qwen3_moe", {"moe_intermediate_size": 8}, r"experts\.(gate_up|down)_proj is .* the config asks for"),
        ("llama", {"num_hidden_layers": 2}, "not part of"),
    ],
)
def test_operators_that_do_not_fit_the_model_of_transformers_are_refused(tmp_path, architecture, changes, message):
    with pytest.raises(FistaPrunerError, match=message):
        AutoModelForCausalLM.from_pretrained(save_odd(tmp_path, changes, architecture))
