# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the measured loader hands to the first line of the kernel or of a service.

Names, numbers and descriptors only: everything else a process needs it reads from measured pages or asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from svsm.confine.process import Isolation

__all__ = ["ProcessContext"]


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessContext:
    """The start of a process: a kernel has registers, a service has parameters."""

    role: str
    """``kernel``, or the name of the service, e.g. ``vtpm``."""
    registers: Mapping[str, int]
    """The VMSA's registers at start: rip, rcx, rdx, r8, rsi, rdi, r9, rbx (guest physical addresses, lengths)."""
    descriptors: Mapping[str, int]
    """Named descriptors: private, vmpl2, shared, hardware, host, console; a service has syscall and console."""
    parameters: Mapping[str, str]
    """What the kernel told the service at spawn."""
    archive: int
    """Descriptor of the payload archive: a sealed memfd; the kernel hands it on when it spawns a service."""
    isolation: Isolation
