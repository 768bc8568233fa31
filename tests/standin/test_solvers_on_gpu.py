"""Solvers on a stand-in GPU: no tensor of another device, the CPU's result, no wait inside the default's iterations."""

from collections import Counter

import pytest
import torch

from fistapruner.core import LayerProblem, ProblemSums, parse_sparsity
from fistapruner.core.constraints import stack
from fistapruner.core.sums import DriftFrom
from fistapruner.errors import FistaPrunerError
from fistapruner.solvers import parse_method, solve
from fistapruner.solvers.low_rank import solve_low_rank
from fistapruner.solvers.proximal import Proximal
from fistapruner.structure.choose import eliminate
from standin.gpu import StandIn
from standin.hardware import LAST, REAL

CHAINS = ["magnitude", "wanda", "sparsegpt", "alps", "admm", "fista", "proximal", "wanda+refit", "wanda+swap"]


def problem(device: str, drift_from: str = "inputs") -> LayerProblem:
    """Two operators of 12 rows and 32 inputs that drift."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 32, generator=generator), torch.randn(120, 32, generator=generator)
    dense = inputs + 0.1 * torch.randn(120, 32, generator=generator)
    sums = ProblemSums(weight.to(device), drift_from=drift_from)  # type: ignore[arg-type]
    sums.add(inputs.to(device), (dense if drift_from == "inputs" else dense @ weight.T).to(device))
    return sums.problem("a+b", 0.5)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("chain", [*CHAINS, "sparsegpt+proximal"])
def test_the_result_is_the_cpus(gpu: StandIn, chain: str, sparsity: str) -> None:
    stacked = stack(sparsity, (12, 12))
    solution, there = solve(problem(LAST), stacked, chain), solve(problem("cpu"), stacked, chain)
    assert solution.weight.device == solution.mask.device == torch.device(LAST)
    for stats, expected in zip(solution.stats, there.stats, strict=True):
        assert stats["relative_error"] == pytest.approx(expected["relative_error"], rel=0.03)
    assert not gpu.unordered
    assert not any(place.startswith("solvers/refit.py") for _, place in gpu.moved)


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("chain", ["wanda", "proximal"])
def test_sparse_plus_low_rank_is_the_cpus(gpu: StandIn, chain: str, sparsity: str) -> None:
    """Last bits decide which of nearly equal weights stay."""
    pattern, steps = parse_sparsity(sparsity), parse_method(chain)
    (found, part), (there, _) = (solve_low_rank(problem(device), pattern, steps, 2) for device in (LAST, "cpu"))
    assert part.a.device == part.b.device == found.weight.device == torch.device(LAST)
    assert found.stats[0]["relative_error"] == pytest.approx(there.stats[0]["relative_error"], rel=0.2)
    assert not gpu.unordered


@pytest.mark.parametrize("drift_from", ["inputs", "outputs"])
def test_sums_of_bf16_inputs_make_no_copy_in_fp32(gpu: StandIn, drift_from: DriftFrom) -> None:
    """They are those of a CPU; on the device only the drift of inputs is in fp32."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 32, generator=generator), torch.randn(120, 32, generator=generator).bfloat16()
    dense = inputs if drift_from == "inputs" else (inputs @ weight.T.bfloat16())
    found = []
    for device in ("cpu", LAST):
        sums = ProblemSums(weight.to(device), drift_from=drift_from)
        for part, other in zip(inputs.split(40), dense.split(40), strict=True):
            sums.add(part.to(device), other.to(device))
        found.append(sums.problem("a+b", 0.5))
    here, there = found
    for name in ("gram", "drift", "drift_energy", "energy"):
        assert torch.allclose(getattr(there, name).cpu(), getattr(here, name), rtol=1e-3, atol=1e-3), name
    if not REAL:
        assert gpu.kernels["mm"] > 0


def test_channels_that_go_are_the_cpus(gpu: StandIn) -> None:
    """The inverse of the Gram takes the place of the factor that the weights are fitted with."""
    found, there = (eliminate(problem(device), 20) for device in (LAST, "cpu"))
    assert found == there


@pytest.mark.skipif(REAL, reason="only the stand-in counts waits")
def test_a_problem_is_checked_with_one_wait_for_each_tensor(gpu: StandIn) -> None:
    there = problem(LAST)
    gpu.waits.clear()
    there.check_finite()
    assert sum(gpu.waits.values()) == 3
    there.gram[3, 4] = float("nan")
    with pytest.raises(FistaPrunerError, match=r"^a\+b: the Gram of the calibration activations contains NaN"):
        there.check_finite()


@pytest.mark.skipif(REAL, reason="only the stand-in counts waits")
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_iterations_of_the_default_wait_for_nothing(gpu: StandIn, sparsity: str) -> None:
    """More of them cause no more waits of the host for the device."""
    waits = []
    for steps in (2, 5):
        gpu.waits.clear()
        solve(problem("cuda:0"), sparsity, Proximal(steps=steps))
        waits.append(Counter(gpu.waits))
    assert waits[0] == waits[1]
