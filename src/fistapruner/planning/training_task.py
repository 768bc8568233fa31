"""Describe a run that trains, as its plan sees it, and the settings that the plan may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..calibration.training_text import MAX_HELD_OUT_WINDOWS, file_windows
from ..models.files.low_rank import LowRankAdapter
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.training_settings import TrainingRecipe
from ..runtime.numerics import windows_at_once
from ..tuning.losses import TokenLoss
from ..tuning.teacher import TOP


@dataclass(frozen=True)
class TrainingChoice:
    """Settings that a plan may change to make a run that trains fit.

    Args:
        batch_size: windows in one pass.
        teacher_windows: windows whose predictions by the dense model the disk holds at once; None is all.
        keep_graphs: no decoder layer runs twice for a gradient: the activations of all of them stay in memory.
    """

    batch_size: int
    teacher_windows: int | None = None
    keep_graphs: bool = False

    def words(self) -> list[str]:
        """List what differs from a run whose layers run twice for a gradient."""
        return [
            *(["no layer runs twice"] if self.keep_graphs else []),
            *([] if self.teacher_windows is None else ["the dense model's predictions in rounds"]),
        ]


@dataclass(frozen=True)
class Task:
    """What is to be planned.

    Args:
        model: the pruned model; ``layout``: its operators to train.
        dense: the dense model, whose predictions are stored; None where the loss does not need them.
        recipe: all settings, resolved.
        survivors: weights of each operator that are not zero, by full name; an operator that is missing has all.
        seqlen: tokens in a window.
        out: the run directory; its disk must have the free space.
        loss: of tokens; ``top``: tokens of the dense model's predictions that are stored, None stores hidden states.
        steps: optimizer steps; ``step_windows``: windows of one.
        windows: to train on, at most; ``held_out``: windows that are held out, at most; ``test``: of the test pairs.
        fill: share of the passes that are not padding.
        together: windows that no pass may part.
        generator: the dense model where it generates the training text; else None.
        answers: windows of the pairs whose log-probabilities are computed before and after training, by model.
        low_rank: the low-rank part that belongs to the model.
    """

    model: LayerwiseModel
    layout: Layout
    dense: LayerwiseModel | None
    recipe: TrainingRecipe
    survivors: Mapping[str, int]
    seqlen: int
    out: Path
    loss: TokenLoss
    top: int | None
    steps: int
    step_windows: int
    windows: int
    held_out: int
    test: int = 0
    fill: float = 1.0
    together: int = 1
    generator: LayerwiseModel | None = None
    answers: tuple[int, ...] = ()
    low_rank: LowRankAdapter | None = None

    @classmethod
    def of_recovery(
        cls,
        model: LayerwiseModel,
        layout: Layout,
        dense: LayerwiseModel | None,
        recipe: RecoverRecipe,
        survivors: Mapping[str, int],
        seqlen: int,
        out: Path,
        generator: LayerwiseModel | None = None,
    ) -> Task:
        """Plan a recovery: steps and windows are those that the asked tokens make.

        Windows are no more than a text file fills.
        """
        windows, there = recipe.windows_of(seqlen), file_windows(recipe.data.texts, seqlen)
        return cls(
            model,
            layout,
            dense,
            recipe,
            survivors,
            seqlen,
            out,
            TokenLoss.named(str(recipe.loss), recipe.mix),
            TOP.get(recipe.teacher),
            steps=recipe.steps_of(seqlen),
            step_windows=recipe.windows_per_step,
            windows=windows if there is None else min(windows, there),
            # Whole documents are held out, so a small share may fill many windows.
            held_out=max(MAX_HELD_OUT_WINDOWS, len(recipe.data.tasks)),
            generator=generator,
        )

    @property
    def text_bytes(self) -> int:
        """Bytes of the training text: token ids, and which of them carry loss."""
        return 9 * (self.windows + self.held_out + self.test) * self.seqlen

    @property
    def batch_size(self) -> int:
        """Windows in one pass, if they fit."""
        asked = self.recipe.execution.batch_size or windows_at_once(self.seqlen, self.model.device)
        return self.whole(min(self.step_windows, asked))

    def whole(self, windows: int) -> int:
        """Round a number of windows in one pass so that none is parted from those it belongs to."""
        return max(1, windows // self.together) * self.together
