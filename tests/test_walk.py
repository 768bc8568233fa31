"""How many own files a reader needs for one prune and one recover; docs/walk.md lists them."""

import re
from pathlib import Path

import walk

PAGE = Path(__file__).parents[1] / "docs" / "walk.md"
MOST = {"prune": 64, "recover": 57}
"""Files that a run may enter; the aim is 70."""


def test_the_page_lists_the_files_of_a_run(tmp_path: Path) -> None:
    found = walk.walks(tmp_path)
    for verb, part in zip(found, PAGE.read_text("utf-8").split("\n## ")[1:], strict=True):
        assert set(found[verb]) == set(re.findall(r"^\| `(.+\.py)` \|", part, re.MULTILINE)), "see tests/walk.py"
        assert len(found[verb]) <= MOST[verb]
