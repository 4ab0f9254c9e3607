# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio device that carries bytes: some of its queues it fills, the others it empties.

`MmioStream` moves buffers between the rings and a `StreamBackend` (a console, a socket device), which knows nothing
of rings. Behind that is a `Peer`: whoever is at the far end, usually the proxy's socket. Nothing here waits:
what the peer does not take stays in its ring, what it has not sent leaves the driver's buffer where it is, and
`service` is called again when something has changed.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Protocol

from svsm.host.devices.virtio_mmio import Backend, MmioDevice
from svsm.host.devices.virtio_ring import Chain, DeviceRing, Window

__all__ = ["MmioStream", "Peer", "SocketPeer", "StreamBackend"]


class Peer(Protocol):
    """The far end of a line."""

    def read(self, most: int) -> bytes | None:
        """What has arrived, at most so much; None when nothing has, b"" when nothing will."""

    def write(self, data: bytes) -> int:
        """Take bytes; how many, 0 for none now."""

    def close(self) -> None:
        """Hang up."""


class SocketPeer:
    """A connected stream socket as a `Peer`.

    Args:
        connected: Owned.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected

    def read(self, most: int) -> bytes | None:
        """What has arrived."""
        try:
            return self._socket.recv(most)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def write(self, data: bytes) -> int:
        """As much as the socket takes; what a peer that is gone does not read is gone too."""
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def close(self) -> None:
        """Close the socket."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def fileno(self) -> int:
        """For a poller."""
        return self._socket.fileno()


class StreamBackend(Backend, Protocol):
    """What `MmioStream` asks."""

    def fills(self, index: int) -> bool:
        """Whether queue `index` holds buffers for the device to write to."""

    def transmit(self, index: int, data: bytes) -> int:
        """Take what the driver sent; how many bytes, less than all to be given the rest later."""

    def receive(self, index: int, room: int) -> bytes | None:
        """Something for a buffer of `room` bytes, or None."""

    def reset(self) -> None:
        """The driver has reset the device."""


class MmioStream(MmioDevice):
    """Such a device behind registers.

    Args:
        stream: What is behind it.
        window, interrupt, kicked: As `MmioDevice` has them.
    """

    def __init__(
        self,
        stream: StreamBackend,
        window: Window,
        *,
        interrupt: Callable[[], None] = lambda: None,
        kicked: Callable[[], None] | None = None,
    ) -> None:
        self.stream = stream
        self._unsent: dict[int, tuple[Chain, bytes]] = {}
        self._spare: dict[int, Chain] = {}
        super().__init__(stream, window, interrupt=interrupt, kicked=kicked)

    def _reset(self) -> None:
        super()._reset()
        self._unsent.clear()
        self._spare.clear()
        self.stream.reset()

    def service(self) -> int:
        """Work until nothing moves: what one queue brought may be answered in another."""
        total = 0
        while count := super().service():
            total += count
        return total

    def _serve_queue(self, index: int, ring: DeviceRing) -> int:
        count = self._fill(index, ring) if self.stream.fills(index) else self._empty(index, ring)
        if count:
            self.finished(ring)
        return count

    def _empty(self, index: int, ring: DeviceRing) -> int:
        count = 0
        while True:
            held = self._unsent.pop(index, None)
            chain = ring.pop() if held is None else held[0]
            if chain is None:
                if not ring.enable_kicks():
                    return count
                continue
            data = held[1] if held is not None else self._gather(chain)
            taken = self.stream.transmit(index, data)
            if taken < len(data):
                self._unsent[index] = chain, data[taken:]
                return count
            self.complete(ring, chain, 0)
            count += 1

    def _fill(self, index: int, ring: DeviceRing) -> int:
        count = 0
        while True:
            chain = self._spare.pop(index, None) or ring.pop()
            if chain is None:
                if not ring.enable_kicks():
                    return count
                continue
            writable = [part for part in chain.parts if part.device_writes]
            data = self.stream.receive(index, sum(part.length for part in writable))
            if data is None:
                self._spare[index] = chain
                return count
            rest = data
            for part in writable:
                self.window.put(part.address, rest[: part.length])
                rest = rest[part.length :]
            self.complete(ring, chain, len(data))
            count += 1

    def _gather(self, chain: Chain) -> bytes:
        return b"".join(self.window.take(part.address, part.length) for part in chain.parts if not part.device_writes)
