"""Does SO-EBM decide better for a workload than simpler rules? Synthetic workloads with a known distribution.

A model of 12 blocks serves 3 tasks, whose error curves are exponential. Tolerances depend on 4 features, with noise of
three kinds: Gaussian; a switch (a quarter of the deployments stand 0.35 less, which no feature tells); skewed. Each
draw has 50 deployments to learn from and 400 to test. Regret is the mean cost above that of the best allocation in
hindsight, in units of the mean loss at uniform sparsity. No model is pruned.

Rules: uniform sparsity; the allocation for the known mix; least mean cost over the history; the Gaussian forecast by
maximum likelihood, then least expected cost; the same forecast learnt on by SO-EBM, as ``--allocation workload:FILE``.

    python benchmarks/workload_allocation.py
    python benchmarks/workload_allocation.py --draws 5 --noise switch
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import Tensor

from fistapruner.allocate.allocate import ZerosBudget
from fistapruner.allocate.curves import sparsity_grid
from fistapruner.papers.so_ebm import Costs, decisions, learn
from fistapruner.runtime.numerics import seeded
from fistapruner.runtime.show import counted

BLOCKS, TASKS, FEATURES = 12, 3, 4
LEARN, TEST = 50, 400
NOISE = ("gaussian", "switch", "skewed")


def draw_workload(noise: str, seed: int) -> tuple[Costs, Tensor, Tensor]:
    """Draw the costs of decisions, and (deployments, features) and (deployments, tasks) tolerances."""
    generator = seeded(seed, "workload", noise)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    grid = torch.tensor(sparsity_grid(0.5), dtype=torch.float64)
    levels, rates = (0.7 * normal(TASKS, BLOCKS)).exp(), 5 + 2 * normal(TASKS, BLOCKS).abs()
    levels /= levels.sum(1, keepdim=True)
    curves = [
        {f"block {block}": levels[task, block] * (rates[task, block] * (grid - 0.5)).exp() for block in range(BLOCKS)}
        for task in range(TASKS)
    ]
    mix = torch.full((TASKS,), 1 / TASKS, dtype=torch.float64)
    _, losses = decisions(ZerosBudget({f"block {block}": 10_000 for block in range(BLOCKS)}, 0.5), curves, mix)
    rows = LEARN + TEST
    features, turn = normal(rows, FEATURES), normal(FEATURES, TASKS) / math.sqrt(FEATURES)
    tolerances = 1 + 0.25 * torch.tanh(features @ turn)
    shape = rows, TASKS
    if noise == "gaussian":
        tolerances += 0.12 * normal(*shape)
    elif noise == "switch":
        off = (torch.rand(rows, 1, generator=generator) < 0.25).double()
        tolerances += 0.05 * normal(*shape) - 0.35 * off
    else:
        tolerances += 0.15 * (1 - (0.8 * normal(*shape)).exp())
    return Costs(losses / float(losses[0] @ mix), mix), features, tolerances.clamp_min(0.05)


def regrets(noise: str, seed: int) -> dict[str, float]:
    """Mean regret of every rule on the test deployments of one draw."""
    costs, features, tolerances = draw_workload(noise, seed)
    known = costs.known(tolerances)
    decided = {"uniform": 0, "mix": 1, "sample average": int(known[:LEARN].mean(0).argmin())}
    found = {rule: known[LEARN:, number] for rule, number in decided.items()}
    two_stage, so_ebm = learn(features[:LEARN], tolerances[:LEARN], costs, seed)
    with torch.no_grad():
        for rule, forecast in (("two-stage", two_stage), ("so-ebm", so_ebm)):
            chosen = costs.expected(*forecast(features[LEARN:])).argmin(1, keepdim=True)
            found[rule] = known[LEARN:].gather(1, chosen)[:, 0]
    return {rule: float((paid - known[LEARN:].min(1).values).mean()) for rule, paid in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20, help="of each kind of noise (default: %(default)s)")
    parser.add_argument("--noise", default=",".join(NOISE), help="kinds of noise (default: %(default)s)")
    arguments = parser.parse_args()
    kinds = arguments.noise.split(",")
    if arguments.draws < 1:
        parser.error(f"--draws {arguments.draws}: at least 1 is expected")
    if unknown := set(kinds) - set(NOISE):
        parser.error(f"--noise {min(unknown)!r} is not known: {', '.join(NOISE)}")
    torch.set_num_threads(1)
    begin = time.perf_counter()
    found = {kind: [regrets(kind, seed) for seed in range(arguments.draws)] for kind in kinds}
    how = "mean ± standard error over" if arguments.draws > 1 else "with"
    print(
        f"Regret, {how} {counted(arguments.draws, 'draw')} of {LEARN} deployments to learn from, {TEST} to test; the "
        f"last row is paired; {time.perf_counter() - begin:.0f} s on one thread\n"
    )
    print(f"| rule | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for rule in found[kinds[0]][0]:
        print(f"| {rule} | {' | '.join(mean_with_error([draw[rule] for draw in found[kind]]) for kind in kinds)} |")
    pairs = [mean_with_error([draw["so-ebm"] - draw["two-stage"] for draw in found[kind]]) for kind in kinds]
    print(f"| so-ebm − two-stage | {' | '.join(pairs)} |")


def mean_with_error(values: list[float]) -> str:
    """Write a mean with its standard error, which one value does not have."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


if __name__ == "__main__":
    main()
