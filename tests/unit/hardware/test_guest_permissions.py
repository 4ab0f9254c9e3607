# SPDX-License-Identifier: MIT OR Apache-2.0
"""Guest code against the RMP, end to end: what VMPL2 may not do is a real fault that the kernel sees in the VMSA."""

from __future__ import annotations

import time

import pytest

from svsm.abi.platform import Gpa, GuestExit, Permission, Vmpl
from svsm.formats.snp.hardware_messages import HostCommand
from svsm.formats.snp.vcpu_messages import NestedFault
from svsm.formats.snp.vmsa import VMSA_FIELDS
from svsm.hardware.rmp import Home, UpdateCode
from svsm.hardware.vcpu import run_vcpu
from svsm.kernel.guest_stub import build_guest_image
from svsm.kernel.simulated_platform import SimulatedPlatform
from svsm.testing.machine_harness import RunningMachine, running_machine

BASE = Gpa(0x4000_0000)
TARGET = Gpa(0x4001_0000)
VMSA = Gpa(0x0700_0000)
MAILBOX = Gpa(0x3008_0000)
PAGE = 4096
NPF, HLT = 0x400, 0x78

# mov rax, TARGET; then the access; then hlt. Bytes by hand: 48 b8 imm64 is mov rax, imm64; f4 is hlt.
_TO_TARGET = b"\x48\xb8" + TARGET.to_bytes(8, "little")
WRITE = _TO_TARGET + b"\xc6\x00\x77\xf4"  # mov byte [rax], 0x77
READ = _TO_TARGET + b"\x8a\x18\xf4"  # mov bl, [rax]
JUMP = _TO_TARGET + b"\xff\xe0"  # jmp rax
LOOP = b"\xeb\xfe"  # jmp to itself


def give(platform: SimulatedPlatform, gpa: Gpa, contents: bytes, permissions: Permission) -> None:
    platform.change_state(gpa, size_bytes=PAGE, private=True)
    platform.validate(gpa, size_bytes=PAGE, validated=True)
    platform.write(gpa, contents)
    platform.adjust(gpa, size_bytes=PAGE, vmpl=Vmpl(2), permissions=permissions, vmsa=False)


def prepare(machine: RunningMachine, code: bytes, permissions: Permission) -> SimulatedPlatform:
    platform = machine.platform
    image = build_guest_image(base_gpa=BASE, mailbox_gpa=MAILBOX)
    for gpa, contents in image.pages.items():
        give(platform, gpa, code if gpa == BASE else contents, Permission.ALL)
    give(platform, TARGET, b"\xf4" * PAGE, permissions)
    platform.change_state(VMSA, size_bytes=PAGE, private=True)
    platform.validate(VMSA, size_bytes=PAGE, validated=True)
    platform.write(VMSA, image.vmsa_page())
    platform.adjust(VMSA, size_bytes=PAGE, vmpl=Vmpl(2), permissions=Permission.NONE, vmsa=True)
    return platform


def next_exit(platform: SimulatedPlatform) -> GuestExit:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if (found := platform.guest_exit()) is not None:
            return found
        platform.wait(deadline=deadline)
    raise AssertionError("the guest did not exit")


@pytest.mark.parametrize(
    ("code", "permissions", "fault"),
    [
        (WRITE, Permission.ALL, None),
        (READ, Permission.READ, None),
        (JUMP, Permission.READ | Permission.EXECUTE_SUPERVISOR, None),
        (WRITE, Permission.READ, NestedFault.PRESENT | NestedFault.WRITE),
        (WRITE, Permission.NONE, NestedFault.WRITE),
        (READ, Permission.NONE, NestedFault(0)),
        (JUMP, Permission.READ | Permission.WRITE, NestedFault.PRESENT | NestedFault.FETCH),
    ],
)
def test_rights_of_a_guest(code: bytes, permissions: Permission, fault: NestedFault | None) -> None:
    with running_machine(vcpu=run_vcpu) as machine:
        platform = prepare(machine, code, permissions)
        platform.run_guest(VMSA)
        found = next_exit(platform)
        if fault is None:
            assert found.exit_code == HLT
        else:
            assert (found.exit_code, found.exit_info_2) == (NPF, TARGET)
            assert found.exit_info_1 & (NestedFault.PRESENT | NestedFault.WRITE | NestedFault.FETCH) == fault
        written = code is WRITE and fault is None
        assert platform.read(TARGET, 1) == (b"\x77" if written else b"\xf4")


def test_a_right_that_is_taken_while_the_guest_runs() -> None:
    """The unmap is acknowledged in the middle of a running guest, and nothing of the page is left in its memory."""
    with running_machine(vcpu=run_vcpu) as machine:
        platform = prepare(machine, LOOP, Permission.ALL)
        platform.run_guest(VMSA)
        platform.adjust(TARGET, size_bytes=PAGE, vmpl=Vmpl(2), permissions=Permission.NONE, vmsa=False)
        assert not machine.machine.memory.populated(Home.VMPL2, TARGET, PAGE)
        assert platform.read(TARGET, PAGE) == b"\xf4" * PAGE
        assert platform.guest_exit() is None


def test_a_running_vmsa_is_nobodys_to_change() -> None:
    with running_machine(vcpu=run_vcpu) as machine:
        platform = prepare(machine, LOOP, Permission.ALL)
        platform.run_guest(VMSA)
        machine.as_host(lambda host: None)  # the host has started it by then
        update = machine.host_command(HostCommand.RMP_UPDATE, VMSA, PAGE, 0, 1)
        assert update.status == UpdateCode.FAIL_INUSE
        assert machine.host_command(HostCommand.VMRUN, VMSA, 0).status != 0


def test_a_vmsa_with_svme_clear_does_not_run() -> None:
    with running_machine(vcpu=run_vcpu) as machine:
        platform = prepare(machine, LOOP, Permission.ALL)
        offset, _ = VMSA_FIELDS["efer"]
        platform.write(Gpa(VMSA + offset), (0xD00).to_bytes(8, "little"))
        assert machine.host_command(HostCommand.VMRUN, VMSA, 0).status != 0


def test_the_host_cannot_run_a_page_that_is_no_vmsa() -> None:
    with running_machine(vcpu=run_vcpu) as machine:
        prepare(machine, LOOP, Permission.ALL)
        for gpa in (BASE, TARGET, MAILBOX, Gpa(0x0800_0000), Gpa(VMSA + 8)):
            assert machine.host_command(HostCommand.VMRUN, gpa, 0).status != 0
