"""When two ids are one patient."""

from __future__ import annotations

import unicodedata


def one_spelling(patient_id: str) -> str:
    """The id as it counts: Unicode form NFC, without format characters (category Cf), without blanks at both ends.

    What looks the same on a screen (an accent as one character or two, a zero-width space, a byte order mark, a no-break
    space at the end) is the same person, who would else count as two and be protected as half. What looks different is
    somebody else: "001" and "1", "p7" and "P7" are two people, so ids must be written alike in every row and export.
    """
    if patient_id.isascii():
        return patient_id.strip()
    visible = "".join(character for character in patient_id if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", visible).strip()
