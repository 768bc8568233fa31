"""Base of all settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all sections: frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
