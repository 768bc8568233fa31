"""Shared set-up: the tests' folder is importable, nothing asks a network, output stays readable."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent))
hypothesis.settings.register_profile("same", derandomize="FISTAPRUNER_FUZZ" not in os.environ)
hypothesis.settings.load_profile("same")  # the same inputs in every run; a fuzz run (tests/fuzz) draws new ones


@pytest.fixture(scope="session", autouse=True)
def _quick_and_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What takes longer than the rest of a tiny run is left out, and the user's cache is left alone.

    Files are left to the system to write; processes that tests start, such as those of tests/faults, write as users do.
    Sample prompts have short continuations. Converted GGUF files go with the other files of the tests.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", os.fstat)  # it still takes no descriptor of a closed file
        patched.setattr("fistapruner.measure.run.NEW_TOKENS", 3)
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """Garbage is looked for among what a file's tests make: to look through PyTorch takes as long as a tiny run.

    So does the drawing of pages, which have their drawings in tests of reporting only.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        if "reporting" not in request.path.parts:
            patched.setenv("FISTAPRUNER_FIGURES", "0")
        yield


@pytest.fixture
def kill_removal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], bool]:
    """A function that stops work before it removes a file or folder for the nth time; returns whether it did.

    As of a killed process, nothing is removed afterwards.
    """

    def run(work: Callable[[], object], removals: int) -> bool:
        done = 0

        def counted(remove: Callable[..., None]) -> Callable[..., None]:
            def step(*args: Any, **keywords: Any) -> None:
                nonlocal done
                done += 1
                if done == removals:
                    raise KeyboardInterrupt
                if done < removals:
                    remove(*args, **keywords)

            return step

        with monkeypatch.context() as patched:
            for name in ("unlink", "rmdir"):
                patched.setattr(os, name, counted(getattr(os, name)))
            try:
                work()
            except KeyboardInterrupt:
                return True
        return False

    return run
