# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which devices a machine has, as its device tree says it: nodes ↔ records.

    /virtio_mmio@feb00000   "virtio,mmio"     reg: a register window
    /isa/serial@i3e8        "ns16550a"        reg: I/O ports (space 1, base, number), as the ISA binding has them
    /pci@e0000000           "svsm,pci-ports"  configured by ports 0xCF8 and 0xCFC (PCI 3.0 §3.2.2.3.2); ranges: the
                                              window of 32-bit memory in which registers may be placed
    /chosen                                   svsm,disk, svsm,key-channel: paths of two of these; each may be absent

The tree comes from the host. `BootDevices.parse` says what is written there and refuses what contradicts itself;
whether a place may be used is for the kernel. Nodes of other kinds are passed over unless /chosen names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final, Self

from svsm.formats.errors import FormatError
from svsm.formats.fdt import DeviceTree, Node, cells, strings
from svsm.formats.record import Buffer
from svsm.formats.virtio import MMIO_WINDOW_BYTES

__all__ = ["SERIAL_PORTS", "BootDevice", "BootDevices", "PciHost", "SerialPort", "VirtioMmio"]

SERIAL_PORTS: Final = 8
"""I/O ports of a 16550."""

_DISK: Final = "svsm,disk"
_KEY_CHANNEL: Final = "svsm,key-channel"
_ISA: Final = "/isa"
_IO_SPACE: Final = 1 << 32
"""First cell of an ISA address: I/O space (IEEE 1275, ISA binding)."""
_PCI_MEMORY: Final = 0x0200_0000 << 64
"""First cell of a PCI address: 32-bit memory (IEEE 1275, PCI binding)."""


@dataclasses.dataclass(frozen=True, slots=True)
class VirtioMmio:
    """A virtio device behind a register window."""

    gpa: int
    size_bytes: int = MMIO_WINDOW_BYTES

    @property
    def path(self) -> str:
        """Of its node."""
        return f"/virtio_mmio@{self.gpa:x}"


@dataclasses.dataclass(frozen=True, slots=True)
class SerialPort:
    """A 16550."""

    port: int
    """I/O base."""
    ports: int = SERIAL_PORTS
    """How many, from there on."""

    @property
    def path(self) -> str:
        """Of its node."""
        return f"{_ISA}/serial@i{self.port:x}"


@dataclasses.dataclass(frozen=True, slots=True)
class PciHost:
    """A PCI host bridge with bus 0."""

    window_gpa: int
    """Where registers of functions may be placed; the same address on the bus."""
    window_bytes: int

    @property
    def path(self) -> str:
        """Of its node."""
        return f"/pci@{self.window_gpa:x}"


BootDevice = VirtioMmio | SerialPort | PciHost


@dataclasses.dataclass(frozen=True, slots=True)
class BootDevices:
    """What a boot finds.

    `disk` and `key_channel` are members of `devices` that the loader has chosen, or None: then they are not behind
    registers, and come as descriptors.
    """

    devices: tuple[BootDevice, ...] = ()
    disk: BootDevice | None = None
    key_channel: BootDevice | None = None

    def tree(self) -> DeviceTree:
        """The device tree that says so; `DeviceTree.pack` gives its bytes."""
        nodes = [_node(device) for device in self.devices if not isinstance(device, SerialPort)]
        serial = tuple(_node(device) for device in self.devices if isinstance(device, SerialPort))
        if serial:
            width = (("#address-cells", cells(2)), ("#size-cells", cells(1)))
            nodes.append(
                Node(_ISA[1:], (("compatible", strings("isa")), ("device_type", strings("isa")), *width), serial)
            )
        named = ((_DISK, self.disk), (_KEY_CHANNEL, self.key_channel))
        chosen = tuple((name, strings(device.path)) for name, device in named if device is not None)
        properties = (
            ("#address-cells", cells(2)),
            ("#size-cells", cells(2)),
            ("compatible", strings("svsm,machine")),
        )
        return DeviceTree(Node("", properties, (*nodes, Node("chosen", chosen))))

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read a blob; `data` may be longer.

        Raises:
            FormatError: ``boot-devices-node``, ``boot-devices-chosen``, ``fdt-…`` and what `DeviceTree.parse` raises.
        """
        tree = DeviceTree.parse(data)
        devices: dict[str, BootDevice] = {}
        known: set[str] = set()
        chosen = Node("chosen")
        for path, node, parent in tree.walk():
            known.add(path)
            chosen = node if path == "/chosen" else chosen
            reader = next((_READERS[name] for name in node.strings("compatible") if name in _READERS), None)
            if reader is not None and parent is not None:
                devices[path] = reader(path, node, parent)
        return cls(
            tuple(devices.values()),
            _chosen(chosen, _DISK, devices, known),
            _chosen(chosen, _KEY_CHANNEL, devices, known),
        )


# ---- writing --------------------------------------------------------------------------------------------------------


def _node(device: BootDevice) -> Node:
    name = device.path.rpartition("/")[2]
    if isinstance(device, VirtioMmio):
        window = _words(device.gpa, 2) + _words(device.size_bytes, 2)
        return Node(name, (("compatible", strings("virtio,mmio")), ("reg", window)))
    if isinstance(device, SerialPort):
        window = _words(_IO_SPACE | device.port, 2) + _words(device.ports, 1)
        return Node(name, (("compatible", strings("ns16550a")), ("reg", window)))
    window = _words(_PCI_MEMORY | device.window_gpa, 3) + _words(device.window_gpa, 2) + _words(device.window_bytes, 2)
    properties = (
        ("compatible", strings("svsm,pci-ports")),
        ("device_type", strings("pci")),
        ("#address-cells", cells(3)),
        ("#size-cells", cells(2)),
        ("bus-range", cells(0, 0)),
        ("ranges", window),
    )
    return Node(name, properties)


def _words(value: int, count: int) -> bytes:
    top = value >> 32 * (count - 1)  # not masked: what does not fit is refused
    return cells(top, *(value >> 32 * index & 0xFFFF_FFFF for index in reversed(range(count - 1))))


# ---- reading --------------------------------------------------------------------------------------------------------


def _wrong(path: str, why: str) -> FormatError:
    return FormatError(f"a device's node says what cannot be: {why}", code="boot-devices-node", path=path)


def _only(path: str, found: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    if len(found) != 1:
        raise _wrong(path, "it has another number of places than one")
    return found[0]


def _place(path: str, node: Node, parent: Node, name: str) -> tuple[int, int]:
    """The one (address, size) of a node, in cells that its parent gives."""
    widths = (parent.cell("#address-cells", 2), parent.cell("#size-cells", 1))
    address, size = _only(path, node.tuples(name, *widths))
    return address, size


def _at_root(path: str) -> None:
    if path.count("/") != 1:
        raise _wrong(path, "it is on a bus that nobody knows")


def _virtio(path: str, node: Node, parent: Node) -> VirtioMmio:
    _at_root(path)
    return VirtioMmio(*_place(path, node, parent, "reg"))


def _serial(path: str, node: Node, parent: Node) -> SerialPort:
    if path.rpartition("/")[0] != _ISA:
        raise _wrong(path, "it is on a bus that nobody knows")
    address, ports = _place(path, node, parent, "reg")
    if address >> 16 << 16 != _IO_SPACE:
        raise _wrong(path, "it is not in I/O space")
    return SerialPort(address ^ _IO_SPACE, ports)


def _pci(path: str, node: Node, parent: Node) -> PciHost:
    _at_root(path)
    widths = (node.cell("#address-cells", 2), parent.cell("#address-cells", 2), node.cell("#size-cells", 1))
    inside, gpa, size = _only(path, node.tuples("ranges", *widths))
    if inside != _PCI_MEMORY | gpa or gpa >> 32:
        raise _wrong(path, "its window is not 32-bit memory at its own address")
    return PciHost(gpa, size)


_READERS: Final[Mapping[str, Callable[[str, Node, Node], BootDevice]]] = {
    "virtio,mmio": _virtio,
    "ns16550a": _serial,
    "svsm,pci-ports": _pci,
}


def _chosen(chosen: Node, name: str, devices: Mapping[str, BootDevice], known: set[str]) -> BootDevice | None:
    if chosen.get(name) is None:
        return None
    paths = chosen.strings(name)
    if len(paths) != 1 or paths[0] not in devices:
        unknown = "is of a kind that nobody knows" if paths and paths[0] in known else "does not exist"
        raise FormatError(
            f"a chosen device {unknown}", code="boot-devices-chosen", field=name, path=paths[0] if paths else None
        )
    return devices[paths[0]]
