"""Measure dense, pruned and packed forms of a model side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError, expand_home, path_text
from ..models.architecture import build_model, max_length, refuse_own_code
from ..models.files.checkpoint import Checkpoint
from ..models.files.folder_files import PACKED_RECORD, read_json_in
from ..models.files.record import has_zeros, lost_structure, read_pruning_record, stacked_experts
from ..runtime.files import temporary_folder
from ..runtime.formatting import align_columns, counted, size
from ..runtime.progress import Tick, silent
from . import kernel
from .llama_cpp import check_files
from .pack import pack, unpack
from .pack_plan import NoPackedFormError
from .packed_checkpoint import is_packed, low_rank_part
from .speed import WARM_UP_TOKENS, Speed, cache_argument
from .variants import SPEED_OF_OWN_CODE, Variant, compare

DTYPES = ("float32", "bfloat16")
"""Precisions of dense products: which of them is faster depends on the processor."""

LLAMA_CPP = "llama.cpp"
"""First word of the variants that are GGUF files."""


def bench(
    model: str | Path,
    *,
    batch: int = 1,
    prompt: int = 128,
    tokens: int = 128,
    runs: int = 3,
    threads: int | None = None,
    measure: Callable[..., list[Speed]] = compare,
    before: str | Path | None = None,
    gguf: Sequence[str | Path] = (),
    quality: Callable[[list[Variant], list[Speed]], list[Speed]] | None = None,
    tick: Tick = silent,
    allow_pickle: bool = False,
) -> list[Speed]:
    """Measure dense, pruned-as-dense, packed and packed int8 forms of a pruned model on the CPU.

    A model that has lost channels or heads is measured as ``smaller``, beside the dense model that it was. Without
    zeros, where no operator becomes smaller without them, where the experts are one tensor, or where weights are fp64,
    it is not packed. Of a model with a low-rank part the packed forms are the sum of both parts; pruned-as-dense forms,
    which would be the sparse part alone, are left out.

    Args:
        model: folder of a pruned model, ordinary or packed.
        batch: sequences per forward pass.
        prompt: prompt tokens.
        tokens: new tokens in a run.
        runs: interleaved rounds.
        threads: CPU threads; None takes torch's default, at most the cores that this process may use.
        measure: how the variants are measured, with the arguments of :func:`~.variants.compare`.
        before: folder of the dense model that a model without some of its channels was; None does not measure it.
        gguf: GGUF files to measure beside the model, in llama.cpp: the dense model, quantised.
        quality: adds the quality of the variants to their speeds; called while their folders are there.
        tick: called with progress: (what, steps done, steps in all).
        allow_pickle: read legacy ``.bin`` weights.

    Raises:
        FistaPrunerError: a number that is too small, no pruned model, it needs Python code of its own, it takes no
            cache, it does not fit disk or memory, it has too few positions for prompt and tokens, or a file is no GGUF
            file.
        MissingExtraError: GGUF files need the extra ``bench``.
    """
    for name, value, least in (
        ("batch", batch, 1),
        ("prompt", prompt, 1),
        ("tokens", tokens, 2),
        ("runs", runs, 1),
        ("threads", threads, 1),
    ):
        if value is not None and type(value) is not int:
            raise FistaPrunerError(f"{name} {value!r} is not a whole number of at least {least}")
        if value is not None and value < least:
            raise FistaPrunerError(f"{name} {value} is too small: at least {least}")
    named = [gguf] if isinstance(gguf, (str, Path)) else gguf or ()
    files = [expand_home(path_text("gguf", file, "a GGUF file")) for file in named]
    check_files(files, batch)
    model = Path(model)
    if not (model / "config.json").is_file():
        reason = "is not a folder with a pruned model" if model.exists() else "does not exist"
        raise FistaPrunerError(f"{model} {reason}")
    for folder in (model, before):
        if folder is not None:
            Checkpoint.open(folder, allow_pickle)
    low_rank = low_rank_part(model)
    refuse_own_code(model, SPEED_OF_OWN_CODE)
    _check_decoding(model, prompt, tokens, allow_pickle)
    with temporary_folder() as scratch:
        whole = [] if before is None else [Variant(f"dense {dtype}", Path(before), dtype) for dtype in DTYPES]
        dense, packed, int8 = model, Path(scratch) / "packed", Path(scratch) / "int8"
        if is_packed(model):
            dense, packed = unpack(model, Path(scratch) / "dense"), model
        about = read_pruning_record(dense)
        if lost_structure(about):
            variants = [*whole, *(Variant(f"smaller {dtype}", dense, dtype) for dtype in DTYPES)]
        else:
            variants = [Variant(f"dense {dtype}", dense, dtype, fill=True) for dtype in DTYPES]
            if low_rank is None:
                variants += [Variant(f"pruned {dtype}", dense, dtype) for dtype in DTYPES]
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
        setting = {"batch": batch, "prompt": prompt, "tokens": tokens, "runs": runs, "threads": threads}
        speeds = measure(variants, **setting, tick=tick)
        return speeds if quality is None else quality(variants, speeds)


def _check_decoding(model: Path, prompt: int, tokens: int, allow_pickle: bool) -> None:
    """Refuse a model without a cache, and a text longer than its positions, where learnt embeddings end.

    The last new token takes none: no other is predicted from it.
    """
    # The shapes of packed tensors are not needed.
    empty = build_model(Checkpoint.open(model, allow_pickle), shapes={})
    cache_argument(empty)
    positions = max_length(empty)
    warm_up = f" ({WARM_UP_TOKENS} to warm up)" if tokens < WARM_UP_TOKENS else ""
    if positions is not None and prompt + max(tokens, WARM_UP_TOKENS) - 1 > positions:
        asked = f"prompt {prompt} and {tokens} new tokens{warm_up}"
        raise FistaPrunerError(f"{asked} are more than the {positions} tokens {model} was made for")


def record(speeds: Sequence[Speed], model: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the measurements of a model as JSON values, for ``bench --json`` and ``report.json``."""
    forms = {speed.variant: speed for speed in speeds}
    compared = any(name.startswith(("packed", "smaller")) for name in forms)
    said = sentence(forms, "" if compared else _why_not_packed(Path(model), allow_pickle))
    if compared and (low_rank := low_rank_part(Path(model))) is not None:
        said += (
            f" Packed forms compute the sum of the sparse part and the low-rank part of rank {low_rank.rank}; their "
            f"sizes count both, {size(low_rank.file_bytes)} of the low-rank part."
        )
    return {"speeds": [speed.to_json() for speed in speeds], "kernel": kernel_name(), "sentence": said}


def _why_not_packed(model: Path, allow_pickle: bool) -> str:
    """Say why a model has no packed form."""
    if stacked := stacked_experts(read_pruning_record(model)):
        return f"{stacked} is one tensor of all experts, and only matrices are packed"
    if Checkpoint.open(model, allow_pickle).dtype != torch.bfloat16:
        return "Weights that are not bf16 are packed rounded only ('fistapruner pack --values bf16')"
    return "No operator has a smaller packed form"


def sentence(speeds: Mapping[str, Speed], why: str = "") -> str:
    """Say in a few words how the fastest packed or smaller form compares with the fastest dense one.

    Args:
        speeds: by variant; names that start with ``packed`` are sparse products, those with ``smaller`` models that
            have lost channels or heads, those with ``llama.cpp`` GGUF files, the others dense ones.
        why: there is no such form, where there is none.
    """
    by_kind: dict[str, list[Speed]] = {"packed": [], "smaller": [], LLAMA_CPP: [], "dense": []}
    for name, speed in speeds.items():
        by_kind.get(name.split()[0], by_kind["dense"]).append(speed)
    if not by_kind["packed"] and not by_kind["smaller"]:
        return f"{why}, so there is nothing packed to compare with."
    fastest = {kind: max(found, key=lambda speed: speed.tokens_per_second) for kind, found in by_kind.items() if found}
    dense, sentences = fastest.get("dense"), list[str]()
    if dense is None:
        sentences.append("The dense model that this smaller one was is not at hand: nothing to compare with.")
    elif "packed" in fastest:
        sentences.append(_against(fastest["packed"], dense, "packed form"))
    if dense is not None and "smaller" in fastest:
        smaller, prefill = fastest["smaller"], min(by_kind["smaller"], key=lambda speed: speed.first_token)
        whole = min(by_kind["dense"], key=lambda speed: speed.first_token)
        reading = whole.first_token / prefill.first_token
        sentences.append(
            f"{_against(smaller, dense, 'form of the smaller model')} The one that reads a prompt of "
            f"{counted(prefill.prompt, 'token')} fastest ({prefill.variant}) is {_how_fast(reading)} the dense one "
            f"that does ({whole.variant})."
        )
    return " ".join([*sentences, *_beside_files(by_kind["packed"] + by_kind["smaller"], by_kind[LLAMA_CPP])])


def _beside_files(ours: Sequence[Speed], files: Sequence[Speed]) -> list[str]:
    """Say whether a GGUF file is smaller than all of our forms and closer to the dense model."""
    known = [speed for speed in ours if speed.kl is not None]
    files = [file for file in files if file.kl is not None]
    if not known or not files:
        return []
    closest, smallest = min(known, key=_kl), min(ours, key=lambda speed: speed.file_size)
    rate = max(speed.tokens_per_second for speed in ours)
    better = [file for file in files if _kl(file) < _kl(closest) and file.file_size <= smallest.file_size]
    if not better:
        return ["No GGUF file is both smaller than these forms and closer to the dense model."]
    best = min(better, key=_kl)
    said = (
        f"{best.variant} is smaller than all of these forms ({size(best.file_size)}, {smallest.variant} "
        f"{size(smallest.file_size)}) and closer to the dense model (KL {_kl(best):.3f} instead of {_kl(closest):.3f} "
        "nats a token)"
    )
    if best.tokens_per_second >= rate:
        return [f"{said}, and not slower: quantise instead."]
    slower = rate / best.tokens_per_second
    return [f"{said}, but decodes {slower:.2f} times slower than the fastest: quantise, unless speed decides."]


def _kl(speed: Speed) -> float:
    return math.inf if speed.kl is None else speed.kl


def _against(packed: Speed, dense: Speed, what: str) -> str:
    """Compare the fastest form of some kind with the fastest dense one."""
    ratio = packed.tokens_per_second / dense.tokens_per_second
    (low, high), (dense_low, dense_high) = packed.tokens_per_second_range, dense.tokens_per_second_range
    overlap = low <= dense_high and dense_low <= high
    doubt = ", within the spread of the runs" if overlap else ""
    if packed.runs == 1:
        doubt = ", in one run, whose spread is not known"
    memory = packed.peak_memory / dense.peak_memory
    return (
        f"On this machine the fastest {what} ({packed.variant}) decodes {_how_fast(ratio)} "
        f"the fastest dense one ({dense.variant}){doubt}, with {memory:.2f} times its peak memory."
    )


def _how_fast(ratio: float) -> str:
    """Write a ratio of speeds before what is compared with: ``1.20 times faster than``, ``as fast as``."""
    times = f"{max(ratio, 1 / ratio):.2f}"
    return "as fast as" if times == "1.00" else f"{times} times {'faster' if ratio > 1 else 'slower'} than"


def packed_bytes(speeds: Sequence[Speed]) -> int | None:
    """Return the bytes of the losslessly packed weights; None if that form was not measured."""
    return next((speed.file_size for speed in speeds if speed.variant == "packed" and speed.file_size), None)


def kernel_name() -> str:
    """Name the kernel that packed operators use on this machine."""
    level = kernel.best_level()
    return kernel.LEVELS[level] if level >= 0 else "none (torch)"


class Speeds(list[Speed]):
    """Speeds that are printed as a table."""

    def __str__(self) -> str:
        return table(self)


def table(speeds: Sequence[Speed]) -> str:
    """Format the measurements as text, with the machine and the setting."""
    first = speeds[0]
    parts = [
        f"batch {first.batch}",
        counted(first.prompt, "prompt token"),
        counted(first.tokens, "new token"),
        counted(first.runs, "interleaved run"),
        counted(first.threads, "thread"),
        f"kernel: {kernel_name()}; median (slowest - fastest)",
    ]
    judged = any(speed.perplexity is not None for speed in speeds)
    quality = ("perplexity", "KL, nats") if judged else ()
    rows: list[tuple[str, ...]] = [("", "tokens/s", "first token, ms", "peak memory, MiB", "file, MiB", *quality)]
    for speed in speeds:
        low, high = speed.tokens_per_second_range
        early, late = (1000 * value for value in speed.first_token_range)
        rate = f"{speed.tokens_per_second:.1f} ({low:.1f} - {high:.1f})"
        latency = f"{1000 * speed.first_token:.0f} ({late:.0f} - {early:.0f})"
        file = f"{speed.file_size / 2**20:.1f}" if speed.file_size else "-"
        perplexity = "-" if speed.perplexity is None else f"{speed.perplexity:.2f}"
        kl = "-" if speed.kl is None else f"{speed.kl:.3f}"
        rows.append(
            (speed.variant, rate, latency, f"{speed.peak_memory / 2**20:.0f}", file, *((perplexity, kl) * judged))
        )
    return f"{', '.join(parts)}\n{align_columns(rows, right=tuple(range(1, len(rows[0]))))}"
