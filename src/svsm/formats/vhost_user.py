# SPDX-License-Identifier: MIT OR Apache-2.0
"""vhost-user as bytes: the messages between a virtio driver and a back-end process on a Unix socket.

Every message is a 12-byte header and a payload; descriptors travel beside it. Integers have the machine's byte order,
which for us is little-endian (the drivers demand that). The header's low flag bits are the version; what must be in
the others is for whoever receives a message to say. Names follow "Vhost-user Protocol" in QEMU's documentation
(docs/interop/vhost-user.rst), requests without the ``VHOST_USER_`` prefix.

Only the requests that svsm sends are here.
"""

from __future__ import annotations

import enum
from typing import Final

from svsm.formats.record import U32, U64, Record, record

__all__ = [
    "MAX_CONFIG_BYTES",
    "MAX_QUEUES",
    "NO_DESCRIPTOR",
    "QUEUE_INDEX_MASK",
    "VERSION",
    "VERSION_MASK",
    "ConfigHeader",
    "HeaderFlag",
    "MemoryRegion",
    "MemoryTable",
    "MessageHeader",
    "ProtocolFeature",
    "Request",
    "U64Payload",
    "VhostFeature",
    "VringAddress",
    "VringState",
]

VERSION: Final = 1
VERSION_MASK: Final = 3
"""Bits of `MessageHeader.flags` that hold the version."""
MAX_CONFIG_BYTES: Final = 256
"""Most bytes of configuration space in one message."""
MAX_QUEUES: Final = 256
"""A vring's index has eight bits where a descriptor goes with it."""
QUEUE_INDEX_MASK: Final = 0xFF
NO_DESCRIPTOR: Final = 0x100
"""In the payload of SET_VRING_KICK, CALL and ERR: no descriptor comes along."""


class Request(enum.IntEnum):
    """Messages from the front-end; replies carry the same number."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24


class HeaderFlag(enum.IntFlag):
    """Above the version, in `MessageHeader.flags`."""

    REPLY = 4
    NEED_REPLY = 8


class VhostFeature(enum.IntFlag):
    """Bits of GET_FEATURES that belong to vhost and not to the device."""

    LOG_ALL = 1 << 26
    PROTOCOL_FEATURES = 1 << 30


class ProtocolFeature(enum.IntFlag):
    """What svsm knows of GET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9


@record(size=12, byte_order="little")
class MessageHeader(Record):
    """What starts every message."""

    request: U32  # Request
    flags: U32  # version and HeaderFlag
    size: U32  # bytes of payload


@record(size=8, byte_order="little")
class U64Payload(Record):
    """Features, acknowledgements (0 is success), and the vring of a descriptor."""

    value: U64


@record(size=8, byte_order="little")
class VringState(Record):
    """SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE."""

    index: U32
    value: U32


@record(size=40, byte_order="little")
class VringAddress(Record):
    """SET_VRING_ADDR. Addresses count as `MemoryRegion.user_address` does, not as the guest's do."""

    index: U32
    flags: U32  # bit 0: log
    descriptors: U64
    used: U64  # packed ring: the device's event suppression
    available: U64  # packed ring: the driver's event suppression
    log: U64


@record(size=8, byte_order="little")
class MemoryTable(Record):
    """SET_MEM_TABLE: this, then `regions` times `MemoryRegion`, with as many descriptors."""

    regions: U32
    reserved_4: U32


@record(size=32, byte_order="little")
class MemoryRegion(Record):
    """One piece of shared memory."""

    guest_address: U64  # as descriptors in rings name it
    size: U64  # bytes
    user_address: U64  # as SET_VRING_ADDR names it
    mmap_offset: U64  # where it begins in its descriptor


@record(size=12, byte_order="little")
class ConfigHeader(Record):
    """GET_CONFIG: this, then `size` bytes. A reply without payload is a refusal."""

    offset: U32
    size: U32
    flags: U32
