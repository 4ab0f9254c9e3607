# SPDX-License-Identifier: MIT OR Apache-2.0
"""The record codec: every width, both byte orders, nesting, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import struct
from typing import Annotated, Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.record import U8, U16, U32, U64, Buffer, Bytes, Nested, Record, Unsigned, record


@record(size=18, byte_order="little")
class Little(Record):
    a: U8
    b: U16
    c: U32
    d: U64
    e: Annotated[bytes, Bytes(3)]


@record(size=18, byte_order="big")
class Big(Record):
    a: U8
    b: U16
    c: U32
    d: U64
    e: Annotated[bytes, Bytes(3)]


@record(size=40, byte_order="big")
class Outer(Record):
    head: U16
    inner: Annotated[Little, Nested()]
    other: Annotated[Big, Nested()]
    tail: U16 = 7


_LITTLE = Little(1, 0x0203, 0x04050607, 0x08090A0B0C0D0E0F, b"xyz")
_BIG = Big(1, 0x0203, 0x04050607, 0x08090A0B0C0D0E0F, b"xyz")


def test_size_comes_from_the_declaration() -> None:
    assert (Little.SIZE, Big.SIZE, Outer.SIZE) == (18, 18, 40)


def test_little_endian_bytes() -> None:
    assert _LITTLE.pack() == bytes.fromhex("01 0302 07060504 0f0e0d0c0b0a0908") + b"xyz"


def test_big_endian_bytes() -> None:
    assert _BIG.pack() == bytes.fromhex("01 0203 04050607 08090a0b0c0d0e0f") + b"xyz"


def test_nested_records_keep_their_byte_order() -> None:
    outer = Outer(0x1122, _LITTLE, _BIG, 0x3344)
    assert outer.pack() == b"\x11\x22" + _LITTLE.pack() + _BIG.pack() + b"\x33\x44"
    assert Outer.parse(outer.pack()) == outer
    assert isinstance(Outer.parse(outer.pack()).inner, Little)


def test_defaults_are_plain_dataclass_defaults() -> None:
    assert Outer(0, _LITTLE, _BIG).tail == 7


def test_there_is_no_padding_between_fields() -> None:
    @record(size=13, byte_order="little")
    class Unaligned(Record):
        a: U8
        b: U64
        c: U32

    assert Unaligned(1, 2, 3).pack() == struct.pack("<BQI", 1, 2, 3)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_parse_takes_any_buffer(wrap: Any) -> None:
    assert Little.parse(wrap(_LITTLE.pack())) == _LITTLE
    assert Outer.parse(wrap(Outer(1, _LITTLE, _BIG).pack())).inner == _LITTLE


def test_parsed_bytes_are_a_copy() -> None:
    data = bytearray(_LITTLE.pack())
    parsed = Little.parse(data)
    data[:] = bytes(18)
    assert parsed == _LITTLE
    assert type(parsed.e) is bytes


@pytest.mark.parametrize("length", [*range(18), 19, 36, 1000])
def test_parse_refuses_every_other_length(length: int) -> None:
    with pytest.raises(FormatError) as caught:
        Little.parse(bytes(length))
    assert caught.value.code == "record-length"
    assert caught.value.details == {"expected": 18, "got": length}


def test_parse_at_reads_in_the_middle() -> None:
    assert Little.parse_at(b"ab" + _LITTLE.pack() + b"cd", 2) == _LITTLE
    assert Little.parse_at(b"ab" + _LITTLE.pack(), 2) == _LITTLE


@pytest.mark.parametrize(
    ("length", "offset", "got"), [(18, 1, 17), (18, -1, 19), (18, 18, 0), (18, 19, 0), (18, 1 << 70, 0), (0, 0, 0)]
)
def test_parse_at_refuses_what_is_not_all_there(length: int, offset: int, got: int) -> None:
    with pytest.raises(FormatError) as caught:
        Little.parse_at(bytes(length), offset)
    assert caught.value.code == "record-truncated"
    assert caught.value.details == {"offset": offset, "expected": 18, "got": got}


def test_iter_parse_reads_a_table() -> None:
    entries = [_LITTLE.replace(a=index) for index in range(5)]
    table = b"".join(entry.pack() for entry in entries)
    assert list(Little.iter_parse(table)) == entries
    assert list(Little.iter_parse(b"")) == []


def test_iter_parse_builds_nested_records() -> None:
    outer = Outer(9, _LITTLE, _BIG)
    assert list(Outer.iter_parse(outer.pack() * 2)) == [outer, outer]


@pytest.mark.parametrize("length", [1, 17, 19, 35, 37])
def test_iter_parse_refuses_a_partial_entry_before_the_first_is_taken(length: int) -> None:
    with pytest.raises(FormatError) as caught:
        Little.iter_parse(bytes(length))
    assert caught.value.code == "record-length"


@pytest.mark.parametrize(("field", "bits"), [("a", 8), ("b", 16), ("c", 32), ("d", 64)])
def test_integers_fit_exactly(field: str, bits: int) -> None:
    top = (1 << bits) - 1
    packed = _LITTLE.replace(**{field: top}).pack()
    assert getattr(Little.parse(packed), field) == top
    assert getattr(Little.parse(_LITTLE.replace(**{field: 0}).pack()), field) == 0
    for bad in (top + 1, -1, 1 << 200):
        with pytest.raises(FormatError) as caught:
            _LITTLE.replace(**{field: bad}).pack()
        assert caught.value.code == "record-width"
        assert caught.value.details["field"] == field


@pytest.mark.parametrize("bad", [None, "1", 1.0, b"\x01", [1]])
def test_integers_are_integers(bad: object) -> None:
    with pytest.raises(FormatError) as caught:
        _LITTLE.replace(b=bad).pack()
    assert caught.value.code == "record-width"


@pytest.mark.parametrize("bad", [b"", b"xy", b"wxyz", "xyz", 3, None, [1, 2, 3]])
def test_bytes_are_neither_padded_nor_cut(bad: object) -> None:
    with pytest.raises(FormatError) as caught:
        _LITTLE.replace(e=bad).pack()
    assert caught.value.code == "record-width"
    assert caught.value.details["expected"] == 3


@pytest.mark.parametrize("good", [bytearray(b"xyz"), memoryview(b"xyz")])
def test_bytes_may_come_from_any_buffer(good: Buffer) -> None:
    assert _LITTLE.replace(e=good).pack() == _LITTLE.pack()


@pytest.mark.parametrize("bad", [None, 1, _LITTLE.pack(), _BIG])
def test_nested_values_must_be_their_record(bad: object) -> None:
    with pytest.raises(FormatError) as caught:
        Outer(1, _LITTLE, _BIG).replace(inner=bad).pack()
    assert caught.value.code == "record-width"


def test_a_misfit_inside_a_nested_record_is_found() -> None:
    with pytest.raises(FormatError) as caught:
        Outer(1, _LITTLE.replace(a=256), _BIG).pack()
    assert caught.value.details["field"] == "a"


def test_records_are_frozen_and_have_slots() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _LITTLE.a = 2  # type: ignore[misc]
    assert not hasattr(_LITTLE, "__dict__")


def test_replace_leaves_the_original() -> None:
    changed = _LITTLE.replace(a=9)
    assert (changed.a, _LITTLE.a) == (9, 1)
    assert changed.replace(a=1) == _LITTLE


def test_equal_records_hash_alike() -> None:
    assert hash(Little.parse(_LITTLE.pack())) == hash(_LITTLE)
    assert _LITTLE.replace(e=b"xy!") != _LITTLE


def test_a_wrong_size_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="has 3 bytes, its specification says 4"):

        @record(size=4, byte_order="little")
        class Wrong(Record):
            a: U8
            b: U16


def test_a_field_without_width_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.a has no width"):

        @record(size=4, byte_order="little")
        class Wrong(Record):
            a: int


def test_nested_needs_a_record() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.a has no width"):

        @record(size=4, byte_order="little")
        class Wrong(Record):
            a: Annotated[int, Nested()]


def test_an_impossible_integer_width_cannot_be_declared() -> None:
    with pytest.raises(KeyError):

        @record(size=3, byte_order="little")
        class Wrong(Record):
            a: Annotated[int, Unsigned(3)]


def test_an_empty_record_is_possible() -> None:
    @record(size=0, byte_order="little")
    class Empty(Record):
        pass

    assert Empty.parse(b"").pack() == b""
    assert get_type_hints(Empty) is not None


_INTEGERS = {1: st.integers(0, 255), 2: st.integers(0, 2**16 - 1), 4: st.integers(0, 2**32 - 1)}
_values = st.tuples(
    _INTEGERS[1], _INTEGERS[2], _INTEGERS[4], st.integers(0, 2**64 - 1), st.binary(min_size=3, max_size=3)
)


@given(_values)
def test_any_values_round_trip_and_agree_with_struct(values: tuple[int, int, int, int, bytes]) -> None:
    assert Little(*values).pack() == struct.pack("<BHIQ3s", *values)
    assert Big(*values).pack() == struct.pack(">BHIQ3s", *values)
    assert Little.parse(Little(*values).pack()) == Little(*values)
    assert Big.parse(Big(*values).pack()) == Big(*values)


@given(st.binary(min_size=40, max_size=40))
def test_any_bytes_of_the_right_length_round_trip(data: bytes) -> None:
    assert Outer.parse(data).pack() == data


@given(st.binary(max_size=100), st.integers(-10, 110))
def test_any_bytes_give_a_value_or_a_format_error(data: bytes, offset: int) -> None:
    for kind in (Little, Outer):
        try:
            assert kind.parse(data).pack() == data
        except SvsmError:
            assert len(data) != kind.SIZE
    try:
        assert Little.parse_at(data, offset).pack() == data[offset : offset + 18]
    except SvsmError:
        assert offset < 0 or offset + 18 > len(data)
    try:
        assert b"".join(entry.pack() for entry in Little.iter_parse(data)) == data
    except SvsmError:
        assert len(data) % 18


@given(_values, st.integers(0, 17), st.integers(0, 7))
def test_every_bit_of_a_record_is_seen(values: tuple[int, int, int, int, bytes], at: int, bit: int) -> None:
    data = bytearray(Little(*values).pack())
    data[at] ^= 1 << bit
    assert Little.parse(data) != Little(*values)
