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
from .checkpoint import Checkpoint
from .gguf import transformers_faults
from .gguf_dense import Array, DenseFile
from .gguf_header import check_gguf
from .record import read_pruning_record

GGUFValues = Literal["bf16", "f16", "f32", "q8_0"]
"""How matrices are stored. Vectors are fp32, as llama.cpp wants them."""

VALUES: tuple[str, ...] = get_args(GGUFValues)

FILE_TYPES = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
"""Names of ``gguf.LlamaFileType``."""

BLOCK = 32
"""Weights in a block of q8_0; matrices whose rows are no multiple of it are stored as f16."""

NAME = "general.name"

OWN_KEYS = ("general.architecture", "general.file_type", "general.alignment", NAME)
"""Keys that the writer sets by itself."""

QUANTISATION = "general.quantization_version"
"""Version of the quantised formats, in a file that has one; keys ``quantize.*`` tell how the dense file was made."""

SIZE = "general.size_label"


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
        dense = DenseFile(like, checkpoint)
        tensors, writer = dense.tensors(), _Writer(dense)
        planned = writer.plan(tensors, values)
        with _new_file(out, sum(tensor.nbytes for tensor in planned.values())) as partial:
            writer.write(partial, tensors, planned, values, progress)
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


class _Writer:
    """Write a checkpoint in the layout that the GGUF file of its dense model has.

    Args:
        dense: that file, and the checkpoint.
    """

    def __init__(self, dense: DenseFile) -> None:
        self.dense = dense
        self.orders: dict[tuple[str, tuple[int, ...]], Order] = {}

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
        if (order := self.orders.get(kind) or Order.of(lambda array: self.dense.read(name, array), shape)) is None:
            raise self._unknown_order(name)
        self.orders[kind] = order
        return order

    def _unknown_order(self, name: str) -> FistaPrunerError:
        return FistaPrunerError(f"{self.dense.like}: the order of the values of {name!r} in llama.cpp is not known")

    def _stored(self, name: str, values: Array) -> Array:
        """Return the tensor of the file that ``transformers`` reads as ``values``.

        Raises:
            FistaPrunerError: it reads others.
        """
        stored = self._order(name, values.shape).stored(values)
        back = self.dense.read(name, stored)
        if back is not values and not np.allclose(back, values, rtol=1e-6, atol=1e-6):
            raise self._unknown_order(name)
        return stored

    def plan(self, tensors: Mapping[str, str | None], values: GGUFValues) -> dict[str, _Planned]:
        """Decide how each tensor is written, in the file's order.

        Args:
            tensors: see :meth:`.DenseFile.tensors`.
            values: how matrices are stored.

        Raises:
            FistaPrunerError: the order of a tensor's values is not known.
        """
        import gguf

        planned = {}
        for tensor in self.dense.reader.tensors:
            if tensor.name not in tensors:
                continue
            if (source := tensors[tensor.name]) is None:
                shape = tuple(map(int, tensor.shape[::-1]))
                planned[tensor.name] = _Planned(shape, tensor.tensor_type.name, int(tensor.n_bytes))
                continue
            shape = self._order(tensor.name, self.dense.checkpoint.entry(source).shape).shape
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
            tensors: see :meth:`.DenseFile.tensors`; ``planned``: see :meth:`plan`.
            values: how matrices are stored.
            progress: see :func:`export_gguf`.
        """
        import gguf

        theirs, ours = f"{self.dense.architecture}.", f"{self.dense.written_as}."
        changed = {f"{ours}{key}": count for key, count in self.dense.counts.items()}
        with closing(gguf.GGUFWriter(out, self.dense.written_as)) as writer:
            for key, field in self.dense.reader.fields.items():
                skipped = key.startswith(("GGUF.", "quantize.")) or (key == QUANTISATION and values != "q8_0")
                skipped |= key == SIZE and bool(self.dense.counts)  # the number of the dense model's weights
                skipped |= field.contents() == []  # the writer takes no empty array
                named = ours + key.removeprefix(theirs) if key.startswith(theirs) else key
                if not skipped and named not in (*OWN_KEYS, *changed):
                    inner = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(named, field.contents(), field.types[0], inner)
            for key, count in changed.items():
                (writer.add_array if isinstance(count, list) else writer.add_uint32)(key, count)
            name = self.dense.reader.fields.get(NAME)
            pruned = " (pruned)" if read_pruning_record(self.dense.checkpoint.folder) else ""
            writer.add_name(f"{(name.contents() if name else self.dense.like.stem).removesuffix(pruned)}{pruned}")
            writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[values]))
            for name, tensor in planned.items():
                form = gguf.GGMLQuantizationType[tensor.form]
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, form)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            copied = {tensor.name: tensor for tensor in self.dense.reader.tensors}
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

        stored = self._stored(name, self.dense.values(source))
        with np.errstate(over="ignore", invalid="ignore"):
            packed: Array = gguf.quantize(stored, form)
            lost = np.isfinite(stored).all() and not np.isfinite(gguf.dequantize(packed, form)).all()
        if lost:
            raise FistaPrunerError(
                f"{self.dense.checkpoint.folder}: tensor {source!r} has values up to {np.abs(stored).max():g}, which "
                f"{form.name.lower()} cannot hold: give --values bf16 or f32"
            )
        return packed
