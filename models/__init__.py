"""Models and tasks. Knows nothing of federation or privacy.

A model that a run released, for use::

    from medfed.models import load

    chances = load("runs/demo").predict(inputs)

``load`` is imported when it is first used: importing this package is light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medfed.models.loading import TrainedModel, load

__all__ = ["TrainedModel", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medfed.models import loading

    found: object = getattr(loading, name)
    return found
