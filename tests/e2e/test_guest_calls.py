# SPDX-License-Identifier: MIT OR Apache-2.0
"""The guest stub's machine code in a vCPU process makes SVSM calls; the kernel's request loop answers them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import pytest

from svsm.abi.errors import StateError
from svsm.abi.platform import PAGE_SIZE
from svsm.formats.guest_mailbox import MailboxControl, MailboxFlags
from svsm.hardware.vcpu import load_engine
from svsm.kernel.protocols.table import Result
from svsm.kernel.requests import GuestState
from tests.e2e.small_machine import BASE, LENGTH, MAILBOX, Machine
from tests.support import absent

try:
    load_engine()
except StateError:  # an optional extra; CI installs it
    raise absent("unicorn is not installed") from None

QUERY_PROTOCOL, PVALIDATE, REMAP_CA, CONFIGURE_VTOM = 6, 1, 0, 7
VTPM_QUERY, VTPM_CMD = 2 << 32, 2 << 32 | 1
COPY_IN, COPY_OUT, CALL, PENDING = MailboxFlags.COPY_IN, MailboxFlags.COPY_OUT, MailboxFlags.CALL, MailboxFlags.PENDING
TARGET = BASE + 0x8_0000
ONES = (1 << 64) - 1


class RandomTpm:
    """Understands TPM2_GetRandom, and answers when it is asked to, as a service in another process would."""

    def __init__(self) -> None:
        self.waiting: list[tuple[bytes, Callable[[bytes | None], None]]] = []
        self.given: list[bytes] = []

    def powered_on(self) -> bool:
        return True

    def submit(self, command: bytes, done: Callable[[bytes | None], None]) -> None:
        self.waiting.append((command, done))

    def work(self) -> None:
        command, done = self.waiting.pop(0)
        tag, size, code, count = struct.unpack(">HIIH", command)
        assert (tag, size, code) == (0x8001, len(command), 0x17B)
        self.given.append(os.urandom(count))
        done(struct.pack(">HIIH", 0x8001, 12 + count, 0, count) + self.given[-1])


@pytest.fixture
def tpm() -> RandomTpm:
    return RandomTpm()


@pytest.fixture
def machine(tpm: RandomTpm) -> Iterator[Machine]:
    with Machine(tpm) as made:
        yield made


def write(machine: Machine, address: int, data: bytes) -> None:
    """Have the guest write its own memory."""
    machine.request(MailboxControl(flags=COPY_IN, buffer=address, length_in=len(data)), data)


def read(machine: Machine, address: int, length: int) -> bytes:
    """Have the guest read its own memory."""
    return machine.request(MailboxControl(flags=COPY_OUT, buffer=address, length_out=length)).data[:length]


def test_query_protocol(machine: Machine) -> None:
    for protocol, answer in ((0, 1 << 32 | 1), (2, 1 << 32 | 1), (1, 0), (9, 0)):
        outcome = machine.call(QUERY_PROTOCOL, protocol << 32 | 1, rdx=0x1234, r8=ONES)
        assert outcome.registers == (Result.SUCCESS, answer, 0x1234, ONES)
        assert outcome.control.result_pending == 0
        assert outcome.control.result_ghcb_msr == 0x17
    assert machine.loop.calls_served == 4


@pytest.mark.parametrize(
    ("rax", "result"),
    [
        (1 << 32, Result.UNSUPPORTED_PROTOCOL),
        (ONES, Result.UNSUPPORTED_PROTOCOL),
        (2, Result.UNSUPPORTED_CALL),
        (2 << 32 | 7, Result.UNSUPPORTED_CALL),
        (CONFIGURE_VTOM, Result.INVALID_REQUEST),
    ],
)
def test_refused_calls_bring_their_inputs_back(machine: Machine, rax: int, result: int) -> None:
    assert machine.call(rax, 0x10, 0x20, 0x30).registers == (result, 0x10, 0x20, 0x30)


def test_vmgexit_without_call_pending_is_not_served(machine: Machine) -> None:
    outcome = machine.request(MailboxControl(flags=CALL, rax=QUERY_PROTOCOL, rcx=1))
    assert outcome.registers == (QUERY_PROTOCOL, 1, 0, 0)
    assert machine.loop.calls_served == 0


def test_remap_calling_area(machine: Machine) -> None:
    old = machine.image.calling_area_gpa
    assert machine.call(REMAP_CA, TARGET).registers[0] == Result.SUCCESS
    assert machine.call(QUERY_PROTOCOL, 1).registers[:2] == (Result.SUCCESS, 1 << 32 | 1)
    assert machine.call(REMAP_CA, TARGET + PAGE_SIZE + 8).registers[0] == Result.INVALID_PARAMETER
    assert machine.call(REMAP_CA, MAILBOX).registers[0] == Result.INVALID_ADDRESS
    assert machine.call(REMAP_CA, old).registers[0] == Result.SUCCESS
    assert machine.loop.calls_served == 5


def pvalidate(machine: Machine, *entries: int) -> tuple[int, int]:
    """PVALIDATE with its list behind the calling area, as Linux does it; (result, next)."""
    area = machine.image.calling_area_gpa + 8
    write(machine, area, struct.pack(f"<HHI{len(entries)}Q", len(entries), 0, 0, *entries))
    result = machine.call(PVALIDATE, area).registers[0]
    return result, int.from_bytes(read(machine, area + 2, 2), "little")


def test_pvalidate_takes_a_page_and_gives_it_back_zeroed(machine: Machine) -> None:
    write(machine, TARGET, b"guest data")
    assert pvalidate(machine, TARGET, TARGET) == (0x8000_1010, 1)
    assert pvalidate(machine, TARGET | 4) == (Result.SUCCESS, 1)
    assert read(machine, TARGET, PAGE_SIZE) == bytes(PAGE_SIZE)
    write(machine, TARGET, b"again")
    assert read(machine, TARGET, 5) == b"again"


def test_a_page_given_up_faults(machine: Machine) -> None:
    assert pvalidate(machine, TARGET) == (Result.SUCCESS, 1)
    machine.request(MailboxControl(flags=COPY_OUT, buffer=TARGET + 0x10, length_out=1))
    assert machine.loop.state is GuestState.STOPPED
    assert machine.loop.stop_reason == f"exit code 0x400, 0x80000000, {TARGET + 0x10:#x}"


@pytest.mark.parametrize(("address", "write_bit"), [(0x0900_0000, 0), (0x0900_0000, 2), (BASE + LENGTH, 2), (0, 0)])
def test_memory_of_others_faults(machine: Machine, address: int, write_bit: int) -> None:
    flags = COPY_IN if write_bit else COPY_OUT
    machine.request(MailboxControl(flags=flags, buffer=address, length_in=1, length_out=1))
    assert machine.loop.stop_reason == f"exit code 0x400, {1 << 31 | write_bit:#x}, {address:#x}"


def test_the_code_page_given_up_stops_the_guest(machine: Machine) -> None:
    area = machine.image.calling_area_gpa + 8
    write(machine, area, struct.pack("<HHIQ", 1, 0, 0, BASE))
    machine.call(PVALIDATE, area)
    assert machine.loop.state is GuestState.STOPPED
    assert machine.loop.stop_reason is not None
    assert machine.loop.stop_reason.startswith("exit code 0x400")


@pytest.mark.parametrize("offset", [0, 0x7FC])
def test_a_vtpm_command_of_the_guest(machine: Machine, tpm: RandomTpm, offset: int) -> None:
    assert machine.call(VTPM_QUERY).registers[:3] == (Result.SUCCESS, 0x100, 0)
    buffer = machine.image.buffer_gpa + offset
    command = bytes.fromhex("80010000000c0000017b0020")
    request = struct.pack("<IBI", 8, 0, len(command)) + command
    for _ in range(2):
        outcome = machine.request(
            MailboxControl(
                flags=COPY_IN | CALL | PENDING | COPY_OUT,
                rax=VTPM_CMD,
                rcx=buffer,
                buffer=buffer,
                length_in=len(request),
                length_out=PAGE_SIZE,
            ),
            request,
            idle=tpm.work,
        )
        assert outcome.registers == (Result.SUCCESS, buffer, 0, 0)
        size = int.from_bytes(outcome.data[:4], "little")
        assert outcome.data[4 : 4 + size] == bytes.fromhex("80010000002c000000000020") + tpm.given[-1]
    assert tpm.given[0] != tpm.given[1]


def test_vtpm_refusals_reach_the_guest(machine: Machine) -> None:
    for gpa, result in (
        (0, Result.INVALID_PARAMETER),
        (MAILBOX, Result.INVALID_PARAMETER),
        (TARGET, Result.INVALID_PARAMETER),
        (ONES, Result.INVALID_PARAMETER),
    ):
        assert machine.call(VTPM_CMD, gpa).registers[0] == result


def test_a_halted_guest_stays_halted_until_resumed(machine: Machine) -> None:
    machine.call(QUERY_PROTOCOL, 1)
    assert machine.loop.state is GuestState.HALTED
    exits = machine.exits
    machine.loop.resume()
    machine.step()
    assert (machine.loop.state, machine.exits) == (GuestState.HALTED, exits + 1)
