# SPDX-License-Identifier: MIT OR Apache-2.0
"""The wire of the simulated machine's channels: one message per SOCK_SEQPACKET packet.

Three channels use this codec, each with its own kinds: host ↔ hardware (the PSP and KVM commands), kernel ↔ hardware
(the instructions that only VMPL0 executes) and kernel ↔ host (GHCB exits and devices, see `svsm.formats.snp.ghcb`).
The vCPU process has its own records (`svsm.formats.snp.vcpu_messages`). A message is a fixed header with six unsigned
arguments, then a payload whose meaning the kind decides. An answer has its request's kind with `ANSWER` set and its
identifier, so a peer that answers late, twice or out of turn is noticed.

Descriptors travel beside a message (SCM_RIGHTS), never in it; how many a kind may carry is for the channel's
reader to enforce.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.record import U16, U32, U64, Buffer, Record, record

__all__ = [
    "ANSWER",
    "ARGUMENTS",
    "HEADER_SIZE",
    "MAX_MESSAGE",
    "MAX_PAYLOAD",
    "HostCommand",
    "Instruction",
    "InstructionCode",
    "Message",
]

ANSWER: Final = 0x8000
"""Set in the kind of every answer."""

ARGUMENTS: Final = 6
MAX_PAYLOAD: Final = 64 * 1024
_MAGIC: Final = 0x4D535653
_VERSION: Final = 1


class HostCommand(enum.IntEnum):
    """Host ↔ hardware. Arguments in order; an answer's status is a `FirmwareStatus`, for RMP_UPDATE an AMD RMPUPDATE
    code (0 done, 1 input, 2 permission, 3 in use, 4 overlap)."""

    LAUNCH_START = 0x101
    """policy."""
    LAUNCH_UPDATE = 0x102
    """page type, gpa, number of pages, VMPL1/2/3 permissions as bytes 0, 1, 2 of one word. The contents are taken
    from the shared memory at the same gpa. A refused CPUID page comes back corrected, in shared memory."""
    LAUNCH_FINISH = 0x103
    """id block present, author key present; payload: host data (32), then with an ID block: block (96), auth (4096).
    Answer payload: the launch digest (48 bytes)."""
    RMP_UPDATE = 0x110
    """gpa, page size in bytes, 1 to assign the page to the guest or 0 to take it back, number of pages."""
    GUEST_REQUEST = 0x120
    """request gpa, response gpa; both shared pages."""
    CERTIFICATES = 0x121
    """none; answer payload: the certificate table that the host may offer with an extended request."""
    CPUID = 0x122
    """none; answer payload: a CPUID page (4096 bytes) with everything that this chip lets a guest have."""
    VMRUN = 0x130
    """VMSA gpa, value of the GHCB MSR (for a VMPL above 0)."""
    STOP = 0x1F0
    """none: end the VM."""
    VMEXIT = 0x180
    """Notice from the hardware: VMSA gpa, exit code, exit info 1, exit info 2, GHCB MSR."""
    ENDED = 0x181
    """Notice from the hardware: the VM is no more. status: 0 ended by itself or STOP, 1 killed by the hardware;
    argument 0: the kernel's exit status, negative (two's complement) for a signal; payload: a reason as UTF-8 text."""


class Instruction(enum.IntEnum):
    """Kernel ↔ hardware. The answer's status is an `InstructionCode`, argument 0 the carry flag."""

    PVALIDATE = 0x201
    """gpa, page size in bytes, 1 to validate or 0 to rescind."""
    RMPADJUST = 0x202
    """gpa, page size in bytes, attribute word (target VMPL 7:0, permissions 11:8, VMSA 16)."""
    SPAWN = 0x210
    """payload: JSON {"service", "parameters"}; one descriptor: the payload archive, sealed. The answer carries the
    kernel's end of the syscall socket, argument 0 the service's number; FAIL_INPUT when it cannot be started."""
    KILL = 0x212
    """service number: end its process. Not answered; a number that has ended already is nothing."""
    SERVICE_ENDED = 0x211
    """Notice from the hardware: service number, exit status as in ENDED."""


class InstructionCode(enum.IntEnum):
    """What PVALIDATE and RMPADJUST leave in EAX (AMD 24594), and the code for a carry flag that was set."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_SIZEMISMATCH = 6
    UNCHANGED = 0x10
    NESTED_FAULT = 0x400
    """Not an AMD code: the instruction took a nested page fault (the page is not assigned to the guest)."""


@record(size=72, byte_order="little")
class _Header(Record):
    magic: U32
    kind: U16
    version: U16
    identifier: U64
    status: U32
    payload_bytes: U32
    argument_0: U64
    argument_1: U64
    argument_2: U64
    argument_3: U64
    argument_4: U64
    argument_5: U64


HEADER_SIZE: Final = _Header.SIZE
MAX_MESSAGE: Final = HEADER_SIZE + MAX_PAYLOAD


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One packet."""

    kind: int
    """A member of one of the kind enumerations, or'ed with `ANSWER` in an answer."""
    arguments: tuple[int, ...] = ()
    """At most six 64-bit unsigned values; missing ones are 0 on the wire, and `parse` gives all six."""
    payload: bytes = dataclasses.field(default=b"", repr=False)
    """At most `MAX_PAYLOAD` bytes."""
    identifier: int = 0
    """Chosen by who asks, repeated in the answer; 0 in notices."""
    status: int = 0
    """0, or the error code of the channel."""

    @classmethod
    def parse(cls, data: Buffer) -> Message:
        """Decode one packet.

        Raises:
            FormatError: ``machine-message`` for a wrong magic, version, length or size.
        """
        if len(data) < HEADER_SIZE or len(data) > MAX_MESSAGE:
            raise FormatError("a machine message has an impossible size", code="machine-message", got=len(data))
        header = _Header.parse(bytes(data[:HEADER_SIZE]))
        if header.magic != _MAGIC or header.version != _VERSION:
            raise FormatError("not a machine message of this version", code="machine-message", field="magic")
        if header.payload_bytes != len(data) - HEADER_SIZE:
            raise FormatError(
                "a machine message's length field is wrong",
                code="machine-message",
                expected=len(data) - HEADER_SIZE,
                got=header.payload_bytes,
            )
        arguments = tuple(getattr(header, f"argument_{n}") for n in range(ARGUMENTS))
        return cls(header.kind, arguments, bytes(data[HEADER_SIZE:]), header.identifier, header.status)

    def pack(self) -> bytes:
        """Encode to one packet.

        Raises:
            FormatError: ``machine-message`` for too many arguments or too large a payload, ``record-width``.
        """
        if len(self.arguments) > ARGUMENTS or len(self.payload) > MAX_PAYLOAD:
            raise FormatError("a machine message would not fit", code="machine-message", got=len(self.payload))
        arguments = self.arguments + (0,) * (ARGUMENTS - len(self.arguments))
        header = _Header(_MAGIC, self.kind, _VERSION, self.identifier, self.status, len(self.payload), *arguments)
        return header.pack() + self.payload

    def answer(self, *arguments: int, status: int = 0, payload: bytes = b"") -> Message:
        """The answer to this message."""
        return Message(self.kind | ANSWER, arguments, payload, self.identifier, status)
