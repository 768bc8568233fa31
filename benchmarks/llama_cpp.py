"""How fast is llama.cpp on a smaller or quantised model, against the dense one? Needs the extra ``bench``.

    fistapruner export runs/small small.gguf
    python benchmarks/llama_cpp.py dense.gguf small.gguf small-q8.gguf --threads 2

Every file is loaded once, in a process of its own. In every round each model in turn reads the same random prompt anew
and writes tokens, one sequence at a time; the times are llama.cpp's own. The table has medians over rounds and ratios
to the first file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fistapruner.measure import speed as variants


def compare(
    files: Sequence[Path], threads: int, rounds: int, read: int = 400, write: int = 64
) -> list[tuple[float, float]]:
    """Return the tokens per second of reading and of writing of each file: medians over interleaved rounds."""
    models = [variants.Variant(str(path), path) for path in files]
    speeds = variants.compare(models, prompt=read, tokens=write, runs=rounds, threads=threads)
    return [(read / speed.first_token, speed.tokens_per_second) for speed in speeds]


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
    if find_spec("xllamacpp") is None:
        parser.error("the package xllamacpp is not installed: pip install '.[bench]'")
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
