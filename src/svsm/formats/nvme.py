# SPDX-License-Identifier: MIT OR Apache-2.0
"""NVM Express 1.4: registers, commands, completions, and what Identify returns, as far as a disk driver needs them.

Bytes and numbers only. Everything is little-endian. Section and figure numbers are those of NVM Express Base
Specification revision 1.4. Reserved fields are kept and not judged: later revisions give them meanings.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated

from svsm.formats.record import U8, U16, U32, U64, Bytes, Record, record

__all__ = [
    "COMPLETION_BYTES",
    "IDENTIFY_BYTES",
    "NVME_CLASS",
    "PAGE_BYTES",
    "SUBMISSION_BYTES",
    "AdminOpcode",
    "Capabilities",
    "Completion",
    "ControllerStatus",
    "DsmRange",
    "IdentifyController",
    "IdentifyNamespace",
    "NvmOpcode",
    "NvmeRegister",
    "OptionalCommand",
    "Submission",
    "configuration_word",
    "doorbell",
    "status_name",
]

PAGE_BYTES = 4096
"""The memory page that the driver uses: CC.MPS = 0."""
SUBMISSION_BYTES = 64
COMPLETION_BYTES = 16
IDENTIFY_BYTES = 4096
NVME_CLASS = 0x01_08_02
"""PCI class, subclass and programming interface of an NVMe I/O controller."""


class NvmeRegister(enum.IntEnum):
    """Byte offsets in BAR 0 (§3.1)."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    DOORBELLS = 0x1000


class ControllerStatus(enum.IntFlag):
    """CSTS (§3.1.6)."""

    RDY = 1 << 0
    CFS = 1 << 1
    SHUTDOWN_OCCURRING = 1 << 2
    SHUTDOWN_COMPLETE = 1 << 3
    NSSRO = 1 << 4
    PROCESSING_PAUSED = 1 << 5


class AdminOpcode(enum.IntEnum):
    """Figure 139."""

    CREATE_SQ = 0x01
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    SET_FEATURES = 0x09


class NvmOpcode(enum.IntEnum):
    """Figure 346."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09


class OptionalCommand(enum.IntFlag):
    """ONCS of Identify Controller."""

    DATASET_MANAGEMENT = 1 << 2
    WRITE_ZEROES = 1 << 3


@dataclasses.dataclass(frozen=True, slots=True)
class Capabilities:
    """CAP (§3.1.1), in units that need no further arithmetic."""

    queue_entries: int
    """The most of one queue: MQES + 1."""
    ready_seconds: float
    """How long CSTS.RDY may take to follow CC.EN: TO in units of 500 ms."""
    doorbell_stride_bytes: int
    nvm_command_set: bool
    smallest_page_bytes: int

    @classmethod
    def parse(cls, value: int) -> Capabilities:
        """From the 64-bit register."""
        return cls(
            queue_entries=(value & 0xFFFF) + 1,
            ready_seconds=(value >> 24 & 0xFF) * 0.5,
            doorbell_stride_bytes=4 << (value >> 32 & 0xF),
            nvm_command_set=bool(value >> 37 & 1),
            smallest_page_bytes=4096 << (value >> 48 & 0xF),
        )

    def pack(self) -> int:
        """The register; for device models."""
        return (
            (self.queue_entries - 1)
            | int(self.ready_seconds * 2) << 24
            | (self.doorbell_stride_bytes // 4).bit_length() - 1 << 32
            | int(self.nvm_command_set) << 37
            | (self.smallest_page_bytes // 4096).bit_length() - 1 << 48
        )


def configuration_word(*, enable: bool, shutdown: bool = False) -> int:
    """CC (§3.1.5): NVM command set, 4 KiB pages, round robin, entries of 64 and 16 bytes."""
    return int(enable) | int(shutdown) << 14 | 6 << 16 | 4 << 20


def doorbell(queue: int, stride_bytes: int, *, completion: bool) -> int:
    """The offset of a queue's tail (or, for the completion queue, head) doorbell."""
    return NvmeRegister.DOORBELLS + (2 * queue + int(completion)) * stride_bytes


@record(size=64, byte_order="little")
class Submission(Record):
    """A command (figure 105)."""

    opcode: U8
    flags: U8
    command_id: U16
    namespace: U32
    cdw2: U32
    cdw3: U32
    metadata: U64
    prp1: U64
    prp2: U64
    cdw10: U32
    cdw11: U32
    cdw12: U32
    cdw13: U32
    cdw14: U32
    cdw15: U32


@record(size=16, byte_order="little")
class Completion(Record):
    """A completion (figure 121)."""

    result: U32
    reserved_4: U32
    sq_head: U16
    sq_id: U16
    command_id: U16
    status: U16
    """Bit 0 is the phase tag; then 8 bits status code, 3 bits type, 2 bits retry delay, more, do not retry."""


@record(size=16, byte_order="little")
class DsmRange(Record):
    """Of Dataset Management (figure 355)."""

    attributes: U32
    blocks: U32
    first_block: U64


@record(size=4096, byte_order="little")
class IdentifyController(Record):
    """CNS 01h (figure 247)."""

    pci_vendor: U16
    pci_subsystem_vendor: U16
    serial: Annotated[bytes, Bytes(20)]
    model: Annotated[bytes, Bytes(40)]
    firmware: Annotated[bytes, Bytes(8)]
    bytes_48: Annotated[bytes, Bytes(5)]
    transfer_shift: U8
    """MDTS: the largest transfer is so many doublings of the smallest page; 0 is no limit."""
    bytes_4e: Annotated[bytes, Bytes(33)]
    controller_type: U8
    bytes_70: Annotated[bytes, Bytes(400)]
    submission_sizes: U8
    """SQES: low half the required size of an entry, high half the largest, as powers of two."""
    completion_sizes: U8
    """CQES."""
    most_commands: U16
    """MAXCMD; 0 says nothing."""
    namespaces: U32
    """NN."""
    optional_commands: U16
    fused: U16
    format_attributes: U8
    volatile_cache: U8
    bytes_20e: Annotated[bytes, Bytes(3570)]


@record(size=4096, byte_order="little")
class IdentifyNamespace(Record):
    """CNS 00h (figure 245)."""

    size_blocks: U64
    capacity_blocks: U64
    used_blocks: U64
    features: U8
    format_count: U8
    """NLBAF: number of LBA formats, minus one."""
    format: U8
    """FLBAS: low half the format in use; bit 4 metadata inline."""
    metadata_capabilities: U8
    protection_capabilities: U8
    protection: U8
    """DPS: bits 0 to 2 the type of end-to-end protection in use."""
    bytes_1e: Annotated[bytes, Bytes(69)]
    attributes: U8
    """NSATTR: bit 0 is write protected."""
    bytes_64: Annotated[bytes, Bytes(28)]
    formats: Annotated[bytes, Bytes(64)]
    """16 times: metadata bytes u16, block size as a power of two u8, relative performance u8."""
    bytes_c0: Annotated[bytes, Bytes(3904)]

    def format_at(self, index: int) -> tuple[int, int]:
        """(block size as a power of two, metadata bytes) of format 0 to 15."""
        entry = self.formats[4 * index : 4 * index + 4]
        return entry[2], int.from_bytes(entry[:2], "little")


_STATUS_NAMES = {
    0x000: "success",
    0x001: "invalid command opcode",
    0x002: "invalid field in command",
    0x003: "command id conflict",
    0x004: "data transfer error",
    0x005: "aborted due to power loss",
    0x006: "internal error",
    0x007: "abort requested",
    0x008: "aborted: the submission queue was deleted",
    0x00B: "invalid namespace or format",
    0x013: "invalid PRP offset",
    0x020: "namespace is write protected",
    0x080: "LBA out of range",
    0x081: "capacity exceeded",
    0x082: "namespace not ready",
    0x101: "invalid queue identifier",
    0x102: "invalid queue size",
    0x182: "attempted write to read-only range",
    0x280: "write fault",
    0x281: "unrecovered read error",
    0x286: "access denied",
    0x287: "deallocated or unwritten block",
}


def status_name(status: int) -> str:
    """What a status (15 bits, without the phase tag) says: type and code; the rest is advice on retrying."""
    return _STATUS_NAMES.get(status & 0x7FF, f"status type {status >> 8 & 7}, code {status & 0xFF:#x}")
