# SPDX-License-Identifier: MIT OR Apache-2.0
"""PAGE_INFO, the structure whose SHA-384 is the next launch digest (AMD 56860 rev 1.58 §8.17.2, table 67)."""

from __future__ import annotations

import enum
from typing import Annotated, Final

from svsm.formats.record import U8, U16, U64, Bytes, Record, record

__all__ = ["DIGEST_BYTES", "INITIAL_DIGEST", "KVM_VMSA_GPA", "PageInfo", "PageType"]

DIGEST_BYTES: Final = 48

INITIAL_DIGEST: Final = bytes(DIGEST_BYTES)
"""The launch digest before the first page."""

KVM_VMSA_GPA: Final = 0xFFFF_FFFF_F000
"""The address at which KVM launches every VMSA."""


class PageType(enum.IntEnum):
    """PAGE_TYPE of SNP_LAUNCH_UPDATE (AMD 56860 table 64)."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


@record(size=0x70, byte_order="little")
class PageInfo(Record):
    """What one launched page adds to the launch digest."""

    digest_current: Annotated[bytes, Bytes(48)]  # launch digest so far
    contents: Annotated[bytes, Bytes(48)]  # SHA-384 of the page for NORMAL and VMSA, else zeroes
    length: U16  # 0x70
    page_type: U8  # PageType
    imi_page: U8  # bit 0: part of the initial migration image
    reserved_0x64: U8
    vmpl1_permissions: U8
    vmpl2_permissions: U8
    vmpl3_permissions: U8
    gpa: U64
