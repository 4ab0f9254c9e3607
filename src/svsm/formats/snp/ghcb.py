# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the kernel and the untrusted host say to each other: GHCB exits (AMD 56421) and devices.

A real guest writes a GHCB page in shared memory and executes VMGEXIT. The simulated kernel has no such instruction:
it sends the same values (exit code, the two info words, RAX, RBX) as one `Message` of kind `EXIT`, and the host
answers with the info words and RBX. Buffers stay where the specification puts them: guest messages, certificate
tables and page-state-change lists are in shared pages, named by their gpa. A VMPL2 guest uses the MSR protocol.

Host → kernel `DEVICE` messages carry one descriptor each. Nothing in any of them is believed: not the numbers, not the
kind of the descriptor. Devices without a descriptor are in the device tree (`svsm.formats.boot_devices`).

A register window is no memory: every access to it is an MMIO exit, whose value travels in shared memory at the scratch
address. The kernel accepts windows in one range (`MMIO_GPA`), and a device reaches one range of shared memory
(`DEVICE_MEMORY_GPA`) and no other. An access to an I/O port is an exit too (§4.1.2): its value is in RAX, or, for the
string instructions, so many values are at the scratch address.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final, Self

from svsm.formats.errors import FormatError
from svsm.formats.record import U16, U32, Buffer, Record, record

__all__ = [
    "ANSWER_INFO_1",
    "ANSWER_INFO_2",
    "ANSWER_RAX",
    "ANSWER_RBX",
    "DEVICE_MEMORY_BYTES",
    "DEVICE_MEMORY_GPA",
    "GHCB_MSR",
    "IO_WIDTHS_BYTES",
    "MAX_IO_COUNT",
    "MMIO_BYTES",
    "MMIO_GPA",
    "MMIO_WIDTH_BYTES",
    "PSC_LIST_BYTES",
    "PSC_MAX_ENTRIES",
    "VIRTIO_MMIO_GPA",
    "DeviceKind",
    "ExitCode",
    "HostMessage",
    "IoAccess",
    "MsrProtocol",
    "PageOperation",
    "PageStateEntry",
    "VmmError",
    "msr_run_vmpl_target",
    "pack_page_states",
    "parse_page_states",
    "split_guest_request_result",
]

GHCB_MSR: Final = 0xC001_0130

ANSWER_INFO_1: Final = 0
ANSWER_INFO_2: Final = 1
ANSWER_RBX: Final = 2
ANSWER_RAX: Final = 3
"""Positions in an EXIT answer's arguments. RAX answers an access to an I/O port alone."""

MMIO_GPA: Final = 0xC000_0000
"""Register windows lie here, below the interrupt controllers; never memory."""
MMIO_BYTES: Final = 0x3EC0_0000
VIRTIO_MMIO_GPA: Final = 0xFEB0_0000
"""Where the simulated machine has its virtio device."""
MMIO_WIDTH_BYTES: Final = 4
"""Every access of ours has this width."""
DEVICE_MEMORY_GPA: Final = 0x3010_0000
"""Shared memory for rings and buffers of devices."""
DEVICE_MEMORY_BYTES: Final = 0x30_0000


class HostMessage(enum.IntEnum):
    """Kernel ↔ host."""

    EXIT = 0x401
    """From the kernel: exit code, info 1, info 2, RAX, RBX, scratch address. Answer: info 1, info 2, RBX, RAX."""
    DEVICE = 0x402
    """From the host, one descriptor: `DeviceKind`, index (which TPM or disk), port (0 control or only, 1 data)."""
    INTERRUPT = 0x403
    """From the host: wake the guest's vCPU if it has halted. No arguments, no answer."""
    SHUTDOWN = 0x404
    """From the host: the operator presses the power button; the kernel ends in order. No arguments, no answer."""
    DEVICE_INTERRUPT = 0x405
    """From the host: a device with registers or ports has something to say, perhaps. No arguments, no answer."""


class DeviceKind(enum.IntEnum):
    """What a DEVICE message's device is said to be."""

    SERIAL = 1
    """A connected stream to the attestation proxy."""
    DISK = 2
    """An open disk file."""
    CLIENT = 3
    """A connected client of a TPM's socket front."""


class ExitCode(enum.IntEnum):
    """GHCB exit codes that the machine knows (AMD 56421 table 7); VMEXIT codes of a VMPL2 guest."""

    INTR = 0x60
    IOIO = 0x7B
    """info 1 = `IoAccess`, info 2 = count of a string access; the value is in RAX, a string at the scratch address."""
    SHUTDOWN = 0x7F
    NPF = 0x400
    VMGEXIT = 0x403
    MMIO_READ = 0x8000_0001
    """info 1 = address, info 2 = bytes; the value comes to the scratch address."""
    MMIO_WRITE = 0x8000_0002
    """info 1 = address, info 2 = bytes; the value is at the scratch address."""
    PAGE_STATE_CHANGE = 0x8000_0010
    GUEST_REQUEST = 0x8000_0011
    EXT_GUEST_REQUEST = 0x8000_0012
    AP_CREATE = 0x8000_0013
    RUN_VMPL = 0x8000_0018
    TERMINATION = 0x8000_FFFF
    """Not AMD's (there, only the MSR protocol terminates): info 1 = reason set and code; a text is in shared memory
    at info 2, length RAX."""


IO_WIDTHS_BYTES: Final = (1, 2, 4)
MAX_IO_COUNT: Final = 256
"""Values in one string access; ours, the specification's is the size of the shared buffer."""
_IO_IN, _IO_STRING, _IO_REPEAT, _IO_ADDRESS_64 = 1 << 0, 1 << 2, 1 << 3, 1 << 9
_IO_WIDTH_SHIFT: Final = 4
_IO_PORT_SHIFT: Final = 16


@dataclasses.dataclass(frozen=True, slots=True)
class IoAccess:
    """SW_EXITINFO1 of an IOIO exit (AMD 56421 §4.1.2; the bits are those of AMD 24593 §15.10.2)."""

    port: int
    width_bytes: int
    """1, 2 or 4."""
    reading: bool
    """IN or INS, not OUT or OUTS."""
    string: bool
    """INS or OUTS with a count, all to one port."""

    def pack(self) -> int:
        """The word.

        Raises:
            FormatError: ``ghcb-io`` for a port or width that does not exist.
        """
        if not 0 <= self.port < 1 << 16 or self.width_bytes not in IO_WIDTHS_BYTES:
            raise FormatError("there is no such I/O port access", code="ghcb-io", port=self.port, got=self.width_bytes)
        word = self.port << _IO_PORT_SHIFT | self.width_bytes << _IO_WIDTH_SHIFT | (_IO_IN if self.reading else 0)
        return word | (_IO_STRING | _IO_REPEAT | _IO_ADDRESS_64 if self.string else 0)

    @classmethod
    def parse(cls, word: int) -> Self:
        """Decode a word that `pack` makes.

        Raises:
            FormatError: ``ghcb-io`` for any other: other address sizes and segments are no kernel's of ours.
        """
        width = word >> _IO_WIDTH_SHIFT & 7
        if not 0 <= word < 1 << 32 or width not in IO_WIDTHS_BYTES:
            raise FormatError("there is no such I/O port access", code="ghcb-io", got=word)
        found = cls(word >> _IO_PORT_SHIFT, width, bool(word & _IO_IN), bool(word & _IO_STRING))
        if found.pack() != word:
            raise FormatError("there is no such I/O port access", code="ghcb-io", got=word)
        return found


class VmmError(enum.IntEnum):
    """High dword of SW_EXITINFO2 after a guest request (AMD 56421 §4.1.7)."""

    NONE = 0
    INVALID_LENGTH = 1
    """The certificate table needs more pages; RBX says how many."""
    BUSY = 2


class MsrProtocol(enum.IntEnum):
    """Low 12 bits of the GHCB MSR (AMD 56421 §2.3.1)."""

    RUN_VMPL_REQUEST = 0x016
    RUN_VMPL_RESPONSE = 0x017
    TERMINATE = 0x100


def msr_run_vmpl_target(value: int) -> int | None:
    """The VMPL asked for, or None when the value is not a RUN_VMPL request."""
    if value & 0xFFF != MsrProtocol.RUN_VMPL_REQUEST or value >> 40 or (value >> 12) & 0xFFFFF:
        return None
    return (value >> 32) & 0xFF


def split_guest_request_result(info_2: int) -> tuple[int, int]:
    """(firmware status, VMM status) of SW_EXITINFO2."""
    return info_2 & 0xFFFF_FFFF, info_2 >> 32


class PageOperation(enum.IntEnum):
    """Operation of a page-state-change entry."""

    PRIVATE = 1
    SHARED = 2
    PSMASH = 3
    UNSMASH = 4


@record(size=8, byte_order="little")
class _PscHeader(Record):
    current: U16
    end: U16
    reserved_04: U32


PSC_MAX_ENTRIES: Final = 253
PSC_LIST_BYTES: Final = 8 + 8 * PSC_MAX_ENTRIES
_ENTRY_RESERVED: Final = ~((1 << 57) - 1) & ((1 << 64) - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class PageStateEntry:
    """One page of a page-state-change list."""

    gpa: int
    """Byte address, a multiple of the page size."""
    operation: PageOperation
    large: bool
    """2 MiB instead of 4 KiB."""


def pack_page_states(entries: list[PageStateEntry]) -> bytes:
    """A page-state-change list (AMD 56421 §4.1.6), unused entries absent.

    Raises:
        FormatError: ``ghcb-page-states`` for no or more than 253 entries, or an address out of range.
    """
    if not 0 < len(entries) <= PSC_MAX_ENTRIES:
        raise FormatError("a page-state list has an impossible length", code="ghcb-page-states", got=len(entries))
    words = [_PscHeader(0, len(entries) - 1, 0).pack()]
    for entry in entries:
        if entry.gpa & 0xFFF or not 0 <= entry.gpa < 1 << 52:
            raise FormatError("a page-state entry's address is impossible", code="ghcb-page-states", got=entry.gpa)
        word = entry.gpa | (entry.operation << 52) | (int(entry.large) << 56)
        words.append(word.to_bytes(8, "little"))
    return b"".join(words)


def parse_page_states(data: Buffer) -> list[PageStateEntry]:
    """Decode the entries `current`..`end` of a list; `data` may be longer than the list.

    Raises:
        FormatError: ``ghcb-page-states``, ``record-truncated``.
    """
    header = _PscHeader.parse_at(data, 0)
    if header.end >= PSC_MAX_ENTRIES or header.current > header.end or header.reserved_04:
        raise FormatError("a page-state header is impossible", code="ghcb-page-states", got=header.end)
    if len(data) < 8 + 8 * (header.end + 1):
        raise FormatError("a page-state list is cut short", code="ghcb-page-states", got=len(data))
    entries = []
    for index in range(header.current, header.end + 1):
        word = int.from_bytes(data[8 + 8 * index : 16 + 8 * index], "little")
        operation = (word >> 52) & 0xF
        # Bits 11:0 are the progress cursor of a 2 MiB page; a list that was not started has none.
        if word & _ENTRY_RESERVED or word & 0xFFF or operation not in PageOperation.__members__.values():
            raise FormatError("a page-state entry is impossible", code="ghcb-page-states", offset=8 + 8 * index)
        entries.append(PageStateEntry(word & ((1 << 52) - 1) & ~0xFFF, PageOperation(operation), bool(word >> 56 & 1)))
    return entries
