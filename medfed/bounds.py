"""What names and numbers in files that people write may be."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Column = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_ .-]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e12, le=1e12)]
Scale = Annotated[float, Field(gt=1e-12, le=1e12, allow_inf_nan=False)]
