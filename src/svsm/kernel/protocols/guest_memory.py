# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a guest may name in a call: its memory map, and which of its pages the SVSM has taken out of its hands.

The kernel can touch every page of the machine, the guest cannot: whatever address a call carries is therefore
checked here before it is used, or the SVSM would read and write on the guest's behalf what the guest itself may
not. Two kinds of pages lie inside the memory map and are still not the guest's: the VMSA of each vCPU (writing it
would let a guest choose its own privilege level), and, for PVALIDATE only, the calling areas.

Addresses are page-split on the way to `Platform`, so that a buffer may straddle pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

from svsm.abi.errors import StateError
from svsm.abi.platform import PAGE_SIZE, Gpa, Permission, Vmpl
from svsm.formats.record import Buffer
from svsm.kernel.protocols.table import CallError, Result

__all__ = ["CALLING_AREA_BYTES", "GuestMemory", "GuestPlatform", "Region", "VcpuArea"]

CALLING_AREA_BYTES = 8
"""What of a calling area page means something to the SVSM (AMD 58019 table 2); the guest uses the rest."""


class GuestPlatform(Protocol):
    """The part of `svsm.abi.platform.Platform` that a guest's calls may move; documented there."""

    def read(self, gpa: Gpa, length: int) -> bytes:
        """Bytes of memory."""

    def write(self, gpa: Gpa, data: Buffer) -> None:
        """Store bytes."""

    def validate(self, gpa: Gpa, *, size_bytes: int, validated: bool) -> bool:
        """PVALIDATE."""

    def adjust(self, gpa: Gpa, *, size_bytes: int, vmpl: Vmpl, permissions: Permission, vmsa: bool) -> None:
        """RMPADJUST."""

    def run_guest(self, vmsa_gpa: Gpa) -> None:
        """Let the vCPU run."""


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A range of guest memory, in bytes."""

    start: Gpa
    length: int

    def overlaps(self, gpa: int, length: int) -> bool:
        """Whether any byte is in both."""
        return self.start < gpa + length and gpa < self.start + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class VcpuArea:
    """The pages of one vCPU."""

    vmsa_gpa: Gpa
    calling_area_gpa: Gpa


class GuestMemory:
    """The guest's memory map and the pages registered in it.

    Args:
        platform: How memory is reached.
        regions: The guest's memory map; page-aligned.
        protected: Pages that no call may name although a region might cover them (the SVSM's own launch VMSA).

    Raises:
        StateError: ``guest-memory-map`` for a region that is not made of whole pages.
    """

    def __init__(self, platform: GuestPlatform, regions: Iterable[Region], *, protected: Iterable[Gpa] = ()) -> None:
        self._platform = platform
        self._regions = _merged(regions)
        self._protected = [Region(gpa, PAGE_SIZE) for gpa in protected]
        self._vcpus: dict[Gpa, VcpuArea] = {}

    # --- the map ---------------------------------------------------------------------------------------------

    def contains(self, gpa: int, length: int) -> bool:
        """Whether every byte is in the memory map and on no page that is the SVSM's."""
        inside = any(region.start <= gpa and gpa + length <= region.start + region.length for region in self._regions)
        return inside and length > 0 and not self._taken(gpa, length)

    def _taken(self, gpa: int, length: int) -> bool:
        vmsas = (Region(vcpu.vmsa_gpa, PAGE_SIZE) for vcpu in self._vcpus.values())
        return any(region.overlaps(gpa, length) for region in (*self._protected, *vmsas))

    def is_registered(self, gpa: int, length: int, *, except_vmsa: Gpa | None = None) -> bool:
        """Whether the range touches a VMSA page, a calling area (its 8 bytes) or a protected page.

        Args:
            except_vmsa: The vCPU whose own calling area does not count.
        """
        areas = (
            Region(vcpu.calling_area_gpa, CALLING_AREA_BYTES)
            for vcpu in self._vcpus.values()
            if vcpu.vmsa_gpa != except_vmsa
        )
        return self._taken(gpa, length) or any(area.overlaps(gpa, length) for area in areas)

    # --- vCPUs -----------------------------------------------------------------------------------------------

    def register(self, vcpu: VcpuArea) -> None:
        """Take the pages of a vCPU out of the guest's hands.

        Raises:
            StateError: ``guest-vcpu-overlap`` when they are registered already.
        """
        if (
            self.is_registered(vcpu.vmsa_gpa, PAGE_SIZE)
            or self.is_registered(vcpu.calling_area_gpa, CALLING_AREA_BYTES)
            or Region(vcpu.vmsa_gpa, PAGE_SIZE).overlaps(vcpu.calling_area_gpa, CALLING_AREA_BYTES)
        ):
            raise StateError("the pages of two vCPUs overlap", code="guest-vcpu-overlap", gpa=vcpu.vmsa_gpa)
        self._vcpus[vcpu.vmsa_gpa] = vcpu

    def calling_area(self, vmsa_gpa: Gpa) -> Gpa:
        """The calling area of a vCPU.

        Raises:
            StateError: ``guest-vcpu-unknown``.
        """
        return self._vcpu(vmsa_gpa).calling_area_gpa

    def move_calling_area(self, vmsa_gpa: Gpa, calling_area_gpa: Gpa) -> None:
        """Bind another page; the caller has checked it.

        Raises:
            StateError: ``guest-vcpu-unknown``.
        """
        vcpu = self._vcpu(vmsa_gpa)
        self._vcpus[vmsa_gpa] = dataclasses.replace(vcpu, calling_area_gpa=calling_area_gpa)

    def _vcpu(self, vmsa_gpa: Gpa) -> VcpuArea:
        vcpu = self._vcpus.get(vmsa_gpa)
        if vcpu is None:
            raise StateError("no such vCPU", code="guest-vcpu-unknown", gpa=vmsa_gpa)
        return vcpu

    # --- access on the guest's behalf ------------------------------------------------------------------------

    def read(self, gpa: int, length: int) -> bytes:
        """Guest bytes.

        Raises:
            CallError: INVALID_ADDRESS when they are not all the guest's.
            ProtocolError: ``platform-*`` when a page cannot be read at the moment.
        """
        self._check(gpa, length)
        return b"".join(self._platform.read(Gpa(start), size) for start, size in _pieces(gpa, length))

    def write(self, gpa: int, data: Buffer) -> None:
        """Store bytes in guest memory. Raises what `read` raises; pages before a failing one are written."""
        self._check(gpa, len(data))
        view = memoryview(data)
        for start, size in _pieces(gpa, len(data)):
            self._platform.write(Gpa(start), bytes(view[start - gpa : start - gpa + size]))

    def _check(self, gpa: int, length: int) -> None:
        if not self.contains(gpa, length):
            raise CallError(Result.INVALID_ADDRESS, "not the guest's memory")


def _pieces(gpa: int, length: int) -> Iterable[tuple[int, int]]:
    end = gpa + length
    while gpa < end:
        size = min(PAGE_SIZE - gpa % PAGE_SIZE, end - gpa)
        yield gpa, size
        gpa += size


def _merged(regions: Iterable[Region]) -> list[Region]:
    """Adjacent regions become one, so that a buffer may lie across their border."""
    merged: list[Region] = []
    for region in sorted(regions, key=lambda item: item.start):
        if region.start % PAGE_SIZE or region.length % PAGE_SIZE or region.length <= 0:
            raise StateError("guest memory is made of whole pages", code="guest-memory-map", gpa=region.start)
        last = merged[-1] if merged else None
        if last is not None and region.start <= last.start + last.length:
            end = max(last.start + last.length, region.start + region.length)
            merged[-1] = Region(last.start, end - last.start)
        else:
            merged.append(region)
    return merged
