"""Boxes of an upload, taken apart for tests."""

from medfed.privacy.secagg.protocol import BOX_ENTRY_BYTES


def split_boxes(data: bytes) -> dict[int, bytes]:
    """Entries whose order was checked, by position."""
    starts = range(0, len(data), BOX_ENTRY_BYTES)
    return {
        int.from_bytes(data[start : start + 2], "big"): data[start + 2 : start + BOX_ENTRY_BYTES] for start in starts
    }
