"""What the public ALPS code computes, as a yardstick: the same steps, the same precisions, one operator at a time.

Written from the behaviour of the authors' program (github.com/mazumder-lab/ALPS), so that errors and times can be
compared on the same Gram, machine and threads: fp64 eigendecomposition, the inverse formed again in fp64 at every
change of rho, exact top-k, the error monitored every third iteration, three products in every step of the final
conjugate gradients. ``monitor=False`` leaves out the monitoring, which has no influence on the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fistapruner.core import Constraint


def alps_reference(
    weight: Tensor, gram: Tensor, sparsity: Constraint, *, rho: float = 0.1, monitor: bool = True
) -> tuple[Tensor, int]:
    """Pruned weights (m, n) and the ADMM iterations it took."""
    h = gram.clone()
    h.diagonal().add_(0.01 * gram.diagonal().mean())
    norm = h.diagonal().sqrt() + 1e-8
    h = h / norm / norm[:, None]
    scaled = (weight * norm).T.contiguous()  # (n, m), as its code keeps it
    rhs = (weight * norm @ h).T.contiguous()
    kept = weight.numel() - sparsity.zeros(*weight.shape)
    group = sparsity.nm

    def project(v: Tensor) -> Tensor:
        if group is not None:
            n, m = group
            groups = v.T.reshape(-1, m)
            drop = torch.topk(-(groups**2), m - n, dim=1).indices
            return groups.scatter(1, drop, 0.0).reshape(v.shape[1], v.shape[0]).T.contiguous()
        flat = v.reshape(-1).clone()
        flat[torch.topk(-(flat**2), v.numel() - kept).indices] = 0
        return flat.reshape(v.shape)

    values, vectors = torch.linalg.eigh(h.double())

    def inverse(rho: float) -> Tensor:
        return (vectors @ (vectors / (values + rho)).T).float()

    solve = inverse(rho)
    first = d = project(scaled)
    support = (d == 0).float()
    v = torch.zeros_like(d)
    energy = (scaled * rhs).sum()
    moved = False
    b = scaled
    iteration = 0
    for iteration in range(300):
        b = solve @ (rhs - v + rho * d)
        d = project(b + v / rho)
        v = v + rho * (b - d)
        if (iteration + 1) % 3:
            continue
        now = (d == 0).float()
        change = float(((now - support) ** 2).sum())
        support = now
        if change / kept > 0.1:
            moved, rho = True, rho * 1.3
        elif change / kept > 0.005:
            moved, rho = True, rho * 1.2
        elif change > 0.5:
            if moved:
                rho *= 1.1
            else:
                rho, d, v = rho / 5, first, torch.zeros_like(v)
        elif moved:
            break
        else:
            rho /= 5
        rho = min(rho, 1e6)
        solve = inverse(rho)
        if monitor:
            trial = project(b)
            residual = h @ trial - rhs
            float(torch.diag((trial - scaled).T @ residual).sum() / energy)
        if iteration >= 30 and change / kept < 0.0003:
            break
    return (_conjugate_gradients(h, rhs, project(b)) / norm[:, None]).T.contiguous(), iteration + 1


def _conjugate_gradients(h: Tensor, rhs: Tensor, x: Tensor, steps: int = 10) -> Tensor:
    """Conjugate gradients on the support of ``x``, one step size for each output."""
    mask = (x != 0).float()
    residual = (rhs - h @ x) * mask
    direction = residual
    length = (residual * residual).sum(0)
    bound = 1e-4 * rhs.norm(dim=1)
    for _ in range(steps):
        curvature = (direction * (h @ direction)).sum(0)
        alpha = length / torch.where(curvature == 0, 1e-8, curvature)
        x = x + alpha * direction
        residual = (residual - alpha * (h @ direction)) * mask
        if bool(((h @ x - rhs).norm(dim=1) <= bound).all()):
            break
        following = (residual * residual).sum(0)
        direction = residual + following / torch.where(length == 0, 1e-8, length) * direction
        length = following
    return x
