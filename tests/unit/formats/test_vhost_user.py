# SPDX-License-Identifier: MIT OR Apache-2.0
"""vhost-user's records are the C structures of the protocol."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError
from svsm.formats.record import Record
from svsm.formats.vhost_user import (
    ConfigHeader,
    MemoryRegion,
    MemoryTable,
    MessageHeader,
    Request,
    U64Payload,
    VringAddress,
    VringState,
)

RECORDS: list[type[Record]] = [
    ConfigHeader,
    MemoryRegion,
    MemoryTable,
    MessageHeader,
    U64Payload,
    VringAddress,
    VringState,
]


def test_bytes_are_those_of_the_protocol() -> None:
    assert MessageHeader(Request.GET_CONFIG, 1 | 8, 72).pack() == struct.pack("<III", 24, 9, 72)
    assert VringState(3, 256).pack() == struct.pack("<II", 3, 256)
    # index, flags, then descriptor, used, available, log: used comes before available
    assert VringAddress(1, 0, 0x1000, 0x3000, 0x2000, 0).pack() == struct.pack(
        "<IIQQQQ", 1, 0, 0x1000, 0x3000, 0x2000, 0
    )
    assert MemoryTable(1, 0).pack() + MemoryRegion(1 << 32, 4096, 7 << 40, 8192).pack() == struct.pack(
        "<IIQQQQ", 1, 0, 1 << 32, 4096, 7 << 40, 8192
    )


@pytest.mark.parametrize("kind", RECORDS)
@given(data=st.binary(max_size=48))
def test_any_bytes(kind: type[Record], data: bytes) -> None:
    if len(data) == kind.SIZE:
        assert kind.parse(data).pack() == data
    else:
        with pytest.raises(FormatError):
            kind.parse(data)
