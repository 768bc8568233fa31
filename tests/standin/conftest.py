"""Stand-in GPUs for every test of this folder that asks for them, and for the processes that it starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from standin.gpu import StandIn
from standin.hardware import GPUS, REAL, RealGPUs


@pytest.fixture(scope="module", autouse=True)
def _quick_runs() -> Iterator[None]:
    """Short texts."""
    from pydoc_data import topics

    with pytest.MonkeyPatch.context() as patched:
        for name, text in topics.topics.items():
            patched.setitem(topics.topics, name, text[:500])
        yield


@pytest.fixture
def few_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks of rows and few steps of the search for rotations: every operator is slow on the stand-in."""
    monkeypatch.setattr("fistapruner.core.linalg.BLOCKS", 2)
    monkeypatch.setattr("fistapruner.allocate.channels.STEPS", 8)


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
