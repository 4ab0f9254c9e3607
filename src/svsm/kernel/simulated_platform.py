# SPDX-License-Identifier: MIT OR Apache-2.0
"""The Platform driver for the simulated SEV-SNP machine.

Beside the kernel stand the hardware (instructions, trusted) and the host (GHCB exits, hostile). The driver keeps its
own record of what it has validated and maps exactly that; the hardware referees every instruction, so a wrong
record here makes the kernel fault or refuse, never see what is not its own.

The host schedules the guest: `run_guest` asks it, and its answer says that the guest has stopped. That answer is not
believed: the exit code in the VMSA is set to "none" before each run, and an answer without an exit is asked again.
"""

from __future__ import annotations

import dataclasses
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError, StateError
from svsm.abi.platform import PAGE_SIZE, AttestationReport, Device, Gpa, GuestExit, Permission, Vmpl
from svsm.formats.record import Buffer
from svsm.formats.snp import ghcb
from svsm.formats.snp.guest_message import MESSAGE_SIZE
from svsm.formats.snp.hardware_messages import Instruction, InstructionCode
from svsm.formats.snp.secrets import SecretsPage
from svsm.formats.snp.vmsa import VmsaView
from svsm.kernel.guest_requests import Again, GuestRequestChannel, Received
from svsm.kernel.machine_port import HostPort, InstructionPort
from svsm.kernel.mmio import MmioRegisters
from svsm.kernel.physical_memory import MemoryKind, PhysicalWindow
from svsm.kernel.ports import IoPorts

__all__ = [
    "CERTIFICATE_PAGES",
    "CONFIGURATION_BYTES",
    "DEVICE_TREE_BYTES",
    "LARGE_PAGE_SIZE",
    "SHARED_GPA",
    "SHARED_LENGTH",
    "WINDOW_BYTES",
    "SimulatedPlatform",
    "launched_ranges",
]

LARGE_PAGE_SIZE: Final = 2 * 1024 * 1024
SHARED_GPA: Final = 0x3000_0000
"""A range that is never assigned: what kernel and host exchange lies here."""
SHARED_LENGTH: Final = 0x40_0000
"""The first MiB is for exits and the guest's mailbox, the rest (`ghcb.DEVICE_MEMORY_GPA`) for devices."""
WINDOW_BYTES: Final = 0x4800_0000
"""The kernel maps guest-physical addresses below this."""
CERTIFICATE_PAGES: Final = 16
CONFIGURATION_BYTES: Final = 0x4000
"""Length of the launch configuration's parameter area."""
DEVICE_TREE_BYTES: Final = 0x4000
"""Length of the device tree's."""

_REQUEST: Final = SHARED_GPA
_RESPONSE: Final = SHARED_GPA + 0x1000
_LIST: Final = SHARED_GPA + 0x2000
_TEXT: Final = SHARED_GPA + 0x3000
_SCRATCH: Final = SHARED_GPA + 0x4000
_PORT_SCRATCH: Final = _SCRATCH + 0x100
_CERTIFICATES: Final = SHARED_GPA + 0x1_0000
_NO_EXIT: Final = (1 << 64) - 1
_GUEST_VMPL: Final = 2
_VMPL2_SHIFT: Final = 8
_VMSA_BIT: Final = 1 << 16
_MAX_IDLE_ANSWERS: Final = 1000


@dataclasses.dataclass(slots=True)
class _Run:
    vmsa_gpa: Gpa
    number: int
    idle_answers: int = 0


class SimulatedPlatform:
    """`svsm.abi.platform.Platform` on the simulated machine.

    Args:
        descriptors: "private", "vmpl2", "shared" (memfds), "hardware" and "host" (SOCK_SEQPACKET); others are
            not looked at.
        validated: The ranges (gpa, length in bytes) that were launched; whole pages. They come from the measured
            start registers and settings, not from the host.
        secrets_gpa: The secrets page, in one of them.
        host_seconds: How long the host may take for an answer.
        end: Ends the process.

    Raises:
        BackendError: ``platform-memory``.
        ProtocolError: ``platform-not-validated`` when the secrets page is not among the ranges.
    """

    def __init__(
        self,
        descriptors: Mapping[str, int],
        *,
        validated: Iterable[tuple[int, int]],
        secrets_gpa: int,
        host_seconds: float = 10.0,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._window = PhysicalWindow(descriptors, size_bytes=WINDOW_BYTES)
        self._instructions = InstructionPort(socket.socket(fileno=descriptors["hardware"]))
        self._host = HostPort(socket.socket(fileno=descriptors["host"]))
        self._poll = select.epoll()
        self._poll.register(self._instructions, select.EPOLLIN)
        self._poll.register(self._host, select.EPOLLIN)
        self._poll.register(self._host.event, select.EPOLLIN)
        self._host_seconds = host_seconds
        self._end = end
        self._rights: dict[int, tuple[Permission, bool]] = {}
        self._run: _Run | None = None
        self._known_vmsas: set[int] = set()
        self._services: dict[socket.socket, int] = {}
        for gpa, length in validated:
            self._window.show(gpa, length, MemoryKind.PRIVATE)
        self._window.show(SHARED_GPA, SHARED_LENGTH, MemoryKind.SHARED)
        self._secrets_gpa = secrets_gpa
        self._requests = GuestRequestChannel(self.secrets().vmpck0)

    @classmethod
    def at_start(cls, registers: Mapping[str, int], descriptors: Mapping[str, int]) -> SimulatedPlatform:
        """The platform of a kernel that the loader has just started (`ProcessContext.registers`, `.descriptors`)."""
        return cls(descriptors, validated=launched_ranges(registers), secrets_gpa=registers["rbx"])

    # ---- memory --------------------------------------------------------------------------------------------------

    def read(self, gpa: Gpa, length: int) -> bytes:
        """See `Platform`. Raises ``platform-not-validated``, ``platform-address``."""
        return self._window.read(gpa, length)

    def write(self, gpa: Gpa, data: Buffer) -> None:
        """See `Platform`. Raises ``platform-not-validated``, ``platform-address``."""
        self._window.write(gpa, data)

    def address_of(self, gpa: int) -> int:
        """Where a guest-physical byte is in this process, mapped or not: for the test that shows the fault."""
        return self._window.address_of(gpa)

    def secrets(self) -> SecretsPage:
        """The secrets page as it is now (its VMPCK0 is gone once the report channel is dead)."""
        return SecretsPage.parse(self._window.read(self._secrets_gpa, SecretsPage.SIZE))

    def validate(self, gpa: Gpa, *, size_bytes: int, validated: bool) -> bool:
        """See `Platform`; the page is zero afterwards.

        Raises:
            ProtocolError: ``platform-address``, ``platform-instruction`` (with ``instruction_code``).
        """
        self._check_page(gpa, size_bytes)
        kinds = {} if validated else self._window.kinds(gpa, size_bytes)
        if kinds:
            self._window.hide(gpa, size_bytes)
        code, carry = self._instructions.execute(Instruction.PVALIDATE, gpa, size_bytes, int(validated))
        if code != InstructionCode.SUCCESS:
            for page, kind in kinds.items():
                self._window.show(page, PAGE_SIZE, kind)
            raise _instruction_failed("PVALIDATE", gpa, code)
        if not carry:
            self._forget(gpa, size_bytes)
            if validated:
                self._window.show(gpa, size_bytes, MemoryKind.PRIVATE)
        return not carry

    def adjust(self, gpa: Gpa, *, size_bytes: int, vmpl: Vmpl, permissions: Permission, vmsa: bool) -> None:
        """See `Platform`.

        Raises:
            ProtocolError: ``platform-address``, ``platform-instruction`` (with ``instruction_code``).
        """
        self._check_page(gpa, size_bytes)
        word = vmpl | int(permissions) << _VMPL2_SHIFT | (_VMSA_BIT if vmsa else 0)
        code, _ = self._instructions.execute(Instruction.RMPADJUST, gpa, size_bytes, word)
        if code != InstructionCode.SUCCESS:
            raise _instruction_failed("RMPADJUST", gpa, code)
        page = gpa // PAGE_SIZE
        rights = permissions if vmpl == _GUEST_VMPL else self._rights.get(page, (Permission.NONE, False))[0]
        kind = MemoryKind.VMPL2 if rights and not vmsa else MemoryKind.PRIVATE
        self._rights.update(dict.fromkeys(range(page, page + size_bytes // PAGE_SIZE), (rights, vmsa)))
        if self._window.kind_of(gpa) is not kind:
            self._window.show(gpa, size_bytes, kind)

    def change_state(self, gpa: Gpa, *, size_bytes: int, private: bool) -> None:
        """See `Platform`: page state changes, in 2 MiB pieces where they fit.

        Raises:
            StateError: ``platform-still-validated`` for giving back what is mapped as private.
            BackendError: ``platform-host-refused``, ``platform-host-deadline``, ``platform-host-gone``.
        """
        if gpa % PAGE_SIZE or size_bytes % PAGE_SIZE or size_bytes <= 0 or gpa < 0 or gpa + size_bytes > WINDOW_BYTES:
            raise ProtocolError("not a range of pages", code="platform-address", gpa=gpa, length=size_bytes)
        for page in range(gpa, gpa + size_bytes, PAGE_SIZE):
            if self._window.kind_of(page) in (MemoryKind.PRIVATE, MemoryKind.VMPL2):
                raise StateError("the page is still validated", code="platform-still-validated", gpa=page)
        operation = ghcb.PageOperation.PRIVATE if private else ghcb.PageOperation.SHARED
        if private:
            self._window.hide(gpa, size_bytes)
        entries = _pieces(gpa, size_bytes, operation)
        for start in range(0, len(entries), ghcb.PSC_MAX_ENTRIES):
            self._window.write(_LIST, ghcb.pack_page_states(entries[start : start + ghcb.PSC_MAX_ENTRIES]))
            answer = self._host.exit(ghcb.ExitCode.PAGE_STATE_CHANGE, _LIST, deadline=self._deadline())
            if answer.arguments[ghcb.ANSWER_INFO_2]:
                raise BackendError("the host did not change the pages", code="platform-host-refused", gpa=gpa)
        if not private:
            self._window.show(gpa, size_bytes, MemoryKind.SHARED)

    # ---- attestation ---------------------------------------------------------------------------------------------

    def report(self, report_data: bytes) -> AttestationReport:
        """See `Platform`: one encrypted guest message, relayed by the host.

        Raises:
            BackendError: ``platform-report-refused``, ``platform-host-deadline``, ``platform-host-gone``: the channel
                to the AMD-SP is closed for good, as after every IntegrityError.
            IntegrityError: ``guest-message-tag``, ``platform-report-answer``.
            ProtocolError: ``platform-report-status``, ``platform-report-data``.
            StateError: ``platform-channel-dead``, ``guest-message-sequence``.
        """
        message = self._requests.request(report_data)
        extended = True
        try:
            while True:
                info_2 = self._send_request(message, extended=extended)
                result = self._requests.answered(info_2, self._window.read(_RESPONSE, MESSAGE_SIZE))
                if isinstance(result, Received):
                    certificates = self._certificates() if extended else b""
                    return AttestationReport(report=result.report, certificates=certificates)
                extended = extended and result is Again.SAME
        except BaseException:
            # Authentic refusals have left the channel idle; in every other case the message may still be answered.
            if not self._requests.idle:
                self._requests.wipe()
            if self._requests.dead:
                self._wipe_vmpck0()
            raise

    def _send_request(self, message: bytes, *, extended: bool) -> int:
        self._window.write(_REQUEST, message)
        self._window.write(_RESPONSE, bytes(MESSAGE_SIZE))
        if extended:
            self._window.write(_CERTIFICATES, bytes(CERTIFICATE_PAGES * PAGE_SIZE))
            code, more = ghcb.ExitCode.EXT_GUEST_REQUEST, (_CERTIFICATES, CERTIFICATE_PAGES)
        else:
            code, more = ghcb.ExitCode.GUEST_REQUEST, (0, 0)
        answer = self._host.exit(code, _REQUEST, _RESPONSE, *more, deadline=self._deadline())
        return answer.arguments[ghcb.ANSWER_INFO_2]

    def _certificates(self) -> bytes:
        table = self._window.read(_CERTIFICATES, CERTIFICATE_PAGES * PAGE_SIZE)
        return (table.rstrip(b"\0") + bytes(24))[: len(table)] if any(table[:24]) else b""

    def _wipe_vmpck0(self) -> None:
        page = self.secrets().replace(vmpck0=bytes(32))
        self._window.write(self._secrets_gpa, page.pack())

    # ---- the guest -----------------------------------------------------------------------------------------------

    def run_guest(self, vmsa_gpa: Gpa) -> None:
        """See `Platform`.

        Raises:
            StateError: ``platform-guest-running``.
            BackendError: ``platform-host-*``.
        """
        if self._run is not None:
            raise StateError("a guest is running", code="platform-guest-running")
        page = bytearray(self._window.read(vmsa_gpa, PAGE_SIZE))
        view = VmsaView(page)
        if vmsa_gpa not in self._known_vmsas:
            where = view.get("vmpl") << 16 | 1
            features = view.get("sev_features")
            answer = self._host.exit(ghcb.ExitCode.AP_CREATE, where, vmsa_gpa, features, deadline=self._deadline())
            if answer.arguments[ghcb.ANSWER_INFO_2]:
                raise BackendError("the host refused the vCPU", code="platform-host-refused", gpa=vmsa_gpa)
            self._known_vmsas.add(vmsa_gpa)
        if view.get("guest_exit_code") != _NO_EXIT:  # else it may be running already, and its registers changing
            view.set("guest_exit_code", _NO_EXIT)
            self._window.write(vmsa_gpa, page)
        self._run = _Run(vmsa_gpa, self._ask_to_run())

    def guest_exit(self) -> GuestExit | None:
        """See `Platform`.

        Raises:
            BackendError: ``platform-host-refused`` when the host does not run the guest, ``platform-host-gone``.
        """
        run = self._run
        if run is None:
            self._host.drain()
            return None
        answer = self._host.take_answer(run.number)
        if answer is None:
            return None
        view = VmsaView(bytearray(self._window.read(run.vmsa_gpa, PAGE_SIZE)))
        if answer.arguments[ghcb.ANSWER_INFO_2]:
            self._run = None
            raise BackendError("the host does not run the guest", code="platform-host-refused", gpa=run.vmsa_gpa)
        if view.get("guest_exit_code") == _NO_EXIT:
            if run.idle_answers >= _MAX_IDLE_ANSWERS:
                self._run = None
                raise BackendError("the host does not run the guest", code="platform-host-refused", gpa=run.vmsa_gpa)
            self._run = _Run(run.vmsa_gpa, self._ask_to_run(), run.idle_answers + 1)
            return None
        self._run = None
        names = ("guest_exit_code", "guest_exit_info_1", "guest_exit_info_2")
        return GuestExit(*(view.get(name) for name in names))

    def _ask_to_run(self) -> int:
        return self._host.start(ghcb.ExitCode.RUN_VMPL, _GUEST_VMPL, deadline=self._deadline())

    # ---- services, devices, events -------------------------------------------------------------------------------

    def spawn(self, service: str, archive: int, parameters: Mapping[str, str]) -> socket.socket:
        """See `Platform`. Raises ``platform-spawn``, ``platform-hardware``."""
        number, sock = self._instructions.spawn(service, archive, parameters)
        self._services[sock] = number
        return sock

    def end_service(self, connection: socket.socket) -> None:
        """See `Platform`. Raises ``platform-hardware``."""
        number = self._services.pop(connection, None)
        if number is not None:
            self._instructions.kill(number)

    def next_device(self) -> Device | None:
        """See `Platform`."""
        return self._host.next_device()

    def registers(self, gpa: Gpa, size_bytes: int) -> MmioRegisters:
        """See `Platform`. Raises ``platform-mmio``."""
        seconds = self._host_seconds
        return MmioRegisters(self._host, self._window, gpa, size_bytes, scratch_gpa=_SCRATCH, seconds=seconds)

    def ports(self) -> IoPorts:
        """See `Platform`."""
        return IoPorts(self._host, self._window, scratch_gpa=_PORT_SCRATCH, seconds=self._host_seconds)

    def device_memory(self) -> tuple[Gpa, memoryview]:
        """See `Platform`."""
        gpa = Gpa(ghcb.DEVICE_MEMORY_GPA)
        return gpa, self._window.view(gpa, ghcb.DEVICE_MEMORY_BYTES)

    def take_interrupt(self) -> bool:
        """See `Platform`."""
        return self._host.take_interrupt()

    @property
    def shutdown_asked(self) -> bool:
        """See `Platform`."""
        return self._host.look_for_shutdown()

    @property
    def host_gone(self) -> bool:
        """Whether the host has hung up: nothing more will come, and the kernel has no reason to go on."""
        self._host.drain()
        return self._host.closed

    def wait(self, *, deadline: float) -> bool:
        """See `Platform`."""
        return bool(self._poll.poll(max(0.0, deadline - time.monotonic())))

    def fileno(self) -> int:
        """See `Platform`."""
        return self._poll.fileno()

    def ended_services(self) -> list[int]:
        """The numbers of services that have ended since the last call."""
        numbers = []
        while (number := self._instructions.ended_service()) is not None:
            numbers.append(number)
        return numbers

    def terminate(self, reason: str) -> None:
        """See `Platform`: tells the host, then ends this process, which ends the VM whatever the host does."""
        text = reason.encode()[: PAGE_SIZE - 1]
        try:
            self._window.write(_TEXT, text)
            self._host.start(ghcb.ExitCode.TERMINATION, 1, _TEXT, len(text), deadline=time.monotonic() + 1)
        except BackendError:
            pass  # The host is gone; there is nobody left to tell.
        finally:
            self._requests.wipe()
            self._end(1)

    def close(self) -> None:
        """Let go of both channels and of the window; the memfds stay open. For tests: a kernel just ends."""
        self._poll.close()
        self._instructions.close()
        self._host.close()
        self._window.close()

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _deadline(self) -> float:
        return time.monotonic() + self._host_seconds

    def _forget(self, gpa: int, size_bytes: int) -> None:
        for page in range(gpa // PAGE_SIZE, (gpa + size_bytes) // PAGE_SIZE):
            self._rights.pop(page, None)

    @staticmethod
    def _check_page(gpa: int, size_bytes: int) -> None:
        if size_bytes not in (PAGE_SIZE, LARGE_PAGE_SIZE) or gpa % size_bytes:
            raise ProtocolError(
                "not a page",
                code="platform-instruction",
                gpa=gpa,
                length=size_bytes,
                instruction_code=int(InstructionCode.FAIL_INPUT),
            )
        if gpa < 0 or gpa + size_bytes > WINDOW_BYTES:
            raise ProtocolError("no memory at this address", code="platform-address", gpa=gpa)


def launched_ranges(registers: Mapping[str, int]) -> list[tuple[int, int]]:
    """What the image's launch has validated, as far as the kernel uses it: the pages that the start registers name.

    Args:
        registers: rip, rcx (loader), rdx, r8 (payload), rsi (settings), rdi (launch configuration), r9 (device tree),
            rbx (secrets).
    """
    lengths = (
        ("rbx", PAGE_SIZE),
        ("rdi", CONFIGURATION_BYTES),
        ("r9", DEVICE_TREE_BYTES),
        ("rip", registers["rcx"]),
        ("rdx", registers["r8"]),
        ("rsi", PAGE_SIZE),
    )
    return [(registers[name], -(-length // PAGE_SIZE) * PAGE_SIZE) for name, length in lengths if length]


def _instruction_failed(name: str, gpa: int, code: int) -> ProtocolError:
    return ProtocolError(f"{name} failed", code="platform-instruction", gpa=gpa, instruction_code=code)


def _pieces(gpa: int, size_bytes: int, operation: ghcb.PageOperation) -> list[ghcb.PageStateEntry]:
    """The range in 2 MiB pages where they fit, else in 4 KiB pages."""
    entries = []
    end = gpa + size_bytes
    while gpa < end:
        large = gpa % LARGE_PAGE_SIZE == 0 and end - gpa >= LARGE_PAGE_SIZE
        entries.append(ghcb.PageStateEntry(gpa, operation, large))
        gpa += LARGE_PAGE_SIZE if large else PAGE_SIZE
    return entries
