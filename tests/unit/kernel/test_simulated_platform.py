# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's driver against the real machine and against hosts that lie, replay, change, withhold and refuse."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest

from svsm.abi.errors import BackendError, IntegrityError, ProtocolError, StateError, SvsmError
from svsm.abi.platform import DeviceKind, Gpa, GuestExit, Permission, Vmpl
from svsm.formats.snp import ghcb
from svsm.formats.snp.certificate_table import parse_table
from svsm.formats.snp.hardware_messages import ANSWER, HostCommand, InstructionCode, Message
from svsm.formats.snp.report import parse_report
from svsm.host.hypervisor import DeviceOffer, Hypervisor
from svsm.kernel.machine_port import MAX_DEVICES, MAX_NONSENSE
from svsm.kernel.simulated_platform import (
    LARGE_PAGE_SIZE,
    SHARED_GPA,
    SHARED_LENGTH,
    WINDOW_BYTES,
    SimulatedPlatform,
)
from svsm.testing.machine_harness import running_machine, small_image, throwaway_chip
from tests.simulated import machine as simulated_machine

GUEST = Gpa(0x4000_0000)
PAGE = 4096
DATA = bytes(range(64))


# ---- memory ------------------------------------------------------------------------------------------------------


def test_launched_memory_is_readable_and_everything_else_is_not() -> None:
    with running_machine(small_image(archive=b"payload" * 1000)) as machine:
        platform = machine.platform
        assert platform.read(Gpa(0x0800_0000), 7000) == b"payload" * 1000
        assert platform.read(Gpa(0x4004), 2) == b"{}"
        for gpa, length, code in (
            (0x0, 1, "platform-not-validated"),
            (0x2000, 1, "platform-not-validated"),
            (0x0800_1FFF, 2, "platform-not-validated"),
            (GUEST, 1, "platform-not-validated"),
            (SHARED_GPA + SHARED_LENGTH, 1, "platform-not-validated"),
            (WINDOW_BYTES - 1, 2, "platform-address"),
            (-1, 1, "platform-address"),
            (0x1_0000, -1, "platform-address"),
            (0xFFFF_FFFF_F000, 1, "platform-address"),
            (1 << 70, 1, "platform-address"),
        ):
            with pytest.raises(ProtocolError) as error:
                platform.read(Gpa(gpa), length)
            assert error.value.code == code
            if length > 0:
                with pytest.raises(ProtocolError) as error:
                    platform.write(Gpa(gpa), b"x" * length)
                assert error.value.code == code


@pytest.mark.parametrize("size", [PAGE, LARGE_PAGE_SIZE])
def test_a_page_through_its_life(size: int) -> None:
    with running_machine() as machine:
        platform = machine.platform
        with pytest.raises(ProtocolError) as error:
            platform.validate(GUEST, size_bytes=size, validated=True)
        assert error.value.details["instruction_code"] == InstructionCode.NESTED_FAULT
        platform.change_state(GUEST, size_bytes=size, private=True)
        assert platform.validate(GUEST, size_bytes=size, validated=True)
        assert not platform.validate(GUEST, size_bytes=size, validated=True)
        platform.write(GUEST, b"kept")
        platform.adjust(GUEST, size_bytes=size, vmpl=Vmpl(2), permissions=Permission.ALL, vmsa=False)
        assert platform.read(GUEST, 4) == b"kept"
        platform.write(GUEST, b"open")
        platform.adjust(GUEST, size_bytes=size, vmpl=Vmpl(2), permissions=Permission.NONE, vmsa=False)
        assert platform.read(GUEST, 4) == b"open"
        with pytest.raises(StateError) as state:
            platform.change_state(GUEST, size_bytes=size, private=False)
        assert state.value.code == "platform-still-validated"
        assert platform.validate(GUEST, size_bytes=size, validated=False)
        with pytest.raises(ProtocolError):
            platform.read(GUEST, 1)
        platform.change_state(GUEST, size_bytes=size, private=False)
        assert platform.read(GUEST, size) == bytes(size)
        platform.write(GUEST, b"for the host")
        assert machine.hypervisor._shared(GUEST, 12) == b"for the host"


def test_a_refused_large_pvalidate_maps_nothing_that_was_not_mapped() -> None:
    with running_machine() as machine:
        platform = machine.platform
        platform.change_state(GUEST, size_bytes=LARGE_PAGE_SIZE, private=True)
        platform.validate(GUEST, size_bytes=LARGE_PAGE_SIZE, validated=True)
        platform.validate(Gpa(GUEST + PAGE), size_bytes=PAGE, validated=False)
        platform.adjust(GUEST, size_bytes=PAGE, vmpl=Vmpl(2), permissions=Permission.ALL, vmsa=False)
        platform.write(GUEST, b"open")
        platform.write(Gpa(GUEST + 2 * PAGE), b"private")
        with pytest.raises(ProtocolError) as error:
            platform.validate(GUEST, size_bytes=LARGE_PAGE_SIZE, validated=False)
        assert error.value.details["instruction_code"] == InstructionCode.FAIL_SIZEMISMATCH
        assert platform.read(GUEST, 4) == b"open"
        assert platform.read(Gpa(GUEST + 2 * PAGE), 7) == b"private"
        with pytest.raises(ProtocolError) as error:
            platform.read(Gpa(GUEST + PAGE), 1)
        assert error.value.code == "platform-not-validated"


def test_pvalidate_zeroes() -> None:
    with running_machine() as machine:
        platform = machine.platform
        platform.change_state(GUEST, size_bytes=PAGE, private=True)
        platform.validate(GUEST, size_bytes=PAGE, validated=True)
        platform.write(GUEST, b"x" * PAGE)
        platform.validate(GUEST, size_bytes=PAGE, validated=False)
        platform.validate(GUEST, size_bytes=PAGE, validated=True)
        assert platform.read(GUEST, PAGE) == bytes(PAGE)


def test_a_vmsa_page_is_out_of_the_guests_reach() -> None:
    with running_machine() as machine:
        platform = machine.platform
        platform.change_state(GUEST, size_bytes=LARGE_PAGE_SIZE, private=True)
        platform.validate(GUEST, size_bytes=LARGE_PAGE_SIZE, validated=True)
        platform.adjust(GUEST, size_bytes=LARGE_PAGE_SIZE, vmpl=Vmpl(2), permissions=Permission.ALL, vmsa=False)
        platform.adjust(GUEST, size_bytes=PAGE, vmpl=Vmpl(2), permissions=Permission.ALL, vmsa=True)
        platform.write(GUEST, b"registers")
        memory = machine.machine.memory
        from svsm.hardware.rmp import Home

        assert memory.read(Home.PRIVATE, GUEST, 9) == b"registers"
        assert not memory.populated(Home.VMPL2, GUEST, PAGE)


@pytest.mark.parametrize(
    ("gpa", "size", "code"),
    [
        (GUEST + 1, PAGE, "platform-instruction"),
        (GUEST + PAGE, LARGE_PAGE_SIZE, "platform-instruction"),
        (GUEST, 8192, "platform-instruction"),
        (WINDOW_BYTES, PAGE, "platform-address"),
        (-PAGE, PAGE, "platform-address"),
    ],
)
def test_instructions_on_what_is_no_page(gpa: int, size: int, code: str) -> None:
    with running_machine() as machine:
        with pytest.raises(ProtocolError) as error:
            machine.platform.validate(Gpa(gpa), size_bytes=size, validated=True)
        assert error.value.code == code


def test_the_host_cannot_move_a_page_that_is_not_there() -> None:
    with running_machine() as machine, pytest.raises(BackendError) as error:
        machine.platform.change_state(Gpa(0x2000_0000), size_bytes=PAGE, private=True)
    assert error.value.code == "platform-host-refused"


# ---- reports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 5])
def test_reports_with_certificates(version: int) -> None:
    chip = simulated_machine().chip(report_version=version)
    with running_machine(chip=chip, configuration=b'{"version":1}') as machine:
        for data in (DATA, DATA[::-1]):
            answer = machine.platform.report(data)
            report = parse_report(answer.report)
            assert (report.version, report.report_data, report.vmpl) == (version, data, 0)
            assert report.measurement == machine.launched.digest
            assert report.host_data == machine.launched.host_data
            assert parse_table(answer.certificates) == parse_table(chip.certificates)


def test_report_data_of_another_length_does_no_harm() -> None:
    with running_machine() as machine:
        for length in (0, 63, 65):
            with pytest.raises(ProtocolError):
                machine.platform.report(bytes(length))
        machine.platform.report(DATA)


class Tampering(Hypervisor):
    """Changes one byte of the response, once."""

    offset = 0x80

    def _relay(self, request_gpa: int, response_gpa: int) -> int:
        status = super()._relay(request_gpa, response_gpa)
        byte = os.pread(self._shared_fd, 1, response_gpa + self.offset)
        os.pwrite(self._shared_fd, bytes([byte[0] ^ 1]), response_gpa + self.offset)
        return status


class TamperingWithTheHeader(Tampering):
    offset = 0x36


class TamperingWithTheNumber(Tampering):
    offset = 0x20


class ChangingTheRequest(Hypervisor):
    def _relay(self, request_gpa: int, response_gpa: int) -> int:
        os.pwrite(self._shared_fd, b"\xff", request_gpa + 0x61)
        return super()._relay(request_gpa, response_gpa)


class Replaying(Hypervisor):
    """Answers the second request with the first answer."""

    first: bytes = b""

    def _relay(self, request_gpa: int, response_gpa: int) -> int:
        status = super()._relay(request_gpa, response_gpa)
        if self.first:
            os.pwrite(self._shared_fd, self.first, response_gpa)
        else:
            self.first = os.pread(self._shared_fd, PAGE, response_gpa)
        return status


class Reflecting(Hypervisor):
    """Gives the request back as the answer."""

    def _relay(self, request_gpa: int, response_gpa: int) -> int:
        os.pwrite(self._shared_fd, os.pread(self._shared_fd, PAGE, request_gpa), response_gpa)
        return 0


class Dropping(Hypervisor):
    """Says that all is well and does nothing."""

    def _relay(self, request_gpa: int, response_gpa: int) -> int:
        return 0


class FirmwareRefusal(Hypervisor):
    def _relay(self, request_gpa: int, response_gpa: int) -> int:
        return 0x16


class Overfilled(Hypervisor):
    """A certificate table that never fits."""

    def _extended_request(self, message: Message, *arguments: int) -> Message:
        return message.answer(0, ghcb.VmmError.INVALID_LENGTH << 32, 1 << 40)


class BusyOnce(Hypervisor):
    count = 1

    def _extended_request(self, message: Message, *arguments: int) -> Message:
        if self.count:
            self.count -= 1
            return message.answer(0, ghcb.VmmError.BUSY << 32)
        return super()._extended_request(message, *arguments)


class BusyTwice(BusyOnce):
    count = 2


class UnknownVmmError(Hypervisor):
    def _extended_request(self, message: Message, *arguments: int) -> Message:
        return message.answer(0, 99 << 32)


class Silent(Hypervisor):
    def _extended_request(self, message: Message, *arguments: int) -> Message | None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("host", "codes"),
    [
        (Tampering, {"guest-message-tag"}),
        (TamperingWithTheHeader, {"guest-message-tag", "guest-message-size"}),
        (TamperingWithTheNumber, {"guest-message-tag"}),
        (ChangingTheRequest, {"platform-report-refused"}),
        (Reflecting, {"platform-report-answer"}),
        (Dropping, {"guest-message-header"}),
        (FirmwareRefusal, {"platform-report-refused"}),
        (BusyTwice, {"platform-report-refused"}),
        (UnknownVmmError, {"platform-report-refused"}),
        (Silent, {"platform-host-deadline"}),
    ],
)
def test_a_host_that_interferes_gets_no_second_try(host: type[Hypervisor], codes: set[str]) -> None:
    with running_machine(host=host, host_seconds=0.3) as machine:
        assert any(machine.platform.secrets().vmpck0)
        with pytest.raises(SvsmError) as error:
            machine.platform.report(DATA)
        assert error.value.code in codes
        assert not any(machine.platform.secrets().vmpck0)
        assert any(machine.platform.secrets().vmpck1)
        with pytest.raises(StateError) as state:
            machine.platform.report(DATA)
        assert state.value.code == "platform-channel-dead"


def test_a_replayed_answer() -> None:
    with running_machine(host=Replaying) as machine:
        machine.platform.report(DATA)
        with pytest.raises(IntegrityError) as error:
            machine.platform.report(DATA)
        assert error.value.code == "platform-report-answer"
        assert not any(machine.platform.secrets().vmpck0)


@pytest.mark.parametrize("host", [Overfilled, BusyOnce])
def test_the_two_failures_after_which_the_same_message_is_sent_again(host: type[Hypervisor]) -> None:
    with running_machine(host=host, chip=simulated_machine().chip()) as machine:
        for _ in range(2):
            answer = machine.platform.report(DATA)
            assert parse_report(answer.report).report_data == DATA
            assert bool(answer.certificates) is (host is BusyOnce)


def test_requests_are_never_the_same_message_under_one_number() -> None:
    seen: dict[bytes, bytes] = {}

    class Watching(Hypervisor):
        def _relay(self, request_gpa: int, response_gpa: int) -> int:
            page = os.pread(self._shared_fd, PAGE, request_gpa)
            assert seen.setdefault(page[0x20:0x28], page) == page
            return super()._relay(request_gpa, response_gpa)

    with running_machine(host=Watching) as machine:
        for _ in range(3):
            machine.platform.report(DATA)
    assert [int.from_bytes(number, "little") for number in seen] == [1, 3, 5]


# ---- devices and a talkative host ---------------------------------------------------------------------------------


def send(machine: object, data: bytes, descriptors: list[int] | None = None) -> None:
    """From the host's socket, whatever it is."""

    def work(host: Hypervisor) -> None:
        assert host._kernel is not None
        socket.send_fds(host._kernel, [data], descriptors or [])

    machine.as_host(work)  # type: ignore[attr-defined]


def test_devices_arrive_in_order() -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    devices = [
        DeviceOffer(ghcb.DeviceKind.SERIAL, theirs.detach()),
        DeviceOffer(ghcb.DeviceKind.CLIENT, read, index=1, port=1),
    ]
    with ours, running_machine(devices=devices) as machine:
        assert machine.platform.wait(deadline=time.monotonic() + 5)
        first, second = machine.platform.next_device(), machine.platform.next_device()
        assert first is not None
        assert second is not None
        assert (first.kind, first.index, first.port) == (DeviceKind.SERIAL, 0, 0)
        assert (second.kind, second.index, second.port) == (DeviceKind.CLIENT, 1, 1)
        assert machine.platform.next_device() is None
        with socket.socket(fileno=first.descriptor) as serial:
            serial.sendall(b"hello")
            assert ours.recv(5) == b"hello"
        os.close(second.descriptor)
    os.close(write)


def test_a_device_that_came_during_a_wait_for_an_answer_is_announced() -> None:
    with running_machine() as machine:
        read, write = os.pipe()
        send(machine, Message(ghcb.HostMessage.DEVICE, (3, 0, 0)).pack(), [read])
        os.close(read)
        machine.platform.report(DATA)
        for _ in range(2):
            assert machine.platform.wait(deadline=time.monotonic())
        device = machine.platform.next_device()
        assert device is not None
        os.close(device.descriptor)
        os.close(write)
        assert not machine.platform.wait(deadline=time.monotonic())


def test_interrupt_and_shutdown() -> None:
    with running_machine() as machine:
        platform = machine.platform
        assert not platform.take_interrupt()
        for _ in range(3):
            machine.as_host(lambda host: host.interrupt())
        machine.as_host(lambda host: host.shutdown())
        assert platform.wait(deadline=time.monotonic())
        assert platform.take_interrupt()
        assert not platform.take_interrupt()
        assert platform.wait(deadline=time.monotonic())
        assert platform.shutdown_asked
        assert platform.shutdown_asked
        assert not platform.wait(deadline=time.monotonic())


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        bytes(range(1, 101)),
        Message(ghcb.HostMessage.DEVICE, (1,)).pack(),
        Message(ghcb.HostMessage.DEVICE, (9,)).pack(),
        Message(ghcb.HostMessage.EXIT | ANSWER, identifier=99).pack(),
        Message(ghcb.HostMessage.EXIT, (1,)).pack(),
        Message(0xFFFF).pack(),
    ],
)
def test_what_the_host_says_out_of_turn_is_nothing(message: bytes) -> None:
    with running_machine() as machine:
        send(machine, message)
        assert machine.platform.next_device() is None
        assert not machine.platform.host_gone
        machine.platform.report(DATA)


@pytest.mark.parametrize("count", [2, 100, 253])
def test_too_many_descriptors_at_once_are_closed(count: int) -> None:
    with running_machine() as machine:
        read, write = os.pipe()
        send(machine, Message(ghcb.HostMessage.DEVICE, (1, 0, 0)).pack(), [write] * count)
        os.close(write)
        assert machine.platform.next_device() is None
        assert os.read(read, 1) == b""
        os.close(read)


@pytest.mark.parametrize(("index", "port"), [(1 << 16, 0), (0, 2), (1 << 60, 0)])
def test_devices_with_impossible_numbers(index: int, port: int) -> None:
    with running_machine() as machine:
        read, write = os.pipe()
        send(machine, Message(ghcb.HostMessage.DEVICE, (3, index, port)).pack(), [write])
        os.close(write)
        assert machine.platform.next_device() is None
        assert os.read(read, 1) == b""
        os.close(read)


def test_a_flood_of_devices_is_capped() -> None:
    with running_machine() as machine:
        read, write = os.pipe()
        for _ in range(MAX_DEVICES + 40):
            send(machine, Message(ghcb.HostMessage.DEVICE, (3, 0, 0)).pack(), [write])
        os.close(write)
        got = []
        while (device := machine.platform.next_device()) is not None:
            got.append(device.descriptor)
        assert len(got) == MAX_DEVICES
        for descriptor in got:
            os.close(descriptor)
        assert os.read(read, 1) == b""
        os.close(read)


def test_a_host_that_only_talks_nonsense_has_hung_up() -> None:
    with running_machine() as machine:
        with contextlib.suppress(BackendError):
            for _ in range(MAX_NONSENSE + 64):
                send(machine, b"nonsense")
        assert machine.platform.host_gone
        with pytest.raises(BackendError):
            machine.platform.report(DATA)


def test_a_host_that_hangs_up() -> None:
    with running_machine() as machine:
        with contextlib.suppress(BackendError):
            machine.as_host(lambda host: host._close_kernel())
        assert machine.platform.wait(deadline=time.monotonic() + 5)
        assert machine.platform.host_gone
        with pytest.raises(BackendError) as error:
            machine.platform.report(DATA)
        assert error.value.code == "platform-host-gone"


# ---- the rest ----------------------------------------------------------------------------------------------------


def test_services_and_termination() -> None:
    with running_machine(chip=throwaway_chip()) as machine:
        archive = os.memfd_create("archive")
        os.write(archive, b"12345")
        with machine.platform.spawn("vtpm", archive, {"front": "socket"}) as syscalls:
            assert syscalls.recv(100) == b"vtpm {'front': 'socket'} 5"
        os.close(archive)
        assert machine.platform.ended_services() == []
        machine.platform.terminate("the volume is another one")
        assert machine.killed == [1]
    assert ("terminated", {"reason": "the volume is another one", "code": 1}) in machine.events
    assert machine.end is not None
    assert not machine.end.violation


def _wait_for_exit(platform: SimulatedPlatform) -> GuestExit | None:
    for _ in range(100):
        if (found := platform.guest_exit()) is not None:
            return found
        platform.wait(deadline=time.monotonic() + 0.05)
    return None


def test_running_a_guest_without_a_vcpu() -> None:
    with running_machine() as machine:
        platform = machine.platform
        platform.change_state(GUEST, size_bytes=PAGE, private=True)
        platform.validate(GUEST, size_bytes=PAGE, validated=True)
        platform.run_guest(GUEST)
        with pytest.raises(BackendError) as error:
            _wait_for_exit(platform)
        assert error.value.code == "platform-host-refused"


class LyingScheduler(Hypervisor):
    """Says that the guest has stopped without having run it."""

    runs = 0

    def _run_guest(self, message: Message, vmpl: int) -> Message | None:
        self.runs += 1
        return message.answer()


def test_an_exit_that_never_happened_is_not_believed() -> None:
    with running_machine(host=LyingScheduler) as machine:
        platform = machine.platform
        platform.change_state(GUEST, size_bytes=PAGE, private=True)
        platform.validate(GUEST, size_bytes=PAGE, validated=True)
        platform.write(Gpa(GUEST + 0x3C0), (0x403).to_bytes(8, "little"))
        platform.run_guest(GUEST)
        for _ in range(5):
            platform.wait(deadline=time.monotonic() + 1)
            assert platform.guest_exit() is None
        assert machine.as_host(lambda host: host.runs) >= 3  # type: ignore[attr-defined,operator]
        with pytest.raises(StateError):
            platform.run_guest(GUEST)


def test_host_commands_go_on_while_the_kernel_works() -> None:
    with running_machine() as machine:
        assert machine.host_command(HostCommand.CPUID).status == 0


def test_a_service_is_killed_and_its_number_forgotten() -> None:
    with running_machine(chip=throwaway_chip()) as machine:
        archive = os.memfd_create("archive")
        killed: list[int] = []
        with machine.platform.spawn("vtpm", archive, {}) as syscalls:
            (number,) = machine.machine._services
            machine.machine._services[number].kill = lambda: killed.append(number)  # type: ignore[method-assign]
            machine.platform.end_service(syscalls)
            machine.platform.end_service(syscalls)
            # The machine answers this after it has executed what came before.
            machine.platform.validate(Gpa(0x1000), size_bytes=4096, validated=True)
            assert killed == [number]
        os.close(archive)
