# SPDX-License-Identifier: MIT OR Apache-2.0
"""Device trees beside other people's: dtc reads ours and we read dtc's; QEMU's boards and its microvm are read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from svsm.formats.boot_devices import BootDevices, PciHost, SerialPort, VirtioMmio
from svsm.formats.fdt import DeviceTree, Node, Reservation
from tests.support import absent, peer

_DISK = VirtioMmio(0xFEB0_0000)
_LINE = SerialPort(0x3E8)
_DEVICES = BootDevices((_DISK, PciHost(0xE000_0000, 16 << 20), _LINE), disk=_DISK, key_channel=_LINE)
_BOARDS = Path("/usr/share/qemu")


def _dtc(data: bytes, *, to: str, source: str, quiet: bool = True) -> bytes:
    words = [str(peer("dtc")), *(["-q"] if quiet else []), "-I", source, "-O", to]
    done = subprocess.run(words, input=data, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert quiet or not done.stderr, done.stderr.decode()
    return done.stdout


def test_dtc_reads_our_tree_without_a_warning() -> None:
    text = _dtc(_DEVICES.tree().pack(), to="dts", source="dtb", quiet=False).decode()
    assert 'svsm,disk = "/virtio_mmio@feb00000";' in text
    assert 'svsm,key-channel = "/isa/serial@i3e8";' in text
    assert "reg = <0x00 0xfeb00000 0x00 0x200>;" in text


def test_what_dtc_compiles_is_what_we_write() -> None:
    source = _dtc(_DEVICES.tree().pack(), to="dts", source="dtb")
    assert BootDevices.parse(_dtc(source, to="dtb", source="dts")) == _DEVICES


def test_dtcs_own_tree() -> None:
    source = b"""/dts-v1/; /memreserve/ 0x1000 0x2000;
        / { one = <1 2>; text = "a", "b"; bytes = [01 02 03]; flag; sub@1,2 { deep { one = <3>; }; }; };"""
    tree = DeviceTree.parse(_dtc(source, to="dtb", source="dts"))
    deep = Node("deep", (("one", b"\0\0\0\x03"),))
    assert tree.reservations == (Reservation(0x1000, 0x2000),)
    assert tree.root.children == (Node("sub@1,2", (), (deep,)),)
    assert tree.root.tuples("one", 1) == ((1,), (2,))
    assert tree.root.strings("text") == ("a", "b")
    assert tree.root.get("bytes") == b"\1\2\3"
    assert tree.root.get("flag") == b""


@pytest.mark.parametrize("board", ["bamboo.dtb", "canyonlands.dtb"])
def test_a_board_of_qemu_means_the_same_after_we_wrote_it(board: str) -> None:
    if not (_BOARDS / board).exists():
        raise absent(f"QEMU's tree '{board}' is not installed")
    blob = (_BOARDS / board).read_bytes()
    ours = DeviceTree.parse(blob).pack()
    assert DeviceTree.parse(ours) == DeviceTree.parse(blob)
    assert _dtc(ours, to="dts", source="dtb") == _dtc(blob, to="dts", source="dtb")
