# SPDX-License-Identifier: MIT OR Apache-2.0
"""The console device of VIRTIO 1.2 §5.3 as bytes: features, configuration, control messages, which queue is whose.

Everything is little-endian. A buffer of a port's queues is characters and nothing else.
"""

from __future__ import annotations

import enum
from typing import Final

from svsm.formats.record import U16, U32, Record, record

__all__ = [
    "CONTROL_RECEIVE_QUEUE",
    "CONTROL_TRANSMIT_QUEUE",
    "ConsoleConfig",
    "ConsoleControl",
    "ConsoleEvent",
    "ConsoleFeature",
    "port_queues",
]

CONTROL_RECEIVE_QUEUE: Final = 2
CONTROL_TRANSMIT_QUEUE: Final = 3


class ConsoleFeature(enum.IntFlag):
    """Feature bits (§5.3.3)."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2


class ConsoleEvent(enum.IntEnum):
    """Control messages (§5.3.6.2)."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


@record(size=12, byte_order="little")
class ConsoleConfig(Record):
    """The configuration space (§5.3.4). What a feature bit does not cover means nothing."""

    columns: U16 = 0
    rows: U16 = 0
    ports: U32 = 0  # max_nr_ports
    emergency_write: U32 = 0


@record(size=8, byte_order="little")
class ConsoleControl(Record):
    """A control message; RESIZE and PORT_NAME are followed by more (§5.3.6.2)."""

    port: U32
    event: U16  # ConsoleEvent
    value: U16


def port_queues(port: int) -> tuple[int, int]:
    """The queues that a port receives and transmits with: 0 and 1, then 4 and 5, … (§5.3.2)."""
    return (0, 1) if port == 0 else (2 * port + 2, 2 * port + 3)
