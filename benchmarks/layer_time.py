"""How near to its matrix products does the default solver run, and what would that mean for large models?

Times one decoder layer's operator groups on any device, phase by phase, beside what the products alone cost at the rate
that the same machine reaches on the same shapes in the same run. Then extrapolates to 7B, 70B and 405B shapes from
those rates: products by their count of operations, factorisations by n^3, everything else by its measured share.

    python benchmarks/layer_time.py
    python benchmarks/layer_time.py --device cuda --hidden 4096 --intermediate 14336 --kv 1024
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fistapruner.core import LayerProblem, Ridge, Stacked
from fistapruner.core.constraints import stack
from fistapruner.core.linalg import fast_products, has_bf16_units
from fistapruner.runtime.machine import describe_machine
from fistapruner.solvers.proximal import REFIT, Proximal, obs_scale
from fistapruner.solvers.refit import refit_cg
from fistapruner.solvers.splitting import resolvents, scaled

MODELS = {
    "LLaMA-2-7B": (32, 4096, 4096, 11008),
    "LLaMA-3-70B": (80, 8192, 1024, 28672),
    "LLaMA-3.1-405B": (126, 16384, 1024, 53248),
}  # decoder layers, hidden, key/value width, intermediate


def groups(hidden: int, kv: int, intermediate: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Rows of the stacked operators and inputs of each group of a Llama decoder layer."""
    return {
        "q+k+v": ((hidden, kv, kv), hidden),
        "o": ((hidden,), hidden),
        "gate+up": ((intermediate, intermediate), hidden),
        "down": ((hidden,), intermediate),
    }


def problem_of(rows: int, n: int, device: str, seed: int = 0) -> LayerProblem:
    """Random weights on a Gram with a power-law spectrum and one massive direction, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    tokens = min(4 * n, 8192)
    inputs = (
        torch.randn(tokens, n, generator=generator) * torch.logspace(0.5, -1, n)[torch.randperm(n, generator=generator)]
    )
    inputs += 3 * torch.randn(tokens, 1, generator=generator) * torch.randn(n, generator=generator)
    inputs = inputs.to(device)
    weight = torch.randn(rows, n, generator=generator).to(device)
    return LayerProblem(weight, inputs.T @ inputs / tokens, tokens=tokens)


def solved(method: Proximal, problem: LayerProblem, constraints: Stacked) -> None:
    """Solve the operators of a group one by one; what depends on their Gram is computed once."""
    problem = replace(problem, cache={})
    for _, rows, constraint in constraints.parts():
        method.solve(problem.slice(rows), constraint)


def setting(device: str) -> str:
    """Name what times depend on: device, threads and the release of torch."""
    machine = describe_machine(torch.device(device))
    return f"{machine.device_name or machine.cpu}, {machine.threads} thread(s), torch {torch.__version__}"


def seconds(action: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Best of a few repeats, after one to warm up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        action()
        _wait(device)
        if repeat:
            best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def product_rate(m: int, n: int, k: int, device: str, fast: bool = True) -> float:
    """FLOP/s of an (m, k) by (k, n) product: of bf16 tensors where there are units for them and ``fast``, else of fp32
    ones."""
    half = fast and has_bf16_units(torch.device(device))
    dtype = torch.bfloat16 if half else torch.float32
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)

    def multiply() -> Tensor:
        with fast_products(fast):
            return torch.mm(a, b, out=out)

    return 2.0 * m * n * k / seconds(multiply, device, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--kv", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="calibration tokens of the extrapolation")
    arguments = parser.parse_args()
    device, method, pattern = arguments.device, Proximal(), arguments.sparsity
    products, steps = method.levels * method.steps, method.levels * method.steps + sum(REFIT) + 2

    print(f"{setting(device)}; {pattern}, best of 3 after one to warm up")
    columns = zip(
        ("solve s", "metric", "eigen", "iterate", "mask", "refit", "products s", "share", "TFLOP/s"),
        (9, 8, 8, 9, 8, 8, 12, 7, 9),
        strict=True,
    )
    print(f"{'group':<10}" + "".join(f"{title:>{width}}" for title, width in columns))
    total = limit = factor_total = rest_total = 0.0
    work = cubes = 0.0
    for name, (rows, n) in groups(arguments.hidden, arguments.kv, arguments.intermediate).items():
        problem = problem_of(sum(rows), n, device)
        m, patterns = problem.shape[0], stack(pattern, rows)
        solve = seconds(lambda p=problem, s=patterns: solved(method, p, s), device)  # type: ignore[misc]
        centre, gram, _ = problem.regularised(Ridge(mean=method.damping, sampling=method.shrinkage))
        scale, _ = obs_scale(gram, name)
        scores = (centre * scale).abs()
        mask = patterns.project(scores)
        metric = seconds(lambda g=gram, t=name: obs_scale(g, t), device)  # type: ignore[misc]
        eigen = seconds(lambda g=gram, s=scale: resolvents(scaled(g, s), fast=True), device)  # type: ignore[misc]
        exact = seconds(lambda v=scores, s=patterns: s.project(v), device)  # type: ignore[misc]

        def fitted(centre: Tensor = centre, gram: Tensor = gram, mask: Tensor = mask) -> None:
            weight = centre
            for count in REFIT:
                weight = refit_cg(centre, gram, weight, mask, count, fast=True)

        refit = seconds(fitted, device)
        rate, square = product_rate(m, n, n, device), product_rate(n, n, n, device)
        flops = 2.0 * m * n * n * steps + 2.0 * n**3 * method.levels
        alone = 2.0 * m * n * n * steps / rate + 2.0 * n**3 * method.levels / square
        iterate = solve - metric - eigen - exact - refit
        print(
            f"{name:<10}{solve:>9.3f}{metric:>8.3f}{eigen:>8.3f}{iterate:>9.3f}{exact:>8.3f}{refit:>8.3f}{alone:>12.3f}"
            f"{alone / solve:>7.2f}{flops / solve / 1e12:>9.2f}",
            flush=True,
        )
        total, limit, work, cubes = total + solve, limit + alone, work + flops, cubes + float(n) ** 3
        factor_total += metric + eigen
        rest_total += solve - metric - eigen - alone
    print(f"{'layer':<10}{total:>9.3f}{'':>41}{limit:>12.3f}{limit / total:>7.2f}{work / total / 1e12:>9.2f}")

    size = 2048 if device == "cpu" else 8192
    fast, full = product_rate(size, size, size, device), product_rate(size, size, size, device, fast=False)
    print(f"\nProducts of {size} x {size}: {fast / 1e12:.2f} TFLOP/s low precision, {full / 1e12:.2f} TFLOP/s fp32")
    print(
        f"Extrapolated to {arguments.tokens} tokens: products at these rates, other work of an iteration in its "
        "measured proportion"
    )
    overhead = max(rest_total / limit, 0.0)
    print(f"{'model':<16}{'forward h':>10}{'Grams h':>9}{'iterate h':>10}{'factor h':>10}{'total h':>9}")
    for name, (layers, hidden, kv, intermediate) in MODELS.items():
        shapes = groups(hidden, kv, intermediate).values()
        weights = sum(sum(rows) * n for rows, n in shapes)
        # One dense pass, one pass with pruned operators (each group's capture continues where the last one stopped),
        # outputs.
        forward = layers * 2 * 2.0 * weights * arguments.tokens / fast
        grams = layers * sum(2.0 * n * n * arguments.tokens for _, n in shapes) / fast
        iterate = (
            layers
            * sum(2.0 * sum(rows) * n * n * steps + 2.0 * n**3 * method.levels for rows, n in shapes)
            / fast
            * (1 + overhead)
        )
        factor = layers * sum(n**3 for _, n in shapes) * factor_total / cubes
        hours = [t / 3600 for t in (forward, grams, iterate, factor)]
        print(f"{name:<16}{hours[0]:>10.2f} {hours[1]:>8.2f} {hours[2]:>9.2f} {hours[3]:>9.2f} {sum(hours):>8.2f}")
    print(f"({products} iterations, {sum(REFIT)} refit steps; reading and writing the checkpoint come on top)")


if __name__ == "__main__":
    main()
