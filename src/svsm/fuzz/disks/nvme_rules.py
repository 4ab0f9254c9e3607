# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an NVMe controller said in registers and Identify pages, and what the driver must have made of it (NVMe 1.4).

`NvmeRules` follows the registers in order and keeps the code of the first thing that cannot be; `judge_pages` reads the
two Identify pages by their offsets (figures 247 and 245), without the driver's own records.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from svsm.formats.nvme import NvmeRegister

__all__ = ["NvmeRules", "Size", "judge_namespace", "judge_pages"]

_WORD: Final = 0xFFFF_FFFF
_RDY, _CFS, _RESET_NOTICE = 1, 2, 16
_CAP, _CSTS, _CC, _DOORBELLS = (
    int(register) for register in (NvmeRegister.CAP, NvmeRegister.CSTS, NvmeRegister.CC, NvmeRegister.DOORBELLS)
)
_MOST_BYTES: Final = 1 << 56


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """What a namespace says, where it can be believed."""

    size_bytes: int
    block_bytes: int


def judge_namespace(page: bytes) -> Size | None:
    """What Identify Namespace means, or None where the disk must be refused."""
    index = page[26] & 0xF
    if index > page[25]:
        return None
    metadata, shift = int.from_bytes(page[128 + 4 * index :][:2], "little"), page[130 + 4 * index]
    blocks = int.from_bytes(page[:8], "little")
    if metadata or page[29] & 7 or not 9 <= shift <= 16 or not 0 < blocks << shift <= _MOST_BYTES:
        return None
    return Size(blocks << shift, 1 << shift)


def judge_pages(controller: bytes, namespace: bytes) -> Size | None:
    """As `judge_namespace`, of namespace 1 of this controller."""
    size = judge_namespace(namespace)
    for sizes, needed in ((controller[512], 6), (controller[513], 4)):
        if not sizes & 0xF <= needed <= sizes >> 4:
            return None
    if controller[111] > 1 or not int.from_bytes(controller[516:520], "little"):
        return None
    if size is not None and controller[77] and 4096 << controller[77] < size.block_bytes:
        return None
    return size


class NvmeRules:
    """Follows one driver's registers.

    Args:
        window_bytes: Of the register window.

    Attributes:
        code: Of the first thing that cannot be, or "".
    """

    def __init__(self, *, window_bytes: int) -> None:
        self.code = ""
        self._window_bytes = window_bytes
        self._capabilities = 0
        self._state = "new"

    def _cannot_be(self, code: str) -> None:
        self.code = self.code or code

    def hear(self, write: bool, offset: int, value: int) -> None:
        """One access."""
        if write:
            self._written(offset, value)
        elif not 0 <= value <= _WORD:
            self._cannot_be("nvme-register")
        elif offset == _CAP:
            self._capabilities = value
        elif offset == _CAP + 4:
            self._judge_capabilities(self._capabilities | value << 32)
        elif offset == _CSTS:
            self._read_status(value)

    def _judge_capabilities(self, value: int) -> None:
        if value == (1 << 64) - 1:
            self._cannot_be("nvme-gone")
        if not value >> 37 & 1 or value >> 48 & 0xF or not value & 0xFFFF:
            self._cannot_be("nvme-unsupported")
        stride = 4 << (value >> 32 & 0xF)
        if _DOORBELLS + 3 * stride + 4 > self._window_bytes:
            self._cannot_be("nvme-doorbell")

    def _written(self, offset: int, value: int) -> None:
        if self._state.endswith("?") and offset != _CC:
            self._cannot_be("nvme-stuck")
        if offset == _CC:
            self._state = "on?" if value & 1 else "off?"

    def _read_status(self, value: int) -> None:
        if value == _WORD:
            self._cannot_be("nvme-gone")
        elif self._state == "off?":
            self._state = self._state if value & _RDY else "off"
        elif self._state == "on?":
            if value & _RDY:
                self._state = "on"
            elif value & _CFS:
                self._cannot_be("nvme-failed")
        elif self._state == "on" and value & ~_RESET_NOTICE != _RDY:
            self._cannot_be("nvme-failed")

    def end(self) -> None:
        """The call is over."""
        if self._state.endswith("?"):
            self._cannot_be("nvme-stuck")
