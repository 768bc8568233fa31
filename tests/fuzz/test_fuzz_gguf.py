"""Damaged GGUF files: refused before the library maps them, or read as the library reads them, or converted."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from mutations import EXAMPLES, damaged, fuzz

from fistapruner import FistaPrunerError
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.files.gguf import convert_gguf
from fistapruner.models.files.gguf_header import check_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
from tiny_gguf import write_gguf  # noqa: E402


def _whole() -> tuple[bytes, int]:
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "tiny.gguf")
        reader = gguf.GGUFReader(Path(folder) / "tiny.gguf")
        return (Path(folder) / "tiny.gguf").read_bytes(), int(min(tensor.data_offset for tensor in reader.tensors))


WHOLE, START = _whole()


def _passes_the_walk(data: bytes) -> bool:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        try:
            check_gguf(Path(file.name))
        except FistaPrunerError:
            return False
        return True


@fuzz
@given(damaged(WHOLE, upto=START))
def test_damaged_header(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(data)
    try:
        entries = check_gguf(path)
    except FistaPrunerError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    reader = gguf.GGUFReader(path)
    assert list(entries) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert entries[tensor.name].nbytes == tensor.n_bytes
        assert tensor.data_offset + tensor.n_bytes <= len(data)


@settings(fuzz, max_examples=max(EXAMPLES // 20, 1))
@given(damaged(WHOLE, upto=START).filter(_passes_the_walk))
def test_damaged_values_that_pass_the_walk_convert_or_fail_cleanly(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    base = tmp_path_factory.getbasetemp()
    path, out = base / "converted.gguf", base / "converted"
    path.write_bytes(data)
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert_gguf(path, out)
    except FistaPrunerError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert Checkpoint.open(out).names()
