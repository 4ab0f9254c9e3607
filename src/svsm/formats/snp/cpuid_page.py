# SPDX-License-Identifier: MIT OR Apache-2.0
"""The CPUID page: what a guest may believe about its processor (AMD 56860 §8.17.2.6, table 68 and 69).

The host proposes the page, the firmware checks each function against what the chip really has, and the guest reads
CPUID from it afterwards instead of asking the host. It is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.record import U32, U64, Buffer, Record, record

__all__ = ["CPUID_PAGE_SIZE", "MAX_FUNCTIONS", "CpuidFunction", "pack_cpuid_page", "parse_cpuid_page"]

CPUID_PAGE_SIZE: Final = 4096
MAX_FUNCTIONS: Final = 64


@record(size=16, byte_order="little")
class _Header(Record):
    count: U32
    reserved_04: U32
    reserved_08: U64


@record(size=48, byte_order="little")
class CpuidFunction(Record):
    """One function of the table: inputs, then outputs."""

    eax_in: U32
    ecx_in: U32
    xcr0_in: U64
    xss_in: U64
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    reserved_28: U64

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What selects it."""
        return self.eax_in, self.ecx_in, self.xcr0_in, self.xss_in


def pack_cpuid_page(functions: Iterable[CpuidFunction]) -> bytes:
    """Build the page.

    Raises:
        FormatError: ``cpuid-page`` for more than 64 functions.
    """
    entries = list(functions)
    if len(entries) > MAX_FUNCTIONS:
        raise FormatError("a CPUID page holds 64 functions", code="cpuid-page", got=len(entries))
    body = _Header(len(entries), 0, 0).pack() + b"".join(entry.pack() for entry in entries)
    return body.ljust(CPUID_PAGE_SIZE, b"\0")


def parse_cpuid_page(page: Buffer) -> list[CpuidFunction]:
    """Take the page apart.

    Raises:
        FormatError: ``cpuid-page`` for a wrong size, a count above 64 or a reserved field that is not zero.
    """
    if len(page) != CPUID_PAGE_SIZE:
        raise FormatError("a CPUID page is one page", code="cpuid-page", got=len(page))
    header = _Header.parse_at(page, 0)
    if header.count > MAX_FUNCTIONS or header.reserved_04 or header.reserved_08:
        raise FormatError("a CPUID page's header is wrong", code="cpuid-page", got=header.count)
    end = _Header.SIZE + header.count * CpuidFunction.SIZE
    entries = list(CpuidFunction.iter_parse(bytes(page[_Header.SIZE : end])))
    if any(entry.reserved_28 for entry in entries):
        raise FormatError("a CPUID page's function has reserved bytes set", code="cpuid-page")
    return entries
