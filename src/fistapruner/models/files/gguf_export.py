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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from ...errors import FistaPrunerError
from ...runtime.files import PARTIAL, disk_errors, require_space, sync_folder
from ...runtime.progress import Tick, silent
from ..architecture import auto_class, read_config, refuse_own_code
from ..names import checkpoint_names
from .checkpoint import Checkpoint, read_widths
from .gguf import architecture_of, name_map, processor_of, transformers_faults
from .gguf_config import EPSILON_KEYS, epsilon, head_width, rotary_width, scaled_positions
from .gguf_header import check_gguf

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
    progress: Tick = silent,
) -> Path:
    """Write a checkpoint as a GGUF file.

    Memory holds one tensor.

    Args:
        folder: a Hugging Face folder, such as ``RUN/model``.
        out: the file to write; it must not exist.
        like: GGUF file of the dense model.
        values: how matrices are stored.
        allow_pickle: read legacy ``.bin`` weights.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        ``out``.

    Raises:
        FistaPrunerError: ``out`` exists or is not called ``.gguf``, the checkpoint is of a kind that is not exported
            (:func:`open_exported`), ``like`` is another model's file or has a layout that cannot be turned round,
            ``values`` cannot hold the weights, or the disk is full.
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
    checkpoint = open_exported(folder, allow_pickle)
    if any("_exps." in name for name in check_gguf(like)):
        raise FistaPrunerError(f"{like} is a mixture of experts, which is not exported")
    with transformers_faults(like):
        source = _Source(like, checkpoint)
        tensors = source.tensors()
        planned = source.plan(tensors, values)
        with _new_file(out, sum(tensor.nbytes for tensor in planned.values())) as partial:
            source.write(partial, tensors, planned, values, progress)
            progress("checking the written file", 0, 1)
            check_gguf(partial)
    return out


def open_exported(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint that is to be exported.

    Args:
        folder, allow_pickle: as for :func:`export_gguf`.

    Raises:
        FistaPrunerError: it is of a kind that is not exported, whatever the GGUF file of the dense model is.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(folder, allow_pickle)
    refuse_own_code(folder, "such models are not exported")
    if read_widths(checkpoint.config, folder):
        raise FistaPrunerError(f"{folder}: its decoder layers have different widths, which are not exported")
    if any(".experts." in name for name in checkpoint.names()):
        raise FistaPrunerError(f"{folder} is a mixture of experts, which is not exported")
    with transformers_faults(folder):
        config = read_config(folder)
    if auto_class(config) is not AutoModelForCausalLM:
        raise FistaPrunerError(
            f"{folder}: {config.model_type} is a model of images and text, and only models of text are exported: use "
            "llama.cpp's own converter"
        )
    return checkpoint


@dataclass(frozen=True)
class Order:
    """Where a reader takes the values of a tensor from.

    Args:
        shape: of the tensor in the file.
        places: for blocks of values, all of one length and in their order, the number of the block in the file; None
            where the reader changes nothing.
        shift: what the reader adds to every number.
    """

    shape: tuple[int, ...]
    places: Array | None
    shift: float

    @classmethod
    def of(cls, read: Callable[[Array], Array], shape: tuple[int, ...]) -> Self | None:
        """Find the order of the values that a reader gives.

        Args:
            read: reorders the entries of an array and adds one number to all.
            shape: of what it gives.

        Returns:
            The order; None where the reader does something else.
        """
        nothing = np.broadcast_to(np.float32(0), shape)
        if read(nothing) is nothing:
            return cls(shape, None, 0)
        size = math.prod(shape)
        for stored in dict.fromkeys((shape, shape[::-1])):
            numbers = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64)
            try:
                places = read(numbers.reshape(stored))
            except ValueError:  # not the shape that it takes
                continue
            shift = places.min()
            places = places - shift
            if places.shape == shape and np.array_equal(np.sort(places, None), numbers):
                places = places.reshape(-1, shape[-1])
                if np.array_equal(places, places[:, :1] + numbers[: shape[-1]]):  # whole rows, whose numbers are few
                    return cls(stored, places[:, 0] // shape[-1], float(shift))
                return cls(stored, places.reshape(-1), float(shift))
        return None

    def stored(self, values: Array) -> Array:
        """Return the tensor of the file that is read as ``values`` (fp32)."""
        if self.places is None:
            return values
        blocks = values.reshape(len(self.places), -1)
        stored = np.empty_like(blocks)
        stored[self.places] = blocks - np.float32(self.shift)
        return stored.reshape(self.shape)


@dataclass(frozen=True)
class _Planned:
    """How a tensor is written.

    Args:
        shape: of its values.
        form: name of ``gguf.GGMLQuantizationType``.
        nbytes: in the file.
    """

    shape: tuple[int, ...]
    form: str
    nbytes: int


def _form(shape: Sequence[int], values: GGUFValues) -> str:
    """Return how a tensor is stored, for matrices that are stored as ``values``."""
    return "f32" if len(shape) == 1 else "f16" if values == "q8_0" and shape[-1] % BLOCK else values


@contextmanager
def _new_file(out: Path, nbytes: int) -> Iterator[Path]:
    """Give the name of a file that becomes ``out`` only when the block ends without an error.

    Args:
        out: the file.
        nbytes: free bytes that it needs at least, without what an export that was killed has left.
    """
    partial = out.with_name(f".{out.name}{PARTIAL}")  # not out.gguf.partial, which programs that download take
    with disk_errors(out):
        partial.unlink(missing_ok=True)
        require_space(out, nbytes)
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
        from transformers import AutoModelForCausalLM
        from transformers.integrations import GGUF_CONFIG_MAPPING

        self.like, self.checkpoint = like, checkpoint
        self.orders: dict[tuple[str, tuple[int, ...]], Order] = {}
        self.reader = GGUFReader(like)
        self.architecture = architecture_of(like, self.reader, "use llama.cpp's own converter")
        config = read_config(checkpoint.folder)
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

    def _order(self, name: str, shape: tuple[int, ...]) -> Order:
        """Return where ``transformers`` takes the values of the tensor ``name`` from.

        Tensors of a kind have one order, whatever the decoder layer, so it is looked for once.

        Args:
            name: in the file.
            shape: of what ``transformers`` reads.

        Raises:
            FistaPrunerError: its reader does more than reorder the values and add one number to all.
        """
        kind = re.sub(r"\.\d+\.", ".", name), shape
        if (order := self.orders.get(kind) or Order.of(lambda array: self._read(name, array), shape)) is None:
            raise self._unknown_order(name)
        self.orders[kind] = order
        return order

    def _unknown_order(self, name: str) -> FistaPrunerError:
        return FistaPrunerError(f"{self.like}: the order of the values of {name!r} in llama.cpp is not known")

    def _stored(self, name: str, values: Array) -> Array:
        """Return the tensor of the file that ``transformers`` reads as ``values``.

        Raises:
            FistaPrunerError: it reads others.
        """
        stored = self._order(name, values.shape).stored(values)
        if (back := self._read(name, stored)) is not values and not np.allclose(back, values, rtol=1e-6, atol=1e-6):
            raise self._unknown_order(name)
        return stored

    def plan(self, tensors: Mapping[str, str | None], values: GGUFValues) -> dict[str, _Planned]:
        """Decide how each tensor is written, in the file's order.

        Args:
            tensors: see :meth:`tensors`.
            values: how matrices are stored.

        Raises:
            FistaPrunerError: the order of a tensor's values is not known.
        """
        import gguf

        planned = {}
        for tensor in self.reader.tensors:
            if tensor.name not in tensors:
                continue
            if (source := tensors[tensor.name]) is None:
                shape = tuple(map(int, tensor.shape[::-1]))
                planned[tensor.name] = _Planned(shape, tensor.tensor_type.name, int(tensor.n_bytes))
                continue
            shape = self._order(tensor.name, self.checkpoint.entry(source).shape).shape
            form = _form(shape, values).upper()
            block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
            planned[tensor.name] = _Planned(shape, form, math.prod(shape) // block * nbytes)
        return planned

    def write(
        self,
        out: Path,
        tensors: Mapping[str, str | None],
        planned: Mapping[str, _Planned],
        values: GGUFValues,
        progress: Tick,
    ) -> None:
        """Write the file.

        Args:
            out: its name.
            tensors: see :meth:`tensors`; ``planned``: see :meth:`plan`.
            values: how matrices are stored.
            progress: see :func:`export_gguf`.
        """
        import gguf

        with closing(gguf.GGUFWriter(out, self.architecture)) as writer:
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
            for name, tensor in planned.items():
                form = gguf.GGMLQuantizationType[tensor.form]
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, form)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            copied = {tensor.name: tensor for tensor in self.reader.tensors}
            for done, (name, tensor) in enumerate(planned.items()):
                progress("tensors written", done, len(planned))
                if (source := tensors[name]) is None:
                    writer.write_tensor_data(copied[name].data)
                else:
                    writer.write_tensor_data(self._packed(name, source, gguf.GGMLQuantizationType[tensor.form]))

    def _packed(self, name: str, source: str, form: Any) -> Array:
        """Return the tensor ``name`` of the file, rounded to its form, from ``source`` of the checkpoint.

        Raises:
            FistaPrunerError: the form cannot hold its values, or their order is not known.
        """
        import gguf

        stored = self._stored(name, self._array(source))
        with np.errstate(over="ignore", invalid="ignore"):
            packed: Array = gguf.quantize(stored, form)
            lost = np.isfinite(stored).all() and not np.isfinite(gguf.dequantize(packed, form)).all()
        if lost:
            raise FistaPrunerError(
                f"{self.checkpoint.folder}: tensor {source!r} has values up to {np.abs(stored).max():g}, which "
                f"{form.name.lower()} cannot hold: give --values bf16 or f32"
            )
        return packed
