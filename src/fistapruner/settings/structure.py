"""Define the recipe section ``structure``: how much of a model is removed, and how it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from .base import Settings
from .parse import read_share

StructureMethod = Literal["auto", "obs", "energy", "flap", "magnitude", "goa", "bypass"]
"""Ways to choose the channels that are removed."""

FEW = 0.2
"""Largest share to remove for which ``auto`` is ``energy``; from measurements at 12.5 and 25 % (docs/results.md)."""

AS_PUBLISHED: Mapping[StructureMethod, Literal["bias", "none"]] = {"flap": "bias", "goa": "none", "bypass": "none"}
"""How published methods make up for removed channels, which is what ``compensate: auto`` does with them."""


def compensation_of(
    method: StructureMethod, compensate: Literal["auto", "refit", "bias", "none"]
) -> Literal["refit", "bias", "none"]:
    """Resolve ``auto`` of how removed channels are made up for."""
    return AS_PUBLISHED.get(method, "refit") if compensate == "auto" else compensate


def _amount(value: Any) -> float | int | None:
    """Read a share (float) or a count of 1 or more (int)."""
    share, text = read_share(value), str(value).strip()
    if value is None or share is not None:
        return share
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError("a share such as 25%, or a number of 1 or more, is expected")
    return int(text)


Amount = Annotated[float | int | None, BeforeValidator(_amount)]


class Remove(Settings):
    """Say how much is removed; ``25%`` or ``mlp=20%,heads=1`` are read, too.

    Args:
        share: of the decoder layers' parameters, as MLP channels.
        mlp: share of the MLP channels (float), or their number to keep (int).
        heads: key/value groups to remove from every decoder layer.
        experts: share (float) or number (int) of the experts of every mixture.
    """

    share: Annotated[float | None, BeforeValidator(_amount), Field(lt=1)] = None
    mlp: Amount = None
    heads: Annotated[int | None, Field(ge=1)] = None
    experts: Amount = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if (share := read_share(value)) is not None:
            return {"share": share}
        if isinstance(value, str) and "=" in value:
            return {name.strip(): amount for name, _, amount in (part.partition("=") for part in value.split(","))}
        if not isinstance(value, (Mapping, Remove)):
            raise ValueError("a share such as 25%, or mlp=20%,heads=1,experts=25% or some of these, is expected")
        return value

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {name: amount for name in type(self).model_fields if (amount := getattr(self, name)) is not None}

    def __str__(self) -> str:
        """Write it as users do: ``25%`` or ``mlp=20%,heads=1``."""
        written = {
            name: f"{100 * amount:.10g}%" if isinstance(amount, float) else str(amount)
            for name, amount in self._given().items()
        }
        return written.pop("share") if set(written) == {"share"} else ",".join(map("=".join, written.items()))


class Structure(Settings):
    """Set how many channels, heads and experts are removed; the result is a smaller model."""

    remove: Annotated[Remove | None, BeforeValidator(lambda value: None if value in ("none", {}) else value)] = Field(
        None,
        description="Amount to remove: 25%, or mlp=20%,heads=1,experts=25%. A share alone is of the decoder layers' "
        "parameters, as MLP channels; mlp a share of the MLP channels, or their number to keep; heads a number of "
        "key/value groups of every attention; experts a share or number of the experts of every mixture.",
    )
    method: StructureMethod = Field(
        "auto",
        description="Choice of the channels: greedy elimination by what the others cannot make up for (obs), energy of "
        "the channel's outputs (energy), its fluctuation (flap), the norm of its weights (magnitude), GOA's criteria "
        "(goa), or probabilities to stay that are learned from forward passes (bypass, takes long). auto is energy "
        "where at most 20% of the channels or parameters go and no heads, and obs otherwise.",
    )
    compensate: Literal["auto", "refit", "bias", "none"] = Field(
        "auto",
        description="Least-squares weights of the remaining channels, and bias where the operator has one (refit), "
        "their weights as they were with the mean of what is removed added to that bias (bias), or nothing (none). "
        "auto is bias for flap and none for goa and bypass, as published, and refit for the others.",
    )
    multiple: int = Field(
        64, ge=1, description="Widths are rounded to a multiple of this; a width that is given is taken as it is."
    )
    steps: int = Field(
        1000, ge=1, description="Steps of bypass, each two forward passes of 1,024 tokens; the paper takes 15000."
    )

    @model_validator(mode="before")
    @classmethod
    def _amount_alone(cls, value: Any) -> Any:
        return {"remove": value} if isinstance(value, (str, int, float)) else value

    @property
    def resolved(self) -> Structure:
        """These settings with ``auto`` of the method resolved."""
        if self.method != "auto" or self.remove is None:
            return self
        share = self.remove.share or self.remove.mlp
        few = isinstance(share, float) and share <= FEW and self.remove.heads is None
        return self.model_copy(update={"method": "energy" if few else "obs"})

    @property
    def experts(self) -> float | int | None:
        """Share (float) or number (int) of the experts of every mixture to remove; None without."""
        return None if self.remove is None else self.remove.experts

    @property
    def compensation(self) -> Literal["refit", "bias", "none"]:
        """How removed channels are made up for: ``compensate`` with ``auto`` resolved."""
        return compensation_of(self.method, self.compensate)
