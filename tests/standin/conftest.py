"""Stand-in GPUs for every test of this folder that asks for them, and for the processes that it starts."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fistapruner.planning import measured_sizes
from standin.gpu import StandIn
from standin.hardware import GPUS, REAL, RealGPUs


def _once(measure: Callable[..., int]) -> Callable[..., int]:
    """Keep the results of a function for each value of its arguments."""
    known: dict[bytes, int] = {}

    def measured(*args: Any, **keywords: Any) -> int:
        key = pickle.dumps((args, keywords))
        if key not in known:
            known[key] = measure(*args, **keywords)
        return known[key]

    return measured


_SOLVE_BYTES = _once(measured_sizes.solve_bytes)


@pytest.fixture(scope="module", autouse=True)
def _quick_runs() -> Iterator[None]:
    """Short texts; modules are not looked through for garbage; the plan makes each of its small solves once."""
    from pydoc_data import topics

    from transformers import LlamaForCausalLM  # noqa: F401  (most of what is loaded)

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        for name, text in topics.topics.items():
            patched.setitem(topics.topics, name, text[:500])
        patched.setattr(measured_sizes, "solve_bytes", _SOLVE_BYTES)
        yield
    gc.unfreeze()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn | RealGPUs]:
    """Two stand-in GPUs, or those of the machine."""
    if REAL:
        yield RealGPUs()
        return
    site = str(Path(__file__).parent / "site")
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("STAND_IN_GPUS", ",".join("0" * GPUS))
    monkeypatch.setenv("PYTHONPATH", path)
    with StandIn(GPUS) as standin:
        yield standin
