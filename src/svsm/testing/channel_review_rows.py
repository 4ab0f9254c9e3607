# SPDX-License-Identifier: MIT OR Apache-2.0
"""The rows of the channels' review: see `channel_review`."""

from __future__ import annotations

import functools
from typing import Final

from svsm.testing.review import Row

__all__ = ["ROWS"]


def _make(part: str, module: str, field: str, threat: str, check: str, without: str = "", target: str = "") -> Row:
    return Row(part, field, threat, module, check, without, target=target)


_line = functools.partial(_make, "Both devices: bring-up, buffers, time", "virtio_line")
_bring_up = functools.partial(
    _make,
    "Both devices: bring-up, buffers, time",
    "svsm.storage.drivers.virtio.transport",
    target="console-device",
)
_console = functools.partial(_make, "Console: ports and control messages", "virtio_console")
_packet = functools.partial(_make, "Socket device: packets and credit", "vsock_connection")
_device = functools.partial(_make, "Socket device: configuration, events, answers", "vsock")

ROWS: Final[tuple[Row, ...]] = (
    _bring_up(
        "DeviceID",
        "be another device than the one that was announced",
        "    if transport.device_type != device_type:\n",
        "    if False:\n",
    ),
    _bring_up(
        "features: VERSION_1, ACCESS_PLATFORM",
        "reach memory past the rules that a confidential VM needs",
        "    if missing:\n",
        "    if False:\n",
    ),
    _line(
        "len of a filled buffer, above what was written",
        "have earlier contents of shared memory taken for what it sent",
        "            self._memory.zero(self._offsets[slot], self.buffer_bytes)\n",
        "            pass\n",
    ),
    _line(
        "what of a buffer it reads",
        "read what an earlier use left behind the data",
        "        self.queue.resize(slot, 0, at - start, False)\n",
    ),
    _line(
        "nothing",
        "do nothing, and be waited for without end",
        "        if now >= deadline:\n",
        "        if False:\n",
    ),
    _line(
        "interrupts without news",
        "keep the driver busy without end",
        "        if self._fruitless > _FRUITLESS_TURNS:\n            self._pause(",
        "        if False:\n            self._pause(",
    ),
    _line(
        "NEEDS_RESET, FAILED",
        "have failed, and be waited for until the deadline",
        "        self.transport.check()\n",
    ),
    _line(
        "everything after its death",
        "come back to life unasked",
        "        if self._fault is not None:\n            raise self._fault\n",
        "        return\n",
    ),
    _console(
        "max_nr_ports, below our port",
        "have queues of a port that is not there used",
        "        if not port < ports <= _MOST_PORTS:\n",
        "        if not ports <= _MOST_PORTS:\n",
    ),
    _console(
        "max_nr_ports, above 511",
        "number queues that no transport has",
        "        if not port < ports <= _MOST_PORTS:\n",
        "        if not port < ports:\n",
    ),
    _console(
        "control: length",
        "have a message read that is not there",
        " or len(message) < ConsoleControl.SIZE:\n",
        " or False:\n",
    ),
    _console(
        "control: how many",
        "talk about ports without end",
        "if self._messages > _MOST_MESSAGES or ",
        "if False or ",
    ),
    _console(
        "control: id",
        "end our port with news of another one",
        "            if control.port == self._port:\n",
        "            if True:\n",
    ),
    _console(
        "DEVICE_ADD, twice",
        "have a port introduced again under a running exchange",
        "            if self.added:\n                raise",
        "            if False:\n                raise",
    ),
    _console(
        "any event before DEVICE_ADD",
        "open or close what is not there",
        "        elif not self.added:\n",
        "        elif False:\n",
    ),
    _console(
        "DEVICE_REMOVE",
        "take the port away, and be waited for",
        "        elif control.event == ConsoleEvent.DEVICE_REMOVE:\n",
        "        elif False:\n",
    ),
    _console(
        "PORT_OPEN 0, then 1",
        "have the bytes of a second visitor taken for the first one's",
        "self.closed = self.closed or (self.opened and not control.value)",
        "self.closed = self.opened and not control.value",
    ),
    _console(
        "PORT_OPEN 0 before any PORT_OPEN 1",
        "end the stream before it begins",
        "self.closed = self.closed or (self.opened and not control.value)",
        "self.closed = self.closed or not control.value",
    ),
    _console(
        "PORT_OPEN 0, to a reader",
        "be gone, and be waited for until the deadline",
        "                if self._control is not None and self._control.closed:\n                    return",
        "                if False:\n                    return",
    ),
    _console(
        "PORT_OPEN 0, to a writer",
        "be gone, and have what is sent called delivered",
        "                if rest and self._control is not None and self._control.closed:\n",
        "                if False:\n",
    ),
    _console(
        "len of a filled buffer, 0",
        "end the stream with an empty buffer",
        "            if data:\n",
        "            if True:\n",
    ),
    _console(
        "data faster than it is read",
        "have it all held",
        "                self._held.append((slot, memoryview(data)))\n",
        "                self._held.append((slot, memoryview(data)))\n                empty.append(slot)\n",
    ),
    _packet(
        "length of a packet, below 44",
        "have a header read that is not there",
        "        if len(packet) < VsockHeader.SIZE:\n",
        "        if False:\n",
    ),
    _packet(
        "len",
        "count other bytes than it wrote",
        "        if header.length != len(payload):\n",
        "        if False:\n",
    ),
    _packet(
        "src_cid",
        "be somebody else than the host",
        "header.source_cid != HOST_CID or ",
        "",
    ),
    _packet(
        "dst_cid",
        "deliver what is another guest's",
        " or header.destination_cid != self._cid:\n",
        ":\n",
    ),
    _packet(
        "src_port",
        "answer for another port of the host",
        "header.source_port == self._peer_port and ",
        "",
    ),
    _packet(
        "dst_port",
        "answer to another connection, of an earlier life",
        " and header.destination_port == self._port\n",
        "\n",
    ),
    _packet(
        "type",
        "have a packet of another kind of socket taken for the stream",
        "        if not ours or header.type != TYPE_STREAM:\n",
        "        if not ours:\n",
    ),
    _packet(
        "RST about nothing",
        "have resets answered with resets, without end",
        "            return None if header.operation == VsockOperation.RST else self._stray_reset(header)\n",
        "            return self._stray_reset(header)\n",
    ),
    _packet(
        "RST instead of RESPONSE",
        "refuse the connection, and be waited for",
        "            if self.state is VsockState.REQUESTED:\n",
        "            if False:\n",
    ),
    _packet(
        "op that does not exist",
        "end the connection, or be believed",
        "        if self.state is VsockState.RESET or operation not in _MEANINGFUL:\n",
        "        if self.state is VsockState.RESET:\n",
    ),
    _packet(
        "anything after RST",
        "bring a connection back that was broken",
        "        if self.state is VsockState.RESET or operation not in _MEANINGFUL:\n",
        "        if operation not in _MEANINGFUL:\n",
    ),
    _packet(
        "payload beside another op than RW",
        "hide bytes from the count",
        "        if payload and operation != VsockOperation.RW:\n",
        "        if False:\n",
    ),
    _packet(
        "op REQUEST",
        "connect to this side, where nobody listens",
        "        if operation == VsockOperation.REQUEST or (",
        "        if (",
    ),
    _packet(
        "op RESPONSE, twice or too late",
        "begin the connection again, or before it is accepted",
        " or (operation == VsockOperation.RESPONSE) is not asked:\n",
        ":\n",
    ),
    _packet(
        "fwd_cnt",
        "have taken what was never sent, and so have more sent than it has room for",
        "        if advance > (self._sent - self._peer_taken) & _MASK:\n",
        "        if False:\n",
    ),
    _packet(
        "buf_alloc below what is in flight",
        "make the window negative",
        "        return max(0, self._peer_buffer - in_flight)\n",
        "        return self._peer_buffer - in_flight & _MASK\n",
    ),
    _packet(
        "RW after SHUTDOWN",
        "speak after its last word",
        "        if self.peer_shutdown & VsockShutdown.SEND:\n            raise",
        "        if False:\n            raise",
    ),
    _packet(
        "RW beyond the credit",
        "have more held than there is room for",
        "        if len(self._received) + promised + len(payload) > self._buffer_bytes:\n",
        "        if False:\n",
    ),
    _packet(
        "RW within the room, beyond the credit",
        "use room that it was not told of",
        "len(self._received) + promised + len(payload)",
        "len(self._received) + len(payload)",
    ),
    _packet(
        "flags of SHUTDOWN, taken back",
        "go on after it has said goodbye",
        "            self.peer_shutdown |= VsockShutdown(",
        "            self.peer_shutdown = VsockShutdown(",
    ),
    _packet(
        "flags of SHUTDOWN, unknown",
        "mean what does not exist",
        "VsockShutdown(header.flags & (VsockShutdown.RECEIVE | VsockShutdown.SEND))",
        "VsockShutdown(header.flags)",
    ),
    _device(
        "features: NO_IMPLIED_STREAM without STREAM",
        "have streams asked of a device that has none",
        "        if line.features & VsockFeature.NO_IMPLIED_STREAM and not line.features & VsockFeature.STREAM:\n",
        "        if False:\n",
    ),
    _device(
        "guest_cid, reserved",
        "call this guest the host, or anybody",
        "self.cid in RESERVED_CIDS or ",
        "",
    ),
    _device(
        "guest_cid, upper 32 bits",
        "have an address that Linux cuts",
        " or self.cid >= _CID_LIMIT:\n",
        ":\n",
    ),
    _device(
        "packets about nothing, without end",
        "have answers to them kept without end",
        "            if answer is not None and len(self._answers) < _MOST_ANSWERS:\n",
        "            if answer is not None:\n",
    ),
    _device(
        "event: length",
        "have an event read that is not there",
        "len(event) < VsockEvent.SIZE or VsockEvent.parse(event[: VsockEvent.SIZE]).id",
        "int.from_bytes(event[: VsockEvent.SIZE])",
    ),
    _device(
        "event: id",
        "have an event that does not exist taken for the one that does",
        " or VsockEvent.parse(event[: VsockEvent.SIZE]).id != TRANSPORT_RESET:\n",
        ":\n",
    ),
    _device(
        "event: TRANSPORT_RESET",
        "have moved this guest, and go on as before",
        "        self._look_at_events()\n",
    ),
    _device(
        "RST, SHUTDOWN, to a writer",
        "be gone, and have what is sent called delivered",
        "                    self._demand_listener()\n",
        "                    pass\n",
    ),
    _device(
        "SHUTDOWN, to a reader",
        "be at the end, and be waited for until the deadline",
        "                if connection.peer_shutdown & VsockShutdown.SEND:\n",
        "                if False:\n",
    ),
    _device(
        "RST, to a reader",
        "break the stream, and be waited for until the deadline",
        "                if connection.state is VsockState.RESET:\n                    raise",
        "                if False:\n                    raise",
    ),
    _device(
        "buf_alloc, fwd_cnt, to a writer",
        "have no room, and get it all",
        "                    piece = rest[: min(window, self._outbox.buffer_bytes - VsockHeader.SIZE)]\n",
        "                    piece = rest[: self._outbox.buffer_bytes - VsockHeader.SIZE]\n",
    ),
)
