# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio console of our own (VIRTIO 1.2 §5.3): one of its ports is connected to a `Peer`.

With `ports` above 1 the device offers MULTIPORT, adds its connected port when the driver is ready, and tells of the
peer's coming and going. Without, port 0 is a bare line.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Final

from svsm.formats.virtio import DeviceType, Feature
from svsm.formats.virtio_console import (
    CONTROL_RECEIVE_QUEUE,
    CONTROL_TRANSMIT_QUEUE,
    ConsoleConfig,
    ConsoleControl,
    ConsoleEvent,
    ConsoleFeature,
    port_queues,
)
from svsm.host.devices.virtio_stream import Peer

__all__ = ["LINE_FEATURES", "ConsoleBackend", "ConsoleOptions"]

LINE_FEATURES: Final = int(Feature.VERSION_1 | Feature.ACCESS_PLATFORM | Feature.RING_PACKED | Feature.EVENT_IDX)


@dataclasses.dataclass(frozen=True, slots=True)
class ConsoleOptions:
    """What the device offers.

    Attributes:
        common: Feature bits that do not belong to the device type.
        queue_size: Largest size of each queue.
        ports: How many ports can be; above 1 with MULTIPORT.
        port: Which of them is connected.
        name: Of that port.
    """

    common: int = LINE_FEATURES
    queue_size: int = 64
    ports: int = 1
    port: int = 0
    name: bytes = b"svsm.key"

    @property
    def features(self) -> int:
        """Feature bits."""
        return self.common | (int(ConsoleFeature.MULTIPORT) if self.ports > 1 else 0)

    @property
    def queues(self) -> int:
        """Two for each port, and two for control messages."""
        return 2 * (self.ports + 1) if self.ports > 1 else 2


class ConsoleBackend:
    """The console.

    Args:
        peer: Who is at the far end.
        options: What is offered.
    """

    device_type = DeviceType.CONSOLE

    def __init__(self, peer: Peer, options: ConsoleOptions | None = None) -> None:
        self.options = options or ConsoleOptions()
        self.features = 0
        self._peer = peer
        self._receive, self._transmit = port_queues(self.options.port)
        self.reset()

    def reset(self) -> None:
        """Nothing is known of the driver any more. The peer stays."""
        self._messages: collections.deque[bytes] = collections.deque()
        self._driver_ready = False
        self._open = self.options.ports == 1
        self._gone = False

    def configuration(self) -> bytes:
        """The configuration space."""
        return ConsoleConfig(ports=self.options.ports).pack()

    def fills(self, index: int) -> bool:
        """The even ones: of ports and of control messages."""
        return index % 2 == 0

    def transmit(self, index: int, data: bytes) -> int:
        """To the peer, or to the device itself."""
        if index == CONTROL_TRANSMIT_QUEUE:
            if len(data) >= ConsoleControl.SIZE:
                self._control(ConsoleControl.parse(data[: ConsoleControl.SIZE]))
            return len(data)
        return self._peer.write(data) if index == self._transmit else len(data)

    def receive(self, index: int, room: int) -> bytes | None:
        """From the peer, or a control message."""
        if index == CONTROL_RECEIVE_QUEUE:
            return self._messages.popleft()[:room] if self._messages else None
        if index != self._receive or not self._open or self._gone:
            return None
        data = self._peer.read(room)
        if data == b"":
            self._gone = True
            if self._driver_ready:
                self._tell(ConsoleEvent.PORT_OPEN, 0)
            return None
        return data

    def _tell(self, event: ConsoleEvent, value: int, more: bytes = b"") -> None:
        self._messages.append(ConsoleControl(self.options.port, event, value).pack() + more)

    def _control(self, message: ConsoleControl) -> None:
        if message.event == ConsoleEvent.DEVICE_READY and message.value:
            self._driver_ready = True
            self._tell(ConsoleEvent.DEVICE_ADD, 0)
        elif message.port == self.options.port and message.event == ConsoleEvent.PORT_READY and message.value:
            self._tell(ConsoleEvent.PORT_NAME, 0, self.options.name)
            self._tell(ConsoleEvent.PORT_OPEN, 1)
        elif message.port == self.options.port and message.event == ConsoleEvent.PORT_OPEN:
            self._open = bool(message.value)
