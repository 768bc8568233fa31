"""Pack a pruned checkpoint, and unpack a packed one.

Both directions go tensor by tensor. A folder is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..errors import A_FOLDER, FistaPrunerError, out_path, path_text
from ..models.checkpoint import PACKED_RECORD, PRUNING_RECORD, QUANT_METHOD, SINGLE, Checkpoint, WeightFile
from ..models.low_rank import LowRankAdapter
from ..models.record import FILES, FOLDER, read_pruning_record, recorded_claims, stacked_experts
from ..models.safetensors import TensorEntry, write_tensors
from ..models.source import ModelSource
from ..models.write import checkpoint_folder, copy_companions, require_new, safetensors_name, write_index
from ..runs.directory import checkpoint_of
from ..runtime.files import sha256_file, temporary_folder, write_json_atomic, write_text_atomic
from ..runtime.numerics import dtype_name, undisturbed
from ..runtime.show import Tick, silent, size
from .checkpoint import PackedCheckpoint, is_packed, refuse_packed
from .format import FLOATS, METADATA, VERSION, OperatorSpec, encode, pack_operator

MIN_ZEROS_TO_PACK = 0.25
"""Least share of zeros of a matrix that counts as pruned if there is no record of a pruning run."""

NEEDS_PACKAGE = "packed by fistapruner: install that package, and 'import fistapruner' before the model is loaded"
"""Stands in ``config.json`` as the name of the weight file, so that transformers refuses it without this package."""


class NoPackedFormError(FistaPrunerError):
    """A pruned model cannot be packed: nothing becomes smaller, experts are one tensor, or it is not bf16."""


@dataclass(frozen=True)
class PackReport:
    """Number of packed operators, share of zeros, and bytes in the checkpoint (``dense``) and packed.

    The packed bytes of operators and of the whole count the low-rank part. ``tables`` are the bytes of embedding and
    head before and after they became int8; zeros where they stay as they are.
    """

    operators: int
    zeros: float
    dense_operators: int
    packed_operators: int
    dense_total: int
    packed_total: int
    tables: tuple[int, int]
    low_rank: int

    def __str__(self) -> str:
        def change(before: int, after: int) -> str:
            return f"{size(before)} -> {size(after)} ({after / before:.3f})"

        operators = change(self.dense_operators, self.packed_operators)
        part = f", {size(self.low_rank)} of it the low-rank part" if self.low_rank else ""
        lines = [f"{self.operators} pruned operators, {self.zeros:.1%} zeros: {operators}{part}"]
        if self.tables[0]:
            lines.append(f"embedding and head in int8: {change(*self.tables)}")
        lines.append(f"whole checkpoint, embeddings included: {change(self.dense_total, self.packed_total)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Planned:
    """How one tensor will be stored; decided in a first pass, because headers precede values."""

    spec: OperatorSpec
    stored: int  # values
    source: TensorEntry

    def nbytes(self, name: str) -> int:
        """Count the bytes of its tensors."""
        return sum(part.nbytes for part in self.spec.entries(name, self.stored))


@undisturbed()
def pack(
    checkpoint: str | Path,
    out: str | Path,
    *,
    values: str = "same",
    allow_pickle: bool = False,
    progress: Tick | None = None,
) -> PackReport:
    """Write a pruned checkpoint without its zeros; a low-rank part that belongs to it is copied as it is.

    Args:
        checkpoint: run directory, or folder of a pruned Hugging Face model.
        out: folder to make; it must not exist.
        values: ``"same"`` keeps every bit of bf16 values; ``"bf16"`` rounds other values to bf16; ``"int8"`` stores
            int8 with one scale for each row, also of the embedding and the output head.
        allow_pickle: read legacy ``.bin`` weights; they become safetensors.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        FistaPrunerError: nothing is pruned, ``out`` exists, the disk is full, the checkpoint is damaged, its low-rank
            part is gone or damaged; its subclass ``NoPackedFormError`` if no operator becomes smaller, pruned experts
            are stored as one tensor, or values are not bf16 and are not to be rounded.
    """
    if values not in ("same", "bf16", "int8"):
        raise FistaPrunerError(f"values {values!r} are not known: same, bf16 or int8")
    tick, out = progress or silent, out_path(out)
    source = Checkpoint.open(checkpoint_of(path_text("checkpoint", checkpoint, A_FOLDER)), allow_pickle)
    require_new(out, source.folder)
    refuse_packed(source.folder)
    low_rank = LowRankAdapter.beside(source.folder)
    record = read_pruning_record(source.folder)
    plan = _plan(source, record, values, tick)
    if values == "int8":
        plan |= _plan_tables(source, plan)
    report = _report(source, plan, 0 if low_rank is None else low_rank.nbytes)
    with checkpoint_folder(out, report.packed_total) as partial:
        contents, done = {}, count(1)
        for stored, file in source.files.items():
            name = safetensors_name(stored)
            packed = lambda: tick("operators packed", next(done), len(plan))  # noqa: E731
            contents[name] = _pack_file(partial / name, file, plan, packed)
        if low_rank is not None:
            low_rank.copy_into(partial)
        tick("computing checksums", 0, 1)
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256_file(partial / name)}
            for name in (*contents, *(FILES if low_rank is not None else ()))
        }
        copy_companions(source, partial)
        section = {"quant_method": QUANT_METHOD, "version": VERSION}
        config = {**source.config, "quantization_config": section, "transformers_weights": NEEDS_PACKAGE}
        write_json_atomic(partial / "config.json", config)
        if set(contents) != {SINGLE}:
            write_index(partial, contents)
        write_text_atomic(partial / "README.md", _model_card(report, values, source.config, _origin(source.folder)))
        about = {"format": "fistapruner-packed", "version": VERSION, "values": values, "files": files, "record": record}
        write_json_atomic(partial / PACKED_RECORD, about)
    return report


@undisturbed()
def unpack(packed: str | Path, out: str | Path, *, progress: Tick | None = None) -> Path:
    """Write a packed checkpoint densely; bf16 values come back bit for bit, -0.0 as 0.

    A low-rank part comes back as it was, as ``adapter`` in the folder; the checkpoint is the sparse part.

    Args:
        packed: folder that ``pack`` wrote.
        out: folder to make; it must not exist.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        FistaPrunerError: the packed folder is damaged, ``out`` exists, the disk is full.
    """
    tick, done = progress or silent, count(1)
    tick("comparing checksums", 0, 1)
    source, out = PackedCheckpoint(path_text("packed", packed, A_FOLDER)), out_path(out)
    require_new(out, source.folder)
    contents = source.contents()
    tensors = sum(len(entries) for entries in contents.values())
    nbytes = sum(entry.nbytes for entries in contents.values() for entry in entries)

    def unpacked(entries: list[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
        for entry in entries:
            yield entry.name, source.tensor(entry.name)
            tick("tensors written", next(done), tensors)

    with checkpoint_folder(out, nbytes + (0 if source.low_rank is None else source.low_rank.nbytes)) as partial:
        for shard, entries in contents.items():
            metadata = {key: value for key, value in source.checkpoint.files[shard].metadata.items() if key != METADATA}
            write_tensors(partial / shard, unpacked(entries), metadata or {"format": "pt"}, entries)
        copy_companions(source.checkpoint, partial)
        if source.low_rank is not None:
            source.low_rank.copy_into(partial)
        if source.record:
            write_json_atomic(partial / PRUNING_RECORD, source.record)
        write_json_atomic(partial / "config.json", source.config())
        if set(contents) != {SINGLE}:
            write_index(partial, contents)
        if origin := _origin(source.folder):
            text = "# A pruned model\n\nUnpacked from a packed folder with `fistapruner unpack`.\n"
            write_text_atomic(partial / "README.md", _card_metadata(origin) + text)
    return out


@contextmanager
def unpacked(folder: Path, progress: Tick | None = None) -> Iterator[Path]:
    """Yield a model folder as it is, or unpacked into a temporary folder where it is packed."""
    if not is_packed(folder):
        yield folder
        return
    with temporary_folder() as scratch:
        yield unpack(folder, Path(scratch) / folder.name, progress=progress)


def _plan(source: Checkpoint, record: dict[str, Any], values: str, progress: Tick) -> dict[str, _Planned]:
    """Decide how each pruned operator that becomes smaller is stored."""
    if stacked := stacked_experts(record):
        raise NoPackedFormError(
            f"{source.folder}: {stacked} is one tensor of all experts, and only matrices are packed: keep the folder "
            "as it is, or prune with --set ignore=[re:experts] to pack the other operators"
        )
    listed, faults = recorded_claims(record, source)
    if faults:
        raise FistaPrunerError(f"{source.folder / PRUNING_RECORD} is of another checkpoint: {faults[0]}")
    int8, plan, shrinkable, wide = values == "int8", dict[str, _Planned](), False, ""
    names = source.names()
    for done, name in enumerate(names):
        progress("tensors looked through for zeros", done, len(names))
        entry, known = source.entry(name), listed.get(name)
        if len(entry.shape) != 2 or entry.dtype not in (*FLOATS, torch.float64) or 0 in entry.shape:
            continue
        if listed and (known is None or known.get("sparsity") == "0%"):
            continue  # an operator that was not pruned keeps its values
        weight = source.read(name)
        weight = weight.to(torch.bfloat16) if values == "bf16" else weight
        nonzero = int(torch.count_nonzero(weight))
        if not listed and nonzero > (1 - MIN_ZEROS_TO_PACK) * weight.numel():
            continue
        if weight.dtype not in (FLOATS if int8 else (torch.bfloat16,)):
            wide = wide or name
            continue
        planned = _Planned(OperatorSpec((entry.shape[0], entry.shape[1]), weight.dtype, int8), nonzero, entry)
        shrinkable = True
        if planned.nbytes(name) < entry.nbytes:
            plan[name] = planned
    if plan:
        return plan
    if wide:
        advice = "values are packed as bf16, or as int8 of bf16, fp16 and fp32: give --values bf16, which rounds"
        raise NoPackedFormError(f"{source.folder}: {wide} is {dtype_name(source.entry(wide).dtype)}; {advice}")
    if shrinkable:
        raise NoPackedFormError(
            f"{source.folder}: no operator becomes smaller without its zeros: a mask takes one bit for every weight"
        )
    why = "its record claims no zeros" if listed else f"no matrix has at least {MIN_ZEROS_TO_PACK:.0%} zeros"
    raise FistaPrunerError(f"{source.folder} has no pruned operators: {why}")


def _plan_tables(source: Checkpoint, plan: Mapping[str, _Planned]) -> dict[str, _Planned]:
    """Decide to store embedding and output head, where they are not pruned, as int8 rows.

    They stay as they are in a model that needs Python code of its own.
    """
    from ..models.build import build_model  # imports transformers; other packing does without
    from ..models.names import stored_names

    tables = dict[str, _Planned]()
    with suppress(FistaPrunerError):
        model = build_model(source)
        places = stored_names(model, source.names()).whole
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        weights = {id(getattr(module, "weight", None)) for module in modules}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            stored = places.get(name, "")
            if id(parameter) in weights and stored and stored not in plan and source.entry(stored).dtype in FLOATS:
                entry = source.entry(stored)
                spec = OperatorSpec((entry.shape[0], entry.shape[1]), entry.dtype, int8=True, dense=True)
                tables[stored] = _Planned(spec, entry.shape[0], entry)
    return tables


def _report(source: Checkpoint, plan: Mapping[str, _Planned], low_rank: int) -> PackReport:
    def sizes(*, dense: bool) -> tuple[int, int]:
        items = {name: item for name, item in plan.items() if item.spec.dense == dense}
        return sum(item.source.nbytes for item in items.values()), sum(map(_Planned.nbytes, items.values(), items))

    (before, after), tables = sizes(dense=False), sizes(dense=True)
    pruned = [item for item in plan.values() if not item.spec.dense]
    zeros = 1 - sum(item.stored for item in pruned) / sum(math.prod(item.spec.shape) for item in pruned)
    total = source.nbytes - before - tables[0] + after + tables[1] + low_rank
    return PackReport(len(pruned), zeros, before, after + low_rank, source.nbytes, total, tables, low_rank)


def _pack_file(
    path: Path, file: WeightFile, plan: Mapping[str, _Planned], packed: Callable[[], None]
) -> list[TensorEntry]:
    """Write one file of the packed folder and return its tensors; call ``packed`` after each operator."""
    mine = {name: plan[name] for name in file.entries if name in plan}
    entries: list[TensorEntry] = []
    for name, entry in file.entries.items():
        entries += mine[name].spec.entries(name, mine[name].stored) if name in mine else [entry]
    specs = {name: item.spec.to_json() for name, item in mine.items()}
    metadata = {"format": "pt", **file.metadata, METADATA: json.dumps({"version": VERSION, "operators": specs})}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in file.entries:
            if name not in mine:
                yield name, file.read(name)
                continue
            spec = mine[name].spec
            try:
                operator = pack_operator(file.read(name).to(spec.dtype), int8=spec.int8, dense=spec.dense)
            except FistaPrunerError as error:
                raise FistaPrunerError(f"{file.path}: {name}: {error}") from None
            yield from encode(name, operator).items()
            packed()

    write_tensors(path, tensors(), metadata, entries)
    return entries


def _origin(folder: Path) -> dict[str, Any]:
    """Read what a folder's model card says of its licence and dense model."""
    card = ModelSource(folder).card()
    keys = ("license", "license_name", "license_link", "base_model")
    return {key: card[key] for key in keys if isinstance(card.get(key), str | list)}


def _card_metadata(origin: Mapping[str, Any]) -> str:
    metadata = {**origin, "library_name": "transformers", "tags": ["pruned", "sparse", "fistapruner"]}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}\n---\n"


def _model_card(report: PackReport, values: str, config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Format the README.md of a packed folder: what it is and how to load it with this ``config.json``.

    ``origin`` is what the card of the model that was packed says of its licence and dense model.
    """
    from ..models.build import auto_class_name, needs_own_code  # imports transformers; packing does without

    named, own = config.get("architectures"), needs_own_code(config)
    auto_class = auto_class_name(named[0] if isinstance(named, list) and named else "")
    trusted = ", trust_remote_code=True" if own else ""
    packed = "" if own else 'model = fistapruner.load("FOLDER")  # operators stay packed, for fast decoding on a CPU\n'
    both = (
        f"The model is the sum of the packed sparse part and the low-rank part in `{FOLDER}`. Both ways of loading "
        "give the sum: do not add the adapter again.\n\n"
    )
    return f"""{_card_metadata(origin)}# A pruned model, packed

{report}

{both if report.low_rank else ""}Values are stored as {"they were" if values == "same" else values}. Load it with

```python
import fistapruner
from transformers import {auto_class}

model = {auto_class}.from_pretrained("FOLDER"{trusted})  # unpacked to dense while loading
{packed}```

or make it an ordinary checkpoint again with `fistapruner unpack FOLDER OUT`. `FOLDER` is on this machine: of a model
on the hub, `hf download NAME --local-dir FOLDER` makes one.
"""
