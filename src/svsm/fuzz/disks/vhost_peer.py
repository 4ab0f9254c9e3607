# SPDX-License-Identifier: MIT OR Apache-2.0
"""A vhost-user back-end that lies in its messages, and its socket, in one: without threads, without waiting.

What is sent to it is answered at once, into a buffer; a back-end that is silent moves the clock. Its rings are those of
`virtio_device.Disk`, in the memfd that the front-end would pass to it.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

from svsm.formats.vhost_user import (
    MAX_QUEUES,
    ConfigHeader,
    MemoryRegion,
    MessageHeader,
    ProtocolFeature,
    Request,
    VhostFeature,
    VringAddress,
)
from svsm.formats.virtio import BlkConfig, BlkFeature, Feature, QueueAddresses
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.program import DEADLINE
from svsm.fuzz.disks.verdict import Clock
from svsm.fuzz.disks.virtio_device import OFFERED, Disk
from svsm.fuzz.disks.virtio_rules import VirtioRules, judge_configuration
from svsm.fuzz.target import expect

__all__ = ["ANSWERED", "Peer", "VhostRules"]

_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_PROTOCOL: Final = int(VhostFeature.PROTOCOL_FEATURES)
_CONFIG_FEATURE, _MQ = int(ProtocolFeature.CONFIG), int(ProtocolFeature.MQ)
_REPLY_ACK: Final = int(ProtocolFeature.REPLY_ACK)
_VERSION_1, _MULTIQUEUE = int(Feature.VERSION_1), int(BlkFeature.MQ)
_NUMBERS: Final = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM)
_OWN: Final = (*_NUMBERS, Request.GET_CONFIG, Request.GET_VRING_BASE)
ANSWERED: Final = (*_OWN, Request.SET_FEATURES, Request.SET_OWNER, Request.SET_VRING_NUM)
"""Requests that have an answer of their own, and some that are only acknowledged."""


@functools.cache
def _quiet_descriptor() -> int:
    """Something that can be polled and never has anything."""
    return os.eventfd(0, os.EFD_CLOEXEC)


class VhostRules(VirtioRules):
    """What a front-end finds as late as at the end of a start.

    Attributes:
        late: A code that counts once everything else is said.
    """

    def __init__(self) -> None:
        super().__init__()
        self.late = ""

    def end(self) -> None:
        """The call is over."""
        self.code, self.late = self.code or self.late, ""


class Peer:
    """The back-end, and the front-end's end of its socket.

    Args:
        disk: What it serves.
        rules: Told what is said.
        region: Where the shared memory is for whom.
        clock: Moves while nothing comes.
        acknowledges: Offers REPLY_ACK.
        queues: How many the front-end wants.
        lies: By name of the request, or number of the reply: what it looks like instead, once.
    """

    def __init__(
        self,
        disk: Disk,
        rules: VhostRules,
        region: MemoryRegion,
        clock: Clock,
        *,
        acknowledges: bool,
        queues: int,
        lies: dict[str | int, Choices],
    ) -> None:
        self._disk, self._rules, self._region, self._clock = disk, rules, region, clock
        self._protocol = _CONFIG_FEATURE | _MQ | (_REPLY_ACK if acknowledges else 0)
        self._acknowledges = False
        self._queues = queues
        self._stated = 1
        self._lies = lies
        self._out = bytearray()
        self._replies = 0
        self._closed = self._descriptors = False
        self._sizes: dict[int, int] = {}
        self._addresses: dict[int, VringAddress] = {}

    # ---- the socket -------------------------------------------------------------------------------------------------

    def setblocking(self, _blocking: object) -> None:
        """Never blocks."""

    def fileno(self) -> int:
        """For a poller that will not see anything."""
        return _quiet_descriptor()

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True

    def recvmsg(self, length: int, _room: int = 0, flags: int = 0) -> tuple[bytes, list[Any], int, None]:
        """What there is, or the time that passes without."""
        data = bytes(self._out[:length])
        if data and flags & socket.MSG_PEEK:
            self._rules.cannot_be("vhost-user-reply")  # nobody asked for it
        if not data and not self._closed:
            if not flags & socket.MSG_PEEK:
                self._clock.pause(DEADLINE)
            raise BlockingIOError
        if not flags & socket.MSG_PEEK:
            del self._out[:length]
        return data, [], socket.MSG_CTRUNC if self._descriptors and data else 0, None

    def sendmsg(self, buffers: Sequence[memoryview], _ancillary: object, _flags: int) -> int:
        """One message, whole; what follows from it is there at once."""
        message = b"".join(buffers)
        if self._closed:
            raise BrokenPipeError
        expect(not self._out, "a request goes out over bytes that nobody asked for")
        header = MessageHeader.parse(message[: MessageHeader.SIZE])
        payload = message[MessageHeader.SIZE :]
        expect(header.size == len(payload), "a message says how long it is")
        request = Request(header.request)
        answer = self._answer(request, payload)
        if answer is None and self._acknowledges and header.flags & 8:
            answer = _U64.pack(0)
        if answer is not None:
            self._reply(request, answer, own=request in _OWN)
        return len(message)

    # ---- what it does -----------------------------------------------------------------------------------------------

    def _answer(self, request: Request, payload: bytes) -> bytes | None:
        disk = self._disk
        if request == Request.GET_FEATURES:
            return _U64.pack(disk.offer.features | _PROTOCOL)
        if request == Request.GET_PROTOCOL_FEATURES:
            return _U64.pack(self._protocol)
        if request == Request.SET_PROTOCOL_FEATURES:
            self._acknowledges = bool(_U64.unpack(payload)[0] & _REPLY_ACK)
        elif request == Request.SET_FEATURES:
            disk.features = _U64.unpack(payload)[0] & ~_PROTOCOL
            expect(not disk.features & ~(OFFERED | 0x20), "features are accepted that nobody knows")
        elif request == Request.GET_QUEUE_NUM:
            self._stated = 2
            return _U64.pack(2)
        elif request == Request.GET_CONFIG:
            header = ConfigHeader.parse(payload[: ConfigHeader.SIZE])
            return payload[: ConfigHeader.SIZE] + disk.config[header.offset : header.offset + header.size]
        elif request == Request.GET_VRING_BASE:
            index = _STATE.unpack(payload)[0]
            disk.rings[index] = None
            return _STATE.pack(index, 0)
        elif request == Request.SET_VRING_NUM:
            index, size = _STATE.unpack(payload)
            self._sizes[index] = size
        elif request == Request.SET_VRING_ADDR:
            address = VringAddress.parse(payload)
            self._addresses[address.index] = address
        elif request == Request.SET_VRING_ENABLE:
            self._enable(_STATE.unpack(payload)[0])
        return None

    def _enable(self, index: int) -> None:
        address, move = self._addresses[index], self._region.guest_address - self._region.user_address
        where = QueueAddresses(address.descriptors + move, address.available + move, address.used + move)
        expect(self._disk.make_ring(index, self._sizes[index], where), "a ring that cannot be")

    def _reply(self, request: Request, payload: bytes, *, own: bool) -> None:
        number, self._replies = self._replies, self._replies + 1
        choices = self._lies.pop(number, None) or self._lies.pop(request.name, None)
        flags, size = 5, len(payload)
        header = (int(request), flags, size)
        if choices is not None:
            kind = choices.below(8)
            if kind == 0:
                header = (int(request) ^ 1 << choices.below(5), flags, size)
                self._rules.cannot_be("vhost-user-reply")
            elif kind == 1:
                bit = 1 << choices.below(32)
                header = (int(request), flags ^ bit, size)
                if bit != 8:  # NEED_REPLY means nothing here
                    self._rules.cannot_be("vhost-user-reply")
            elif kind == 2:
                self._length(request, choices)
                return
            elif kind == 3:
                payload = self._payload(request, payload, choices, own=own)
            elif kind == 4:
                self._rules.cannot_be("vhost-user-timeout")
                return
            elif kind == 5:
                self.end()
                return
            elif kind == 6:
                self._descriptors = True
                self._rules.cannot_be("vhost-user-reply")
            else:
                payload = payload + b"\0"  # found when somebody looks for it
        if request == Request.GET_CONFIG and not self._rules.code:
            self._configuration(payload[ConfigHeader.SIZE :][: BlkConfig.SIZE])
        self._out += struct.pack("<III", *header) + payload

    def _configuration(self, data: bytes) -> None:
        rules, features = self._rules, self._disk.features
        rules.size = judge_configuration(data, features)
        if rules.size is None:
            rules.cannot_be("virtio-blk-geometry")
        several = min(self._queues, BlkConfig.parse(data.ljust(BlkConfig.SIZE, b"\0")).num_queues)
        if self._stated < (several if features & _MULTIQUEUE else 1):
            rules.late = "virtio-queue-missing"

    def _length(self, request: Request, choices: Choices) -> None:
        """Another length than the answer has, and as many bytes."""
        length = (0, 1, 7, 16, 100, 1 << 31)[choices.below(6)]
        refusal = request == Request.GET_CONFIG and not length
        self._rules.cannot_be("vhost-user-config" if refusal else "vhost-user-reply")
        self._out += struct.pack("<III", int(request), 5, length) + bytes(min(length, 100))

    def _payload(self, request: Request, payload: bytes, choices: Choices, *, own: bool) -> bytes:
        """Other contents."""
        at, value = choices.below(8), choices.number() & (1 << 64) - 1
        if not own:
            if value:
                self._rules.cannot_be(
                    "virtio-features-refused" if request == Request.SET_FEATURES else "vhost-user-refused"
                )
            return _U64.pack(value)
        if request in _NUMBERS:
            value = _U64.unpack(payload)[0] ^ 1 << value % 64 if at < 4 else value
            self._number(request, value)
            return _U64.pack(value)
        changed = bytearray(payload)
        changed[at] ^= 1 << value % 8
        if request == Request.GET_CONFIG or at < 4:  # of a vring's state only the index matters
            self._rules.cannot_be("vhost-user-reply")
        return bytes(changed)

    def _number(self, request: Request, value: int) -> None:
        if request == Request.GET_QUEUE_NUM:
            self._stated = value
            if value > MAX_QUEUES:
                self._rules.cannot_be("vhost-user-reply")
        elif request == Request.GET_PROTOCOL_FEATURES:
            if not value & _CONFIG_FEATURE:
                self._rules.cannot_be("vhost-user-features")
            self._protocol = value
        elif not any(self._disk.rings):  # the last one only says that everything has been taken
            if not value & _PROTOCOL:
                self._rules.cannot_be("vhost-user-features")
            elif not value & _VERSION_1:
                self._rules.late = "virtio-features-missing"

    def new_life(self) -> None:
        """A reset over the same connection: replies are counted again."""
        self._replies = 0

    # ---- the end ----------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """The back-end is gone."""
        self._closed = True
        self._rules.cannot_be("vhost-user-gone")

    def speak(self) -> None:
        """A byte that nobody asked for."""
        self._out += b"\0"
