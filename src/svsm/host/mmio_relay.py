# SPDX-License-Identifier: MIT OR Apache-2.0
"""Carries the kernel's register accesses to a device process, and the device's interrupts back.

    kernel ─ MMIO exit ─▶ hypervisor ─ RegisterMessage ─▶ device (`svsm.host.devices.virtio_process`)

A write is passed on and answered at once; a read is answered when the device has answered. Nothing here waits: a device
that is busy with its disk stops nobody but who reads its registers. A device that is gone, or that takes no more
messages, is a failed exit.
"""

from __future__ import annotations

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


class MmioRelay:
    """One register window.

    Args:
        device: SOCK_SEQPACKET to the device process; owned, made non-blocking.
        shared_fd: The shared memfd, where scratch words lie; stays the caller's.
        gpa: Where the window is.
    """

    def __init__(self, device: socket.socket, shared_fd: int, *, gpa: int = ghcb.VIRTIO_MMIO_GPA) -> None:
        device.setblocking(False)
        self.gpa = gpa
        self.closed = False
        self._device = device
        self._shared_fd = shared_fd
        self._sequence = 0
        self._reads: dict[int, tuple[Message, int]] = {}

    def fileno(self) -> int:
        """Readable when the device has said something."""
        return self._device.fileno()

    def access(self, exit_: Message) -> Message | None:
        """Start an MMIO exit; its answer, or None when that comes with `receive`."""
        code, address, length, _, _, scratch = exit_.arguments
        offset = address - self.gpa
        known = code in (ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE)  # no I/O ports here
        if not known or self.closed or length != ghcb.MMIO_WIDTH_BYTES or not 0 <= offset <= MMIO_WINDOW_BYTES - length:
            return exit_.answer(0, _FAILED)
        if code == ghcb.ExitCode.MMIO_READ:
            self._sequence = self._sequence + 1 & _SEQUENCE_MASK
            if not self._send(RegisterMessage(RegisterOperation.READ, self._sequence, offset, 0)):
                return exit_.answer(0, _FAILED)
            self._reads[self._sequence] = (exit_, scratch)
            return None
        try:
            value = int.from_bytes(os.pread(self._shared_fd, length, scratch), "little")
        except (OSError, OverflowError):
            return exit_.answer(0, _FAILED)
        sent = self._send(RegisterMessage(RegisterOperation.WRITE, 0, offset, value))
        return exit_.answer(0, 0 if sent else _FAILED)

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
                answers += [exit_.answer(0, _FAILED) for exit_, _ in self._reads.values()]
                self._reads.clear()
                break
            try:
                message = RegisterMessage.parse(raw)
            except SvsmError:
                continue
            if message.operation == RegisterOperation.INTERRUPT:
                interrupted = True
            elif message.sequence in self._reads:
                answers.append(self._answer(*self._reads.pop(message.sequence), message.value))
        return answers, interrupted

    def close(self) -> None:
        """Hang up, which ends the device process."""
        self.closed = True
        self._device.close()

    def _answer(self, exit_: Message, scratch: int, value: int) -> Message:
        try:
            os.pwrite(self._shared_fd, value.to_bytes(ghcb.MMIO_WIDTH_BYTES, "little"), scratch)
        except (OSError, OverflowError):
            return exit_.answer(0, _FAILED)
        return exit_.answer()

    def _send(self, message: RegisterMessage) -> bool:
        try:
            self._device.send(message.pack(), socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True
