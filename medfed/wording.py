"""Numbers in sentences: one hospital, two hospitals; and the attempts of a study, each kind by its name."""

from __future__ import annotations

from collections.abc import Mapping


def counted(number: int, one: str, many: str = "") -> str:
    """``1 hospital``, ``3 hospitals``; ``many`` where it is not ``one`` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def rounds_by_kind(rounds: Mapping[str, int]) -> str:
    """`` (20 of training, 1 of metrics)``, to follow their sum; nothing where all are of one kind."""
    if len(rounds) < 2:
        return ""
    return f" ({', '.join(f'{number} of {kind}' for kind, number in rounds.items())})"


def asked_attempts(rounds: int, spare_attempts: int, statistics: int, metrics: int) -> str:
    """``15 rounds, 3 spare attempts, 2 attempts at the metrics``: all that a study's list of attempts consists of."""
    parts = [counted(rounds, "round"), counted(spare_attempts, "spare attempt")]
    parts += [
        f"{counted(number, 'attempt')} at the {what}"
        for number, what in ((statistics, "statistics"), (metrics, "metrics"))
        if number
    ]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
