# SPDX-License-Identifier: MIT OR Apache-2.0
"""Carries the kernel's register and port accesses to a device process, and its interrupts back.

    kernel ─ MMIO or IOIO exit ─▶ hypervisor ─ RegisterMessage ─▶ devices (`svsm.host.devices.virtio_process`)

A write is passed on and answered at once; a read is answered when the device has answered, a string of bytes when all
of them are there. Nothing here waits: a device that is busy with its disk stops nobody but who reads its registers. A
device that is gone, or that takes no more messages, is a failed exit.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.formats.virtio import MMIO_WINDOW_BYTES, RegisterMessage, RegisterOperation

__all__ = ["MmioRelay"]

_FAILED: Final = 1 << 32
_SEQUENCE_MASK: Final = 0xFFFF_FFFF
_BATCH: Final = 64


@dataclasses.dataclass(slots=True)
class _Read:
    """An exit that waits for the device."""

    exit_: Message
    missing: int
    """Answers."""
    width_bytes: int
    scratch: int | None
    """Where the values go; None: into RAX."""
    data: bytes = b""


class MmioRelay:
    """Neighbouring register windows, and I/O ports, of one device process.

    Args:
        device: SOCK_SEQPACKET to the device process; owned, made non-blocking.
        shared_fd: The shared memfd, where scratch words lie; stays the caller's.
        gpa: Where the first window is.
        windows: How many.
        ports: Which are the device's; byte-wide.
    """

    def __init__(
        self,
        device: socket.socket,
        shared_fd: int,
        *,
        gpa: int = ghcb.VIRTIO_MMIO_GPA,
        windows: int = 1,
        ports: range = range(0),
    ) -> None:
        device.setblocking(False)
        self.gpa = gpa
        self._bytes = windows * MMIO_WINDOW_BYTES
        self._ports = ports
        self.closed = False
        self._device = device
        self._shared_fd = shared_fd
        self._sequence = 0
        self._reads: dict[int, _Read] = {}

    def fileno(self) -> int:
        """Readable when the device has said something."""
        return self._device.fileno()

    def access(self, exit_: Message) -> Message | None:
        """Start an MMIO or IOIO exit; its answer, or None when that comes with `receive`."""
        if self.closed:
            return exit_.answer(0, _FAILED)
        started = self._port if exit_.arguments[0] == ghcb.ExitCode.IOIO else self._memory
        try:
            return started(exit_)
        except (SvsmError, OSError, OverflowError):  # no such access, no such memory, or the device is gone
            return exit_.answer(0, _FAILED)

    def _memory(self, exit_: Message) -> Message | None:
        code, address, length, _, _, scratch = exit_.arguments
        offset = address - self.gpa
        if length != ghcb.MMIO_WIDTH_BYTES or not 0 <= offset <= self._bytes - length:
            return exit_.answer(0, _FAILED)
        if code == ghcb.ExitCode.MMIO_READ:
            self._ask(RegisterOperation.READ, offset, _Read(exit_, 1, length, scratch))
            return None
        value = int.from_bytes(os.pread(self._shared_fd, length, scratch), "little")
        self._send(RegisterMessage(RegisterOperation.WRITE, 0, offset, value))
        return exit_.answer(0, 0)

    def _port(self, exit_: Message) -> Message | None:
        _, word, count, rax, _, scratch = exit_.arguments
        access = ghcb.IoAccess.parse(word)
        count = count if access.string else 1
        if access.port not in self._ports or access.width_bytes != 1 or not 0 < count <= ghcb.MAX_IO_COUNT:
            return exit_.answer(0, _FAILED)
        if access.reading:
            where = scratch if access.string else None
            self._ask(RegisterOperation.READ_PORT, access.port, _Read(exit_, count, 1, where))
            return None
        values = os.pread(self._shared_fd, count, scratch) if access.string else bytes([rax & 0xFF])
        for value in values:
            self._send(RegisterMessage(RegisterOperation.WRITE_PORT, 0, access.port, value))
        return exit_.answer(0, 0)

    def _ask(self, operation: RegisterOperation, offset: int, read: _Read) -> None:
        for _ in range(read.missing):
            self._sequence = self._sequence + 1 & _SEQUENCE_MASK
            try:
                self._send(RegisterMessage(operation, self._sequence, offset, 0))
            except OSError:
                self._reads = {number: other for number, other in self._reads.items() if other is not read}
                raise
            self._reads[self._sequence] = read

    def receive(self) -> tuple[list[Message], bool]:
        """Take in what the device has said: answers to exits, and whether it has interrupted."""
        answers: list[Message] = []
        interrupted = False
        for _ in range(_BATCH):
            try:
                raw = self._device.recv(RegisterMessage.SIZE + 1)
            except BlockingIOError:
                break
            except OSError:
                raw = b""
            if not raw:
                self.close()
                answers += self._unanswered()
                break
            try:
                message = RegisterMessage.parse(raw)
            except SvsmError:
                continue
            if message.operation == RegisterOperation.INTERRUPT:
                interrupted = True
            elif message.sequence in self._reads:
                answers += self._answer(self._reads.pop(message.sequence), message.value)
        return answers, interrupted

    def close(self) -> None:
        """Hang up, which ends the device process."""
        self.closed = True
        self._device.close()

    def _unanswered(self) -> list[Message]:
        waiting = {id(read): read for read in self._reads.values()}
        self._reads.clear()
        return [read.exit_.answer(0, _FAILED) for read in waiting.values()]

    def _answer(self, read: _Read, value: int) -> list[Message]:
        """The exit's answer, once it has all its values; the device answers in order."""
        read.data += (value & (1 << 8 * read.width_bytes) - 1).to_bytes(read.width_bytes, "little")
        read.missing -= 1
        if read.missing:
            return []
        if read.scratch is None:
            return [read.exit_.answer(0, 0, 0, int.from_bytes(read.data, "little"))]
        try:
            os.pwrite(self._shared_fd, read.data, read.scratch)
        except (OSError, OverflowError):
            return [read.exit_.answer(0, _FAILED)]
        return [read.exit_.answer()]

    def _send(self, message: RegisterMessage) -> None:
        self._device.send(message.pack(), socket.MSG_NOSIGNAL)
