# SPDX-License-Identifier: MIT OR Apache-2.0
"""The messages between the simulated chip and its vCPU process, one per packet of a SOCK_SEQPACKET pair.

The process that executes guest code is handed registers when the vCPU starts to run and gives them back when it
stops; it never sees the VMSA page they are kept in. Every message starts with a kind and a sequence number that
the sender chooses; an answer carries the number of what it answers.

    hardware → vcpu   RUN      registers, limits                     answered by EXIT, some time later
                      MAP      a range of one memfd becomes visible  answered by ACK
                      UNMAP    a range is not visible any more       answered by ACK
                      STOP     end the running guest (nothing when none runs); its EXIT says INTR
    vcpu → hardware   EXIT     why it stopped, registers
                      ACK      the MAP or UNMAP of that number has taken effect

MAP and UNMAP may be sent at any time, also while the guest runs: it is stopped between two instructions, the
change is made, the ACK leaves, and the guest goes on. MAP replaces whatever was mapped in its range. Once the ACK
of an UNMAP has arrived no guest instruction can reach the range, so the page may be moved to another memory.
Shared memory is never executable, whatever its permissions say: a confidential guest fetches code through its key.

Reserved fields must be zero. Nothing else travels here, no descriptor either: the process gets its memfds once,
when it is started.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

from svsm.formats.errors import ProtocolError
from svsm.formats.record import U32, U64, Buffer, Nested, Record, record

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MSR_GHCB",
    "Access",
    "ExitCode",
    "ExitMessage",
    "Kind",
    "MapMessage",
    "Memory",
    "Message",
    "NestedFault",
    "PlainMessage",
    "Registers",
    "RunMessage",
    "UnmapMessage",
    "ack",
    "parse_message",
    "stop",
]

MSR_GHCB: Final = 0xC0010130
"""The only register that an encrypted guest shares with the host (AMD 56421 §2.3)."""


class Kind(enum.IntEnum):
    """The first field of every message."""

    RUN = 1
    EXIT = 2
    MAP = 3
    UNMAP = 4
    ACK = 5
    STOP = 6


class Memory(enum.IntEnum):
    """Which of the vCPU process's two memfds a range lies in; the offset in it is the GPA."""

    VMPL2 = 1
    SHARED = 2


class Access(enum.IntFlag):
    """What the guest may do with a page, with the values of `svsm.abi.platform.Permission`."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE_USER = 4
    EXECUTE_SUPERVISOR = 8
    ALL = 15


class ExitCode(enum.IntEnum):
    """#VMEXIT codes that this vCPU produces (AMD 24593 appendix C)."""

    INTR = 0x60
    """Stopped from outside: STOP, or the time limit of RUN."""
    HLT = 0x78
    SHUTDOWN = 0x7F
    """An exception that the guest has no handler for; exit_info_1 is its vector."""
    NESTED_PAGE_FAULT = 0x400
    """exit_info_1: `NestedFault` bits; exit_info_2: the GPA."""
    VMGEXIT = 0x403
    INVALID = 0xFFFF_FFFF_FFFF_FFFF
    """The registers of RUN are no state that this vCPU can execute: it knows 64-bit mode with paging only."""


class NestedFault(enum.IntFlag):
    """EXITINFO1 of a nested page fault (AMD 24593 §15.25.6, §15.36.10)."""

    PRESENT = 1 << 0
    """The page is mapped, and the access is more than its permissions allow."""
    WRITE = 1 << 1
    FETCH = 1 << 4
    RMP = 1 << 31


@record(size=200, byte_order="little")
class Registers(Record):
    """What the guest's VMSA holds of its general state, and the GHCB MSR (which real hardware keeps in the VMCB)."""

    rax: U64
    rbx: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    rbp: U64
    rsp: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    """At EXIT VMGEXIT: of the instruction after it. At a fault: of the faulting instruction."""
    rflags: U64
    cr0: U64
    cr3: U64
    cr4: U64
    efer: U64
    fs_base: U64
    gs_base: U64
    ghcb_msr: U64


@record(size=16, byte_order="little")
class PlainMessage(Record):
    """ACK and STOP, and the header of every other message."""

    kind: U32
    reserved_04: U32
    sequence: U64


@record(size=232, byte_order="little")
class RunMessage(Record):
    """RUN: let the guest execute from these registers. The translation cache starts empty each time."""

    kind: U32
    reserved_04: U32
    sequence: U64
    sev_features: U64
    """VMSA.SEV_FEATURES, for the record; the vCPU implements no optional feature."""
    time_limit_us: U64
    """After that long the guest exits with INTR; 0 = only STOP ends it."""
    registers: Annotated[Registers, Nested()]


@record(size=240, byte_order="little")
class ExitMessage(Record):
    """EXIT: the guest has stopped. `sequence` is that of its RUN."""

    kind: U32
    reserved_04: U32
    sequence: U64
    exit_code: U64
    exit_info_1: U64
    exit_info_2: U64
    registers: Annotated[Registers, Nested()]


@record(size=40, byte_order="little")
class MapMessage(Record):
    """MAP: `length` bytes at `gpa` are visible to the guest, from memfd `memory`, with `access`."""

    kind: U32
    reserved_04: U32
    sequence: U64
    gpa: U64
    length: U64
    """Bytes; a multiple of 4096, like `gpa`."""
    memory: U32
    access: U32


@record(size=32, byte_order="little")
class UnmapMessage(Record):
    """UNMAP: `length` bytes at `gpa` are not visible any more; pages that were not are no error."""

    kind: U32
    reserved_04: U32
    sequence: U64
    gpa: U64
    length: U64


Message = RunMessage | ExitMessage | MapMessage | UnmapMessage | PlainMessage

MAX_MESSAGE_BYTES: Final = 512
"""Receive buffer: more than any message has, so that a longer one is noticed and not cut to a valid one."""

_PAGE = 4096
_GPA_BITS = 48
_TYPES: dict[int, type[Message]] = {
    Kind.RUN: RunMessage,
    Kind.EXIT: ExitMessage,
    Kind.MAP: MapMessage,
    Kind.UNMAP: UnmapMessage,
    Kind.ACK: PlainMessage,
    Kind.STOP: PlainMessage,
}


def ack(sequence: int) -> bytes:
    """The ACK of message number `sequence`, packed."""
    return PlainMessage(kind=Kind.ACK, reserved_04=0, sequence=sequence).pack()


def stop(sequence: int) -> bytes:
    """A STOP, packed."""
    return PlainMessage(kind=Kind.STOP, reserved_04=0, sequence=sequence).pack()


def parse_message(data: Buffer) -> Message:
    """Decode and validate one packet.

    Raises:
        FormatError: ``record-truncated`` or ``record-length`` when the length does not fit the kind.
        ProtocolError: ``vcpu-message`` for an unknown kind, a non-zero reserved field or a bad range.
    """
    header = PlainMessage.parse_at(data, 0)
    kind = _TYPES.get(header.kind)
    if kind is None or header.reserved_04:
        raise ProtocolError("not a vCPU message", code="vcpu-message", field="kind", got=header.kind)
    message: Message = kind.parse(data)
    if isinstance(message, MapMessage | UnmapMessage):
        _check_range(message.gpa, message.length)
    if isinstance(message, MapMessage):
        if message.memory not in set(Memory):
            raise ProtocolError("no such guest memory", code="vcpu-message", field="memory", got=message.memory)
        if message.access & ~int(Access.ALL):
            raise ProtocolError("no such permission", code="vcpu-message", field="access", got=message.access)
    return message


def _check_range(gpa: int, length: int) -> None:
    if gpa % _PAGE or length % _PAGE or length == 0 or gpa + length > 1 << _GPA_BITS:
        raise ProtocolError("bad range of guest pages", code="vcpu-message", field="gpa", got=gpa, length=length)
