"""Tiny randomly initialised models of many architectures, saved as Hugging Face folders; what their runs say."""

import json
import socket
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

import fistapruner as fp
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.runs.log import Listener
from fistapruner.runs.records import LayerEntry, load_run

Cli = Callable[..., Any]
"""The fixture ``cli``."""

VOCABULARY = 128
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = {**WIDE, "num_key_value_heads": 2}

# Keyed by what tests call them: configuration class and its arguments.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA),
    "opt": ("OPTConfig", {**WIDE, "ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": 16}),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", {**GQA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GQA, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**GQA, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6}),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 8}),
    "phi": ("PhiConfig", WIDE),
    "phi3": ("Phi3Config", GQA),
    "gpt_neox": ("GPTNeoXConfig", WIDE),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "falcon": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
}

SMALL = {"source": "python", "samples": 4, "seqlen": 32}
"""A short calibration text."""

ROUTED = {**GQA, "num_hidden_layers": 2, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**ROUTED, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**ROUTED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral": ("MixtralConfig", {**ROUTED, "num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {**ROUTED, "num_experts": 4}),
    "gpt_oss": ("GptOssConfig", {**ROUTED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 8}),
    "granitemoe": ("GraniteMoeConfig", {**ROUTED, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **ROUTED,
            **LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **GQA,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
}
"""Mixtures of experts. Those of GPT-OSS, Granite and Gemma 4 are stored as one tensor of all experts.

Gemma 4's experts and router stand in the decoder layer itself.
"""

MLP = {
    "opt": (("fc1",), "fc2"),
    "phi": (("mlp.fc1",), "mlp.fc2"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "phi3": (("mlp.gate_up_proj",), "mlp.down_proj"),
    **dict.fromkeys(("gpt_neox", "falcon", "bloom"), (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
}
MLP = {each: MLP.get(each, (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")) for each in ARCHITECTURES}
"""The operators that write the channels of an MLP, and the one that reads them."""

ATTENTION = {
    "opt": "self_attn.out_proj",
    "phi": "self_attn.dense",
    "gpt_neox": "attention.dense",
    "gpt2": "attn.c_proj",
}
ATTENTION |= dict.fromkeys(("falcon", "bloom"), "self_attention.dense")
ADDING = {each: (ATTENTION.get(each, "self_attn.o_proj"), MLP[each][1]) for each in ARCHITECTURES}
ADDING |= dict.fromkeys(("gemma2", "gemma3"), ())  # another norm comes between
"""The operators of a decoder layer whose output is added to the hidden states."""


def need_transformers(release: str) -> None:
    """Skip the test or file where transformers is older: the package takes it, but it does not yet what they say."""
    if Version(transformers.__version__) < Version(release):
        pytest.skip(f"needs transformers {release}", allow_module_level=True)


def quick_first(names: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Cases of a test, the others than quick ones marked as slow."""
    return [pytest.param(each, marks=() if each in quick else pytest.mark.slow) for each in names]


def build(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised model, its weights :func:`spread`."""
    if architecture == "granitemoe":
        need_transformers("5.16")  # before, Granite calls its experts in another way, and is refused
    name, arguments = (ARCHITECTURES | MIXTURES)[architecture]
    config = getattr(transformers, name)(**{**SIZES, **arguments, **changes})
    torch.manual_seed(seed)
    return spread(transformers.AutoModelForCausalLM.from_config(config).eval())


def spread(model: Any) -> Any:
    """Draw weights so widely that every layer changes the logits; in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokenizer() -> Any:
    """A byte-level tokenizer whose vocabulary is the 7-bit characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [chr(code) for code in range(33, 127)]
    for symbol in [*printable, "Ġ", "Ċ", *alphabet]:
        if len(vocabulary) < VOCABULARY and symbol not in vocabulary:
            vocabulary[symbol] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def save(
    architecture: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "50GB",
    original: bool = True,
    **changes: Any,
) -> Path:
    """Save a tiny model with its tokenizer, under its names of today where not ``original``; returns the folder."""
    return store(build(architecture, **changes).to(dtype), folder, max_shard_size=shard, save_original_format=original)


def store(model: Any, folder: Path, **settings: Any) -> Path:
    """Save a model with a tokenizer; returns the folder."""
    model.save_pretrained(folder, **settings)
    tokenizer().save_pretrained(folder)
    return folder


def save_unused_expert(folder: Path, expert: int) -> Path:
    """Save a GPT-OSS whose router never chooses an expert; returns the folder."""
    model = build("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[expert] = -1e4
    return store(model, folder)


def loaded(folder: Path, **settings: Any) -> Any:
    """The whole model of a checkpoint, by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def opened(folder: Path, dtype: torch.dtype | None = None) -> LayerwiseModel:
    """The model of a checkpoint without its weights."""
    return LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"), dtype)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def edited(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a checkpoint of one file, which are stored again as the block leaves them."""
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **entries: Any) -> Path:
    """Change entries of a checkpoint's config; returns the folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | entries), "utf-8")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def save_image_text(folder: Path) -> Path:
    """Save a tiny model of images and text with its tokenizer and a file of its image processor."""
    text = {**SIZES, **GQA, "head_dim": 8, "tie_word_embeddings": False}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    tower = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
    tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=False)
    store(spread(transformers.AutoModelForImageTextToText.from_config(config)), folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}')
    return folder


def store_head(folder: Path, head: str) -> Path:
    """Store the head of a tied llama with ``"other"`` values beside the embedding, ``"equal"`` ones, or ``"alone"``."""
    with edited(folder) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0).contiguous() if head == "other" else embedding.clone()
        if head == "alone":
            del tensors["model.embed_tokens.weight"]
    return folder


class Said(Listener):
    """Keeps the sentences of a run, and the names of its long passes, in their order."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.passes: list[str] = []

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def tick(self, what: str, done: int, total: int) -> None:
        self.passes += [what] if self.passes[-1:] != [what] else []


class Stops(Said):
    """Interrupts a run after so many layers."""

    def __init__(self, after: int = 1) -> None:
        super().__init__()
        self.left = after

    def layer(self, entry: LayerEntry) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class StopsAt(Said):
    """Interrupts a run when it says these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def say(self, sentence: str) -> None:
        super().say(sentence)
        if self.words in sentence:
            raise KeyboardInterrupt


def begin(model: str | Path, out: str | Path, layers: int = 1, **settings: Any) -> fp.Report:
    """Prune so many layers of a model, and interrupt the run; returns its report."""
    with pytest.raises(KeyboardInterrupt):
        fp.prune(model, out, listener=Stops(layers), **settings)
    return load_run(Path(out))


def prune(
    place: Path, architecture: str = "llama", changes: dict[str, Any] | None = None, **settings: Any
) -> fp.Report:
    """Save a tiny model as ``model`` and prune it to ``run``, on a short text if none is given; returns the report."""
    model = save(architecture, place / "model", **(changes or {}))
    return fp.prune(model, place / "run", **{"calibration": SMALL, **settings})


def free_port() -> int:
    """A port of this machine at which processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def weights(run: Path) -> dict[str, bytes]:
    """The weight files of a run's result, by name."""
    found = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert found
    return found


def write_text(path: Path) -> Path:
    """Write sixty short documents that are all different to a ``.jsonl`` file; returns it."""
    texts = (f"{number} is followed by {number + 1}, as everybody knows." for number in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_pairs(path: Path) -> Path:
    """Write forty preference pairs, whose chosen answers no model prefers, to a ``.jsonl`` file; returns it."""
    pairs = ({"prompt": f"After {n} comes", "chosen": f" no {n}!", "rejected": f" {n + 1}."} for n in range(40))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


class Bench:
    """Dense models of two layers and pruned ones, made once each, their text and their preference pairs.

    Args:
        folder: holds them.
        sparsity: of pruned models for which none is named.
    """

    def __init__(self, folder: Path, sparsity: str = "2:4") -> None:
        self.folder, self.sparsity = folder, sparsity
        self.text, self.pairs = write_text(folder / "text.jsonl"), write_pairs(folder / "pairs.jsonl")

    def dense(self, architecture: str = "llama", **changes: Any) -> Path:
        name = "-".join([architecture, *map(str, changes.values())])
        layers = "n_layer" if architecture in ("gpt2", "bloom") else "num_hidden_layers"
        if not (self.folder / name).exists():
            save(architecture, self.folder / name, **{layers: 2, **changes})
        return self.folder / name

    def pruned(self, architecture: str = "llama", sparsity: str | None = None, **changes: Any) -> Path:
        """A pruning run of a dense model."""
        dense, sparsity = self.dense(architecture, **changes), sparsity or self.sparsity
        run = self.folder / f"{dense.name} pruned to {sparsity.replace('%', ' percent')}"
        if not run.exists():
            calibration = {"source": str(self.text), "samples": 2, "seqlen": 16}
            fp.prune(dense, run, method="wanda", sparsity=sparsity, calibration=calibration)
        return run


def inputs_of(model: Any, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """(tokens, n) fp64 inputs of an operator."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()
