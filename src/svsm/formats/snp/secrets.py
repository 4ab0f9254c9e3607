# SPDX-License-Identifier: MIT OR Apache-2.0
"""The secrets page that the AMD-SP writes at launch (AMD 56860 §8.17.2.5, AMD 58019 §5 for the SVSM's fields).

It carries the four keys between the guest's privilege levels and the AMD-SP. Whoever holds VMPCKn can ask for
reports of VMPL n and higher numbers, so a page that is handed to a lower level has the keys above that level zeroed.
"""

from __future__ import annotations

from typing import Annotated, Final

from svsm.formats.record import U8, U32, U64, Bytes, Record, record

__all__ = ["SECRETS_PAGE_SIZE", "SECRETS_VERSION", "SecretsPage", "fresh_secrets"]

SECRETS_PAGE_SIZE: Final = 4096
SECRETS_VERSION: Final = 4


@record(size=4096, byte_order="little")
class SecretsPage(Record):
    """One secrets page. `repr` would show keys: never print one."""

    version: U32
    flags: U32
    """Bit 0: IMI_EN."""
    fms: U32
    """Family, model, stepping of the chip as CPUID 1 EAX gives them."""
    reserved_0c: U32
    gosvw: Annotated[bytes, Bytes(16)]
    vmpck0: Annotated[bytes, Bytes(32)]
    vmpck1: Annotated[bytes, Bytes(32)]
    vmpck2: Annotated[bytes, Bytes(32)]
    vmpck3: Annotated[bytes, Bytes(32)]
    guest_area: Annotated[bytes, Bytes(96)]
    """Owned by the guest; message sequence numbers are customary here."""
    vmsa_tweak_bitmap: Annotated[bytes, Bytes(64)]
    svsm_base: U64
    svsm_size: U64
    svsm_caa: U64
    svsm_max_version: U32
    svsm_guest_vmpl: U8
    reserved_15d: Annotated[bytes, Bytes(3)]
    tsc_factor: U32
    reserved_164: Annotated[bytes, Bytes(4096 - 0x164)]

    def __repr__(self) -> str:
        return f"SecretsPage(version={self.version}, keys hidden)"

    @property
    def vmpcks(self) -> tuple[bytes, bytes, bytes, bytes]:
        """VMPCK0 to VMPCK3, 32 bytes each."""
        return self.vmpck0, self.vmpck1, self.vmpck2, self.vmpck3


def fresh_secrets(*, vmpcks: tuple[bytes, bytes, bytes, bytes], fms: int, tsc_factor: int = 0) -> SecretsPage:
    """The page as the AMD-SP writes it: keys, chip identity, everything else zero."""
    return SecretsPage(
        SECRETS_VERSION, 0, fms, 0, bytes(16), *vmpcks, bytes(96), bytes(64), 0, 0, 0, 0, 0, bytes(3), tsc_factor,
        bytes(4096 - 0x164),
    )  # fmt: skip
