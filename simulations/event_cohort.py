"""Invented histories of diagnoses, drugs and procedures: for first trials without data. They say nothing about medicine."""

from __future__ import annotations

import numpy as np

from medfed.simulations.extract import PATIENT_COLUMN, EventRows, Extract

Generator = np.random.Generator

DAYS = 1500
_EVENTS = (8, 40)  # usual events of a patient
# what everybody has: diagnoses (ICD-10), drugs (ATC), procedures
_USUAL = (
    *(
        "I10",
        "E78.5",
        "E11.9",
        "M54.5",
        "J06.9",
        "K21.9",
        "F32.9",
        "N39.0",
        "H52.4",
        "L30.9",
        "Z00.0",
        "Z23",
        "J45.9",
        "M17.9",
    ),
    *("C09AA05", "C10AA05", "A10BA02", "N02BE01", "A02BC01", "N06AB04", "J01CA04", "R03AC02", "M01AE01", "B01AC06"),
    *(
        "XR-CHEST",
        "ECG",
        "BLOOD-COUNT",
        "LIPIDS",
        "HBA1C",
        "EYE-EXAM",
        "VACCINATION",
        "PHYSIO",
        "ULTRASOUND",
        "COLONOSCOPY",
    ),
)
_HEART = (
    "I50.9",
    "I48.9",
    "I25.1",
    "R60.0",
    "C03CA01",
    "B01AF02",
    "ECHO",
    "NT-PROBNP",
)
_MENDED = ("CABG", "ABLATION", "PACEMAKER")  # after which the same codes mean less


def histories(generator: Generator, prefix: str, count: int) -> Extract:
    """Who is admitted has codes of the heart, late and unmended; others have none, or long ago and mended since."""
    admitted = generator.integers(0, 2, count)
    owner, days, codes = [], [], []
    for row, is_admitted in enumerate(admitted.tolist()):
        found = sorted(_history(generator, bool(is_admitted)), key=lambda event: event[0])
        owner += [row] * len(found)
        days += [day for day, _ in found]
        codes += [code for _, code in found]
    columns = {
        PATIENT_COLUMN: tuple(f"{prefix}-{row:05d}" for row in range(count)),
        "admitted": tuple(str(value) for value in admitted.tolist()),
    }
    return Extract(columns, events=EventRows(np.array(owner, np.int64), np.array(days, np.int64), tuple(codes)))


def _history(generator: Generator, is_admitted: bool) -> list[tuple[int, str]]:
    usual = int(generator.integers(*_EVENTS))
    found = [(int(day), _one(generator, _USUAL)) for day in generator.integers(0, DAYS, usual)]
    if is_admitted:
        found += _of_heart(generator, int(generator.integers(1, 6)), DAYS - 200, DAYS)
    elif generator.random() < 0.25:
        found += _of_heart(generator, int(generator.integers(1, 4)), 0, DAYS // 2)
        found += [(DAYS // 2 + 30, _one(generator, _MENDED))] * int(generator.random() < 0.5)
    return found


def _of_heart(generator: Generator, events: int, first: int, last: int) -> list[tuple[int, str]]:
    return [(int(day), _one(generator, _HEART)) for day in generator.integers(first, last, events)]


def _one(generator: Generator, codes: tuple[str, ...]) -> str:
    return codes[int(generator.integers(len(codes)))]
