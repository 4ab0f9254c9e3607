# SPDX-License-Identifier: MIT OR Apache-2.0
"""The three memfds: sealed, sparse, and a move leaves nothing behind."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from svsm.formats.errors import BackendError
from svsm.hardware.memory import ADDRESS_SPACE, PhysicalMemory
from svsm.hardware.rmp import HYPERVISOR, LARGE_PAGE, PAGE, Change, Entry, Home

GPA = 0x4000_0000
PRIVATE = Entry(assigned=True, validated=True)
OPEN = Entry(assigned=True, validated=True, permissions=(0, 15, 0))


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    made = PhysicalMemory()
    yield made
    made.close()


@pytest.mark.parametrize("home", Home)
def test_nobody_can_change_the_size(memory: PhysicalMemory, home: Home) -> None:
    descriptor = memory.descriptors[home]
    for size in (0, PAGE, ADDRESS_SPACE + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    assert os.fstat(descriptor).st_size == ADDRESS_SPACE
    assert os.fstat(descriptor).st_blocks == 0


@pytest.mark.parametrize("length", [PAGE, LARGE_PAGE])
def test_a_move_keeps_the_contents_and_empties_the_old_place(memory: PhysicalMemory, length: int) -> None:
    data = os.urandom(length)
    memory.write(Home.PRIVATE, GPA, data)
    with mmap.mmap(memory.descriptors[Home.PRIVATE], length, offset=GPA) as old:
        assert old[:16] == data[:16]
        memory.carry_out(Change(GPA, length, PRIVATE, OPEN, False))
        assert not memory.populated(Home.PRIVATE, GPA, length)
        # Who still maps the old place sees zeros (and by looking puts zero pages there again: tmpfs).
        assert old[:] == bytes(length)
    assert memory.read(Home.VMPL2, GPA, length) == data


def test_a_move_that_loses_the_contents(memory: PhysicalMemory) -> None:
    memory.write(Home.PRIVATE, GPA, b"x" * PAGE)
    memory.write(Home.SHARED, GPA, b"left by the host" * 256)
    memory.carry_out(Change(GPA, PAGE, PRIVATE, HYPERVISOR, True))
    for home in Home:
        assert memory.read(home, GPA, PAGE) == bytes(PAGE)
        assert not memory.populated(home, GPA, PAGE)


def test_a_move_overwrites_what_was_at_its_destination(memory: PhysicalMemory) -> None:
    memory.write(Home.VMPL2, GPA, b"v" * LARGE_PAGE)
    memory.write(Home.PRIVATE, GPA + PAGE, b"p" * PAGE)
    memory.carry_out(Change(GPA, LARGE_PAGE, PRIVATE, OPEN, False))
    assert memory.read(Home.VMPL2, GPA, 3 * PAGE) == bytes(PAGE) + b"p" * PAGE + bytes(PAGE)


def test_zeroing_in_place(memory: PhysicalMemory) -> None:
    memory.write(Home.PRIVATE, GPA, b"x" * PAGE)
    memory.carry_out(Change(GPA, PAGE, Entry(assigned=True), PRIVATE, True))
    assert not memory.populated(Home.PRIVATE, GPA, PAGE)


def test_beyond_the_address_space(memory: PhysicalMemory) -> None:
    with pytest.raises(BackendError):
        memory.read(Home.PRIVATE, ADDRESS_SPACE - 1, 2)
    with pytest.raises(BackendError):
        memory.write(Home.PRIVATE, ADDRESS_SPACE, b"x")
