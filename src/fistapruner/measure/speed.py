"""Measure how fast forms of a model decode: dense, smaller and packed.

What is measured is greedy decoding with a cache, one token at a time, as in a chat: speed, time to the first token and
peak memory. Forms are measured in interleaved rounds, each in a process of its own: other load on the machine slows all
of them alike, and the memory of each is its own.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FistaPrunerError, one_line
from ..models.build import load_whole, refuse_own_code
from ..models.checkpoint import PACKED_RECORD, Checkpoint, read_json_in
from ..models.low_rank import LowRankAdapter
from ..models.record import has_zeros, lost_structure, read_pruning_record
from ..packed import kernel
from ..packed.checkpoint import PackedCheckpoint, is_packed
from ..packed.load import load
from ..packed.pack import NoPackedFormError, pack, unpacked
from ..runtime.devices import free_memory, peak_memory, reset_peak_memory, usable_threads
from ..runtime.files import temporary_folder
from ..runtime.show import Tick, silent

WARM_UP_TOKENS = 4
"""Tokens decoded before the clock starts: the first calls choose kernels and fill caches."""

DTYPES = ("float32", "bfloat16")
"""Precisions of dense products: which of them is faster depends on the processor."""

SPEED_OF_OWN_CODE = "the speed of such models is not measured"
"""Why a model with Python code of its own is refused."""


class Run(NamedTuple):
    """One timed generation: seconds to the first token, and then new tokens of the whole batch per second."""

    first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Speed:
    """Measured speed of one form of a model: medians over runs, and ranges, in bytes and seconds."""

    variant: str
    tokens_per_second: float
    tokens_per_second_range: tuple[float, float]
    first_token: float
    first_token_range: tuple[float, float]
    peak_memory: int
    file_size: int
    batch: int
    prompt: int
    tokens: int
    runs: int
    threads: int
    device: str

    @classmethod
    def of(cls, variant: str, runs: Sequence[Run], **setting: Any) -> Speed:
        """Summarise timed runs by median and range; ``setting`` gives all other fields."""
        firsts, rates = zip(*runs, strict=True)
        return cls(
            variant=variant,
            tokens_per_second=statistics.median(rates),
            tokens_per_second_range=(min(rates), max(rates)),
            first_token=statistics.median(firsts),
            first_token_range=(min(firsts), max(firsts)),
            runs=len(runs),
            **setting,
        )


class Variant(NamedTuple):
    """One form of a model, for :func:`compare`."""

    name: str
    folder: Path  # packed or ordinary
    dtype: str | None = None  # None takes the checkpoint's


def bench(
    model: str | Path,
    *,
    measure: Callable[..., list[Speed]] | None = None,
    before: str | Path | None = None,
    tick: Tick = silent,
    allow_pickle: bool = False,
    **setting: Any,
) -> list[Speed]:
    """Measure dense, packed and packed int8 forms of a pruned model on the CPU.

    The dense forms are the checkpoint with its zeros: the speed of a dense product does not depend on its numbers. A
    model that has lost channels or heads is ``smaller``. Where no packed form is possible, there is none.

    Args:
        model: folder of a pruned model, ordinary or packed.
        measure: how the variants are measured, with the arguments of :func:`compare`, which is the default.
        before: folder of the dense model that a smaller model was; None does not measure it.
        tick: called with progress: (what, steps done, steps in all).
        allow_pickle: read legacy ``.bin`` weights.
        **setting: ``batch``, ``prompt``, ``tokens``, ``runs`` and ``threads``, as for :func:`compare`.
    """
    for name, value in setting.items():
        least = 2 if name == "tokens" else 1
        if value is not None and (type(value) is not int or value < least):
            raise FistaPrunerError(f"{name} {value!r} is not a whole number of at least {least}")
    model = Path(model)
    Checkpoint.open(model, allow_pickle)
    refuse_own_code(model, SPEED_OF_OWN_CODE)
    with temporary_folder() as scratch, unpacked(model) as dense:
        packed, int8 = model if is_packed(model) else Path(scratch) / "packed", Path(scratch) / "int8"
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
        return (measure or compare)(variants, **setting, tick=tick)


def compare(
    variants: Sequence[Variant],
    *,
    batch: int = 1,
    prompt: int = 128,
    tokens: int = 128,
    runs: int = 3,
    threads: int | None = None,
    tick: Tick = silent,
) -> list[Speed]:
    """Measure several variants on the CPU in interleaved rounds (``runs``), each in a process of its own.

    If they do not all fit into memory at once, they run one after the other. ``threads`` None takes torch's default, at
    most the cores that this process may use. A script that calls this needs ``if __name__ == "__main__":``.
    """
    setting = {"batch": batch, "prompt": prompt, "threads": threads or usable_threads()}
    sizes = [weight_bytes(one.folder) for one in variants]
    together = 2.5 * sum(sizes) < free_memory()  # fp32 copies double a bf16 file
    found: list[list[tuple[Run, int]]] = [[] for _ in variants]
    for group in [range(len(variants))] if together else [[number] for number in range(len(variants))]:
        with ExitStack() as stack:
            workers = [(number, stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))) for number in group]
            for place, (number, worker) in enumerate(workers):
                tick("forms of the model loaded", place, len(workers))
                _answer(variants[number], worker.submit(_load, variants[number], **setting))
            for round_number in range(1, runs + 1):
                for place, (number, worker) in enumerate(workers):
                    tick(f"round {round_number} of {runs}, forms timed", place, len(workers))
                    found[number].append(_answer(variants[number], worker.submit(_generate, tokens)))
    return [
        Speed.of(
            one.name,
            [run for run, _ in own],
            peak_memory=own[-1][1],
            file_size=nbytes,
            tokens=tokens,
            device="cpu",
            **setting,
        )
        for one, own, nbytes in zip(variants, found, sizes, strict=True)
    ]


def _answer(variant: Variant, work: Future[Any]) -> Any:
    """Wait for the process of a variant; an error names the variant."""
    try:
        return work.result()
    except Exception as error:  # of a model's code
        said = str(error) if isinstance(error, FistaPrunerError) else f"{type(error).__name__}: {one_line(error, 300)}"
        if isinstance(error, BrokenProcessPool):
            said = "the process that measures it ended early: there may be too little memory for it"
        raise FistaPrunerError(f"{variant.name}: {said}") from None


_LOADED: list[Callable[[int], Run]] = []
"""In the process of a variant: what generates so many tokens with it."""


def _load(variant: Variant, batch: int, prompt: int, threads: int) -> None:
    """Load a variant into this process, and warm it up."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of several processes at once, they would be mixed
    torch.set_num_threads(threads)
    model = load_variant(variant)
    generate = partial(time_generation, model, prompts(model, batch, prompt, seed=0))
    generate(WARM_UP_TOKENS)
    reset_peak_memory(torch.device("cpu"))
    _LOADED.append(generate)


def _generate(tokens: int) -> tuple[Run, int]:
    """Generate with the variant of this process: times, and peak memory until then."""
    return _LOADED[0](tokens), peak_memory()


def load_variant(variant: Variant) -> Any:
    """Load the model of a variant onto the CPU."""
    refuse_own_code(variant.folder, SPEED_OF_OWN_CODE)
    if is_packed(variant.folder):
        return load(variant.folder, dtype=variant.dtype)
    return load_whole(variant.folder, torch.device("cpu"), getattr(torch, variant.dtype or "", None))


def weight_bytes(folder: Path) -> int:
    """Count the bytes of the weight files that are loaded, with a low-rank part's."""
    low_rank = PackedCheckpoint(folder, verify=False).low_rank if is_packed(folder) else LowRankAdapter.beside(folder)
    return Checkpoint.open(folder, allow_pickle=True).file_bytes + (0 if low_rank is None else low_rank.file_bytes)


def prompts(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Draw (batch, length) random token ids from a model's vocabulary."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def time_generation(model: Any, prompt: Tensor, tokens: int) -> Run:
    """Decode at least two new tokens greedily after a prompt, (batch, seqlen) token ids, and time it."""

    def now() -> float:
        if prompt.device.type == "cuda":
            torch.cuda.synchronize(prompt.device)
        return time.perf_counter()

    names = inspect.signature(model.forward).parameters
    key = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5
    # Logits of the last token only, as in generate().
    last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    with torch.inference_mode():
        begin = now()
        out = model(input_ids=prompt, use_cache=True, **last)
        token = out.logits[:, -1:].argmax(-1)
        first = now()
        for _ in range(tokens - 1):
            out = model(input_ids=token, use_cache=True, **{key: getattr(out, key)})
            token = out.logits[:, -1:].argmax(-1)
        end = now()
    return Run(first - begin, prompt.shape[0] * (tokens - 1) / (end - first))


def kernel_name() -> str:
    """Name the kernel that packed operators use on this machine."""
    level = kernel.best_level()
    return kernel.LEVELS[level] if level >= 0 else "none (torch)"
