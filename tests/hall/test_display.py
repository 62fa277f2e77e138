"""Strangers' text on a terminal: escaped where it could hide, reorder or imitate, and marked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.display import block, shown


@pytest.mark.parametrize("text", ["plain ASCII, 100 %", "Universitätsklinikum Köln", "5 µmol/l ± 2 °C", "Łódź"])
def test_shown_honest_text_stands_as_it_is(text):
    assert shown(text) == text


@pytest.mark.parametrize(
    ("text", "escape"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("a\u200bb", "a\\u200bb"),
        ("p\u0430id", "p\\u0430id"),  # Cyrillic a
        ("\uff45psilon", "\\uff45psilon"),  # full-width e
        ("\u05d0", "\\u05d0"),  # Hebrew letters turn the line around without any override
        ("line\nline", "line\\nline"),
        ("a\u0336b", "a\\u0336b"),  # struck through
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_shown_misleading_character_is_escaped_and_marked(text, escape):
    assert shown(text) == f"{escape} [!! 1 characters escaped: invisible or misleading]"


def test_shown_backslash_is_doubled_so_that_no_text_can_pretend_to_be_an_escape():
    assert shown("\\u202e") == "\\\\u202e"


@given(st.text())
def test_shown_any_text_is_printable_on_one_line(text):
    assert shown(text).isprintable()


@given(st.text(min_size=1))
def test_block_any_text_is_marked_at_every_line(text):
    assert all(line.startswith("  | ") and len(line) <= 100 for line in block(text))
