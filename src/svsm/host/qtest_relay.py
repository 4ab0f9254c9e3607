# SPDX-License-Identifier: MIT OR Apache-2.0
"""Carries the kernel's accesses to registers and I/O ports to QEMU's device models, and their interrupts back.

    kernel ─ MMIO or IOIO exit ─▶ hypervisor ─ qtest command ─▶ QEMU

As in `svsm.host.mmio_relay` nothing here waits. A write is sent and answered at once, QEMU's own answer to it is only
counted; a read is answered when QEMU has answered. QEMU answers in order, so order is kept. What lies outside the
windows and ports that the machine has is a failed exit, and never reaches QEMU.

Interrupt lines are levels, and what the kernel gets are notices without a level: one when a line goes up, and one more
for each write after which a line is still up, because then the device has something new to say and no other way to say
it (NVMe's pin stays up while its queue is not empty).

A QEMU that is gone, that talks nonsense, or that does not read what it is sent, is a device that is gone: every
access fails from then on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import socket
from collections.abc import Iterable, Sequence
from typing import Final

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.snp.hardware_messages import Message
from svsm.host.access import Access, done, failed
from svsm.host.qtest import QtestProtocol, in_command, out_command, read_command, write_command

__all__ = ["QtestRelay"]

_CHUNK_BYTES: Final = 64 << 10
_BATCH: Final = 16


@dataclasses.dataclass(slots=True)
class _Sent:
    """Commands whose answers belong together: a read's, or writes', whose exit is answered already."""

    missing: int
    read: Access | None = None
    refused: bool = False


class QtestRelay:
    """The accesses of one kernel to one QEMU.

    Args:
        connection: To its qtest socket; owned, made non-blocking.
        shared_fd: The shared memfd, where scratch values lie; stays the caller's.
        windows: Guest-physical ranges where registers are.
        ports: Ranges of I/O ports.
        lines: Inputs of the I/O APIC whose interrupts count.
    """

    def __init__(
        self,
        connection: socket.socket,
        shared_fd: int,
        *,
        windows: Sequence[range],
        ports: Sequence[range],
        lines: Iterable[int],
    ) -> None:
        connection.setblocking(False)
        self.closed = False
        self._connection = connection
        self._shared_fd = shared_fd
        self._windows = windows
        self._ports = ports
        self._lines = frozenset(lines)
        self._protocol = QtestProtocol()
        self._pending: collections.deque[_Sent] = collections.deque()
        self._send(["irq_intercept_in ioapic"], _Sent(1))

    def fileno(self) -> int:
        """Readable when QEMU has said something."""
        return self._connection.fileno()

    # ---- accesses ---------------------------------------------------------------------------------------------------

    def access(self, exit_: Message) -> Message | None:
        """Start an MMIO or IOIO exit; its answer, or None when that comes with `receive`."""
        try:
            access = Access.parse(exit_)
            places = self._ports if access.is_port else self._windows
            return self._start(access) if any(map(access.is_in, places)) else failed(exit_)
        except (SvsmError, OSError, OverflowError):  # no such access, no such memory, or QEMU is gone
            return failed(exit_)

    def _start(self, access: Access) -> Message | None:
        place, width = access.place, access.width_bytes
        if access.reading:
            command = in_command(place, width) if access.is_port else read_command(place, width)
            self._send([command] * access.count, _Sent(access.count, access))
            return None
        write = out_command if access.is_port else write_command
        values = access.written(self._shared_fd)
        self._send([write(place, width, value) for value in values], _Sent(access.count))
        return done(access.exit_)

    def _send(self, commands: Sequence[str], expected: _Sent) -> None:
        if self.closed:
            raise _gone()
        data = self._protocol.encode(commands)
        try:
            sent = self._connection.send(data, socket.MSG_NOSIGNAL)
        except OSError:
            sent = 0
        if sent != len(data):
            self.close()
            raise _gone()
        self._pending.append(expected)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def receive(self) -> tuple[list[Message], bool]:
        """Take in what QEMU has said: answers to exits, and whether a device has interrupted."""
        answers: list[Message] = []
        wrote = False
        for _ in range(_BATCH):
            try:
                data = self._connection.recv(_CHUNK_BYTES)
                if not data:
                    raise _gone()
                self._protocol.feed(data)
                wrote = self._answered(answers) or wrote
            except BlockingIOError:
                break
            except (OSError, SvsmError, ValueError):
                answers += self._end()
                break
        up = self._protocol.raised & self._lines
        self._protocol.raised.clear()
        still_up = wrote and any(self._protocol.levels.get(line) for line in self._lines)
        return answers, bool(up) or still_up

    def _answered(self, answers: list[Message]) -> bool:
        """Sort the answers that are there; whether one of them was for a write."""
        wrote = False
        while self._pending:
            sent = self._pending[0]
            try:
                value = self._protocol.take()
            except BackendError:
                sent.refused, value = True, "0"
            if value is None:
                break
            number = 0 if sent.read is None else int(value, 16)
            sent.missing -= 1
            if not sent.missing:
                self._pending.popleft()
            if sent.read is None:
                wrote = True
            elif (answer := sent.read.take(number, self._shared_fd)) is not None:
                answers.append(failed(sent.read.exit_) if sent.refused else answer)
        return wrote

    def _end(self) -> list[Message]:
        self.close()
        unanswered = [failed(sent.read.exit_) for sent in self._pending if sent.read is not None]
        self._pending.clear()
        return unanswered

    def close(self) -> None:
        """Hang up. QEMU goes on until somebody ends it."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._connection.close()


def _gone() -> BackendError:
    return BackendError("QEMU is gone", code="qemu-gone")
