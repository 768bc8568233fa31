"""De-quantise a GGUF file into a Hugging Face folder, one tensor at a time.

The format is read by the ``gguf`` package; what its names and layouts mean in ``transformers`` (configuration,
tokenizer, tensor names, permuted attention rows) is taken from ``transformers``' own GGUF loader, whose functions are
semi-private and used in this file only. What that loader leaves out or reads wrongly is restored in the configuration
(:mod:`.gguf_config`) and the tokenizer (:mod:`.gguf_tokenizer`). Before either package sees the file,
:func:`check_gguf` walks its header with limits, because both trust its counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from ...errors import FistaPrunerError, one_line
from ...runtime.files import temporary_folder, write_text_atomic
from .folder import checkpoint_folder, write_index
from .folder_files import SINGLE
from .gguf_config import restore_config, restore_llama3, scaled_positions
from .gguf_header import check_gguf
from .gguf_tokenizer import restore_tokenizer, save_tokenizer
from .safetensors import SafetensorsWriter, TensorEntry

SHARD_BYTES = 4 * 2**30

CONVERSION = 5
"""Version of what is made of a file: it is raised where a conversion changes, so that earlier ones are made again."""


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
        reader = open_gguf(path)
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
        save_tokenizer(path, tokenizer, partial)
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


def open_gguf(path: Path) -> Any:
    """Read a file with the ``gguf`` package, from a plain array.

    That takes a third of the time of a mapped one.
    """
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    return Reader(path)


@contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    """Replace a name of the ``gguf`` package, which ``transformers`` imports when it is called."""
    import gguf

    before = getattr(gguf, name)
    setattr(gguf, name, value)
    try:
        yield
    finally:
        setattr(gguf, name, before)


def _describe(path: Path, reader: Any, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Build the model on the meta device, its configuration and its tokenizer from the file."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Beside the file transformers would look for a tokenizer and its settings, and take those of another model.
    with temporary_folder() as alone:
        (Path(alone) / path.name).symlink_to(path.absolute())
        where = {"pretrained_model_name_or_path": alone, "gguf_file": path.name}
        with _replaced("GGUFReader", lambda *_: reader):  # transformers reads the file for each of them
            config = AutoConfig.from_pretrained(**where)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    restore_tokenizer(path, reader, tokenizer)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    restore_config(path, reader, config)
    if any(tensor.name == "output.weight" for tensor in reader.tensors):
        config.tie_word_embeddings = False  # transformers ties the heads of all Falcons and BLOOMs
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    return model, config, tokenizer


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
    import gguf
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map, read_field

    # By the file's own name of the architecture: that of Mistral is llama there.
    architecture = read_field(reader, "general.architecture")[0]
    # transformers builds the same one for every module, which takes seconds
    with _replaced("get_tensor_name_map", cache(gguf.get_tensor_name_map)):
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
        if not bool((factors == 1).all()) and not restore_llama3(config, factors):
            raise FistaPrunerError(f"{path} has rotary positions scaled by {tensor.name!r}, {where}")


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
