# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reverse map table: who owns each page, whether the guest accepted it, and what each VMPL may do with it.

Pure rules. An operation is *planned* here, carried out on the memfds by `svsm.hardware.memory`, and then *committed*
here: the caller makes the three one step, so that a page lives in exactly one memfd at every moment at which anybody
else can look (AMD 24593 §15.36; boot-protocol §2).

The state of a page:

    hypervisor ──RMPUPDATE──▶ assigned ──PVALIDATE──▶ validated ──RMPADJUST──▶ validated, open to VMPL2 / a VMSA
        ▲                        │  ▲                    │
        └──────RMPUPDATE─────────┘  └─────PVALIDATE──────┘
    hypervisor ──LAUNCH_UPDATE──▶ pre-guest (immutable) ──▶ validated

and where it lives (`Home`): hypervisor pages in the shared memory, pages that VMPL2 may use in the VMPL2 memory,
everything else in the private memory. A VMSA page is private whatever its permissions say.

Where this differs from the chip, it is stricter or it says what the usual hypervisor would do:

* An instruction of 4 KiB on a page that the table holds as 2 MiB splits the entry (on the chip it takes a nested fault
  and the hypervisor executes PSMASH).
* PVALIDATE zeroes the page; on the chip its contents are whatever they are. Rescinding takes all permissions away.
* RMPUPDATE on a page that the guest has validated is allowed, as on the chip, but says so (`Change.takes_validated`):
  the simulated kernel maps such a page itself and could not fault on it, so the machine stops the VM.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Final

from svsm.formats.snp.hardware_messages import InstructionCode

__all__ = [
    "HYPERVISOR",
    "LARGE_PAGE",
    "PAGE",
    "Change",
    "Entry",
    "Home",
    "Outcome",
    "Region",
    "ReverseMap",
    "UpdateCode",
]

PAGE: Final = 4096
LARGE_PAGE: Final = 2 * 1024 * 1024
_PAGES: Final = LARGE_PAGE // PAGE

_VMSA_BIT: Final = 1 << 16
_ATTRIBUTE_BITS: Final = 0xFF | 0xF00 | _VMSA_BIT


class Home(enum.Enum):
    """The memfd that a page lives in."""

    SHARED = "shared"
    PRIVATE = "private"
    VMPL2 = "vmpl2"


class UpdateCode(enum.IntEnum):
    """What RMPUPDATE leaves in EAX (AMD 24594)."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A range of guest-physical addresses that memory stands behind."""

    start: int
    """Byte address, a multiple of 4096."""
    length: int
    """Bytes, a multiple of 4096."""

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.start + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """The state of one page."""

    assigned: bool = False
    validated: bool = False
    immutable: bool = False
    """Firmware's, during LAUNCH_UPDATE."""
    large: bool = False
    """One entry for 2 MiB."""
    vmsa: bool = False
    permissions: tuple[int, int, int] = (0, 0, 0)
    """Of VMPL1, 2, 3 (READ 1, WRITE 2, EXECUTE_USER 4, EXECUTE_SUPERVISOR 8). VMPL0 may do everything."""

    @property
    def home(self) -> Home:
        """Where the page lives."""
        if not self.assigned:
            return Home.SHARED
        if self.validated and self.permissions[1] and not self.vmsa:
            return Home.VMPL2
        return Home.PRIVATE


HYPERVISOR: Final = Entry()


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A planned transition of one page of either size, or of a run of 4 KiB pages that are in the same state."""

    gpa: int
    length: int
    before: Entry
    after: Entry
    zero: bool
    """The contents are lost; otherwise they move with the page."""

    @property
    def takes_validated(self) -> bool:
        """Whether a page that the guest relies on is taken from it by the host."""
        return self.before.validated and not self.after.assigned


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an instruction: a code, the carry flag, and the change to carry out (None: nothing to do)."""

    code: int
    carry: bool = False
    change: Change | None = None


class ReverseMap:
    """The table for one VM.

    Args:
        regions: The memory there is; disjoint. Every page starts as the hypervisor's.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = tuple(sorted(regions, key=lambda region: region.start))
        self._small: dict[int, Entry] = {}
        self._large: dict[int, Entry] = {}
        self._in_use: set[int] = set()

    # ---- looking -------------------------------------------------------------------------------------------------

    def covers(self, gpa: int, length: int) -> bool:
        """Whether memory stands behind all of [gpa, gpa+length)."""
        return length > 0 and any(region.start <= gpa and gpa + length <= region.end for region in self.regions)

    def entry(self, gpa: int) -> Entry:
        """The state of the page that holds byte `gpa`."""
        page = gpa // PAGE
        return self._large.get(page - page % _PAGES) or self._small.get(page, HYPERVISOR)

    def is_shared(self, gpa: int, length: int) -> bool:
        """Whether every page of the range exists and is the hypervisor's."""
        if not self.covers(gpa, length):
            return False
        first, last = gpa // PAGE, (gpa + length - 1) // PAGE
        return all(not self.entry(page * PAGE).assigned for page in range(first, last + 1))

    def extents(self) -> Iterable[tuple[int, int, Entry]]:
        """Every page that is not the hypervisor's: (gpa, length, entry), in no particular order."""
        for page, entry in self._large.items():
            yield page * PAGE, LARGE_PAGE, entry
        for page, entry in self._small.items():
            yield page * PAGE, PAGE, entry

    def set_in_use(self, vmsa_gpa: int, *, in_use: bool) -> None:
        """Note that a VMSA's vCPU runs, or has stopped."""
        (self._in_use.add if in_use else self._in_use.discard)(vmsa_gpa)

    # ---- the host ------------------------------------------------------------------------------------------------

    def plan_update(self, gpa: int, size_bytes: int, *, assign: bool) -> Outcome:
        """RMPUPDATE of one page by the host.

        Returns:
            `UpdateCode` and the change; assigning an assigned page that is not validated changes nothing.
        """
        if size_bytes not in (PAGE, LARGE_PAGE) or gpa % size_bytes or not self.covers(gpa, size_bytes):
            return Outcome(UpdateCode.FAIL_INPUT)
        pages = range(gpa, gpa + size_bytes, PAGE)
        if any(page in self._in_use for page in pages):
            return Outcome(UpdateCode.FAIL_INUSE)
        before = self.entry(gpa)
        if size_bytes == LARGE_PAGE and not before.large and any(self.entry(page) != HYPERVISOR for page in pages):
            return Outcome(UpdateCode.FAIL_OVERLAP)
        if before.immutable:
            return Outcome(UpdateCode.FAIL_PERMISSION)
        large = size_bytes == LARGE_PAGE
        if assign and before.assigned:
            # The chip would rescind a validated page here; that is a page taken from the guest, and planned as one.
            if not before.validated:
                return Outcome(UpdateCode.SUCCESS)
            return Outcome(UpdateCode.SUCCESS, change=Change(gpa, size_bytes, before, HYPERVISOR, True))
        if not assign and not before.assigned:
            return Outcome(UpdateCode.SUCCESS)
        after = Entry(assigned=True, large=large) if assign else HYPERVISOR
        return Outcome(UpdateCode.SUCCESS, change=Change(gpa, size_bytes, before, after, True))

    def plan_pre_guest(self, gpa: int, length: int) -> Outcome:
        """The first half of LAUNCH_UPDATE: a run of 4 KiB pages becomes firmware's, contents kept."""
        if gpa % PAGE or length % PAGE or not self.covers(gpa, length):
            return Outcome(UpdateCode.FAIL_INPUT)
        if any(self.entry(page) != HYPERVISOR for page in range(gpa, gpa + length, PAGE)):
            return Outcome(UpdateCode.FAIL_OVERLAP)
        after = Entry(assigned=True, immutable=True)
        return Outcome(UpdateCode.SUCCESS, change=Change(gpa, length, HYPERVISOR, after, False))

    def plan_guest_valid(self, pre_guest: Change, *, permissions: tuple[int, int, int], vmsa: bool) -> Change:
        """The second half: the pages become the guest's, validated."""
        after = Entry(assigned=True, validated=True, vmsa=vmsa, permissions=permissions)
        return Change(pre_guest.gpa, pre_guest.length, pre_guest.after, after, False)

    def plan_reclaim(self, pre_guest: Change) -> Change:
        """Pre-guest pages that firmware refused go back to the host, with their contents."""
        return Change(pre_guest.gpa, pre_guest.length, pre_guest.after, HYPERVISOR, False)

    # ---- the guest, VMPL0 ----------------------------------------------------------------------------------------

    def plan_pvalidate(self, gpa: int, size_bytes: int, *, validate: bool) -> Outcome:
        """PVALIDATE by VMPL0 (AMD 24594)."""
        refused = self._check_instruction(gpa, size_bytes)
        if refused is not None:
            return Outcome(refused)
        before = self.entry(gpa)
        if before.validated == validate:
            return Outcome(InstructionCode.SUCCESS, carry=True)
        after = Entry(assigned=True, validated=validate, large=size_bytes == LARGE_PAGE)
        return Outcome(InstructionCode.SUCCESS, change=Change(gpa, size_bytes, before, after, True))

    def plan_rmpadjust(self, gpa: int, size_bytes: int, attributes: int) -> Outcome:
        """RMPADJUST by VMPL0: `attributes` is the RDX word (VMPL 7:0, permissions 11:8, VMSA 16)."""
        vmpl, vmsa = attributes & 0xFF, bool(attributes & _VMSA_BIT)
        if attributes & ~_ATTRIBUTE_BITS or vmpl > 3 or (vmsa and size_bytes != PAGE):
            return Outcome(InstructionCode.FAIL_INPUT)
        if vmpl == 0:
            return Outcome(InstructionCode.FAIL_PERMISSION)
        refused = self._check_instruction(gpa, size_bytes)
        if refused is not None:
            return Outcome(refused)
        before = self.entry(gpa)
        if not before.validated:
            return Outcome(InstructionCode.NESTED_FAULT)
        permissions = list(before.permissions)
        permissions[vmpl - 1] = attributes >> 8 & 0xF
        after = dataclasses.replace(
            before,
            permissions=(permissions[0], permissions[1], permissions[2]),
            vmsa=vmsa,
            large=size_bytes == LARGE_PAGE,
        )
        change = None if after == before else Change(gpa, size_bytes, before, after, False)
        return Outcome(InstructionCode.SUCCESS, change=change)

    def _check_instruction(self, gpa: int, size_bytes: int) -> InstructionCode | None:
        if size_bytes not in (PAGE, LARGE_PAGE) or gpa % size_bytes:
            return InstructionCode.FAIL_INPUT
        if not self.covers(gpa, size_bytes):
            return InstructionCode.NESTED_FAULT
        entry = self.entry(gpa)
        if size_bytes == LARGE_PAGE and not entry.large:
            assigned = all(self.entry(page).assigned for page in range(gpa, gpa + size_bytes, PAGE))
            return InstructionCode.FAIL_SIZEMISMATCH if assigned else InstructionCode.NESTED_FAULT
        if not entry.assigned or entry.immutable:
            return InstructionCode.NESTED_FAULT
        if any(page in self._in_use for page in range(gpa, gpa + size_bytes, PAGE)):
            return InstructionCode.FAIL_INUSE
        return None

    # ---- commit --------------------------------------------------------------------------------------------------

    def commit(self, change: Change) -> None:
        """Take over a change that memory has carried out."""
        page, pages = change.gpa // PAGE, change.length // PAGE
        if change.before.large and change.length == PAGE:
            base = page - page % _PAGES
            self._small.update(
                dict.fromkeys(range(base, base + _PAGES), dataclasses.replace(self._large.pop(base), large=False))
            )
        if change.before.large or change.after.large:
            self._large.pop(page, None)
        if change.after.large:
            self._large[page] = change.after
        elif change.after == HYPERVISOR:
            for gone in range(page, page + pages):
                self._small.pop(gone, None)
        else:
            self._small.update(dict.fromkeys(range(page, page + pages), change.after))
