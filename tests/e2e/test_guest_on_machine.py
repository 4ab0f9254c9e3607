# SPDX-License-Identifier: MIT OR Apache-2.0
"""The same guest on the simulated SEV-SNP machine: real RMP, real page moves, the hypervisor's schedule."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator

import pytest

from svsm.abi.errors import StateError
from svsm.abi.platform import PAGE_SIZE, Gpa
from svsm.formats.guest_mailbox import DATA_OFFSET, DONE_OFFSET, MailboxControl, MailboxFlags
from svsm.hardware.vcpu import load_engine, run_vcpu
from svsm.kernel.guest import GUEST_BASE, GUEST_BYTES, MAILBOX_GPA, Guest
from svsm.kernel.protocols.table import Result
from svsm.kernel.requests import GuestState
from svsm.testing.machine_harness import RunningMachine, running_machine
from tests.e2e.test_guest_calls import RandomTpm
from tests.support import absent

try:
    load_engine()
except StateError:  # an optional extra; CI installs it
    raise absent("unicorn is not installed") from None

COPY_IN, COPY_OUT, CALL, PENDING = MailboxFlags.COPY_IN, MailboxFlags.COPY_OUT, MailboxFlags.CALL, MailboxFlags.PENDING
LAUNCH_VMSA = Gpa(0xFFFF_FFFF_F000)
CALLING_AREA = GUEST_BASE + 0x3000
BUFFER = GUEST_BASE + 0x4000
UNTOUCHED = GUEST_BASE + 0x1_0000
LARGE = GUEST_BASE + 0x40_0000
_PATIENCE_SECONDS = 10.0


class Driver:
    """The mailbox's writer, and the kernel's loop around one guest."""

    def __init__(self, machine: RunningMachine, tpm: RandomTpm) -> None:
        self.machine = machine
        self.tpm = tpm
        self.shared_fd = os.dup(machine.hypervisor._shared_fd)
        self.guest = Guest(machine.platform, tpm=tpm, launch_vmsa_gpa=LAUNCH_VMSA)
        self.guest.start()

    def request(self, control: MailboxControl, data: bytes = b"") -> tuple[MailboxControl, bytes]:
        """One request to its answer, or to the guest's end."""
        os.pwrite(self.shared_fd, data, MAILBOX_GPA + DATA_OFFSET)
        done = int.from_bytes(os.pread(self.shared_fd, 8, MAILBOX_GPA + DONE_OFFSET), "little")
        os.pwrite(self.shared_fd, control.replace(request=done + 1, done=done).pack(), MAILBOX_GPA)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.guest.stopped is None:
            answered = MailboxControl.parse(os.pread(self.shared_fd, MailboxControl.SIZE, MAILBOX_GPA))
            if answered.done == done + 1:
                return answered, os.pread(self.shared_fd, PAGE_SIZE, MAILBOX_GPA + DATA_OFFSET)
            if time.monotonic() > deadline:
                raise TimeoutError("the guest does not answer")
            if self.guest._loop.state is GuestState.HALTED:
                self.guest._loop.resume()
            if self.tpm.waiting:
                self.tpm.work()
            self.machine.platform.wait(deadline=time.monotonic() + 0.02)
            self.guest.on_hardware_event()
        return MailboxControl(), b""

    def call(self, rax: int, rcx: int = 0) -> int:
        """One call; RAX."""
        return self.request(MailboxControl(flags=CALL | PENDING, rax=rax, rcx=rcx))[0].result_rax

    def write(self, address: int, data: bytes) -> None:
        """The guest writes its memory."""
        self.request(MailboxControl(flags=COPY_IN, buffer=address, length_in=len(data)), data)

    def read(self, address: int, length: int) -> bytes:
        """The guest reads its memory."""
        return self.request(MailboxControl(flags=COPY_OUT, buffer=address, length_out=length))[1][:length]

    def pvalidate(self, *entries: int) -> tuple[int, int]:
        """(result, next)."""
        self.write(CALLING_AREA + 8, struct.pack(f"<HHI{len(entries)}Q", len(entries), 0, 0, *entries))
        result = self.call(1, CALLING_AREA + 8)
        return result, int.from_bytes(self.read(CALLING_AREA + 10, 2), "little")


@pytest.fixture
def driver() -> Iterator[Driver]:
    with running_machine(vcpu=run_vcpu) as machine:
        made = Driver(machine, RandomTpm())
        try:
            yield made
        finally:
            with contextlib.suppress(OSError):
                os.close(made.shared_fd)


def test_calls_and_a_tpm_command(driver: Driver) -> None:
    answered, _ = driver.request(MailboxControl(flags=CALL | PENDING, rax=6, rcx=2 << 32 | 1))
    assert (answered.result_rax, answered.result_rcx) == (Result.SUCCESS, 1 << 32 | 1)
    assert (answered.result_ghcb_msr, answered.result_pending) == (0x17, 0)
    command = bytes.fromhex("80010000000c0000017b0010")
    request = struct.pack("<IBI", 8, 0, len(command)) + command
    control = MailboxControl(
        flags=COPY_IN | CALL | PENDING | COPY_OUT,
        rax=2 << 32 | 1,
        rcx=BUFFER,
        buffer=BUFFER,
        length_in=len(request),
        length_out=PAGE_SIZE,
    )
    answered, data = driver.request(control, request)
    assert answered.result_rax == Result.SUCCESS
    assert data[:32] == bytes.fromhex("1c000000 80010000001c000000000010") + driver.tpm.given[0] + data[32:32]


def test_pvalidate_of_pages_that_move(driver: Driver) -> None:
    assert driver.pvalidate(UNTOUCHED | 4) == (Result.SUCCESS, 1)
    driver.write(UNTOUCHED, b"guest data")
    assert driver.pvalidate(UNTOUCHED | 4) == (0x8000_1010, 0)
    assert driver.read(UNTOUCHED, 10) == b"guest data"
    assert driver.pvalidate(UNTOUCHED, UNTOUCHED) == (0x8000_1010, 1)
    assert driver.pvalidate(UNTOUCHED | 4) == (Result.SUCCESS, 1)
    assert driver.read(UNTOUCHED, 16) == bytes(16)


def test_large_pages(driver: Driver) -> None:
    assert driver.pvalidate(LARGE | 4 | 1) == (Result.SUCCESS, 1)
    driver.write(LARGE + 0x12_3456, b"far inside")
    assert driver.read(LARGE + 0x12_3456, 10) == b"far inside"
    assert driver.pvalidate(UNTOUCHED & ~0x1F_FFFF | 4 | 1)[0] == Result.INVALID_ADDRESS  # the image's own pages
    assert driver.pvalidate(LARGE + 0x1000) == (Result.SUCCESS, 1)
    assert driver.pvalidate(LARGE | 1) == (0x8000_1006, 0)
    assert driver.read(LARGE + 0x12_3456, 10) == b"far inside"


@pytest.mark.parametrize("address", [UNTOUCHED, 0x1000, 0x0700_0000, GUEST_BASE + GUEST_BYTES])
def test_what_is_not_the_guests_faults(driver: Driver, address: int) -> None:
    driver.request(MailboxControl(flags=COPY_OUT, buffer=address, length_out=1))
    assert driver.guest.stopped is not None
    assert driver.guest.stopped.endswith(f"{address:#x}")


def test_a_page_given_up_faults(driver: Driver) -> None:
    assert driver.pvalidate(UNTOUCHED | 4) == (Result.SUCCESS, 1)
    assert driver.pvalidate(UNTOUCHED) == (Result.SUCCESS, 1)
    driver.request(MailboxControl(flags=COPY_IN, buffer=UNTOUCHED, length_in=1))
    assert driver.guest.stopped == f"exit code 0x400, 0x80000002, {UNTOUCHED:#x}"
