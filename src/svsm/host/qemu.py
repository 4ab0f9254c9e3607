# SPDX-License-Identifier: MIT OR Apache-2.0
"""QEMU as a box of real device models: started with a processor that halts at once, driven over qtest.

Theory. The guest's memory is a memory file that QEMU and this process both map, so that a driver here and a device
there share it as a guest and a device would. Which machines there are, and why they run as they do, is in
`svsm.host.qemu_command`; the other ends of the serial ports are sockets here. Interrupts into the I/O APIC are
intercepted, which makes waiting for one possible.

QEMU does not end when its qtest socket closes, so it is ended by its process id, in `close`; where util-linux's
setpriv is installed, also by the kernel when the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Final

from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.host.qemu_command import (
    COM_PORTS,
    MEBIBYTE,
    NVME_INTERRUPT,
    PCI_WINDOW,
    TPM_INTERRUPT,
    TPM_WINDOW,
    VIRTIO_SLOT_BYTES,
    ConsoleOptions,
    Descriptors,
    DiskOptions,
    MachineKind,
    command_words,
    find_qemu,
    halting_firmware,
    virtio_slot,
)
from svsm.host.qtest import QtestClient, write_command

__all__ = [
    "COM_PORTS",
    "PCI_WINDOW",
    "TPM_INTERRUPT",
    "ByteWindow",
    "ConsoleOptions",
    "DiskOptions",
    "Machine",
    "MachineKind",
    "MachineOptions",
    "MemoryWindow",
    "PortWindow",
]

_STOP_SECONDS: Final = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class MachineOptions:
    """A machine.

    Attributes:
        kind: Which.
        memory_bytes: Of the guest; a multiple of 1 MiB.
        disk: Its disk, or none.
        serial_ports: COM1 to COMn.
        console: A virtio console, or none; microvm only.
        tpm: The control socket of a TPM that speaks swtpm's protocol, or none.
        monitor: Whether there is a QMP socket.
        timeout_seconds: For each qtest call.
        program: QEMU; by default found in PATH.
    """

    kind: MachineKind
    memory_bytes: int = 64 * MEBIBYTE
    disk: DiskOptions | None = None
    serial_ports: int = 0
    console: ConsoleOptions | None = None
    tpm: Path | None = None
    monitor: bool = False
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
        console: The socket at the other end of the virtio console's port, where there is one; owned by this.
        monitor: QMP, where it was asked for; nothing was said on it yet; owned by this.
        pid: The process.
    """

    def __init__(self, options: MachineOptions) -> None:
        if (
            options.memory_bytes <= 0
            or options.memory_bytes % MEBIBYTE
            or not 0 <= options.serial_ports <= len(COM_PORTS)
        ):
            raise StateError("a machine has whole MiB of memory and up to four serial ports", code="qemu-options")
        self.options = options
        self.serial: list[socket.socket] = []
        self.console: socket.socket | None = None
        self.monitor: socket.socket | None = None
        self._stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        stack, options = self._stack, self.options
        program = find_qemu(options.program)
        memory_fd = self._memory_file("guest-memory", options.memory_bytes)
        firmware = halting_firmware()
        firmware_fd = self._memory_file("firmware", len(firmware))
        os.pwrite(firmware_fd, firmware, 0)
        self.memory = memoryview(mmap.mmap(memory_fd, options.memory_bytes))
        with contextlib.ExitStack() as theirs:
            ours, qtest = socket.socketpair()
            theirs.enter_context(qtest)
            self.qtest = QtestClient(ours, timeout_seconds=options.timeout_seconds)
            stack.callback(self.qtest.close)
            ports: dict[int, int] = {}
            for index in range(options.serial_ports):
                near, ports[index] = self._pair(theirs)
                self.serial.append(near)
            console = monitor = None
            if options.console is not None:
                self.console, console = self._pair(theirs)
            if options.monitor:
                self.monitor, monitor = self._pair(theirs)
            descriptors = Descriptors(memory_fd, firmware_fd, qtest.fileno(), ports, console=console, monitor=monitor)
            words = command_words(
                options.kind,
                descriptors,
                memory_bytes=options.memory_bytes,
                disk=options.disk,
                console=options.console,
                tpm=options.tpm,
            )
            command = [program, *words]
            setpriv = shutil.which("setpriv")
            if setpriv is not None:
                command = [setpriv, "--pdeathsig", "KILL", *command]
            self._messages = self._memory_file("messages", 0)
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._messages,
                    pass_fds=descriptors.all(),
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

    def _pair(self, theirs: contextlib.ExitStack) -> tuple[socket.socket, int]:
        """A socket of ours, and the descriptor of its other end, which is closed with `theirs`."""
        near, far = socket.socketpair()
        self._stack.callback(near.close)
        return near, theirs.enter_context(far).fileno()

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
        """The registers of one of microvm's virtio-mmio slots: the disk, if there is one, then the console."""
        address, interrupt = virtio_slot(slot)
        return MemoryWindow(self.qtest, address, VIRTIO_SLOT_BYTES, interrupt)

    def nvme_registers(self, address: int, size_bytes: int) -> MemoryWindow:
        """The NVMe controller's registers, where its BAR was put."""
        return MemoryWindow(self.qtest, address, size_bytes, NVME_INTERRUPT)

    def tpm_registers(self) -> ByteWindow:
        """The TPM's registers, of all localities."""
        return ByteWindow(self.qtest, *TPM_WINDOW)


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


class ByteWindow:
    """A device's registers in memory, of any width; a byte at one address can be read or written many times."""

    def __init__(self, qtest: QtestClient, address: int, size_bytes: int) -> None:
        self._qtest = qtest
        self._address = address
        self._size_bytes = size_bytes

    def _at(self, offset: int, width_bytes: int) -> int:
        if not 0 <= offset <= self._size_bytes - width_bytes:
            raise StateError("there is no such register", code="qemu-width", got=offset)
        return self._address + offset

    def read(self, offset: int, width_bytes: int) -> int:
        """1, 2, 4 or 8 bytes; a round trip."""
        return self._qtest.read(self._at(offset, width_bytes), width_bytes)

    def write(self, offset: int, width_bytes: int, value: int) -> None:
        """As `read`; posted."""
        self._qtest.write(self._at(offset, width_bytes), width_bytes, value)

    def read_bytes(self, offset: int, count: int) -> bytes:
        """The byte at `offset`, so many times."""
        return bytes(self._qtest.read_many(self._at(offset, 1), 1, count))

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Each byte, to the same offset; posted."""
        address = self._at(offset, 1)
        self._qtest.post([write_command(address, 1, value) for value in data])


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
