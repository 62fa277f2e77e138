"""Text of strangers on a terminal: what would hide, reorder or imitate is escaped and marked (threats.md, row 46).

A study's text is written by the coordinator and read by the person who decides. Shown raw, an escape sequence could
paint another epsilon over the true one, a bidirectional override could turn a sentence around, and a Cyrillic letter
could make of one hospital's name another's.
"""

from __future__ import annotations

import textwrap
import unicodedata

_SYMBOLS = frozenset("°±²³µ·×÷£§€–—‘’“”…≤≥ȘșȚț")
_IMITATING = frozenset("ıĸŉſ")  # within the range of European letters below


def shown(text: str) -> str:
    """``text`` on one line of printable characters; escapes are counted at its end so that nobody overlooks them.

    Plain ASCII, European Latin letters and a few symbols stand as they are. All else (controls, newlines, marks,
    directions, other scripts) stands as ``\\x1b``, ``\\u202e``, ``\\u0430``; a backslash is doubled.
    """
    characters = unicodedata.normalize("NFC", text)
    doubtful = sum(not _is_plain(character) for character in characters)
    escaped = "".join(_escaped(character) for character in characters)
    return f"{escaped} [!! {doubtful} characters escaped: invisible or misleading]" if doubtful else escaped


def block(text: str, *, width: int = 100) -> list[str]:
    """A longer text, shown, wrapped and marked as a quotation at every line, so that it cannot pass for our own words."""
    return [f"  | {line}" for line in textwrap.wrap(shown(text), width - 4)]


def _is_plain(character: str) -> bool:
    return " " <= character <= "~" or ("À" <= character <= "ž" and character not in _IMITATING) or character in _SYMBOLS


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    return character if _is_plain(character) else character.encode("unicode_escape").decode()
