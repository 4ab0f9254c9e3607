# SPDX-License-Identifier: MIT OR Apache-2.0
"""The two bit fields by which a report says how a guest may be run and how its platform is set up.

`GuestPolicy` is fixed at launch and enforced by the firmware; `PlatformInfo` describes the machine at the moment of
the report. Both are thin views of one u64: every bit is kept, names are given to the bits that the specification
names (AMD 56860 rev 1.58 tables 9 and 24), and `reserved` gives the rest, for the caller to judge.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

__all__ = ["GuestPolicy", "PlatformInfo"]

_U64 = (1 << 64) - 1


class _Bits:
    """A u64 whose bits have names."""

    __slots__ = ()

    value: int
    RESERVED: ClassVar[int]
    FLAGS: ClassVar[dict[str, int]]
    """Flag names as the command line and `--json` write them."""

    @property
    def reserved(self) -> int:
        """Bits that must be zero and are not, in place."""
        return self.value & self.RESERVED

    def has(self, mask: int) -> bool:
        """Whether every bit of `mask` is set."""
        return self.value & mask == mask

    def names(self) -> list[str]:
        """The flags that are set, in bit order."""
        return [name for name, mask in self.FLAGS.items() if self.value & mask]


@dataclasses.dataclass(frozen=True, slots=True)
class GuestPolicy(_Bits):
    """POLICY of a launch and of a report."""

    value: int
    """The u64 as the firmware has it."""

    ABI_MINOR: ClassVar[int] = 0xFF
    SMT: ClassVar[int] = 1 << 16
    MUST_BE_ONE: ClassVar[int] = 1 << 17
    MIGRATE_MA: ClassVar[int] = 1 << 18
    DEBUG: ClassVar[int] = 1 << 19
    SINGLE_SOCKET: ClassVar[int] = 1 << 20
    CXL_ALLOW: ClassVar[int] = 1 << 21
    MEM_AES_256_XTS: ClassVar[int] = 1 << 22
    RAPL_DIS: ClassVar[int] = 1 << 23
    CIPHERTEXT_HIDING: ClassVar[int] = 1 << 24
    PAGE_SWAP_DISABLE: ClassVar[int] = 1 << 25
    RESERVED: ClassVar[int] = _U64 & ~((1 << 26) - 1)

    FLAGS: ClassVar[dict[str, int]] = {
        "smt": SMT,
        "migrate-ma": MIGRATE_MA,
        "debug": DEBUG,
        "single-socket": SINGLE_SOCKET,
        "cxl-allow": CXL_ALLOW,
        "mem-aes-256-xts": MEM_AES_256_XTS,
        "rapl-dis": RAPL_DIS,
        "ciphertext-hiding": CIPHERTEXT_HIDING,
        "page-swap-disable": PAGE_SWAP_DISABLE,
    }

    @property
    def abi(self) -> tuple[int, int]:
        """The least firmware ABI the owner asked for: (major, minor)."""
        return (self.value >> 8) & 0xFF, self.value & 0xFF


@dataclasses.dataclass(frozen=True, slots=True)
class PlatformInfo(_Bits):
    """PLATFORM_INFO of a report."""

    value: int
    """The u64 as the firmware has it."""

    SMT_ENABLED: ClassVar[int] = 1 << 0
    TSME_ENABLED: ClassVar[int] = 1 << 1
    ECC_ENABLED: ClassVar[int] = 1 << 2
    RAPL_DISABLED: ClassVar[int] = 1 << 3
    CIPHERTEXT_HIDING: ClassVar[int] = 1 << 4
    ALIAS_CHECK_COMPLETE: ClassVar[int] = 1 << 5
    SEV_TIO: ClassVar[int] = 1 << 7
    RESERVED: ClassVar[int] = _U64 & ~0b1011_1111

    FLAGS: ClassVar[dict[str, int]] = {
        "smt-enabled": SMT_ENABLED,
        "tsme-enabled": TSME_ENABLED,
        "ecc-enabled": ECC_ENABLED,
        "rapl-disabled": RAPL_DISABLED,
        "ciphertext-hiding": CIPHERTEXT_HIDING,
        "alias-check-complete": ALIAS_CHECK_COMPLETE,
        "sev-tio": SEV_TIO,
    }
