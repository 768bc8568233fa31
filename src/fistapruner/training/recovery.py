"""What ``recover`` does in its own way: text, and divergence from the dense model or cross-entropy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..errors import FistaPrunerError
from ..models.source import ModelSource
from ..papers.mamf import Mixture
from ..pruning.workers import default_threads
from ..runs.directory import RecoverDirectory, TrainingDirectory
from ..runs.lineage import input_run
from ..runs.listener import Listener
from ..runs.settled import stamps
from ..runtime.devices import cpu_threads, release_memory
from ..runtime.files import sha256_file
from ..runtime.numerics import dtype_name
from ..runtime.show import count
from ..settings.train import RecoverRecipe
from ..text import SELF
from ..text.generate import load_writer
from ..text.sources import check_source
from ..text.training import MAX_HELD_OUT_WINDOWS, PURPOSE, TrainingText, order, training_text
from .loss import TokenLoss
from .objective import Objective
from .opened import Training
from .settle import Inputs, Request, named_dense


class Recovery(Training):
    """An opened run of ``recover``."""

    verb: ClassVar[str] = "recover"
    settings: ClassVar[type[Any]] = RecoverRecipe
    directory: ClassVar[type[TrainingDirectory]] = RecoverDirectory
    window: ClassVar[str] = "seqlen"
    recipe: RecoverRecipe

    @staticmethod
    def check_text(recipe: RecoverRecipe) -> None:
        """See :class:`.Training`."""
        for text in recipe.data.texts:
            check_source(text, PURPOSE)

    @staticmethod
    def resolved(request: Request[RecoverRecipe], source: ModelSource) -> RecoverRecipe:
        """Take the text of the input's run where the user names none.

        Raises:
            FistaPrunerError: the text is not said, and the input is no run that names one.
        """
        recipe, data = request.recipe, request.recipe.data
        if not data.texts:
            origin = input_run(request.model)
            record = None if origin is None else origin.record()
            if record is None or record.calibration is None or record.kind == "align":  # pairs are no text
                raise FistaPrunerError("say what to train on with --data: self, python, c4, or a text file")
            tasks = {name: str(task.source) for name, task in record.calibration.tasks.items()}
            single = next(iter(tasks.values()), record.calibration.source)
            data = data.model_copy(update={"source": tasks if len(tasks) > 1 else single})
            recipe = recipe.model_copy(update={"data": data})
            Recovery.check_text(recipe)
        return recipe.with_absolute_files()

    @staticmethod
    def check(inputs: Inputs[RecoverRecipe], request: Request[RecoverRecipe], listener: Listener) -> None:
        """Choose the loss, and refuse too few steps for the tasks."""
        if inputs.recipe.loss == "auto":
            if inputs.dense is None:
                named, _ = named_dense(request.model, inputs.source)
                why = "is not known" if named is None else f"is not found, which was {named}"
                inputs.warnings.append(
                    f"the dense model {why}: the loss is that of the text (ce); better give --dense MODEL"
                )
                listener.say(inputs.warnings[-1])
            loss = "ce" if inputs.dense is None else "kl"
            inputs.recipe = inputs.recipe.model_copy(update={"loss": loss})
        check_mixture(inputs.recipe, inputs.seqlen)

    @staticmethod
    def sizes(inputs: Inputs[RecoverRecipe], listener: Listener) -> tuple[None, dict[str, int]]:
        """See :class:`.Training`: text is cut after the plan, since it may be generated."""
        recipe, seqlen, held_out = inputs.recipe, inputs.seqlen, MAX_HELD_OUT_WINDOWS
        stored = 0 if recipe.loss == "ce" else recipe.windows_of(seqlen) + held_out
        return None, {"seqlen": seqlen, "steps": recipe.steps_of(seqlen), "stored": stored, "held_out": held_out}

    @staticmethod
    def cut(
        run: TrainingDirectory, inputs: Inputs[RecoverRecipe], text: TrainingText | None, listener: Listener
    ) -> TrainingText:
        """Read the text, hold documents out, and cut windows, unless an attempt that was stopped has done so."""
        recipe, data, generator = inputs.recipe, inputs.recipe.data, inputs.dense or inputs.model
        windows = recipe.windows_of(inputs.seqlen)
        files = {text: sha256_file(Path(text)) for text in data.texts if Path(text).is_file()}
        tokenizer = {name: sha256_file(inputs.source.folder / name) for name in inputs.model.checkpoint.companions}
        place = [inputs.seqlen, generator.device.type, dtype_name(generator.dtype), files, tokenizer]
        if SELF in data.texts:
            place += [stamps(generator.checkpoint), windows]
        drawing = json.dumps([data.model_dump(mode="json"), *place])
        known = run.text(drawing)
        if known is not None:
            return known

        def load_model() -> Any:
            source, samples = inputs.dense_source or inputs.source, windows + MAX_HELD_OUT_WINDOWS
            limit = recipe.execution.memory_limit
            return load_writer(source, generator, samples, inputs.seqlen, limit, "--data")

        tokens, texts = min(data.tokens, windows * inputs.seqlen), ", ".join(data.texts)
        listener.say(f"training text: {count(tokens)} tokens in windows of {inputs.seqlen} from {texts}")
        with cpu_threads(default_threads(recipe.execution)):
            made = training_text(data, inputs.tokenizer, inputs.seqlen, load_model, listener.say, windows)
        inputs.model.check_tokens(made.tokens)
        run.write_text(made, drawing)
        release_memory()  # documents
        return made

    def order(self) -> Tensor:
        """See :class:`.Training`."""
        return order(self.text, self.decision.steps, self.recipe.windows_per_step, self.recipe.data)

    def objective(self, run: Any, windows: Tensor, listener: Listener) -> Objective:
        """See :class:`.Training`."""
        loss, teacher = TokenLoss.named(str(self.recipe.loss)), None
        if loss.share:
            held_out = self.text.held_out.nonzero().flatten().tolist()
            teacher = self.teacher([*held_out, *windows.flatten().tolist()], listener)
        return Objective(self.model, run, self.text, loss, teacher, **self.passes)


def check_mixture(recipe: RecoverRecipe, seqlen: int) -> None:
    """Refuse too few steps or tokens for the tasks of a mixture, in windows of ``seqlen`` tokens.

    Raises:
        FistaPrunerError: names the windows that it needs, and the steps or tokens that make them.
    """
    data = recipe.data
    if len(data.tasks) > 1:
        windows = min(recipe.steps_of(seqlen) * recipe.windows_per_step, recipe.windows_of(seqlen))
        mixture = Mixture(len(data.tasks), data.per_round, data.seed)
        steps = -(-mixture.least // recipe.windows_per_step)
        more = [f"at least {steps} steps"] if recipe.steps is not None and recipe.steps < steps else []
        if recipe.steps is None:
            more = [f"at least {steps * recipe.windows_per_step * seqlen} tokens"]
        elif -(-data.tokens // seqlen) < mixture.least:
            more.append(f"at least {mixture.least * seqlen} tokens")
        mixture.draw(windows, " and ".join(more))
