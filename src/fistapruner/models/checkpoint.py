"""Read a local Hugging Face folder one tensor at a time.

Weights are ``model.safetensors``, or else shards listed by ``model.safetensors.index.json``, or (only when pickles are
allowed) the legacy ``pytorch_model.bin`` files. Every tensor that an index lists must be in its shard, and a shard that
is missing or cut short is named when the folder is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError, one_line
from ..runtime.files import read_json, refuse_lfs_pointer
from ..runtime.show import shell_line
from .safetensors import SafetensorsFile, TensorEntry

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SINGLE_PICKLE, INDEX_PICKLE = "pytorch_model.bin", "pytorch_model.bin.index.json"

PRUNING_RECORD = "fistapruner.json"
"""What a pruning run says of its checkpoint: recipe, versions, and the sparsity of every operator."""

PACKED_RECORD = "packed.json"
"""What makes a folder a packed checkpoint."""

QUANT_METHOD = "fistapruner"
"""``quant_method`` in ``config.json`` of a packed checkpoint."""

PACKED_KEYS = ("quantization_config", "transformers_weights")
"""What packing adds to ``config.json``: which loader to take, and a name of weights that no other loader accepts."""

READ_BY_TRANSFORMERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""Beside ``config.json``, what ``transformers`` reads of a model folder that has it."""

COMPANION_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab", ".spm"}
COMPANION_NAMES = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use")

OTHER_CONFIGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Beside ``config.json``, what names Python code of the model in ``auto_map``."""

ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder a PEFT adapter; in a model folder transformers adds that adapter to the weights."""

NOT_COMPANIONS = {INDEX, INDEX_PICKLE, "config.json", PRUNING_RECORD, PACKED_RECORD, ADAPTER_CONFIG}


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a listing names; refuse what is no plain file name."""
    if name != Path(name).name or name in ("", ".", "..") or not name.isprintable():
        raise FistaPrunerError(f"{folder}: {name[:200]!r} is not the name of a file inside the folder")
    return folder / name


def model_inside(folder: Path) -> Path:
    """Return the model of a run directory that has one; any other folder as it is."""
    inner = folder / "model"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").exists() else folder


def which_gguf(folder: Path) -> str:
    """Name a GGUF file of a folder without other weights, for the end of an error."""
    name = next((path.name for path in sorted(folder.glob("[!.]*.gguf"))), "")
    return name and f"; it holds GGUF files: give one of them, such as {folder / name}"


def read_json_in(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder; an error names the file."""
    return read_json(inside(folder, name))


def find_companions(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """List the files beside weights and ``config.json``; Python files only where a config names some.

    A model card is not among them: it describes the model before pruning.
    """
    others = (read_json_in(folder, name) for name in OTHER_CONFIGS if (folder / name).is_file())
    code = any("auto_map" in each for each in (config, *others))
    names = []
    for path in sorted(folder.iterdir()):
        wanted = (
            (code and path.suffix == ".py")
            or path.suffix.lower() in COMPANION_SUFFIXES
            or path.name.lower().startswith(COMPANION_NAMES)
        )
        if wanted and path.name not in NOT_COMPANIONS and path.is_file():
            names.append(inside(folder, path.name).name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        names += [f"{templates.name}/{inside(templates, path.name).name}" for path in sorted(templates.glob("*.jinja"))]
    return names


WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of dense weights in a checkpoint."""

ROTATED = 1024
"""Rows that are rotated at once, which bounds their copies in fp64."""

Orders = Mapping[str, tuple[int, Tensor]]
"""By tensor name: a dimension, and how :func:`reorder` changes it."""


@dataclass(frozen=True)
class Stack:
    """A stored tensor with a matrix, (inputs, outputs) if ``transposed``, or a bias of every expert."""

    name: str
    transposed: bool

    def part(self, number: int) -> str:
        """Return the name of one expert's matrix; no tensor of a checkpoint is called so."""
        return f"{self.name}[{number}]"

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the matrices of all experts to the stored tensor."""
        return torch.stack([part.T if self.transposed else part for part in parts])


class PickleFile:
    """A legacy ``.bin`` file, unpickled as plain tensors only and mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {"format": "pt"}
        try:
            self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.entries = {name: TensorEntry.of(name, held.dtype, held.shape) for name, held in self._tensors.items()}
        except Exception as error:  # a damaged pickle can make the unpickler raise anything
            refuse_lfs_pointer(path)
            raise FistaPrunerError(f"{path} is no whole file of PyTorch weights: {one_line(error)}") from None

    def read(self, name: str, number: int | None = None) -> Tensor:
        """Copy a tensor, or its matrix ``tensor[number]``, out of the file."""
        held = self._tensors[name] if number is None else self._tensors[name][number]
        return held.detach().clone(memory_format=torch.contiguous_format)


WeightFile = SafetensorsFile | PickleFile


class Checkpoint:
    """An opened checkpoint folder: names and shapes in memory, values on disk.

    Two kinds of names are made: by :meth:`take_apart` and :meth:`join`.

    Attributes:
        index: the index file's name, None for a single file.
        orders: tensors that :meth:`read` returns with the channels of a dimension reordered or rotated (see
            :mod:`fistapruner.models.links`); empty at first.
        stacks: by name, the stored tensors that are read as the matrices of single experts.
        companions: names of the model's other files (:func:`find_companions`).
    """

    def __init__(self, folder: Path, config: dict[str, Any], files: dict[str, WeightFile], index: str | None) -> None:
        self.folder, self.config, self.files, self.index = folder, config, files, index
        self.companions = find_companions(folder, config)
        self.orders: Orders = {}
        self.stacks: dict[str, Stack] = {}
        self._parts: dict[str, tuple[Stack, int]] = {}
        self._joins: dict[str, list[str]] = {}
        self._same: dict[tuple[str, str], bool] = {}
        self._places = {name: file for file in files.values() for name in file.entries}

    @classmethod
    def open(cls, folder: str | Path, allow_pickle: bool = False) -> Checkpoint:
        """Open a folder and check that all of its weights are there.

        With ``allow_pickle`` legacy ``.bin`` files are unpickled, as plain tensors only, without running code.
        """
        folder = Path(folder)
        names = (SINGLE, INDEX, SINGLE_PICKLE, INDEX_PICKLE)  # the single file first, as transformers does
        found = next((name for name in names if (folder / name).exists()), "")
        pickled = found in (SINGLE_PICKLE, INDEX_PICKLE)
        if not folder.is_dir():
            fault = "is not a folder with a Hugging Face model" if folder.exists() else "does not exist"
        elif not (folder / "config.json").exists():
            fault = f"has no config.json, so it is not a Hugging Face model folder{_other_model(folder)}"
        elif not found:
            fault = f"has no weights: neither {SINGLE} nor {INDEX}{which_gguf(folder)}"
        elif pickled and not allow_pickle:
            fault = (
                f"has only legacy pickle weights ({found}), which can carry code: "
                "convert them to safetensors, or trust them with --allow-pickle"
            )
        elif (folder / ADAPTER_CONFIG).exists():
            fault = (
                f"has an adapter ({ADAPTER_CONFIG}) beside its weights: if the weights have it merged already, move "
                f"{ADAPTER_CONFIG} and adapter_model.* away; otherwise merge it into the model that it was trained on"
            )
        else:
            config, kind = read_json_in(folder, "config.json"), PickleFile if pickled else SafetensorsFile
            if found in (SINGLE, SINGLE_PICKLE):
                return cls(folder, config, {found: kind(folder / found)}, None)
            return cls(folder, config, _shards(folder, found, kind), found)
        raise FistaPrunerError(f"{folder} {fault}")

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._parts

    def take_apart(self, stack: Stack) -> list[str]:
        """Read a stored tensor from now on as the matrices of single experts, and return their names."""
        self.stacks[stack.name] = stack
        self._parts |= {part: (stack, number) for number, part in enumerate(self.parts(stack.name))}
        return self.parts(stack.name)

    def join(self, names: Sequence[str]) -> str:
        """Read several stored tensors, joined along the first dimension, under the name that is returned."""
        joined = "+".join(names)
        self._joins[joined] = list(names)
        return joined

    def stack_of(self, name: str) -> Stack | None:
        """Return the stack that a matrix of :meth:`parts` is in; None of another tensor."""
        return self._parts[name][0] if name in self._parts else None

    def whole(self, name: str) -> list[str]:
        """Name the stored tensors that one is read from: the joined ones, that of all experts, or itself."""
        stack = self.stack_of(name)
        return self._joins.get(name, [name if stack is None else stack.name])

    def parts(self, name: str) -> list[str]:
        """Return the names of the matrices of a tensor that is taken apart; of another tensor its own name."""
        stack = self.stacks.get(name)
        return [name] if stack is None else [stack.part(number) for number in range(self.entry(name).shape[0])]

    def names(self) -> list[str]:
        """List the names of all tensors, file by file, in each file's order; those of :meth:`parts` in place."""
        return [part for entry in self.stored for part in self.parts(entry.name)]

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape and bytes of a tensor."""
        stored = [self._file(each).entries[each] for each in self.whole(name)]
        shape, stack = stored[0].shape, self.stack_of(name)
        if stack is not None:
            shape = shape[1:][:: -1 if stack.transposed else 1]
        elif name in self._joins:
            shape = (sum(entry.shape[0] for entry in stored), *shape[1:])
        return TensorEntry.of(name, stored[0].dtype, shape)

    def read(self, name: str) -> Tensor:
        """Read one tensor into fresh memory, reordered as :attr:`orders` says."""
        if name in self._joins:
            return torch.cat([self.read(part) for part in self._joins[name]])
        stack, number = self._parts.get(name, (None, None))
        stored = name if stack is None else stack.name
        tensor = self._file(stored).read(stored, number)
        if stack is not None and stack.transposed:
            tensor = tensor.T.contiguous()
        return reorder(tensor, *self.orders[name]) if name in self.orders else tensor

    def _file(self, name: str) -> WeightFile:
        if name not in self._places:
            raise FistaPrunerError(f"{self.folder} has no tensor {name!r}")
        return self._places[name]

    def same(self, name: str, other: str) -> bool:
        """Compare two tensors: names, or else dtypes, shapes and values. The answer is remembered."""
        key = (name, other)
        if key not in self._same and name != other:
            entry, against = self.entry(name), self.entry(other)
            alike = (entry.dtype, entry.shape) == (against.dtype, against.shape)
            self._same[key] = alike and torch.equal(self.read(name), self.read(other))
        return name == other or self._same[key]

    @property
    def stored(self) -> list[TensorEntry]:
        """All tensors as the files have them: those that are taken apart whole."""
        return [entry for file in self.files.values() for entry in file.entries.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.stored)

    @property
    def companion_bytes(self) -> int:
        """Bytes of the files beside the weights."""
        return sum((self.folder / name).stat().st_size for name in self.companions)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files: of all tensors, and of what else these files hold."""
        return sum(file.path.stat().st_size for file in self.files.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that most of the weights have."""
        counts: Counter[torch.dtype] = Counter()
        for entry in self.stored:
            if entry.dtype.is_floating_point:
                counts[entry.dtype] += entry.nbytes // entry.dtype.itemsize
        if not counts:
            raise FistaPrunerError(f"{self.folder} has no floating-point weights")
        return counts.most_common(1)[0][0]


def _other_model(folder: Path) -> str:
    """Say at the end of an error where a folder without ``config.json`` has a model."""
    if (inner := model_inside(folder)) != folder:
        return f": give {inner}"
    resume = f": go on with its run: '{shell_line('resume', folder)}'"
    return which_gguf(folder) or (resume if (folder / "run.json").is_file() else "")


def _shards(folder: Path, index: str, kind: type[SafetensorsFile] | type[PickleFile]) -> dict[str, WeightFile]:
    """Open the weight files that an index lists."""
    places = read_json_in(folder, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()) or not places:
        raise FistaPrunerError(f"{folder / index} has no weight_map of tensor names to file names")
    files = {shard: kind(inside(folder, shard)) for shard in sorted(set(places.values()))}
    if lost := next((name for name, shard in places.items() if name not in files[shard].entries), None):
        raise FistaPrunerError(f"{folder / index} promises tensor {lost!r} in {places[lost]}, which does not have it")
    return files


def reorder(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    """Return a tensor with the channels of one dimension in another order, or rotated.

    The order has for each new place the old index; or is (blocks, channels, channels) orthogonal matrices, one for each
    block of channels: the new channel j of a block is the sum over i of its old channel i times ``order[block, i, j]``.
    A dimension that is a multiple of the blocks' channels has each of them so many times in a row.
    """
    if order.ndim == 1:
        return tensor.index_select(dim, order.to(tensor.device))
    blocks, channels, _ = order.shape
    rotation, out = order.to(tensor.device, torch.float64), torch.empty_like(tensor)
    # In fp64 the rounded result is the same however a library orders the products.
    parts, places = (torch.atleast_2d(each.movedim(dim, -1)).split(ROTATED) for each in (tensor, out))
    for part, into in zip(parts, places, strict=True):
        values = part.double().reshape(-1, blocks, part.shape[-1] // (blocks * channels), channels)
        into.copy_(torch.einsum("nbrc,bcd->nbrd", values, rotation).reshape(part.shape))
    return out
