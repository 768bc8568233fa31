"""How fast is llama.cpp on a smaller or quantised model, against the dense one?

    fistapruner export runs/small small.gguf
    python benchmarks/llama_cpp.py dense.gguf small.gguf small-q8.gguf --threads 2

``llama-bench``, llama.cpp's own program, measures one file after the other, one sequence at a time. The table has means
over rounds and ratios to the first file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def compare(
    files: Sequence[Path], threads: int, rounds: int, read: int = 400, write: int = 64
) -> list[tuple[float, float]]:
    """Return the tokens per second of reading and of writing of each file: means over rounds."""
    found = []
    for path in files:
        numbers = {"-t": threads, "-r": rounds, "-p": read, "-n": write}
        options = [str(part) for pair in numbers.items() for part in pair]
        command = ["llama-bench", "-m", str(path), *options, "-o", "json"]
        rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rates = {row["n_gen"] > 0: row["avg_ts"] for row in rows}
        found.append((rates[False], rates[True]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="GGUF files; the first one is the dense model"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--read", type=int, default=400, help="tokens of a prompt")
    parser.add_argument("--write", type=int, default=64, help="tokens to write")
    arguments = parser.parse_args()
    if shutil.which("llama-bench") is None:
        parser.error("llama-bench is not on the PATH: it comes with llama.cpp")
    for path in arguments.files:
        if not path.is_file():
            parser.error(f"{path}: no such file")
    middle = compare(arguments.files, arguments.threads, arguments.rounds, arguments.read, arguments.write)
    print(f"{arguments.threads} threads, {arguments.rounds} rounds after one to warm up")
    print(f"{'file':32} {'MiB':>7} {'ratio':>6} {'read/s':>8} {'ratio':>6} {'write/s':>8} {'ratio':>6}")
    sizes = [path.stat().st_size / 2**20 for path in arguments.files]
    for path, mib, (read, write) in zip(arguments.files, sizes, middle, strict=True):
        row = [mib, mib / sizes[0], read, read / middle[0][0], write, write / middle[0][1]]
        print(
            f"{path.name[:32]:32} {row[0]:7.0f} {row[1]:6.2f} {row[2]:8.1f} {row[3]:6.2f} {row[4]:8.1f} {row[5]:6.2f}"
        )


if __name__ == "__main__":
    main()
