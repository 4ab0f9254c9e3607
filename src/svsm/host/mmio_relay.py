# SPDX-License-Identifier: MIT OR Apache-2.0
"""Carries the kernel's register and port accesses to a device process, and its interrupts back.

    kernel ─ MMIO or IOIO exit ─▶ hypervisor ─ RegisterMessage ─▶ devices (`svsm.host.devices.virtio_process`)

A write is passed on and answered at once; a read is answered when the device has answered, a string of bytes when all
of them are there. Nothing here waits: a device that is busy with its disk stops nobody but who reads its registers. A
device that is gone, or that takes no more messages, is a failed exit.
"""

from __future__ import annotations

import socket
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.formats.virtio import MMIO_WINDOW_BYTES, RegisterMessage, RegisterOperation
from svsm.host.access import Access, done, failed

__all__ = ["MmioRelay"]

_SEQUENCE_MASK: Final = 0xFFFF_FFFF
_BATCH: Final = 64


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
        self._registers = range(gpa, gpa + windows * MMIO_WINDOW_BYTES)
        self._ports = ports
        self.closed = False
        self._device = device
        self._shared_fd = shared_fd
        self._sequence = 0
        self._reads: dict[int, Access] = {}

    def fileno(self) -> int:
        """Readable when the device has said something."""
        return self._device.fileno()

    def access(self, exit_: Message) -> Message | None:
        """Start an MMIO or IOIO exit; its answer, or None when that comes with `receive`."""
        if self.closed:
            return failed(exit_)
        try:
            access = Access.parse(exit_)
            places = self._ports if access.is_port else self._registers
            wide = access.is_port and access.width_bytes != 1
            return failed(exit_) if wide or not access.is_in(places) else self._start(access)
        except (SvsmError, OSError, OverflowError):  # no such access, no such memory, or the device is gone
            return failed(exit_)

    def _start(self, access: Access) -> Message | None:
        offset = access.place if access.is_port else access.place - self.gpa
        if access.reading:
            kind = RegisterOperation.READ_PORT if access.is_port else RegisterOperation.READ
            self._ask(kind, offset, access)
            return None
        kind = RegisterOperation.WRITE_PORT if access.is_port else RegisterOperation.WRITE
        for value in access.written(self._shared_fd):
            self._send(RegisterMessage(kind, 0, offset, value))
        return done(access.exit_)

    def _ask(self, operation: RegisterOperation, offset: int, access: Access) -> None:
        for _ in range(access.count):
            self._sequence = self._sequence + 1 & _SEQUENCE_MASK
            try:
                self._send(RegisterMessage(operation, self._sequence, offset, 0))
            except OSError:
                self._reads = {number: other for number, other in self._reads.items() if other is not access}
                raise
            self._reads[self._sequence] = access

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
                answer = self._reads.pop(message.sequence).take(message.value, self._shared_fd)
                answers += [] if answer is None else [answer]
        return answers, interrupted

    def close(self) -> None:
        """Hang up, which ends the device process."""
        self.closed = True
        self._device.close()

    def _unanswered(self) -> list[Message]:
        waiting = {id(access): access for access in self._reads.values()}
        self._reads.clear()
        return [failed(access.exit_) for access in waiting.values()]

    def _send(self, message: RegisterMessage) -> None:
        self._device.send(message.pack(), socket.MSG_NOSIGNAL)
