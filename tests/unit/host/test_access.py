# SPDX-License-Identifier: MIT OR Apache-2.0
"""Exits for registers and ports, taken apart: whatever a kernel sends is an access of known size, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.host.access import Access, failed

WORD = st.integers(0, (1 << 64) - 1)
CODES = (ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE, ghcb.ExitCode.IOIO)


@pytest.fixture
def shared() -> Iterator[int]:
    descriptor = os.memfd_create("shared")
    os.ftruncate(descriptor, 4096)
    yield descriptor
    os.close(descriptor)


def exit_message(*arguments: int) -> Message:
    return Message.parse(Message(ghcb.HostMessage.EXIT, arguments, identifier=5).pack())


@given(st.sampled_from(CODES), WORD | st.integers(0, 1 << 32), WORD | st.integers(0, 300), WORD, WORD)
def test_any_exit_is_a_bounded_access_or_none(code: int, info_1: int, info_2: int, rax: int, scratch: int) -> None:
    try:
        access = Access.parse(exit_message(code, info_1, info_2, rax, 0, scratch))
    except FormatError:
        return
    assert access.width_bytes in (1, 2, 4)
    assert 0 < access.count <= ghcb.MAX_IO_COUNT
    assert access.count == 1 or access.scratch is not None
    assert 0 <= access.place < 1 << (16 if access.is_port else 64)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_port_read_is_cut_to_its_width(shared: int, width: int) -> None:
    word = ghcb.IoAccess(0xCFC, width, True, False).pack()
    access = Access.parse(exit_message(ghcb.ExitCode.IOIO, word, 0))
    answer = access.take((1 << 64) - 1, shared)
    assert answer is not None
    assert answer.arguments[ghcb.ANSWER_RAX] == (1 << 8 * width) - 1


def test_a_window_has_every_byte_of_an_access_or_none() -> None:
    access = Access.parse(exit_message(ghcb.ExitCode.MMIO_READ, 0x1000, 4))
    assert access.is_in(range(0x1000, 0x1004))
    assert not access.is_in(range(0x1000, 0x1003))
    assert not access.is_in(range(0x1001, 0x2000))
    assert not access.is_in(range(0))


def test_scratch_addresses_that_are_nowhere_are_no_memory(shared: int) -> None:
    access = Access.parse(exit_message(ghcb.ExitCode.MMIO_READ, 0x1000, 4, 0, 0, (1 << 64) - 8))
    assert access.take(1, shared) == failed(access.exit_)
    writing = Access.parse(exit_message(ghcb.ExitCode.MMIO_WRITE, 0x1000, 4, 0, 0, (1 << 64) - 8))
    with pytest.raises((OSError, OverflowError)):
        writing.written(shared)
