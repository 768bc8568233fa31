"""Write a checkpoint as a GGUF file, for llama.cpp.

What a GGUF holds beside weights (architecture, vocabulary, how text is split, chat template) is copied from the GGUF
file of the dense model, which llama.cpp's own tools have made. Counts that pruning changed, such as the width of the
MLPs, are taken from the checkpoint's config.

The layout of a tensor is found, not known: ``transformers``' reader is run on the numbers 0, 1, 2, ... in place of the
weights, which shows where each of them goes, and the weights are put back the other way round. The result is read
again through that reader and must be the checkpoint's tensor; then it is rounded to the form that is written, which
must hold its values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, get_args

import numpy as np

from ...errors import FistaPrunerError
from ...runtime.files import PARTIAL, disk_errors, require_space, sync_folder
from ..architecture import auto_class, checkpoint_names, refuse_own_code
from .checkpoint import Checkpoint, read_widths
from .gguf import (
    EPSILON_KEYS,
    architecture_of,
    check_gguf,
    epsilon,
    head_width,
    name_map,
    processor_of,
    rotary_width,
    scaled_positions,
    transformers_faults,
)

GGUFValues = Literal["bf16", "f16", "f32", "q8_0"]
"""How matrices are stored. Vectors are fp32, as llama.cpp wants them."""

VALUES: tuple[str, ...] = get_args(GGUFValues)

FILE_TYPES = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
"""Names of ``gguf.LlamaFileType``."""

ORDERED = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_qkv.weight")
"""Tensors of a file whose rows llama.cpp orders in its own way for some architectures."""

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 32
"""Weights in a block of q8_0; matrices whose rows are no multiple of it are stored as f16."""

BYTES = {"bf16": 2, "f16": 2, "f32": 4, "q8_0": (BLOCK + 2) / BLOCK}
"""Bytes of a weight; a block of q8_0 has a scale in fp16."""

OWN_KEYS = ("general.architecture", "general.file_type", "general.alignment")
"""Keys that the writer sets by itself."""

QUANTISATION = "general.quantization_version"
"""Version of the quantised formats, in a file that has one; keys ``quantize.*`` tell how the dense file was made."""

SIZE = "general.size_label"

WIDTH = "feed_forward_length"

MAY_CHANGE = (
    WIDTH,
    "attention.head_count",
    "attention.head_count_kv",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
)
"""Counts that pruning changes; any other count that differs shows that the file is another model's."""

SAME_EMBEDDING = 0.3
"""Relative distance of two embeddings above which they are not of one model; two bits a weight give about 0.25."""

SAME_LAYOUT = 0.1
"""Cosine of a projection in both models below which its rows are in another order; 95 % zeros leave about 0.4."""


def export_gguf(
    folder: str | Path,
    out: str | Path,
    like: str | Path,
    values: GGUFValues = "bf16",
    *,
    allow_pickle: bool = False,
) -> Path:
    """Write a checkpoint as a GGUF file.

    Memory holds one tensor; weights pass through a temporary file.

    Args:
        folder: a Hugging Face folder, such as ``RUN/model``.
        out: the file to write; it must not exist.
        like: GGUF file of the dense model.
        values: how matrices are stored.
        allow_pickle: read legacy ``.bin`` weights.

    Returns:
        ``out``.

    Raises:
        FistaPrunerError: ``out`` exists or is not called ``.gguf``, ``like`` is another model's file or has a layout
            that cannot be turned round, ``values`` cannot hold the weights, or the disk is full.
        MissingExtraError: the ``gguf`` package is missing.
    """
    folder, out, like = Path(folder), Path(out), Path(like)
    if values not in VALUES:
        raise FistaPrunerError(f"values {values!r}: one of {', '.join(VALUES)} is expected")
    if out.suffix != ".gguf":
        raise FistaPrunerError(f"{out} is the file to write: its name must end in .gguf")
    if out.exists():
        raise FistaPrunerError(f"{out} exists already: remove it, or write to another file")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(folder, allow_pickle)
    refuse_own_code(folder, "such models are not exported")
    if read_widths(checkpoint.config, folder):
        raise FistaPrunerError(f"{folder}: its decoder layers have different widths, which are not exported")
    if any("_exps." in name for name in check_gguf(like)):
        raise FistaPrunerError(f"{like} is a mixture of experts, which is not exported")
    with transformers_faults(like):
        source = _Source(like, checkpoint)
        tensors = source.tensors()
        shapes = [checkpoint.entry(name).shape for name in tensors.values() if name]
        _require_space(out, math.ceil(sum(math.prod(shape) * BYTES[_form(shape, values)] for shape in shapes)))
        with _new_file(out) as partial:
            source.write(partial, tensors, values)
            check_gguf(partial)
    return out


def invert_reader(read: Callable[[Array], Array], values: Array) -> Array | None:
    """Find the array that a reader turns into ``values``.

    Args:
        read: reorders the entries of an array and adds one number to all.
        values: fp32.

    Returns:
        The array; None where the reader does something else.
    """
    if read(values) is values:
        return values
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


def _form(shape: Sequence[int], values: GGUFValues) -> str:
    """Return how a tensor is stored, for matrices that are stored as ``values``."""
    return "f32" if len(shape) == 1 else "f16" if values == "q8_0" and shape[-1] % BLOCK else values


def _require_space(out: Path, nbytes: int) -> None:
    """Refuse a file that does not fit on its disk, or whose temporary file does not fit on its own.

    Raises:
        FistaPrunerError: names the file, the bytes needed and the bytes free.
    """
    temporary = Path(gettempdir())
    with disk_errors(out):
        same_disk = os.stat(out.parent).st_dev == os.stat(temporary).st_dev
    require_space(out, (1 + same_disk) * nbytes)
    if not same_disk:
        require_space(temporary / out.name, nbytes)


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """Give the name of a file that becomes ``out`` only when the block ends without an error."""
    partial = out.with_name(out.name + PARTIAL)
    with disk_errors(out):
        try:
            partial.touch()  # a folder that cannot be written shows before the weights are converted
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
        FistaPrunerError: the file is another model's, or of an architecture that ``transformers`` does not read.
    """

    def __init__(self, like: Path, checkpoint: Checkpoint) -> None:
        from accelerate import init_empty_weights
        from gguf import GGUFReader
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.integrations import GGUF_CONFIG_MAPPING

        self.like, self.checkpoint = like, checkpoint
        self.reader = GGUFReader(like)
        self.architecture = architecture_of(like, self.reader, "use llama.cpp's own converter")
        config = AutoConfig.from_pretrained(checkpoint.folder)
        if auto_class(config) is not AutoModelForCausalLM:
            raise FistaPrunerError(
                f"{checkpoint.folder}: {config.model_type} is a model of images and text, and only models of text are "
                "exported: use llama.cpp's own converter"
            )
        known = GGUF_CONFIG_MAPPING[self.architecture].items()
        # The width of the MLPs has many names in configs: it comes from the weights.
        self.counts = self._counts(
            config, {key: getattr(config, str(name), None) for key, name in known if key != WIDTH}
        )
        self._compare_settings(config)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        self.stored = checkpoint_names(model, checkpoint)
        self.names = name_map(self.reader, model, config)
        self.processor = processor_of(self.reader, config)
        if (down := self.stored.get(self.names.get("blk.0.ffn_down.weight", ""))) is not None:
            width = math.prod(checkpoint.entry(down).shape) // config.hidden_size
            self.counts |= self._counts(config, {WIDTH: width})

    def _other(self, what: str) -> FistaPrunerError:
        return FistaPrunerError(f"{self.like} is not the GGUF file of the dense model: {what}")

    def _counts(self, config: Any, asked: Mapping[str, Any]) -> dict[str, int]:
        """Return the counts of the file that are others in the checkpoint.

        Args:
            config: of the checkpoint.
            asked: the checkpoint's values, by keys of the file.
        """
        changed: dict[str, int] = {}
        for key, count in asked.items():
            field = self.reader.fields.get(f"{self.architecture}.{key}")
            if field is None or type(count) is not int or field.contents() == count or key == "context_length":
                continue
            if isinstance(field.contents(), list):
                raise FistaPrunerError(f"{self.like} has a {key} for every layer, which is not exported")
            if key not in MAY_CHANGE:
                raise self._other(f"its {key} is {field.contents()}, that of {self.checkpoint.folder} {count}")
            changed[f"{self.architecture}.{key}"] = count
        if f"{self.architecture}.attention.head_count" in changed:  # llama.cpp would divide the width by it
            size, scalar = head_width(config), getattr(config, "query_pre_attn_scalar", None)
            if scalar not in (None, size):
                heads = changed[f"{self.architecture}.attention.head_count"]
                raise FistaPrunerError(
                    f"{self.checkpoint.folder}: its query_pre_attn_scalar {scalar} is not the width of a head, {size}: "
                    f"llama.cpp divides by width / heads, which fewer heads ({heads}) would change"
                )
            changed |= {f"{self.architecture}.attention.{each}_length": size for each in ("key", "value")}
        return changed

    def _compare_settings(self, config: Any) -> None:
        """Refuse a file whose rotary positions or norms are not the checkpoint's: its keys are copied."""
        rotary = getattr(config, "rope_parameters", None) or {}
        asked = {
            "rope.freq_base": rotary.get("full_attention", rotary).get("rope_theta"),
            "rope.dimension_count": rotary_width(config),
            **dict.fromkeys(EPSILON_KEYS, epsilon(config)),
        }
        for key, ours in asked.items():
            field = self.reader.fields.get(f"{self.architecture}.{key}")
            if field is not None and ours is not None and not math.isclose(field.contents(), ours, rel_tol=1e-5):
                raise self._other(f"its {key} is {field.contents():g}, that of {self.checkpoint.folder} {ours:g}")
        kinds = [part.get("rope_type") for part in ([rotary] if "rope_theta" in rotary else rotary.values())]
        # A GGUF file has no key for positions that are scaled by the length of the text.
        kind = next((kind for kind in kinds if kind not in (None, "default", "dynamic")), None)
        factors = [tensor for tensor in self.reader.tensors if "rope_f" in tensor.name]
        theirs = scaled_positions(self.reader) or next(
            (tensor.name for tensor in factors if bool((self._dequantised(tensor) != 1).any())), None
        )
        if (theirs is None) != (kind is None):
            raise self._other(
                f"its rotary positions are scaled by {theirs or 'nothing'}, those of {self.checkpoint.folder} by "
                f"{kind or 'nothing'}"
            )

    def tensors(self) -> dict[str, str | None]:
        """Map the tensors of the new file to the checkpoint's, or to None where the file's own is copied.

        Raises:
            FistaPrunerError: a tensor of the checkpoint has no place, or the embeddings are another model's.
        """
        found = {tensor.name: self.names.get(tensor.name) for tensor in self.reader.tensors}
        placed = {
            name: None if source is None else self.stored[source]
            for name, source in found.items()
            if source is None or source in self.stored
        }
        if lost := sorted(set(self.stored.values()) - {source for source in placed.values() if source}):
            raise self._other(f"it has no place for {lost[0]!r} of {self.checkpoint.folder}")
        self._compare(placed)
        return placed

    def _compare(self, placed: Mapping[str, str | None]) -> None:
        """Refuse a file with other embeddings, or with the rows of attention in another order."""
        for tensor in self.reader.tensors:
            source = placed.get(tensor.name)
            if source is None or tensor.name not in ("token_embd.weight", *ORDERED):
                continue
            if tensor.name in ORDERED and int(tensor.n_elements) != math.prod(self.checkpoint.entry(source).shape):
                continue  # it lost heads; transformers' reader would reshape the file's tensor to those that are left
            theirs = self._read(tensor.name, self._dequantised(tensor))
            ours = self._array(source)
            if tensor.name in ORDERED:
                if theirs.shape == ours.shape and float((theirs * ours).sum()) < SAME_LAYOUT * float(
                    np.linalg.norm(theirs) * np.linalg.norm(ours)
                ):
                    raise self._other(f"its {tensor.name} is not {source!r} of {self.checkpoint.folder}")
                continue
            if theirs.shape != ours.shape:
                raise self._other(f"its embeddings are {list(theirs.shape)}, not {list(ours.shape)}")
            distance = float(np.linalg.norm(theirs - ours) / max(float(np.linalg.norm(ours)), 1e-30))
            if not distance <= SAME_EMBEDDING:
                raise self._other(f"its embeddings differ from those of {self.checkpoint.folder} by {distance:.0%}")

    @staticmethod
    def _dequantised(tensor: Any) -> Array:
        from gguf import dequantize

        found: Array = dequantize(tensor.data, tensor.tensor_type)
        return found

    def _array(self, name: str) -> Array:
        return self.checkpoint.read(name).float().numpy()

    def _read(self, name: str, array: Array) -> Array:
        """Return what ``transformers`` reads where the tensor ``name`` of the file is ``array``."""
        aside: dict[str, Any] = {"tensors": {}}
        found = self.processor.process(weights=array, name=name, tensor_key_mapping=self.names, parsed_parameters=aside)
        return np.asarray(found.weights)

    def _stored(self, name: str, values: Array) -> Array:
        """Return the tensor of the file that ``transformers`` reads as ``values``.

        Raises:
            FistaPrunerError: its reader does more than reorder the values and add one number to all.
        """
        if (stored := invert_reader(lambda array: self._read(name, array), values)) is None:
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
            skipped = key.startswith(("GGUF.", "quantize.")) or (key == QUANTISATION and values != "q8_0")
            skipped |= key == SIZE and bool(self.counts)  # the number of the dense model's weights
            skipped |= field.contents() == []  # the writer takes no empty array
            if not skipped and key not in (*OWN_KEYS, *self.counts):
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
            form = gguf.GGMLQuantizationType[_form(stored.shape, values).upper()]
            with np.errstate(over="ignore", invalid="ignore"):
                packed = gguf.quantize(stored, form)
                lost = np.isfinite(stored).all() and not np.isfinite(gguf.dequantize(packed, form)).all()
            if lost:
                raise FistaPrunerError(
                    f"{self.checkpoint.folder}: tensor {source!r} has values up to {np.abs(stored).max():g}, which "
                    f"{form.name.lower()} cannot hold: give --values bf16 or f32"
                )
            writer.add_tensor(tensor.name, packed, raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
