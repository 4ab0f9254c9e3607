# SPDX-License-Identifier: MIT OR Apache-2.0
"""The machine over its host channel: launch, pages, guest requests, VMRUN; what a hostile host gets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping

import pytest

from svsm.formats.errors import ProtocolError
from svsm.formats.igvm import IgvmFile
from svsm.formats.snp.cpuid_page import pack_cpuid_page, parse_cpuid_page
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.hardware_messages import HostCommand, Message
from svsm.formats.snp.page_info import KVM_VMSA_GPA, PageType
from svsm.hardware.machine import EndReason, KernelStart, Machine, Spawned
from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.messages import Port
from svsm.hardware.rmp import LARGE_PAGE, PAGE, Home, UpdateCode
from svsm.host.hardware_port import HardwarePort
from svsm.host.launcher import launch_image
from svsm.launch.digest import launch_digest
from svsm.testing.machine_harness import running_machine, small_image, throwaway_chip

GUEST = 0x4000_0000
POLICY = 0x3_0000


class Rig:
    """A machine with a bare host: the test sends commands itself."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.chip = throwaway_chip()
        self.memory = PhysicalMemory()
        self.machine = Machine(
            host=Port(theirs, name="the host"), chip=self.chip, spawner=_NoSpawner(), memory=self.memory
        )
        self.reason: list[EndReason] = []
        self.port = HardwarePort(ours)
        self.thread = threading.Thread(target=lambda: self.reason.append(self.machine.serve()))
        self.thread.start()

    def status(self, kind: HostCommand, *arguments: int, payload: bytes = b"") -> int:
        return self.port.ask(kind, *arguments, payload=payload).status

    def shared(self, gpa: int, data: bytes) -> None:
        self.memory.write(Home.SHARED, gpa, data)

    def close(self) -> None:
        self.port.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.memory.close()


class _NoSpawner:
    def kernel(self, start: KernelStart, descriptors: Mapping[str, int]) -> Spawned:
        raise AssertionError("nothing is to be started here")

    def service(self, name: str, archive: int, parameters: Mapping[str, str]) -> tuple[Spawned, socket.socket]:
        raise AssertionError("nothing is to be started here")


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_launch_update_moves_the_page_and_leaves_nothing_behind(rig: Rig) -> None:
    rig.port.command(HostCommand.LAUNCH_START, POLICY)
    rig.shared(GUEST, b"secret" * 1000)
    rig.port.command(HostCommand.LAUNCH_UPDATE, PageType.NORMAL, GUEST, 2, 0)
    assert rig.memory.read(Home.PRIVATE, GUEST, 6000) == b"secret" * 1000
    assert not rig.memory.populated(Home.SHARED, GUEST, 2 * PAGE)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((PageType.NORMAL, 0x2000_0000, 1, 0), FirmwareStatus.INVALID_ADDRESS),
        ((PageType.NORMAL, GUEST + 1, 1, 0), FirmwareStatus.INVALID_ADDRESS),
        ((PageType.NORMAL, 1 << 63, 1, 0), FirmwareStatus.INVALID_ADDRESS),
        ((PageType.NORMAL, GUEST, 0, 0), FirmwareStatus.INVALID_PARAM),
        ((PageType.NORMAL, GUEST, 1 << 40, 0), FirmwareStatus.INVALID_PARAM),
        ((PageType.NORMAL, GUEST, 1, 0x10), FirmwareStatus.INVALID_PARAM),
        ((PageType.SECRETS, GUEST, 2, 0), FirmwareStatus.INVALID_PARAM),
        ((99, GUEST, 1, 0), FirmwareStatus.INVALID_PARAM),
    ],
)
def test_launch_update_refusals(rig: Rig, arguments: tuple[int, ...], status: int) -> None:
    assert rig.status(HostCommand.LAUNCH_UPDATE, *arguments) == FirmwareStatus.INVALID_GUEST_STATE
    rig.port.command(HostCommand.LAUNCH_START, POLICY)
    assert rig.status(HostCommand.LAUNCH_UPDATE, *arguments) == status
    rig.port.command(HostCommand.LAUNCH_UPDATE, PageType.NORMAL, GUEST, 1, 0)
    assert rig.status(HostCommand.LAUNCH_UPDATE, PageType.NORMAL, GUEST, 1, 0) == FirmwareStatus.INVALID_PAGE_STATE


def test_a_refused_cpuid_page_comes_back_corrected(rig: Rig) -> None:
    rig.port.command(HostCommand.LAUNCH_START, POLICY)
    functions = parse_cpuid_page(rig.port.command(HostCommand.CPUID).payload)
    functions[0] = functions[0].replace(ebx=1)
    rig.shared(GUEST, pack_cpuid_page(functions))
    arguments = (PageType.CPUID, GUEST, 1, 0)
    assert rig.status(HostCommand.LAUNCH_UPDATE, *arguments) == FirmwareStatus.INVALID_PARAM
    assert rig.memory.read(Home.SHARED, GUEST, PAGE) == rig.chip.cpuid_page()
    assert rig.status(HostCommand.LAUNCH_UPDATE, *arguments) == FirmwareStatus.SUCCESS


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (HostCommand.LAUNCH_FINISH, FirmwareStatus.INVALID_LENGTH),
        (HostCommand.GUEST_REQUEST, FirmwareStatus.INVALID_GUEST_STATE),
        (HostCommand.VMRUN, FirmwareStatus.INVALID_GUEST_STATE),
        (HostCommand.VMEXIT, FirmwareStatus.INVALID_COMMAND),
        (HostCommand.ENDED, FirmwareStatus.INVALID_COMMAND),
    ],
)
def test_commands_before_their_time(rig: Rig, kind: HostCommand, status: int) -> None:
    assert rig.status(kind) == status


def test_rmp_update_reports_how_far_it_came(rig: Rig) -> None:
    answer = rig.port.ask(HostCommand.RMP_UPDATE, GUEST + 14 * 2**20, LARGE_PAGE, 1, 2)
    assert (answer.status, answer.arguments[0]) == (UpdateCode.FAIL_INPUT, 1)
    assert rig.status(HostCommand.RMP_UPDATE, GUEST, PAGE, 1, 0) == UpdateCode.FAIL_INPUT
    assert rig.status(HostCommand.RMP_UPDATE, GUEST, PAGE, 1, 1 << 50) == UpdateCode.FAIL_INPUT


@pytest.mark.parametrize("packet", [b"x", bytes(72), bytes(range(250)) * 2])
def test_a_packet_that_is_no_message_ends_the_vm(rig: Rig, packet: bytes) -> None:
    rig.port._sock.sendall(packet)
    rig.thread.join(10)
    assert rig.reason == [EndReason.VIOLATION]


def test_a_host_that_hangs_up_ends_the_vm(rig: Rig) -> None:
    rig.port.close()
    rig.thread.join(10)
    assert rig.reason == [EndReason.STOPPED]


def test_descriptors_from_the_host_are_closed(rig: Rig) -> None:
    read, write = os.pipe()
    socket.send_fds(rig.port._sock, [Message(HostCommand.CPUID).pack()], [write])
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)


def test_the_chips_digest_is_the_files() -> None:
    image = small_image()
    rig = Rig()
    try:
        launched = launch_image(
            rig.port, rig.memory.descriptors[Home.SHARED], IgvmFile.parse(image), configuration=b"{}"
        )
    finally:
        rig.close()
    assert launched.digest == launch_digest(IgvmFile.parse(image))
    assert launched.vmsas == (KVM_VMSA_GPA,)


def test_another_byte_is_another_digest() -> None:
    digests = set()
    for archive in (b"a" * 5000, b"a" * 4999 + b"b"):
        with running_machine(small_image(archive=archive)) as machine:
            digests.add(machine.launched.digest)
    assert len(digests) == 2


# ---- with a kernel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [PAGE, LARGE_PAGE])
def test_a_host_that_takes_a_validated_page_ends_the_vm(size: int) -> None:
    with running_machine() as machine:
        machine.platform.change_state(GUEST, size_bytes=size, private=True)  # type: ignore[arg-type]
        machine.platform.validate(GUEST, size_bytes=size, validated=True)  # type: ignore[arg-type]
        machine.platform.write(GUEST, b"still here")  # type: ignore[arg-type]
        with contextlib.suppress(Exception):
            machine.host_command(HostCommand.RMP_UPDATE, GUEST, size, 0, 1)
    assert machine.end is not None
    assert machine.end.violation
    assert "validated page" in machine.end.reason


def test_guest_request_pages_must_be_shared() -> None:
    with running_machine() as machine:
        ask = machine.host_command
        private, shared = 0x1_0000, 0x3000_0000
        for request, response, status in (
            (private, shared, FirmwareStatus.INVALID_PAGE_STATE),
            (shared, private, FirmwareStatus.INVALID_PAGE_STATE),
            (shared, shared, FirmwareStatus.INVALID_ADDRESS),
            (shared + 1, shared + PAGE, FirmwareStatus.INVALID_ADDRESS),
            (1 << 40, shared, FirmwareStatus.INVALID_PAGE_STATE),
            (shared, shared + PAGE, FirmwareStatus.INVALID_PARAM),
        ):
            assert ask(HostCommand.GUEST_REQUEST, request, response).status == status


def test_vmrun_refusals() -> None:
    with running_machine() as machine:
        ask = machine.host_command
        assert ask(HostCommand.VMRUN, KVM_VMSA_GPA, 0).status == FirmwareStatus.INVALID_GUEST_STATE
        assert ask(HostCommand.VMRUN, 0x1_0000, 0).status == FirmwareStatus.INVALID_PAGE_STATE
        assert ask(HostCommand.VMRUN, GUEST, 0).status == FirmwareStatus.INVALID_PAGE_STATE


def test_an_image_that_names_no_loader_is_refused() -> None:
    from svsm.formats.igvm import IgvmBuilder, PlatformType
    from svsm.formats.snp.vmsa import Vmsa

    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.policy(POLICY)
    builder.page(0x1000, b"x" * PAGE)
    builder.vp_context(KVM_VMSA_GPA, Vmsa(efer=0x1000, rip=0x1000, rcx=0).pack(), vp_index=0)
    with pytest.raises(ProtocolError) as error, running_machine(builder.finish().pack()):
        pass
    assert error.value.details["status"] == FirmwareStatus.INVALID_PARAM
