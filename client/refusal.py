"""How a part of the hospital says no to a request."""

from __future__ import annotations

from medfed.wire import Refused


class Refuse(Exception):
    """Answer this request with a reason from the fixed list; ``cause`` is for this hospital's own log."""

    def __init__(self, reason: Refused, cause: str) -> None:
        super().__init__(cause)
        self.reason = reason
        self.cause = cause
