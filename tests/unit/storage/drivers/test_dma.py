# SPDX-License-Identifier: MIT OR Apache-2.0
"""Shared memory for drivers."""

from __future__ import annotations

import pytest

from svsm.formats.errors import StateError
from svsm.storage.drivers.dma import DmaMemory


def _memory(pages: int = 2, address: int = 0x10000) -> DmaMemory:
    return DmaMemory(memoryview(bytearray(pages * 4096)), address=address)


@pytest.mark.parametrize(
    ("view", "address"),
    [
        (memoryview(bytearray(4095)), 0),
        (memoryview(bytearray()), 0),
        (memoryview(bytes(4096)), 0),
        (memoryview(bytearray(4096)), 1),
        (memoryview(bytearray(4096)), -4096),
        (memoryview(bytearray(4096)), 1 << 52),
    ],
)
def test_refuses_memory_that_cannot_be_shared(view: memoryview, address: int) -> None:
    with pytest.raises(StateError) as refused:
        DmaMemory(view, address=address)
    assert refused.value.code == "dma-memory"


def test_allocates_zeroed_aligned_and_apart() -> None:
    memory = _memory()
    memory.bytes[:] = b"\xaa" * memory.size_bytes
    first, second = memory.allocate(100), memory.allocate(4096, align=512)
    assert first % 64 == 0
    assert second % 512 == 0
    assert second >= first + 100
    assert not any(memory.bytes[second : second + 4096])
    assert memory.device_address(second) == 0x10000 + second
    with pytest.raises(StateError):
        memory.allocate(4096)
    for bad in (3, 4, 0, -8):
        with pytest.raises(StateError):
            memory.allocate(1, align=bad)
    with pytest.raises(StateError):
        memory.allocate(-1)
    memory.release_all()
    assert memory.allocate(8192) == 0


def test_views_are_the_same_bytes() -> None:
    memory = _memory()
    memory.u64[1] = 0x0102030405060708
    assert bytes(memory.bytes[8:16]) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert memory.u16[4] == 0x0708
    assert memory.u32[2] == 0x05060708
    part = memory.part(4096, 4096)
    part.u64[0] = 5
    assert memory.u64[512] == 5
    assert part.device_address(0) == memory.device_address(4096)
