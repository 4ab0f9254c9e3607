# SPDX-License-Identifier: MIT OR Apache-2.0
"""Channel over a 16550 serial port, driven register by register: 8 bits, no parity, one stop bit, FIFOs on.

Theory. The port is the host's: every register it answers with is hostile, and so is every byte. The driver polls, and
sleeps on the port's interrupt where the platform can tell of it, never longer than `poll_seconds`. Sending waits for
an empty FIFO (LSR.THRE) and then fills it; receiving takes 14 bytes at once where IIR says that so many are there
(a FIFO that is filling gets a moment), else one at a time after a look at LSR.DR. Each call ends at its deadline,
whatever the port does.

There is no end of stream on a serial line: `receive` never returns b"". Bytes that the port knows it has lost (an
overrun), a damaged byte or a break cannot be mended by anybody, because frames on this line have no way to find their
beginning again: the channel ends with ``channel-closed``. Bytes that vanish or come twice without a mark are for the
layers above: a frame's length, strict JSON, and in the end the signature over what was said.

`fileno` polls readable when an interrupt may have arrived; a caller that waits on it must also look from time to time.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable
from typing import Final, Protocol

from svsm.abi.errors import BackendError, ProtocolError, StateError
from svsm.formats.record import Buffer

__all__ = ["COM3", "UartChannel", "UartPorts"]

COM3: Final = (0x3E8, 4)
"""I/O base and interrupt of the port that the key comes over."""

_FIFO_BYTES: Final = 16
_TRIGGER_BYTES: Final = 14
_FILL_SECONDS: Final = 0.001
"""Longer than a port waits before it tells of a FIFO that does not fill: four characters, 350 µs."""
_FILL_LOOKS: Final = 2
"""The first interrupt may be an old one."""
_ALL_ONES: Final = 0xFF
_SCRATCH_VALUES: Final = b"\xa5\x5a"


class _Register(enum.IntEnum):
    """Offsets from the base (16550D data sheet, table II)."""

    DATA = 0
    INTERRUPT_ENABLE = 1
    INTERRUPT_IDENTITY = 2
    FIFO_CONTROL = 2
    LINE_CONTROL = 3
    MODEM_CONTROL = 4
    LINE_STATUS = 5
    SCRATCH = 7


_DLAB, _8N1 = 0x80, 0x03
_FIFO_ON_CLEAR_TRIGGER_14 = 0xC7
_FIFO_WORKS = 0xC0
_DTR_RTS_OUT2 = 0x0B
_RECEIVE_INTERRUPT = 0x01
_IDENTITY_MASK, _IDENTITY_NONE, _IDENTITY_TRIGGER, _IDENTITY_TIMEOUT = 0x0F, 0x01, 0x04, 0x0C
_DATA_READY, _OVERRUN, _PARITY, _FRAMING, _BREAK, _SEND_EMPTY = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_LOST: Final = ((_OVERRUN, "overrun"), (_BREAK, "break"), (_PARITY, "parity"), (_FRAMING, "framing"))


class UartPorts(Protocol):
    """Byte-wide I/O ports, and their interrupts."""

    def in8(self, port: int, count: int = 1) -> bytes:
        """Read a port so many times; hostile."""

    def out8(self, port: int, data: bytes) -> None:
        """Write each byte to a port."""

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """Until the line is up, at most so long; may be spurious."""

    def fileno(self) -> int:
        """Polls readable when an interrupt may have arrived."""


class UartChannel:
    """A `Channel` over one 16550.

    Args:
        ports: Of the machine.
        base: I/O base of the port.
        interrupt: Its line.
        clock: What deadlines are measured with.
        poll_seconds: Look again after so long, interrupt or not.

    Raises:
        ProtocolError: ``uart-missing`` where no such port answers.
    """

    def __init__(
        self,
        ports: UartPorts,
        *,
        base: int = COM3[0],
        interrupt: int = COM3[1],
        clock: Callable[[], float] = time.monotonic,
        poll_seconds: float = 0.01,
    ) -> None:
        self._ports = ports
        self._base = base
        self._interrupt = interrupt
        self._clock = clock
        self._poll_seconds = poll_seconds
        self._open = True
        for value in _SCRATCH_VALUES:
            self._write(_Register.SCRATCH, value)
            if self._read(_Register.SCRATCH) != value:
                raise ProtocolError("there is no serial port at this address", code="uart-missing", offset=base)
        self._write(_Register.INTERRUPT_ENABLE, 0)
        self._write(_Register.LINE_CONTROL, _DLAB | _8N1)
        self._write(_Register.DATA, 1)  # 115200 bits per second
        self._write(_Register.INTERRUPT_ENABLE, 0)
        self._write(_Register.LINE_CONTROL, _8N1)
        self._write(_Register.FIFO_CONTROL, _FIFO_ON_CLEAR_TRIGGER_14)
        self._write(_Register.MODEM_CONTROL, _DTR_RTS_OUT2)
        fifo = self._read(_Register.INTERRUPT_IDENTITY) & _FIFO_WORKS == _FIFO_WORKS
        self._burst_bytes = _FIFO_BYTES if fifo else 1
        self._read(_Register.LINE_STATUS)  # what was lost before this was opened is nobody's loss
        self._write(_Register.INTERRUPT_ENABLE, _RECEIVE_INTERRUPT)

    def _read(self, register: int) -> int:
        return self._reads(register, 1)[0]

    def _reads(self, register: int, count: int) -> bytes:
        data = self._ports.in8(self._base + register, count)
        if len(data) != count:
            raise ProtocolError("a serial port's register has an impossible value", code="uart-missing", got=len(data))
        return data

    def _write(self, register: int, value: int) -> None:
        self._ports.out8(self._base + register, bytes([value]))

    def _line_status(self) -> int:
        """LSR; reading it clears its error bits, so they are judged here, every time."""
        status = self._read(_Register.LINE_STATUS)
        if status == _ALL_ONES:
            raise BackendError("the serial port is gone", code="channel-closed")
        for bit, cause in _LOST:
            if status & bit:
                raise BackendError("the serial line lost something", code="channel-closed", cause=cause)
        return status

    def _check_open(self) -> None:
        if not self._open:
            raise BackendError("the channel was closed on this side", code="channel-closed")

    def _wait(self, deadline: float, *, receiving: bool) -> None:
        left = deadline - self._clock()
        if left <= 0:
            raise BackendError(
                "nothing moved on the serial line before the deadline",
                code="channel-timeout",
                hint="look whether the proxy runs and whether it reaches the broker",
            )
        # A full FIFO has no interrupt of its own here: a short wait for the receiver's serves as the pause.
        self._ports.wait_interrupt(self._interrupt, min(left, self._poll_seconds if receiving else 0.001))

    def send(self, data: Buffer, *, deadline: float) -> None:
        """Send all of `data`; see `Channel.send`."""
        self._check_open()
        rest = bytes(data)
        for at in range(0, len(rest), self._burst_bytes):
            while not self._line_status() & _SEND_EMPTY:
                self._wait(deadline, receiving=False)
            if self._clock() >= deadline:
                self._wait(deadline, receiving=False)
            self._ports.out8(self._base + _Register.DATA, rest[at : at + self._burst_bytes])

    def receive(self, max_bytes: int, *, deadline: float) -> bytes:
        """Whatever is there, at most `max_bytes`, at least one byte; see `Channel.receive`."""
        self._check_open()
        if max_bytes < 1:
            raise StateError("there is nothing to receive into", code="uart-size", got=max_bytes)
        while not (data := self._take(max_bytes, deadline)):
            self._wait(deadline, receiving=True)
        return data

    def _take(self, most: int, deadline: float) -> bytes:
        """What the FIFO holds; ends at `most` bytes and at the deadline, for a host that never runs dry."""
        taken = bytearray()
        while len(taken) < most and self._line_status() & _DATA_READY:
            taken += self._some(most - len(taken))
            if self._clock() >= deadline:
                break
        return bytes(taken)

    def _some(self, wanted: int) -> bytes:
        """A part of what a FIFO that is not empty holds: 14 bytes in one access where they are there, or one."""
        if self._burst_bytes == 1 or wanted < _TRIGGER_BYTES:
            return self._reads(_Register.DATA, 1)
        taken = b""
        identity = self._identity()
        if identity == _IDENTITY_TIMEOUT and wanted > _TRIGGER_BYTES:
            # The timeout comes before the trigger in IIR, also when the FIFO has filled since; a read ends it.
            taken = self._reads(_Register.DATA, 1)
            identity = self._identity()
        for _ in range(_FILL_LOOKS):
            if identity != _IDENTITY_NONE:
                break
            # Fewer than the trigger, and the last of them new: more are on their way, or the port's timeout is.
            self._ports.wait_interrupt(self._interrupt, _FILL_SECONDS)
            identity = self._identity()
        if identity == _IDENTITY_TRIGGER:
            return taken + self._reads(_Register.DATA, _TRIGGER_BYTES)
        return taken or self._reads(_Register.DATA, 1)

    def _identity(self) -> int:
        return self._read(_Register.INTERRUPT_IDENTITY) & _IDENTITY_MASK

    def fileno(self) -> int:
        """The platform's descriptor for interrupts."""
        return self._ports.fileno()

    def close(self) -> None:
        """Switch the port's interrupt off."""
        if self._open:
            self._open = False
            with contextlib.suppress(BackendError):  # a machine that is gone has nothing to switch off
                self._write(_Register.INTERRUPT_ENABLE, 0)
