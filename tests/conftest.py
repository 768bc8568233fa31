"""Shared set-up: the tests' folder is importable, nothing asks a network, output stays readable."""

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the real model, so that no worker has a run of minutes left when the others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


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
        if request.path.stem not in ("test_page", "test_browser"):
            patched.setenv("FISTAPRUNER_FIGURES", "0")
        yield


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A function that runs a command in this process, checks its exit status, and returns its ``out`` and ``err``."""
    from fistapruner.cli import main

    def run(*words: object, status: int = 0) -> Any:
        capsys.readouterr()
        found = main([*map(str, words)])
        said = capsys.readouterr()
        assert found == status, said.err
        return said

    return run


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for ``evaluate_tasks`` in evaluations: lm-eval may not be installed."""
    from fistapruner.measure.tasks import Tasks

    module, stand_in = importlib.import_module("fistapruner.measure.evaluate"), Mock(return_value=())
    monkeypatch.setattr(module, "find_tasks", lambda names, *_: Tasks(tuple(names), None, "local file"))
    monkeypatch.setattr(module, "evaluate_tasks", stand_in)
    return stand_in


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
