# SPDX-License-Identifier: MIT OR Apache-2.0
"""One stream connection of a virtio socket device (VIRTIO 1.2 §5.10), without I/O: packets in, packets out.

    requested ──RESPONSE──▶ connected ──RST──▶ reset
        └───────RST───────────────────────────▶

Theory. This side asked for one connection, from its own port to one port of the host, so every packet is about that
connection or about nothing. What is about nothing (another address, port or type) changes nothing here; where the
specification wants an answer it is RST. What is about the connection and cannot be (a second RESPONSE, payload where
none belongs, data after its sender said that none would follow) ends it. Operations that do not exist are ignored, as
Linux does: a real back-end (rust-vmm's vhost-device-vsock) sends operation 0 when it has nothing to say.

Credit. Both counters are modulo 2^32 and compared by distance. The host may send what `buffer_bytes` says that this
side holds, and not a byte more; this side sends what the host's buf_alloc and fwd_cnt leave free. A fwd_cnt that goes
back, or says that more was taken than was sent, is a lie and ends the connection; a small buf_alloc only costs time.
"""

from __future__ import annotations

import enum
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError
from svsm.formats.virtio_vsock import HOST_CID, TYPE_STREAM, VsockHeader, VsockOperation, VsockShutdown

__all__ = ["VsockConnection", "VsockState"]

_MASK: Final = 0xFFFF_FFFF


class VsockState(enum.Enum):
    """How far the connection is."""

    REQUESTED = "requested"
    CONNECTED = "connected"
    RESET = "reset"


class VsockConnection:
    """This side's view of it.

    Args:
        cid: Of this guest.
        port: Of this side.
        peer_port: Of the host.
        buffer_bytes: What the host may send before somebody reads.

    Attributes:
        state: How far it is.
        peer_shutdown: What the host has said that it will not do any more.
        strays: Packets that were about nothing here.
    """

    def __init__(self, *, cid: int, port: int, peer_port: int, buffer_bytes: int) -> None:
        self.state = VsockState.REQUESTED
        self.peer_shutdown = VsockShutdown(0)
        self.strays = 0
        self._cid = cid
        self._port = port
        self._peer_port = peer_port
        self._buffer_bytes = buffer_bytes
        self._received = bytearray()
        self._taken = 0  # payload bytes that were read from `_received`, modulo 2^32
        self._told = 0  # `_taken` as the host knows it
        self._sent = 0  # payload bytes, modulo 2^32
        self._peer_taken = 0
        self._peer_buffer = 0
        self._update_due = False
        self._reset_due = False

    # ---- what this side sends ---------------------------------------------------------------------------------------

    def _header(self, operation: VsockOperation, *, length: int = 0, flags: int = 0) -> VsockHeader:
        self._told = self._taken
        self._update_due = False
        return VsockHeader(
            source_cid=self._cid,
            destination_cid=HOST_CID,
            source_port=self._port,
            destination_port=self._peer_port,
            length=length,
            type=TYPE_STREAM,
            operation=operation,
            flags=flags,
            buffer_bytes=self._buffer_bytes,
            forwarded=self._taken,
        )

    def request(self) -> VsockHeader:
        """The packet that asks for the connection."""
        return self._header(VsockOperation.REQUEST)

    @property
    def window(self) -> int:
        """Bytes that may be sent now."""
        in_flight = (self._sent - self._peer_taken) & _MASK
        return max(0, self._peer_buffer - in_flight)

    def data(self, length: int) -> VsockHeader:
        """The header of `length` bytes of payload, which fit the `window`."""
        header = self._header(VsockOperation.RW, length=length)
        self._sent = (self._sent + length) & _MASK
        return header

    def ask_credit(self) -> VsockHeader:
        """The packet that asks how much may be sent."""
        return self._header(VsockOperation.CREDIT_REQUEST)

    def shutdown(self) -> VsockHeader:
        """The packet that says that this side neither sends nor reads any more."""
        return self._header(VsockOperation.SHUTDOWN, flags=VsockShutdown.RECEIVE | VsockShutdown.SEND)

    def owed(self) -> VsockHeader | None:
        """A packet that the host is owed (an end, or fresh credit), once."""
        if self._reset_due:
            self._reset_due = False
            return self._header(VsockOperation.RST)
        if self._update_due and self.state is VsockState.CONNECTED:
            return self._header(VsockOperation.CREDIT_UPDATE)
        return None

    # ---- what was received ------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Bytes to read."""
        return len(self._received)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come than what is `available`."""
        return self.state is VsockState.RESET or bool(self.peer_shutdown & VsockShutdown.SEND)

    def read(self, most: int) -> bytes:
        """At most `most` bytes of what has arrived; the host gets credit for them again, in large pieces."""
        data = bytes(self._received[:most])
        del self._received[: len(data)]
        self._taken = (self._taken + len(data)) & _MASK
        if 2 * ((self._taken - self._told) & _MASK) >= self._buffer_bytes:
            self._update_due = True
        return data

    # ---- packets ----------------------------------------------------------------------------------------------------

    def take(self, packet: bytes) -> VsockHeader | None:
        """Judge a packet and act on it.

        Args:
            packet: A private copy of what the device wrote.

        Returns:
            RST for a packet that is about no connection of ours, where one is owed.

        Raises:
            ProtocolError: ``vsock-packet``, ``vsock-credit``: the host cannot mean this.
            BackendError: ``channel-closed`` when the host refuses the connection.
        """
        if len(packet) < VsockHeader.SIZE:
            raise _bad("a packet is shorter than its header", got=len(packet))
        header = VsockHeader.parse(packet[: VsockHeader.SIZE])
        payload = packet[VsockHeader.SIZE :]
        if header.length != len(payload):
            raise _bad("a packet's length is not what was written", expected=header.length, got=len(payload))
        if header.source_cid != HOST_CID or header.destination_cid != self._cid:
            self.strays += 1  # nobody else can reach this device, and an answer could only go astray
            return None
        ours = header.source_port == self._peer_port and header.destination_port == self._port
        if not ours or header.type != TYPE_STREAM:
            self.strays += 1
            return None if header.operation == VsockOperation.RST else self._stray_reset(header)
        self._act(header, payload)
        return None

    def _stray_reset(self, header: VsockHeader) -> VsockHeader:
        return header.replace(
            source_cid=self._cid,
            destination_cid=HOST_CID,
            source_port=header.destination_port,
            destination_port=header.source_port,
            length=0,
            operation=VsockOperation.RST,
            flags=0,
            buffer_bytes=0,
            forwarded=0,
        )

    def _act(self, header: VsockHeader, payload: bytes) -> None:
        operation = header.operation
        if operation == VsockOperation.RST:
            if self.state is VsockState.REQUESTED:
                self.state = VsockState.RESET
                raise BackendError(
                    "the host refuses the connection",
                    code="channel-closed",
                    hint="is there a proxy at this port of the host?",
                )
            self.state = VsockState.RESET
            return
        if self.state is VsockState.RESET or operation not in _MEANINGFUL:
            self.strays += 1
            return
        if payload and operation != VsockOperation.RW:
            raise _bad("payload where none belongs", got=len(payload))
        asked = self.state is VsockState.REQUESTED
        if operation == VsockOperation.REQUEST or (operation == VsockOperation.RESPONSE) is not asked:
            raise _bad("a packet at the wrong time", got=operation)
        self._credit(header)
        if operation == VsockOperation.RESPONSE:
            self.state = VsockState.CONNECTED
        elif operation == VsockOperation.RW:
            self._data(payload)
        elif operation == VsockOperation.CREDIT_REQUEST:
            self._update_due = True
        elif operation == VsockOperation.SHUTDOWN:
            self.peer_shutdown |= VsockShutdown(header.flags & (VsockShutdown.RECEIVE | VsockShutdown.SEND))
            self._reset_due = self.peer_shutdown == VsockShutdown.RECEIVE | VsockShutdown.SEND

    def _credit(self, header: VsockHeader) -> None:
        advance = (header.forwarded - self._peer_taken) & _MASK
        if advance > (self._sent - self._peer_taken) & _MASK:
            raise ProtocolError(
                "the host has taken what was never sent",
                code="vsock-credit",
                hint="the device or its host is broken or hostile",
                expected=self._sent,
                got=header.forwarded,
            )
        self._peer_taken = header.forwarded
        self._peer_buffer = header.buffer_bytes

    def _data(self, payload: bytes) -> None:
        if self.peer_shutdown & VsockShutdown.SEND:
            raise _bad("data after the end of the data", got=len(payload))
        # The host counts what it was told was taken; what it was not told yet is not its to use.
        promised = (self._taken - self._told) & _MASK
        if len(self._received) + promised + len(payload) > self._buffer_bytes:
            raise ProtocolError(
                "the host sends more than there is room for",
                code="vsock-credit",
                hint="the device or its host is broken or hostile",
                expected=self._buffer_bytes,
                got=len(self._received) + len(payload),
            )
        self._received += payload


_MEANINGFUL: Final = frozenset(
    {
        VsockOperation.REQUEST,
        VsockOperation.RESPONSE,
        VsockOperation.SHUTDOWN,
        VsockOperation.RW,
        VsockOperation.CREDIT_UPDATE,
        VsockOperation.CREDIT_REQUEST,
    }
)


def _bad(what: str, **details: int) -> ProtocolError:
    return ProtocolError(
        f"the host's socket device is wrong: {what}",
        code="vsock-packet",
        hint="the device or its host is broken or hostile",
        **details,
    )
