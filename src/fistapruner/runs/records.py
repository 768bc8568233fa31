"""The schema of ``report.json``, ``layers/NNNN.json`` and ``compare.json``; see ``docs/files.md``.

Readers are tolerant: optional parts may be missing, unknown keys are kept. A change that an old reader would
misunderstand raises :data:`VERSION`. Reading needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from ..errors import A_FOLDER, FistaPrunerError, explain, path_text
from ..runtime.files import read_json
from ..runtime.machine import Machine
from ..runtime.show import finite, percent, short_count
from ..settings.structure import Remove, compensation_of
from .log import read_steps

VERSION = 1

FIGURES, TABLE, PAGE = "compare.json", "compare.md", "compare.html"
"""Files of a comparison: the rows so far, their table, and its page."""

RUNS = "runs"
"""Folder of a comparison with the run directories of its rows."""

CURVE_POINTS = 500
"""Most points of a training curve in a report."""

DONE = {"prune": "pruned", "recover": "recovered", "align": "aligned", "merge": "merged with an adapter"}
"""What a run has done to its model, by the kind of the run."""

PHASES = {
    "calibration": "calibration text",
    "sensitivity": "measuring the dense model",
    "capture": "passes through the model",
    "gram": "sums over the calibration text",
    "problem": "preparing the solver",
    "structure": "choosing channels",
    "solve": "choosing zeros and weights",
    "reconstruct": "training decoder layers",
    "io": "files",
    "report": "measuring errors",
    "plain": "timing a plain pass",
    "train": "training and its checks",
    "write": "writing the checkpoint",
    "evaluation": "evaluation",
    "samples": "sample prompts",
}
"""Phases of a run's time, in words."""

OTHERS_BY_NAME = ", others by name"
"""Follows the sparsity of a recipe whose allocation gives operators that it names another one."""

Kind = Literal["prune", "recover", "align", "merge"]
"""The verb that a run belongs to; ``merge`` is that of an adapter."""

Loss = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
"""Infinite where a model gives a token of the text no chance at all, which is null in JSON."""

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that is null in JSON where it is NaN or infinite, and NaN when it is read again."""

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Base of all records; unknown keys are kept, so an older reader loses no newer figures."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_serializer(mode="wrap", when_used="json")
    def _written(self, write: SerializerFunctionWrapHandler) -> Any:
        """JSON has neither NaN nor infinity: null is written for them."""
        return finite(write(self))


def parse(schema: type[R], data: dict[str, Any], origin: str) -> R:
    """Validate ``data``; a FistaPrunerError says that it is of a newer version or no such record."""
    try:
        if (version := data.get("version", VERSION)) != VERSION:
            raise ValueError(f"it has version {version!r}: this program reads {VERSION}, update it")
        return schema.model_validate(data)
    except ValueError as error:
        raise FistaPrunerError(f"{origin}: {explain(error)}") from None


def share_of(part: int | None, whole: int | None) -> float | None:
    """Divide two counts; None where they are not known."""
    return part / whole if whole and part is not None else None


# --- recipes, as records hold them, in words


def sets_zeros(recipe: Mapping[str, Any]) -> bool:
    """Check whether a recipe sets weights to zero, in all operators or in some that its allocation names."""
    allocation = recipe.get("allocation")
    named = allocation.values() if isinstance(allocation, Mapping) else ()
    return any(str(pattern) != "0%" for pattern in (recipe.get("sparsity"), *named))


def sparsity_label(recipe: Mapping[str, Any]) -> str:
    """Write the sparsity of a recipe: ``2:4``, ``mixed n:4 (45.4%)``, ``2:4, others by name``."""
    sparsity, allocation = str(recipe.get("sparsity", "")), recipe.get("allocation")
    if allocation == "error" and (n_of_m := re.fullmatch(r"(\d+):(\d+)", sparsity)):
        n, m = map(int, n_of_m.groups())
        return f"mixed n:{m} ({100 * (m - n) / m:g}%)"
    others = isinstance(allocation, Mapping) and any(str(other) != sparsity for other in allocation.values())
    return sparsity + OTHERS_BY_NAME if others else sparsity


def amount_label(recipe: Mapping[str, Any]) -> str:
    """Say what a recipe removes or adds: ``2:4``, ``structure 25% and 2:4``, ``2:4 + rank 16``."""
    removed, sparsity = (recipe.get("structure") or {}).get("remove"), sparsity_label(recipe)
    if not removed:
        return f"{sparsity} + rank {recipe['low_rank']}" if recipe.get("low_rank") else sparsity
    return f"structure {Remove.model_validate(removed)}" + ("" if sparsity in ("", "0%") else f" and {sparsity}")


def methods_label(recipe: Mapping[str, Any]) -> str:
    """Write how a recipe prunes, the choice of structure first: ``obs+refit, wanda+refit``."""
    steps, structure = recipe.get("method") or "", recipe.get("structure") or {}
    steps = [steps] if isinstance(steps, str) else steps  # of a mapping, its one key is the name
    chain = "+".join(step if isinstance(step, str) else next(iter(step)) for step in steps)
    remove = structure.get("remove")
    if not remove:
        return chain
    units = list(Remove.model_validate(remove).model_dump())
    own = ["reap"] if "experts" in units else []
    if units != ["experts"]:
        method = structure.get("method", "obs")
        how = compensation_of(method, structure.get("compensate", "auto"))
        own.insert(0, method + ("" if how == "none" else f"+{how}"))
    return ", ".join([*own, *([chain] if sets_zeros(recipe) else [])])


def training_label(kind: str, settings: Mapping[str, Any], tokens: int | None) -> str:
    """Say what a run trains: ``recovered: lora, kl, 256k tokens with loss``, ``aligned: lora, dpo``.

    ``settings`` is the resolved recipe, ``tokens`` the number of training tokens with loss, None where not known.
    """
    optimizer, loss, anchor = (settings.get(key) for key in ("optimizer", "loss", "anchor"))
    parts = [settings.get("parameters"), None if optimizer == "adamw" else optimizer]
    parts += [f"{loss} + anchor {anchor:g}" if anchor and loss != "none" else loss]
    parts += [f"{short_count(tokens)} tokens with loss" if tokens else None]
    return ": ".join(filter(None, (DONE[kind], ", ".join(str(part) for part in parts if part))))


# --- what an evaluation returns: numbers, each beside the text, window length and precision it needs


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text; likelihoods are in nats a token, errors are over windows.

    ``bos`` says where the BOS token stands: ``none``, ``text`` (once, before the text) or ``window`` (in every window).
    ``split`` is ``file`` for a local file; ``tokens`` counts predicted tokens; ``text_sha256`` is of the token ids.
    """

    data: str
    split: str
    seqlen: int
    windows: int
    tokens: int
    dtype: str
    perplexity: Loss
    standard_error: Number
    nll: Loss
    nll_standard_error: Number
    bos: str = "none"
    text_sha256: str = ""
    window_nlls: tuple[Loss, ...] = field(default=(), repr=False)

    @property
    def measured_on(self) -> tuple[str, str]:
        """Hash of the windows and precision of the passes: figures compare where both are the same."""
        return self.text_sha256, self.dtype


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a reference model's, on the same tokens.

    ``kl`` is the mean of KL(reference || model) in nats, ``top1_agreement`` the share of tokens whose most likely next
    token is the same, ``nll_difference`` the model's mean NLL minus the reference's. Errors are over windows.
    """

    kl: Loss
    kl_standard_error: Number
    top1_agreement: float
    top1_standard_error: Number
    nll_difference: Loss
    nll_difference_standard_error: Number


@dataclass(frozen=True)
class TaskResult:
    """Score of a zero-shot task, alone or beside a reference model on the same items.

    Args:
        metric: what ``value`` is: ``acc``, ``acc_norm``, ``exact_match``; after a comma how answers were filtered.
        items: number of questions, of ``available`` where not all are taken. Errors are over items.
        lost, won: items that only the reference model, or only this model, gets right; ``p_value``: exact McNemar test
            of them. None where items are not just right or wrong.
    """

    task: str
    metric: str
    items: int
    value: float
    standard_error: Number
    reference: float | None = None
    reference_standard_error: float | None = None
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None
    shots: int = 0
    source: str = ""
    available: int | None = None
    dtype: str | None = None
    items_sha256: str = ""

    @property
    def measured_on(self) -> tuple[str, str, int, str, int, str, str | None]:
        """Task, metric, items, examples, source and precision: scores compare where all are the same."""
        return self.task, self.metric, self.items, self.items_sha256, self.shots, self.source, self.dtype

    @property
    def difference_error(self) -> float | None:
        """Standard error of the difference, paired over items; None where the pairs are not known."""
        if self.lost is None or self.won is None or self.items < 2:
            return None
        mean = (self.won - self.lost) / self.items
        return math.sqrt(((self.won + self.lost) / self.items - mean**2) / (self.items - 1))


@dataclass(frozen=True)
class Evaluation:
    """Everything one call of ``fistapruner.evaluate`` measured.

    Args:
        model: what was evaluated, as the user named it; ``against``: the reference (dense) model.
        perplexity: of ``model``; ``reference``: of ``against``; ``divergence``: between them, on the same tokens.
        low_rank: additional weights of the low-rank part that was added to ``model``.
    """

    model: str
    against: str | None = None
    perplexity: Perplexity | None = None
    reference: Perplexity | None = None
    divergence: Divergence | None = None
    tasks: tuple[TaskResult, ...] = ()
    seconds: float = 0.0
    device: str = "cpu"
    low_rank: int | None = None
    warnings: tuple[str, ...] = ()


# --- a decoder layer


class OperatorEntry(Record):
    """One pruned or trained operator.

    Args:
        name: inside the decoder layer (``self_attn.q_proj``); ``shape``: [outputs, inputs].
        relative_error: error of its outputs as a share of their energy (``f / c``), that of the sum where it has a part
            of rank ``low_rank``; ``dense_error``: of its dense weights on the same drifted inputs.
        steps: what each step of the method chain recorded: ``method``, ``relative_error``, ``seconds`` and its own.
        tokens: calibration tokens that were routed to its expert; None of operators that read all tokens.
        change: of training: norm of the weight's change over its norm; ``changed``: weights that changed.
    """

    name: str
    shape: tuple[int, int]
    sparsity: str
    zeros: int
    relative_error: float | None = None
    dense_error: float | None = None
    steps: list[dict[str, Any]] = []
    tokens: int | None = None
    low_rank: int | None = None
    change: float | None = None
    changed: int | None = None

    @property
    def loss(self) -> float | None:
        """The error that pruning adds to that of the dense weights; 0 where it removes some of that."""
        return None if self.relative_error is None else max(0.0, self.relative_error - (self.dense_error or 0.0))


class RemovalEntry(Record):
    """Channels or experts that were removed from a decoder layer.

    Args:
        unit: what was removed (``MLP channels``); ``consumer``: the operator that reads it.
        kept: of experts, the numbers in the dense model of those that stay.
        compensate: how the remaining weights make up for them; ``shrink``: share of shrinkage of the Gram.
        dense_error: relative error of the consumer's outputs with all channels; ``dropped_error``: without the removed
            ones; ``relative_error``: with new weights; ``validated_error``: on tokens not fitted.
        permuted: shares of importance that an n:m pattern keeps in the old and the new order of remaining channels.
        tokens: calibration tokens that were routed to its expert; None of others.
    """

    unit: str
    before: int
    after: int
    kept: list[int] | None = None
    consumer: str = ""
    method: str = ""
    compensate: str = ""
    shrink: float | None = None
    dense_error: float | None = None
    dropped_error: float | None = None
    relative_error: float | None = None
    validated_error: float | None = None
    permuted: tuple[float, float] | None = None
    tokens: int | None = None


class LayerEntry(Record):
    """One pruned decoder layer; also the content of ``RUN/layers/NNNN.json``.

    ``relative_error`` is that of the output hidden states, as a share of ``relative_error_of``. Operators are in the
    order of execution; ``seconds`` are by phase.
    """

    index: int
    name: str = ""
    seconds: dict[str, Number] = {}
    relative_error: float | None = None
    relative_error_of: str | None = None
    operators: list[OperatorEntry] = []
    removals: list[RemovalEntry] = []
    finished: str | None = None
    device: str | None = None
    peak_memory: int | None = None
    warnings: list[str] = []

    @property
    def judged(self) -> list[OperatorEntry]:
        """Operators whose errors are known, without those that an allocation kept as they were."""
        known = [operator for operator in self.operators if operator.relative_error is not None]
        return [operator for operator in known if operator.sparsity != "0%" or self.removals]


# --- what goes into a run


class ModelFacts(Record):
    """The model that was pruned, ``source`` as the user named it.

    ``parameters`` counts a shared one once; ``own_code`` lists what needs Python code of the model's own (``model``,
    ``tokenizer``).
    """

    source: str = ""
    revision: str | None = None
    architecture: str = ""
    layers: int = 0
    parameters: int | None = None
    dtype: str = ""
    bytes: int | None = None
    license: str | None = None
    own_code: list[str] = []


class TextSide(Record):
    """One side of a training text: documents, windows, tokens without padding, tokens that carry loss."""

    documents: int | None = None
    windows: int = 0
    tokens: int = 0
    loss_tokens: int = 0


class CalibrationTask(Record):
    """One text of a mixture, or a training text with the sides to train on and to validate on."""

    source: str
    how: str = ""
    samples: int = 0
    documents: int | None = None
    trained: TextSide | None = None
    held_out: TextSide | None = None


class CalibrationFacts(Record):
    """The calibration or training tokens that were really used.

    ``samples`` counts windows, ``sha256`` is of the token ids. ``tasks`` has the text of each task of a mixture; of a
    recovery run, every training text.
    """

    source: str
    how: str = ""
    samples: int = 0
    seqlen: int = 0
    tokens: int = 0
    sha256: str = ""
    seed: int | None = None
    documents: int | None = None
    tasks: dict[str, CalibrationTask] = {}


class WorkloadFacts(Record):
    """An allocation for a workload: hash of its file, deployments in its history, tasks by name.

    Of a task: its ``weight`` in the workload, and the losses in nats a token that are predicted at ``uniform`` and at
    the chosen sparsities (``predicted``).
    """

    fingerprint: str
    deployments: int = 0
    tasks: dict[str, dict[str, Number]] = {}


# --- what comes out of it


class ZeroCounts(Record):
    """Exact counts of weights and zeros in the operators; None where they are not known."""

    operator_weights: int | None = None
    operator_zeros: int | None = None

    @property
    def zeros_share(self) -> float | None:
        """Share of zeros in the operators; None where it is not known."""
        return share_of(self.operator_zeros, self.operator_weights)


class Totals(ZeroCounts):
    """Sums over the run, of the operators that it prunes or trains.

    Args:
        model_weights: of the whole model; ``model_zeros``: in all its pruned operators, also those of earlier runs.
        seconds: wall time until the checkpoint is written.
        time_split: seconds by phase, also of ``evaluation`` and ``samples`` (prompts), which come after.
        peak_memory: bytes, resident set; ``peak_device_memory``: on the GPU, where one process pruned all layers.
        compressed_bytes: of the packed weight files and the adapter, if measured.
        low_rank: rank of the low-rank parts; ``low_rank_weights``: their weights, counted in no other number.
    """

    model_weights: int | None = None
    model_zeros: int | None = None
    seconds: float | None = None
    time_split: dict[str, Number] = {}
    peak_memory: int | None = None
    peak_device_memory: int | None = None
    checkpoint_bytes: int | None = None
    compressed_bytes: int | None = None
    low_rank: int | None = None
    low_rank_weights: int | None = None
    low_rank_bytes: int | None = None


class Generation(Record):
    """The same prompt continued greedily by the dense, the pruned and the recovered model."""

    prompt: str
    dense: str | None = None
    pruned: str | None = None
    recovered: str | None = None


class Check(Record):
    """A check on held-out windows after a step: loss per token, whether it is the best, loss by task."""

    step: int
    held_out: Loss
    kept: bool = False
    by_task: dict[str, Loss] = {}


class Recovery(Record):
    """What a run trained, on what, and what that changed.

    Args:
        lr: the lowest and the highest first learning rate.
        trained: numbers that were trained; ``operators``: operators among them; ``tokens``: with loss that were passed.
        kept_step: the step whose weights were written; 0 is the input's own.
        curve: (step, training loss); ``seconds``: of steps and checks, all processes.
        changed: share of the surviving weights that changed; ``change``: largest of an operator, norm over norm.
        before: the input on the texts that the result was evaluated on, against the same dense model.
    """

    parameters: str = ""
    optimizer: str = ""
    loss: str = ""
    lr: dict[str, Number] = {}
    trained: int = 0
    operators: int = 0
    steps: int = 0
    asked_steps: int = 0
    kept_step: int = 0
    tokens: int = 0
    windows: int = 0
    held_out_windows: int = 0
    documents: int | None = None
    held_out_documents: int | None = None
    checks: list[Check] = []
    curve: list[tuple[int, Number]] = []
    changed: float | None = None
    change: float | None = None
    seconds: float = 0.0
    last_step: str | None = None
    before: list[Evaluation] = []

    @property
    def start(self) -> Check | None:
        """The check before the first step."""
        return next((check for check in self.checks if check.step == 0), None)

    @property
    def best(self) -> Check | None:
        """The check of the step that is kept."""
        return next((check for check in self.checks if check.step == self.kept_step), None)

    def read_journal(self, path: Path) -> None:
        """Take steps, losses and times from a journal of steps (:class:`fistapruner.runs.log.StepJournal`)."""
        if not (lines := read_steps(path)):
            return
        losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        self.steps = lines[-1]["step"]
        self.tokens = sum(line.get("tokens", 0) for line in lines)
        self.seconds = sum(line.get("seconds", 0.0) for line in lines)
        self.last_step = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
        self.curve = losses[:: -(-len(losses) // CURVE_POINTS) or 1]
        checks = [line for line in lines if line.get("held_out") is not None]
        self.checks = [Check.model_validate({key: line.get(key) for key in Check.model_fields}) for line in checks]
        self.kept_step = next((check.step for check in reversed(self.checks) if check.kept), 0)


class PreferenceFigures(Record):
    """What a model prefers on the test pairs of an alignment run.

    Args:
        accuracy: share of pairs whose chosen answer is more likely, ties count one half; ``normalised``: by token.
        p_value: exact McNemar test against the run's result; ``lost``, ``won``: pairs that only one of them gets right.
    """

    accuracy: Number
    accuracy_error: Number
    normalised: Number
    normalised_error: float | None = None
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None


class Alignment(Record):
    """What an alignment run trained on, and what its result prefers.

    Args:
        pairs, held_out_pairs, test_pairs: of the three sides; ``left_out``: pairs that did not fit.
        references: of the loss, their weights by name, the mean over the pairs of the steps where they differ.
        test: of ``dense``, ``pruned`` (the model that went in) and ``aligned``, on the test pairs.
        reward_accuracy: share of test pairs whose margin is above the references'; ties count one half.
        margin: ``beta (h - m)``; ``chosen_reward``, ``rejected_reward``: ``beta (p - r)`` of either answer; means.
    """

    pairs: int = 0
    held_out_pairs: int = 0
    test_pairs: int = 0
    left_out: int = 0
    references: dict[str, Number] = {}
    test: dict[str, PreferenceFigures] = {}
    reward_accuracy: float | None = None
    reward_accuracy_error: float | None = None
    margin: float | None = None
    margin_error: float | None = None
    chosen_reward: float | None = None
    chosen_reward_error: float | None = None
    rejected_reward: float | None = None
    rejected_reward_error: float | None = None


class StageFigures(ZeroCounts):
    """What a stage measured of its result; ``reference``: perplexity of the dense model."""

    parameters: int | None = None
    tokens: int | None = None
    perplexity: Perplexity | None = None
    reference: Perplexity | None = None
    divergence: Divergence | None = None


class Stage(Record):
    """One run in the making of a model."""

    kind: Kind = "prune"
    command: str | None = None
    finished: str | None = None
    fingerprint: str | None = None
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    figures: StageFigures = StageFigures()


class Lineage(Record):
    """How a model was made: the dense model, then one stage for each run, in order."""

    source: ModelFacts
    stages: list[Stage] = []


class Report(Record):
    """``RUN/report.json``, and (without layers and totals) ``RUN/run.json`` of an unfinished run.

    Its ``repr``, which a notebook prints, has the main figures only.

    Args:
        error: why it failed; ``command``: shell line that reproduces it; ``started``, ``finished``: ISO times.
        recipe: every setting; ``fingerprint``: of what decides the weights.
        layers: in order; for an unfinished run those that are done.
        evaluations: one for each data set; ``speed``: what ``fistapruner bench RUN`` measured.
        permuted: operators whose input channels were reordered or rotated for an n:m pattern, with the shares of their
            weights' importance that the pattern keeps before and after.
        lineage: how the model was made, this run included once it is finished.
        recovery: what a recovery or alignment run trained; ``alignment``: on which pairs.
        stacked_experts: pruned experts are stored as one tensor of all, which ``pack`` does not take.
        folder: the run directory, which the file does not say.
    """

    version: int = VERSION
    kind: Kind = "prune"
    status: Literal["running", "finished", "failed"] = "running"
    error: str | None = None
    command: str | None = None
    started: str | None = None
    finished: str | None = None
    recipe: dict[str, Any] = {}
    fingerprint: str | None = None
    versions: dict[str, str] = {}
    machine: Machine = Machine()
    model: ModelFacts = ModelFacts()
    calibration: CalibrationFacts | None = None
    layers: list[LayerEntry] = []
    totals: Totals = Totals()
    evaluations: list[Evaluation] = []
    speed: dict[str, Any] | None = None
    generations: list[Generation] = []
    permuted: dict[str, tuple[Number, Number]] = {}
    workload: WorkloadFacts | None = None
    lineage: Lineage | None = None
    recovery: Recovery | None = None
    alignment: Alignment | None = None
    stacked_experts: bool = False
    warnings: list[str] = []
    folder: str = Field("", exclude=True)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return what ``repr`` shows: the whole would be tens of thousands of characters."""
        totals = self.totals
        figures: dict[str, Any] = {"model": self.model.source, "error": self.error, "seconds": totals.seconds}
        figures |= {"operator_weights": totals.operator_weights, "operator_zeros": totals.operator_zeros}
        for name, side in (("perplexity", "perplexity"), ("dense_perplexity", "reference")):
            texts = [found for each in self.evaluations if (found := getattr(each, side))]
            figures[name] = {text.data: text.perplexity for text in texts} or None
        figures = {name: value for name, value in figures.items() if value is not None}
        yield from {"kind": self.kind, "status": self.status, **figures}.items()

    @property
    def operators(self) -> list[OperatorEntry]:
        """Operators of all layers, in order."""
        return [operator for layer in self.layers for operator in layer.operators]

    @property
    def operator_weights(self) -> int:
        """Number of weights of all operators."""
        return sum(math.prod(operator.shape) for operator in self.operators)

    @property
    def operator_zeros(self) -> int:
        """Number of zeros of all operators."""
        return sum(operator.zeros for operator in self.operators)

    @property
    def sparsity(self) -> str:
        """Pattern of the recipe, with what is removed of the structure.

        Of a run that trains it is that of the last pruning run, or else what its operators claim, or their zeros.
        """
        claims = {operator.sparsity for operator in self.operators}
        if self.pruning or not claims:
            return amount_label(self.pruning)
        return claims.pop() if len(claims) == 1 else percent(self.operator_zeros / self.operator_weights)

    @property
    def pruning(self) -> dict[str, Any]:
        """Settings that the model was pruned with: the recipe, or that of the last pruning run in the lineage."""
        if self.kind == "prune":
            return self.recipe
        stages = self.lineage.stages if self.lineage else []
        return next((stage.settings for stage in reversed(stages) if stage.kind == "prune"), {})

    @property
    def structured(self) -> bool:
        """Whether structure was removed."""
        return bool((self.pruning.get("structure") or {}).get("remove"))

    @property
    def only_structure(self) -> bool:
        """Whether structure was removed and no weights were set to zero."""
        return self.structured and not sets_zeros(self.pruning)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Numbers before and after of what was removed, by its name; of the last layer where they differ."""
        return {removal.unit: (removal.before, removal.after) for layer in self.layers for removal in layer.removals}

    @property
    def origin(self) -> ModelFacts:
        """The dense model: a run may have begun with what other runs made of it."""
        stages = self.lineage.stages if self.lineage else []
        return self.lineage.source if self.lineage and (len(stages) > 1 or self.kind != "prune") else self.model

    @property
    def relative_errors(self) -> list[float]:
        """Relative errors of changed operators' outputs, as far as they are known and finite."""
        errors = (operator.relative_error for layer in self.layers for operator in layer.judged)
        return [error for error in errors if error is not None and math.isfinite(error)]

    @property
    def mean_error(self) -> float | None:
        """Mean of ``relative_errors``; None where there are none."""
        errors = self.relative_errors
        return sum(errors) / len(errors) if errors else None

    @property
    def method(self) -> str:
        """Method chain as the command line writes it, with a removal's; of a recovery run what was trained."""
        if self.recovery is None:
            return methods_label(self.recipe)
        found = self.recovery
        settings = {**self.recipe, "parameters": found.parameters, "loss": found.loss}
        return training_label(self.kind, settings, found.tokens if self.status == "finished" else None)

    @property
    def training(self) -> str:
        """What a run that trains does: ``recovery`` or ``alignment``."""
        return "alignment" if self.kind == "align" else "recovery"


# --- a comparison


class CompareRow(Totals):
    """One method at one sparsity and seed, with the totals of its run.

    Args:
        label: the method as the user wrote it; ``settings``: its recipe.
        seconds: of the run, without drawing the calibration windows that rows share.
        gap: ln(perplexity) - ln(dense perplexity); ``relative_error``: mean over changed operators.
        dense_weights: of the model before structure was removed; None where none was.
    """

    method: str
    label: str | None = None
    sparsity: str
    seed: int = 0
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None
    gap: float | None = None
    relative_error: float | None = None
    dense_weights: int | None = None
    settings: dict[str, Any] = {}
    error: str | None = None

    @property
    def name(self) -> str:
        """What to print for the method."""
        return self.label or self.method

    @property
    def beside_zeros(self) -> str:
        """Say what low-rank parts add and what structure went, behind the share of zeros; else nothing."""
        more = share_of(self.low_rank_weights, self.operator_weights)
        text = f" and {percent(more)} more weights" if more else ""
        if removed := (self.settings.get("structure") or {}).get("remove"):
            parameters = share_of(self.model_weights, self.dense_weights)
            how = "" if parameters is None else f": −{percent(1 - parameters)} parameters"
            text += f" (structure {Remove.model_validate(removed)} removed{how})"
        return text


class Comparison(Record):
    """``DIR/compare.json``: many methods, one protocol.

    ``fingerprint`` has what all rows share, by name: model, calibration, evaluation text, settings.
    """

    version: int = VERSION
    kind: Literal["compare"] = "compare"
    status: Literal["running", "finished"] = "running"
    command: str | None = None
    started: str | None = None
    finished: str | None = None
    versions: dict[str, str] = {}
    machine: Machine = Machine()
    model: ModelFacts = ModelFacts()
    fingerprint: dict[str, Any] = {}
    calibration: CalibrationFacts | None = None
    dense: Perplexity | None = None
    rows: list[CompareRow] = []
    warnings: list[str] = []


# --- reading


def is_run(folder: str | Path) -> bool:
    """Whether a path is a run directory, and not a model or anything else."""
    folder = Path(path_text("folder", folder, A_FOLDER))
    records = (folder / "run.json", folder / "report.json")
    return not (folder / "config.json").exists() and any(path.is_file() for path in records)


def load_run(folder: Path) -> Report:
    """Read the report of a run directory; of an unfinished run with the layers and steps that are done."""
    name = next((name for name in ("report.json", "run.json") if (folder / name).is_file()), None)
    if name is None:
        reason = "is not a run: it has neither report.json nor run.json" if folder.exists() else "does not exist"
        raise FistaPrunerError(f"{folder} {reason}")
    data = {
        key: value for key, value in read_json(folder / name).items() if key not in ("decision", "format", "sha256")
    }  # of run.json
    report = parse(Report, data, str(folder / name))
    if report.recovery is not None and report.status != "finished":
        report.recovery.read_journal(folder / "steps.jsonl")
    for path in sorted((folder / "layers").glob("*.json")) if not report.layers else ():
        try:
            content = read_json(path)
            file = content.pop("file", None)
            if not isinstance(file, dict) or file.get("fingerprint") == report.fingerprint:
                report.layers.append(parse(LayerEntry, content, str(path)))
        except FistaPrunerError as error:
            report.warnings.append(f"layer file left out: {error}")
    report.layers.sort(key=lambda layer: layer.index)
    return report


def load_comparison(folder: Path) -> Comparison:
    """Read ``DIR/compare.json``; a FistaPrunerError says what is wrong with it."""
    return parse(Comparison, read_json(folder / FIGURES), str(folder / FIGURES))
