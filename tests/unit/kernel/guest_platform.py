# SPDX-License-Identifier: MIT OR Apache-2.0
"""A Platform of pages in a dictionary, for the table tests of the guest protocols.

It follows the instruction rules that the protocols depend on: PVALIDATE reports an unchanged state, RMPADJUST and
accesses need a validated page, 2 MiB operations fail with SIZEMISMATCH unless allowed. Everything it was asked
for is in `log`.
"""

from __future__ import annotations

import dataclasses

from svsm.abi.errors import ProtocolError
from svsm.abi.platform import PAGE_SIZE, Gpa, Permission, Vmpl
from svsm.formats.record import Buffer
from svsm.formats.snp.vmsa import VmsaView
from svsm.kernel.protocols.core import core_protocol
from svsm.kernel.protocols.guest_memory import GuestMemory, Region, VcpuArea
from svsm.kernel.protocols.table import Call, ProtocolTable, Reply
from svsm.kernel.protocols.vtpm import Tpm, vtpm_protocol

__all__ = [
    "BASE",
    "CALLING_AREA",
    "FAIL_SIZEMISMATCH",
    "LAUNCH_VMSA",
    "LENGTH",
    "SECOND_CALLING_AREA",
    "SECOND_VMSA",
    "VMSA",
    "FakePlatform",
    "World",
]

BASE = Gpa(0x4000_0000)
LENGTH = 16 << 20
CALLING_AREA = Gpa(BASE + 0x3000)
VMSA = Gpa(BASE + 0x8000)
SECOND_CALLING_AREA = Gpa(BASE + 0xA000)
SECOND_VMSA = Gpa(BASE + 0xB000)
LAUNCH_VMSA = Gpa(BASE + 0xF000)
FAIL_SIZEMISMATCH = 6


def _fault(code: str, gpa: int, instruction_code: int | None = None) -> ProtocolError:
    if instruction_code is None:
        return ProtocolError("memory access refused", code=code, gpa=gpa)
    return ProtocolError("instruction failed", code=code, gpa=gpa, instruction_code=instruction_code)


class FakePlatform:
    """See the module."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.validated: set[int] = set()
        self.permissions: dict[tuple[int, int], Permission] = {}
        self.log: list[tuple[str, int]] = []
        self.refuse: dict[tuple[str, int], Exception] = {}
        """(operation, gpa) → what it raises."""
        self.large_pages = False
        self.runs = 0

    def accept(self, start: int, length: int) -> None:
        """Validate a range for the guest, as launch does."""
        for gpa in range(start, start + length, PAGE_SIZE):
            self.validated.add(gpa)
            self.permissions[gpa, 2] = Permission.ALL

    def _note(self, operation: str, gpa: int) -> None:
        self.log.append((operation, gpa))
        error = self.refuse.get((operation, gpa))
        if error is not None:
            raise error

    def _page(self, operation: str, gpa: int, length: int) -> bytearray:
        self._note(operation, gpa)
        page = gpa & ~(PAGE_SIZE - 1)
        if page not in self.validated or gpa + length > page + PAGE_SIZE:
            raise _fault("platform-not-validated", gpa)
        return self.pages.setdefault(page, bytearray(PAGE_SIZE))

    def read(self, gpa: Gpa, length: int) -> bytes:
        offset = gpa % PAGE_SIZE
        return bytes(self._page("read", gpa, length)[offset : offset + length])

    def write(self, gpa: Gpa, data: Buffer) -> None:
        offset = gpa % PAGE_SIZE
        self._page("write", gpa, len(data))[offset : offset + len(data)] = data

    def validate(self, gpa: Gpa, *, size_bytes: int, validated: bool) -> bool:
        self._note("validate" if validated else "invalidate", gpa)
        self._check_size(gpa, size_bytes)
        pages = set(range(gpa, gpa + size_bytes, PAGE_SIZE))
        if (pages <= self.validated) if validated else not (pages & self.validated):
            return False
        self.validated = self.validated | pages if validated else self.validated - pages
        return True

    def adjust(self, gpa: Gpa, *, size_bytes: int, vmpl: Vmpl, permissions: Permission, vmsa: bool) -> None:
        self._note("grant" if permissions else "revoke", gpa)
        self._check_size(gpa, size_bytes)
        for page in range(gpa, gpa + size_bytes, PAGE_SIZE):
            if page not in self.validated:
                raise _fault("platform-not-validated", page)
            self.permissions[page, vmpl] = permissions

    def _check_size(self, gpa: int, size_bytes: int) -> None:
        if size_bytes != PAGE_SIZE and not self.large_pages:
            raise _fault("platform-instruction", gpa, FAIL_SIZEMISMATCH)

    def run_guest(self, vmsa_gpa: Gpa) -> None:
        self._note("run", vmsa_gpa)
        self.runs += 1


@dataclasses.dataclass
class World:
    """One guest with two registered vCPUs, its memory all validated."""

    platform: FakePlatform
    memory: GuestMemory
    table: ProtocolTable

    @classmethod
    def make(cls, tpm: Tpm | None = None) -> World:
        platform = FakePlatform()
        platform.accept(BASE, LENGTH)
        memory = GuestMemory(platform, [Region(BASE, LENGTH)], protected=[LAUNCH_VMSA])
        memory.register(VcpuArea(VMSA, CALLING_AREA))
        memory.register(VcpuArea(SECOND_VMSA, SECOND_CALLING_AREA))
        table = ProtocolTable([])
        table.add(core_protocol(platform, memory, table))
        if tpm is not None:
            table.add(vtpm_protocol(memory, tpm))
        return cls(platform, memory, table)

    def call(self, protocol: int, number: int, rcx: int = 0, rdx: int = 0, r8: int = 0) -> Reply | None:
        """Dispatch one call of the first vCPU and return its reply, None while it is open."""
        replies: list[Reply] = []
        call = Call(rax=protocol << 32 | number, rcx=rcx, rdx=rdx, r8=r8, r9=0, vmsa_gpa=VMSA, finish=replies.append)
        reply = self.table.dispatch(call)
        if reply is not None:
            return reply
        return replies[0] if replies else None

    def result(self, protocol: int, number: int, rcx: int = 0) -> int | None:
        """The result code alone."""
        reply = self.call(protocol, number, rcx)
        return None if reply is None else int(reply.result)

    def poke(self, gpa: int, data: bytes) -> None:
        """Store bytes as the guest would; may straddle pages."""
        for index, value in enumerate(data):
            page = self.platform.pages.setdefault((gpa + index) & ~0xFFF, bytearray(PAGE_SIZE))
            page[(gpa + index) % PAGE_SIZE] = value

    def peek(self, gpa: int, length: int) -> bytes:
        """Load bytes as the guest would."""
        return bytes(
            self.platform.pages.get((gpa + index) & ~0xFFF, bytes(PAGE_SIZE))[(gpa + index) % PAGE_SIZE]
            for index in range(length)
        )

    def vmsa(self) -> VmsaView:
        """The first vCPU's VMSA, in place."""
        return VmsaView(self.platform.pages.setdefault(VMSA, bytearray(PAGE_SIZE)))
