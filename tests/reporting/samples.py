"""Made-up reports: every part filled, so that every part of a page is drawn. The numbers are nobody's measurements."""

import math
from dataclasses import asdict
from typing import Any

from fistapruner.runs.records import Comparison, Divergence, Evaluation, Perplexity, Report, TaskResult, parse

OPERATORS = (
    ("self_attn.q_proj", (64, 64), 0.6),
    ("self_attn.k_proj", (32, 64), 0.5),
    ("self_attn.v_proj", (32, 64), 1.0),
    ("self_attn.o_proj", (64, 64), 0.9),
    ("mlp.gate_proj", (192, 64), 1.0),
    ("mlp.up_proj", (192, 64), 1.1),
    ("mlp.down_proj", (64, 192), 2.2),
)


def perplexity(value: float, data: str = "wikitext2") -> Perplexity:
    nll = math.log(value)
    windows = tuple(nll + 0.15 * math.sin(window) + 0.01 * math.sin(value * window) for window in range(60))
    sizes = (1024, 60, 60 * 1023)
    return Perplexity(
        data, "test", *sizes, "bfloat16", value, value * 0.02, nll, 0.02, "none", data.ljust(64, "0"), windows
    )


def layer(index: int) -> dict[str, Any]:
    """A layer entry; layer 1 stands out."""
    operators = []
    for name, shape, factor in OPERATORS:
        error = 0.02 * factor * (1 + 0.4 * math.sin(index)) * (4 if index == 1 else 1)
        steps: list[dict[str, Any]] = [
            {"method": "sparsegpt", "relative_error": 1.2 * error, "seconds": 0.2},
            {"method": "fista", "relative_error": error, "seconds": 0.9},
        ]
        pattern = {"name": name, "shape": shape, "sparsity": "50%", "zeros": math.prod(shape) // 2}
        operators.append({**pattern, "relative_error": error, "steps": steps})
    return {
        "index": index,
        "name": f"model.layers.{index}",
        "seconds": {"capture": 2.0, "gram": 0.6, "solve": 3.0 + index % 3, "io": 0.1},
        "relative_error": 0.02,
        "relative_error_of": "as a share of what the layer adds",
        "operators": operators,
        "finished": "2026-01-01T10:05:00+00:00",
    }


def speed(variant: str, rate: float) -> dict[str, Any]:
    rates = {"tokens_per_second": rate, "tokens_per_second_range": [0.95 * rate, 1.04 * rate], "first_token": 0.2}
    return {"variant": variant, **rates, "runs": 5, "peak_memory": 900 * 2**20, "file_size": 250 * 2**20}


def report(layers: int = 12) -> Report:
    """A finished run."""
    tasks = (
        TaskResult("arc_easy", "acc", 2376, 0.52, 0.0102, 0.58, 0.0101, 210, 68, 1e-9, 0, "local file"),
        TaskResult("piqa", "acc", 1838, 0.655, 0.011, 0.668, 0.011, 120, 98, 0.15, 0, "local file"),
    )
    damage = Divergence(0.71, 0.02, 0.62, 0.004, 0.608, 0.01)
    evaluations = [
        Evaluation("run/model", "small", perplexity(46.53), perplexity(25.32), damage, tasks, 100.0),
        Evaluation("run/model", "small", perplexity(17.4, "python"), perplexity(12.3, "python"), damage),
    ]
    machine = {"cpu": "a processor", "instructions": ["avx2"], "cores": 2, "threads": 2, "memory": 2**34}
    model = {"source": "small", "architecture": "LlamaForCausalLM", "layers": layers, "parameters": 134515008}
    text = {"source": "c4.jsonl", "how": "windows over the concatenation", "samples": 32, "seqlen": 1024}
    weights = layers * sum(math.prod(shape) for _, shape, _ in OPERATORS)
    totals = {
        **{"operator_weights": weights, "operator_zeros": weights // 2, "model_weights": 2 * weights},
        **{"model_zeros": weights // 2, "seconds": 412.0, "peak_memory": 1900 * 2**20, "checkpoint_bytes": 269_000_000},
        "time_split": {"capture": 75.0, "gram": 20.0, "solve": 105.0, "io": 4.0},
    }
    tasks_of_work = {
        "chat": {"weight": 0.7, "uniform": 0.41, "predicted": 0.33},
        "code": {"weight": 0.3, "uniform": 0.62, "predicted": 0.55},
    }
    data = {
        "version": 1,
        "status": "finished",
        "command": "fistapruner prune small --out runs/first --sparsity 50%",
        "started": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T10:08:00+00:00",
        "recipe": {"sparsity": "50%", "method": [{"sparsegpt": {}}, {"fista": {"penalty": "relative"}}], "seed": 0},
        "fingerprint": "0123456789abcdef",
        "versions": {"fistapruner": "0.1.0", "torch": "2.8.0"},
        "machine": {**machine, "system": "Linux"},
        "model": {**model, "dtype": "bfloat16"},
        "calibration": {**text, "tokens": 32768},
        "layers": [layer(index) for index in range(layers)],
        "totals": totals,
        "evaluations": [asdict(evaluation) for evaluation in evaluations],
        "speed": {"speeds": [speed("dense bfloat16", 20.0), speed("packed", 26.0)]},
        "generations": [{"prompt": "The capital of France is", "dense": " Paris.", "pruned": " Paris, the capital."}],
        "workload": {"fingerprint": "0123456789abcdef", "deployments": 120, "tasks": tasks_of_work},
        "warnings": ["model.layers.3.mlp.down_proj: damping was raised"],
    }
    return parse(Report, data, "sample")


def recovery(layers: int = 12, *, tasks: bool = False) -> Report:
    """A finished recovery run of the run that :func:`report` is of."""
    pruned = report(layers)
    data = pruned.model_dump(mode="json")
    for layer in data["layers"]:
        for place, operator in enumerate(layer["operators"]):
            kept = {key: operator[key] for key in ("name", "shape", "sparsity", "zeros")}
            change = 0.004 * (1 + place) * (1 + 0.3 * math.sin(layer["index"]))
            layer["operators"][place] = {**kept, "change": change, "changed": math.prod(operator["shape"]) // 2}
        for key in ("seconds", "relative_error", "relative_error_of"):
            del layer[key]
    texts = {"sql": "texts/sql.jsonl", "chat": "texts/chat.jsonl"} if tasks else {"c4.jsonl": "c4.jsonl"}
    side = {"documents": 300, "windows": 120, "tokens": 122_880, "loss_tokens": 122_760}
    sides = {"trained": side, "held_out": {**side, "documents": 12, "windows": 5}}
    task = {"how": "whole examples, loss on the answers only", **sides}
    text = {
        "source": ", ".join(texts) if tasks else "/home/someone/c4.jsonl",
        "how": "documents joined by end-of-text tokens, windows that do not overlap",
        **{"samples": 250, "seqlen": 1024, "tokens": 256_000, "sha256": "cd" * 32},
        "tasks": {name: {"source": source, **task} for name, source in texts.items()},
    }
    checks = []
    for step in range(0, 61, 12):
        loss = 0.9 * math.exp(-step / 60) + 0.1 + (0.08 if step == 48 else 0)
        by_task = {name: loss + 0.1 * place for place, name in enumerate(texts)} if tasks else {}
        checks.append({"step": step, "held_out": loss, "kept": step != 48, "by_task": by_task})
    trained = {
        **{"lr": {"lowest": 0.0005, "highest": 0.002}, "trained": 2_551_808, "operators": 7 * layers, "steps": 60},
        **{"asked_steps": 60, "kept_step": 60, "tokens": 245_520, "windows": 240, "held_out_windows": 10},
        **{"documents": 600, "held_out_documents": 24, "changed": 0.998, "change": 0.03, "seconds": 300.0},
        "checks": checks,
        "curve": [[step, 0.95 * math.exp(-step / 60) + 0.1 + 0.05 * math.sin(7 * step)] for step in range(1, 61)],
        "before": [asdict(pruned.evaluations[0])],
    }
    after, dense = perplexity(31.9), perplexity(25.32)
    evaluation = Evaluation("run/model", "small", after, dense, Divergence(0.3, 0.01, 0.75, 0.004, 0.231, 0.01))
    form = {"parameters": "lora", "optimizer": "adamw", "loss": "kl"}
    recipe = {**form, "windows_per_step": 4, "seed": 0, "data": {"source": texts if tasks else text["source"]}}
    figures = {"tokens": 245_520, "operator_weights": 1000, "operator_zeros": 500, "perplexity": vars(after)}
    stage = {"settings": data["recipe"], "finished": data["finished"], "fingerprint": data["fingerprint"]}
    origin = {**data["model"], "source": "owner/small", "revision": "ab" * 20, "license": "apache-2.0"}
    stages = [{"kind": "prune", **stage}, {"kind": "recover", "settings": recipe, "figures": figures}]
    written = {"dense": " Paris.", "pruned": " a city, the city", "recovered": " Paris, the capital."}
    data |= {
        "kind": "recover",
        "workload": None,
        "command": "fistapruner recover runs/first --out runs/recovered",
        "recipe": recipe,
        "model": {**data["model"], "source": "runs/first"},
        "calibration": text,
        "recovery": {**form, **trained},
        "evaluations": [asdict(evaluation)],
        "generations": [{"prompt": "The capital of France is", **written}],
        "totals": {**data["totals"], "time_split": {"train": 300.0, "write": 12.0}},
        "lineage": {"source": origin, "stages": stages},
        "warnings": [],
    }
    return parse(Report, data, "sample")


def comparison() -> Comparison:
    """A finished comparison."""
    rows: list[dict[str, Any]] = []
    for method, gaps, seconds in (
        ("wanda", (0.8, 3.0, 1.9), 138.0),
        ("sparsegpt", (0.73, 2.5, 1.4), 142.0),
        ("alps", (0.6, 1.9, 1.1), 246.0),
    ):
        size = {"seconds": seconds, "peak_memory": 2 * 10**9, "operator_weights": 1000, "operator_zeros": 500}
        for sparsity, gap in zip(("50%", "70%", "2:4"), gaps, strict=True):
            for seed in (0, 1):
                found = {"gap": gap + 0.01 * seed, "perplexity": vars(perplexity(25.32 * math.exp(gap)))}
                row = {"method": method, "sparsity": sparsity, "seed": seed, "relative_error": gap / 15}
                rows.append({**row, **found, **size})
    rows.append({"method": "fista", "sparsity": "50%", "error": "out of memory"})
    data = {"version": 1, "kind": "compare", "status": "finished", "model": {"source": "small"}, "rows": rows}
    return parse(Comparison, {**data, "dense": vars(perplexity(25.32))}, "sample")
