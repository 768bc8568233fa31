"""What one machine gains from a pruned model: the forms it can be kept in, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import FistaPrunerError
from ..models.files.checkpoint import read_json
from . import kernel
from .pack import is_packed, pack, unpack
from .speed import WARM_UP_TOKENS, Speed, Variant, compare, sentence


def bench(
    model: str | Path, *, batch: int = 1, prompt: int = 128, tokens: int = 128, runs: int = 3, threads: int | None = None
) -> list[Speed]:
    """Measure dense, pruned-as-dense, packed and packed int8 forms of a pruned model on the CPU.

    Args:
        model: folder of a pruned model, ordinary or packed.
        batch: sequences at once.
        prompt: prompt tokens.
        tokens: new tokens in a run.
        runs: interleaved rounds.
        threads: CPU threads; None takes torch's default.

    Raises:
        FistaPrunerError: no pruned model, it does not fit disk or memory, or it has fewer positions than prompt and tokens.
    """
    model = Path(model)
    if not (model / "config.json").is_file():
        raise FistaPrunerError(f"{model} is not a folder with a pruned model")
    _check_positions(model, prompt, tokens)
    with TemporaryDirectory(prefix="fistapruner-bench-") as scratch:
        dense, packed, int8 = model, Path(scratch) / "packed", Path(scratch) / "int8"
        if is_packed(model):
            dense, packed = unpack(model, Path(scratch) / "dense"), model
        else:
            pack(model, packed)
        pack(dense, int8, values="int8")
        variants = [
            Variant("dense float32", dense, "float32", fill=True),
            Variant("dense bfloat16", dense, "bfloat16", fill=True),
            Variant("pruned float32", dense, "float32"),
            Variant("pruned bfloat16", dense, "bfloat16"),
            Variant("packed", packed, "bfloat16"),
            Variant("packed int8", int8, "bfloat16"),
        ]
        return compare(variants, batch=batch, prompt=prompt, tokens=tokens, runs=runs, threads=threads)


def _check_positions(model: Path, prompt: int, tokens: int) -> None:
    """Refuse a text longer than the model was made for: where positions are learnt there is none to look up."""
    config = read_json(model, "config.json")
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    tokens = max(tokens, WARM_UP_TOKENS)
    if isinstance(positions, int) and prompt + tokens > positions:
        raise FistaPrunerError(f"prompt {prompt} and {tokens} new tokens are more than the {positions} tokens {model} was made for")


def record(speeds: Sequence[Speed]) -> dict[str, Any]:
    """The measurements as JSON values: what ``fistapruner bench --json`` prints and ``report.json`` keeps."""
    return {
        "speeds": [speed.to_json() for speed in speeds],
        "kernel": kernel_name(),
        "sentence": sentence({speed.variant: speed for speed in speeds}),
    }


def packed_bytes(speeds: Sequence[Speed]) -> int | None:
    """Bytes of the packed weights whose values are those of the checkpoint, None where that form was not measured."""
    return next((speed.file_size for speed in speeds if speed.variant == "packed" and speed.file_size), None)


def kernel_name() -> str:
    """The compiled kernel that packed operators use on this machine."""
    level = kernel.best_level()
    return kernel.LEVELS[level] if level >= 0 else "none (torch)"


def table(speeds: Sequence[Speed]) -> str:
    """The measurements as text, with the machine and the setting they were made in."""
    first = speeds[0]
    lines = [
        f"batch {first.batch}, {first.prompt} prompt tokens, {first.tokens} new tokens, {first.runs} interleaved runs, "
        f"{first.threads} threads, kernel: {kernel_name()}; median (slowest - fastest)",
        f"{'':<18}{'tokens/s':>22}{'first token, ms':>24}{'peak memory, MiB':>18}{'file, MiB':>11}",
    ]
    for speed in speeds:
        low, high = speed.tokens_per_second_range
        early, late = (1000 * value for value in speed.first_token_range)
        rate = f"{speed.tokens_per_second:.1f} ({low:.1f} - {high:.1f})"
        latency = f"{1000 * speed.first_token:.0f} ({early:.0f} - {late:.0f})"
        size = f"{speed.file_size / 2**20:.1f}" if speed.file_size else "-"
        lines.append(f"{speed.variant:<18}{rate:>22}{latency:>24}{speed.peak_memory / 2**20:>18.0f}{size:>11}")
    return "\n".join(lines)
