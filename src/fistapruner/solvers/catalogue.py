"""List the solvers and refinements, without importing a method or torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Describe one method.

    Args:
        name: name in recipes and on the command line.
        place: module of this package and the class in it, derived from :class:`~.base.Method`.
        summary: what it does, in half a line.
        reference: its paper or origin.
        refines: it is a refinement, which needs the solution of a previous step.
    """

    name: str
    place: str
    summary: str
    reference: str
    refines: bool = False


CATALOGUE = (
    Entry(
        "proximal",
        "proximal.Proximal",
        "proximal splitting with hard thresholds in the OBS metric, then refit (default)",
        "this project; splitting: Lions & Mercier 1979; growing penalty: ALPS, arXiv 2406.07831",
    ),
    Entry(
        "fista",
        "fista.Fista",
        "FISTAPruner: l1 by FISTA, rounding, adaptive lambda (to the letter of the paper: --recipe paper)",
        "Zhao et al. 2024, arXiv 2408.03728",
    ),
    Entry(
        "alps",
        "alps.ALPS",
        "ADMM with hard thresholding and growing penalty, then conjugate gradients",
        "Meng et al. 2024, arXiv 2406.07831",
    ),
    Entry(
        "sparsegpt",
        "sparsegpt.SparseGPT",
        "column by column, remaining weights compensate (one pass)",
        "Frantar & Alistarh 2023, arXiv 2301.00774",
    ),
    Entry(
        "admm",
        "admm.ADMM",
        "ADMM weight update, sparsity grows over the first steps",
        "Boza 2024, arXiv 2401.02938",
    ),
    Entry(
        "wanda",
        "scores.Wanda",
        "magnitude times input norm, row by row; no weight update",
        "Sun et al. 2023, arXiv 2306.11695",
    ),
    Entry(
        "magnitude",
        "scores.Magnitude",
        "drops the smallest weights of each operator; uses no data",
        "Han et al. 2015, arXiv 1506.02626",
    ),
    Entry(
        "refit",
        "refit.Refit",
        "least squares on the mask of the step before",
        "conjugate gradients: Hestenes & Stiefel 1952; per-row steps as in ALPS, arXiv 2406.07831",
        refines=True,
    ),
    Entry(
        "swap",
        "swap.Swap",
        "exchange kept and dropped weights of a row while that lowers its error",
        "single exchanges for best subsets, Miller 2002; the sweep operator, Goodnight 1979",
        refines=True,
    ),
)
"""All methods, in the order in which they are listed."""
