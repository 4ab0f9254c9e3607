# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vCPU messages: layout, and everything that is no message."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.abi.platform import Permission
from svsm.formats.errors import FormatError, ProtocolError, SvsmError
from svsm.formats.snp.vcpu_messages import (
    MAX_MESSAGE_BYTES,
    Access,
    ExitMessage,
    Kind,
    MapMessage,
    Memory,
    Message,
    PlainMessage,
    Registers,
    RunMessage,
    UnmapMessage,
    ack,
    parse_message,
    stop,
)

REGISTERS = Registers(*range(1, 26))
RUN = RunMessage(kind=Kind.RUN, reserved_04=0, sequence=7, sev_features=1, time_limit_us=5, registers=REGISTERS)
EXIT = ExitMessage(
    kind=Kind.EXIT, reserved_04=0, sequence=7, exit_code=0x403, exit_info_1=1, exit_info_2=2, registers=REGISTERS
)
MAP = MapMessage(
    kind=Kind.MAP, reserved_04=0, sequence=8, gpa=0x4000_0000, length=0x2000, memory=Memory.VMPL2, access=Access.ALL
)
UNMAP = UnmapMessage(kind=Kind.UNMAP, reserved_04=0, sequence=9, gpa=0x4000_0000, length=0x1000)
ALL: list[Message] = [RUN, EXIT, MAP, UNMAP, PlainMessage.parse(ack(10)), PlainMessage.parse(stop(11))]


@pytest.mark.parametrize("message", ALL, ids=lambda message: Kind(message.kind).name)
def test_round_trip_and_truncation(message: Message) -> None:
    packed = message.pack()
    assert parse_message(packed) == message
    assert len(packed) < MAX_MESSAGE_BYTES
    for length in range(len(packed)):
        with pytest.raises(FormatError):
            parse_message(packed[:length])
    with pytest.raises(FormatError):
        parse_message(packed + b"\0")


def test_layout() -> None:
    assert ack(10) == struct.pack("<IIQ", 5, 0, 10)
    assert stop(11) == struct.pack("<IIQ", 6, 0, 11)
    assert RUN.pack() == struct.pack("<IIQQQ25Q", 1, 0, 7, 1, 5, *range(1, 26))
    assert EXIT.pack() == struct.pack("<IIQQQQ25Q", 2, 0, 7, 0x403, 1, 2, *range(1, 26))
    assert MAP.pack() == struct.pack("<IIQQQII", 3, 0, 8, 0x4000_0000, 0x2000, 1, 15)
    assert UNMAP.pack() == struct.pack("<IIQQQ", 4, 0, 9, 0x4000_0000, 0x1000)


def test_access_bits_are_the_platforms() -> None:
    assert {bit.name: bit.value for bit in Access} == {bit.name: bit.value for bit in Permission}


@pytest.mark.parametrize(
    "message",
    [
        PlainMessage(0, 0, 1),
        PlainMessage(7, 0, 1),
        PlainMessage(Kind.ACK, 1, 1),
        RUN.replace(reserved_04=1),
        MAP.replace(memory=0),
        MAP.replace(memory=3),
        MAP.replace(access=16),
        MAP.replace(gpa=0x4000_0001),
        MAP.replace(length=0),
        MAP.replace(length=0x1800),
        MAP.replace(gpa=(1 << 48) - 0x1000),
        UNMAP.replace(gpa=1 << 48),
        UNMAP.replace(length=1 << 63),
    ],
)
def test_no_messages(message: Message) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_message(message.pack())
    assert caught.value.code == "vcpu-message"


@given(st.binary(max_size=MAX_MESSAGE_BYTES))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(SvsmError):
        assert parse_message(data).pack() == data


@given(st.sampled_from(ALL), st.integers(0, 8 * 240))
def test_bit_flips(message: Message, bit: int) -> None:
    packed = bytearray(message.pack())
    packed[bit // 8 % len(packed)] ^= 1 << bit % 8
    with contextlib.suppress(SvsmError):
        assert parse_message(packed).pack() == packed
