# SPDX-License-Identifier: MIT OR Apache-2.0
"""Platform: what the kernel sees of the hardware, and the only way it reaches it.

The kernel is the same code on the simulated chip and in a real confidential VM; the driver below this interface
knows how a page is validated, how a report is fetched (encrypted guest messages here, /dev/sev-guest in an
appliance) and how a lower privilege level is run.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import socket
from collections.abc import Mapping
from typing import NewType, Protocol

from svsm.formats.record import Buffer

__all__ = [
    "PAGE_SIZE",
    "AttestationReport",
    "Device",
    "DeviceKind",
    "DevicePorts",
    "DeviceRegisters",
    "Gpa",
    "GuestExit",
    "Permission",
    "Platform",
    "Vmpl",
]

Gpa = NewType("Gpa", int)
"""Guest physical address, in bytes."""

Vmpl = NewType("Vmpl", int)
"""Virtual machine privilege level, 0 (most) to 3."""

PAGE_SIZE = 4096


class Permission(enum.IntFlag):
    """RMP permissions of one VMPL on one page (AMD 24593 §15.36.7; RMPADJUST attribute bits 8 to 11)."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE_USER = 4
    EXECUTE_SUPERVISOR = 8
    ALL = 15


@dataclasses.dataclass(frozen=True, slots=True)
class AttestationReport:
    """An attestation report and the certificates that the host offered with it."""

    report: bytes
    """1184 bytes, AMD 56860 table 23."""
    certificates: bytes
    """A certificate table (AMD 56421 §4.1.8.1), b"" when the host gave none; untrusted."""


@dataclasses.dataclass(frozen=True, slots=True)
class GuestExit:
    """Why a lower privilege level stopped running."""

    exit_code: int
    """VMSA.guest_exit_code; 0x403 is VMGEXIT."""
    exit_info_1: int
    exit_info_2: int


class DeviceKind(enum.StrEnum):
    """What the host says that a device is."""

    SERIAL = "serial"
    DISK = "disk"
    CLIENT = "client"


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """Something that the host has handed over. Nothing about it is known to be true, not even its kind."""

    kind: DeviceKind
    index: int
    """Which disk, or which TPM's client."""
    port: int
    """Of a client: 0 control, 1 data."""
    descriptor: int
    """Who takes the device owns it and closes it."""

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


class DeviceRegisters(Protocol):
    """A device's register window. Every value that comes out of it is the host's."""

    expires: float
    """No access outlasts this (`time.monotonic`); infinity at first."""

    @property
    def size_bytes(self) -> int:
        """Of the window."""

    def read32(self, offset: int) -> int:
        """The register at a byte offset."""

    def write32(self, offset: int, value: int) -> None:
        """Set a register."""

    def wait_interrupt(self, seconds: float) -> bool:
        """Until an interrupt arrives, at most so long; whether one did. It may be spurious."""

    def close(self) -> None:
        """Let go."""


class DevicePorts(Protocol):
    """The machine's I/O ports. Every value that comes out of one is the host's."""

    expires: float
    """No access outlasts this (`time.monotonic`); infinity at first."""

    def in8(self, port: int, count: int = 1) -> bytes:
        """Read a port's byte, so many times."""

    def out8(self, port: int, data: bytes) -> None:
        """Write each byte to a port."""

    def in32(self, port: int) -> int:
        """Read 32 bits."""

    def out32(self, port: int, value: int) -> None:
        """Write 32 bits."""

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """Until an interrupt arrives, at most so long; whether one did. It may be spurious, or another line's."""

    def fileno(self) -> int:
        """Polls readable when an interrupt may have arrived."""


class Platform(Protocol):
    """One confidential VM's hardware, as VMPL0 sees it.

    Memory errors (not validated, not assigned, wrong size) raise `ProtocolError` with a ``platform-*`` code; the
    hardware instruction codes that the protocols report to the guest travel in ``details["instruction_code"]``.
    """

    def read(self, gpa: Gpa, length: int) -> bytes:
        """Bytes of validated private, VMPL2 or shared memory."""

    def write(self, gpa: Gpa, data: Buffer) -> None:
        """Store bytes; the page must be validated, or shared."""

    def validate(self, gpa: Gpa, *, size_bytes: int, validated: bool) -> bool:
        """PVALIDATE one page of 4 KiB or 2 MiB. Returns False when it was in that state already (carry flag)."""

    def adjust(self, gpa: Gpa, *, size_bytes: int, vmpl: Vmpl, permissions: Permission, vmsa: bool) -> None:
        """RMPADJUST: set what `vmpl` may do with one page."""

    def change_state(self, gpa: Gpa, *, size_bytes: int, private: bool) -> None:
        """Ask the host to assign pages to this VM (they still need `validate`), or to take them back as shared.

        Pages that are given back must have been rescinded before; their contents are lost either way.
        """

    def report(self, report_data: bytes) -> AttestationReport:
        """A VMPL0 report over `report_data` (64 bytes), signed by the chip."""

    def run_guest(self, vmsa_gpa: Gpa) -> None:
        """Let the vCPU whose VMSA this is run; its exit arrives as an event of `guest_exit`."""

    def guest_exit(self) -> GuestExit | None:
        """The exit of the running vCPU, or None while it runs. `fileno` polls readable when there is one."""

    def spawn(self, service: str, archive: int, parameters: Mapping[str, str]) -> socket.socket:
        """Start a confined user-mode process; returns the kernel's end of its syscall socket.

        Args:
            service: Its role in the payload.
            archive: Descriptor of the payload archive, a sealed memfd (`ProcessContext.archive`); stays the caller's.
            parameters: What the service is told; names are words.
        """

    def end_service(self, connection: socket.socket) -> None:
        """End the process at the other end of a socket that `spawn` returned, whatever it is doing.

        Closing the socket is not enough: a hijacked service would go on with the client connections that it holds.
        """

    def ended_services(self) -> list[int]:
        """The numbers of services that have ended since the last call; that their sockets closed says so too."""

    def next_device(self) -> Device | None:
        """The oldest device that the host has handed over, or None. `fileno` polls readable when one arrives."""

    def registers(self, gpa: Gpa, size_bytes: int) -> DeviceRegisters:
        """A device's register window. Raises `ProtocolError` where no such window may be."""

    def ports(self) -> DevicePorts:
        """The I/O ports."""

    def device_memory(self) -> tuple[Gpa, memoryview]:
        """Shared memory for devices' rings and buffers, and where it is: at every byte's disposal of the host."""

    def take_interrupt(self) -> bool:
        """Whether the host has interrupted the guest since the last call (a halted vCPU may go on then)."""

    @property
    def shutdown_asked(self) -> bool:
        """Whether the host asks the VM to end in order."""

    @property
    def host_gone(self) -> bool:
        """Whether the host has hung up: nothing more will come from it."""

    def wait(self, *, deadline: float) -> bool:
        """Wait until there is an event, or `deadline` (`time.monotonic`) has passed; False then."""

    def fileno(self) -> int:
        """Readable when the hardware has an event for the kernel."""

    def terminate(self, reason: str) -> None:
        """Ask the hardware to end this VM; `reason` is for the host's log and must not be secret."""
