"""Export to GGUF: llama.cpp and transformers read the model that was written, and other models are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.models.export import export_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
from fistapruner.models.gguf import convert_gguf  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.0] * 2, "short_factor": [1.0, 1.1, 1.2, 1.3] * 2}
LONGER = {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
WIDTH = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 64}
SPREAD = {"query_pre_attn_scalar": 16}
EXPERTS = {"moe_intermediate_size": 32, "norm_topk_prob": True}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "biased": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "granite": ("GraniteConfig", GRANITE),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, **EXPERTS}),
    "gemma2": ("Gemma2Config", {**SPREAD, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**SPREAD, "sliding_window": 4, "num_hidden_layers": 6}),
    "phi3": ("Phi3Config", {}),
    "longrope": ("Phi3Config", {**LONGER, "rope_parameters": {**LONG, "rope_theta": 1e4}}),
    "olmo2": ("Olmo2Config", {}),
}


def byte_level() -> Any:
    """A byte-level tokenizer with one merge, which llama.cpp needs."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ"]  # no parts of characters, which llama.cpp waits with
    tokens = ["<unk>", "<s>", "</s>", *alphabet, "ab"]
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("a", "b")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def pieces() -> Any:
    """A tokenizer like SentencePiece's: bytes where no piece is known, and a space before the text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "ab", "▁ab", "cd"]
    core = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            [("a", "b"), ("▁", "ab"), ("c", "d")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def save(name: str, folder: Path, **changes: Any) -> Any:
    """Save a tiny model of a family with a tokenizer, and return it."""
    kind, settings = MODELS[name]
    spm = name in ("gemma2", "gemma3", "phi3", "longrope", "mistral")
    tokenizer = pieces() if spm else byte_level()
    config = {**tiny.SIZES, **tiny.GQA, "num_hidden_layers": 2, **WIDTH, **settings, **changes}
    config["vocab_size"] = len(tokenizer) + 4  # as of models whose embeddings are padded
    torch.manual_seed(0)
    model = tiny.spread(AutoModelForCausalLM.from_config(getattr(transformers, kind)(**config)).eval())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


PROMPT = [1, 5, 9, 17, 8, 20, 5, 9, 11, 30]


def expected(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0, -1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize(("values", "error"), [("f32", 1e-2), ("q8_0", 0.2)])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_predicts_what_transformers_does(name: str, values: Any, error: float, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    model = save(name, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out.gguf", values)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(tmp_path / "out.gguf"), 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    size = model.config.vocab_size
    asked = {"prompt": PROMPT, "n_predict": 1, "temperature": 0, "n_probs": size, "ignore_eos": False}
    answer = xllamacpp.Server(params).handle_completions(asked)
    found = {top["id"]: top["logprob"] for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    assert [found[token] for token in range(size)] == pytest.approx(expected(model).tolist(), abs=error)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_transformers_reads_the_same_model_back(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out.gguf", "f32")
    convert_gguf(tmp_path / "out.gguf", tmp_path / "back", torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    state = back.state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-6)
    if name == "gemma2":  # to which transformers gives no space before the text
        return
    written, read = (transformers.AutoTokenizer.from_pretrained(tmp_path / each) for each in ("model", "back"))
    for text in ("abcd ab", "ab (cd) 12"):
        assert written(text, add_special_tokens=False).input_ids == read(text, add_special_tokens=False).input_ids


def test_a_pruned_model_keeps_its_zeros_and_its_smaller_widths(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    recipe = {"sparsity": "50%", "method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    fp.prune(tmp_path / "model", tmp_path / "run", **recipe, structure={"remove": "mlp=64,heads=1"})
    assert fp.export(tmp_path / "run", tmp_path / "out.gguf") == tmp_path / "out.gguf"
    convert_gguf(tmp_path / "out.gguf", tmp_path / "back", torch.float32)
    pruned, back = tiny.tensors(tmp_path / "run" / "model"), tiny.tensors(tmp_path / "back")
    assert pruned.keys() == back.keys()
    for name, tensor in pruned.items():
        assert torch.equal(back[name], tensor.bfloat16().float() if tensor.ndim == 2 else tensor), name
    assert json.loads((tmp_path / "back" / "config.json").read_text("utf-8"))["intermediate_size"] == 64


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"model_type": "opt"}, "opt is not exported, only llama, mistral"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "full attention in every 2th layer only"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save(name, tmp_path / "model")
    tiny.configure(tmp_path / "model", **changes)
    with pytest.raises(FistaPrunerError, match=said):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    with pytest.raises(FistaPrunerError, match=r"its name must end in \.gguf"):
        export_gguf(tmp_path / "model", tmp_path / "out.bin")
    with pytest.raises(FistaPrunerError, match="values 'q4'"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", "q4")  # type: ignore[arg-type]
    with tiny.edited(tmp_path / "model") as weights:
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e38
    with pytest.raises(FistaPrunerError, match=r"up_proj.weight' has values that f16 cannot hold"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "out.gguf").touch()
    with pytest.raises(FistaPrunerError, match="exists already"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")
