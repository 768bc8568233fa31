"""Reading documents: every kind of file, and every way in which one can be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fistapruner import FistaPrunerError
from fistapruner.errors import MissingExtraError
from fistapruner.measure.data import check_data
from fistapruner.text.sources import (
    PYTHON_EVAL,
    check_source,
    passages,
    python_documents,
    read_documents,
    source_documents,
)


def test_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo ü", "utf-8-sig")
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo ü"]
    # U+2028 ends a line for str.splitlines, but not in a .jsonl file.
    lines = [json.dumps({"text": "a\u2028b", "more": 1}, ensure_ascii=False), "", json.dumps({"text": "c\U0001f600"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8-sig")
    assert read_documents(str(tmp_path / "a.jsonl")) == ["a\u2028b", "c\U0001f600"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == ["a", "b"]
    parquet.write_table(pyarrow.table({"words": ["a"]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    for name, words in (
        ("b", "with a column 'text'"),
        ("c", "row 2 has no field 'text'"),
        ("d", "no whole Parquet file"),
    ):
        with pytest.raises(FistaPrunerError, match=words):
            read_documents(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \xff}\n', "line 2 is not JSON in UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', "line 3 has no field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 has no field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}', r"line 2 is not JSON in UTF-8: .*\\ud83d"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b"nonsense", "line 1 is not JSON"),
        ("a.csv", b"text\na\n", r"is neither a \.txt/"),
        ("a.txt", None, "file that exists"),
    ],
)
def test_faults_name_the_place(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FistaPrunerError, match=words) as caught:
        source_documents(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_extra_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.parquet"
    table.touch()
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    for check in (check_source, check_data):
        check("python")
        with pytest.raises(MissingExtraError, match=r"^reading c4 needs .*'datasets': pip .*\[data\]"):
            check("c4")
        with pytest.raises(MissingExtraError, match=r"^reading .*table\.parquet needs the package 'pyarrow'"):
            check(str(table))


def test_language_reference_is_the_same_in_every_process() -> None:
    """Whatever order the process has for sets: documents are text of calibration, which a run must find again."""
    program = "from fistapruner.text.sources import python_documents; print(repr(python_documents()))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout == f"{python_documents()!r}\n"
    for kind, size in (("python", 200_000), (PYTHON_EVAL, 70_000)):
        assert sum(map(len, python_documents(kind))) > size


@settings(max_examples=40, deadline=None)
@given(st.text("ab \n", max_size=300), st.integers(1, 40))
def test_passages_are_the_text(text: str, characters: int) -> None:
    parts = list(passages(text, characters))
    assert all(0 < len(part) <= characters for part in parts)
    assert "".join(parts) == text
