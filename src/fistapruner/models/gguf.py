"""Make a Hugging Face folder of a GGUF file with the reader of ``transformers``; all is in memory.

What that reader does not understand is refused where it would give another model without a word: positions that are
scaled by a tensor, tensors that the file lacks, and vocabularies that split text in a way that it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..runtime.files import refuse_lfs_pointer, temporary_folder, write_json_atomic, write_text_atomic
from .checkpoint import read_json_in
from .write import checkpoint_folder

CONVERSION = 6
"""Version of what is made of a file: it is raised where a conversion changes, so that earlier ones are made again."""

SPLIT_AS_GPT2 = frozenset(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"))
"""Values of ``tokenizer.ggml.pre`` for which the split of GPT-2, which ``transformers`` takes by default, is right."""

SPLIT_DIGITS = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"))
"""Those that split text as GPT-2 does, after every digit is split off."""


def open_gguf(path: Path) -> Any:
    """Read the header of a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "reading a GGUF file") from None
    return GGUFReader(path)


def convert_gguf(path: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """De-quantise the GGUF file of a decoder-only language model into a new Hugging Face folder.

    It gets weights of this dtype, config, tokenizer, chat template, generation config and a model card that states the
    licence.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with faults_named(path):
        reader = open_gguf(path)
    space = sum(math.prod(map(int, tensor.shape)) for tensor in reader.tensors) * dtype.itemsize
    with checkpoint_folder(out, space) as partial, faults_named(path), temporary_folder() as alone:
        if fault := _fault(reader):
            raise FistaPrunerError(f"{path} {fault}")
        # In a folder of its own, because transformers takes a tokenizer that lies beside the file.
        (Path(alone) / path.name).symlink_to(path.absolute())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
        settings = {"gguf_file": path.name, "dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
        model, loaded = AutoModelForCausalLM.from_pretrained(alone, output_loading_info=True, **settings)
        if lost := sorted(loaded["missing_keys"]):
            raise FistaPrunerError(f"{path} has no tensor for {lost[0]!r} of {type(model).__name__}")
        model.hf_quantizer = None  # or it is not saved
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        if (
            _value(reader, "tokenizer.ggml.model", "") == "gpt2"
            and _value(reader, "tokenizer.ggml.pre", "") in SPLIT_DIGITS
        ):
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
        tokenizer.save_pretrained(partial)
        # The classes of single families build all but the vocabulary anew.
        kept = read_json_in(partial, "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json_atomic(partial / "tokenizer_config.json", kept)
        if licence := _value(reader, "general.license", ""):
            metadata = yaml.safe_dump({"license": licence}, allow_unicode=True)
            write_text_atomic(partial / "README.md", f"---\n{metadata}---\n# {path.name}, de-quantised\n")


def _value(reader: Any, key: str, default: Any) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _fault(reader: Any) -> str | None:
    """Say what ``transformers`` does not read: other parts, scaled rotary positions, a split of text."""
    from gguf import dequantize
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    instead = "which transformers does not {}: take the model's Hugging Face checkpoint"
    if (count := _value(reader, "split.count", 1)) > 1:
        part = f"is part {_value(reader, 'split.no', 0) + 1} of {count}"
        return f"{part}: join them with 'llama-gguf-split --merge FIRST OUT', and give that file"
    kind = _value(reader, f"{_value(reader, 'general.architecture', '')}.rope.scaling.type", "none")
    factors = (tensor for tensor in reader.tensors if tensor.name.startswith("rope_"))
    if kind != "none" or any((dequantize(each.data, each.tensor_type) != 1).any() for each in factors):
        return f"has scaled rotary positions, {instead.format('read')}"
    name, known = _value(reader, "tokenizer.ggml.pre", "gpt-2"), {*SPLIT_DIGITS, *SPLIT_AS_GPT2}
    if _value(reader, "tokenizer.ggml.model", "") != "gpt2" or name in known or name in GGUF_PRE_TOKENIZER_SPLITS:
        return None
    return f"splits text by {name!r} (tokenizer.ggml.pre), {instead.format('know')}"


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Turn any error of ``transformers`` or ``gguf`` into one line that names the file."""
    try:
        yield
    except FistaPrunerError:
        raise
    except Exception as error:  # whatever a file makes of a header, a configuration, a tokenizer or an array
        import transformers

        refuse_lfs_pointer(path)
        reason = f"it has no key {error}" if isinstance(error, KeyError) else one_line(error) or type(error).__name__
        unread = f"{path} is damaged or no GGUF file, or transformers {transformers.__version__} cannot convert it"
        raise FistaPrunerError(f"{unread}: {reason}") from error
