# SPDX-License-Identifier: MIT OR Apache-2.0
"""Programs against the vsock channel: see `line_run`. Credit is the subject of `packets_run`: this host counts well."""

from __future__ import annotations

from typing import Final

from svsm.formats.virtio_vsock import HOST_CID, TYPE_STREAM, VsockConfig, VsockFeature, VsockHeader, VsockOperation
from svsm.fuzz.channels.line_run import POLICY, Echo, LineRun
from svsm.fuzz.channels.rules import VsockRules
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import expect
from svsm.host.devices.virtio_vsock import VsockBackend, VsockOptions
from svsm.kernel.channels.vsock import VsockChannel, VsockPolicy

__all__ = ["VsockRun"]

_CID, _PORT, _PEER_PORT, _BUFFER = 3, 0x8000_0001, 9999, 1024
_RECEIVE, _TRANSMIT, _EVENT = 0, 1, 2
_MOST_ANSWERS: Final = 16
_CIDS: Final = (0, 1, HOST_CID, 0xFFFF_FFFF, 1 << 32 | 3)
_RESET: Final = bytes(4)


class _Streamless(VsockOptions):
    """A device that says that it has no streams."""

    @property
    def features(self) -> int:
        """Nothing is implied, and nothing is there."""
        return self.common | int(VsockFeature.NO_IMPLIED_STREAM)


class VsockRun(LineRun):
    """Over a virtio socket device."""

    rules: VsockRules
    channel: VsockChannel

    def __init__(self, data: bytes) -> None:
        self._flood = False
        self._events = ""
        super().__init__(data)

    def backend(self) -> VsockBackend:
        """Somebody listens, or nobody does; with much room, or little."""
        self.rules = VsockRules(cid=_CID, port=_PORT, peer_port=_PEER_PORT, buffer_bytes=_BUFFER)
        nobody = self.form & 6 == 6
        options = VsockOptions(common=self.common, cid=_CID, buffer_bytes=100 if self.form & 1 else 64 << 10)
        return VsockBackend(lambda _port: None if nobody else Echo(), options)

    def open(self) -> VsockChannel:
        """The driver."""
        policy = VsockPolicy(port=_PEER_PORT, receive_bytes=_BUFFER, connect_seconds=0.1, line=POLICY)
        return VsockChannel(
            self.transport, self.memory, policy=policy, clock=self.clock, pause=self.clock.pause, port=_PORT
        )

    # ---- what goes over the wire ------------------------------------------------------------------------------------

    def heard(self, index: int, data: bytes) -> None:
        """Packets to the rules."""
        if index == _RECEIVE:
            self.rules.hear(data)
            self.delivered = self.rules.received
        elif index == _EVENT and not self._events:
            self._events = "channel-closed" if data[:4] == _RESET else "vsock-packet"

    def sent(self, index: int, data: bytes) -> None:
        """The guest keeps to its credit."""
        if index != _TRANSMIT:
            return
        header = VsockHeader.parse(data[: VsockHeader.SIZE])
        expect(header.length == len(data) - VsockHeader.SIZE, "a packet says how long it is")
        if header.destination_port == _PEER_PORT and header.operation != VsockOperation.RST:
            self.rules.told = max(self.rules.told, header.forwarded)
            self.rules.sent += header.length
        expect(self.rules.sent <= self.rules.limit, "more is sent than there is room for")

    def say(self, index: int, room: int) -> bytes | None:
        """The truth, or a packet of another kind."""
        choices = self.choices
        if self._flood and index == _RECEIVE:
            return self._packet(VsockOperation.RW).replace(source_port=1).pack()
        if not choices.more or (kind := choices.below(16)) < 4:
            return self.speaker.honest(index, room)
        if index == _EVENT:
            return (None, None, _RESET, b"\1\0\0\0", b"\0\0", b"")[choices.below(6)]
        return self._lie(kind, choices)

    def _packet(self, operation: int) -> VsockHeader:
        return VsockHeader(
            source_cid=HOST_CID,
            destination_cid=_CID,
            source_port=_PEER_PORT,
            destination_port=_PORT,
            length=0,
            type=TYPE_STREAM,
            operation=operation,
            flags=0,
            buffer_bytes=100 if self.form & 1 else 64 << 10,
            forwarded=self.rules._peer_taken & 0xFFFF_FFFF,
        )

    def _lie(self, kind: int, choices: Choices) -> bytes:
        if kind < 7:
            return self._packet(VsockOperation.SHUTDOWN).replace(flags=choices.below(5)).pack()
        if kind == 7:
            return self._packet(VsockOperation.RST).pack()
        if kind == 8:
            return self._packet(VsockOperation.RESPONSE).pack()
        if kind == 9:
            return self._packet(choices.pick((0, 1, 8, 0xFFFF))).pack()
        if kind == 10:
            return self._packet(VsockOperation.CREDIT_REQUEST).replace(source_port=7).pack()
        if kind == 11:
            self._flood = True
            return self._packet(VsockOperation.RW).replace(destination_port=7).pack()
        if kind == 12:
            return self._packet(VsockOperation.CREDIT_UPDATE).replace(length=1).pack()
        if kind == 13:
            return self._packet(VsockOperation.CREDIT_UPDATE).pack()[: choices.below(44)]
        return self._packet(VsockOperation.CREDIT_REQUEST).pack()

    # ---- what `LineRun` asks ----------------------------------------------------------------------------------------

    def misconfigure(self, choices: Choices) -> None:
        """Context ids that no guest has; a device without streams."""
        kind = choices.below(6)
        if kind < len(_CIDS):
            self.speaker.configured = VsockConfig(guest_cid=_CIDS[kind]).pack()
            self.expected_start = "vsock-cid"
        else:
            self.speaker.options = _Streamless(common=self.common)
            self.expected_start = "virtio-features-missing"

    def codes(self) -> tuple[str, ...]:
        """Events too."""
        return (*super().codes(), *([self._events] if self._events else []))

    @property
    def broken(self) -> bool:
        """Reset by the host."""
        return self.rules.state == "reset"

    def bounded(self) -> None:
        """What is held is the credit; answers to strangers are few."""
        expect(self.channel._connection.available <= _BUFFER, "the host has no more than its credit")
        expect(len(self.channel._answers) <= _MOST_ANSWERS, "strangers are remembered without end")
