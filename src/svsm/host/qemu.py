# SPDX-License-Identifier: MIT OR Apache-2.0
"""QEMU as a box of real device models: started with a processor that halts at once, driven over qtest.

Theory. The guest's memory is a memory file that QEMU and this process both map, so that a driver here and a device
there share it as a guest and a device would; its first byte is guest-physical 0. The firmware is three instructions
(disable interrupts, halt, again), so no guest code runs but time does: with a machine that is stopped the serial
ports' timers would never fire. The accelerator is always TCG: a /dev/kvm may exist that cannot run firmware, and
distributions leave the qtest accelerator out; the qtest *server* is in all of them.

Two machines: *microvm* (virtio-mmio) and *q35* (PCI: NVMe), each with up to four 16550s, whose other ends are sockets
here. Interrupts into the I/O APIC are intercepted, which makes waiting for one possible.

QEMU does not end when its qtest socket closes, so it is ended by its process id, in `close`; where util-linux's
setpriv is installed, also by the kernel when the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import mmap
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Final

from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.host.qtest import QtestClient

__all__ = [
    "COM_PORTS",
    "PCI_WINDOW",
    "DiskOptions",
    "Machine",
    "MachineKind",
    "MachineOptions",
    "MemoryWindow",
    "PortWindow",
]

_PROGRAM: Final = "qemu-system-x86_64"
_FIRMWARE_BYTES: Final = 64 << 10
_RESET_VECTOR: Final = 0xFFF0
_HALT: Final = b"\xfa\xf4\xeb\xfc"  # cli; hlt; and hlt again
_STOP_SECONDS: Final = 5.0
_MIB: Final = 1 << 20
COM_PORTS: Final = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""I/O base and interrupt of COM1 to COM4."""
NVME_SLOT: Final = 4
PCI_WINDOW: Final = (0xE000_0000, 16 * _MIB)
"""Address and size of a part of q35's hole for PCI devices where nothing is."""
NVME_INTERRUPT: Final = 20
"""I/O APIC input of INTA of device 4 on q35's bus 0, before firmware routes it elsewhere."""


class MachineKind(enum.StrEnum):
    """Which of QEMU's machines."""

    MICROVM = "microvm"
    Q35 = "q35"


@dataclasses.dataclass(frozen=True, slots=True)
class DiskOptions:
    """The machine's disk: virtio-mmio on microvm, NVMe on q35.

    Attributes:
        path: A raw image.
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
class MachineOptions:
    """A machine.

    Attributes:
        kind: Which.
        memory_bytes: Of the guest; a multiple of 1 MiB.
        disk: Its disk, or none.
        serial_ports: COM1 to COMn.
        timeout_seconds: For each qtest call.
        program: QEMU; by default found in PATH.
    """

    kind: MachineKind
    memory_bytes: int = 64 * _MIB
    disk: DiskOptions | None = None
    serial_ports: int = 0
    timeout_seconds: float = 10.0
    program: Path | None = None


class Machine:
    """A running QEMU.

    Args:
        options: What to start.

    Raises:
        BackendError: ``qemu-missing``, ``qemu-start``, ``qemu-gone``, ``qemu-timeout``.
        StateError: ``qemu-options``.

    Attributes:
        qtest: Its qtest socket.
        memory: All of the guest's memory, from guest-physical 0 on; this process's mapping of it.
        serial: The sockets at the other end of COM1 to COMn; owned by this until `take_serial`.
        pid: The process.
    """

    def __init__(self, options: MachineOptions) -> None:
        if options.memory_bytes <= 0 or options.memory_bytes % _MIB or not 0 <= options.serial_ports <= len(COM_PORTS):
            raise StateError("a machine has whole MiB of memory and up to four serial ports", code="qemu-options")
        self.options = options
        self.serial: list[socket.socket] = []
        self._stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        stack, options = self._stack, self.options
        program = options.program or shutil.which(_PROGRAM)
        if program is None:
            raise BackendError("QEMU is not installed", code="qemu-missing", hint="install qemu-system-x86")
        memory_fd = self._memory_file("guest-memory", options.memory_bytes)
        firmware = bytearray(_FIRMWARE_BYTES)
        firmware[_RESET_VECTOR : _RESET_VECTOR + len(_HALT)] = _HALT
        firmware_fd = self._memory_file("firmware", len(firmware))
        os.pwrite(firmware_fd, firmware, 0)
        self.memory = memoryview(mmap.mmap(memory_fd, options.memory_bytes))
        with contextlib.ExitStack() as theirs:
            ours, qtest = socket.socketpair()
            theirs.enter_context(qtest)
            self.qtest = QtestClient(ours, timeout_seconds=options.timeout_seconds)
            stack.callback(self.qtest.close)
            ports = []
            for _ in range(options.serial_ports):
                near, far = socket.socketpair()
                self.serial.append(near)
                stack.callback(near.close)
                ports.append(theirs.enter_context(far))
            command = [str(program), *_arguments(options, memory_fd, firmware_fd, qtest.fileno())]
            command += _serial_arguments([port.fileno() for port in ports])
            setpriv = shutil.which("setpriv")
            if setpriv is not None:
                command = [setpriv, "--pdeathsig", "KILL", *command]
            self._messages = self._memory_file("messages", 0)
            descriptors = [memory_fd, firmware_fd, qtest.fileno(), *(port.fileno() for port in ports)]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._messages,
                    pass_fds=descriptors,
                )
            except OSError as error:
                raise BackendError("QEMU cannot be started", code="qemu-start", errno=error.errno) from None
            stack.callback(self._stop)
        self.pid = self._process.pid
        try:
            # The first answer also says that the sockets of the serial ports are in place.
            self.qtest.intercept("ioapic")
        except SvsmError as error:
            raise BackendError(
                "QEMU did not start", code="qemu-start", hint=self.messages() or None, violation=error.code
            ) from error

    def _memory_file(self, name: str, size_bytes: int) -> int:
        descriptor = os.memfd_create(f"svsm-qemu-{name}", os.MFD_CLOEXEC)
        self._stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, size_bytes)
        return descriptor

    def messages(self) -> str:
        """The end of what QEMU printed."""
        size = os.fstat(self._messages).st_size
        return os.pread(self._messages, 2000, max(0, size - 2000)).decode("utf-8", "replace").strip()

    def _stop(self) -> None:
        process = self._process
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End QEMU and let go of everything. The memory stays mapped for as long as somebody holds a view of it."""
        self._stack.close()

    # ---- windows ----------------------------------------------------------------------------------------------------

    def take_serial(self, index: int) -> socket.socket:
        """The other end of a serial port, for the caller to own."""
        taken = self.serial[index].dup()
        self.serial[index].close()
        return taken

    def ports(self) -> PortWindow:
        """The machine's I/O ports."""
        return PortWindow(self.qtest)

    def virtio_registers(self, slot: int = 0) -> MemoryWindow:
        """The registers of one of microvm's virtio-mmio slots; the disk is in slot 0."""
        number = VIRTIO_SLOTS - 1 - slot
        return MemoryWindow(
            self.qtest, VIRTIO_BASE + number * VIRTIO_SLOT_BYTES, VIRTIO_SLOT_BYTES, VIRTIO_INTERRUPT + number
        )

    def nvme_registers(self, address: int, size_bytes: int) -> MemoryWindow:
        """The NVMe controller's registers, where its BAR was put."""
        return MemoryWindow(self.qtest, address, size_bytes, NVME_INTERRUPT)


VIRTIO_BASE: Final = 0xFEB0_0000
VIRTIO_SLOT_BYTES: Final = 0x200
VIRTIO_SLOTS: Final = 8
VIRTIO_INTERRUPT: Final = 16
"""With one I/O APIC (``ioapic2=off``); devices fill the slots from the last one on."""


def _arguments(options: MachineOptions, memory_fd: int, firmware_fd: int, qtest_fd: int) -> list[str]:
    size = options.memory_bytes
    machine = "microvm,ioapic2=off,isa-serial=off,rtc=off" if options.kind is MachineKind.MICROVM else "q35,hpet=off"
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    words += ["-machine", f"{machine},pit=off,memory-backend=ram", "-m", str(size // _MIB)]
    words += ["-object", f"memory-backend-file,id=ram,size={size},share=on,mem-path=/proc/self/fd/{memory_fd}"]
    words += ["-bios", f"/proc/self/fd/{firmware_fd}"]
    words += ["-chardev", f"socket,id=qtest,fd={qtest_fd}", "-qtest", "chardev:qtest", "-qtest-log", "/dev/null"]
    return words + _disk_arguments(options)


def _disk_arguments(options: MachineOptions) -> list[str]:
    disk = options.disk
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
    if options.kind is MachineKind.Q35:
        return [*words, "-device", f"nvme,drive=disk,serial=svsm,addr={NVME_SLOT},{sizes}"]
    packed = "on" if disk.packed else "off"
    device = f"virtio-blk-device,drive=disk,iommu_platform=on,packed={packed},num-queues={disk.queues},{sizes}"
    return [*words, "-global", "virtio-mmio.force-legacy=false", "-device", device]


def _serial_arguments(descriptors: list[int]) -> list[str]:
    words: list[str] = []
    for index, descriptor in enumerate(descriptors):
        base, interrupt = COM_PORTS[index]
        words += ["-chardev", f"socket,id=com{index},fd={descriptor}"]
        words += ["-device", f"isa-serial,chardev=com{index},iobase={base:#x},irq={interrupt},index={index}"]
    return words


class MemoryWindow:
    """A device's registers in memory, as drivers want them: 32 bits at a time. Writes are posted.

    Attributes:
        size_bytes: Of the window.
        accesses: How many there were.
    """

    def __init__(self, qtest: QtestClient, address: int, size_bytes: int, interrupt: int) -> None:
        self._qtest = qtest
        self._address = address
        self._interrupt = interrupt
        self.size_bytes = size_bytes
        self.accesses = 0

    def _check(self, offset: int) -> None:
        if offset % 4 or not 0 <= offset <= self.size_bytes - 4:
            raise StateError("there is no such register", code="qemu-width", got=offset)
        self.accesses += 1

    def read32(self, offset: int) -> int:
        """One register; a round trip."""
        self._check(offset)
        return self._qtest.read(self._address + offset, 4)

    def write32(self, offset: int, value: int) -> None:
        """One register; on its way when this returns."""
        self._check(offset)
        self._qtest.write(self._address + offset, 4, value)

    def wait_interrupt(self, seconds: float) -> bool:
        """Whether the device's line went up since this was last asked, waiting at most so long."""
        return self._qtest.wait_interrupt(self._interrupt, seconds)

    def close(self) -> None:
        """Nothing: the machine is somebody else's."""


class PortWindow:
    """The machine's I/O ports. Writes are posted."""

    def __init__(self, qtest: QtestClient) -> None:
        self._qtest = qtest

    def in8(self, port: int, count: int = 1) -> bytes:
        """Read a byte so many times."""
        return bytes(value & 0xFF for value in self._qtest.port_in(port, 1, count))

    def out8(self, port: int, data: bytes) -> None:
        """Write each byte."""
        self._qtest.port_out(port, 1, data)

    def in32(self, port: int) -> int:
        """Read."""
        return self._qtest.port_in(port, 4)[0]

    def out32(self, port: int, value: int) -> None:
        """Write."""
        self._qtest.port_out(port, 4, [value])

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """Whether an interrupt line went up since this was last asked, waiting at most so long."""
        return self._qtest.wait_interrupt(line, seconds)

    def fileno(self) -> int:
        """Readable when an interrupt has arrived (or something else has)."""
        return self._qtest.fileno()
