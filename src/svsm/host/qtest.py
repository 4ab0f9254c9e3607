# SPDX-License-Identifier: MIT OR Apache-2.0
"""QEMU's qtest protocol: every access to the machine that a processor could make, over a socket.

Theory. One command is one line; QEMU answers each with one line, in order: ``OK``, ``OK value``, ``FAIL`` or ``ERR``
and a reason. Lines about intercepted interrupts (``IRQ raise N``) come at any time between answers. `QtestProtocol`
is sans-IO: it says what to send and sorts what arrives. `QtestClient` owns the socket and the deadlines.

Writes can be *posted*: sent without waiting for the answer, which is looked at when the next waiting call comes by. The
order of accesses is the order of calls either way. One waiting access costs a round trip, and the processor that QEMU
runs on is woken for it; posting and batching are what makes drivers usable over this.

A client that missed a deadline or met a line that it cannot read is at an unknown place of the conversation: it is
dead from then on.
"""

from __future__ import annotations

import base64
import binascii
import collections
import select
import socket
import time
from collections.abc import Sequence

from svsm.formats.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.record import Buffer

__all__ = ["QtestClient", "QtestProtocol", "in_command", "out_command", "read_command", "write_command"]

_LONGEST_LINE = 8 << 20
_CHUNK_BYTES = 256 << 10
_MOST_POSTED = 64
_READS = {1: "readb", 2: "readw", 4: "readl", 8: "readq"}
_WRITES = {1: "writeb", 2: "writew", 4: "writel", 8: "writeq"}
_INS = {1: "inb", 2: "inw", 4: "inl"}
_OUTS = {1: "outb", 2: "outw", 4: "outl"}
_MEMORY_BYTES = 1 << 20
"""Of one memory command."""


def read_command(address: int, width_bytes: int) -> str:
    """Read guest memory or device registers: 1, 2, 4 or 8 bytes.

    Raises:
        StateError: ``qemu-width``, as the three others.
    """
    return f"{_verb(_READS, width_bytes)} {address:#x}"


def write_command(address: int, width_bytes: int, value: int) -> str:
    """Write guest memory or device registers."""
    return f"{_verb(_WRITES, width_bytes)} {address:#x} {value:#x}"


def in_command(port: int, width_bytes: int) -> str:
    """Read an I/O port: 1, 2 or 4 bytes."""
    return f"{_verb(_INS, width_bytes)} {port:#x}"


def out_command(port: int, width_bytes: int, value: int) -> str:
    """Write an I/O port."""
    return f"{_verb(_OUTS, width_bytes)} {port:#x} {value:#x}"


class QtestProtocol:
    """The conversation, without a socket.

    Attributes:
        raised: Interrupt lines that went up since they were last taken.
        levels: Line by line, whether it is up.
        owed: Answers that have not arrived.
    """

    def __init__(self) -> None:
        self.raised: set[int] = set()
        self.levels: dict[int, bool] = {}
        self.owed = 0
        self._buffer = bytearray()
        self._answers: collections.deque[str] = collections.deque()

    def encode(self, commands: Sequence[str]) -> bytes:
        """What to send for these commands."""
        self.owed += len(commands)
        return "".join(f"{command}\n" for command in commands).encode("ascii")

    def feed(self, data: bytes) -> None:
        """Take what arrived.

        Raises:
            ProtocolError: ``qemu-qtest-protocol``.
        """
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) > _LONGEST_LINE:
            raise _nonsense("an endless line")
        self._buffer = rest
        for line in lines:
            self._line(line.decode("latin-1").rstrip("\r"))

    def _line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in ("OK", "FAIL", "ERR"):
            if not self.owed:
                raise _nonsense("an answer to nothing")
            self.owed -= 1
            self._answers.append(line)
            return
        direction, _, number = rest.partition(" ")
        if word != "IRQ" or direction not in ("raise", "lower") or not number.isdecimal() or len(number) > 4:
            raise _nonsense(line[:80])
        self.levels[int(number)] = direction == "raise"
        if direction == "raise":
            self.raised.add(int(number))

    def take(self) -> str | None:
        """The value of the oldest answer ("" where it has none), or None while there is no answer.

        Raises:
            BackendError: ``qemu-refused`` for FAIL and ERR.
        """
        if not self._answers:
            return None
        word, _, value = self._answers.popleft().partition(" ")
        if word != "OK":
            raise BackendError("QEMU refuses a qtest command", code="qemu-refused", got=value[:200])
        return value


def _nonsense(got: str) -> ProtocolError:
    return ProtocolError("QEMU's qtest socket says something that is not qtest", code="qemu-qtest-protocol", got=got)


class QtestClient:
    """A machine's qtest socket.

    Args:
        connection: Owned.
        timeout_seconds: For each call.

    Every method may raise `BackendError` (``qemu-gone``, ``qemu-timeout``, ``qemu-refused``) or `ProtocolError`
    (``qemu-qtest-protocol``).
    """

    def __init__(self, connection: socket.socket, *, timeout_seconds: float = 10.0) -> None:
        self._socket = connection
        self._socket.settimeout(timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._protocol = QtestProtocol()
        self._posted = 0
        self._dead: SvsmError | None = None
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)

    def fileno(self) -> int:
        """Readable when an interrupt (or an answer to something posted) has arrived."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; QEMU goes on."""
        self._dead = self._dead or BackendError("the qtest socket is closed", code="qemu-gone")
        self._socket.close()

    # ---- the conversation -------------------------------------------------------------------------------------------

    def _send(self, commands: Sequence[str]) -> None:
        if self._dead is not None:
            raise self._dead
        try:
            self._socket.sendall(self._protocol.encode(commands))
        except OSError as error:
            raise self._end(_gone(error)) from None

    def _end(self, error: SvsmError) -> SvsmError:
        self._dead = error
        return error

    def _receive(self, deadline: float) -> bool:
        """Feed what is there, waiting for it until `deadline`; False when nothing came."""
        left = deadline - time.monotonic()
        if not self._poller.poll(max(0.0, left * 1000)):
            return False
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except OSError as error:
            raise self._end(_gone(error)) from None
        if not data:
            raise self._end(_gone(None))
        try:
            self._protocol.feed(data)
        except ProtocolError as error:
            raise self._end(error) from None
        return True

    def _answer(self, deadline: float) -> str:
        while (value := self._protocol.take()) is None:
            if not self._receive(deadline):
                raise self._end(BackendError("QEMU does not answer in time", code="qemu-timeout"))
        return value

    def _settle(self, deadline: float) -> None:
        """See to the answers of what was posted."""
        while self._posted:
            self._posted -= 1
            self._answer(deadline)

    def call(self, commands: Sequence[str]) -> list[str]:
        """Send commands at once, and wait for the value of each."""
        deadline = time.monotonic() + self._timeout_seconds
        self._send(commands)
        self._settle(deadline)
        return [self._answer(deadline) for _ in commands]

    def post(self, commands: Sequence[str]) -> None:
        """Send commands that answer without a value, and do not wait."""
        self._send(commands)
        self._posted += len(commands)
        if self._posted > _MOST_POSTED:
            self._settle(time.monotonic() + self._timeout_seconds)

    # ---- accesses ---------------------------------------------------------------------------------------------------

    def _numbers(self, commands: Sequence[str]) -> list[int]:
        try:
            return [int(value, 16) for value in self.call(commands)]
        except ValueError:
            raise self._end(_nonsense("a value that is no number")) from None

    def read(self, address: int, width_bytes: int) -> int:
        """Guest memory or device registers: 1, 2, 4 or 8 bytes."""
        return self.read_many(address, width_bytes, 1)[0]

    def read_many(self, address: int, width_bytes: int, count: int) -> list[int]:
        """The same place so many times, in one round trip: a device's FIFO."""
        return self._numbers([read_command(address, width_bytes)] * count)

    def write(self, address: int, width_bytes: int, value: int) -> None:
        """As `read`; posted."""
        self.post([write_command(address, width_bytes, value)])

    def port_in(self, port: int, width_bytes: int, count: int = 1) -> list[int]:
        """Read a port so many times."""
        return self._numbers([in_command(port, width_bytes)] * count)

    def port_out(self, port: int, width_bytes: int, values: Sequence[int]) -> None:
        """Write a port once for each value; posted."""
        self.post([out_command(port, width_bytes, value) for value in values])

    def memory_read(self, address: int, length: int) -> bytes:
        """Bytes of guest memory."""
        parts = []
        for at in range(0, length, _MEMORY_BYTES):
            step = min(_MEMORY_BYTES, length - at)
            text = self.call([f"b64read {address + at:#x} {step:#x}"])[0]
            try:
                part = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise self._end(_nonsense("memory that is not base64")) from None
            if len(part) != step:
                raise self._end(_nonsense("memory of another length"))
            parts.append(part)
        return b"".join(parts)

    def memory_write(self, address: int, data: Buffer) -> None:
        """Bytes into guest memory."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), _MEMORY_BYTES):
            part = view[at : at + _MEMORY_BYTES]
            self.call([f"b64write {address + at:#x} {len(part):#x} {base64.b64encode(part).decode('ascii')}"])

    def clock_step(self, nanoseconds: int) -> int:
        """Move the virtual clock; returns where it is. Refused by a machine whose accelerator is not qtest."""
        return self._decimal(f"clock_step {nanoseconds}")

    def _decimal(self, command: str) -> int:
        value = self.call([command])[0]
        if not value.isdecimal():
            raise self._end(_nonsense("a time that is no number"))
        return int(value)

    # ---- interrupts -------------------------------------------------------------------------------------------------

    def intercept(self, path: str) -> None:
        """From now on, interrupts into this device (a QOM path) arrive here instead."""
        self.call([f"irq_intercept_in {path}"])

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """Whether `line` is up, or was since it was last asked for; waits for it at most so long.

        A line that is up counts even if it was up before: interrupts of these devices are levels, and one that has
        something new to say while its line is up has no other way to say it.
        """
        deadline = time.monotonic() + seconds
        protocol = self._protocol
        while True:
            if protocol.levels.get(line) or line in protocol.raised:
                protocol.raised.discard(line)
                return True
            if self._dead is not None:
                raise self._dead
            if not self._receive(deadline):
                return False


def _verb(verbs: dict[int, str], width_bytes: int) -> str:
    if width_bytes not in verbs:
        raise StateError("there is no access of this width", code="qemu-width", got=width_bytes)
    return verbs[width_bytes]


def _gone(error: OSError | None) -> BackendError:
    hint = "QEMU has ended; its own messages say why"
    return BackendError("QEMU is gone", code="qemu-gone", hint=hint, errno=error.errno if error else None)
