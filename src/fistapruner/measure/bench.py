"""Measure dense, smaller and packed forms of a model side by side, and GGUF files beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError, MissingExtraError, expand_home, path_text
from ..models.architecture import refuse_own_code
from ..models.files.checkpoint import Checkpoint
from ..models.files.folder_files import PACKED_RECORD, read_json_in
from ..models.files.gguf import check_gguf
from ..models.files.record import has_zeros, lost_structure, read_pruning_record, stacked_experts
from ..packed import kernel
from ..packed.checkpoint import is_packed, low_rank_part
from ..packed.pack import NoPackedFormError, pack, unpack
from ..runtime.files import temporary_folder
from ..runtime.formatting import align_columns, counted, size
from ..runtime.progress import Tick, silent
from .speed import EMBEDDING, SPEED_OF_OWN_CODE, Speed, Variant, compare

DTYPES = ("float32", "bfloat16")
"""Precisions of dense products: which of them is faster depends on the processor."""

LLAMA_CPP = "llama.cpp"
"""First word of the variants that are GGUF files."""

LEAST = {"batch": 1, "prompt": 1, "tokens": 2, "runs": 1, "threads": 1}


def bench(
    model: str | Path,
    *,
    measure: Callable[..., list[Speed]] = compare,
    before: str | Path | None = None,
    gguf: Sequence[str | Path] = (),
    quality: Callable[[list[Variant], list[Speed]], list[Speed]] | None = None,
    tick: Tick = silent,
    allow_pickle: bool = False,
    **setting: int | None,
) -> list[Speed]:
    """Measure dense, packed and packed int8 forms of a pruned model on the CPU.

    The dense forms are the checkpoint with its zeros: the speed of a dense product does not depend on its numbers. A
    model that has lost channels or heads is measured as ``smaller``, beside the dense model that it was. Where no
    packed form is possible, there is none. Of a model with a low-rank part the packed forms are the sum of both parts.

    Args:
        model: folder of a pruned model, ordinary or packed.
        measure: how the variants are measured, with the arguments of :func:`~.speed.compare`.
        before: folder of the dense model that a model without some of its channels was; None does not measure it.
        gguf: GGUF files to measure beside the model, in llama.cpp: the dense model, quantised.
        quality: adds the quality of the variants to their speeds; called while their folders are there.
        tick: called with progress: (what, steps done, steps in all).
        allow_pickle: read legacy ``.bin`` weights.
        **setting: ``batch``, ``prompt``, ``tokens``, ``runs`` and ``threads``, as for :func:`~.speed.compare`.

    Raises:
        FistaPrunerError: a number that is too small, no pruned model, a form that cannot be loaded or run, or a file
            that is no GGUF file.
        MissingExtraError: GGUF files need the extra ``bench``.
    """
    setting = {"batch": 1, "prompt": 128, "tokens": 128, "runs": 3, "threads": None} | setting
    for name, value in setting.items():
        if value is not None and (type(value) is not int or value < LEAST[name]):
            raise FistaPrunerError(f"{name} {value!r} is not a whole number of at least {LEAST[name]}")
    named = [gguf] if isinstance(gguf, (str, Path)) else gguf or ()
    files = [expand_home(path_text("gguf", file, "a GGUF file")) for file in named]
    _check_files(files, setting["batch"])
    model = Path(model)
    if not (model / "config.json").is_file():
        reason = "is not a folder with a pruned model" if model.exists() else "does not exist"
        raise FistaPrunerError(f"{model} {reason}")
    Checkpoint.open(model, allow_pickle)
    refuse_own_code(model, SPEED_OF_OWN_CODE)
    with temporary_folder() as scratch:
        dense, packed, int8 = model, Path(scratch) / "packed", Path(scratch) / "int8"
        if is_packed(model):
            dense, packed = unpack(model, Path(scratch) / "dense"), model
        about = read_pruning_record(dense)
        forms = [("dense", Path(before))] if before is not None else []
        forms.append(("smaller" if lost_structure(about) else "dense", dense))
        variants = [Variant(f"{name} {dtype}", folder, dtype) for name, folder in forms for dtype in DTYPES]
        if is_packed(model) or has_zeros(about):
            with suppress(NoPackedFormError):
                if not is_packed(model):
                    pack(model, packed, allow_pickle=allow_pickle)
                if read_json_in(packed, PACKED_RECORD).get("values") == "int8":
                    int8 = packed
                else:
                    pack(dense, int8, values="int8", allow_pickle=allow_pickle)
                    variants.append(Variant("packed", packed, "bfloat16"))
                variants.append(Variant("packed int8", int8, "bfloat16"))
        variants += [Variant(f"{LLAMA_CPP} {file.stem}", file) for file in files]
        speeds = measure(variants, **setting, tick=tick)
        return speeds if quality is None else quality(variants, speeds)


def _check_files(files: list[Path], batch: int | None) -> None:
    """Refuse files that llama.cpp cannot be timed on, before any of them is loaded.

    Raises:
        FistaPrunerError: a file that is missing or no GGUF file, two of one name, or more than one sequence at once.
        MissingExtraError: the extra ``bench`` is not installed.
    """
    for file in files:
        if not file.is_file():
            raise FistaPrunerError(f"gguf {file} is not there: a GGUF file is expected")
        if [other.stem for other in files].count(file.stem) > 1:
            raise FistaPrunerError(f"gguf {file}: another file has the name {file.stem}, too: rename one of them")
        if EMBEDDING not in check_gguf(file):
            raise FistaPrunerError(f"gguf {file} has no tensor {EMBEDDING!r}: a language model is expected")
    if files and batch != 1:
        raise FistaPrunerError(f"batch {batch}: with GGUF files one sequence at once is timed: batch 1")
    if files and find_spec("xllamacpp") is None:
        raise MissingExtraError("xllamacpp", "bench", "timing a GGUF file")


def record(speeds: Sequence[Speed], model: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the measurements of a model as JSON values, for ``bench --json`` and ``report.json``."""
    forms = {speed.variant: speed for speed in speeds}
    compared, why = any(name.startswith(("packed", "smaller")) for name in forms), ""
    if not compared and (stacked := stacked_experts(read_pruning_record(Path(model)))):
        why = f"{stacked} is one tensor of all experts, and only matrices are packed"
    elif not compared:
        bf16 = Checkpoint.open(model, allow_pickle).dtype == torch.bfloat16
        rounded = "Weights that are not bf16 are packed rounded only ('fistapruner pack --values bf16')"
        why = "No operator has a smaller packed form" if bf16 else rounded
    said = sentence(forms, why)
    if compared and (low_rank := low_rank_part(Path(model))) is not None:
        said += (
            f" Packed forms compute the sum of the sparse part and the low-rank part of rank {low_rank.rank}; their "
            f"sizes count both, {size(low_rank.file_bytes)} of the low-rank part."
        )
    return {"speeds": [speed.to_json() for speed in speeds], "kernel": kernel_name(), "sentence": said}


def sentence(speeds: Mapping[str, Speed], why: str = "") -> str:
    """Say in a few words how the fastest packed or smaller form compares with the fastest dense one.

    Args:
        speeds: by variant; names that start with ``packed`` are sparse products, those with ``smaller`` models that
            have lost channels or heads, those with ``llama.cpp`` GGUF files, the others dense ones.
        why: there is no such form, where there is none.
    """

    def kind(*words: str) -> list[Speed]:
        return [speed for name, speed in speeds.items() if name.startswith(words)]

    ours, files = kind("packed", "smaller"), kind(LLAMA_CPP)
    dense = [speed for speed in speeds.values() if speed not in ours + files]
    if not ours:
        return f"{why}, so there is nothing packed to compare with."
    if not dense:
        said = "The dense model that this smaller one was is not at hand: nothing to compare with."
        return " ".join([said, *_beside_files(ours, files)])
    best, whole = max(ours, key=_rate), max(dense, key=_rate)
    ratio, memory = _rate(best) / _rate(whole), best.peak_memory / whole.peak_memory
    (low, high), (dense_low, dense_high) = best.tokens_per_second_range, whole.tokens_per_second_range
    doubt = ", within the spread of the runs" if low <= dense_high and dense_low <= high else ""
    doubt = ", in one run, whose spread is not known" if best.runs == 1 else doubt
    times = f"{max(ratio, 1 / ratio):.2f}"
    how = "as fast as" if times == "1.00" else f"{times} times {'faster' if ratio > 1 else 'slower'} than"
    said = (
        f"On this machine the fastest form without the zeros ({best.variant}) decodes {how} the fastest dense one "
        f"({whole.variant}){doubt}, with {memory:.2f} times its peak memory."
    )
    return " ".join([said, *_beside_files(ours, files)])


def _beside_files(ours: Sequence[Speed], files: Sequence[Speed]) -> list[str]:
    """Say whether a GGUF file is smaller than all of our forms and closer to the dense model."""
    if not any(speed.kl is not None for speed in ours) or not any(file.kl is not None for file in files):
        return []
    closest, smallest = min(ours, key=_kl), min(ours, key=lambda speed: speed.file_size)
    best = min((file for file in files if file.file_size <= smallest.file_size), key=_kl, default=closest)
    if _kl(best) >= _kl(closest):
        return ["No GGUF file is both smaller than these forms and closer to the dense model."]
    said = (
        f"{best.variant} is smaller than all of these forms ({size(best.file_size)}, {smallest.variant} "
        f"{size(smallest.file_size)}) and closer to the dense model (KL {_kl(best):.3f} instead of {_kl(closest):.3f} "
        "nats a token)"
    )
    slower = max(map(_rate, ours)) / _rate(best)
    if slower <= 1:
        return [f"{said}, and not slower: quantise instead."]
    return [f"{said}, but decodes {slower:.2f} times slower than the fastest: quantise, unless speed decides."]


def _kl(speed: Speed) -> float:
    return math.inf if speed.kl is None else speed.kl


def _rate(speed: Speed) -> float:
    return speed.tokens_per_second


def packed_bytes(speeds: Sequence[Speed]) -> int | None:
    """Return the bytes of the losslessly packed weights; None if that form was not measured."""
    return next((speed.file_size for speed in speeds if speed.variant == "packed" and speed.file_size), None)


def kernel_name() -> str:
    """Name the kernel that packed operators use on this machine."""
    level = kernel.best_level()
    return kernel.LEVELS[level] if level >= 0 else "none (torch)"


class Speeds(list[Speed]):
    """Speeds that are printed as a table, with the setting."""

    def __str__(self) -> str:
        first = self[0]
        parts = [
            f"batch {first.batch}",
            counted(first.prompt, "prompt token"),
            counted(first.tokens, "new token"),
            counted(first.runs, "interleaved run"),
            counted(first.threads, "thread"),
            f"kernel: {kernel_name()}; median (slowest - fastest)",
        ]
        judged = any(speed.perplexity is not None for speed in self)
        rows: list[tuple[str, ...]] = [("", "tokens/s", "first token, ms", "peak memory, MiB", "file, MiB")]
        rows[0] += ("perplexity", "KL, nats") if judged else ()
        for speed in self:
            low, high = speed.tokens_per_second_range
            early, late = (1000 * value for value in speed.first_token_range)
            rate = f"{_rate(speed):.1f} ({low:.1f} - {high:.1f})"
            latency = f"{1000 * speed.first_token:.0f} ({late:.0f} - {early:.0f})"
            row = (speed.variant, rate, latency, f"{speed.peak_memory / 2**20:.0f}", f"{speed.file_size / 2**20:.1f}")
            quality = (speed.perplexity, 2), (speed.kl, 3)
            rows.append(row + tuple("-" if x is None else f"{x:.{digits}f}" for x, digits in quality * judged))
        return f"{', '.join(parts)}\n{align_columns(rows, right=tuple(range(1, len(rows[0]))))}"
