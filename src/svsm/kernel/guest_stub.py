# SPDX-License-Identifier: MIT OR Apache-2.0
"""The demonstration guest: a resident stub at VMPL2 that makes the SVSM calls that its mailbox asks for.

`STUB_CODE` is assembled from docs/guest-stub.s, which is also its description; a test compares the two. The guest
starts in 64-bit mode with page tables that map the first 512 GiB to themselves in 1 GiB pages, so that every
address in a call is a GPA for the stub too. It has no stack, no IDT and no GDT: it calls nothing, and an exception
ends it. The mailbox (`svsm.formats.guest_mailbox`) usually lies in shared memory.

    base + 0x0000  stub        base + 0x2000  page directory pointers    base + 0x4000  buffer (2 pages): free for
    base + 0x1000  PML4        base + 0x3000  calling area                              the caller, e.g. a vTPM buffer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from svsm.abi.errors import StateError
from svsm.abi.platform import PAGE_SIZE, Gpa
from svsm.formats.guest_mailbox import MAILBOX_BYTES
from svsm.formats.snp.vmsa import VMSA_BYTES, VmsaView

__all__ = ["GUEST_IMAGE_BYTES", "STUB_CODE", "GuestImage", "build_guest_image"]

STUB_CODE: Final = bytes.fromhex(
    "4989ff4989f6fc4d8b274d3b67087503f4ebf4498b5f10f6c3027411498db700100000498b7f40498b4f48f3a4f6c308"
    "0f8480000000f6c301740441c60601418b9790000000b816000000b9300101c00f30498b4718498b4f20498b57284d8b"
    "47304d8b4f38f30f01d94989475849894f60498957684d8947704d894f78b9300101c00f3248c1e2204809d049898788"
    "00000031c04186064989878000000049837f1800751049837f580075094885c075044d8b7720f6c3047411498b774049"
    "8dbf00100000498b4f50f3a44d896708e932ffffff"
)

_PML4: Final = 1 * PAGE_SIZE
_POINTERS: Final = 2 * PAGE_SIZE
_CALLING_AREA: Final = 3 * PAGE_SIZE
_BUFFER: Final = 4 * PAGE_SIZE
GUEST_IMAGE_BYTES: Final = 6 * PAGE_SIZE
_MAPPED_BYTES: Final = 512 << 30
_ENTRIES: Final = 512
_PRESENT_WRITABLE: Final = 0x3
_LARGE_PAGE: Final = 1 << 7

# AMD 24593 §15.34.8 and table 14-1: what a 64-bit vCPU needs, and power-on values for the rest.
_START: Final[Mapping[str, int]] = MappingProxyType(
    {
        "cs.selector": 0x08,
        "cs.attributes": 0xA9B,  # 64-bit code, accessed
        "cs.limit": 0xFFFFFFFF,
        "ss.selector": 0x10,
        "ss.attributes": 0xC93,
        "ss.limit": 0xFFFFFFFF,
        "ds.selector": 0x10,
        "ds.attributes": 0xC93,
        "ds.limit": 0xFFFFFFFF,
        "es.selector": 0x10,
        "es.attributes": 0xC93,
        "es.limit": 0xFFFFFFFF,
        "tr.attributes": 0x8B,
        "tr.limit": 0xFFFF,
        "vmpl": 2,
        "efer": 0x1D00,  # LME, LMA, NXE, SVME
        "cr0": 0x80010033,  # PG, WP, NE, ET, MP, PE
        "cr4": 0x60,  # MCE, PAE
        "dr6": 0xFFFF0FF0,
        "dr7": 0x400,
        "rflags": 0x2,
        "g_pat": 0x0007040600070406,
        "xcr0": 1,
        "mxcsr": 0x1F80,
        "x87_fcw": 0x37F,
        "sev_features": 1,  # SNP active
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class GuestImage:
    """What the kernel puts into memory before the guest runs."""

    pages: Mapping[Gpa, bytes]
    """4096 bytes each, all in VMPL2 memory."""
    registers: Mapping[str, int]
    """Register name of `svsm.formats.snp.vmsa` → value; what is not named is zero."""
    calling_area_gpa: Gpa
    buffer_gpa: Gpa
    """Two pages that only the mailbox's writer uses."""
    mailbox_gpa: Gpa

    def vmsa_page(self) -> bytes:
        """The initial VMSA, 4096 bytes."""
        page = bytearray(VMSA_BYTES)
        view = VmsaView(page)
        for name, value in self.registers.items():
            view.set(name, value)
        return bytes(page)


def build_guest_image(*, base_gpa: Gpa, mailbox_gpa: Gpa) -> GuestImage:
    """The pages and first registers of the demonstration guest.

    Args:
        base_gpa: Where its `GUEST_IMAGE_BYTES` of VMPL2 memory are.
        mailbox_gpa: Where its mailbox (two pages, not part of the image) is.

    Raises:
        StateError: ``guest-image-address`` when one of them is not page-aligned or above 512 GiB, or they overlap.
    """
    for name, gpa, length in (("base", base_gpa, GUEST_IMAGE_BYTES), ("mailbox", mailbox_gpa, MAILBOX_BYTES)):
        if gpa % PAGE_SIZE or gpa < 0 or gpa + length > _MAPPED_BYTES:
            raise StateError("the guest cannot live at this address", code="guest-image-address", field=name, gpa=gpa)
    if base_gpa < mailbox_gpa + MAILBOX_BYTES and mailbox_gpa < base_gpa + GUEST_IMAGE_BYTES:
        raise StateError("guest and mailbox overlap", code="guest-image-address", field="mailbox", gpa=mailbox_gpa)
    pages = {Gpa(base_gpa + offset): bytes(PAGE_SIZE) for offset in range(0, GUEST_IMAGE_BYTES, PAGE_SIZE)}
    pages[base_gpa] = STUB_CODE.ljust(PAGE_SIZE, b"\xf4")  # HLT wherever the stub is not
    pages[Gpa(base_gpa + _PML4)] = (
        (base_gpa + _POINTERS | _PRESENT_WRITABLE).to_bytes(8, "little").ljust(PAGE_SIZE, b"\0")
    )
    pages[Gpa(base_gpa + _POINTERS)] = b"".join(
        (index << 30 | _LARGE_PAGE | _PRESENT_WRITABLE).to_bytes(8, "little") for index in range(_ENTRIES)
    )
    calling_area = Gpa(base_gpa + _CALLING_AREA)
    registers = {
        **_START,
        "rip": int(base_gpa),
        "cr3": base_gpa + _PML4,
        "rdi": int(mailbox_gpa),
        "rsi": int(calling_area),
    }
    return GuestImage(
        pages=MappingProxyType(pages),
        registers=MappingProxyType(registers),
        calling_area_gpa=calling_area,
        buffer_gpa=Gpa(base_gpa + _BUFFER),
        mailbox_gpa=mailbox_gpa,
    )
