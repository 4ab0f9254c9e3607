# SPDX-License-Identifier: MIT OR Apache-2.0
"""The socket device of VIRTIO 1.2 §5.10 as bytes: the packet header, its constants, the configuration, the event.

Everything is little-endian. A packet is one header and `length` bytes of payload, in one buffer of a queue.
"""

from __future__ import annotations

import enum
from typing import Final

from svsm.formats.record import U16, U32, U64, Record, record

__all__ = [
    "EVENT_QUEUE",
    "HOST_CID",
    "RECEIVE_QUEUE",
    "RESERVED_CIDS",
    "TRANSMIT_QUEUE",
    "TRANSPORT_RESET",
    "TYPE_STREAM",
    "VsockConfig",
    "VsockEvent",
    "VsockFeature",
    "VsockHeader",
    "VsockOperation",
    "VsockShutdown",
]

RECEIVE_QUEUE: Final = 0
TRANSMIT_QUEUE: Final = 1
EVENT_QUEUE: Final = 2
HOST_CID: Final = 2
RESERVED_CIDS: Final = (0, 1, HOST_CID, 0xFFFF_FFFF)
"""What no guest is called (§5.10.4); neither is anything above 32 bits."""
TYPE_STREAM: Final = 1
TRANSPORT_RESET: Final = 0
"""The only event (§5.10.6.7)."""


class VsockFeature(enum.IntFlag):
    """Feature bits (§5.10.3). Without any of them, streams are meant."""

    STREAM = 1 << 0
    SEQPACKET = 1 << 1
    NO_IMPLIED_STREAM = 1 << 2


class VsockOperation(enum.IntEnum):
    """What a packet does (§5.10.6)."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class VsockShutdown(enum.IntFlag):
    """`VsockHeader.flags` of a SHUTDOWN: what its sender will not do any more (§5.10.6.6)."""

    RECEIVE = 1 << 0
    SEND = 1 << 1


@record(size=44, byte_order="little")
class VsockHeader(Record):
    """What starts every packet (§5.10.6)."""

    source_cid: U64
    destination_cid: U64
    source_port: U32
    destination_port: U32
    length: U32  # bytes of payload
    type: U16  # TYPE_STREAM
    operation: U16  # VsockOperation
    flags: U32  # VsockShutdown, with SHUTDOWN
    buffer_bytes: U32  # buf_alloc: receive buffer of the sender
    forwarded: U32  # fwd_cnt: bytes that the sender has taken out of it so far, modulo 2^32


@record(size=8, byte_order="little")
class VsockConfig(Record):
    """The configuration space (§5.10.4)."""

    guest_cid: U64


@record(size=4, byte_order="little")
class VsockEvent(Record):
    """What comes over the event queue (§5.10.6.7)."""

    id: U32
