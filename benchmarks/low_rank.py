"""Does a low-rank part beside the zeros pay, which way of solving for it is best, and what do the same bytes buy else?

Operators of a real model on their real Grams are pruned to a sparse plus a low-rank part in several ways, at equal
pattern and rank. Printed are the relative error of the outputs as a share of that of the zeros alone, by the default
solver, and the CPU seconds as a multiple of its seconds, all of one run. The Gram is taken as exact; --held-out judges
the weights on the Gram of other text instead, with the shrinkage that a run has.

    python benchmarks/low_rank.py
    python benchmarks/low_rank.py --layers 14 --operators o_proj,down_proj --ranks 16 --held-out
    python benchmarks/low_rank.py --synthetic 576x576,1536x576       # without a model: rows x inputs

Ways:

* once: the zeros first, then their best low-rank part.
* in turn N: both parts in turn from the zeros alone, N solutions of each (as OATS and HASSLE-free do).
* ours: ``--low-rank``.
* ours N: further solutions of both parts in turn after it.
* 3BASiL: the ADMM with three blocks of Makni et al. 2025 (arXiv 2603.01376), with the settings of its authors' program.
* same bytes: no low-rank part; the bytes of a 16-bit one (16 bits times rank times the sum of rows and inputs) buy what
  loses least of these: unstructured, more kept weights (16 bits each; the bit mask does not grow); 2:4, rows with 3:4
  (50 bits a group instead of 35), and then dense rows (64), those that lower the error most. Bits are those of
  docs/format.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import real_problems
import torch
from layer_time import problem_of
from torch import Tensor

from fistapruner import LayerProblem
from fistapruner.core import Constraint, Unstructured, parse_sparsity
from fistapruner.solvers import parse_method, solve
from fistapruner.solvers.low_rank import solve_low_rank

OPERATORS = "4.v_proj,14.q_proj,14.k_proj,14.o_proj"
BITS = {"2:4": 35, "3:4": 50, "dense": 64}
"""Of a group of four bf16 weights in the packed format."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real_problems.add_arguments(parser)
    parser.set_defaults(layers="4,14", samples=16)
    parser.add_argument("--synthetic", help="no model: operators of these shapes on Grams with a heavy spectrum")
    parser.add_argument(
        "--operators", default=OPERATORS, help="4.v_proj, or v_proj of every layer (default: %(default)s)"
    )
    parser.add_argument("--sparsity", default="50%,2:4")
    parser.add_argument("--ranks", default="8,16,32,64")
    parser.add_argument("--turns", default="3,10", help="solutions of the parts in turn (default: %(default)s)")
    parser.add_argument("--skip", default="", help="ways to leave out, such as 3BASiL, which takes longest")
    parser.add_argument("--held-out", action="store_true", help="judge on the Gram of the text's last third")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problems = load(arguments)
    judges = load(arguments, held_out=True) if arguments.held_out else problems
    if not arguments.held_out:
        problems = {name: replace(problem, tokens=None) for name, problem in problems.items()}
    solve(next(iter(problems.values())), "50%")  # warm up the thread pool and the product kernels
    turns = [int(count) for count in arguments.turns.split(",")]
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
    for text in arguments.sparsity.split(","):
        pattern = parse_sparsity(text)
        for name, problem in problems.items():
            judge = judges[name]
            zeros, alone = timed(lambda p=problem, c=pattern: solve(p, c).weight)  # type: ignore[misc]
            reference = judge.relative_error(zeros)
            for rank in map(int, arguments.ranks.split(",")):
                line = f"{name} {problem.shape[0]}x{problem.shape[1]} {text} rank {rank}, zeros alone {reference:.5f}:"
                for way, solver in ways(problem, pattern, rank, turns).items():
                    if way in arguments.skip.split(","):
                        continue
                    weight, seconds = timed(solver)
                    row = judge.relative_error(weight) / reference, seconds / alone
                    found[text, rank, way].append(row)
                    line += f" {way} {row[0]:.3f},"
                print(line.rstrip(","), flush=True)
    show(found, len(problems), arguments.threads)


def load(arguments: argparse.Namespace, *, held_out: bool = False) -> dict[str, LayerProblem]:
    """The wanted operators, one problem each."""
    if arguments.synthetic:
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.synthetic.split(",")]
        return {f"synthetic{i}": problem_of(m, n, "cpu", seed=i) for i, (m, n) in enumerate(shapes)}
    wanted = tuple(f".{name}" for name in arguments.operators.split(","))
    found = real_problems.load(arguments, held_out=held_out)
    return {name: problem for name, problem in found.items() if f".{name}".endswith(wanted)}


def ways(problem: LayerProblem, pattern: Constraint, rank: int, turns: list[int]) -> dict[str, Callable[[], Tensor]]:
    """Each way's function, which returns the weights (m, n)."""

    def ours() -> Tensor:
        sparse, part = solve_low_rank(problem, pattern, parse_method("proximal"), rank)
        return sparse.weight if part is None else sparse.weight + part.product()

    return {
        "once": lambda: in_turn(problem, pattern, rank, 1),
        **{f"in turn {count}": lambda count=count: in_turn(problem, pattern, rank, count) for count in turns},  # type: ignore[misc]
        "ours": ours,
        "3BASiL": lambda: three_block_admm(problem, pattern, rank),
        "same bytes": lambda: same_bytes(problem, pattern, rank),
    }


def timed(action: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result and the CPU seconds, which other work on the machine does not change much."""
    begin = time.process_time()
    result = action()
    return result, time.process_time() - begin


def whitening(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Gram H and C with H = C C^T, from its eigenvectors."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    values, vectors = torch.linalg.eigh(damped)
    return damped, vectors * values.clamp_min(0.0).sqrt()


def best_low_rank(wanted: Tensor, root: Tensor, rank: int) -> Tensor:
    """The matrix of a rank that is nearest to ``wanted`` in outputs, by an exact decomposition."""
    scaled = wanted @ root
    left = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
    return left @ (left.T @ wanted)


def in_turn(problem: LayerProblem, pattern: Constraint, rank: int, count: int) -> Tensor:
    """Both parts in turn, from the zeros alone."""
    _, root = whitening(problem.gram, 0.001)
    low_rank = torch.zeros_like(problem.weight)
    sparse = low_rank
    for _ in range(count):
        sparse = solve(replace(problem, weight=problem.weight - low_rank), pattern).weight
        low_rank = best_low_rank(problem.weight - sparse, root, rank)
    return sparse + low_rank


def three_block_admm(
    problem: LayerProblem, pattern: Constraint, rank: int, *, rho: float = 0.1, iterations: int = 2000
) -> Tensor:
    """3BASiL: a dense part A, its sparse copy D and the low-rank part L, one after the other, with a growing penalty.

    In coordinates in which the damped Gram has a unit diagonal, with U the dual of ``A = D``:

        A = ((W - L) H - U + rho D) (H + rho I)^-1;   D = P(A + U / rho);   U = U + rho (A - D);

    and L is the best of its rank beside A, by a randomised decomposition. Every tenth step rho grows by a factor of
    1.1, 1.05 or 1.02 if more than 10 % or 0.5 % of the support or less of it has changed. It ends when the support
    stays the same, or changes by less than 0.03 % after 100 steps. If the support stays the same at first, rho falls
    to a fifth. The sparse part is the projection of the last A. Returned is the sum of both parts.
    """
    torch.manual_seed(0)
    gram, root = whitening(problem.gram, 0.01)
    scale = gram.diagonal().sqrt()
    scaled = gram / scale / scale[:, None]
    values, vectors = torch.linalg.eigh(scaled.double())

    def inverse(rho: float) -> Tensor:
        return ((vectors / (values + rho)) @ vectors.T).float()

    dense = problem.weight * scale
    first = support = pattern.project(dense.abs())
    low_rank, dual, sparse = torch.zeros_like(dense), torch.zeros_like(dense), dense * first
    kept, moved, matrix = int(first.sum()), False, inverse(rho)
    smooth = dense
    for iteration in range(1, iterations + 1):
        smooth = ((dense - low_rank * scale) @ scaled - dual + rho * sparse) @ matrix
        proposal = smooth + dual / rho
        mask = pattern.project(proposal.abs())
        sparse = proposal * mask
        dual = dual + rho * (smooth - sparse)
        wanted = problem.weight - smooth / scale
        left = torch.svd_lowrank(wanted @ root, rank + 5)[0][:, :rank]
        low_rank = left @ (left.T @ wanted)
        if iteration % 10:
            continue
        change = int(torch.count_nonzero(mask != support))
        support = mask
        if change > 0.1 * kept:
            moved, rho = True, rho * 1.1
        elif change > 0.005 * kept:
            moved, rho = True, rho * 1.05
        elif change and moved:
            rho *= 1.02
        elif change:
            rho, sparse, dual = rho / 5, dense * first, torch.zeros_like(dense)
        elif moved:
            break
        else:
            rho /= 5
        if iteration >= 100 and change < 3e-4 * kept:
            break
        matrix = inverse(rho)
    return smooth * pattern.project(smooth.abs()) / scale + low_rank


def same_bytes(problem: LayerProblem, pattern: Constraint, rank: int) -> Tensor:
    """The bytes of the low-rank part as a milder pattern."""
    m, n = problem.shape
    bits = 16 * rank * (m + n)
    if isinstance(pattern, Unstructured):
        zeros = pattern.zeros(m, n) - bits // 16
        return solve(problem, f"{zeros / (m * n):.8f}").weight if zeros > 0 else problem.weight
    if str(pattern) != "2:4":
        raise SystemExit(f"pattern {pattern}: the same bytes are counted for unstructured sparsity and 2:4 only")
    weight = solve(problem, pattern).weight
    ladder = [(solve(problem, "3:4").weight, BITS["3:4"] - BITS["2:4"]), (problem.weight, BITS["dense"] - BITS["3:4"])]
    for milder, more in ladder:  # rows do not depend on each other
        count = min(m, bits // (more * n // 4))
        rows = (problem.row_errors(weight) - problem.row_errors(milder)).topk(count).indices
        weight[rows] = milder[rows]
        bits -= count * more * n // 4
    return weight


def show(found: dict[tuple[str, int, str], list[tuple[float, float]]], operators: int, threads: int) -> None:
    """Print geometric means over the operators."""
    names = list(dict.fromkeys(way for _, _, way in found))
    print("\nShares of the error of the zeros alone, and CPU seconds as multiples of theirs: geometric means over")
    print(f"{operators} operators, {threads} thread(s)\n")
    print("| pattern | rank | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for text, rank in dict.fromkeys((text, rank) for text, rank, _ in found):
        cells = []
        for way in names:
            errors, times = zip(*found[text, rank, way], strict=True)
            cells.append(f"{mean(errors):.3f} ({mean(times):.1f})")
        print(f"| {text} | {rank} | " + " | ".join(cells) + " |")


def mean(values: tuple[float, ...]) -> float:
    return statistics.geometric_mean([max(value, 1e-12) for value in values])


if __name__ == "__main__":
    main()
