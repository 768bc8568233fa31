"""Pack a pruned checkpoint, and unpack a packed one.

Both directions go tensor by tensor. A folder is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import A_FOLDER, FistaPrunerError, out_path, path_text
from ..models.files.checkpoint import Checkpoint, WeightFile
from ..models.files.folder import checkpoint_folder, copy_companions, require_new, write_index
from ..models.files.folder_files import PACKED_RECORD, PRUNING_RECORD, SINGLE
from ..models.files.low_rank import FILES, FOLDER, LowRankAdapter
from ..models.files.record import read_pruning_record
from ..models.files.safetensors import SafetensorsWriter, TensorEntry
from ..models.files.widths import QUANT_METHOD, read_widths, widths_section
from ..models.files.writer import safetensors_name
from ..models.source import ModelSource
from ..runs.arguments import checked_arguments
from ..runs.directory import checkpoint_of
from ..runtime.files import sha256_file, write_json_atomic, write_text_atomic
from ..runtime.formatting import size
from ..runtime.numerics import undisturbed
from ..runtime.progress import Tick, silent
from .format import METADATA, VERSION, encode
from .pack_plan import PlannedOperator, plan_packing
from .packed_checkpoint import PackedCheckpoint

NEEDS_PACKAGE = "packed by fistapruner: install that package, and 'import fistapruner' before the model is loaded"
"""Stands in ``config.json`` as the name of the weight file, so that transformers refuses it without this package."""


@dataclass(frozen=True)
class PackReport:
    """Bytes of the pruned operators and of all weights; ``dense`` is the size in the checkpoint.

    ``low_rank`` is the bytes of the low-rank part beside the sparse one; the packed sizes count them, the dense ones do
    not.
    ``rounding`` is the norm of what rounding changed in operators over their norm; None where values stay as they were.
    ``violation`` is the first claim of the checkpoint's own record that does not hold, and how to see all; else None.
    """

    operators: int
    dense_operators: int
    packed_operators: int
    dense_bf16_operators: int
    dense_total: int
    packed_total: int
    zeros: float
    low_rank: int = 0
    rounding: float | None = None
    violation: str | None = None

    def __str__(self) -> str:
        share, whole = self.packed_operators / self.dense_operators, self.packed_total / self.dense_total
        lines = [
            f"{self.operators} pruned operators, {self.zeros:.1%} zeros: {size(self.dense_operators)} -> "
            f"{size(self.packed_operators)} ({share:.3f} of their dense size)"
            + (f", {size(self.low_rank)} of it the low-rank part" if self.low_rank else ""),
            f"whole checkpoint, embeddings included: {size(self.dense_total)} -> "
            f"{size(self.packed_total)} ({whole:.3f})",
        ]
        if self.dense_bf16_operators != self.dense_operators:
            lines.insert(1, f"{self.packed_operators / self.dense_bf16_operators:.3f} of the operators' size in bf16")
        if self.rounding is not None:
            lines.append(f"rounding changed the operators' weights by {self.rounding:.2%} of their norm")
        if self.violation is not None:
            lines.append(self.violation)
        return "\n".join(lines)


@checked_arguments
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
            int8 with one scale for each row.
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
    if (source.folder / PACKED_RECORD).exists():
        raise FistaPrunerError(f"{source.folder} is packed already")
    low_rank = LowRankAdapter.beside(source.folder)
    record = read_pruning_record(source.folder)
    plan, violation = plan_packing(source, record, values, tick)
    report = _report(source, plan, 0 if low_rank is None else low_rank.nbytes)
    with checkpoint_folder(out, report.packed_total) as partial:
        files: dict[str, dict[str, Any]] = {}
        contents = {}
        changed, whole, done = 0.0, 0.0, count(1)
        for stored, file in source.files.items():
            name = safetensors_name(stored)
            contents[name], squares = _pack_file(
                partial / name, file, plan, lambda: tick("operators packed", next(done), len(plan))
            )
            changed, whole = changed + squares[0], whole + squares[1]
            tick("computing checksums", 0, 1)
            files[name] = _claim(partial / name)
        if low_rank is not None:
            low_rank.copy_into(partial)
            files |= {name: _claim(partial / name) for name in FILES}
        if whole:
            report = replace(report, rounding=math.sqrt(changed / whole))
        copy_companions(source, partial)
        widths = read_widths(source.config, source.folder)
        section = widths_section(widths) if widths else {"quant_method": QUANT_METHOD}
        config = {
            **source.config,
            "quantization_config": {**section, "version": VERSION},
            "transformers_weights": NEEDS_PACKAGE,
        }
        write_json_atomic(partial / "config.json", config)
        if set(contents) != {SINGLE}:
            write_index(partial, contents)
        write_text_atomic(
            partial / "README.md", packed_model_card(report, values, source.config, _origin(source.folder))
        )
        about = {"format": "fistapruner-packed", "version": VERSION, "values": values, "files": files, "record": record}
        write_json_atomic(partial / PACKED_RECORD, about)
    return replace(report, violation=violation)


def _claim(path: Path) -> dict[str, Any]:
    """Describe a written file, as ``packed.json`` lists it."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


@checked_arguments
@undisturbed()
def unpack(packed: str | Path, out: str | Path, *, progress: Tick | None = None) -> Path:
    """Write a packed checkpoint densely; float values come back bit for bit, -0.0 as 0.

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
    with checkpoint_folder(out, nbytes + (0 if source.low_rank is None else source.low_rank.nbytes)) as partial:
        for shard, entries in contents.items():
            metadata = {key: value for key, value in source.checkpoint.files[shard].metadata.items() if key != METADATA}
            with SafetensorsWriter(partial / shard, entries, metadata or {"format": "pt"}) as writer:
                for entry in entries:
                    writer.write(entry.name, source.tensor(entry.name))
                    tick("tensors written", next(done), tensors)
        copy_companions(source.checkpoint, partial)
        if source.low_rank is not None:
            source.low_rank.copy_into(partial)
        if source.record:
            write_json_atomic(partial / PRUNING_RECORD, source.record)
        write_json_atomic(partial / "config.json", source.config())
        if set(contents) != {SINGLE}:
            write_index(partial, contents)
        if (origin := _origin(source.folder)) or source.low_rank is not None:
            text = "# A pruned model\n\nUnpacked from a packed folder with `fistapruner unpack`.\n"
            if source.low_rank is not None:
                text += "\nThe weights are the sparse part. Add the low-rank part, a LoRA adapter, with PEFT:\n"
                text += f'`PeftModel.from_pretrained(model, "FOLDER/{FOLDER}")`.\n'
            write_text_atomic(partial / "README.md", _card_metadata(origin) + text)
    return out


def _report(source: Checkpoint, plan: dict[str, PlannedOperator], low_rank: int) -> PackReport:
    packed = sum(part.nbytes for name, item in plan.items() for part in item.spec.entries(name, item.stored)) + low_rank
    dense = sum(item.source.nbytes for item in plan.values())
    weights = sum(item.spec.shape[0] * item.spec.shape[1] for item in plan.values())
    zeros = 1 - sum(item.stored for item in plan.values()) / weights
    total = source.nbytes - dense + packed
    return PackReport(len(plan), dense, packed, 2 * weights, source.nbytes, total, zeros, low_rank)


def _pack_file(
    path: Path, file: WeightFile, plan: dict[str, PlannedOperator], packed: Callable[[], None]
) -> tuple[list[TensorEntry], tuple[float, float]]:
    """Write one file of the packed folder; ``packed`` is called after each operator.

    Returns:
        Its tensors, and of the operators whose values are rounded the sums of squares of the change and of the weights.
    """
    mine = {name: plan[name] for name in file.entries if name in plan}
    entries: list[TensorEntry] = []
    for name, entry in file.entries.items():
        entries += mine[name].spec.entries(name, mine[name].stored) if name in mine else [entry]
    if len({entry.name for entry in entries}) != len(entries):
        raise FistaPrunerError(f"{file.path}: a tensor is called like the part of a packed operator")
    specs = {name: item.spec.to_json() for name, item in mine.items()}
    metadata = {"format": "pt", **file.metadata, METADATA: json.dumps({"version": VERSION, "operators": specs})}
    changed, whole = 0.0, 0.0
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name in file.entries:
            weight = file.read(name)
            if name not in mine:
                writer.write(name, weight)
                continue
            operator = mine[name].build(weight)
            for part, tensor in encode(name, operator).items():
                writer.write(part, tensor)
            if mine[name].rounds:
                exact = weight.float()
                changed += float((operator.to_dense().float() - exact).square().sum(dtype=torch.float64))
                whole += float(exact.square().sum(dtype=torch.float64))
            packed()
    return entries, (changed, whole)


def _origin(folder: Path) -> dict[str, Any]:
    """Read what a folder's model card says of its licence and dense model."""
    card = ModelSource(folder).card()
    keys = ("license", "license_name", "license_link", "base_model")
    return {key: card[key] for key in keys if isinstance(card.get(key), str | list)}


def _card_metadata(origin: Mapping[str, Any]) -> str:
    metadata = {**origin, "library_name": "transformers", "tags": ["pruned", "sparse", "fistapruner"]}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}\n---\n"


def packed_model_card(report: PackReport, values: str, config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Format the README.md of a packed folder: what it is and how to load it with this ``config.json``.

    ``origin`` is what the card of the model that was packed says of its licence and dense model.
    """
    from ..models.architecture import auto_class_name, needs_own_code  # imports transformers; packing does without

    named = config.get("architectures")
    auto_class = auto_class_name(named[0] if isinstance(named, list) and named else "")
    own = needs_own_code(config)
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
