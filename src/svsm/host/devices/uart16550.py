# SPDX-License-Identifier: MIT OR Apache-2.0
"""A 16550 serial port of our own: eight byte-wide registers in front of a `Peer`.

What the peer sends waits in its socket until the receive FIFO has room, so an honest port never overruns; what the
peer does not take stays in the transmit FIFO, and the line status says that it is not empty. Bytes move when the
driver looks at a status register, or `service` is called. The divisor means nothing: this line has no speed.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable
from typing import Final

from svsm.host.devices.virtio_stream import Peer

__all__ = ["UartModel"]

_FIFO_BYTES: Final = 16
_TRIGGERS: Final = (1, 4, 8, 14)


class _Register(enum.IntEnum):
    """Offsets (16550D data sheet, table II)."""

    DATA = 0
    INTERRUPT_ENABLE = 1
    INTERRUPT_IDENTITY = 2
    LINE_CONTROL = 3
    MODEM_CONTROL = 4
    LINE_STATUS = 5
    MODEM_STATUS = 6
    SCRATCH = 7


_DLAB: Final = 0x80
_FIFO_ON, _CLEAR_RECEIVE, _CLEAR_TRANSMIT = 0x01, 0x02, 0x04
_IDENTITY_NONE, _IDENTITY_SEND, _IDENTITY_DATA, _IDENTITY_TIMEOUT, _FIFO_WORKS = 0x01, 0x02, 0x04, 0x0C, 0xC0
_WANT_DATA, _WANT_SEND = 0x01, 0x02
_DATA_READY, _SEND_EMPTY, _ALL_EMPTY = 0x01, 0x20, 0x40
_PRESENT: Final = 0xB0  # carrier, data set ready, clear to send


class UartModel:
    """The port.

    Args:
        peer: Who is at the far end.
        interrupt: Raises the interrupt line; called when there is a reason for it and was none.
    """

    def __init__(self, peer: Peer, *, interrupt: Callable[[], None] = lambda: None) -> None:
        self._peer = peer
        self._interrupt = interrupt
        self._received: collections.deque[int] = collections.deque()
        self._unsent = bytearray()
        self._kept = dict.fromkeys((1, 3, 4, 7), 0)
        self._divisor = [1, 0]
        self._fifo = False
        self._trigger = 1
        self._gone = False
        self._line = False

    def service(self) -> None:
        """Move what can be moved, and raise the line where the driver asked for it."""
        if self._unsent:
            del self._unsent[: self._peer.write(bytes(self._unsent))]
        room = (_FIFO_BYTES if self._fifo else 1) - len(self._received)
        if room > 0 and not self._gone:
            data = self._peer.read(room)
            if data == b"":
                self._gone = True  # a serial line has no way to say so
            self._received.extend(data or b"")
        line = self._reason() != _IDENTITY_NONE
        if line and not self._line:
            self._interrupt()
        self._line = line

    def _reason(self) -> int:
        enabled = self._kept[_Register.INTERRUPT_ENABLE]
        if enabled & _WANT_DATA and self._received:
            return _IDENTITY_DATA if len(self._received) >= self._trigger else _IDENTITY_TIMEOUT
        return _IDENTITY_SEND if enabled & _WANT_SEND and not self._unsent else _IDENTITY_NONE

    def read(self, register: int) -> int:
        """A byte of the port; 0xff where there is none."""
        if register in (_Register.INTERRUPT_IDENTITY, _Register.LINE_STATUS):
            self.service()
        latch = bool(self._kept[_Register.LINE_CONTROL] & _DLAB)
        if latch and register in (0, 1):
            return self._divisor[register]
        if register == _Register.DATA:
            return self._received.popleft() if self._received else 0
        if register == _Register.INTERRUPT_IDENTITY:
            return self._reason() | (_FIFO_WORKS if self._fifo else 0)
        if register == _Register.LINE_STATUS:
            return (_DATA_READY if self._received else 0) | (0 if self._unsent else _SEND_EMPTY | _ALL_EMPTY)
        if register == _Register.MODEM_STATUS:
            return _PRESENT
        return self._kept.get(register, 0xFF)

    def write(self, register: int, value: int) -> None:
        """Store a byte; a full transmit FIFO drops it, as the hardware does."""
        latch = bool(self._kept[_Register.LINE_CONTROL] & _DLAB)
        if latch and register in (0, 1):
            self._divisor[register] = value
        elif register == _Register.DATA:
            if len(self._unsent) < (_FIFO_BYTES if self._fifo else 1):
                self._unsent.append(value)
        elif register == _Register.INTERRUPT_IDENTITY:
            self._control_fifo(value)
        elif register in self._kept:
            self._kept[register] = value

    def _control_fifo(self, value: int) -> None:
        fifo = bool(value & _FIFO_ON)
        if value & _CLEAR_RECEIVE or fifo != self._fifo:
            self._received.clear()
        if value & _CLEAR_TRANSMIT or fifo != self._fifo:
            self._unsent.clear()
        self._fifo = fifo
        self._trigger = _TRIGGERS[value >> 6] if fifo else 1
