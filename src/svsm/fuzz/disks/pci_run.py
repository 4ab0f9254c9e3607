# SPDX-License-Identifier: MIT OR Apache-2.0
"""A PCI bus that lies: finding an NVMe controller on it, and giving its registers an address.

The bus has one controller. The input says how each reading of one of its words differs from what was written. What the
driver then believes is compared with what it was told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.formats.nvme import NVME_CLASS
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import expect
from svsm.storage.drivers.nvme.pci import ConfigurationSpace, PciFunction, enable_memory_bar, find_nvme

__all__ = ["pci_run"]

_WORD: Final = 0xFFFF_FFFF
_WINDOW_GPA, _WINDOW_BYTES = 0xE000_0000, 1 << 20
_COMMAND, _CLASS, _HEADER, _BAR0, _BAR1 = 0x04, 0x08, 0x0C, 0x10, 0x14
_ENABLED: Final = 6


class _Bus:
    """Ports 0xCF8 and 0xCFC, and what was said through them."""

    def __init__(self, choices: Choices) -> None:
        self.where = choices.below(4)
        kind = choices.unsigned(1)
        self.bar_mask = _WORD & -(0x1000 << (kind & 15))
        self.bar_kind = (4, 0, 1, 2, 6, 12, 3, 8)[kind >> 4 & 7]
        self.words = {0: 0x0010_1B36, _COMMAND: 0, _CLASS: NVME_CLASS << 8 | 2, _HEADER: 0, _BAR0: self.bar_kind}
        self.lies: dict[int, Callable[[int], int]] = {}
        for _ in range(choices.below(3)):
            self.lies[4 * choices.below(6)] = _lie(choices)
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.impossible = False
        self._selected = 0

    def in32(self, _port: int) -> int:
        """The selected word, or a lie."""
        if self._selected >> 11 & 0x1F != self.where or self._selected >> 8 & 7:
            return _WORD
        offset = self._selected & 0xFC
        honest = self.words.get(offset, 0)
        value = self.lies[offset](honest) if offset in self.lies else honest
        self.impossible |= not 0 <= value <= _WORD
        self.first.setdefault(offset, value)
        self.last[offset] = value
        return value

    def out32(self, port: int, value: int) -> None:
        """Select, or set."""
        expect(0 <= value <= _WORD, "a word has 32 bits")
        if port == 0xCF8:
            self._selected = value
            return
        offset = self._selected & 0xFC
        if offset == _BAR0:
            value = value & self.bar_mask | self.bar_kind
        self.words[offset] = value & 0xFFFF if offset == _COMMAND else value


def _lie(choices: Choices) -> Callable[[int], int]:
    kind, argument = choices.below(6), choices.unsigned(1)
    lies: tuple[Callable[[int], int], ...] = (
        lambda value: value ^ 1 << argument % 32,
        lambda value: value & ~(1 << argument % 32),
        lambda value: value | 1 << 32 + argument % 8,
        lambda _value: -1,
        lambda _value: 0,
        lambda value: value ^ argument << 16,
    )
    return lies[kind]


def pci_run(data: bytes) -> None:
    """Find, size, enable.

    Raises:
        SvsmError: What refused the bus, as it must.
    """
    bus = _Bus(Choices(data))
    space = ConfigurationSpace(bus)
    try:
        where = find_nvme(space)
        expect(where == PciFunction(bus.where, 0), "the controller is where it is")
        expect(bus.last[_CLASS] >> 8 == NVME_CLASS, "a function of another class is taken")
        expect(bus.last[_HEADER] >> 16 & 0x7F == 0, "a bridge is taken")
        base, size = enable_memory_bar(space, where, window_gpa=_WINDOW_GPA, window_bytes=_WINDOW_BYTES)
    except SvsmError as error:
        honest = not bus.lies and bus.bar_kind & 1 == 0 and bus.bar_kind & 6 != 2 and not _too_small(bus.bar_mask)
        expect(not honest or bus.bar_kind & 6 == 6, "an honest bus is refused")
        expect(not bus.impossible or error.code == "nvme-register", "an impossible word is called something else")
        raise
    expect(not bus.impossible, "an impossible word is believed")
    expect(not bus.first[_BAR0] & 1 and bus.first[_BAR0] >> 1 & 3 in (0, 2), "registers that are not in memory")
    expect(size & (size - 1) == 0 and 0x2000 <= size <= _WINDOW_BYTES, "a window of this size")
    expect(base % size == 0 and _WINDOW_GPA <= base <= _WINDOW_GPA + _WINDOW_BYTES - size, "a window outside its place")
    expect(bus.last[_BAR0] & ~0xF == base, "the address does not stay")
    expect(bus.last[_COMMAND] & _ENABLED == _ENABLED, "what is not switched on is used")


def _too_small(mask: int) -> bool:
    return not 0x2000 <= -mask & _WORD <= _WINDOW_BYTES
