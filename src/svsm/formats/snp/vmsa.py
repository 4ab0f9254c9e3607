# SPDX-License-Identifier: MIT OR Apache-2.0
"""The VMSA page: the encrypted register file of one vCPU at one VMPL (AMD 24593 rev 3.42, table B-4).

`Vmsa` is the whole page as a record: every bit is kept. For code that runs at every exit, `VmsaView` reads and
writes single registers in a page in place, without taking the other hundred apart.

Tools and manuals differ in two names; here they are `g_pat` and `virtual_tom`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Final, get_args, get_origin, get_type_hints

from svsm.formats.errors import FormatError
from svsm.formats.record import U8, U16, U32, U64, Bytes, Nested, Record, Unsigned, record

__all__ = ["VMSA_BYTES", "VMSA_FIELDS", "Segment", "Vmsa", "VmsaView"]

VMSA_BYTES: Final = 4096


@record(size=16, byte_order="little")
class Segment(Record):
    """One segment register."""

    selector: U16
    attributes: U16  # packed: descriptor bits 47:40 in 7:0, 55:52 in 11:8
    limit: U32  # bytes
    base: U64


ZERO_SEGMENT: Final = Segment(0, 0, 0, 0)


@record(size=4096, byte_order="little")
class Vmsa(Record):
    """The save area; offsets in the names of reserved fields are from the start of the page."""

    es: Annotated[Segment, Nested()] = ZERO_SEGMENT
    cs: Annotated[Segment, Nested()] = ZERO_SEGMENT
    ss: Annotated[Segment, Nested()] = ZERO_SEGMENT
    ds: Annotated[Segment, Nested()] = ZERO_SEGMENT
    fs: Annotated[Segment, Nested()] = ZERO_SEGMENT
    gs: Annotated[Segment, Nested()] = ZERO_SEGMENT
    gdtr: Annotated[Segment, Nested()] = ZERO_SEGMENT
    ldtr: Annotated[Segment, Nested()] = ZERO_SEGMENT
    idtr: Annotated[Segment, Nested()] = ZERO_SEGMENT
    tr: Annotated[Segment, Nested()] = ZERO_SEGMENT
    pl0_ssp: U64 = 0
    pl1_ssp: U64 = 0
    pl2_ssp: U64 = 0
    pl3_ssp: U64 = 0
    u_cet: U64 = 0
    reserved_0xc8: Annotated[bytes, Bytes(2)] = bytes(2)
    vmpl: U8 = 0
    cpl: U8 = 0
    reserved_0xcc: Annotated[bytes, Bytes(4)] = bytes(4)
    efer: U64 = 0
    reserved_0xd8: Annotated[bytes, Bytes(104)] = bytes(104)
    xss: U64 = 0
    cr4: U64 = 0
    cr3: U64 = 0
    cr0: U64 = 0
    dr7: U64 = 0
    dr6: U64 = 0
    rflags: U64 = 0
    rip: U64 = 0
    dr0: U64 = 0
    dr1: U64 = 0
    dr2: U64 = 0
    dr3: U64 = 0
    dr0_addr_mask: U64 = 0
    dr1_addr_mask: U64 = 0
    dr2_addr_mask: U64 = 0
    dr3_addr_mask: U64 = 0
    reserved_0x1c0: Annotated[bytes, Bytes(24)] = bytes(24)
    rsp: U64 = 0
    s_cet: U64 = 0
    ssp: U64 = 0
    isst_addr: U64 = 0
    rax: U64 = 0
    star: U64 = 0
    lstar: U64 = 0
    cstar: U64 = 0
    sfmask: U64 = 0
    kernel_gs_base: U64 = 0
    sysenter_cs: U64 = 0
    sysenter_esp: U64 = 0
    sysenter_eip: U64 = 0
    cr2: U64 = 0
    reserved_0x248: Annotated[bytes, Bytes(32)] = bytes(32)
    g_pat: U64 = 0
    dbgctl: U64 = 0
    br_from: U64 = 0
    br_to: U64 = 0
    last_excp_from: U64 = 0
    last_excp_to: U64 = 0
    reserved_0x298: Annotated[bytes, Bytes(72)] = bytes(72)
    spec_ctrl: U64 = 0
    pkru: U32 = 0
    tsc_aux: U32 = 0
    guest_tsc_scale: U64 = 0
    guest_tsc_offset: U64 = 0
    reg_prot_nonce: U64 = 0
    rcx: U64 = 0
    rdx: U64 = 0
    rbx: U64 = 0
    reserved_0x320: U64 = 0
    rbp: U64 = 0
    rsi: U64 = 0
    rdi: U64 = 0
    r8: U64 = 0
    r9: U64 = 0
    r10: U64 = 0
    r11: U64 = 0
    r12: U64 = 0
    r13: U64 = 0
    r14: U64 = 0
    r15: U64 = 0
    reserved_0x380: Annotated[bytes, Bytes(16)] = bytes(16)
    guest_exit_info_1: U64 = 0
    guest_exit_info_2: U64 = 0
    guest_exit_int_info: U64 = 0
    guest_nrip: U64 = 0
    sev_features: U64 = 0
    vintr_ctrl: U64 = 0
    guest_exit_code: U64 = 0
    virtual_tom: U64 = 0
    tlb_id: U64 = 0
    pcpu_id: U64 = 0
    event_inj: U64 = 0
    xcr0: U64 = 0
    reserved_0x3f0: Annotated[bytes, Bytes(16)] = bytes(16)
    x87_dp: U64 = 0
    mxcsr: U32 = 0
    x87_ftw: U16 = 0
    x87_fsw: U16 = 0
    x87_fcw: U16 = 0
    x87_fop: U16 = 0
    x87_ds: U16 = 0
    x87_cs: U16 = 0
    x87_rip: U64 = 0
    fpreg_x87: Annotated[bytes, Bytes(80)] = bytes(80)
    fpreg_xmm: Annotated[bytes, Bytes(256)] = bytes(256)
    fpreg_ymm: Annotated[bytes, Bytes(256)] = bytes(256)
    reserved_0x670: Annotated[bytes, Bytes(2448)] = bytes(2448)


def _fields() -> dict[str, tuple[int, int]]:
    """Offset and width of every integer register, segments as ``cs.base``."""
    found: dict[str, tuple[int, int]] = {}
    position = 0
    for name, hint in get_type_hints(Vmsa, include_extras=True).items():
        marker = get_args(hint)[1] if get_origin(hint) is Annotated else None
        if isinstance(marker, Unsigned):
            found[name] = (position, marker.width_bytes)
            position += marker.width_bytes
        elif isinstance(marker, Bytes):
            position += marker.length
        elif isinstance(marker, Nested):
            for part, offset, width in (("selector", 0, 2), ("attributes", 2, 2), ("limit", 4, 4), ("base", 8, 8)):
                found[f"{name}.{part}"] = (position + offset, width)
            position += Segment.SIZE
    return found


VMSA_FIELDS: Final = MappingProxyType(_fields())
"""Register name → (offset in the page, width in bytes); segments as ``cs.selector`` and so on."""


class VmsaView:
    """Registers of a VMSA page, read and written in place.

    Args:
        page: 4096 writable bytes (`bytearray`, or a memoryview of guest memory).

    Raises:
        FormatError: ``vmsa-page`` for a page of another size, or one that cannot be written.
    """

    def __init__(self, page: bytearray | memoryview) -> None:
        self._page = memoryview(page).cast("B")
        if len(self._page) != VMSA_BYTES or self._page.readonly:
            raise FormatError("a VMSA is a writable page", code="vmsa-page", expected=VMSA_BYTES, got=len(self._page))

    def get(self, name: str) -> int:
        """The value of one register.

        Raises:
            FormatError: ``vmsa-register`` for a name that is not in `VMSA_FIELDS`.
        """
        offset, width = _where(name)
        return int.from_bytes(self._page[offset : offset + width], "little")

    def set(self, name: str, value: int) -> None:
        """Store one register.

        Raises:
            FormatError: ``vmsa-register`` for an unknown name, or a value that does not fit.
        """
        offset, width = _where(name)
        if not 0 <= value < 1 << (8 * width):
            raise FormatError("the value does not fit the register", code="vmsa-register", field=name, got=value)
        self._page[offset : offset + width] = value.to_bytes(width, "little")


def _where(name: str) -> tuple[int, int]:
    found = VMSA_FIELDS.get(name)
    if found is None:
        raise FormatError("a VMSA has no such register", code="vmsa-register", field=name)
    return found
