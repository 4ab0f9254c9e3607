# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio socket device of our own (VIRTIO 1.2 §5.10): connections of the guest to ports of the host.

A REQUEST to a port asks `connect` for a `Peer`; without one the answer is RST. Each connection has a buffer for what
its peer has not taken yet, as large as the credit that the guest is told, so a guest that keeps to its credit loses
nothing, and one that doesn't gets RST. Connections from the host to the guest do not exist here.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Final

from svsm.formats.virtio import DeviceType
from svsm.formats.virtio_vsock import (
    HOST_CID,
    RECEIVE_QUEUE,
    TRANSMIT_QUEUE,
    TYPE_STREAM,
    VsockConfig,
    VsockFeature,
    VsockHeader,
    VsockOperation,
    VsockShutdown,
)
from svsm.host.devices.virtio_console import LINE_FEATURES
from svsm.host.devices.virtio_stream import Peer

__all__ = ["VsockBackend", "VsockOptions"]

_MASK: Final = 0xFFFF_FFFF
_MOST_CONNECTIONS: Final = 16
_MOST_ANSWERS: Final = 64
_BOTH: Final = int(VsockShutdown.RECEIVE | VsockShutdown.SEND)


@dataclasses.dataclass(frozen=True, slots=True)
class VsockOptions:
    """What the device offers.

    Attributes:
        common: Feature bits that do not belong to the device type.
        queue_size: Largest size of each queue.
        cid: Of the guest.
        buffer_bytes: Credit that each connection gives the guest.
    """

    common: int = LINE_FEATURES
    queue_size: int = 64
    cid: int = 3
    buffer_bytes: int = 64 << 10

    @property
    def features(self) -> int:
        """Feature bits: streams."""
        return self.common | int(VsockFeature.STREAM | VsockFeature.NO_IMPLIED_STREAM)

    @property
    def queues(self) -> int:
        """Receive, transmit, events."""
        return 3


class _Connection:
    """One connection, the host's side."""

    def __init__(self, peer: Peer, header: VsockHeader) -> None:
        self.peer = peer
        self.guest_port, self.host_port = header.source_port, header.destination_port
        self.unsent = bytearray()
        self.taken = self.told = self.sent = 0
        self.ended = self.update_due = False
        self.learn(header)

    def learn(self, header: VsockHeader) -> None:
        """What the guest says of its buffer."""
        self.guest_buffer, self.guest_taken = header.buffer_bytes, header.forwarded

    def flush(self) -> None:
        """Give the peer what it takes."""
        while self.unsent and (count := self.peer.write(bytes(self.unsent))):
            del self.unsent[:count]
            self.taken = (self.taken + count) & _MASK

    @property
    def window(self) -> int:
        """What the guest has room for."""
        return max(0, self.guest_buffer - ((self.sent - self.guest_taken) & _MASK))


class VsockBackend:
    """The device.

    Args:
        connect: Who listens at a port of the host; None for nobody.
        options: What is offered.
    """

    device_type = DeviceType.VSOCK

    def __init__(self, connect: Callable[[int], Peer | None], options: VsockOptions | None = None) -> None:
        self.options = options or VsockOptions()
        self.features = 0
        self._connect = connect
        self._connections: dict[tuple[int, int], _Connection] = {}
        self._answers: collections.deque[bytes] = collections.deque(maxlen=_MOST_ANSWERS)

    def reset(self) -> None:
        """Every connection ends."""
        for connection in self._connections.values():
            connection.peer.close()
        self._connections.clear()
        self._answers.clear()

    def configuration(self) -> bytes:
        """The configuration space."""
        return VsockConfig(guest_cid=self.options.cid).pack()

    @property
    def peers(self) -> list[Peer]:
        """Who is connected now."""
        return [connection.peer for connection in self._connections.values()]

    def fills(self, index: int) -> bool:
        """All but the transmit queue."""
        return index != TRANSMIT_QUEUE

    # ---- from the guest ---------------------------------------------------------------------------------------------

    def transmit(self, index: int, data: bytes) -> int:
        """One packet; what makes no sense is dropped."""
        del index
        if len(data) >= VsockHeader.SIZE:
            header = VsockHeader.parse(data[: VsockHeader.SIZE])
            payload = data[VsockHeader.SIZE :][: header.length]
            if header.source_cid == self.options.cid and header.destination_cid == HOST_CID:
                self._packet(header, payload)
        return len(data)

    def _packet(self, header: VsockHeader, payload: bytes) -> None:
        key = header.source_port, header.destination_port
        connection = self._connections.get(key)
        if header.type != TYPE_STREAM:
            self._answer(header, VsockOperation.RST)
        elif header.operation == VsockOperation.REQUEST:
            self._accept(header)
        elif connection is None:
            if header.operation != VsockOperation.RST:
                self._answer(header, VsockOperation.RST)
        elif header.operation == VsockOperation.RST:
            self._drop(key)
        else:
            connection.learn(header)
            self._act(connection, header, payload)

    def _accept(self, header: VsockHeader) -> None:
        key = header.source_port, header.destination_port
        peer = None
        if key not in self._connections and len(self._connections) < _MOST_CONNECTIONS:
            peer = self._connect(header.destination_port)
        if peer is None:
            self._answer(header, VsockOperation.RST)
            return
        self._connections[key] = _Connection(peer, header)
        self._answer(header, VsockOperation.RESPONSE)

    def _act(self, connection: _Connection, header: VsockHeader, payload: bytes) -> None:
        operation = header.operation
        if operation == VsockOperation.RW:
            if len(connection.unsent) + len(payload) > self.options.buffer_bytes:
                self._answer(header, VsockOperation.RST)
                self._drop((header.source_port, header.destination_port))
                return
            connection.unsent += payload
            connection.flush()
        elif operation == VsockOperation.CREDIT_REQUEST:
            connection.update_due = True
        elif operation == VsockOperation.SHUTDOWN and header.flags & _BOTH == _BOTH:
            connection.flush()
            self._answer(header, VsockOperation.RST)
            self._drop((header.source_port, header.destination_port))

    def _drop(self, key: tuple[int, int]) -> None:
        self._connections.pop(key).peer.close()

    # ---- to the guest -----------------------------------------------------------------------------------------------

    def receive(self, index: int, room: int) -> bytes | None:
        """The next packet: answers first, then credit, then data of each connection in turn."""
        if index != RECEIVE_QUEUE or room < VsockHeader.SIZE:
            return None
        if self._answers:
            return self._answers.popleft()
        for connection in list(self._connections.values()):
            packet = self._from(connection, room - VsockHeader.SIZE)
            if packet is not None:
                return packet
        return None

    def _from(self, connection: _Connection, room: int) -> bytes | None:
        connection.flush()
        if connection.update_due or 2 * ((connection.taken - connection.told) & _MASK) >= self.options.buffer_bytes:
            return self._to(connection, VsockOperation.CREDIT_UPDATE)
        most = min(room, connection.window)
        if connection.ended or not most:
            return None
        data = connection.peer.read(most)
        if data is None:
            return None
        if not data:
            connection.ended = True
            return self._to(connection, VsockOperation.SHUTDOWN, flags=_BOTH)
        connection.sent = (connection.sent + len(data)) & _MASK
        return self._to(connection, VsockOperation.RW, payload=data)

    def _to(self, connection: _Connection, operation: VsockOperation, *, payload: bytes = b"", flags: int = 0) -> bytes:
        connection.told, connection.update_due = connection.taken, False
        header = VsockHeader(
            source_cid=HOST_CID,
            destination_cid=self.options.cid,
            source_port=connection.host_port,
            destination_port=connection.guest_port,
            length=len(payload),
            type=TYPE_STREAM,
            operation=operation,
            flags=flags,
            buffer_bytes=self.options.buffer_bytes,
            forwarded=connection.taken,
        )
        return header.pack() + payload

    def _answer(self, header: VsockHeader, operation: VsockOperation) -> None:
        self._answers.append(
            header.replace(
                source_cid=HOST_CID,
                destination_cid=self.options.cid,
                source_port=header.destination_port,
                destination_port=header.source_port,
                length=0,
                operation=operation,
                flags=0,
                buffer_bytes=self.options.buffer_bytes if operation == VsockOperation.RESPONSE else 0,
                forwarded=0,
            ).pack()
        )
