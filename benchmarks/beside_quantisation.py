"""When should a user quantise instead of prune? Quality, bytes and speed of both, on one machine and one text.

    llama-quantize dense.gguf dense-Q4_K_M.gguf Q4_K_M      # llama.cpp's own program makes the quantised files
    python benchmarks/beside_quantisation.py rows.json --dense dense.gguf --gguf dense-*.gguf --runs runs/50 runs/24 \\
        --openvino --data wikitext2 --windows 60 --threads 2
    python benchmarks/beside_quantisation.py rows.json --picture picture.png

Every quantised file, every run's checkpoint, in bf16 and packed with int8 values, and with ``--openvino`` the dense
model with int8 and with int4 weights, is one row. Quality is that of the weights: all rows are evaluated by
``fistapruner evaluate`` against the dense model, on the same windows, the quantised ones with their weights expanded to
bf16. Speed is that of one sequence, tokens written a second: llama.cpp for GGUF files (needs ``pip install
xllamacpp``), ``fistapruner bench`` for packed models, OpenVINO (``pip install openvino``) called from torch. A row that
is in ``rows.json`` is measured only once; ``--quality`` and ``--speed`` measure one of both.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fistapruner
from fistapruner.models.source import resolve_model
from fistapruner.sparse.bench import bench
from fistapruner.sparse.pack import pack, unpack
from fistapruner.sparse.speed import WARM_UP_TOKENS, prompts, time_generation

LLAMA_CPP, PACKED, OPENVINO = "llama.cpp", "fistapruner, packed", "OpenVINO"
"""Engines, as the table calls them."""


def rows_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is to be measured: name, kind, path."""
    for path in (arguments.dense, *arguments.gguf):
        yield {"name": path.stem, "kind": "gguf", "engine": LLAMA_CPP, "path": str(path), "bytes": path.stat().st_size}
    for run in arguments.runs:
        for values in ("bf16", "int8"):
            yield {"name": f"{run.name}, {values}", "kind": values, "engine": PACKED, "path": str(run / "model")}
    for bits in (8, 4) if arguments.openvino else ():
        name, path = f"{arguments.dense.stem}, int{bits}", str(arguments.dense)
        yield {"name": name, "kind": "openvino", "engine": OPENVINO, "path": path, "bits": bits}


def dense_model(path: str) -> Any:
    """Load the dense model in bf16."""
    return AutoModelForCausalLM.from_pretrained(resolve_model(path), dtype=torch.bfloat16).eval()


def quality(row: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexity and divergence of the weights, and the bytes of a packed model."""
    with TemporaryDirectory() as scratch:
        model, found = row["path"], {}
        if row["kind"] == "openvino":
            from openvino_model import quantise  # beside this file; imports openvino

            dense = dense_model(row["path"])
            found["bytes"] = quantise(dense, row["bits"])
            model = str(Path(scratch) / "rounded")
            dense.save_pretrained(model)
            AutoTokenizer.from_pretrained(resolve_model(row["path"])).save_pretrained(model)
        elif row["kind"] in ("bf16", "int8"):
            folder = Path(scratch) / "packed"
            pack(model, folder, values="same" if row["kind"] == "bf16" else "int8")
            found["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            if row["kind"] == "int8":  # its values are rounded
                model = str(unpack(folder, Path(scratch) / "rounded"))
        measured = fistapruner.evaluate(
            model,
            arguments.data,
            against=str(arguments.dense),
            windows=arguments.windows,
            seqlen=arguments.seqlen,
            dtype="bfloat16",
        )
    perplexity, reference, divergence = measured.perplexity, measured.reference, measured.divergence
    assert perplexity is not None
    assert reference is not None
    assert divergence is not None
    return {
        **found,
        "perplexity": perplexity.perplexity,
        "reference": reference.perplexity,
        "gap": math.log(perplexity.perplexity / reference.perplexity),
        "kl": divergence.kl,
    }


def speeds(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Measure the tokens per second of all rows that have none, one engine after the other; save them as they come."""

    def save() -> None:
        arguments.rows.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")

    files = [row for row in rows if row["kind"] == "gguf" and "tokens_per_second" not in row]
    if files:
        from llama_cpp import compare  # beside this file; imports xllamacpp

        found = compare([Path(row["path"]) for row in files], arguments.threads, arguments.rounds)
        for row, (_, written) in zip(files, found, strict=True):
            row["tokens_per_second"] = written
        save()
    for row in rows:
        if row["kind"] == "openvino" and "tokens_per_second" not in row:
            from openvino_model import OpenVinoLlama

            dense = dense_model(row["path"])
            engine, ids = OpenVinoLlama(dense, bits=row["bits"], threads=arguments.threads), prompts(dense, 1, 128, 0)
            time_generation(engine, ids, WARM_UP_TOKENS)
            runs = [time_generation(engine, ids, 64).tokens_per_second for _ in range(arguments.rounds)]
            row["tokens_per_second"] = median(runs)
            save()
    ours = [row for row in rows if row["engine"] == PACKED]
    for model in dict.fromkeys(row["path"] for row in ours if "tokens_per_second" not in row):
        measured = {speed.variant: speed for speed in bench(model, threads=arguments.threads, runs=arguments.rounds)}
        for row in ours:
            if row["path"] == model:
                speed = measured["packed" if row["kind"] == "bf16" else "packed int8"]
                row["tokens_per_second"] = speed.tokens_per_second
                row["dense_tokens_per_second"] = max(
                    measured[f"dense {kind}"].tokens_per_second for kind in ("bfloat16", "float32")
                )
        save()


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as Markdown, the best quality first."""
    lines = [
        "| model | engine | MiB | perplexity | gap, nats | KL, nats | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row.get("kl", math.inf)):
        figures = [f"{row['bytes'] / 2**20:.0f}" if "bytes" in row else ""]
        for key, digits in (("perplexity", 2), ("gap", 3), ("kl", 4), ("tokens_per_second", 1)):
            figures.append(f"{row[key]:.{digits}f}" if key in row else "")
        lines.append(f"| {row['name']} | {row['engine']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss of quality against bytes, and against tokens per second."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    titles = (("bytes", 2**20, "size of the weights, MiB"), ("tokens_per_second", 1, "tokens per second, one sequence"))
    for axis, (key, unit, title) in zip(axes, titles, strict=True):
        largest = max(row[key] for row in rows if key in row and row.get("kl", 0) > 0)
        for engine, mark in ((LLAMA_CPP, "o"), (PACKED, "s"), (OPENVINO, "^")):
            shown = [row for row in rows if row["engine"] == engine and key in row and row.get("kl", 0) > 0]
            axis.scatter([row[key] / unit for row in shown], [row["kl"] for row in shown], marker=mark, label=engine)
            for row in shown:
                x, right = row[key] / unit, row[key] > 0.9 * largest  # where there is room
                axis.annotate(
                    row["name"],
                    (x, row["kl"]),
                    fontsize=7,
                    xytext=(-5 if right else 5, -9 if row["kind"] in ("bf16", "openvino") else 3),
                    textcoords="offset points",
                    ha="right" if right else "left",
                )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL from the dense model, nats a token (log; lower is better)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON file that the rows are kept in")
    parser.add_argument("--dense", type=Path, help="the dense model as a GGUF file in bf16")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="quantised GGUF files of it")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run directories of the pruned models")
    parser.add_argument("--openvino", action="store_true", help="the dense model in int8 and int4 by OpenVINO")
    parser.add_argument("--data", default="wikitext2", help="text, as for fistapruner evaluate")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", action="store_true", help="measure no speed")
    parser.add_argument("--speed", action="store_true", help="measure no quality")
    parser.add_argument("--picture", type=Path, help="file of the picture")
    arguments = parser.parse_args()
    known = json.loads(arguments.rows.read_text("utf-8")) if arguments.rows.exists() else []
    rows = {row["name"]: row for row in known}
    if arguments.dense is not None:
        for row in rows_of(arguments):
            rows.setdefault(row["name"], row)
    for row in rows.values():
        if (
            arguments.dense is not None
            and not arguments.speed
            and "kl" not in row
            and row["name"] != arguments.dense.stem
        ):
            row.update(quality(row, arguments))
            arguments.rows.write_text(json.dumps(list(rows.values()), indent=2) + "\n", "utf-8")
            dense = rows[arguments.dense.stem]
            dense.update(perplexity=row["reference"], gap=0.0, kl=0.0)
    if arguments.dense is not None and not arguments.quality:
        speeds(list(rows.values()), arguments)
    print(table(list(rows.values())))
    if arguments.picture is not None:
        draw(list(rows.values()), arguments.picture)


if __name__ == "__main__":
    main()
