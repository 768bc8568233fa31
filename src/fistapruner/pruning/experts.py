"""Remove experts of a decoder layer, and make the problems of those that few tokens are routed to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from ..core import LayerProblem, ProblemSums
from ..models.experts import Experts
from ..runs.records import OperatorEntry, RemovalEntry
from ..runtime.show import Clock
from ..structure.experts import fewer_experts, kept_experts, reap_scores
from ..structure.refit import problem_without_tokens, share_of_few, shrunk
from ..structure.units import EXPERTS, Unit
from .context import LayerContext
from .passes import LayerPasses

FEW = "fewer tokens than inputs"
SHRUNK = ", so their Grams are shrunk towards the diagonal"
NONE = "no token was routed to them, so they are pruned by magnitude"


def routed_problem(sums: ProblemSums, name: str, target: float, *, release: bool = True) -> LayerProblem:
    """Make the layer problem of a group of an expert's operators, whatever the number of its tokens.

    With p tokens, fewer than the n inputs, the Gram is singular, and least squares would fit noise. It is shrunk
    towards its diagonal by the share n / (n + p) (:mod:`fistapruner.structure.refit`): the penalty on changes of
    weights is n / p. Errors are then those under the shrunk Gram, as shares of the energy under it. Without tokens the
    Gram is the identity: all inputs count alike.

    Args:
        sums: of the tokens that were routed to the expert.
        name: of the operators.
        target: share of the dense model's output in the target.
        release: the sums will not be used again.
    """
    if not sums.tokens:
        return problem_without_tokens(sums.weight, name)
    problem = sums.problem(name, target, release=release)
    share = share_of_few(problem.shape[1], sums.tokens)
    return problem if share is None else replace(shrunk(problem, share), energy=None)


def routing_warnings(
    layer: str, operators: Sequence[OperatorEntry], removals: Sequence[RemovalEntry], mixtures: Iterable[str]
) -> list[str]:
    """Name the experts of a layer that few calibration tokens, or none, were routed to.

    Args:
        layer: name of the decoder layer.
        operators: the report's entries of its operators.
        removals: of what was removed.
        mixtures: names of its modules of experts.
    """
    warnings = []
    solved = any(entry.tokens and entry.sparsity != "0%" for entry in operators)
    fits = solved or any(entry.tokens and entry.shrink for entry in removals)  # flap alone, for one, does not
    read = [(entry.name, entry.tokens, entry.shape[1]) for entry in operators]
    read += [(entry.consumer, entry.tokens, entry.before) for entry in removals]
    for mixture in mixtures:
        tokens: dict[str, int] = {}
        inputs: dict[str, int] = {}
        for name, count, columns in read:
            if count is not None and name.startswith(mixture + "."):
                expert = name.removeprefix(mixture + ".").partition(".")[0]
                tokens[expert], inputs[expert] = count, max(inputs.get(expert, 0), columns)
        none = [expert for expert, count in tokens.items() if not count]
        few = [f"{expert} ({count} tokens)" for expert, count in tokens.items() if 0 < count < inputs[expert]]
        warnings += [
            f"{layer}.{mixture}: experts {', '.join(found)}: {said}"
            for found, said in ((none, NONE), (few, FEW + SHRUNK if fits else FEW))
            if found
        ]
    return warnings


def remove_experts(
    context: LayerContext, index: int, unit: Unit, passes: LayerPasses, clock: Clock, loaded: ExitStack
) -> tuple[dict[str, Tensor], RemovalEntry]:
    """Remove experts of a loaded decoder layer, until ``loaded`` is left.

    Args:
        context: model and settings.
        index: number of the layer.
        unit: the mixture, and how many of its experts stay.
        passes: passes through the layer.
        clock: counts the time.
        loaded: holds the layer.

    Returns:
        The tensors that are others now, by checkpoint name and with all bits that it has, and the report's entry.
    """
    model = context.model
    layer = model.layers[index]

    def stored(name: str) -> str:
        return model.source_of(index, name)

    routed = passes.routed_to(unit.name)
    experts = layer.get_submodule(unit.name)
    assert isinstance(experts, Experts)
    with clock.phase("structure"):
        scores = reap_scores(experts, routed, model.device)
        keep = kept_experts(scores, unit)
        loaded.enter_context(fewer_experts(layer, unit, keep))
    passes.rerouted(unit.name)
    with clock.phase("io"):
        tensors = {
            stored(name): model.checkpoint.read(stored(name)).index_select(dim, places)
            for name, (dim, places) in unit.tensors(keep).items()
        }
        for place, number in enumerate(keep.tolist()):
            for name, _ in experts.get_submodule(str(place)).named_parameters() if place != number else ():
                source, old = (stored(f"{unit.name}.{each}.{name}") for each in (place, number))
                tensors[source] = model.checkpoint.read(old).to(model.checkpoint.entry(source).dtype)
    entry = RemovalEntry(
        unit=EXPERTS,
        kept=keep.tolist(),
        scores=scores.tolist(),
        consumer=unit.name,
        before=unit.before,
        after=unit.after,
        method="reap",
        compensate="none",
    )
    return tensors, entry
