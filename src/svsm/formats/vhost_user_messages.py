# SPDX-License-Identifier: MIT OR Apache-2.0
"""vhost-user messages as a front-end builds them, and what it believes of a reply. Pure: no socket, no clock.

A reply is read in two steps whose sizes are known before a byte arrives. `judge_header` takes 12 bytes and demands the
request's number, version 1, the reply flag and nothing else, and exactly the payload that this request's answer has;
only a GET_CONFIG may be answered with none, which is the protocol's way to refuse. So no length that a back-end sends
is ever used to allocate or to loop. `judge_…` functions then take the payload apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError, ProtocolError
from svsm.formats.vhost_user import (
    MAX_QUEUES,
    VERSION,
    ConfigHeader,
    HeaderFlag,
    MemoryRegion,
    MemoryTable,
    MessageHeader,
    ProtocolFeature,
    Request,
    U64Payload,
    VhostFeature,
    VringAddress,
    VringState,
)
from svsm.formats.virtio import QueueAddresses

__all__ = [
    "choose_protocol_features",
    "demand_protocol_features",
    "encode",
    "get_config",
    "judge_acknowledgement",
    "judge_config",
    "judge_header",
    "judge_queues",
    "judge_vring",
    "memory_table",
    "vring_messages",
]

_PACKED_START: Final = 0x8000_8000
"""SET_VRING_BASE of a packed ring: both positions 0, both wrap counters set."""
_WANTED: Final = int(ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)


def encode(request: Request, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """One message."""
    flags = VERSION | (HeaderFlag.NEED_REPLY if need_reply else 0)
    return MessageHeader(request, flags, len(payload)).pack() + payload


def memory_table(regions: Sequence[MemoryRegion]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    return MemoryTable(len(regions), 0).pack() + b"".join(region.pack() for region in regions)


def get_config(offset: int, length: int) -> bytes:
    """The payload of GET_CONFIG, which has room for the answer."""
    return ConfigHeader(offset, length, 0).pack() + bytes(length)


def vring_messages(
    index: int,
    size: int,
    addresses: QueueAddresses,
    *,
    packed: bool,
    user_address: Callable[[int], int],
    eventfds: tuple[int, int, int],
) -> list[tuple[Request, bytes, list[int]]]:
    """Everything that tells a back-end about one queue, its eventfds last.

    Args:
        index: Of the queue.
        size: Entries.
        addresses: Guest-physical.
        packed: The kind of ring.
        user_address: The name that `MemoryRegion.user_address` gives to a guest-physical address.
        eventfds: kick, call, error.

    Returns:
        Requests with their payloads and descriptors, in order.
    """
    kick, call, error = eventfds
    address = VringAddress(
        index=index,
        flags=0,
        descriptors=user_address(addresses.descriptors),
        used=user_address(addresses.device),
        available=user_address(addresses.driver),
        log=0,
    )
    return [
        (Request.SET_VRING_NUM, VringState(index, size).pack(), []),
        (Request.SET_VRING_BASE, VringState(index, _PACKED_START if packed else 0).pack(), []),
        (Request.SET_VRING_ADDR, address.pack(), []),
        (Request.SET_VRING_ERR, U64Payload(index).pack(), [error]),
        (Request.SET_VRING_CALL, U64Payload(index).pack(), [call]),
        (Request.SET_VRING_KICK, U64Payload(index).pack(), [kick]),
    ]


def demand_protocol_features(offered: int) -> None:
    """Demand that a back-end's features say that it has protocol features.

    Raises:
        ProtocolError: ``vhost-user-features``.
    """
    if not offered & VhostFeature.PROTOCOL_FEATURES:
        raise _too_old(int(VhostFeature.PROTOCOL_FEATURES), offered)


def choose_protocol_features(offered: int) -> int:
    """What to use of the protocol features: CONFIG, which must be there, and MQ and REPLY_ACK where they are.

    Raises:
        ProtocolError: ``vhost-user-features``.
    """
    if not offered & ProtocolFeature.CONFIG:
        raise _too_old(int(ProtocolFeature.CONFIG), offered)
    return offered & _WANTED


def _too_old(expected: int, got: int) -> ProtocolError:
    return ProtocolError(
        "the back-end is too old: it has no protocol features, or no configuration",
        code="vhost-user-features",
        expected=expected,
        got=got,
    )


def _bad(request: Request, what: str, *, expected: int, got: int) -> ProtocolError:
    return ProtocolError(
        f"the back-end's reply to {request.name} {what}",
        code="vhost-user-reply",
        hint="the back-end is broken or hostile; restart it",
        expected=expected,
        got=got,
    )


def judge_header(data: bytes, request: Request, payload_bytes: int) -> int:
    """Judge the 12 bytes that start a reply.

    Args:
        data: They.
        request: What was asked.
        payload_bytes: How long its answer is.

    Returns:
        How many bytes follow: `payload_bytes`, or 0 for a refused GET_CONFIG.

    Raises:
        ProtocolError: ``vhost-user-reply``.
    """
    header = MessageHeader.parse(data)
    if header.request != request:
        raise _bad(request, "answers something else", expected=request, got=header.request)
    # NEED_REPLY means nothing in a reply; libraries echo it from the request. (`~` of the enum would drop other bits.)
    flags = header.flags & ~int(HeaderFlag.NEED_REPLY)
    if flags != VERSION | HeaderFlag.REPLY:
        raise _bad(request, "has the wrong version or flags", expected=VERSION | HeaderFlag.REPLY, got=header.flags)
    if header.size != payload_bytes and not (request is Request.GET_CONFIG and not header.size):
        raise _bad(request, "has the wrong length", expected=payload_bytes, got=header.size)
    return header.size


def judge_acknowledgement(request: Request, payload: bytes) -> None:
    """Demand that the back-end agreed.

    Raises:
        ProtocolError: ``vhost-user-refused``; ``virtio-features-refused`` for the choice of features.
    """
    value = U64Payload.parse(payload).value
    if value and request is Request.SET_FEATURES:
        raise ProtocolError("the back-end does not accept what it offered", code="virtio-features-refused")
    if value:
        raise ProtocolError(f"the back-end refuses {request.name}", code="vhost-user-refused", got=value)


def judge_queues(payload: bytes) -> int:
    """How many queues there are, 0 to 256.

    Raises:
        ProtocolError: ``vhost-user-reply``.
    """
    value = U64Payload.parse(payload).value
    if value > MAX_QUEUES:
        raise _bad(Request.GET_QUEUE_NUM, "has more queues than can be addressed", expected=MAX_QUEUES, got=value)
    return value


def judge_vring(payload: bytes, index: int) -> None:
    """Demand that a stopped vring is the one that was to stop; where it stopped is of no interest.

    Raises:
        ProtocolError: ``vhost-user-reply``.
    """
    state = VringState.parse(payload)
    if state.index != index:
        raise _bad(Request.GET_VRING_BASE, "is about another queue", expected=index, got=state.index)


def judge_config(payload: bytes, offset: int, length: int) -> bytes:
    """The configuration bytes of an answer.

    Raises:
        ProtocolError: ``vhost-user-config`` for a refusal, ``vhost-user-reply`` for the wrong part.
    """
    if not payload:
        raise ProtocolError(
            "the back-end does not give its configuration", code="vhost-user-config", offset=offset, length=length
        )
    cursor = Cursor(payload, what="configuration")
    try:
        header = cursor.record(ConfigHeader)
        data = cursor.take(length)
        cursor.finish()
    except FormatError as error:
        raise _bad(Request.GET_CONFIG, "has the wrong length", expected=length, got=len(payload)) from error
    if header.offset != offset or header.size != length:
        raise _bad(Request.GET_CONFIG, "is about another part", expected=offset, got=header.offset)
    return data
