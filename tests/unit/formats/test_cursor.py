# SPDX-License-Identifier: MIT OR Apache-2.0
"""The bounds-checked cursor, against a model that slices."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import U16, Record, record


@record(size=4, byte_order="little")
class Pair(Record):
    a: U16
    b: U16


def _cursor(data: bytes = b"abcdef") -> Cursor:
    return Cursor(data, what="sample")


def test_take_moves_forward() -> None:
    cursor = _cursor()
    assert (cursor.take(2), cursor.take(0), cursor.take(3)) == (b"ab", b"", b"cde")
    assert (cursor.offset, cursor.remaining) == (5, 1)
    assert cursor.rest() == b"f"
    cursor.finish()


@pytest.mark.parametrize("length", [-1, -(1 << 70), 7, 1 << 32, 1 << 70])
def test_take_refuses_what_is_not_there_and_does_not_move(length: int) -> None:
    cursor = _cursor()
    with pytest.raises(FormatError) as caught:
        cursor.take(length)
    assert caught.value.code == "cursor-truncated"
    assert caught.value.details == {"offset": 0, "expected": length, "got": 6}
    assert "sample is cut short" in str(caught.value)
    assert cursor.take(6) == b"abcdef"


def test_the_offset_in_an_error_is_where_reading_stopped() -> None:
    cursor = _cursor()
    cursor.take(4)
    with pytest.raises(FormatError) as caught:
        cursor.take(3)
    assert caught.value.details == {"offset": 4, "expected": 3, "got": 2}


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_unsigned_in_both_byte_orders(width: int) -> None:
    data = bytes(range(1, 9))
    assert _cursor(data).unsigned(width, "little") == int.from_bytes(data[:width], "little")
    assert _cursor(data).unsigned(width, "big") == int.from_bytes(data[:width], "big")


def test_unsigned_refuses_a_short_rest() -> None:
    with pytest.raises(FormatError) as caught:
        _cursor(b"abc").unsigned(4, "little")
    assert caught.value.code == "cursor-truncated"


def test_record_in_place() -> None:
    cursor = _cursor(b"\x01\0\x02\0\x03\0\x04\0")
    assert (cursor.record(Pair), cursor.record(Pair)) == (Pair(1, 2), Pair(3, 4))
    with pytest.raises(FormatError) as caught:
        cursor.record(Pair)
    assert caught.value.code == "cursor-truncated"


def test_finish_refuses_a_rest() -> None:
    cursor = _cursor()
    cursor.take(4)
    with pytest.raises(FormatError) as caught:
        cursor.finish()
    assert caught.value.code == "cursor-trailing"
    assert caught.value.details == {"offset": 4, "got": 2}


def test_an_empty_cursor() -> None:
    cursor = _cursor(b"")
    assert (cursor.remaining, cursor.take(0), cursor.rest()) == (0, b"", b"")
    cursor.finish()


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer_and_always_copies(wrap: Any) -> None:
    cursor = Cursor(wrap(b"abc"), what="sample")
    taken = cursor.take(2)
    assert type(taken) is bytes
    assert taken == b"ab"


def test_what_was_taken_does_not_change_with_the_source() -> None:
    source = bytearray(b"abc")
    taken = Cursor(source, what="sample").take(3)
    source[:] = b"xyz"
    assert taken == b"abc"


def test_a_view_of_wider_items_is_read_as_bytes() -> None:
    words = memoryview(b"abcdefgh").cast("I")
    cursor = Cursor(words, what="sample")
    assert cursor.remaining == 8
    assert cursor.rest() == b"abcdefgh"


@given(st.binary(max_size=64), st.lists(st.integers(-2, 20), max_size=30))
def test_any_sequence_of_lengths_agrees_with_slicing(data: bytes, lengths: list[int]) -> None:
    cursor, position = _cursor(data), 0
    for length in lengths:
        if 0 <= length <= len(data) - position:
            assert cursor.take(length) == data[position : position + length]
            position += length
        else:
            with pytest.raises(FormatError):
                cursor.take(length)
        assert (cursor.offset, cursor.remaining) == (position, len(data) - position)
    assert cursor.rest() == data[position:]
    cursor.finish()


@given(st.binary(max_size=40))
def test_a_loop_driven_by_the_input_ends(data: bytes) -> None:
    """Length-prefixed items, as parsers use a cursor: a value or an error for any bytes."""
    cursor, items = _cursor(data), []
    try:
        while cursor.remaining:
            items.append(cursor.take(cursor.unsigned(1, "little")))
    except FormatError as error:
        assert error.code == "cursor-truncated"  # noqa: PT017
    else:
        assert b"".join(bytes([len(item)]) + item for item in items) == data
