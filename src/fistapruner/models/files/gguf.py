"""De-quantise a GGUF file into a Hugging Face folder, one tensor at a time.

The format is read by the ``gguf`` package; what its names and layouts mean in ``transformers`` (configuration,
tokenizer, tensor names, permuted attention rows) is taken from ``transformers``' own GGUF loader, whose functions are
semi-private and used in this file only. Before either sees the file, :func:`check_gguf` walks its header with limits,
because both trust its counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from ...errors import FistaPrunerError, one_line
from ...runtime.files import temporary_folder, write_json_atomic, write_text_atomic
from .checkpoint import SINGLE, read_json_in
from .folder import checkpoint_folder, write_index
from .gguf_header import check_gguf
from .safetensors import SafetensorsWriter, TensorEntry

SHARD_BYTES = 4 * 2**30

CONVERSION = 5
"""Version of what is made of a file: it is raised where a conversion changes, so that earlier ones are made again."""

GEMMA2_27B = 46
"""Decoder layers of Gemma 2 27B, which scales attention by width / heads where its smaller ones have the default."""

SPLIT = "tokenizer.ggml.pre"
"""Key whose value names how a vocabulary of byte-level BPE splits text."""

FIRST_SPACE = "tokenizer.ggml.add_space_prefix"
"""Key whose value says whether a vocabulary of SentencePiece has a space put before a text."""

SPLIT_AS_GPT2 = frozenset(
    ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling")
)
"""Values of ``tokenizer.ggml.pre`` of vocabularies that split text as GPT-2 does; so do most files without the key."""

SPLIT_DIGITS = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"))
"""Those of vocabularies that split text as GPT-2 does, after every digit is split off."""

SPLIT_AS_QWEN2 = frozenset(("qwen2", "stablelm2", "hunyuan"))

SPLIT_AS_BLOOM = frozenset(("bloom", "gpt3-finnish", "poro-chat"))
BLOOM_SPLIT = r" ?[^(\s|.,!?…。，、।۔،)]+"

WHOLE_WITH_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken")
)
"""Those of vocabularies whose whole words need no merges; texts begin with BOS unless the file says otherwise."""

COMPOSED = ("Qwen2Tokenizer", "GPTNeoXTokenizer")
"""Classes of ``transformers`` of families whose text is composed (NFC) first, which no key of a file says."""

EPSILON_KEYS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")

EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
"""Names in configs of what norms add to the variance."""


def convert_gguf(path: Path, out: Path, dtype: torch.dtype = torch.bfloat16, *, shard_bytes: int = SHARD_BYTES) -> None:
    """De-quantise a GGUF file into a Hugging Face folder; memory holds one tensor.

    Args:
        path: the GGUF file of a decoder-only language model.
        out: folder to make, with weights, config, tokenizer, chat template, generation config and a model card that
            states the licence; it must not exist.
        dtype: precision of all weights in the folder.
        shard_bytes: bytes of tensors in one weight file at most; a larger tensor has a file of its own.

    Raises:
        FistaPrunerError: ``out`` exists, the disk is full, the file is damaged or has no vocabulary, the order of
            values of its architecture is not known, it has tensors, positions or windows of attention that
            ``transformers`` would leave out, it splits text in a way that is unknown or that ``transformers`` does not
            keep, or it is a mixture of experts.
        MissingExtraError: the ``gguf`` package is missing.
    """
    packed = check_gguf(path)
    if any("_exps." in name for name in packed):
        raise FistaPrunerError(f"{path} is a mixture of experts, which is not supported")
    with transformers_faults(path):
        from gguf import GGUFReader

        reader = GGUFReader(path)
        architecture_of(path, reader, "take the model's Hugging Face checkpoint")
        if "tokenizer.ggml.tokens" not in reader.fields:
            raise FistaPrunerError(
                f"{path} has no vocabulary (tokenizer.ggml.tokens): take a file that has, or the model's Hugging Face "
                "checkpoint"
            )
    space = dtype.itemsize * sum(math.prod(entry.shape) for entry in packed.values())
    with checkpoint_folder(out, space) as partial, transformers_faults(path):
        model, config, tokenizer = _describe(path, reader, dtype)
        names = name_map(reader, model, config)
        _keep_all(path, reader, names, config)
        entries = _entries(path, model, set(names.values()), dtype)
        config.save_pretrained(partial)
        _save_tokenizer(path, tokenizer, partial)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        shards = list(_shards(entries, shard_bytes))
        numbered = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        files = dict(zip(numbered if len(shards) > 1 else [SINGLE], shards, strict=True))
        _write_weights(path, partial, reader, config, names, files)
        if len(files) > 1:
            write_index(partial, files)
        if (licence := reader.fields.get("general.license")) is not None:
            metadata = yaml.safe_dump({"license": str(licence.contents())}, allow_unicode=True)
            write_text_atomic(partial / "README.md", f"---\n{metadata}---\n# {path.name}, de-quantised\n")


def _describe(path: Path, reader: Any, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Build the model on the meta device, its configuration and its tokenizer from the file."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Beside the file transformers would look for a tokenizer and its settings, and take those of another model.
    with temporary_folder() as alone:
        (Path(alone) / path.name).symlink_to(path.absolute())
        where = {"pretrained_model_name_or_path": alone, "gguf_file": path.name}
        config = AutoConfig.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    _restore_split(path, reader, tokenizer)
    _restore_first_space(path, reader, tokenizer)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    _restore_sizes(reader, config)
    _restore_attention_scale(config)
    _restore_positions(path, reader, config)
    _restore_rotary_width(path, reader, config)
    _restore_epsilon(reader, config)
    if any(tensor.name == "output.weight" for tensor in reader.tensors):
        config.tie_word_embeddings = False  # transformers ties the heads of all Falcons and BLOOMs
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    return model, config, tokenizer


def _restore_split(path: Path, reader: Any, tokenizer: Any) -> None:
    """Split text before byte-level BPE as the file names it; restore what else goes with that name.

    ``transformers`` knows some of llama.cpp's names, and takes GPT-2's split for all others.

    Raises:
        FistaPrunerError: neither it nor this function knows the name.
    """
    from tokenizers import Regex
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    fields = {key: reader.fields[key].contents() for key in ("tokenizer.ggml.model", SPLIT) if key in reader.fields}
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return
    if (family := type(tokenizer).__name__) in COMPOSED:
        tokenizer.backend_tokenizer.normalizer = NFC()
    name = fields.get(SPLIT, "qwen2" if family == "Qwen2Tokenizer" else "gpt-2")
    if name in WHOLE_WITH_BOS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in reader.fields:
            tokenizer.add_bos_token = True
    if name in SPLIT_AS_GPT2:
        return
    regex = ByteLevel(add_prefix_space=False, use_regex=True)
    if name in SPLIT_DIGITS:
        steps = [Digits(individual_digits=True), regex]
    elif name == "falcon":
        triples = Split(Regex("[0-9][0-9][0-9]"), "isolated")
        steps = [Punctuation("contiguous"), regex, Digits(individual_digits=False), triples]
    elif name in SPLIT_AS_QWEN2 or name in SPLIT_AS_BLOOM:
        pattern = PRETOKENIZE_REGEX if name in SPLIT_AS_QWEN2 else BLOOM_SPLIT
        steps = [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        try:
            from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
        except ImportError:  # an earlier transformers, which tells the split by the architecture
            return
        if name in GGUF_PRE_TOKENIZER_SPLITS:
            return
        raise FistaPrunerError(
            f"{path} splits text by {name!r} ({SPLIT}), which transformers does not know: take the model's Hugging "
            "Face checkpoint"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def _restore_first_space(path: Path, reader: Any, tokenizer: Any) -> None:
    """Put no space before a text where the file of a SentencePiece vocabulary says so.

    Raises:
        FistaPrunerError: the tokenizer puts one there in an unknown way.
    """
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
    from tokenizers.pre_tokenizers import Metaspace

    fields = {
        key: reader.fields[key].contents() for key in ("tokenizer.ggml.model", FIRST_SPACE) if key in reader.fields
    }
    if fields != {"tokenizer.ggml.model": "llama", FIRST_SPACE: False}:
        return
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, Metaspace):
        backend.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
        backend.decoder = Sequence([Replace("\u2581", " "), ByteFallback(), Fuse()])
    elif "Prepend" in json.dumps(_steps(tokenizer)["normalizer"]):
        raise FistaPrunerError(
            f"{path} puts no space before a text ({FIRST_SPACE}), where transformers does: take the model's Hugging "
            "Face checkpoint"
        )


def _save_tokenizer(path: Path, tokenizer: Any, out: Path) -> None:
    """Save a tokenizer so that it is loaded as it is.

    Classes of tokenizers of one family rebuild all but the vocabulary, whatever the folder says; the general one,
    by the name that transformers 4 knows too, does not.

    Raises:
        FistaPrunerError: ``transformers`` loads another one: it takes the family's class all the same.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(out)
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": tokenizer.padding_side}
    write_json_atomic(out / "tokenizer_config.json", read_json_in(out, "tokenizer_config.json") | kept)
    found = _steps(loaded := AutoTokenizer.from_pretrained(str(out)))
    for step, wanted in _steps(tokenizer).items():
        if found[step] != wanted:
            raise FistaPrunerError(
                f"{path} has a vocabulary with another {step} than {type(loaded).__name__}, which transformers takes "
                "for this architecture: take the model's Hugging Face checkpoint"
            )


def _steps(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer does beside looking up its vocabulary."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    found = {step: state[step] for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    return found | {key: state["model"].get(key) for key in ("byte_fallback", "ignore_merges")}


def _restore_sizes(reader: Any, config: Any) -> None:
    """Set the sizes that ``transformers`` does not read: of heads for most architectures, and of GPT-2."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    architecture = reader.fields["general.architecture"].contents()
    read = {"attention.key_length": ("head_dim", head_width(config))}
    if "attention.key_length" in GGUF_CONFIG_MAPPING[architecture]:
        read = {}
    if config.model_type == "gpt2":
        width = config.n_inner or 4 * config.n_embd
        read = {"feed_forward_length": ("n_inner", width), "context_length": ("n_positions", config.n_positions)}
    for key, (name, known) in read.items():
        field = reader.fields.get(f"{architecture}.{key}")
        if field is not None and type(stored := field.contents()) is int and stored != known:
            setattr(config, name, stored)


def _restore_attention_scale(config: Any) -> None:
    """Set the attention scale of Gemma 2 27B.

    No key of a GGUF file holds it: llama.cpp tells it by the number of layers.
    """
    if config.model_type == "gemma2" and config.num_hidden_layers == GEMMA2_27B:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _restore_positions(path: Path, reader: Any, config: Any) -> None:
    """Set the base of rotary positions and the sliding window as the file has them.

    ``transformers`` does not read them for some architectures.

    Raises:
        FistaPrunerError: a value differs that the config cannot take: it has one for each type of layer, or none.
    """
    architecture = reader.fields["general.architecture"].contents()
    rotary = getattr(config, "rope_parameters", None) or {}
    one_window = hasattr(config, "sliding_window") and not getattr(config, "layer_types", None)
    read = {
        "rope.freq_base": rotary.get("full_attention", rotary).get("rope_theta"),
        "rope.freq_base_swa": rotary.get("sliding_attention", {}).get("rope_theta"),
        "attention.sliding_window": getattr(config, "sliding_window", None),
    }
    for key, known in read.items():
        field = reader.fields.get(f"{architecture}.{key}")
        if field is None or (known is None and key.startswith("rope.")):  # no such positions in the model
            continue
        stored = field.contents()
        if stored == known or (not stored and not known):  # a window of 0 is none
            continue
        if key == "rope.freq_base" and known == rotary.get("rope_theta") and type(stored) is float and stored > 0:
            config.rope_parameters = {**rotary, "rope_theta": stored}
        elif key == "attention.sliding_window" and one_window and type(stored) is int:
            config.sliding_window = stored or None
        else:
            raise _not_taken(path, f"{field.name} {stored!r}", known)


def _not_taken(path: Path, stored: str, known: Any) -> FistaPrunerError:
    return FistaPrunerError(
        f"{path} has {stored}, where transformers takes {known!r}: take the model's Hugging Face checkpoint"
    )


def rotary_width(config: Any) -> int | None:
    """Count the dimensions of a head that rotary positions turn; None without one count for all layers."""
    rotary = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rotary:
        return None
    factor = rotary.get("partial_rotary_factor")
    return int(head_width(config) * (1 if factor is None else factor))


def head_width(config: Any) -> int:
    """Return the dimensions of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def epsilon(config: Any) -> float | None:
    """Return what norms add to the variance; None if the config does not say it."""
    return next((value for name in EPSILONS if type(value := getattr(config, name, None)) is float), None)


def _restore_rotary_width(path: Path, reader: Any, config: Any) -> None:
    """Set the dimensions of a head that rotary positions turn: all of them if the file does not say it.

    Raises:
        FistaPrunerError: the config cannot take them.
    """
    if (known := rotary_width(config)) is None:
        return
    head = head_width(config)
    field = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.rope.dimension_count")
    stored = head if field is None else field.contents()
    if stored == known:
        return
    fits = type(stored) is int and 0 < stored <= head and int(head * (stored / head)) == stored
    if config.rope_parameters.get("partial_rotary_factor") is None or not fits:
        raise _not_taken(path, f"rotary positions over {stored!r} dimensions of a head (rope.dimension_count)", known)
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": stored / head}


def _restore_epsilon(reader: Any, config: Any) -> None:
    """Set what norms add to the variance: ``transformers`` reads one of two keys, for some the wrong one."""
    architecture = reader.fields["general.architecture"].contents()
    for key in EPSILON_KEYS:
        field = reader.fields.get(f"{architecture}.{key}")
        for name in EPSILONS if field else ():
            known = getattr(config, name, None)
            if type(known) is float and not math.isclose(known, field.contents(), rel_tol=1e-6):
                setattr(config, name, field.contents())


def architecture_of(path: Path, reader: Any, advice: str) -> str:
    """Return a file's architecture; refuse one whose order of values is not known.

    Known are those of ``transformers``' earlier loader.

    Mixtures of experts, some of which ``transformers`` reads under another name, are refused before.

    Args:
        path: the file, for the message.
        reader: of the file.
        advice: what to do instead.
    """
    from transformers.integrations import GGUF_CONFIG_MAPPING

    architecture: str = reader.fields["general.architecture"].contents()
    if architecture not in GGUF_CONFIG_MAPPING:
        raise FistaPrunerError(
            f"{path}: fistapruner does not convert GGUF files of the architecture {architecture!r}, because the order "
            f"of their values is not known; {advice}"
        )
    return architecture


def processor_of(reader: Any, config: Any) -> Any:
    """Return what ``transformers`` applies to tensors of this architecture: permutations, shifted norms."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, read_field

    architecture = read_field(reader, "general.architecture")[0]
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())


def name_map(reader: Any, model: Any, config: Any) -> dict[str, str]:
    """Map the GGUF name of every tensor of the file that the model has to the model's name."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map, read_field

    # By the file's own name of the architecture: that of Mistral is llama there.
    architecture = read_field(reader, "general.architecture")[0]
    table: dict[str, str] = get_gguf_hf_weights_map(model, processor_of(reader, config), architecture)
    return {tensor.name: table[tensor.name] for tensor in reader.tensors if tensor.name in table}


def _keep_all(path: Path, reader: Any, names: dict[str, str], config: Any) -> None:
    """Refuse a file of which ``transformers`` leaves something out; restore Llama 3's positions.

    The file of a Llama 3.1 or later has them as one tensor of factors, without the settings that made it. These are the
    same in all of Meta's models but for one, and are accepted only if they give the file's factors.
    """
    from gguf import dequantize

    lost = [tensor for tensor in reader.tensors if tensor.name not in names and "attn_rot_embd" not in tensor.name]
    where = "which transformers does not read: take the model's Hugging Face checkpoint"
    falcon = reader.fields.get("mamba.ssm.dt_b_c_rms")
    if falcon is not None and falcon.contents():
        raise FistaPrunerError(f"{path} is a Falcon-Mamba, with norms (mamba.ssm.dt_b_c_rms) {where}")
    if (scaling := scaled_positions(reader)) is not None:
        raise FistaPrunerError(f"{path} has rotary positions scaled by {scaling!r}, {where}")
    for tensor in lost:
        if tensor.name != "rope_freqs.weight":
            raise FistaPrunerError(f"{path} has a tensor {tensor.name!r}, {where}")
        factors = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).flatten().float()
        if not bool((factors == 1).all()) and not _restore_llama3(config, factors):
            raise FistaPrunerError(f"{path} has rotary positions scaled by {tensor.name!r}, {where}")


def scaled_positions(reader: Any) -> str | None:
    """Return how the keys of a file say that rotary positions are scaled; None if they are not."""
    values = {key: field.contents() for key, field in reader.fields.items() if ".rope.scal" in key}
    scalings = [value for key, value in values.items() if key.endswith("rope.scaling.type")]
    scales = [value for key, value in values.items() if key.endswith(("rope.scaling.factor", "rope.scale_linear"))]
    if not scalings and any(scale not in (0, 1) for scale in scales):  # to llama.cpp 0 is 1
        scalings.append("linear")
    return next((str(scaling) for scaling in scalings if scaling != "none"), None)


def _restore_llama3(config: Any, factors: torch.Tensor) -> bool:
    """Set the scaled rotary positions of Llama 3 in a config; return whether they give these factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = dict(config.rope_parameters)
    scaled = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.rope_parameters = {**plain, "rope_type": "llama3", **scaled, "original_max_position_embeddings": 8192}
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(found), 2).float() / (2 * len(found))
    wanted = plain["rope_theta"] ** -steps
    return len(found) == len(factors) and torch.allclose(found * factors, wanted, rtol=1e-3, atol=0)


def _entries(path: Path, model: Any, found: set[str], dtype: torch.dtype) -> list[TensorEntry]:
    state = model.state_dict(keep_vars=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name, tensor in state.items():
        tied = (
            head is not None
            and tensor is head.weight
            and (model.config.tie_word_embeddings or tensor is embedding.weight)
        )
        if name not in found and not tied:
            raise FistaPrunerError(f"{path} has no tensor for {name!r} of {type(model).__name__}")
    return [TensorEntry.of(name, dtype, tensor.shape) for name, tensor in state.items() if name in found]


def _write_weights(
    path: Path, out: Path, reader: Any, config: Any, names: dict[str, str], files: dict[str, list[TensorEntry]]
) -> None:
    from gguf import dequantize

    tensors = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
    processor = processor_of(reader, config)
    for file, shard in files.items():
        with SafetensorsWriter(out / file, shard, {"format": "pt"}) as writer:
            for entry in shard:
                source = tensors[entry.name]
                sidestep: dict[str, Any] = {"tensors": {}}  # the GPT-2 processor puts an untied head here
                result = processor.process(
                    weights=dequantize(source.data, source.tensor_type),
                    name=source.name,
                    tensor_key_mapping=names,
                    parsed_parameters=sidestep,
                )
                values = sidestep["tensors"].get(entry.name, None)
                tensor = torch.tensor(result.weights) if values is None else values
                if tuple(tensor.shape) != entry.shape:
                    found, asked = list(tensor.shape), list(entry.shape)
                    raise FistaPrunerError(f"{path}: tensor {source.name!r} is {found}, the config asks for {asked}")
                writer.write(entry.name, tensor.to(entry.dtype))


def _shards(entries: list[TensorEntry], limit: int) -> Iterator[list[TensorEntry]]:
    shard: list[TensorEntry] = []
    for entry in entries:
        if shard and sum(other.nbytes for other in shard) + entry.nbytes > limit:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


@contextmanager
def transformers_faults(path: Path) -> Iterator[None]:
    """Turn any error of ``transformers`` or ``gguf`` into one line that names the file."""
    try:
        yield
    except FistaPrunerError:
        raise
    except Exception as error:  # whatever a hostile file makes of a configuration, a tokenizer or an array
        import transformers

        reason = one_line(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it has no key {reason}"
        raise FistaPrunerError(
            f"{path} cannot be converted with transformers {transformers.__version__}: {reason}"
        ) from error
