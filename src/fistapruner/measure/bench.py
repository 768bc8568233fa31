"""Measure dense, smaller and packed forms of a model side by side, and GGUF files beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, MissingExtraError, expand_home, path_text
from ..models.build import refuse_own_code
from ..models.checkpoint import PACKED_RECORD, Checkpoint, read_json_in
from ..models.gguf import check_gguf
from ..models.record import has_zeros, lost_structure, read_pruning_record
from ..packed import kernel
from ..packed.checkpoint import is_packed
from ..packed.pack import NoPackedFormError, pack, unpack
from ..runtime.files import temporary_folder
from ..runtime.formatting import align_columns, counted, size
from ..runtime.progress import Tick, silent
from .speed import SPEED_OF_OWN_CODE, Speed, Variant, compare

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
    files = [expand_home(path_text("gguf", file, "a GGUF file")) for file in gguf]
    for file in files:
        check_gguf(file)
    if files and setting["batch"] != 1:
        raise FistaPrunerError(f"batch {setting['batch']}: with GGUF files one sequence at once is timed: batch 1")
    if files and find_spec("xllamacpp") is None:
        raise MissingExtraError("xllamacpp", "bench", "timing a GGUF file")
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


def record(speeds: Sequence[Speed]) -> dict[str, Any]:
    """Return the measurements of a model as JSON values, for ``bench --json`` and ``report.json``."""
    return {"speeds": [asdict(speed) for speed in speeds], "kernel": kernel_name(), "sentence": sentence(speeds)}


def sentence(speeds: Sequence[Speed]) -> str:
    """Say in a few words how the fastest packed or smaller form compares with the fastest dense one.

    Variants whose names start with ``packed`` are sparse products, those with ``smaller`` models that have lost
    channels or heads, those with ``llama.cpp`` GGUF files, the others dense ones.
    """
    ours = [speed for speed in speeds if speed.variant.startswith(("packed", "smaller"))]
    files = [speed for speed in speeds if speed.variant.startswith(LLAMA_CPP)]
    dense = [speed for speed in speeds if speed not in ours + files]
    if not ours:
        return "There is no packed form of this model ('fistapruner pack' says why), and nothing to compare with."
    if not dense:
        return "The dense model that this smaller one was is not at hand: nothing to compare with."
    best, whole = (max(each, key=lambda speed: speed.tokens_per_second) for each in (ours, dense))
    ratio = best.tokens_per_second / whole.tokens_per_second
    (low, high), (dense_low, dense_high) = best.tokens_per_second_range, whole.tokens_per_second_range
    doubt = ", within the spread of the runs" if low <= dense_high and dense_low <= high else ""
    doubt = ", in one run, whose spread is not known" if best.runs == 1 else doubt
    said = (
        f"On this machine the fastest form without the zeros ({best.variant}) decodes {ratio:.2f} times as fast as the "
        f"fastest dense one ({whole.variant}){doubt}, with {best.peak_memory / whole.peak_memory:.2f} times its peak "
        "memory."
    )
    return said + _beside_files(ours, files)


def _beside_files(ours: Sequence[Speed], files: Sequence[Speed]) -> str:
    """Say whether a GGUF file is smaller than our forms and closer to the dense model; "" if not known."""
    known = [[(speed.kl, speed) for speed in each if speed.kl is not None] for each in (ours, files)]
    if not all(known):
        return ""
    kl, _ = min(known[0], key=itemgetter(0))
    size_of_ours, fastest = min(one.file_size for one in ours), max(one.tokens_per_second for one in ours)
    better = [found for found in known[1] if found[0] < kl and found[1].file_size <= size_of_ours]
    if not better:
        return " No GGUF file is both smaller than these forms and closer to the dense model."
    file_kl, file = min(better, key=itemgetter(0))
    return (
        f" {file.variant} is smaller than all of these forms ({size(file.file_size)}, not {size(size_of_ours)}) and "
        f"closer to the dense model (KL {file_kl:.3f} instead of {kl:.3f} nats a token), and decodes "
        f"{file.tokens_per_second / fastest:.2f} times as fast: quantise, unless speed decides."
    )


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
            rate = f"{speed.tokens_per_second:.1f} ({low:.1f} - {high:.1f})"
            latency = f"{1000 * speed.first_token:.0f} ({late:.0f} - {early:.0f})"
            row = (speed.variant, rate, latency, f"{speed.peak_memory / 2**20:.0f}", f"{speed.file_size / 2**20:.1f}")
            quality = (speed.perplexity, 2), (speed.kl, 3)
            rows.append(row + tuple("-" if x is None else f"{x:.{digits}f}" for x, digits in quality * judged))
        return f"{', '.join(parts)}\n{align_columns(rows, right=tuple(range(1, len(rows[0]))))}"
