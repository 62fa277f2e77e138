"""Versioned, size-bounded messages <-> bytes."""

from __future__ import annotations


def enc(*parts: bytes) -> bytes:
    """Unambiguous encoding of byte strings: for each part its length as 4 bytes big-endian, then the part."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
