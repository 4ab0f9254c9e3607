# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a console's control messages and a host's packets mean (VIRTIO 1.2 §5.3.6.2, §5.10.6), without the drivers' own.

Both are told everything that reaches the driver, in order, and keep the code of the first thing that cannot be.
"""

from __future__ import annotations

import struct
from typing import Final

from svsm.formats.virtio_vsock import HOST_CID, VsockHeader, VsockOperation

__all__ = ["ConsoleRules", "VsockRules"]

_CONTROL = struct.Struct("<IHH")
_ADD, _REMOVE, _OPEN = 1, 2, 6
_MOST_MESSAGES: Final = 4096
_MASK: Final = 0xFFFF_FFFF
_RECEIVE, _SEND = 1, 2
_OPERATIONS: Final = range(1, 8)


class ConsoleRules:
    """A console's control queue, as far as one port is concerned.

    Args:
        port: It.

    Attributes:
        code: Of the first thing that cannot be, or that ends the channel; "" so far.
        added: The device has said that there is such a port.
        ended: The far end has closed its port.
    """

    def __init__(self, port: int) -> None:
        self.code = ""
        self.ended = False
        self._port = port
        self._messages = 0
        self.added = self._opened = False

    @property
    def deaf(self) -> bool:
        """Nobody takes what is sent."""
        return self.ended

    def hear(self, message: bytes) -> None:
        """One message."""
        if self.code:
            return
        self._messages += 1
        if self._messages > _MOST_MESSAGES or len(message) < _CONTROL.size:
            self.code = "console-control"
            return
        port, event, value = _CONTROL.unpack_from(message)
        if port != self._port:
            return
        if (event == _ADD) is self.added:  # twice, or not yet
            self.code = "console-control"
        elif event == _ADD:
            self.added = True
        elif event == _REMOVE:
            self.code = "channel-closed"
        elif event == _OPEN:
            self.ended |= self._opened and not value
            self._opened |= bool(value)


class VsockRules:
    """One connection that the guest asked for.

    Args:
        cid: The guest's.
        port: The guest's.
        peer_port: The host's.
        buffer_bytes: What the guest has room for.

    Attributes:
        code: As in `ConsoleRules`.
        state: "requested", "connected" or "reset".
        shutdown: What the host will not do any more: 1 receive, 2 send.
        received: Payload, all of it.
        sent: Payload bytes that the guest has sent.
        told: What the guest has said last that it has taken.
        asked: The host wants to know how much room there is.
        reset_due: It has said goodbye in both directions, and gets RST.
        limit: What the guest may have sent, by the most generous packet; `window` by the last.
    """

    def __init__(self, *, cid: int, port: int, peer_port: int, buffer_bytes: int) -> None:
        self.code = ""
        self.state = "requested"
        self.shutdown = 0
        self.received = bytearray()
        self.asked = self.reset_due = False
        self.sent = self.told = self.limit = 0
        self._cid, self._port, self._peer_port = cid, port, peer_port
        self._buffer_bytes = buffer_bytes
        self._peer_taken = self._peer_buffer = 0

    @property
    def window(self) -> int:
        """What may be sent now."""
        return max(0, self._peer_taken + self._peer_buffer - self.sent)

    @property
    def ended(self) -> bool:
        """The host has said that it will not send any more."""
        return bool(self.shutdown & _SEND)

    @property
    def deaf(self) -> bool:
        """Nobody takes what is sent."""
        return self.state == "reset" or bool(self.shutdown & _RECEIVE)

    def hear(self, packet: bytes) -> bool:
        """One packet of the host; returns whether it must be answered with RST, being about nothing here."""
        if self.code:
            return False
        if len(packet) < VsockHeader.SIZE:
            self.code = "vsock-packet"
            return False
        header, length = VsockHeader.parse(packet[: VsockHeader.SIZE]), len(packet) - VsockHeader.SIZE
        if header.length != length:
            self.code = "vsock-packet"
        elif (header.source_cid, header.destination_cid) != (HOST_CID, self._cid):
            return False
        elif (header.source_port, header.destination_port, header.type) != (self._peer_port, self._port, 1):
            return header.operation != VsockOperation.RST
        elif header.operation == VsockOperation.RST:
            self.code = "channel-closed" if self.state == "requested" else ""
            self.state = "reset"
        elif self.state != "reset" and header.operation in _OPERATIONS:
            self.code = self._cannot_be(header, length)
            if not self.code:
                self._believe(header, packet[VsockHeader.SIZE :])
        return False

    def _cannot_be(self, header: VsockHeader, length: int) -> str:
        operation, data = header.operation, header.operation == VsockOperation.RW
        answer = operation == VsockOperation.RESPONSE
        if (length and not data) or operation == VsockOperation.REQUEST or answer is not (self.state == "requested"):
            return "vsock-packet"
        if (header.forwarded - self._peer_taken) & _MASK > self.sent - self._peer_taken:
            return "vsock-credit"
        if data and self.shutdown & _SEND:
            return "vsock-packet"
        if data and len(self.received) - self.told + length > self._buffer_bytes:
            return "vsock-credit"
        return ""

    def _believe(self, header: VsockHeader, payload: bytes) -> None:
        self._peer_taken += (header.forwarded - self._peer_taken) & _MASK
        self._peer_buffer = header.buffer_bytes
        self.limit = max(self.limit, self._peer_taken + self._peer_buffer)
        self.received += payload
        if header.operation == VsockOperation.RESPONSE:
            self.state = "connected"
        elif header.operation == VsockOperation.SHUTDOWN:
            self.shutdown |= header.flags & (_RECEIVE | _SEND)
            self.reset_due = self.shutdown == _RECEIVE | _SEND
        elif header.operation == VsockOperation.CREDIT_REQUEST:
            self.asked = True
