# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the simulated chip is: its identity as reports state it, its CPUID, and who signs for it.

The signing key and the certificates belong to `svsm.hardware.authority`; the machine reaches them only through
`ReportSigner`, so that a test can put a throw-away key in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from svsm.formats.snp.cpuid_page import CpuidFunction, pack_cpuid_page
from svsm.formats.snp.policy import PlatformInfo
from svsm.formats.snp.report import Report
from svsm.formats.snp.tcb import Line, Tcb

__all__ = ["DEFAULT_PLATFORM_INFO", "Chip", "Firmware", "ReportSigner", "cpuid_functions", "fms_of"]

ReportSigner = Callable[[Report], Report]
"""Takes a report without signature and gives it back signed by the chip's VCEK."""

DEFAULT_PLATFORM_INFO: Final = PlatformInfo.SMT_ENABLED | PlatformInfo.ECC_ENABLED | PlatformInfo.ALIAS_CHECK_COMPLETE


@dataclasses.dataclass(frozen=True, slots=True)
class Firmware:
    """A firmware version."""

    major: int = 1
    minor: int = 58
    build: int = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """One simulated processor."""

    line: Line
    family: int
    """Combined CPUID family; the next two likewise."""
    model: int
    stepping: int
    chip_id: bytes
    """64 bytes; on Turin 8 bytes and zeros."""
    tcb: Tcb
    """Of the running firmware: current, committed, launch and reported are the same on this machine."""
    sign: ReportSigner = dataclasses.field(repr=False)
    certificates: bytes = dataclasses.field(default=b"", repr=False)
    """The certificate table that the host may hand out with reports."""
    report_version: int = 5
    """3 or 5."""
    platform_info: int = DEFAULT_PLATFORM_INFO
    firmware: Firmware = Firmware()
    mitigations: int = 0
    """Mitigation vector bits; reports of version 5 show them."""

    @property
    def fms(self) -> int:
        """Family, model and stepping in the form of CPUID 1 EAX."""
        return fms_of(self.family, self.model, self.stepping)

    def cpuid_page(self) -> bytes:
        """A CPUID page (4096 bytes) with everything that a guest may have."""
        return pack_cpuid_page(cpuid_functions(self))


def fms_of(family: int, model: int, stepping: int) -> int:
    """CPUID 1 EAX of a combined family, model and stepping."""
    base_family = min(family, 0xF)
    return (
        ((family - base_family) << 20)
        | ((model >> 4) << 16)
        | (base_family << 8)
        | ((model & 0xF) << 4)
        | (stepping & 0xF)
    )


def cpuid_functions(chip: Chip) -> list[CpuidFunction]:
    """The functions that the firmware lets into a CPUID page, with the chip's values.

    They describe the simulated processor, not the machine below: an x86-64 with SSE2, NX, SEV-SNP and nothing else.
    """
    vendor = (0x68747541, 0x444D4163, 0x69746E65)  # EBX, ECX, EDX of "AuthenticAMD"

    def function(eax_in: int, values: tuple[int, int, int, int], *, ecx_in: int = 0) -> CpuidFunction:
        return CpuidFunction(eax_in, ecx_in, 0, 0, *values, 0)

    return [
        function(0, (0x10, vendor[0], vendor[1], vendor[2])),
        function(1, (chip.fms, 0x0000_0800, 1 << 31, 0x0783_FBFF)),
        function(7, (0, 0, 0, 0)),
        function(0x8000_0000, (0x8000_001F, vendor[0], vendor[1], vendor[2])),
        function(0x8000_0001, (chip.fms, 0, 1, (1 << 29) | (1 << 20) | (1 << 11))),
        function(0x8000_0008, (48 | 48 << 8, 0, 0, 0)),
        function(0x8000_001F, (0b1_1010 | 1 << 5, 51 | 1 << 6, 509, 1)),
    ]
