# SPDX-License-Identifier: MIT OR Apache-2.0
"""The core protocol (0): versions, calling areas, page validation (AMD 58019 §6).

    0 REMAP_CA          move the calling area
    1 PVALIDATE         validate or give up a list of pages
    6 QUERY_PROTOCOL    which versions of which protocol there are
    7 CONFIGURE_VTOM    queries say "not supported"

2 CREATE_VCPU and 3 DELETE_VCPU (one vCPU so far), 4 DEPOSIT_MEM and 5 WITHDRAW_MEM (this SVSM needs no memory of
the guest) have no row: UNSUPPORTED_CALL.

Two points where this is stricter than the reference implementation: REMAP_CA writes to the new page only after
its address has been accepted, and PVALIDATE zeroes every page that it validates, the ISA hole included.
"""

from __future__ import annotations

from typing import Final

from svsm.abi.errors import BackendError, SvsmError
from svsm.abi.platform import PAGE_SIZE, Gpa, Permission, Vmpl
from svsm.formats.record import U16, U32, Record, record
from svsm.kernel.protocols.guest_memory import CALLING_AREA_BYTES, GuestMemory, GuestPlatform
from svsm.kernel.protocols.table import Call, ProtocolTable, Reply, Result, Row, SvsmProtocol, result_of

__all__ = ["CORE", "GUEST_VMPL", "core_protocol"]

CORE: Final = 0
GUEST_VMPL: Final = Vmpl(2)
_REVOKED_VMPLS: Final = (Vmpl(2), Vmpl(3))
_LARGE: Final = 2 << 20
_UNCHANGED: Final = 0x10
"""The protocol-specific code for "the carry flag was set": the page is in that state already."""
_MASK32: Final = 0xFFFF_FFFF
_MAX_BYTES_PER_CALL: Final = 4 << 20
"""How much memory one call may change before the others get their turn (a few hundredths of a second)."""
_ENTRY_COST: Final = 32 << 10
"""A small page counts as so many bytes: two instructions of the hardware cost more than the page."""


@record(size=8, byte_order="little")
class _ListHeader(Record):
    """The head of a PVALIDATE list (AMD 58019 table 6). Non-zero reserved bytes are ignored and kept."""

    entries: U16
    next: U16
    reserved_04: U32


_NEXT_OFFSET: Final = 2
_ENTRY_BYTES: Final = 8
_ENTRY_SIZE_MASK: Final = 0x3
_ENTRY_SIZES: Final = {0: PAGE_SIZE, 1: _LARGE}
_ENTRY_VALIDATE: Final = 1 << 2
_ENTRY_IGNORE_CF: Final = 1 << 3
_ENTRY_RESERVED: Final = 0xFF0
_ENTRY_FRAME: Final = ~0xFFF


def core_protocol(platform: GuestPlatform, memory: GuestMemory, table: ProtocolTable) -> SvsmProtocol:
    """The core protocol's rows.

    Args:
        platform: Validates pages.
        memory: What the guest may name.
        table: What QUERY_PROTOCOL looks up; the caller adds this protocol to it.
    """
    core = _Core(platform, memory, table)
    return SvsmProtocol(
        number=CORE,
        name="core",
        calls={
            0: Row("REMAP_CA", core.remap_calling_area),
            1: Row("PVALIDATE", core.pvalidate),
            6: Row("QUERY_PROTOCOL", core.query_protocol),
            7: Row("CONFIGURE_VTOM", core.configure_vtom),
        },
    )


class _Core:
    def __init__(self, platform: GuestPlatform, memory: GuestMemory, table: ProtocolTable) -> None:
        self._platform = platform
        self._memory = memory
        self._table = table

    def query_protocol(self, call: Call) -> Reply:
        """RCX: protocol << 32 | version; RCX out: max << 32 | min, or 0."""
        versions = self._table.versions(call.rcx >> 32, call.rcx & _MASK32)
        return Reply(Result.SUCCESS, rcx=0 if versions is None else versions[1] << 32 | versions[0])

    def configure_vtom(self, call: Call) -> Reply:
        """RCX bit 0 asks whether vTOM can be configured: no."""
        if call.rcx & 1:
            return Reply(Result.SUCCESS, rcx=0)
        return Reply(Result.INVALID_REQUEST)

    def remap_calling_area(self, call: Call) -> Reply:
        """RCX: GPA of the new calling area, which is zeroed (its 8 bytes) and used from the next call on."""
        if call.rcx % PAGE_SIZE:
            return Reply(Result.INVALID_PARAMETER)
        if self._memory.is_registered(call.rcx, CALLING_AREA_BYTES, except_vmsa=call.vmsa_gpa):
            return Reply(Result.INVALID_ADDRESS)
        self._memory.write(call.rcx, bytes(CALLING_AREA_BYTES))
        self._memory.move_calling_area(call.vmsa_gpa, Gpa(call.rcx))
        return Reply(Result.SUCCESS)

    # --- PVALIDATE -------------------------------------------------------------------------------------------

    def pvalidate(self, call: Call) -> Reply:
        """RCX: GPA of a list. `next` in it is advanced for each success and written back, also after a failure.

        INCOMPLETE when there is more than fits into one call: the guest calls again, and goes on at `next`.

        The list is read once: what the guest changes meanwhile (or what an entry does to the list's own page)
        has no effect on this call.
        """
        if call.rcx % _ENTRY_BYTES:
            return Reply(Result.INVALID_PARAMETER)
        header = _ListHeader.parse(self._memory.read(call.rcx, _ListHeader.SIZE))
        capacity = (PAGE_SIZE - call.rcx % PAGE_SIZE - _ListHeader.SIZE) // _ENTRY_BYTES
        if not 0 < header.entries <= capacity or header.next >= header.entries:
            return Reply(Result.INVALID_PARAMETER)
        start = call.rcx + _ListHeader.SIZE + header.next * _ENTRY_BYTES
        packed = self._memory.read(start, (header.entries - header.next) * _ENTRY_BYTES)
        result: int = Result.SUCCESS
        done = header.next
        left = _MAX_BYTES_PER_CALL
        for at in range(0, len(packed), _ENTRY_BYTES):
            if left <= 0:
                result = Result.INCOMPLETE
                break
            entry = int.from_bytes(packed[at : at + _ENTRY_BYTES], "little")
            result = self._try_entry(entry)
            if result != Result.SUCCESS:
                break
            left -= max(_ENTRY_SIZES[entry & _ENTRY_SIZE_MASK], _ENTRY_COST)
            done += 1
        return Reply(self._write_next(call.rcx, done, result))

    def _write_next(self, list_gpa: int, done: int, result: int) -> int:
        try:
            self._memory.write(list_gpa + _NEXT_OFFSET, done.to_bytes(2, "little"))
        except BackendError:
            raise
        except SvsmError as error:  # an entry gave up the list's own page
            return result if result != Result.SUCCESS else result_of(error)
        return result

    def _try_entry(self, entry: int) -> int:
        try:
            return self._entry(entry)
        except BackendError:
            raise
        except SvsmError as error:
            return result_of(error)

    def _entry(self, entry: int) -> int:
        size = _ENTRY_SIZES.get(entry & _ENTRY_SIZE_MASK)
        gpa = entry & _ENTRY_FRAME
        if entry & _ENTRY_RESERVED or size is None or gpa % size:
            return Result.INVALID_PARAMETER
        if not self._memory.contains(gpa, size) or self._memory.is_registered(gpa, size):
            return Result.INVALID_ADDRESS
        if entry & _ENTRY_VALIDATE:
            changed = self._validate(Gpa(gpa), size, ignore_unchanged=bool(entry & _ENTRY_IGNORE_CF))
        else:
            changed = self._invalidate(Gpa(gpa), size)
        if not changed and not entry & _ENTRY_IGNORE_CF:
            return Result.PROTOCOL_BASE + _UNCHANGED
        return Result.SUCCESS

    def _validate(self, gpa: Gpa, size: int, *, ignore_unchanged: bool) -> bool:
        """Validate, zero, grant. Zeroed before anybody below can read it: the page may have been another's."""
        changed = self._platform.validate(gpa, size_bytes=size, validated=True)
        if not changed and not ignore_unchanged:
            return False
        try:
            for start in range(gpa, gpa + size, PAGE_SIZE):
                self._platform.write(Gpa(start), bytes(PAGE_SIZE))
            self._platform.adjust(gpa, size_bytes=size, vmpl=GUEST_VMPL, permissions=Permission.ALL, vmsa=False)
        except BackendError:
            raise
        except SvsmError:
            if changed:
                self._platform.validate(gpa, size_bytes=size, validated=False)
            raise
        return changed

    def _invalidate(self, gpa: Gpa, size: int) -> bool:
        """Revoke, then give up. A page that is not validated cannot be revoked: PVALIDATE's word decides."""
        try:
            for vmpl in _REVOKED_VMPLS:
                self._platform.adjust(gpa, size_bytes=size, vmpl=vmpl, permissions=Permission.NONE, vmsa=False)
        except BackendError:
            raise
        except SvsmError:
            pass
        return self._platform.validate(gpa, size_bytes=size, validated=False)
