# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio-mmio disk whose queues a vhost-user back-end serves: the hypervisor's half of vhost-user.

    driver ─ registers ─▶ `VhostUserFront` ─ vhost-user messages ─▶ daemon
    driver ─ QueueNotify ─▶ kick eventfd ─▶ daemon ─ call eventfd ─▶ used-buffer interrupt ─▶ driver

The guest sees registers and knows nothing of the daemon; rings and buffers are in memory that the daemon maps itself,
so no request passes through here. What the driver chooses is handed on as it chooses it: features at FEATURES_OK, a
queue when it is made ready, all queues enabled at DRIVER_OK, all stopped at a reset.

ACCESS_PLATFORM is this device's own word: it says that the device reaches only what the guest shares, and of this
guest's memory the daemon has a descriptor of the shared memory file and of no other. It is not passed on.

A daemon that hangs up, answers nonsense or reports an error is a device that needs a reset, and one that no reset
brings back: STATUS keeps DEVICE_NEEDS_RESET, so the driver's reset does not take and its next life must be a new boot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
from collections.abc import Callable
from typing import Final

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.vhost_user import MemoryRegion, Request, U64Payload, VhostFeature, VringState
from svsm.formats.vhost_user_messages import vring_messages
from svsm.formats.virtio import DeviceStatus, DeviceType, Feature, Interrupt, MmioRegister, QueueAddresses
from svsm.host.devices.vhost_user_link import BackendLink
from svsm.host.devices.virtio_mmio import MmioDevice, QueueState
from svsm.host.devices.virtio_process import send_interrupt, serve_access
from svsm.host.devices.virtio_ring import DeviceRing, Window

__all__ = ["FrontBackend", "FrontOffer", "VhostUserFront", "serve_front"]

_QUEUE_ENTRIES: Final = 1024
"""vhost-user has no message that asks for it; this is what libvhost-user (QEMU) takes."""
_CONFIG_BYTES: Final = 60
"""Of the configuration space: what is behind them is newer than most daemons, and a driver finds zeros there."""
_USER_ADDRESS: Final = 0x7D00_0000_0000
"""Rings are named by addresses of the front-end; a made-up one serves as well as the true one."""
_NOT_OURS: Final = int(VhostFeature.PROTOCOL_FEATURES | VhostFeature.LOG_ALL) | 1 << 24
"""What a back-end offers that a driver must not see; bit 24 is the legacy NOTIFY_ON_EMPTY."""


@dataclasses.dataclass(frozen=True, slots=True)
class FrontOffer:
    """Features, and queues; see `svsm.host.devices.virtio_mmio.Offer`."""

    features: int
    queues: int
    queue_size: int = _QUEUE_ENTRIES


class FrontBackend:
    """What a back-end offers, as `MmioDevice` asks for it.

    Args:
        link: To the back-end; nothing has been said on it. Closed when it is of no use.
        memory: The shared memfd.
        address: Guest-physical address of the part that the device may reach.
        size_bytes: Of that part.

    Raises:
        SvsmError: ``vhost-user-…``: the back-end is of no use.
    """

    device_type = DeviceType.BLOCK

    def __init__(self, link: BackendLink, memory: int, *, address: int, size_bytes: int) -> None:
        self.link = link
        self._region = MemoryRegion(address, size_bytes, _USER_ADDRESS, address)
        self.features = 0
        try:
            self.offered = link.introduce(self._region, memory) & ~_NOT_OURS | Feature.ACCESS_PLATFORM
            self.configuration_bytes = link.configuration(_CONFIG_BYTES)
        except SvsmError:
            link.close()
            raise

    @property
    def options(self) -> FrontOffer:
        """What the registers say."""
        return FrontOffer(self.offered, self.link.queues)

    def configuration(self) -> bytes:
        """As it was read at the last reset."""
        return self.configuration_bytes

    def user_address(self, gpa: int) -> int:
        """The name of a guest address in SET_VRING_ADDR."""
        return self._region.user_address + gpa - self._region.guest_address


class VhostUserFront(MmioDevice):
    """The registers.

    Args:
        backend: The daemon, introduced.
        window: The memory that it reaches.
        interrupt: Raises the interrupt line.
        died: Told when the back-end is of no use any more.

    Attributes:
        calls: Event descriptor → index of its queue: the back-end has used buffers.
        errors: Event descriptors by which the back-end reports an error.
        dead: The back-end is gone.
    """

    def __init__(
        self,
        backend: FrontBackend,
        window: Window,
        *,
        interrupt: Callable[[], None],
        died: Callable[[], None] = lambda: None,
    ) -> None:
        self.backend = backend
        self._died = died
        self.calls: dict[int, int] = {}
        self.errors: set[int] = set()
        self.dead = False
        self._kicks: dict[int, int] = {}
        super().__init__(backend, window, interrupt=interrupt)

    # ---- what the driver does ---------------------------------------------------------------------------------------

    def _write(self, offset: int, value: int) -> None:
        if offset == MmioRegister.QUEUE_NOTIFY:
            # A counter that is full has kicks enough in it.
            with contextlib.suppress(KeyError, OSError):
                os.eventfd_write(self._kicks[value], 1)
        else:
            super()._write(offset, value)

    def _reset(self) -> None:
        super()._reset()
        if self.dead:
            self.status = int(DeviceStatus.NEEDS_RESET)
            return
        if self._kicks:
            self._told(self._stop)
        self._close_vrings()

    def _stop(self) -> None:
        link = self.backend.link
        for index in sorted(self._kicks):
            link.stop_queue(index)
        self.backend.configuration_bytes = link.configuration(_CONFIG_BYTES)

    def _set_status(self, value: int) -> None:
        before = self.status
        super()._set_status(value)
        new = self.status & ~before
        if new & DeviceStatus.FEATURES_OK:
            chosen = self.driver_features & ~int(Feature.ACCESS_PLATFORM) | VhostFeature.PROTOCOL_FEATURES
            if not self._told(lambda: self._tell(Request.SET_FEATURES, U64Payload(chosen).pack())):
                self.status &= ~int(DeviceStatus.FEATURES_OK)
        if new & DeviceStatus.DRIVER_OK:
            self._told(self._enable)

    def _enable(self) -> None:
        for index in sorted(self._kicks):
            self._tell(Request.SET_VRING_ENABLE, VringState(index, 1).pack())
        self.backend.link.features()

    def _set_ready(self, queue: QueueState, value: int) -> None:
        if not value or queue.ready:
            return  # a queue is given up by a reset only
        size = queue.size
        addresses = QueueAddresses(*queue.addresses)
        try:
            for address in (addresses.descriptors, addresses.driver, addresses.device):
                self.window.offset(address, 1)
        except FormatError:
            return  # not in the memory that the back-end reaches; how far they go, it sees for itself
        if 0 < size <= _QUEUE_ENTRIES and self._told(lambda: self._give(self._queue_select, size, addresses)):
            queue.ready = 1

    def _give(self, index: int, size: int, addresses: QueueAddresses) -> None:
        kick, call, error = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
        self._kicks[index], self.calls[call] = kick, index
        self.errors.add(error)
        messages = vring_messages(
            index,
            size,
            addresses,
            packed=bool(self.driver_features & Feature.RING_PACKED),
            user_address=self.backend.user_address,
            eventfds=(kick, call, error),
        )
        for request, payload, descriptors in messages:
            self.backend.link.tell(request, payload, descriptors)

    def _tell(self, request: Request, payload: bytes) -> None:
        self.backend.link.tell(request, payload)

    def _told(self, say: Callable[[], None]) -> bool:
        """Whether the back-end has taken it; one that has not is dead."""
        if self.dead:
            return False
        try:
            say()
        except (SvsmError, OSError):
            self.die()
            return False
        return True

    def _serve_queue(self, index: int, ring: DeviceRing) -> int:
        del index, ring  # the back-end serves them
        return 0

    # ---- what the back-end does -------------------------------------------------------------------------------------

    def used(self, call: int) -> None:
        """The back-end has signalled this event descriptor."""
        with contextlib.suppress(OSError):
            os.eventfd_read(call)
        self._raise(Interrupt.USED_BUFFER)

    def die(self) -> None:
        """The back-end is of no use any more."""
        if not self.dead:
            self.dead = True
            self.backend.link.close()
            self._close_vrings()
            self.needs_reset()
            self._died()

    def _close_vrings(self) -> None:
        for descriptor in (*self._kicks.values(), *self.calls, *self.errors):
            os.close(descriptor)
        self._kicks.clear()
        self.calls.clear()
        self.errors.clear()


def serve_front(
    connection: socket.socket, backend: FrontBackend, window: Window, *, died: Callable[[], None] = lambda: None
) -> None:
    """Serve one driver until it hangs up, also after the daemon has died.

    Args:
        connection: SOCK_SEQPACKET; the driver's registers. Stays the caller's.
        backend: The daemon.
        window: The memory that it reaches.
        died: Told when the daemon is of no use any more.
    """
    front = VhostUserFront(backend, window, interrupt=lambda: send_interrupt(connection), died=died)
    while True:
        poll = select.poll()
        link = [] if front.dead else [backend.link.fileno()]
        for descriptor in (connection.fileno(), *front.calls, *front.errors, *link):
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll():
            if descriptor in front.calls:
                front.used(descriptor)
            elif descriptor != connection.fileno():
                front.die()
                break
            elif not serve_access(connection, front):
                return
            else:
                break  # it may have changed what there is to wait for
