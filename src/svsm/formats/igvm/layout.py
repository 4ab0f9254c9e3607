# SPDX-License-Identifier: MIT OR Apache-2.0
"""The records of an IGVM file: bytes ↔ fields, nothing else.

A file is a fixed header, a section of variable headers (type, length, body, zero padding to 8 bytes) and file data
that bodies point at by offset from the start of the file; offset 0 means "no data". All integers are little endian.
Names follow Microsoft's ``igvm_defs``. What a value *may* be is decided in `svsm.formats.igvm.validate`, not here.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

from svsm.formats.record import U8, U16, U32, U64, Bytes, Nested, Record, record

__all__ = [
    "BODY_TYPES",
    "MAGIC",
    "OPTIONAL_BIT",
    "PAGE_2MB",
    "PAGE_SIZE",
    "PARAMETER_TYPES",
    "Corim",
    "ErrorRange",
    "FixedHeaderV1",
    "FixedHeaderV2",
    "GuestPolicy",
    "HeaderHead",
    "HeaderType",
    "PageData",
    "PageDataType",
    "PageFlag",
    "PageTableRelocation",
    "Parameter",
    "ParameterArea",
    "ParameterInsert",
    "PlatformType",
    "PublicKey",
    "RelocatableRegion",
    "RequiredMemory",
    "Signature",
    "SnpIdBlock",
    "SupportedPlatform",
    "VbsMeasurement",
    "VpContext",
]

MAGIC: Final = 0x4D564749
"""``IGVM``, read as a little-endian word."""

PAGE_SIZE: Final = 4096
PAGE_2MB: Final = 2 << 20

OPTIONAL_BIT: Final = 1 << 31
"""Bit 31 of a header type: a loader that does not know the type may skip it. This reader never skips."""


class HeaderType(enum.IntEnum):
    """Variable header types that this library reads and writes."""

    SUPPORTED_PLATFORM = 0x001
    GUEST_POLICY = 0x101
    RELOCATABLE_REGION = 0x102
    PAGE_TABLE_RELOCATION = 0x103
    CORIM_DOCUMENT = 0x104
    CORIM_SIGNATURE = 0x105
    PARAMETER_AREA = 0x301
    PAGE_DATA = 0x302
    PARAMETER_INSERT = 0x303
    VP_CONTEXT = 0x304
    REQUIRED_MEMORY = 0x305
    VP_COUNT = 0x307
    SRAT = 0x308
    MADT = 0x309
    MMIO_RANGES = 0x30A
    SNP_ID_BLOCK = 0x30B
    MEMORY_MAP = 0x30C
    ERROR_RANGE = 0x30D
    COMMAND_LINE = 0x30E
    SLIT = 0x30F
    PPTT = 0x310
    VBS_MEASUREMENT = 0x311
    DEVICE_TREE = 0x312
    ENVIRONMENT_INFO = 0x313


class PlatformType(enum.IntEnum):
    """``SupportedPlatform.platform_type``; CCA (6) exists only on AArch64, which is not supported."""

    NATIVE = 0
    VSM_ISOLATION = 1
    SEV_SNP = 2
    TDX = 3
    SEV = 4
    SEV_ES = 5


class PageDataType(enum.IntEnum):
    """``PageData.data_type``."""

    NORMAL = 0
    SECRETS = 1
    CPUID_DATA = 2
    CPUID_XF = 3


class PageFlag(enum.IntFlag):
    """``PageData.flags``."""

    NONE = 0
    IS_2MB_PAGE = 1
    UNMEASURED = 2
    SHARED = 4


@record(size=24, byte_order="little")
class FixedHeaderV1(Record):
    """The start of a format version 1 file."""

    magic: U32
    format_version: U32
    variable_header_offset: U32  # bytes from the start of the file
    variable_header_size: U32  # bytes
    total_file_size: U32  # bytes
    checksum: U32  # CRC-32 of this header with checksum 0, then the variable headers


@record(size=32, byte_order="little")
class FixedHeaderV2(Record):
    """The start of a format version 2 file."""

    magic: U32
    format_version: U32
    variable_header_offset: U32  # bytes from the start of the file
    variable_header_size: U32  # bytes
    total_file_size: U32  # bytes
    checksum: U32  # CRC-32 of this header with checksum 0, then the variable headers
    architecture: U32  # 0 x64, 1 AArch64
    page_size: U32  # bytes


@record(size=8, byte_order="little")
class HeaderHead(Record):
    """In front of every variable header's body."""

    header_type: U32
    length: U32  # bytes of the body, without padding


@record(size=16, byte_order="little")
class SupportedPlatform(Record):
    """One platform the file can be loaded on, and its bit in every later compatibility mask."""

    compatibility_mask: U32  # exactly one bit
    highest_vtl: U8  # 0 or 2
    platform_type: U8  # PlatformType
    platform_version: U16  # 1
    shared_gpa_boundary: U64  # vTOM in bytes


@record(size=16, byte_order="little")
class GuestPolicy(Record):
    """The launch policy of one platform (SNP: AMD 56860 table 10)."""

    policy: U64
    compatibility_mask: U32
    reserved_0xc: U32


@record(size=48, byte_order="little")
class RelocatableRegion(Record):
    """Memory that a loader may move as a whole; a loader that does not move it loads it where it says."""

    compatibility_mask: U32
    vp_index: U16
    vtl: U8
    flags: U8  # 1: is VTL2, 2: move RIP too, 4: move GDTR too
    relocation_alignment: U64  # bytes, a power of two
    relocation_region_gpa: U64
    relocation_region_size: U64  # bytes
    minimum_relocation_gpa: U64
    maximum_relocation_gpa: U64


@record(size=32, byte_order="little")
class PageTableRelocation(Record):
    """The page tables to correct when regions were moved."""

    compatibility_mask: U32
    vp_index: U16
    vtl: U8
    reserved_0x7: U8
    gpa: U64
    size: U64  # bytes
    used_size: U64  # bytes


@record(size=16, byte_order="little")
class Corim(Record):
    """A CoRIM document (CBOR), or its detached signature (COSE): reference values, not part of the launch."""

    compatibility_mask: U32
    file_offset: U32
    size_bytes: U32
    reserved_0xc: U32


@record(size=16, byte_order="little")
class ParameterArea(Record):
    """A buffer that the loader fills and a later `ParameterInsert` places."""

    number_of_bytes: U64  # multiple of 4096
    parameter_area_index: U32  # unique in the file
    file_offset: U32  # initial content, 0 for zeroes


@record(size=24, byte_order="little")
class PageData(Record):
    """One page of 4 KiB or 2 MiB."""

    gpa: U64
    compatibility_mask: U32
    file_offset: U32  # 0: an empty page, loaded as zeroes
    flags: U32  # PageFlag
    data_type: U16  # PageDataType
    reserved_0x16: U16


@record(size=16, byte_order="little")
class ParameterInsert(Record):
    """Place a whole parameter area, unmeasured; its index is dead afterwards."""

    gpa: U64
    compatibility_mask: U32
    parameter_area_index: U32


@record(size=20, byte_order="little")
class VpContext(Record):
    """The start state of one virtual processor; what the data is depends on the platform (SNP: a VMSA page)."""

    gpa: U64
    compatibility_mask: U32
    file_offset: U32
    vp_index: U16
    reserved_0x12: U16


@record(size=24, byte_order="little")
class RequiredMemory(Record):
    """Memory that must exist for the guest to start."""

    gpa: U64
    compatibility_mask: U32
    number_of_bytes: U32
    flags: U32  # 1: VTL2 protectable
    reserved_0x14: U32


@record(size=8, byte_order="little")
class Parameter(Record):
    """The body of every parameter header: where in which area the loader writes that parameter."""

    parameter_area_index: U32
    byte_offset: U32


@record(size=16, byte_order="little")
class ErrorRange(Record):
    """A page that a failing loader may use to describe its failure."""

    gpa: U64
    compatibility_mask: U32
    size_bytes: U32


@record(size=144, byte_order="little")
class Signature(Record):
    """ECDSA P-384 signature, numbers little endian and zero padded."""

    r: Annotated[bytes, Bytes(72)]
    s: Annotated[bytes, Bytes(72)]


@record(size=152, byte_order="little")
class PublicKey(Record):
    """ECDSA public key; `reserved_0x4` is not part of the form that the AMD-SP hashes."""

    curve: U32  # 2: P-384
    reserved_0x4: U32
    qx: Annotated[bytes, Bytes(72)]
    qy: Annotated[bytes, Bytes(72)]


@record(size=696, byte_order="little")
class SnpIdBlock(Record):
    """ID block and ID authentication data of SNP_LAUNCH_FINISH, without the policy (that is in `GuestPolicy`)."""

    compatibility_mask: U32
    author_key_enabled: U8
    reserved_0x5: Annotated[bytes, Bytes(3)]
    ld: Annotated[bytes, Bytes(48)]  # expected launch digest
    family_id: Annotated[bytes, Bytes(16)]
    image_id: Annotated[bytes, Bytes(16)]
    version: U32  # 1
    guest_svn: U32
    id_key_algorithm: U32  # 1: ECDSA P-384 with SHA-384
    author_key_algorithm: U32
    id_key_signature: Annotated[Signature, Nested()]
    id_public_key: Annotated[PublicKey, Nested()]
    author_key_signature: Annotated[Signature, Nested()]
    author_public_key: Annotated[PublicKey, Nested()]


@record(size=864, byte_order="little")
class VbsMeasurement(Record):
    """Signed boot measurement of the VSM platform."""

    compatibility_mask: U32
    version: U32
    product_id: U32
    module_id: U32
    security_version: U32
    policy_flags: U32
    boot_digest_algorithm: U32
    signing_algorithm: U32
    boot_measurement_digest: Annotated[bytes, Bytes(64)]
    signature: Annotated[bytes, Bytes(256)]
    public_key: Annotated[bytes, Bytes(512)]


PARAMETER_TYPES: Final = frozenset(
    {
        HeaderType.VP_COUNT,
        HeaderType.SRAT,
        HeaderType.MADT,
        HeaderType.MMIO_RANGES,
        HeaderType.MEMORY_MAP,
        HeaderType.COMMAND_LINE,
        HeaderType.SLIT,
        HeaderType.PPTT,
        HeaderType.DEVICE_TREE,
        HeaderType.ENVIRONMENT_INFO,
    }
)
"""Header types whose body is a `Parameter`; they carry no compatibility mask."""

BODY_TYPES: Final[dict[HeaderType, type[Record]]] = {
    HeaderType.SUPPORTED_PLATFORM: SupportedPlatform,
    HeaderType.GUEST_POLICY: GuestPolicy,
    HeaderType.RELOCATABLE_REGION: RelocatableRegion,
    HeaderType.PAGE_TABLE_RELOCATION: PageTableRelocation,
    HeaderType.CORIM_DOCUMENT: Corim,
    HeaderType.CORIM_SIGNATURE: Corim,
    HeaderType.PARAMETER_AREA: ParameterArea,
    HeaderType.PAGE_DATA: PageData,
    HeaderType.PARAMETER_INSERT: ParameterInsert,
    HeaderType.VP_CONTEXT: VpContext,
    HeaderType.REQUIRED_MEMORY: RequiredMemory,
    HeaderType.SNP_ID_BLOCK: SnpIdBlock,
    HeaderType.ERROR_RANGE: ErrorRange,
    HeaderType.VBS_MEASUREMENT: VbsMeasurement,
    **dict.fromkeys(PARAMETER_TYPES, Parameter),
}
"""The body record of every supported header type."""
