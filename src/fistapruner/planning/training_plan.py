"""Plan a run that trains: predict memory, disk and time, and choose settings that fit.

Memory is counted from the model's sizes and from parts of a step that are run once on the real model, with their bytes
counted (:mod:`fistapruner.planning.footprint`): one window through one decoder layer and back, that layer's effective
weights and its optimizer step, one slice of logits. The same parts are timed. What a run may change to fit changes no
bit of the result, except the windows in one pass. Where the disk is small, the dense model's predictions go in rounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from ..errors import FistaPrunerError
from ..recipes.align_settings import AlignRecipe
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.training_settings import PARAMETERS
from ..runs.records import PlanRow
from ..runtime.files import existing_folder
from ..runtime.formatting import counted, duration, size
from ..tuning.teacher import TOP
from ..tuning.trained import has_vectors
from .budget import DEVICE, DEVICE_RESERVE, DISK, MemoryBudget, Resources, fewest_windows
from .sizes import GENERATING
from .training_probe import measure_form, measure_model, stored_bytes
from .training_sizes import CUTTING, STEP, TRAINING, ModelSizes, TrainingSizes
from .training_task import Task, TrainingChoice

DISK_SHARE = 0.95
"""Share of the free disk that a plan may use."""


@dataclass(frozen=True)
class FormPlan:
    """The plan of one form.

    Args:
        parameters: the form.
        choice: settings that fit, or the smallest ones.
        fits: whether they do; ``refusal``: why not, one line.
        changed: sentence on what was changed to fit; None where nothing was.
        needs: the sizes that it is made from.
        budgets: of the GPU, if there is one, and of main memory.
        worst: the stage that no choice fits into memory; None where all stages fit.
    """

    parameters: str
    choice: TrainingChoice
    fits: bool
    refusal: str | None
    changed: str | None
    needs: TrainingSizes
    budgets: list[MemoryBudget[TrainingChoice]]
    worst: str | None = None

    @property
    def rows(self) -> list[PlanRow]:
        """The predictions, for the report."""
        needs, choice = self.needs, self.choice
        rows = [PlanRow(quantity=each.quantity, unit="bytes", planned=each.peak(choice)) for each in self.budgets]
        rows.append(PlanRow(quantity=DISK, unit="bytes", planned=sum(needs.disk(choice).values())))
        rows.append(PlanRow(quantity=STEP, unit="seconds", planned=needs.step_seconds(choice)))
        rows.append(PlanRow(quantity=TRAINING, unit="seconds", planned=needs.seconds(choice)))
        return rows

    @property
    def stages(self) -> dict[str, int]:
        """Peak bytes of each stage; on a GPU those of main memory have it in their names."""
        return {
            f"{stage}{budget.suffix}": each
            for budget in self.budgets
            for stage, each in budget.stages(self.choice).items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "parameters": self.parameters,
            "fits": self.fits,
            "refusal": self.refusal,
            "choice": asdict(self.choice),
            "rows": [row.model_dump(mode="json", exclude={"actual"}) for row in self.rows],
            "stages": self.stages,
            "disk": self.needs.disk(self.choice),
        }

    @property
    def says(self) -> list[str]:
        """Say what was changed to fit; then memory, disk and time."""
        needs, choice = self.needs, self.choice
        stages = needs.stages(choice)
        worst = max(stages, key=lambda name: stages[name])
        kind = "GPU memory" if needs.model.cuda else "memory"
        text = "; first the dense model generates text, which this time does not count" if needs.model.text else ""
        host = f", {size(max(needs.host_stages(choice).values()))} of main memory" if needs.model.cuda else ""
        return [
            *([] if self.changed is None else [self.changed]),
            f"plan: {self.parameters}, {size(stages[worst])} of {kind} at its peak ({worst}){host}, "
            f"{size(sum(needs.disk(choice).values()))} of disk, about {duration(needs.seconds_in_all(choice))} "
            f"({counted(needs.task.steps, 'step')} of {duration(needs.step_seconds(choice))}){text}",
        ]


def plan_training(task: Task, measured: ModelSizes | None = None) -> FormPlan:
    """Plan a run that trains.

    Args:
        task: what is to be planned.
        measured: sizes of the model; None measures them.

    Raises:
        FistaPrunerError: no choice fits the memory (main or the GPU's) or the disk; names the stage and the bytes, and
            what would fit.
    """
    measured = measured or measure_model(task)
    resources = Resources.of_this_machine(task.recipe, task.model.device, 1)
    found = fit(TrainingSizes(task, measured, measure_form(task)), resources)
    if found.fits:
        return found
    others = [form for form in plan_forms(task, measured, [name for name in PARAMETERS if name != found.parameters])]
    fitting = [f"--parameters {other.parameters}" for other in others if other.fits]
    advice, recovery = "", isinstance(task.recipe, RecoverRecipe)
    if fitting:
        advice = f"; {' and '.join(fitting)} would fit"
    elif found.worst is None:  # for want of disk
        advice = f"; take {'fewer --tokens, or ' if recovery else ''}another --out"
    elif recovery and found.worst == CUTTING:
        advice = "; take fewer --tokens"
    elif recovery and found.worst != GENERATING:
        advice = "; 'fistapruner prune --reconstruct STEPS' trains one decoder layer at a time, while it prunes"
    raise FistaPrunerError(f"{found.refusal}{advice}")


def plan_forms(task: Task, measured: ModelSizes | None = None, names: Sequence[str] = PARAMETERS) -> list[FormPlan]:
    """Plan a run with each form; those that do not fit say why."""
    measured = measured or measure_model(task)
    resources = Resources.of_this_machine(task.recipe, task.model.device, 1)
    found = []
    for name in names:
        other = replace(task, recipe=task.recipe.model_copy(update={"parameters": name}))
        if name == "norms" and not has_vectors(task.model.layers, task.recipe.also):
            continue
        found.append(fit(TrainingSizes(other, measured, measure_form(other)), resources))
    return found


def fit(needs: TrainingSizes, resources: Resources, free: int | None = None) -> FormPlan:
    """Choose settings of a run that fit into memory and onto the disk.

    If memory holds the graphs of all layers, no layer runs twice. Else as many windows pass at once as fit.

    Args:
        needs: sizes of the parts.
        resources: memory that the run may use.
        free: free bytes of the disk; None measures them.
    """
    task = needs.task
    parameters = str(task.recipe.parameters)
    sizes = [task.batch_size]
    while sizes[-1] > task.together and not task.recipe.execution.batch_size:
        sizes.append(task.whole(sizes[-1] // 2))
    choices = [] if task.recipe.zeroth_order else [TrainingChoice(sizes[0], keep_graphs=True)]
    choices += [TrainingChoice(count) for count in sizes]
    budgets = _budgets(needs, resources)
    chosen = next((choice for choice in choices if all(budget.holds(choice) for budget in budgets)), None)
    if chosen is None:
        least = min(choices, key=lambda choice: max(budget.load(choice)[0] for budget in budgets))
        over = next(budget for budget in budgets if not budget.holds(least))
        return FormPlan(parameters, least, False, str(over.refusal(least)), None, needs, budgets, over.load(least)[1])
    place = existing_folder(task.out)
    free = shutil.disk_usage(place).free if free is None else free
    room = round(free * DISK_SHARE)
    chosen = _in_rounds(needs, chosen, room)
    parts = needs.disk(chosen)
    if sum(parts.values()) > room:
        worst = max(parts, key=lambda name: parts[name])
        refusal = (
            f"{task.out} needs {size(sum(parts.values()))} of disk, {size(parts[worst])} for {worst}, and {place} has "
            f"{size(free)} free{_smaller_teacher(needs, chosen, room)}"
        )
        return FormPlan(parameters, chosen, False, refusal, None, needs, budgets)
    first = TrainingChoice(task.batch_size)
    given = [budget.given for budget in budgets if not budget.holds(first) and not chosen.keep_graphs]
    given += [] if chosen.teacher_windows is None else [f"the {size(free)} that are free in {place}"]
    words = chosen.words()
    if chosen.batch_size != task.batch_size:
        words.append(f"{chosen.batch_size} windows at a time instead of {task.batch_size}")
    changed = f"to fit {' and '.join(given)}: {', '.join(words)}" if given else None
    return FormPlan(parameters, chosen, True, None, changed, needs, budgets)


def _in_rounds(needs: TrainingSizes, choice: TrainingChoice, room: int) -> TrainingChoice:
    """Put the dense model's predictions in rounds if the disk does not hold all of them."""
    parts = needs.disk(choice)
    if sum(parts.values()) > room and needs.model.stored:
        others = sum(parts.values()) - parts["the dense model's predictions"]
        windows = (room - others) // needs.model.stored
        if windows >= needs.task.held_out + needs.task.step_windows:
            return replace(choice, teacher_windows=windows)
    return choice


def _smaller_teacher(needs: TrainingSizes, choice: TrainingChoice, room: int) -> str:
    """Advise to store the dense model's most likely tokens if they fit; empty if they do not."""
    if needs.task.top is not None or not needs.model.stored:
        return ""
    kinds = get_args(type(needs.task.recipe).model_fields["teacher"].annotation)
    name = next(kind for kind in kinds if kind in TOP)
    task = replace(needs.task, top=TOP[name])
    smaller = replace(needs, task=task, model=replace(needs.model, stored=stored_bytes(task)))
    bytes_needed = sum(smaller.disk(_in_rounds(smaller, choice, room)).values())
    return f"; --teacher {name} would fit, with {size(bytes_needed)}" if bytes_needed <= room else ""


def _budgets(needs: TrainingSizes, resources: Resources) -> list[MemoryBudget[TrainingChoice]]:
    """Make the budget of the GPU, if there is one, and of main memory."""
    limit, device = resources.limit, resources.device
    given = f"the {size(limit)} that are free"
    if needs.task.recipe.execution.memory_limit:
        given = f"--memory-limit {size(limit)}"
    windows, lower = fewest_windows(needs.task.batch_size if needs.task.recipe.execution.batch_size else 1)
    shorter = "shorten --seqlen"
    if isinstance(needs.task.recipe, AlignRecipe):
        shorter, windows = "lower --max-length", windows if lower else "one pair at a time"
    lighter = f"{lower}or {shorter}, for --parameters {needs.task.recipe.parameters}"
    cuda = needs.model.cuda
    of_what = " of main memory" if cuda else ""
    host = MemoryBudget(
        f"{given}{of_what}",
        limit,
        1,
        needs.host_stages if cuda else needs.stages,
        suffix=" (main memory)" if cuda else "",
        even=windows,
        lighter=lighter,
        option="--data",
    )
    if not cuda:
        return [host]
    free = max(1, resources.free[device] - DEVICE_RESERVE)
    gpu = MemoryBudget(
        f"the {size(free)} that are free on {device}",
        free,
        1,
        needs.stages,
        kind="GPU memory",
        quantity=DEVICE,
        even=windows,
        more="free some of it",
        lighter=lighter,
        option="--data",
    )
    return [gpu, host]
