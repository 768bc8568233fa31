"""Write docs/walk.md: the own files that one prune and one recover enter, in order, and what each is for.

PYTHONPATH=tests python tests/walk.py > docs/walk.md
"""

import ast
import gc
import inspect
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import fistapruner
import tiny
from fistapruner.cli import main

PACKAGE = Path(fistapruner.__file__).parent

HEAD = """# The walk, file by file

The files of `src/fistapruner` whose functions one `prune` and one `recover` enter, in the order in which they are
entered first, and what each is for. `tests/walk.py` writes this page by running both on a tiny model.
"""


def entered(arguments: list[str]) -> list[str]:
    """Run a command, and list the own files whose functions it enters, in order.

    Args:
        arguments: of the command line.
    """
    seen: dict[str, None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:  # a function's, no module's and no class's
            path = code.co_filename
            if path.startswith(f"{PACKAGE}{os.sep}") and path.endswith(".py"):
                seen.setdefault(Path(path).relative_to(PACKAGE).as_posix())

    gc.collect()  # finalizers of what ran before are no step of a run
    sys.setprofile(profile)
    try:
        status = main(arguments)
    finally:
        sys.setprofile(None)
    assert status == 0
    return list(seen)


def walks(folder: Path) -> dict[str, list[str]]:
    """Prune and recover a tiny model; return the files that each verb enters.

    Each command runs twice, and the second time counts: what a first import does is no step of a run.
    """
    model = tiny.save("llama", folder / "model", num_hidden_layers=2)
    found: dict[str, list[str]] = {}
    for number, step in enumerate((main, entered)):
        run = folder / f"run-{number}"
        prune = ["prune", str(model), "--calibration", "python", "--samples", "2", "--seqlen", "16"]
        recover = ["recover", str(run), "--data", "python", "--set", "data.seqlen=16", "--tokens", "400"]
        for words, out in ((prune, run), (recover, folder / f"run-{number}-recovered")):
            found[words[0]] = step([*words, "--evaluate", "none", "--out", str(out), "--quiet"])
    return found


def page(found: dict[str, list[str]]) -> str:
    """Return docs/walk.md."""
    parts = [HEAD]
    for verb, files in found.items():
        parts.append(f"\n## `{verb}`: {len(files)} files\n\n| file | what it is for |\n|---|---|\n")
        for name in files:
            doc = ast.get_docstring(ast.parse((PACKAGE / name).read_text("utf-8"))) or ""
            parts.append(f"| `{name}` | {doc.splitlines()[0]} |\n")
    return "".join(parts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        with redirect_stdout(sys.stderr):
            steps = walks(Path(scratch))
        sys.stdout.write(page(steps))
