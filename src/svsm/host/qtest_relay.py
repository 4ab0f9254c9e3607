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
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Final

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.host.qtest import QtestProtocol, in_command, out_command, read_command, write_command

__all__ = ["QtestRelay"]

_FAILED: Final = 1 << 32
_CHUNK_BYTES: Final = 64 << 10
_BATCH: Final = 16


@dataclasses.dataclass(slots=True)
class _Reads:
    """Commands whose answers belong together: a read with its exit, or writes, whose exit is answered already."""

    missing: int
    exit_: Message | None
    width_bytes: int = 0
    scratch: int | None = None
    """Where the values go; None: into RAX."""
    values: list[int] = dataclasses.field(default_factory=list)
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
        self._pending: collections.deque[_Reads] = collections.deque()
        self._send(["irq_intercept_in ioapic"], _Reads(1, None))

    def fileno(self) -> int:
        """Readable when QEMU has said something."""
        return self._connection.fileno()

    # ---- accesses ---------------------------------------------------------------------------------------------------

    def access(self, exit_: Message) -> Message | None:
        """Start an MMIO or IOIO exit; its answer, or None when that comes with `receive`."""
        started = self._port if exit_.arguments[0] == ghcb.ExitCode.IOIO else self._memory
        try:
            return started(exit_)
        except (SvsmError, OSError, OverflowError):  # no such access, no such memory, or QEMU is gone
            return exit_.answer(0, _FAILED)

    def _memory(self, exit_: Message) -> Message | None:
        code, address, width, _, _, scratch = exit_.arguments
        if width != ghcb.MMIO_WIDTH_BYTES or not _inside(self._windows, address, width):
            return exit_.answer(0, _FAILED)
        if code == ghcb.ExitCode.MMIO_READ:
            self._send([read_command(address, width)], _Reads(1, exit_, width, scratch))
            return None
        (value,) = self._stored(scratch, width, 1)
        self._send([write_command(address, width, value)], _Reads(1, None))
        return exit_.answer()

    def _port(self, exit_: Message) -> Message | None:
        _, word, count, rax, _, scratch = exit_.arguments
        access = ghcb.IoAccess.parse(word)
        port, width = access.port, access.width_bytes
        count = count if access.string else 1
        if not 0 < count <= ghcb.MAX_IO_COUNT or not _inside(self._ports, port, width):
            return exit_.answer(0, _FAILED)
        if access.reading:
            where = scratch if access.string else None
            self._send([in_command(port, width)] * count, _Reads(count, exit_, width, where))
            return None
        values = self._stored(scratch, width, count) if access.string else [rax & (1 << 8 * width) - 1]
        self._send([out_command(port, width, value) for value in values], _Reads(count, None))
        return exit_.answer()

    def _stored(self, scratch: int, width: int, count: int) -> list[int]:
        data = os.pread(self._shared_fd, width * count, scratch)
        return [int.from_bytes(data[at : at + width], "little") for at in range(0, width * count, width)]

    def _send(self, commands: Sequence[str], expected: _Reads) -> None:
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
            waiting = self._pending[0]
            try:
                value = self._protocol.take()
            except BackendError:
                waiting.refused, value = True, "0"
            if value is None:
                break
            if waiting.exit_ is not None:
                waiting.values.append(int(value, 16))
            waiting.missing -= 1
            if not waiting.missing:
                self._pending.popleft()
                wrote = wrote or waiting.exit_ is None
                answers += self._finished(waiting)
        return wrote

    def _finished(self, done: _Reads) -> list[Message]:
        if done.exit_ is None:
            return []
        mask = (1 << 8 * done.width_bytes) - 1
        if done.refused:
            return [done.exit_.answer(0, _FAILED)]
        if done.scratch is None:
            return [done.exit_.answer(0, 0, 0, done.values[0] & mask)]
        data = b"".join((value & mask).to_bytes(done.width_bytes, "little") for value in done.values)
        try:
            os.pwrite(self._shared_fd, data, done.scratch)
        except (OSError, OverflowError):
            return [done.exit_.answer(0, _FAILED)]
        return [done.exit_.answer()]

    def _end(self) -> list[Message]:
        self.close()
        failed = [done.exit_.answer(0, _FAILED) for done in self._pending if done.exit_ is not None]
        self._pending.clear()
        return failed

    def close(self) -> None:
        """Hang up. QEMU goes on until somebody ends it."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._connection.close()


def _inside(ranges: Sequence[range], start: int, length: int) -> bool:
    return any(start in place and start + length - 1 in place for place in ranges)


def _gone() -> BackendError:
    return BackendError("QEMU is gone", code="qemu-gone")
