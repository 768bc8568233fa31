"""How does the cost of each solver grow with the number of inputs?

Square operators on synthetic Grams with one spectrum (a power law and a massive direction), n doubling. Prints seconds,
the ratio to the previous n (8 is n^3) and the ratio to the default solver at the same n.

    python benchmarks/growth.py
    python benchmarks/growth.py --sizes 576,1152,2304,4608,8192 --methods wanda,sparsegpt,proximal
"""

from __future__ import annotations

import argparse

from layer_time import problem_of, seconds, setting

from fistapruner.solvers import solve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", default="576,1152,2304", help="inputs (default: %(default)s; the full range is 576 to 8192)"
    )
    parser.add_argument("--methods", default="proximal,wanda,sparsegpt,admm,fista,alps")
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    print(f"{setting(arguments.device)}; {arguments.sparsity}, best of {arguments.repeats} after one to warm up")
    print(f"{'n':>6}" + "".join(f"{method:>28}" for method in methods))
    print(f"{'':>6}" + f"{'s':>10}{'growth':>9}{'ratio':>9}" * len(methods))
    before: dict[str, float] = {}
    for size in [int(text) for text in arguments.sizes.split(",")]:
        problem = problem_of(size, size, arguments.device)
        line, first = f"{size:>6}", 0.0
        for method in methods:
            took = seconds(
                lambda p=problem, name=method: solve(p, arguments.sparsity, name), arguments.device, arguments.repeats
            )  # type: ignore[misc]
            first = first or took
            growth = f"{took / before[method]:.2f}" if method in before else "-"
            line += f"{took:>10.3f}{growth:>9}{took / first:>9.2f}"
            before[method] = took
        print(line, flush=True)


if __name__ == "__main__":
    main()
