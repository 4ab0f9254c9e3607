# SPDX-License-Identifier: MIT OR Apache-2.0
"""PCI configuration space through ports 0xCF8 and 0xCFC: find a controller, give its registers an address, let it
read and write memory.

Every answer comes from the host. The search is bounded (bus 0, 32 devices, 8 functions), a BAR's type and size are
judged before an address is computed from them, and everything that is set is read back. Firmware may have given the
BAR an address already; that is not believed, the caller says where its window for device memory is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Protocol

from svsm.formats.errors import ProtocolError
from svsm.formats.nvme import NVME_CLASS

__all__ = ["ConfigurationSpace", "PciFunction", "Ports", "enable_memory_bar", "find_nvme"]

_ADDRESS_PORT: Final = 0xCF8
_DATA_PORT: Final = 0xCFC
_WORD: Final = 0xFFFF_FFFF
_DEVICES, _FUNCTIONS = 32, 8

_ID, _COMMAND, _CLASS, _HEADER, _BAR0, _BAR1 = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14
_COMMAND_MEMORY: Final = 1 << 1
_COMMAND_BUS_MASTER: Final = 1 << 2
_COMMAND_MASK: Final = 0xFFFF
_BAR_IO: Final = 1
_BAR_TYPE_64: Final = 2
_SMALLEST_BAR: Final = 0x2000
"""The registers and the first doorbells."""


class Ports(Protocol):
    """32-bit port accesses."""

    def in32(self, port: int) -> int:
        """Read; hostile."""

    def out32(self, port: int, value: int) -> None:
        """Write."""


@dataclasses.dataclass(frozen=True, slots=True)
class PciFunction:
    """On bus 0."""

    device: int
    function: int


class ConfigurationSpace:
    """Access mechanism #1 (PCI 3.0 §3.2.2.3.2)."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    def read32(self, where: PciFunction, offset: int) -> int:
        """One aligned word.

        Raises:
            ProtocolError: ``nvme-register`` for what is no 32-bit number.
        """
        self._select(where, offset)
        value = self._ports.in32(_DATA_PORT)
        if not 0 <= value <= _WORD:
            raise ProtocolError("a configuration register has an impossible value", code="nvme-register", offset=offset)
        return value

    def write32(self, where: PciFunction, offset: int, value: int) -> None:
        """One aligned word."""
        self._select(where, offset)
        self._ports.out32(_DATA_PORT, value)

    def _select(self, where: PciFunction, offset: int) -> None:
        self._ports.out32(_ADDRESS_PORT, 1 << 31 | where.device << 11 | where.function << 8 | offset)

    def functions(self) -> Iterator[PciFunction]:
        """What is there on bus 0."""
        for device in range(_DEVICES):
            first = PciFunction(device, 0)
            if self.read32(first, _ID) & 0xFFFF == 0xFFFF:
                continue
            yield first
            if self.read32(first, _HEADER) >> 23 & 1:
                for function in range(1, _FUNCTIONS):
                    if self.read32(PciFunction(device, function), _ID) & 0xFFFF != 0xFFFF:
                        yield PciFunction(device, function)


def find_nvme(space: ConfigurationSpace, *, index: int = 0) -> PciFunction:
    """The `index`-th NVMe controller on bus 0.

    Raises:
        ProtocolError: ``nvme-pci-none`` when there is none, ``nvme-register``.
    """
    for where in space.functions():
        if space.read32(where, _CLASS) >> 8 == NVME_CLASS and space.read32(where, _HEADER) >> 16 & 0x7F == 0:
            if not index:
                return where
            index -= 1
    raise ProtocolError("there is no such NVMe controller on PCI bus 0", code="nvme-pci-none")


def enable_memory_bar(
    space: ConfigurationSpace, where: PciFunction, *, window_gpa: int, window_bytes: int
) -> tuple[int, int]:
    """Size BAR 0, put it at the start of a window, switch on memory accesses and bus mastering.

    Args:
        space: Of the host.
        where: A function.
        window_gpa: Where device memory may be; below 4 GiB.
        window_bytes: How much of it.

    Returns:
        Address and bytes of the registers.

    Raises:
        ProtocolError: ``nvme-pci-bar`` for a BAR that cannot be, ``nvme-pci-refused`` when a setting does not stay.
    """
    command = space.read32(where, _COMMAND) & _COMMAND_MASK & ~(_COMMAND_MEMORY | _COMMAND_BUS_MASTER)
    space.write32(where, _COMMAND, command)
    kind = space.read32(where, _BAR0)
    if kind & _BAR_IO or kind >> 1 & 3 not in (0, _BAR_TYPE_64):
        raise ProtocolError("the registers are not in memory", code="nvme-pci-bar", field="type", got=kind)
    space.write32(where, _BAR0, _WORD)
    mask = space.read32(where, _BAR0) & ~0xF & _WORD
    size = -mask & _WORD
    if not mask or size & (size - 1) or not _SMALLEST_BAR <= size <= window_bytes:
        raise ProtocolError("the registers' size is impossible", code="nvme-pci-bar", field="size", got=size)
    base = (window_gpa + size - 1) & -size
    if base + size > window_gpa + window_bytes or base + size > 1 << 32:
        raise ProtocolError("the registers do not fit their window", code="nvme-pci-bar", field="window", got=size)
    settings = [(_BAR0, base, ~0xF & _WORD)]
    if kind >> 1 & 3 == _BAR_TYPE_64:
        settings.append((_BAR1, 0, _WORD))
    settings.append((_COMMAND, command | _COMMAND_MEMORY | _COMMAND_BUS_MASTER, _COMMAND_MASK))
    for offset, value, compared in settings:
        space.write32(where, offset, value)
        got = space.read32(where, offset) & compared
        if got != value:
            raise ProtocolError(
                "the controller's PCI function does not take a setting",
                code="nvme-pci-refused",
                offset=offset,
                expected=value,
                got=got,
            )
    return base, size
