# SPDX-License-Identifier: MIT OR Apache-2.0
"""Boot devices: what a loader writes is what a kernel reads, and what contradicts itself is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from svsm.formats.boot_devices import BootDevice, BootDevices, PciHost, SerialPort, VirtioMmio
from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.fdt import DeviceTree, Node, cells, strings
from tests.unit.formats.test_fdt import qemu_microvm

_VIRTIO = VirtioMmio(0xFEB0_0000)
_SERIAL = SerialPort(0x3E8)
_PCI = PciHost(0xE000_0000, 16 << 20)
_ALL = BootDevices((_VIRTIO, _PCI, _SERIAL, SerialPort(0x2F8)), disk=_PCI, key_channel=_SERIAL)


@pytest.mark.parametrize(
    "devices",
    [
        BootDevices(),
        BootDevices((_VIRTIO,), disk=_VIRTIO),
        BootDevices((_VIRTIO, VirtioMmio(0xFEB0_0200)), disk=VirtioMmio(0xFEB0_0200), key_channel=_VIRTIO),
        BootDevices((_SERIAL,), key_channel=_SERIAL),
        _ALL,
    ],
)
def test_round_trip(devices: BootDevices) -> None:
    assert BootDevices.parse(devices.tree().pack() + bytes(100)) == devices


def test_qemus_tree_has_a_disk_and_what_is_not_known_is_passed_over() -> None:
    tree = DeviceTree.parse(qemu_microvm())
    # QEMU says ns16550, not ns16550a, and has them outside an I/O bus: they are nothing here.
    assert BootDevices.parse(tree.pack()) == BootDevices((VirtioMmio(0xFEB0_0E00),))


def _edit(path: str, edit: Callable[[Node], Node | None], node: Node | None = None, at: str = "") -> Node:
    """The tree of `_ALL` with one node changed."""
    node = node or _ALL.tree().root
    children: list[Node] = []
    for child in node.children:
        here = f"{at}/{child.name}"
        changed = edit(child) if here == path else _edit(path, edit, child, here)
        children += [changed] if changed is not None else []
    return dataclasses.replace(node, children=tuple(children))


def _set(**values: bytes) -> Callable[[Node], Node]:
    def edit(node: Node) -> Node:
        properties = dict(node.properties) | {name.replace("_", "-"): value for name, value in values.items()}
        return dataclasses.replace(node, properties=tuple(properties.items()))

    return edit


def _set_named(name: str, value: bytes) -> Callable[[Node], Node]:
    return lambda node: dataclasses.replace(node, properties=tuple((dict(node.properties) | {name: value}).items()))


def _moved(child: Node, *, under: str) -> Node:
    root = _ALL.tree().root
    return dataclasses.replace(root, children=(*root.children, Node(under, (), (child,))))


@pytest.mark.parametrize(
    ("root", "code"),
    [
        (_edit("/virtio_mmio@feb00000", _set(reg=b"")), "boot-devices-node"),
        (_edit("/virtio_mmio@feb00000", _set(reg=cells(0, 1, 0, 1) * 2)), "boot-devices-node"),
        (_edit("/virtio_mmio@feb00000", _set(reg=cells(0, 1, 0))), "fdt-value"),
        (_edit("/virtio_mmio@feb00000", _set(compatible=b"virtio,mmio")), "fdt-value"),
        (_moved(Node("v", (("compatible", strings("virtio,mmio")),)), under="bus"), "boot-devices-node"),
        (_moved(Node("v", (("compatible", strings("ns16550a")),)), under="bus"), "boot-devices-node"),
        (_edit("/isa", _set_named("#size-cells", b"")), "fdt-value"),
        (_edit("/isa", _set_named("#address-cells", cells(9))), "fdt-value"),
        (_edit("/isa/serial@i3e8", _set(reg=cells(0, 0x3E8, 8))), "boot-devices-node"),
        (_edit("/isa/serial@i3e8", _set(reg=cells(1, 0x1_03E8, 8))), "boot-devices-node"),
        (_edit("/pci@e0000000", _set(ranges=b"")), "boot-devices-node"),
        (_edit("/pci@e0000000", _set(ranges=cells(0x0100_0000, 0, 0, 0, 0, 0, 0x1000))), "boot-devices-node"),
        (_edit("/pci@e0000000", _set(ranges=cells(0x0200_0000, 0, 8, 0, 0, 0, 0x1000))), "boot-devices-node"),
        (_edit("/pci@e0000000", _set(ranges=cells(0x0200_0000, 1, 0, 1, 0, 0, 0x1000))), "boot-devices-node"),
        (_edit("/pci@e0000000", lambda _node: None), "boot-devices-chosen"),
        (_edit("/pci@e0000000", _set(compatible=strings("pci-host-ecam-generic"))), "boot-devices-chosen"),
        (_edit("/chosen", _set_named("svsm,disk", b"")), "boot-devices-chosen"),
        (_edit("/chosen", _set_named("svsm,disk", strings("/pci@e0000000", "/isa"))), "boot-devices-chosen"),
        (_edit("/chosen", _set_named("svsm,disk", strings("pci@e0000000"))), "boot-devices-chosen"),
        (_edit("/chosen", _set_named("svsm,disk", b"/pci@e0000000")), "fdt-value"),
        (_edit("/chosen", _set_named("svsm,key-channel", strings("/chosen"))), "boot-devices-chosen"),
    ],
)
def test_what_contradicts_itself(root: Node, code: str) -> None:
    with pytest.raises(FormatError) as caught:
        BootDevices.parse(DeviceTree(root).pack())
    assert caught.value.code == code


def test_a_known_kind_among_others_is_known() -> None:
    root = _edit("/pci@e0000000", _set(compatible=strings("acme,bridge", "svsm,pci-ports")))
    assert BootDevices.parse(DeviceTree(root).pack()) == _ALL


@pytest.mark.parametrize("device", [VirtioMmio(1 << 64), SerialPort(1 << 33), PciHost(0, 1 << 64), PciHost(0, -1)])
def test_what_is_not_written(device: BootDevice) -> None:
    with pytest.raises(FormatError):
        assert BootDevices.parse(BootDevices((device,)).tree().pack()) == BootDevices((device,))


def test_every_flipped_bit() -> None:
    blob = _ALL.tree().pack()
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            BootDevices.parse(damaged)
        except SvsmError:
            continue
