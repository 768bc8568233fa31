"""GOA: remove heads that are alike and channels that add little, after a reconstruction.

Jianwei Li, Yijun Dong and Qi Lei, "Greedy Output Approximation: Towards Efficient Structured Pruning for LLMs Without
Retraining", CPAL 2025, arXiv 2407.19126.

A module is a group of operators that read hidden states (level 1: queries, keys and values, or gate and up) and the
operator that reads what they write (level 2: o or down). Its operators are first fitted to the dense model's outputs,
level 1, then level 2 on the new inputs: least squares, ``V = W + G H^-1``. On the fitted weights two criteria choose:

A. Of two heads whose attention probabilities are alike, by their Jensen-Shannon divergence, one goes.
B. Channels of MLPs go that can add little to the outputs: ``||B_:j||^2 a_j S a_j^T / 2``, with B of level 2, a_j row j
   of level 1, and S the second moment of the module's inputs; of gate and up the product.

Nothing is fitted after the removal, unless ``compensate: refit`` asks for it.

Differs from the paper in:

1. A number of heads is asked for, where the paper has a threshold: pairs of heads come in the order of their
   divergence. So there are always enough candidates, and none are taken by criterion B.
2. Key/value groups go as a whole. The divergence of two is the mean over the best assignment of their query heads.
3. The paper fits to texts of the downstream tasks; here the calibration text is all there is.
4. The paper's exact solve has no damping; here it has 1 % of the mean diagonal of the Gram.
5. Modules that lose nothing are not fitted.
6. The paper prints another index of B in one place; its derivation has column j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..core import LayerProblem
from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.operators import Group
from ..passes.store import HiddenStates
from ..structure.choose import best_channels
from ..structure.refit import ChannelStatistics, refitted
from ..structure.units import Unit

DAMPING = 0.01  # difference 4

WINDOWS = 16
"""Calibration windows on which attention probabilities are compared, at most: the paper's number."""


def fit_and_choose(
    model: LayerwiseModel,
    index: int,
    unit: Unit,
    groups: Sequence[Group],
    problem_of: Callable[[int], LayerProblem],
    channels_of: Callable[[], ChannelStatistics],
    inputs: HiddenStates,
) -> tuple[ChannelStatistics, Tensor, list[str]]:
    """Fit the operators of a unit of a loaded decoder layer, and choose the channels that stay.

    Args:
        model, index: the model, and the number of the layer; its operators of level 1 get new weights.
        unit: the channels.
        groups: the layer's operators, by what they read.
        problem_of: returns the layer problem of one of these groups; ``channels_of``: what is known of the inputs of
            the operator of level 2, with the new weights before it.
        inputs: hidden states that enter the layer.

    Returns:
        What is known of the inputs of level 2, written around its new weights; the kept channels; warnings.
    """
    layer, producers, warnings, moment = model.layers[index], list[Tensor](), list[str](), torch.empty(0)
    for number, group in enumerate(groups):
        if unit.producers.keys().isdisjoint(operator.name for operator in group):
            continue
        problem = problem_of(number)
        weight, said = refitted(problem, DAMPING)
        warnings += said
        for operator, part in zip(group, weight.split([len(op.weight(layer)) for op in group]), strict=True):
            if operator.name in unit.producers:
                target = operator.weight(layer)
                target.copy_(model.rounded(model.source_of(index, f"{operator.name}.weight"), part))
                producers += target.float().chunk(unit.producers[operator.name].copies)
        moment = problem.gram
    known = channels_of()
    weight, said = refitted(known.problem, DAMPING)
    if unit.columns > 1:
        states = (inputs.read(window, window + 1, model.device) for window in range(min(WINDOWS, inputs.samples)))
        divergence = head_divergence(attention_probabilities(model, index, unit, states))
        gone = redundant(group_divergence(divergence, len(divergence) // unit.before), unit.before - unit.after)
        keep = torch.tensor([group for group in range(unit.before) if group not in gone])
    else:
        keep = best_channels(channel_criterion(weight, producers, moment), unit.after)
    return known.around(weight), keep, [*warnings, *said]


def head_divergence(windows: Iterable[Tensor]) -> Tensor:
    """Compute the mean Jensen-Shannon divergence, over queries, between all pairs of heads.

    Args:
        windows: (heads, queries, keys) attention probabilities of each.

    Returns:
        (heads, heads) fp64 in nats, symmetric.
    """
    total, rows = torch.zeros(()), 0
    for window in windows:
        probabilities = window.float()
        entropy = torch.special.entr(probabilities).sum(-1)
        found = torch.zeros(len(window), len(window), dtype=torch.float64, device=window.device)
        for head in range(len(window) - 1):
            others = slice(head + 1, None)
            middle = torch.special.entr((probabilities[others] + probabilities[head]) / 2).sum(-1)
            divergence = middle - (entropy[others] + entropy[head]) / 2
            found[head, others] = divergence.clamp_min(0).sum(-1, dtype=torch.float64)
        total, rows = total + found.cpu(), rows + window.shape[1]
    return (total + total.T) / rows


def group_divergence(divergence: Tensor, repeats: int) -> Tensor:
    """Compute the divergence of key/value groups: (groups, groups) fp64, symmetric (difference 2).

    Args:
        divergence: (heads, heads) of the query heads; ``repeats``: consecutive query heads of a group.
    """
    from scipy.optimize import linear_sum_assignment  # half a second that other runs need not wait

    groups = len(divergence) // repeats
    found = torch.zeros(groups, groups, dtype=torch.float64)
    for first in range(groups):
        for second in range(first + 1, groups):
            block = divergence[first * repeats : (first + 1) * repeats, second * repeats : (second + 1) * repeats]
            rows, columns = linear_sum_assignment(block.numpy())
            found[first, second] = found[second, first] = float(block[rows, columns].mean())
    return found


def redundant(divergence: Tensor, count: int) -> list[int]:
    """Choose heads, or groups, that others represent, from their (n, n) divergence (difference 1).

    Of the two most alike, of which neither goes yet, the first one goes; then of the next two.
    """
    size = len(divergence)
    gone: list[int] = []
    for _, first, second in sorted((float(divergence[i, j]), i, j) for j in range(size) for i in range(j)):
        if len(gone) < count and first not in gone and second not in gone:
            gone.append(first)
    return gone


def channel_criterion(consumer: Tensor, producers: Sequence[Tensor], moment: Tensor) -> Tensor:
    """Compute criterion B of MLP channels: (channels,) fp64 (difference 6).

    Args:
        consumer: (m, channels) weights B; ``producers``: (channels, n) of each operator that writes the channels.
        moment: (n, n) uncentred second moment S of the producers' inputs.
    """
    norms = consumer.double().square().sum(0)
    found = torch.ones_like(norms)
    for rows in (producer.double() for producer in producers):
        found *= norms * ((rows @ moment.double()) * rows).sum(1) / 2
    return found


def attention_probabilities(
    model: LayerwiseModel, index: int, unit: Unit, hidden: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Yield the (heads, queries, keys) attention probabilities of windows in a loaded decoder layer.

    Args:
        model, index: the model, and the number of the layer.
        unit: its key/value groups.
        hidden: (1, seqlen, width) hidden states that enter the layer, of each window.
    """
    found, call = list[Tensor](), None

    def keep(_: object, __: object, output: object) -> None:
        parts = output if isinstance(output, (tuple, list)) else ()
        found.extend(part for part in parts if isinstance(part, Tensor) and part.ndim == 4)

    fast, attention = model.config._attn_implementation, model.layers[index].get_submodule(unit.name.rpartition(".")[0])
    model.config._attn_implementation = "eager"  # faster programs do not have them
    try:
        with attention.register_forward_hook(keep), torch.no_grad():
            for states in hidden:
                if call is None:
                    with model.embeddings_and_head(head=False):
                        call = model.calls(1, states.shape[1])[index]
                found.clear()
                model.run(index, states, call)
                if len(found) != 1 or found[0].shape[-2:] != (states.shape[1], states.shape[1]):
                    raise FistaPrunerError(
                        f"structure: {model.layers_name}.{index} does not return attention probabilities, which goa "
                        "compares heads by: take another structure.method"
                    )
                yield found[0][0]
    finally:
        model.config._attn_implementation = fast
