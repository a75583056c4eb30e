"""The base of every configuration model: frozen, strict about unknown fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]


class FrozenConfig(BaseModel):
    """A configuration value: immutable, refuses unknown fields, carries a unit in each field name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
