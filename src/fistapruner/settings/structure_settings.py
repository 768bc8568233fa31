"""Define the recipe section ``structure``: how much of a model is removed, and how it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from .base import Settings
from .loading import read_share

StructureMethod = Literal["auto", "obs", "energy", "flap", "magnitude", "goa", "bypass"]
"""Ways to choose the channels that are removed."""

FEW = 0.2
"""Largest share to remove for which ``auto`` is ``energy``; from measurements at 12.5 and 25 % (docs/results.md)."""

AS_PUBLISHED: Mapping[StructureMethod, Literal["bias", "none"]] = {"flap": "bias", "goa": "none", "bypass": "none"}
"""How published methods make up for removed channels, which is what ``compensate: auto`` does with them."""

EXPECTED = (
    "a share such as 25%, or mlp=20% (share of the channels), mlp=1024 (width to keep), heads=1 (key/value groups to "
    "remove), experts=25% or experts=8 (experts to remove), or several of these with commas is expected"
)


def compensation_of(
    method: StructureMethod, compensate: Literal["auto", "refit", "bias", "none"]
) -> Literal["refit", "bias", "none"]:
    """Resolve ``auto`` of how removed channels are made up for."""
    return AS_PUBLISHED.get(method, "refit") if compensate == "auto" else compensate


def removes_nothing(value: Any) -> bool:
    """Check whether an amount is none, as users write it."""
    return value is None or value == {} or (isinstance(value, str) and value.strip() in ("", "none"))


def _amount(value: Any) -> float | int | None:
    """Read a share (float) or a count of 1 or more (int)."""
    share, text = read_share(value), str(value).strip()
    if value is None or share is not None:
        return share
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(EXPECTED)
    return int(text)


def _count(value: Any) -> int | None:
    """Read a count of 1 or more."""
    count = _amount(value)
    if isinstance(count, float):
        raise ValueError("a number of key/value groups is expected, such as heads=1")
    return count


Amount = Annotated[float | int | None, BeforeValidator(_amount)]


class Remove(Settings):
    """Say how much is removed; it reads and writes itself as users do, ``25%`` or ``mlp=20%,heads=1``.

    Args:
        share: of the decoder layers' parameters, as MLP channels.
        mlp: share of the MLP channels (float), or their number to keep (int).
        heads: key/value groups to remove from every decoder layer.
        experts: share (float) or number (int) of the experts of every mixture.
    """

    share: Amount = None
    mlp: Amount = None
    heads: Annotated[int | None, BeforeValidator(_count)] = None
    experts: Amount = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if (share := read_share(value)) is not None:
            return {"share": share}
        if isinstance(value, str):
            parts = [part.partition("=") for part in value.split(",")]
            value = (
                {name.strip(): amount for name, _, amount in parts} if all(equals for _, equals, _ in parts) else None
            )
        if not isinstance(value, (Mapping, Remove)):
            raise ValueError(EXPECTED)
        return value

    @model_serializer
    def _written(self) -> str:
        return str(self)

    def __str__(self) -> str:
        given = {name: getattr(self, name) for name in ("mlp", "heads", "experts")}
        written = {
            name: f"{100 * amount:.10g}%" if isinstance(amount, float) else str(amount)
            for name, amount in given.items()
            if amount is not None
        }
        return ",".join(map("=".join, written.items())) if self.share is None else f"{100 * self.share:.10g}%"

    @property
    def only_experts(self) -> bool:
        """Whether experts are removed, and no channels or heads."""
        return self.share is None and self.mlp is None and self.heads is None


class Structure(Settings):
    """Set how many channels, heads and experts are removed; the result is a smaller model."""

    remove: Annotated[Remove | None, BeforeValidator(lambda value: None if removes_nothing(value) else value)] = Field(
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
        "most 20% of the channels or parameters go and no heads, and obs otherwise.",
    )
    compensate: Literal["auto", "refit", "bias", "none"] = Field(
        "auto",
        description="Least-squares weights of the remaining channels, and bias where the operator has one (refit), "
        "their weights as they were with the mean of what is removed added to that bias (bias), or nothing (none). "
        "auto is bias for flap and none for goa and bypass, as published, and refit for the others.",
    )
    multiple: int = Field(
        64,
        ge=1,
        description="Widths are rounded to a multiple of this; a width that is given is taken as it is.",
    )
    steps: int = Field(
        1000,
        ge=1,
        description="Steps of bypass, each two forward passes of 1,024 tokens; the paper takes 15000.",
    )

    @model_validator(mode="after")
    def _of_something(self) -> Structure:
        """Refuse settings that have no effect."""
        for name in sorted(self.model_fields_set - {"remove"}):
            value = getattr(self, name)
            if value == type(self).model_fields[name].default or (name, value) == ("method", "obs"):
                continue  # obs may be auto, resolved
            if self.remove is None:
                raise ValueError(f"{name} is {value}, but nothing is removed: give --structure 25% or the like")
            if self.remove.only_experts:
                raise ValueError(f"{name} is {value}, but only experts are removed: this is for channels and heads")
            if name == "steps" and self.method != "bypass":
                raise ValueError(f"steps is {value}, but that is for --structure-method bypass")
        return self

    def resolved(self, earlier: StructureMethod | None = None) -> Structure:
        """Return these settings with ``auto`` of the method resolved; ``earlier``: what a begun run has."""
        if self.method != "auto":
            return self
        share = None if self.remove is None else self.remove.share or self.remove.mlp
        few = self.remove is not None and isinstance(share, float) and share <= FEW and self.remove.heads is None
        return self.model_copy(update={"method": earlier or ("energy" if few else "obs")})

    @property
    def experts(self) -> float | int | None:
        """Share (float) or number (int) of the experts of every mixture to remove; None without."""
        return None if self.remove is None else self.remove.experts

    @property
    def compensation(self) -> Literal["refit", "bias", "none"]:
        """How removed channels are made up for: ``compensate`` with ``auto`` resolved."""
        return compensation_of(self.method, self.compensate)
