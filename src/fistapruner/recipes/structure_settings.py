"""Define the recipe section ``structure``: how much of a model is removed, and how it is chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .base import Settings, word_or_number
from .loading import read_share

StructureMethod = Literal["auto", "obs", "energy", "flap", "magnitude", "goa", "bypass"]
"""Ways to choose the channels that are removed."""

FEW = 0.2
"""Largest share to remove for which ``auto`` is ``energy``; from measurements at 12.5 and 25 % (docs/structure.md)."""

AS_PUBLISHED: Mapping[StructureMethod, Literal["bias", "none"]] = {"flap": "bias", "goa": "none", "bypass": "none"}
"""How published methods make up for removed channels, which is what ``compensate: auto`` does with them."""


def compensation_of(
    method: StructureMethod, compensate: Literal["auto", "refit", "bias", "none"]
) -> Literal["refit", "bias", "none"]:
    """Resolve ``auto`` of how removed channels are made up for."""
    return AS_PUBLISHED.get(method, "refit") if compensate == "auto" else compensate


EXPECTED = (
    "a share such as 25%, or mlp=20% (share of the channels), mlp=1024 (width to keep), heads=1 (key/value groups to "
    "remove), experts=25% or experts=8 (experts to remove), or several of these with commas is expected"
)


def removes_nothing(value: Any) -> bool:
    """Check whether an amount is none, as users write it."""
    return value is None or value == {} or (isinstance(value, str) and value.strip() in ("", "none"))


def _remove(value: Any) -> Any:
    """Write an amount in one way: ``25%``, ``mlp=20%`` or ``mlp=1024``."""
    if removes_nothing(value):
        return None
    if (share := read_share(value)) is not None:
        return f"{100 * share:.10g}%"
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        value = {name: amount for name, equals, amount in parts if equals}
        if len(value) < len(parts):
            raise ValueError(EXPECTED)
    if not isinstance(value, Mapping):
        raise ValueError(EXPECTED)
    units = {str(name).strip(): amount for name, amount in value.items()}
    if others := set(units) - {"mlp", "heads", "experts"}:
        raise ValueError(f"{', '.join(sorted(others))}: what is removed is mlp, heads or experts; {EXPECTED}")
    written = []
    for name in ("mlp", "heads", "experts"):
        if name not in units:
            continue
        share = None if name == "heads" else read_share(units[name])
        written.append(f"{name}={_count(name, units[name]) if share is None else f'{100 * share:.10g}%'}")
    return ",".join(written) or None


def _count(name: str, value: Any) -> int:
    """Read a number of 1 or more."""
    if re.fullmatch(r"\s*0*\.?0+\s*%?\s*", str(value)):
        raise ValueError(f"{name}={value}: more than 0 is expected; leave {name} out to remove nothing of it")
    if isinstance(value, bool) or not re.fullmatch(r"\s*[1-9][0-9]*\s*", str(value)):
        raise ValueError(EXPECTED)
    return int(value)


Shrinkage = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=0.0, le=1.0)],
    word_or_number("auto", "auto, or a number from 0 to 1 is expected", lambda number: 0 <= number <= 1),
]


class Structure(Settings):
    """Set how many channels, heads and experts are removed; the result is a smaller model."""

    remove: Annotated[str | None, BeforeValidator(_remove)] = Field(
        None,
        description="Share of the decoder layers' parameters to remove as whole MLP channels, of experts too: 25%, or "
        "of the channels: mlp=20%, or the width to keep: mlp=1024; key/value groups of attention heads to remove: "
        "heads=1 or mlp=20%,heads=1; experts of mixtures to remove whole: experts=25%, experts=8 or "
        "mlp=20%,experts=25%. The result is an ordinary smaller model. Without it nothing is removed.",
    )
    method: StructureMethod = Field(
        "auto",
        description="Choice of the channels: greedy elimination with the error that the other channels cannot make up "
        "for (obs), energy of the channel's outputs (energy), its fluctuation (flap), the norm of its weights "
        "(magnitude), GOA's criteria for heads and channels after its reconstruction (goa), or probabilities to stay "
        "that are learned from forward passes of the whole model (bypass, takes long). auto is energy where at "
        "most 20% of the channels or parameters go, no heads, and as many from every layer, and obs otherwise.",
    )
    compensate: Literal["auto", "refit", "bias", "none"] = Field(
        "auto",
        description="Least-squares weights of the remaining channels, and bias where the operator has one (refit), "
        "their weights as they were with the mean of what is removed added to that bias (bias), or nothing (none). "
        "auto is bias for flap and none for goa and bypass, as published, and refit for the others.",
    )
    shrink: Shrinkage = Field(
        "auto",
        description="Shrinkage of the Gram towards its diagonal for obs and refit, from 0 (none) to 1; auto is chosen "
        "by cross-validation for each layer.",
    )
    multiple: int = Field(
        64,
        ge=1,
        description="Widths are rounded to a multiple of this; a width that is given is taken as it is.",
    )

    widths: Literal["uniform", "free"] = Field(
        "uniform",
        description="The same number of channels and heads in every layer, which every engine loads (uniform), or more "
        "where they matter more, at the same total (free): loaded by transformers after import fistapruner, by "
        "llama.cpp as an exported Llama, and by no other engine.",
    )
    steps: int = Field(
        1000,
        ge=1,
        description="Steps of bypass, each two forward passes of 1,024 tokens; the paper takes 15000.",
    )
    lr: float | None = Field(
        None,
        gt=0.0,
        description="Learning rate of bypass; without it 0.002, the paper's, times 15000 / steps, at most 0.05.",
    )
    baseline: Literal["moving", "leave-one-out"] = Field(
        "moving",
        description="What bypass compares a loss with: a moving mean of the losses, as published, or the other mask's.",
    )

    def resolved(self, earlier: StructureMethod | None = None) -> Structure:
        """Return these settings with ``auto`` of the method resolved; ``earlier``: what a begun run has."""
        if self.method != "auto":
            return self
        share = self.channels if self.share is None else self.share
        few = isinstance(share, float) and share <= FEW and not self.heads and self.widths == "uniform"
        return self.model_copy(update={"method": earlier or ("energy" if few else "obs")})

    @property
    def compensation(self) -> Literal["refit", "bias", "none"]:
        """How removed channels are made up for: ``compensate`` with ``auto`` resolved."""
        return compensation_of(self.method, self.compensate)

    @property
    def share(self) -> float | None:
        """Share of the decoder layers' parameters to remove; None where another amount is given, or none."""
        return None if self.remove is None or "=" in self.remove else read_share(self.remove)

    @property
    def channels(self) -> float | int | None:
        """Share of the MLP channels to remove (float) or their number to keep (int); None without."""
        return self._amount("mlp")

    @property
    def heads(self) -> int:
        """Key/value groups to remove from every decoder layer."""
        return int(self._unit("heads") or 0)

    @property
    def experts(self) -> float | int | None:
        """Share (float) or number (int) of the experts of every mixture to remove; None without."""
        return self._amount("experts")

    @property
    def only_experts(self) -> bool:
        """Whether experts are removed, and no channels or heads."""
        return self.remove is not None and self.share is None and self.channels is None and not self.heads

    def no_effect(self, setting: str) -> str | None:
        """Say why a setting has no effect beside the others; None where it has one."""
        if setting == "remove" or (setting == "method" and self.method == "obs"):  # obs may be auto, resolved
            return None
        if self.remove is None:
            return "nothing is removed: give --structure 25% or the like"
        if self.only_experts:
            return "only experts are removed, by REAP's criterion: this setting is for channels and heads"
        if setting in ("steps", "lr", "baseline") and self.method != "bypass":
            return f"the method is {self.method}: this setting is for --structure-method bypass"
        shrinks = self.method in ("auto", "obs") or self.compensation == "refit" or self.widths == "free"
        if setting == "shrink" and not shrinks:
            return (
                f"the method is {self.method} and compensation is {self.compensation}: this setting is for "
                "--structure-method obs or --structure-compensate refit"
            )
        rounds = self.share is not None or isinstance(self.channels, float)
        if setting == "multiple" and not rounds and (self.channels is None or self.widths == "uniform"):
            return "no width is rounded: this setting is for a share of the channels or parameters"
        return None

    def _amount(self, name: str) -> float | int | None:
        """Return a unit's amount as a share (float) or a number (int); None where it is not given."""
        amount = self._unit(name)
        return None if amount is None else read_share(amount) if amount.endswith("%") else int(amount)

    def _unit(self, name: str) -> str | None:
        """Return the amount of one unit; None where it is not given."""
        if self.remove is None or "=" not in self.remove:
            return None
        return dict(part.split("=", 1) for part in self.remove.split(",")).get(name)
