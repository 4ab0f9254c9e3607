# SPDX-License-Identifier: MIT OR Apache-2.0
"""Programs against the vhost-user front-end: the messages of its socket, and the rings behind them. See `program`.

The memory is one memfd for all runs. `_Poller` stands for epoll: the device works while the driver waits, because a
kick is a number in an eventfd that nobody here reads.
"""

from __future__ import annotations

import dataclasses
import functools
import select
from collections.abc import Callable

from svsm.formats.vhost_user import Request
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.program import DEADLINE
from svsm.fuzz.disks.vhost_peer import ANSWERED, Peer, VhostRules
from svsm.fuzz.disks.virtio_device import Disk
from svsm.fuzz.disks.virtio_run import VirtioRun
from svsm.host.devices.virtio_ring import Window
from svsm.storage.drivers.virtio.blk import VirtioBlk
from svsm.storage.drivers.virtio.vhost_user import VhostUserTransport
from svsm.storage.drivers.virtio.vhost_user_socket import SharedMemory

__all__ = ["VhostRun"]


@functools.cache
def _memory(size: int) -> tuple[SharedMemory, bytes]:
    return SharedMemory(size), bytes(size)


class _Poller:
    """Instead of epoll: lets the device work, and time pass."""

    def __init__(self, work: Callable[[float], list[tuple[int, int]]]) -> None:
        self._work = work
        self.descriptors: list[int] = []

    def register(self, descriptor: int, _events: int) -> None:
        """In the order in which the transport does: for each queue its call, then its error."""
        self.descriptors.append(descriptor)

    def poll(self, seconds: float, _most: int) -> list[tuple[int, int]]:
        """What there is."""
        return self._work(seconds)

    def close(self) -> None:
        """Nothing."""


class VhostRun(VirtioRun):
    """Over vhost-user.

    Args:
        data: The program. Its first byte also says which ring, and whether the back-end acknowledges.
    """

    rules: VhostRules

    def __init__(self, data: bytes) -> None:
        form = data[0] if data else 0
        super().__init__(data, packed=bool(form & 0x80))
        self.flickers = False
        self.policy = dataclasses.replace(self.policy, queue_size=max(4, self.policy.queue_size))
        self._acknowledges = bool(form & 0x40)
        self._shared, zeros = _memory(self.room_bytes)
        self._shared.dma.bytes[:] = zeros[: self._shared.dma.size_bytes].ljust(self._shared.dma.size_bytes, b"\0")
        self.memory = self._shared.dma.bytes.obj  # type: ignore[assignment]  # always a mapping
        self.rules = VhostRules()
        window = Window(self._shared.dma.bytes, address=self._shared.region.guest_address)
        self.disk = Disk(window, self.content, self.lies, self.offer)
        self.lies.disk = self.disk
        self._lies: dict[str | int, Choices] = {}
        self._storm = self._error = self._keeps = False
        self._peer: Peer
        self._poller: _Poller

    def _transport(self) -> VhostUserTransport:
        self.disk.rings, self.disk.broken, self.disk.spoiled = [None, None], False, False
        self._error = False
        self._peer = Peer(
            self.disk,
            self.rules,
            self._shared.region,
            self.clock,
            acknowledges=self._acknowledges,
            queues=self.policy.queues,
            lies=self._lies,
        )
        transport = VhostUserTransport(
            self._peer,  # type: ignore[arg-type]  # has what the transport uses of a socket
            self._shared,
            clock=self.clock,
            answer_seconds=DEADLINE,
            queue_entries=self.offer.queue_size,
        )
        transport._poll.close()
        transport._poll = self._poller = _Poller(self._work)  # type: ignore[assignment]  # has what it uses of a poll
        return transport

    def _work(self, seconds: float) -> list[tuple[int, int]]:
        """The device's time."""
        before = self.disk.taken
        self.disk.service()
        if self.disk.broken:
            self._peer.end()
        calls, errors = self._poller.descriptors[::2], self._poller.descriptors[1::2]
        if self._error:
            return [(errors[0], select.EPOLLIN)]
        if self.disk.taken != before or self._storm:
            return [(calls[0], select.EPOLLIN)]
        self.clock.pause(seconds)
        return []

    # ---- what `VirtioRun` asks for ----------------------------------------------------------------------------------

    def start(self) -> None:
        """A connection and a driver."""
        self.up(self._make)

    def _make(self) -> None:
        self.driver = VirtioBlk(
            self._transport(), self._shared.dma, policy=self.policy, clock=self.clock, pause=self.clock.pause
        )

    def restart(self) -> None:
        """A reset: of this connection, where nothing is known against it."""
        self._keeps = self.driver.fault is None and not self.tainted
        super().restart()

    def again(self) -> None:
        """A new connection, or a reset of this one."""
        if self._keeps:
            self._peer.new_life()
        self.driver.reconnect(None if self._keeps else self._transport())

    def lie(self) -> None:
        """A reply, by what it answers or by its number."""
        choice = self.choices.below(32)
        named = ANSWERED[choice % len(ANSWERED)] if choice < 16 else Request.GET_VRING_BASE
        self._lies[named.name if choice < 16 or choice > 27 else choice - 16] = Choices(self.choices.raw(5))

    def be_honest(self) -> None:
        """Replies too."""
        super().be_honest()
        self._lies.clear()
        self._storm = False

    def storm(self) -> None:
        """Wake-ups without end."""
        self._storm = True

    def halt(self, kind: int) -> str:
        """The back-end says something, is gone, or reports an error on its queue."""
        if kind == 0:
            self._peer.speak()
            return "vhost-user-reply"
        if kind == 1:
            self._peer.end()
            return "vhost-user-gone"
        self._error = True
        return "virtio-needs-reset"

    def notice(self) -> bool:
        """There are no notices on this transport."""
        return False
