"""When should a user quantise instead of prune? Quality, bytes and speed of both, on one machine and one text.

    llama-quantize dense.gguf dense-Q4_K_M.gguf Q4_K_M      # llama.cpp's own program makes the quantised files
    python benchmarks/beside_quantisation.py rows.json --dense dense.gguf --gguf dense-*.gguf --runs runs/50 runs/24 \\
        --openvino --data wikitext2 --windows 60 --threads 2
    python benchmarks/beside_quantisation.py rows.json --picture picture.png

Every quantised file, every run's checkpoint, in bf16 and packed with int8 values, and with ``--openvino`` the dense
model with int8 and with int4 weights, is one row. Quality is that of the weights: all rows are evaluated by
``fistapruner evaluate`` against the dense model, on the same windows, the quantised ones with their weights expanded to
bf16. Speed is that of one sequence, tokens written a second: ``llama-bench`` for GGUF files,
``fistapruner bench`` for packed models, OpenVINO (``pip install openvino``) called from torch. A row that is in
``rows.json`` is measured only once; ``--quality`` and ``--speed`` measure one of both. Every row keeps the settings
that it was measured with; others are not measured beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fistapruner
from fistapruner.measure.speed import WARM_UP_TOKENS, bench, prompts, time_generation
from fistapruner.models.source import resolve_model
from fistapruner.packed.pack import pack, unpack
from fistapruner.runtime.files import write_json_atomic
from fistapruner.runtime.machine import describe_machine, versions

LLAMA_CPP, PACKED, OPENVINO = "llama.cpp", "fistapruner, packed", "OpenVINO"
"""Engines, as the table calls them."""

FIGURES = {"quality": "kl", "speed": "tokens_per_second"}
"""What is measured, and the figure that a measured row has."""


def rows_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is to be measured: name, kind, path."""
    for path in (arguments.dense, *arguments.gguf):
        row = {"name": str(path.with_suffix("")), "kind": "gguf", "engine": LLAMA_CPP, "path": str(path.resolve())}
        yield {**row, "bytes": path.stat().st_size}
    for run in arguments.runs:
        for values in ("bf16", "int8"):
            path = str(run.resolve() / "model")
            yield {"name": f"{run}, {values}", "kind": values, "engine": PACKED, "path": path}
    for bits in (8, 4) if arguments.openvino else ():
        name, path = f"{arguments.dense.with_suffix('')}, int{bits}", str(arguments.dense.resolve())
        yield {"name": name, "kind": "openvino", "engine": OPENVINO, "path": path, "bits": bits}


def key_of(row: dict[str, Any]) -> tuple[str, str, int | None]:
    """Return what tells a row from all others."""
    return row["path"], row["kind"], row.get("bits")


def settings_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings that figures of quality and of speed depend on."""
    machine = describe_machine(torch.device("cpu"))
    return {
        "quality": {
            "data": arguments.data,
            "windows": arguments.windows,
            "seqlen": arguments.seqlen,
            "dense": str(arguments.dense.resolve()),
        },
        "speed": {
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "cpu": machine.cpu,
            "cores": machine.cores,
            "torch": versions()["torch"],
        },
    }


def in_words(settings: dict[str, Any] | None) -> str:
    """Write settings as a line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items()) if settings else "unknown settings"


def refuse_others(rows: Iterable[dict[str, Any]], what: str, settings: dict[str, Any], file: Path) -> None:
    """Stop where a row was measured with other settings."""
    for row in rows:
        found = row.get(f"{what} settings")
        if FIGURES[what] in row and found != settings:
            raise SystemExit(
                f"{file}: {what} of {row['name']} was measured with {in_words(found)}, not with {in_words(settings)}; "
                "give the same settings, or another file"
            )


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


def speeds(rows: list[dict[str, Any]], settings: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Measure the tokens per second of all rows that have none, one engine after the other; save them as they come."""

    def note(row: dict[str, Any], tokens_per_second: float) -> None:
        row.update({"tokens_per_second": tokens_per_second, "speed settings": settings})
        write_json_atomic(arguments.rows, rows)

    files = [row for row in rows if row["kind"] == "gguf" and "tokens_per_second" not in row]
    if files:
        from llama_cpp import compare  # beside this file

        found = compare([Path(row["path"]) for row in files], arguments.threads, arguments.rounds)
        for row, (_, written) in zip(files, found, strict=True):
            note(row, written)
    for row in rows:
        if row["kind"] == "openvino" and "tokens_per_second" not in row:
            from openvino_model import OpenVinoLlama

            dense = dense_model(row["path"])
            engine, ids = OpenVinoLlama(dense, bits=row["bits"], threads=arguments.threads), prompts(dense, 1, 128, 0)
            time_generation(engine, ids, WARM_UP_TOKENS)
            runs = [time_generation(engine, ids, 64).tokens_per_second for _ in range(arguments.rounds)]
            note(row, median(runs))
    ours = [row for row in rows if row["engine"] == PACKED]
    for model in dict.fromkeys(row["path"] for row in ours if "tokens_per_second" not in row):
        measured = {speed.variant: speed for speed in bench(model, threads=arguments.threads, runs=arguments.rounds)}
        for row in ours:
            if row["path"] == model:
                speed = measured["packed" if row["kind"] == "bf16" else "packed int8"]
                row["dense_tokens_per_second"] = max(
                    measured[f"dense {kind}"].tokens_per_second for kind in ("bfloat16", "float32")
                )
                note(row, speed.tokens_per_second)


def table(rows: list[dict[str, Any]]) -> str:
    """Write the settings and the rows as Markdown, the best quality first."""
    used = (
        f"{what}: {in_words(row.get(f'{what} settings'))}"
        for what, figure in FIGURES.items()
        for row in rows
        if figure in row
    )
    lines = [
        *dict.fromkeys(used),
        "",
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

    rows = [row for row in rows if row.get("kl", 0) > 0]
    titles = (("bytes", 2**20, "size of the weights, MiB"), ("tokens_per_second", 1, "tokens per second, one sequence"))
    drawn = [title for title in titles if any(title[0] in row for row in rows)]
    if not drawn:
        raise SystemExit(f"{path}: nothing to draw, no row has a quality; measure without --speed first")
    figure, (axes,) = plt.subplots(1, len(drawn), figsize=(6 * len(drawn), 5), sharey=True, squeeze=False)
    for axis, (key, unit, title) in zip(axes, drawn, strict=True):
        largest = max(row[key] for row in rows if key in row)
        for engine, mark in ((LLAMA_CPP, "o"), (PACKED, "s"), (OPENVINO, "^")):
            shown = [row for row in rows if row["engine"] == engine and key in row]
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


def measure(rows: dict[tuple[str, str, int | None], dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Measure what ``rows`` lacks, and save it as it comes."""
    settings = settings_of(arguments)
    wanted = [what for what, left_out in (("quality", arguments.speed), ("speed", arguments.quality)) if not left_out]
    for what in wanted:
        refuse_others(rows.values(), what, settings[what], arguments.rows)
    for row in rows_of(arguments):
        rows.setdefault(key_of(row), row)
    lacking = {(what, row["kind"]) for what in wanted for row in rows.values() if FIGURES[what] not in row}
    if ("speed", "gguf") in lacking and shutil.which("llama-bench") is None:
        raise SystemExit("llama-bench is not on the PATH: it comes with llama.cpp")
    if any((what, "openvino") in lacking for what in wanted) and find_spec("openvino") is None:
        raise SystemExit("the package openvino is not installed: pip install openvino")
    dense = rows[str(arguments.dense.resolve()), "gguf", None]
    for row in rows.values() if "quality" in wanted else ():
        if row is not dense and "kl" not in row:
            noted = {"quality settings": settings["quality"]}
            row.update({**quality(row, arguments), **noted})
            dense.update({"perplexity": row["reference"], "gap": 0.0, "kl": 0.0, **noted})
            write_json_atomic(arguments.rows, list(rows.values()))
    if "speed" in wanted:
        speeds(list(rows.values()), settings["speed"], arguments)


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
    rows = {key_of(row): row for row in known}
    if arguments.dense is not None:
        measure(rows, arguments)
    print(table(list(rows.values())))
    if arguments.picture is not None:
        draw(list(rows.values()), arguments.picture)


if __name__ == "__main__":
    main()
