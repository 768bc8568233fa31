"""Speed of models without processes of their own, for tests."""

from collections.abc import Sequence
from typing import Any

from fistapruner.measure.speed import Speed, Variant, load_variant, prompts, time_generation, weight_bytes
from fistapruner.runtime.devices import peak_memory


def in_this_process(
    variants: Sequence[Variant],
    *,
    prompt: int,
    tokens: int,
    runs: int,
    batch: int = 1,
    threads: int | None = None,
    **_: Any,
) -> list[Speed]:
    """Measure what :func:`fistapruner.measure.speed.compare` does, one variant after the other."""
    found = []
    for variant in variants:
        model = load_variant(variant)
        ids = prompts(model, batch, prompt, seed=0)
        found.append(
            Speed.of(
                variant.name,
                [time_generation(model, ids, tokens) for _ in range(runs)],
                peak_memory=peak_memory(),
                file_size=weight_bytes(variant.folder),
                batch=batch,
                prompt=prompt,
                tokens=tokens,
                threads=threads or 1,
                device="cpu",
            )
        )
    return found
