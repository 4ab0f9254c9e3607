# SPDX-License-Identifier: MIT OR Apache-2.0
"""A vhost-user back-end in Python: our virtio-blk device model behind a socket, with a script for what it says.

Honest by itself, so that rings that qemu-storage-daemon does not offer (packed) can be driven over this transport.
A `Script` sees each message and the honest answer, and decides what is sent instead: nothing, garbage, one byte at a
time, descriptors. The device model is `svsm.host.devices`, or the hostile one of `svsm.testing.hostile`. Messages
become accesses to its registers and answers are what these then say, so a device that lies about a register lies here
too: features, configuration, whether it accepts features and queues. A device that has failed says so on the error
eventfds; one that asks for a reset ends the conversation, as libvhost-user does. A front-end's memory may be in pieces
(a machine's is).

    backend = Backend(descriptor, BlkOptions())
    driver = VhostUserBlk(backend.endpoint)
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.formats.vhost_user import (
    NO_DESCRIPTOR,
    QUEUE_INDEX_MASK,
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
from svsm.formats.virtio import DeviceStatus, Feature, MmioRegister
from svsm.host.devices.virtio_blk import BlkBackend, BlkOptions
from svsm.host.devices.virtio_mmio import MmioBlk
from svsm.host.devices.virtio_ring import Window

__all__ = ["PROTOCOL_FEATURES", "Backend", "Conversation", "Script", "reply"]

PROTOCOL_FEATURES: Final = int(ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)
_FEATURES_OK = int(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK)
_MOST_DESCRIPTORS = 8
_DESCRIPTOR_BYTES = array.array("i").itemsize
_JOIN_SECONDS = 10.0

Script = Callable[["Conversation", Request, bytes], bytes]
"""(conversation, what was asked, the honest answer or b"") → the bytes to send."""


def reply(request: int, payload: bytes, *, flags: int = VERSION | HeaderFlag.REPLY, size: int | None = None) -> bytes:
    """One answer, right or wrong."""
    return MessageHeader(request, flags, len(payload) if size is None else size).pack() + payload


class _Regions(Window):
    """Guest memory in several pieces, none of which continues another."""

    def __init__(self, parts: list[Window]) -> None:
        largest = max(parts, key=lambda part: part.bytes.nbytes)
        super().__init__(largest.bytes, address=largest.address)
        self._parts = parts

    def _part(self, address: int, length: int) -> Window | None:
        for part in self._parts:
            if 0 <= address - part.address <= part.bytes.nbytes - length:
                return part
        return None

    def offset(self, address: int, length: int) -> int:
        """Within the piece that they are in."""
        part = self._part(address, length)
        return super().offset(address, length) if part is None else part.offset(address, length)

    def take(self, address: int, length: int) -> bytes:
        """A copy of guest bytes."""
        part = self._part(address, length)
        return super().take(address, length) if part is None else part.take(address, length)

    def put(self, address: int, data: bytes) -> None:
        """Store guest bytes."""
        part = self._part(address, len(data))
        if part is None:
            super().put(address, data)
        else:
            part.put(address, data)

    def u16(self, address: int, count: int) -> memoryview:
        """`count` words."""
        part = self._part(address, 2 * count)
        return super().u16(address, count) if part is None else part.u16(address, count)


class _Queue:
    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses = (0, 0, 0)
        self.kick = self.call = self.error = -1


class Backend:
    """What connections are made to.

    Args:
        disk: The disk, or the descriptor of its file; stays the caller's.
        options: What the device offers, with a descriptor.
        script: What is said instead; None is honest.
        protocol_features: What is offered of them.
        make: The device model's class.

    Attributes:
        requests: Everything that was asked, over all connections.
        answered: How many of them have been dealt with.
        interrupted: Called instead of a wake-up of the front-end; None wakes it.
        mapped: Sees the descriptor of the front-end's memory before it is closed.
    """

    def __init__(
        self,
        disk: int | BlkBackend,
        options: BlkOptions | None = None,
        *,
        script: Script | None = None,
        protocol_features: int = PROTOCOL_FEATURES,
        make: Callable[..., MmioBlk] = MmioBlk,
    ) -> None:
        self.disk = disk if isinstance(disk, BlkBackend) else BlkBackend(disk, options or BlkOptions())
        self.script = script
        self.protocol_features = protocol_features
        self.make = make
        self.requests: list[Request] = []
        self.answered = 0
        self.interrupted: Callable[[Conversation], None] | None = None
        self.mapped: Callable[[int], None] | None = None
        self.conversations: list[Conversation] = []

    def endpoint(self) -> socket.socket:
        """A new connection, served from a thread of its own."""
        front, back = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.serve(back)
        return front

    def serve(self, connected: socket.socket) -> Conversation:
        """Serve a connection that exists, from a thread of its own; it is owned from now on."""
        conversation = Conversation(self, connected)
        self.conversations.append(conversation)
        conversation.start()
        return conversation

    def join(self) -> None:
        """Wait until every conversation has ended; the other side must have closed."""
        while self.conversations:
            self.conversations.pop().finish()


class Conversation(threading.Thread):
    """One connection, back-end side.

    Attributes:
        socket: Blocking; a script may use it.
        device: The device model; its window is empty until there is memory.
        ended: Why the conversation is over, or None.
    """

    def __init__(self, backend: Backend, connected: socket.socket) -> None:
        super().__init__(daemon=True)
        self.backend = backend
        self.socket = connected
        self.device = backend.make(backend.disk, Window(memoryview(bytearray()), address=0))
        self.device._interrupt = self._interrupt
        self.ended: BaseException | None = None
        self._acknowledging = False
        self._enabled = False
        self._regions: list[MemoryRegion] = []
        self._queues: dict[int, _Queue] = {}
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """End it, whatever it is doing, and wait."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        os.write(self._stop_write, b"x")
        self.join(_JOIN_SECONDS)
        # Only now: while the thread lives, another file could get these numbers.
        os.close(self._stop_read)
        os.close(self._stop_write)

    def run(self) -> None:
        """Until the front-end leaves, or something in a ring or message makes no sense."""
        try:
            while self._turn():
                pass
        except (OSError, EOFError, ValueError, SvsmError) as error:
            self.ended = error
        finally:
            self._end()

    def _end(self) -> None:
        self.socket.close()
        for queue in self._queues.values():
            for descriptor in (queue.kick, queue.call, queue.error):
                if descriptor >= 0:
                    os.close(descriptor)
        self._queues.clear()

    def _turn(self) -> bool:
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.register(self._stop_read, select.POLLIN)
        kicks = {queue.kick for queue in self._queues.values() if queue.kick >= 0}
        for kick in kicks:
            poller.register(kick, select.POLLIN)
        ready = [descriptor for descriptor, _ in poller.poll()]
        if self._stop_read in ready:
            return False
        for kick in kicks.intersection(ready):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(kick)
            self.device.write32(MmioRegister.QUEUE_NOTIFY, 0)
            if self.device.status & DeviceStatus.NEEDS_RESET:
                return False  # as libvhost-user does
            if self.device.status & DeviceStatus.FAILED:
                self._report_errors()
        if self.socket.fileno() in ready:
            self._serve()
        return True

    def _serve(self) -> None:
        header, descriptors = self._take(MessageHeader.SIZE)
        message = MessageHeader.parse(header)
        payload, more = self._take(message.size)
        request = Request(message.request)
        self.backend.requests.append(request)
        answer = self._answer_to(request, payload, descriptors + more)
        acknowledged = self._acknowledging and message.flags & HeaderFlag.NEED_REPLY
        self.backend.answered += 1
        data = b""
        if answer is not None and (acknowledged or request.name.startswith("GET_")):
            data = reply(request, answer)
        if self.backend.script is not None:
            data = self.backend.script(self, request, data)
        self.socket.sendall(data)

    def _take(self, length: int) -> tuple[bytes, list[int]]:
        data, descriptors = b"", array.array("i")
        while len(data) < length:
            room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR_BYTES)
            part, ancillary, _, _ = self.socket.recvmsg(length - len(data), room)
            if not part:
                raise EOFError
            data += part
            for _, _, content in ancillary:
                descriptors.frombytes(content)
        return data, list(descriptors)

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _answer_to(self, request: Request, payload: bytes, descriptors: list[int]) -> bytes | None:
        """The answer's payload: of a GET, or of an acknowledgement."""
        if request is Request.GET_FEATURES:
            return U64Payload(self._features() | VhostFeature.PROTOCOL_FEATURES).pack()
        if request is Request.GET_PROTOCOL_FEATURES:
            return U64Payload(self.backend.protocol_features).pack()
        if request is Request.SET_PROTOCOL_FEATURES:
            # From the next message on: this one is answered only where that was agreed before.
            self._acknowledging = bool(U64Payload.parse(payload).value & ProtocolFeature.REPLY_ACK)
            return None
        if request is Request.GET_QUEUE_NUM:
            return U64Payload(self.backend.disk.options.queues).pack()
        if request is Request.GET_CONFIG:
            header = ConfigHeader.parse_at(payload, 0)
            part = self._configuration()[header.offset : header.offset + header.size]
            return header.pack() + part if len(part) == header.size else b""
        if request is Request.SET_FEATURES:
            return U64Payload(0 if self._set_features(U64Payload.parse(payload).value) else 1).pack()
        if request is Request.SET_MEM_TABLE:
            self._map(payload, descriptors)
        elif request is not Request.SET_OWNER:
            return self._handle_vring(request, payload, descriptors)
        return U64Payload(0).pack()

    def _handle_vring(self, request: Request, payload: bytes, descriptors: list[int]) -> bytes:
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            value = U64Payload.parse(payload).value
            queue = self._queues.setdefault(value & QUEUE_INDEX_MASK, _Queue())
            descriptor = -1 if value & NO_DESCRIPTOR else descriptors[0]
            setattr(queue, {12: "kick", 13: "call", 14: "error"}[request], descriptor)
            taken = request is not Request.SET_VRING_KICK or self._ready(value & QUEUE_INDEX_MASK, queue)
            return U64Payload(0 if taken else 1).pack()
        if request is Request.SET_VRING_ADDR:
            address = VringAddress.parse(payload)
            queue = self._queues.setdefault(address.index, _Queue())
            queue.addresses = (address.descriptors, address.available, address.used)
            return U64Payload(0).pack()
        state = VringState.parse(payload)
        queue = self._queues.setdefault(state.index, _Queue())
        if request is Request.SET_VRING_NUM:
            queue.size = state.value
        elif request is Request.SET_VRING_BASE:
            queue.base = state.value
        elif request is Request.SET_VRING_ENABLE:
            self._go()
        elif request is Request.GET_VRING_BASE:
            self._write(MmioRegister.STATUS, 0)
            for descriptor in (queue.kick, queue.call, queue.error):
                if descriptor >= 0:
                    os.close(descriptor)
            del self._queues[state.index]
            return VringState(state.index, queue.base).pack()
        return U64Payload(0).pack()

    # ---- the device -------------------------------------------------------------------------------------------------

    def _map(self, payload: bytes, descriptors: list[int]) -> None:
        table = MemoryTable.parse_at(payload, 0)
        self._regions = list(MemoryRegion.iter_parse(payload[MemoryTable.SIZE :]))
        if len(self._regions) != table.regions or len(descriptors) != table.regions:
            raise ValueError("a region without a descriptor")
        parts = []
        for region, descriptor in zip(self._regions, descriptors, strict=True):
            mapped = mmap.mmap(descriptor, region.size, mmap.MAP_SHARED, offset=region.mmap_offset)
            parts.append(Window(memoryview(mapped), address=region.guest_address))
            if self.backend.mapped is not None:
                self.backend.mapped(descriptor)
            os.close(descriptor)
        self.device.window = parts[0] if len(parts) == 1 else _Regions(parts)

    def _interrupt(self) -> None:
        if self.backend.interrupted is not None:
            self.backend.interrupted(self)
        else:
            self.wake()

    def wake(self, count: int = 1) -> None:
        """Signal the call eventfd of every queue; a counter that is full stays so."""
        for queue in self._queues.values():
            if queue.call >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(queue.call, count)

    def kicks(self) -> list[int]:
        """The kick eventfds that this side holds."""
        return [queue.kick for queue in self._queues.values() if queue.kick >= 0]

    def _report_errors(self) -> None:
        for queue in self._queues.values():
            if queue.error >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(queue.error, 1)

    def _write(self, register: int, value: int) -> None:
        self.device.write32(register, value)

    def _features(self) -> int:
        features = 0
        for select_word in (0, 1):
            self._write(MmioRegister.DEVICE_FEATURES_SELECT, select_word)
            features |= self.device.read32(MmioRegister.DEVICE_FEATURES) << 32 * select_word
        return features

    def _configuration(self) -> bytes:
        length = len(self.backend.disk.configuration()) // 4 * 4
        words = (self.device.read32(MmioRegister.CONFIG + at) for at in range(0, length, 4))
        return b"".join(word.to_bytes(4, "little") for word in words)

    def _set_features(self, features: int) -> bool:
        self._enabled = not features & VhostFeature.PROTOCOL_FEATURES  # then nobody will send SET_VRING_ENABLE
        features &= ~int(VhostFeature.PROTOCOL_FEATURES)
        self._write(MmioRegister.STATUS, 0)
        for select_word in (0, 1):
            self._write(MmioRegister.DRIVER_FEATURES_SELECT, select_word)
            self._write(MmioRegister.DRIVER_FEATURES, features >> 32 * select_word & 0xFFFF_FFFF)
        self._write(MmioRegister.STATUS, _FEATURES_OK)
        return bool(self.device.read32(MmioRegister.STATUS) & DeviceStatus.FEATURES_OK)

    def _ready(self, index: int, queue: _Queue) -> bool:
        packed = bool(self.device.driver_features & Feature.RING_PACKED)
        if queue.base != (0x8000_8000 if packed else 0):
            raise ValueError("a ring that does not begin at its start")
        self._write(MmioRegister.QUEUE_SELECT, index)
        self._write(MmioRegister.QUEUE_SIZE, queue.size)
        for part, register in enumerate(
            (MmioRegister.QUEUE_DESCRIPTORS_LOW, MmioRegister.QUEUE_DRIVER_LOW, MmioRegister.QUEUE_DEVICE_LOW)
        ):
            low, high = struct.unpack("<II", struct.pack("<Q", self._guest(queue.addresses[part])))
            self._write(register, low)
            self._write(register + 4, high)
        self._write(MmioRegister.QUEUE_READY, 1)
        if self._enabled:
            self._go()
        return bool(self.device.read32(MmioRegister.QUEUE_READY))

    def _go(self) -> None:
        """From now on rings are looked at; a kick may have come, and gone, before."""
        self._write(MmioRegister.STATUS, _FEATURES_OK | DeviceStatus.DRIVER_OK)
        self.device.service()

    def _guest(self, user_address: int) -> int:
        for region in self._regions:
            offset = user_address - region.user_address
            if 0 <= offset < region.size:
                return region.guest_address + offset
        raise ValueError("a ring outside the memory table")
