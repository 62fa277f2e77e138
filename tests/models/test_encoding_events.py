"""Histories of coded events: the last ones, in order, with how long before the last they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medfed.client.sources.event_table import read_events
from medfed.errors import DataError
from medfed.models.event_records import CodedEvents, encode_events, gaps
from medfed.models.text_records import hashed_word
from medfed.record_parts import GAPS, Events
from medfed.seams import SystemFiles

CONTRACT = Events(buckets=64, length=3)


def events(*rows: tuple[int, float, str]) -> CodedEvents:
    records, days, codes = zip(*rows, strict=True)
    return CodedEvents(np.array(records, np.int64), np.array(days, np.float64), codes)


def test_events_are_ordered_by_time_and_the_last_are_kept() -> None:
    found = encode_events(
        CONTRACT, 3, events((2, 9.0, "d"), (0, 5.0, "c"), (0, 1.0, "a"), (0, 2.0, "b"), (0, 5.0, "I10"))
    )
    assert found.dtype == np.int64
    assert found[0, :, 0].tolist() == [hashed_word(code, 64) for code in ("B", "C", "I10")]
    assert found[0, :, 1].tolist() == [65 + 2, 65, 65]
    assert not found[1].any()
    assert found[2].tolist() == [[hashed_word("D", 64), 65], [0, 0], [0, 0]]


def test_time_is_a_power_of_two_of_a_day() -> None:
    days = 100_000.0 - np.array([99_999.0, 365.0, 8.0, 7.9, 2.0, 1.0, 0.9, 0.0])
    assert gaps(days).tolist() == [GAPS - 1, 9, 4, 3, 2, 1, 0, 0]


def test_records_encoding_depends_on_its_own_events_alone() -> None:
    own = [(1, 3.0, "A"), (1, 8.0, "B")]
    alone = encode_events(CONTRACT, 2, events(*own))
    among = encode_events(CONTRACT, 2, events((0, 1.0, "Z"), own[0], (0, 99.0, "Y"), own[1]))
    np.testing.assert_array_equal(alone[1], among[1])


def _read(tmp_path: Path, text: str) -> CodedEvents:
    (tmp_path / "events.csv").write_text(text)
    return read_events(SystemFiles(), tmp_path / "events.csv", "patient", "days", "code", {"a": 0, "b": 1})


def test_table_of_events_is_read_with_dates_or_days(tmp_path: Path) -> None:
    dated = _read(tmp_path, "patient,days,code\nb,2024-03-01,I10\na,2024-02-28,E11.9\n")
    assert dated.records.tolist() == [1, 0]
    assert dated.days[0] - dated.days[1] == 2.0
    assert dated.codes == ("I10", "E11.9")
    assert _read(tmp_path, "patient,days,code\na,-3.5,I10\n").days.tolist() == [-3.5]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("c,3,I10", r'row 3, column "patient": its record is in no row'),
        ("a,soon,I10", r'row 3, column "days": value is neither a date nor a number'),
        ("a,,I10", r'row 3, column "days": value is missing'),
        ("a,2024-03-01,I10", r'row 3, column "days": value is of another kind'),
        ("a,3,", r'row 3, column "code": value is missing'),
        (f"a,3,{'x' * 65}", r'row 3, column "code": value has more than 64'),
    ],
)
def test_faulty_event_is_refused_by_row_and_column(tmp_path: Path, line: str, fault: str) -> None:
    with pytest.raises(DataError, match=f"MF-301 .*in the events, {fault}"):
        _read(tmp_path, f"patient,days,code\na,1,I10\n{line}\n")
