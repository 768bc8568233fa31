"""Write a checkpoint as a GGUF file, for llama.cpp.

What a GGUF holds beside weights (architecture, vocabulary, how text is split, chat template) is copied from the GGUF
file of the dense model, which llama.cpp's own tools have made. Counts that pruning changed, such as the width of the
MLPs, are taken from the checkpoint's config.

The layout of a tensor is found, not known: ``transformers``' reader is run on the numbers 0, 1, 2, ... in place of the
weights, which shows where each of them goes, and the weights are put back the other way round. What is written is read
again through that reader and must be the checkpoint's tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...errors import FistaPrunerError
from ...runtime.files import PARTIAL, disk_errors, require_space, sync_folder
from .checkpoint import Checkpoint, read_widths
from .gguf import check_gguf, name_map, processor_of, transformers_faults

GGUFValues = Literal["bf16", "f16", "f32", "q8_0"]
"""How matrices are stored. Vectors are fp32, as llama.cpp wants them."""

VALUES: tuple[str, ...] = get_args(GGUFValues)

FILE_TYPES = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
"""Names of ``gguf.LlamaFileType``."""

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 32
"""Weights in a block of q8_0; matrices whose rows are no multiple of it are stored as f16."""

MAY_CHANGE = (
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
)
"""Counts that pruning changes; any other count that differs shows that the file is another model's."""

SAME_EMBEDDING = 0.3
"""Relative distance of two embeddings above which they are not of one model; two bits a weight give about 0.25."""


def export_gguf(folder: str | Path, out: str | Path, like: str | Path, values: GGUFValues = "bf16") -> Path:
    """Write a checkpoint as a GGUF file.

    Memory holds one tensor; weights pass through a temporary file.

    Args:
        folder: a Hugging Face folder, such as ``RUN/model``.
        out: the file to write; it must not exist.
        like: GGUF file of the dense model.
        values: how matrices are stored.

    Returns:
        ``out``.

    Raises:
        FistaPrunerError: ``out`` exists or is not called ``.gguf``, ``like`` is another model's file or has a layout
            that cannot be turned round, or the disk is full.
        MissingExtraError: the ``gguf`` package is missing.
    """
    folder, out, like = Path(folder), Path(out), Path(like)
    if values not in VALUES:
        raise FistaPrunerError(f"values {values!r}: one of {', '.join(VALUES)} is expected")
    if out.suffix != ".gguf":
        raise FistaPrunerError(f"{out} is the file to write: its name must end in .gguf")
    if out.exists():
        raise FistaPrunerError(f"{out} exists already: remove it, or write to another file")
    checkpoint = Checkpoint.open(folder)
    if read_widths(checkpoint.config, folder):
        raise FistaPrunerError(f"{folder}: its decoder layers have different widths, which are not exported")
    if any("_exps." in name for name in check_gguf(like)):
        raise FistaPrunerError(f"{like} is a mixture of experts, which is not exported")
    with transformers_faults(like):
        source = _Source(like, checkpoint)
        tensors = source.tensors()
        require_space(out, sum(2 * math.prod(checkpoint.entry(name).shape) for name in tensors.values() if name))
        with _new_file(out) as partial:
            source.write(partial, tensors, values)
    return out


def turn_round(read: Callable[[Array], Array], values: Array) -> Array | None:
    """Find the array that a reader turns into ``values``.

    Args:
        read: reorders the entries of an array and adds one number to all.
        values: fp32.

    Returns:
        The array; None where the reader does something else.
    """
    for shape in dict.fromkeys((values.shape, values.shape[::-1])):
        numbers = np.arange(values.size, dtype=np.int64).reshape(shape)
        try:
            shift = read(np.zeros_like(numbers)).flat[0]
            places = read(numbers) - shift
        except ValueError:  # not the shape that it takes
            continue
        if places.shape == values.shape and np.array_equal(np.sort(places, None), numbers.reshape(-1)):
            stored = np.empty(values.size, np.float32)
            stored[places.reshape(-1)] = values.reshape(-1) - np.float32(shift)
            stored = stored.reshape(shape)
            if np.allclose(read(stored), values, rtol=1e-6, atol=1e-6):
                return stored
    return None


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """Give the name of a file that becomes ``out`` only when the block ends without an error."""
    partial = out.with_name(out.name + PARTIAL)
    with disk_errors(out):
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(out.parent)


class _Source:
    """The GGUF file of the dense model beside a checkpoint of it.

    Args:
        like: the file.
        checkpoint: what is written.

    Raises:
        FistaPrunerError: the file is another model's.
    """

    def __init__(self, like: Path, checkpoint: Checkpoint) -> None:
        from accelerate import init_empty_weights
        from gguf import GGUFReader
        from transformers import AutoConfig, AutoModelForCausalLM

        self.like, self.checkpoint = like, checkpoint
        self.reader = GGUFReader(like)
        self.architecture = self.reader.fields["general.architecture"].contents()
        config = AutoConfig.from_pretrained(checkpoint.folder)
        self.counts = self._counts(config)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        self.names = name_map(self.reader, model, config)
        self.processor = processor_of(self.reader, config)

    def _other(self, what: str) -> FistaPrunerError:
        return FistaPrunerError(f"{self.like} is not the GGUF file of the dense model: {what}")

    def _counts(self, config: Any) -> dict[str, int]:
        """Return the counts of the file that are others in the checkpoint."""
        from transformers.integrations import GGUF_CONFIG_MAPPING

        changed: dict[str, int] = {}
        for key, name in GGUF_CONFIG_MAPPING.get(self.architecture, {}).items():
            field, asked = self.reader.fields.get(f"{self.architecture}.{key}"), getattr(config, str(name), None)
            if field is None or type(asked) is not int or field.contents() == asked or key == "context_length":
                continue
            if key not in MAY_CHANGE:
                raise self._other(f"its {key} is {field.contents()}, that of {self.checkpoint.folder} {asked}")
            changed[f"{self.architecture}.{key}"] = asked
        if f"{self.architecture}.attention.head_count" in changed:  # llama.cpp would divide the width by it
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            changed |= {f"{self.architecture}.attention.{each}_length": int(size) for each in ("key", "value")}
        return changed

    def tensors(self) -> dict[str, str | None]:
        """Map the tensors of the new file to the checkpoint's, or to None where the file's own is copied.

        Raises:
            FistaPrunerError: a tensor of the checkpoint has no place, or the embeddings are another model's.
        """
        have = set(self.checkpoint.names())
        found = {tensor.name: self.names.get(tensor.name) for tensor in self.reader.tensors}
        placed = {name: source for name, source in found.items() if source is None or source in have}
        if lost := sorted(have - {source for source in placed.values() if source}):
            raise self._other(f"it has no place for {lost[0]!r} of {self.checkpoint.folder}")
        self._compare_embeddings(placed.get("token_embd.weight"))
        return placed

    def _compare_embeddings(self, name: str | None) -> None:
        from gguf import dequantize

        if name is None:
            return
        tensor = next(each for each in self.reader.tensors if each.name == "token_embd.weight")
        theirs, ours = dequantize(tensor.data, tensor.tensor_type), self._array(name)
        if theirs.shape != ours.shape:
            raise self._other(f"its embeddings are {list(theirs.shape)}, not {list(ours.shape)}")
        distance = float(np.linalg.norm(theirs - ours) / max(float(np.linalg.norm(ours)), 1e-30))
        if not distance <= SAME_EMBEDDING:
            raise self._other(f"its embeddings differ from those of {self.checkpoint.folder} by {distance:.0%}")

    def _array(self, name: str) -> Array:
        return self.checkpoint.read(name).float().numpy()

    def _stored(self, name: str, values: Array) -> Array:
        """Return the tensor of the file that ``transformers`` reads as ``values``.

        Raises:
            FistaPrunerError: its reader does more than reorder the values and add one number to all.
        """

        def read(array: Array) -> Array:
            aside: dict[str, Any] = {"tensors": {}}
            found = self.processor.process(
                weights=array, name=name, tensor_key_mapping=self.names, parsed_parameters=aside
            )
            return np.asarray(found.weights)

        if (stored := turn_round(read, values)) is None:
            raise FistaPrunerError(f"{self.like}: the order of the values of {name!r} in llama.cpp is not known")
        return stored

    def write(self, out: Path, tensors: dict[str, str | None], values: GGUFValues) -> None:
        """Write the file.

        Args:
            out: its name.
            tensors: see :meth:`tensors`.
            values: how matrices are stored.
        """
        import gguf

        writer = gguf.GGUFWriter(out, self.architecture, use_temp_file=True)
        for key, field in self.reader.fields.items():
            if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type", *self.counts):
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        for key, count in self.counts.items():
            writer.add_uint32(key, count)
        writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[values]))
        for tensor in self.reader.tensors:
            if tensor.name not in tensors:
                continue
            if (source := tensors[tensor.name]) is None:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            stored = self._stored(tensor.name, self._array(source))
            kind = "f32" if stored.ndim == 1 else "f16" if values == "q8_0" and stored.shape[-1] % BLOCK else values
            form = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor(tensor.name, gguf.quantize(stored, form), raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
