# SPDX-License-Identifier: MIT OR Apache-2.0
"""Pages that a host or a guest can write: the CPUID page and the stub's mailbox, any bytes and any flipped bit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError
from svsm.formats.guest_mailbox import MAILBOX_BYTES, MailboxControl, MailboxFlags
from svsm.formats.snp.cpuid_page import (
    CPUID_PAGE_SIZE,
    MAX_FUNCTIONS,
    CpuidFunction,
    pack_cpuid_page,
    parse_cpuid_page,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
FUNCTIONS = st.builds(CpuidFunction, U32, U32, U64, U64, U32, U32, U32, U32, st.just(0))
CONTROLS = st.builds(MailboxControl, *[U64] * (MailboxControl.SIZE // 8))
RESERVED_HEADER = range(4, 16)
HEADER_BYTES, FUNCTION_BYTES, RESERVED_BYTES = 16, 48, 8


def parsed(page: bytes) -> list[CpuidFunction] | str:
    """The functions, or the code of the refusal; nothing else may come out."""
    try:
        return parse_cpuid_page(page)
    except FormatError as error:
        return error.code


REFUSED = "cpuid-page"


def is_reserved(place: int) -> bool:
    """Whether the byte of the used part is reserved."""
    if place < HEADER_BYTES:
        return place in RESERVED_HEADER
    return (place - HEADER_BYTES) % FUNCTION_BYTES >= FUNCTION_BYTES - RESERVED_BYTES


@given(st.lists(FUNCTIONS, max_size=MAX_FUNCTIONS))
def test_a_cpuid_page_comes_back_as_it_was_built(functions: list[CpuidFunction]) -> None:
    page = pack_cpuid_page(functions)
    assert len(page) == CPUID_PAGE_SIZE
    assert parse_cpuid_page(page) == functions


@given(U32, st.binary(max_size=CPUID_PAGE_SIZE), st.integers(0, 2 * CPUID_PAGE_SIZE))
def test_any_bytes_are_a_cpuid_page_or_refused(count: int, data: bytes, size: int) -> None:
    for page in (data, data.ljust(size, b"\0"), (count.to_bytes(4, "little") + bytes(12) + data).ljust(4096, b"\0")):
        functions = parsed(page)
        if len(page) != CPUID_PAGE_SIZE:
            assert functions == REFUSED
        elif isinstance(functions, list):
            packed = pack_cpuid_page(functions)
            end = HEADER_BYTES + FUNCTION_BYTES * len(functions)
            assert packed[:end] == page[:end]


@given(st.lists(FUNCTIONS, min_size=1, max_size=MAX_FUNCTIONS), st.data())
def test_a_flipped_bit_of_a_cpuid_page_changes_one_value_or_is_refused(
    functions: list[CpuidFunction], data: st.DataObject
) -> None:
    page = bytearray(pack_cpuid_page(functions))
    used = HEADER_BYTES + FUNCTION_BYTES * len(functions)
    place = data.draw(st.integers(0, CPUID_PAGE_SIZE - 1))
    page[place] ^= 1 << data.draw(st.integers(0, 7))
    found = parsed(bytes(page))
    if place >= used:
        assert found == functions
    elif is_reserved(place):
        assert found == REFUSED
    elif place < HEADER_BYTES:
        assert found == REFUSED or len(found) != len(functions)
    else:
        assert isinstance(found, list)
        differing = [at for at, (new, old) in enumerate(zip(found, functions, strict=True)) if new != old]
        assert differing == [(place - HEADER_BYTES) // FUNCTION_BYTES]


@pytest.mark.parametrize("more", [1, 100])
def test_too_many_functions_are_refused(more: int) -> None:
    with pytest.raises(FormatError, match="64 functions"):
        pack_cpuid_page([CpuidFunction(*[0] * 9)] * (MAX_FUNCTIONS + more))


@given(CONTROLS)
def test_a_mailbox_comes_back_as_it_was_written(control: MailboxControl) -> None:
    assert MailboxControl.parse(control.pack()) == control


@given(st.binary(max_size=MAILBOX_BYTES))
def test_any_bytes_are_a_mailbox_or_refused(data: bytes) -> None:
    try:
        control = MailboxControl.parse(data)
    except FormatError:
        assert len(data) != MailboxControl.SIZE
        return
    assert control.pack() == data
    assert MailboxFlags(control.flags & 15) in range(16)  # what the stub does not know it does not look at


@given(CONTROLS, st.integers(0, MailboxControl.SIZE * 8 - 1))
def test_a_flipped_bit_of_a_mailbox_changes_exactly_one_member(control: MailboxControl, bit: int) -> None:
    data = bytearray(control.pack())
    data[bit // 8] ^= 1 << bit % 8
    other = MailboxControl.parse(data)
    assert other.pack() == bytes(data)
    names = [name for name in MailboxControl.__annotations__ if getattr(other, name) != getattr(control, name)]
    assert len(names) == 1
    assert getattr(other, names[0]) ^ getattr(control, names[0]) == 1 << bit % 64
