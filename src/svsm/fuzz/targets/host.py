# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the host can do: to the kernel's port, to messages of the AMD-SP, to the hardware, to a TPM's socket front.

Real sockets where the code under test has sockets, but never a second thread: all that the host will say is in the
socket before the other side looks, so that a run is the same each time.
"""

from __future__ import annotations

import array
import functools
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final, cast

from svsm.formats import swtpm, tpm
from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.formats.snp import ghcb, vcpu_messages
from svsm.formats.snp.guest_message import MESSAGE_SIZE, MessageHeader
from svsm.formats.snp.hardware_messages import ANSWER, HostCommand, Message
from svsm.formats.snp.page_info import PageType
from svsm.formats.snp.report import REPORT_BYTES, Report
from svsm.formats.snp.vmsa import Vmsa
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect
from svsm.fuzz.targets.material import chip_machine, open_descriptors
from svsm.hardware.launch import GuestContext
from svsm.hardware.machine import EndReason, KernelStart, Machine, Spawned
from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.messages import Port
from svsm.hardware.rmp import Home
from svsm.hardware.sp import SecureProcessor
from svsm.hardware.vcpu_port import EFER_SVME, VcpuPort, load_registers, store_exit
from svsm.kernel.guest_requests import Again, GuestRequestChannel
from svsm.kernel.machine_port import MAX_DEVICES, HostPort
from svsm.services.syscalls import Kernel
from svsm.services.vtpm.server import Server
from svsm.services.vtpm.tpm import Tpm

__all__ = ["ROWS"]

_MAX_STEPS: Final = 24
_GUEST: Final = 0x4000_0000
_POLICY: Final = 0x3_0000


# --- the kernel's port to the host ------------------------------------------------------------------------------


def _host_port(data: bytes) -> None:
    choices, before = Choices(data), open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    port = HostPort(ours)
    started: list[int] = []
    try:
        for _ in range(_MAX_STEPS):
            if not choices.more:
                break
            try:
                _port_step(choices, port, theirs, started)
            except SvsmError:
                continue
    finally:
        port.close()
        theirs.close()
    expect(open_descriptors() <= before, "no descriptor of the host's is left")


def _port_step(choices: Choices, port: HostPort, theirs: socket.socket, started: list[int]) -> None:
    operation = choices.below(6)
    if operation == 0:
        _send_as_host(choices, theirs, started)
    elif operation == 1:
        while (device := port.next_device()) is not None:
            device.close()
            expect(0 <= device.index < 1 << 16 and device.port in (0, 1), "a device is in its range")
    elif operation == 2:
        started.append(port.start(choices.number(), choices.number(), deadline=0.0))
    elif operation == 3 and started:
        answer = port.take_answer(choices.pick(started))
        expect(answer is None or answer.identifier in started, "an answer is to an exit")
    elif operation == 4:
        port.take_interrupt()
        expect(len(port._devices) <= MAX_DEVICES, "devices are bounded")
        expect(port.look_for_shutdown() in (True, False), "a shutdown is asked for or not")
    elif operation == 5:
        port.exit(ghcb.ExitCode.GUEST_REQUEST, 0x1000, 0x2000, deadline=0.0)


def _send_as_host(choices: Choices, theirs: socket.socket, started: list[int]) -> None:
    kinds = ghcb.HostMessage
    message = choices.pick(
        (
            Message(kinds.DEVICE, (choices.below(5), choices.below(3), choices.below(3))),
            Message(kinds.EXIT | ANSWER, (0, 0, choices.number()), identifier=choices.pick(started) if started else 1),
            Message(kinds.INTERRUPT),
            Message(kinds.SHUTDOWN),
        )
    )
    packet = choices.edited(message.pack()) if choices.flag() else message.pack()
    count = choices.pick((0, 0, 1, 1, 2))
    for _ in range(choices.pick((1, 1, 1, 80))):
        descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            theirs.sendmsg([packet], rights)
        except OSError:
            pass
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


# --- messages between the guest and the AMD-SP, relayed by the host -----------------------------------------------


_VMPCKS: Final = (b"0" * 32, b"1" * 32, b"2" * 32, b"3" * 32)
_CONTEXT: Final = GuestContext(
    policy=_POLICY, measurement=bytes(48), host_data=bytes(32), report_id=bytes(32), vmpcks=_VMPCKS
)


def _guest_requests(data: bytes) -> None:
    choices = Choices(data)
    chip = chip_machine().chip()
    processor, channel = SecureProcessor(chip, _CONTEXT), GuestRequestChannel(_VMPCKS[0])
    requests: list[bytes] = []
    responses: list[bytes] = []
    sequences: set[int] = set()
    asked = b""
    for _ in range(_MAX_STEPS):
        if not choices.more:
            break
        operation = choices.below(4)
        dead = channel.dead
        try:
            if operation == 0:
                wanted = bytes([choices.unsigned(1)]) * 64
                requests.append(channel.request(wanted))
                asked = wanted
                sequence = MessageHeader.parse(requests[-1][: MessageHeader.SIZE]).sequence
                expect(sequence not in sequences, "no number is used for two messages")
                sequences.add(sequence)
            elif operation == 1 and requests:
                page = choices.edited(choices.pick(requests)).ljust(MESSAGE_SIZE, b"\0")[:MESSAGE_SIZE]
                responses.append(processor.guest_request(page))
            elif operation == 2:
                page = choices.pick(responses) if responses and choices.flag() else bytes(MESSAGE_SIZE)
                status = choices.pick((0, 0, 0, 1 << 32, 2 << 32, choices.number()))
                found = channel.answered(status, choices.edited(page)[:MESSAGE_SIZE].ljust(MESSAGE_SIZE, b"\0"))
                if not isinstance(found, Again):
                    expect(len(found.report) == REPORT_BYTES, "a report has its size")
                    expect(Report.parse(found.report).report_data == asked, "a report is over what was asked")
            elif operation == 3 and choices.below(8) == 7:
                channel.wipe()
        except SvsmError:
            pass
        expect(channel.dead or not dead, "a dead channel stays dead")


# --- the host's commands to the hardware ------------------------------------------------------------------------


class _Process(Spawned):
    """A kernel that has ended already."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.close(write)

    def fileno(self) -> int:
        return self._read

    def collect(self) -> int:
        if self._read >= 0:
            os.close(self._read)
        self._read = -1
        return 0

    def kill(self) -> None:
        pass


class _Spawner:
    def __init__(self) -> None:
        self.kernels = 0

    def kernel(self, start: KernelStart, descriptors: Mapping[str, int]) -> Spawned:
        self.kernels += 1
        expect(len(start.loader_text) <= 64 << 20, "a loader has a bounded length")
        return _Process()

    def service(self, name: str, archive: int, parameters: Mapping[str, str]) -> tuple[Spawned, socket.socket]:
        raise BackendError("no service here", code="process-limit")


@functools.cache
def _memory() -> PhysicalMemory:
    return PhysicalMemory()


_COMMANDS: Final = (
    Message(HostCommand.LAUNCH_START, (_POLICY,)),
    Message(HostCommand.LAUNCH_UPDATE, (PageType.NORMAL, _GUEST, 1, 0)),
    Message(HostCommand.LAUNCH_UPDATE, (PageType.CPUID, _GUEST + 0x1000, 1, 0)),
    Message(HostCommand.LAUNCH_UPDATE, (PageType.SECRETS, _GUEST + 0x2000, 1, 0)),
    Message(HostCommand.LAUNCH_UPDATE, (PageType.VMSA, 0xFFFF_FFFF_F000, 1, 0)),
    Message(HostCommand.LAUNCH_UPDATE, (PageType.UNMEASURED, _GUEST + 0x3000, 3, 0)),
    Message(HostCommand.LAUNCH_FINISH, (0, 0), bytes(32)),
    Message(HostCommand.GUEST_REQUEST, (_GUEST + 0x8000, _GUEST + 0x9000)),
    *(Message(kind, (_GUEST, 1, 1)) for kind in HostCommand if kind is not HostCommand.ENDED),
)


def _machine_commands(data: bytes) -> None:
    """A conversation of the host with the hardware, up to its hanging up."""
    choices, memory, before = Choices(data), _memory(), open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    spawner = _Spawner()
    machine = Machine(
        host=Port(theirs, name="the host"),
        chip=chip_machine().chip(),
        spawner=spawner,
        memory=memory,
        random_bytes=lambda length: b"\x5a" * length,
    )
    finished = False
    for number in range(_MAX_STEPS):
        if not choices.more:
            break
        honest = choices.pick(_COMMANDS)
        arguments = tuple(_argument(choices, value) for value in honest.arguments)
        message = Message(honest.kind, arguments, honest.payload, identifier=number)
        if choices.below(8) == 7:
            memory.write(Home.SHARED, _GUEST + 0x1000 * choices.below(10), choices.blob(64))
        finished = finished or honest.kind == HostCommand.LAUNCH_FINISH
        packet = message.pack()
        if len(packet) <= 8192:
            ours.send(choices.edited(packet) or b"\0" if choices.below(8) == 7 else packet)
    ours.shutdown(socket.SHUT_WR)
    reason = machine.serve()
    expect(reason in EndReason, "the machine says why it ended")
    expect(spawner.kernels <= 1 and (finished or not spawner.kernels), "one kernel, after the launch is finished")
    answers = _answers(ours)
    expect(bool(answers) and answers[-1].kind == HostCommand.ENDED, "its last word is that it ended")
    ours.close()
    for extent in machine.rmp.extents():
        for home in Home:
            memory.punch(home, extent[0], min(extent[1], 1 << 24))
    expect(open_descriptors() <= before, "no descriptor is left")


def _argument(choices: Choices, value: int) -> int:
    kind = choices.below(6)
    if kind == 5:
        return choices.number() & ((1 << 64) - 1)
    if kind == 4:
        return (value + 0x1000 * choices.below(8)) & ((1 << 64) - 1)
    return value


def _answers(host: socket.socket) -> list[Message]:
    found: list[Message] = []
    host.setblocking(False)
    while True:
        try:
            data = host.recv(1 << 20)
        except ConnectionResetError:
            continue  # commands after the last one that was read; what was said before comes next
        except OSError:
            return found
        if not data:
            return found
        found.append(Message.parse(data))


# --- the vCPU's process, which runs guest code and may be the guest's --------------------------------------------


def _vcpu(data: bytes) -> None:
    """All that the process will say is there before the chip asks: acknowledgements and exits, honest or not."""
    choices, before = Choices(data), open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    port = VcpuPort(ours)
    try:
        page = Vmsa(efer=0x1D00, rip=0x1000, vmpl=2).pack()
        for number in range(1, _MAX_STEPS):
            if not choices.more:
                break
            operation = choices.below(4)
            packet = vcpu_messages.ack(number)
            if operation == 3:
                registers = load_registers(choices.edited(page)[: len(page)].ljust(len(page), b"\0"), ghcb_msr=0)
                packet = vcpu_messages.ExitMessage(
                    vcpu_messages.Kind.EXIT, 0, choices.below(_MAX_STEPS), choices.number(), 0, 0, registers
                ).pack()
            theirs.send(choices.edited(packet)[:1024] or b"\0" if choices.below(4) == 3 else packet)
            _vcpu_step(port, operation, page)
    except BackendError as error:
        expect(error.code == "machine-vcpu", "a broken vCPU process is called that")
    finally:
        port.close()
        theirs.close()
    expect(open_descriptors() <= before, "no descriptor is left")


def _vcpu_step(port: VcpuPort, operation: int, page: bytes) -> None:
    running = port.running
    if operation == 0:
        port.map(_GUEST, 0x1000, vcpu_messages.Memory.SHARED, vcpu_messages.Access.ALL)
    elif operation == 1:
        port.unmap(_GUEST, 0x1000)
    elif operation == 2 and running is None:
        port.run(_GUEST, load_registers(page, ghcb_msr=0), 0)
        port.receive()
    else:
        port.receive()
    while (stopped := port.take_stop()) is not None:
        expect(stopped.vmsa_gpa == _GUEST and port.running is None, "an exit is of the vCPU that ran")
        after = Vmsa.parse(store_exit(page, stopped))
        before = Vmsa.parse(page)
        expect((after.vmpl, after.sev_features) == (before.vmpl, before.sev_features), "a level is not the guest's")
        expect(bool(after.efer & EFER_SVME), "SVME is not the guest's")


# --- the socket front of a TPM ------------------------------------------------------------------------------------


class _FrontTpm:
    """A TPM without its library: what the server may ask of one."""

    def __init__(self) -> None:
        self.running = True
        self.commands = 0

    def execute(self, command: bytes, locality: int) -> bytes:
        expect(10 <= len(command) <= 4096, "a command has a possible size")
        expect(0 <= locality <= 255, "a locality is a byte")
        self.commands += 1
        return tpm.failure_response()

    def power_on(self, *, startup: bool) -> None:
        self.running = True

    def power_off(self, *, orderly: bool) -> None:
        self.running = False

    def established(self) -> tuple[int, int]:
        return 0, 1

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        return max(1024, min(wanted or 4096, 4096)), 1024, 4096

    def special(self, action: Callable[[object], int], *, locality: int) -> int:
        if not self.running:
            raise StateError("the TPM is off", code="tpm-state")
        return 0


def _tpm_front(data: bytes) -> None:
    choices, before = Choices(data), open_descriptors()
    device = _FrontTpm()
    server = Server(cast(Kernel, None), cast(Tpm, device), events=1, sockets=True)
    try:
        for _ in range(_MAX_STEPS):
            if not choices.more:
                break
            operation = choices.below(3)
            if operation == 0:
                number = choices.below(22)
                message = choices.edited(number.to_bytes(4, "big") + choices.blob(24))
                descriptor = os.open("/dev/null", os.O_RDONLY) if choices.below(4) == 3 else None
                reply = server.control(message, descriptor, unix=choices.flag())
                expect(4 <= len(reply) <= 20, "a control answer has a result")
            elif operation == 1:
                expect(len(server.platform(choices.unsigned(4))) in (0, 4), "a platform answer is a result or nothing")
            else:
                reader = swtpm.DataReader()
                try:
                    for frame in reader.feed(choices.blob(128)):
                        response = server.execute(frame.command, frame.locality)
                        expect(frame.wrap(response).find(response) >= 0, "a response is passed on whole")
                except SvsmError:
                    continue
    finally:
        server._poll.close()
    expect(open_descriptors() <= before, "no descriptor is left")


def _front_seeds() -> list[bytes]:
    command = bytes([2, 12]) + tpm.startup()
    return [command, bytes([0, 2, 4, 0, 0, 0, 0, 0, 0, 0]), bytes([0, 16, 0, 0, 3, 1, 1, 17, 0, 0, 0])]


ROWS = (
    Target(
        "host-port",
        "packets and descriptors of the host to the kernel",
        _host_port,
        lambda: [bytes([0, 1, 0, 0, 0, 0, 2, 1, 1, 2, 3, 4]), bytes([2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3])],
        max_bytes=512,
    ),
    Target(
        "guest-requests",
        "the guest's messages to the AMD-SP, relayed by the host",
        _guest_requests,
        lambda: [
            bytes([0, 7, 1, 0, 0, 2, 1, 0, 0, 0]),
            bytes([0, 1, 1, 0, 0, 2, 1, 0, 3, 0, 0, 9, 1, 1, 0, 2, 1, 0, 0, 0]),
        ],
        max_bytes=512,
    ),
    Target(
        "machine-commands",
        "commands of the host to the hardware",
        _machine_commands,
        lambda: [bytes([0, 0, 0, 1, 0, 0, 0, 0, 0, 6, 0, 0, 0]), bytes([0, 0, 0])],
        max_bytes=512,
    ),
    Target(
        "vcpu-port",
        "messages of the vCPU process to the hardware",
        _vcpu,
        lambda: [bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 5, 0]), bytes([3, 0, 0, 0, 0])],
        max_bytes=512,
    ),
    Target("tpm-front", "control, platform and data of a TPM's socket front", _tpm_front, _front_seeds, max_bytes=512),
)
