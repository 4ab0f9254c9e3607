# SPDX-License-Identifier: MIT OR Apache-2.0
"""How QEMU is called: machines of its device models and nothing else, as command lines.

    microvm   virtio-blk and a virtio console behind virtio-mmio (modern), COM1 to COM4
    q35       NVMe on PCI bus 0, COM1 to COM4

Both can have a TPM behind the TIS registers at 0xFED40000, served by somebody else over swtpm's control socket, and a
monitor (QMP).

The guest's memory is a memory file that somebody else made and shares; its first byte is guest-physical 0. The
firmware is three instructions (disable interrupts, halt, again), so no guest code runs but time does: with a machine
that is stopped the serial ports' timers would never fire. The accelerator is always TCG: a /dev/kvm may exist that
cannot run firmware, and distributions leave the qtest accelerator out; the qtest *server* is in all of them.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from svsm.formats.errors import BackendError

__all__ = [
    "COM_PORTS",
    "MEBIBYTE",
    "NVME_INTERRUPT",
    "PCI_WINDOW",
    "PROGRAM",
    "TPM_INTERRUPT",
    "TPM_WINDOW",
    "VIRTIO_BASE",
    "VIRTIO_INTERRUPT",
    "VIRTIO_SLOTS",
    "VIRTIO_SLOT_BYTES",
    "ConsoleOptions",
    "Descriptors",
    "DiskOptions",
    "MachineKind",
    "command_words",
    "find_qemu",
    "halting_firmware",
    "virtio_slot",
]

PROGRAM: Final = "qemu-system-x86_64"
MEBIBYTE: Final = 1 << 20
_FIRMWARE_BYTES: Final = 64 << 10
_RESET_VECTOR: Final = 0xFFF0
_HALT: Final = b"\xfa\xf4\xeb\xfc"  # cli; hlt; and hlt again

COM_PORTS: Final = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""I/O base and interrupt of COM1 to COM4."""
_NVME_SLOT: Final = 4
PCI_WINDOW: Final = (0xE000_0000, 16 * MEBIBYTE)
"""Address and size of a part of q35's hole for PCI devices where nothing is."""
NVME_INTERRUPT: Final = 20
"""I/O APIC input of INTA of device 4 on q35's bus 0, before firmware routes it elsewhere."""
TPM_WINDOW: Final = (0xFED4_0000, 0x5000)
"""Address and size of the TIS registers: one page for each of five localities."""
TPM_INTERRUPT: Final = 5
VIRTIO_BASE: Final = 0xFEB0_0000
VIRTIO_SLOT_BYTES: Final = 0x200
VIRTIO_SLOTS: Final = 8
VIRTIO_INTERRUPT: Final = 16
"""With one I/O APIC (``ioapic2=off``); devices fill the slots from the last one on."""


class MachineKind(enum.StrEnum):
    """Which of QEMU's machines."""

    MICROVM = "microvm"
    Q35 = "q35"


@dataclasses.dataclass(frozen=True, slots=True)
class DiskOptions:
    """The machine's disk: virtio-mmio on microvm, NVMe on q35.

    Attributes:
        path: A raw image; ``/dev/fdset/1`` for `Descriptors.disk`.
        native: Linux AIO and O_DIRECT instead of threads and the page cache.
        read_only: QEMU opens it so.
        packed: virtio only: offer packed rings.
        queues: virtio only.
        logical_block_bytes: 512 or 4096.
    """

    path: Path
    native: bool = False
    read_only: bool = False
    packed: bool = False
    queues: int = 1
    logical_block_bytes: int = 512


@dataclasses.dataclass(frozen=True, slots=True)
class ConsoleOptions:
    """A virtio console (microvm only): one of its ports is a socket.

    Attributes:
        packed: Offer packed rings.
        ports: How many ports there can be; above 1 with MULTIPORT.
        port: Which is connected; 0 is a console, the others are plain ports.
    """

    packed: bool = False
    ports: int = 1
    port: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Descriptors:
    """What QEMU inherits.

    Attributes:
        memory: The guest's memory.
        firmware: A file with `halting_firmware`.
        qtest: A connected socket.
        serial: The other ends of serial ports, connected sockets: 0 is COM1.
        disk: The image, when the disk has no path of its own.
        console: The other end of the virtio console's port, a connected socket.
        monitor: The other end of QEMU's monitor, a connected socket.
    """

    memory: int
    firmware: int
    qtest: int
    serial: Mapping[int, int] = dataclasses.field(default_factory=dict)
    disk: int | None = None
    console: int | None = None
    monitor: int | None = None

    def all(self) -> list[int]:
        """Every one of them."""
        maybe = (self.disk, self.console, self.monitor)
        optional = [descriptor for descriptor in maybe if descriptor is not None]
        return [self.memory, self.firmware, self.qtest, *self.serial.values(), *optional]


def find_qemu(program: Path | None = None) -> str:
    """Where QEMU is.

    Raises:
        BackendError: ``qemu-missing``.
    """
    found = shutil.which(PROGRAM) if program is None else str(program)
    if found is None:
        raise BackendError(
            f"QEMU is not installed: {PROGRAM} is not in PATH",
            code="qemu-missing",
            hint="Debian and Ubuntu: apt-get install qemu-system-x86",
        )
    return found


def halting_firmware() -> bytes:
    """What the processor runs."""
    firmware = bytearray(_FIRMWARE_BYTES)
    firmware[_RESET_VECTOR : _RESET_VECTOR + len(_HALT)] = _HALT
    return bytes(firmware)


def virtio_slot(index: int = 0) -> tuple[int, int]:
    """Address and interrupt of the registers of microvm's `index`-th virtio device."""
    number = VIRTIO_SLOTS - 1 - index
    return VIRTIO_BASE + number * VIRTIO_SLOT_BYTES, VIRTIO_INTERRUPT + number


def command_words(
    kind: MachineKind,
    descriptors: Descriptors,
    *,
    memory_bytes: int,
    disk: DiskOptions | None,
    console: ConsoleOptions | None = None,
    tpm: Path | None = None,
) -> list[str]:
    """The arguments, without the program.

    Args:
        kind: Which machine.
        descriptors: By number, as QEMU inherits them.
        memory_bytes: Of the guest; whole MiB, and all of them lie below 3 GiB.
        disk: Its disk, or none.
        console: Its virtio console, or none; `Descriptors.console` is its other end.
        tpm: The control socket of a TPM that speaks swtpm's protocol, or none.
    """
    machine = "microvm,ioapic2=off,isa-serial=off,rtc=off" if kind is MachineKind.MICROVM else "q35,hpet=off"
    memory = f"memory-backend-file,id=ram,size={memory_bytes},share=on,mem-path=/proc/self/fd/{descriptors.memory}"
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    words += ["-machine", f"{machine},pit=off,memory-backend=ram", "-m", str(memory_bytes // MEBIBYTE)]
    words += ["-object", memory, "-bios", f"/proc/self/fd/{descriptors.firmware}"]
    words += ["-chardev", f"socket,id=qtest,fd={descriptors.qtest}", "-qtest", "chardev:qtest"]
    words += ["-qtest-log", "/dev/null"]
    if descriptors.disk is not None:
        words += ["-add-fd", f"fd={descriptors.disk},set=1"]
    if kind is MachineKind.MICROVM:
        words += ["-global", "virtio-mmio.force-legacy=false"]
    words += _disk_words(kind, disk)
    if console is not None:
        words += _console_words(console, descriptors)
    if tpm is not None:
        words += _tpm_words(tpm)
    if descriptors.monitor is not None:
        words += ["-chardev", f"socket,id=monitor,fd={descriptors.monitor}", "-mon", "chardev=monitor,mode=control"]
    return words + _serial_words(descriptors.serial)


def _disk_words(kind: MachineKind, disk: DiskOptions | None) -> list[str]:
    if disk is None:
        return []
    node = {
        "driver": "raw",
        "node-name": "disk",
        "read-only": disk.read_only,
        "discard": "unmap",
        "file": {
            "driver": "file",
            "filename": str(disk.path),
            "aio": "native" if disk.native else "threads",
            "cache": {"direct": disk.native},
            "discard": "unmap",
        },
    }
    sizes = f"logical_block_size={disk.logical_block_bytes},physical_block_size={disk.logical_block_bytes}"
    words = ["-blockdev", json.dumps(node)]
    if kind is MachineKind.Q35:
        return [*words, "-device", f"nvme,drive=disk,serial=svsm,addr={_NVME_SLOT},{sizes}"]
    packed = "on" if disk.packed else "off"
    device = f"virtio-blk-device,drive=disk,iommu_platform=on,packed={packed},num-queues={disk.queues},{sizes}"
    return [*words, "-device", device]


def _console_words(console: ConsoleOptions, descriptors: Descriptors) -> list[str]:
    packed = "on" if console.packed else "off"
    bus = f"virtio-serial-device,iommu_platform=on,packed={packed},max_ports={console.ports}"
    kind = "virtserialport" if console.port else "virtconsole"
    return [
        *("-chardev", f"socket,id=key,fd={descriptors.console}"),
        *("-device", bus, "-device", f"{kind},chardev=key,nr={console.port},name=svsm.key"),
    ]


def _tpm_words(control: Path) -> list[str]:
    path = str(control).replace(",", ",,")  # a comma ends an option's value
    return [
        *("-chardev", f"socket,id=tpm-control,path={path}", "-tpmdev", "emulator,id=tpm,chardev=tpm-control"),
        *("-device", "tpm-tis,tpmdev=tpm"),
    ]


def _serial_words(serial: Mapping[int, int]) -> list[str]:
    words: list[str] = []
    for index, descriptor in serial.items():
        base, interrupt = COM_PORTS[index]
        words += ["-chardev", f"socket,id=com{index},fd={descriptor}"]
        words += ["-device", f"isa-serial,chardev=com{index},iobase={base:#x},irq={interrupt},index={index}"]
    return words
