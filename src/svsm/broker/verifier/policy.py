# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an owner demands of a report, as data.

Some demands have no off switch (the chain, the signature, the reserved bits). Those here have a safe default (VMPL 0,
no debugging, no migration agent) or none at all: `None` means that nobody gave a value, and the check is listed as not
made. An empty set is a value: it allows nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from svsm.formats.errors import StateError

__all__ = ["ReportPolicy"]

_LENGTHS = {"report_data": 64, "host_data": 32, "family_id": 16, "image_id": 16}
_SET_LENGTHS = {
    "measurements": 48,
    "id_key_digests": 48,
    "author_key_digests": 48,
    "allowed_chip_ids": 64,
    "denied_chip_ids": 64,
}
_COMPONENTS = frozenset({"fmc", "bootloader", "tee", "snp", "microcode"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportPolicy:
    """Demands on one report. See the module for what None means.

    Raises:
        StateError: ``report-policy`` when a value has a length or name that no report can match.
    """

    report_data: bytes | None = None
    """64 bytes that REPORT_DATA must be: what binds the report to a challenge and a key."""
    vmpls: frozenset[int] = frozenset({0})
    """Privilege levels that may have asked for the report. 0 is the SVSM itself."""
    measurements: frozenset[bytes] | None = None
    """Launch digests (48 bytes) that are allowed."""
    allow_debug: bool = False
    allow_migration: bool = False
    allow_smt: bool | None = None
    require_single_socket: bool | None = None
    require_page_swap_disable: bool | None = None
    min_abi: tuple[int, int] | None = None
    """Least (major, minor) that the guest's policy must demand of the firmware."""
    id_key_digests: frozenset[bytes] | None = None
    """SHA-384 of the ID keys (48 bytes) that are allowed."""
    author_key_digests: frozenset[bytes] | None = None
    family_id: bytes | None = None
    image_id: bytes | None = None
    min_guest_svn: int | None = None
    host_data: bytes | None = None
    """32 bytes that HOST_DATA must be."""
    min_tcb: Mapping[str, int] | None = dataclasses.field(default=None, hash=False)
    """Least patch level by component, demanded of REPORTED, COMMITTED and LAUNCH."""
    allow_provisional: bool | None = None
    """Whether firmware may run that the host can still roll back (CURRENT differs from COMMITTED)."""
    require_alias_check: bool | None = None
    require_ciphertext_hiding: bool | None = None
    require_mitigations: int | None = None
    """Bits that both mitigation vectors must have."""
    allowed_chip_ids: frozenset[bytes] | None = None
    denied_chip_ids: frozenset[bytes] | None = None
    allow_masked_chip_id: bool = False
    """Accept CHIP_ID zero: the report then proves a genuine chip, but not which."""

    def __post_init__(self) -> None:
        for name, length in _LENGTHS.items():
            value = getattr(self, name)
            if value is not None and len(value) != length:
                raise StateError(f"{name} must have {length} bytes", code="report-policy", field=name, got=len(value))
        for name, length in _SET_LENGTHS.items():
            values = getattr(self, name)
            if values is not None and any(len(value) != length for value in values):
                raise StateError(f"each of {name} must have {length} bytes", code="report-policy", field=name)
        if self.min_tcb is not None and not set(self.min_tcb) <= _COMPONENTS:
            raise StateError("no such TCB component", code="report-policy", field="min_tcb")
