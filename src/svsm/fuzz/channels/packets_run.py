# SPDX-License-Identifier: MIT OR Apache-2.0
"""Programs against `VsockConnection` alone: the host's packets, and what this side reads and sends between them."""

from __future__ import annotations

from typing import Final

from svsm.abi.errors import SvsmError
from svsm.formats.virtio_vsock import HOST_CID, TYPE_STREAM, VsockHeader, VsockOperation
from svsm.fuzz.channels.rules import VsockRules
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import expect
from svsm.kernel.channels.vsock_connection import VsockConnection

__all__ = ["packets_run"]

_CID, _PORT, _PEER_PORT, _BUFFER = 3, 0x8000_0001, 9999, 4096
_MASK: Final = 0xFFFF_FFFF
_PAYLOAD: Final = bytes(at * 7 & 0xFF for at in range(5000))


class _Run:
    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        names = {"cid": _CID, "port": _PORT, "peer_port": _PEER_PORT, "buffer_bytes": _BUFFER}
        self._connection = VsockConnection(**names)
        self._rules = VsockRules(**names)
        self._read = 0

    def run(self) -> None:
        """Packets until one of them ends it."""
        choices, connection = self._choices, self._connection
        expect(connection.request().operation == VsockOperation.REQUEST, "a connection begins with a request")
        if choices.flag():
            self._take(self._honest(VsockOperation.RESPONSE, 0).pack())
        operations = (self._packet, self._receive, self._send, self._owed)
        while choices.more:
            operations[choices.below(4)]()
            self._compare()

    def _honest(self, operation: int, length: int) -> VsockHeader:
        choices = self._choices
        return VsockHeader(
            source_cid=HOST_CID,
            destination_cid=_CID,
            source_port=_PEER_PORT,
            destination_port=_PORT,
            length=length,
            type=TYPE_STREAM,
            operation=operation,
            flags=choices.below(8),
            buffer_bytes=choices.pick((0, 1, 100, 4096, _MASK)),
            forwarded=self._rules.sent & _MASK,
        )

    def _packet(self) -> None:
        choices = self._choices
        operation, kind = choices.below(9), choices.below(12)
        length = choices.pick((0, 1, 60, 1000, 4096, 4097)) if operation == VsockOperation.RW else 0
        header, payload = self._honest(operation, length), _PAYLOAD[:length]
        if kind == 1:
            header = header.replace(source_cid=choices.pick((0, 3, HOST_CID | 1 << 32)))
        elif kind == 2:
            header = header.replace(destination_cid=choices.pick((0, 2, _CID | 1 << 32)))
        elif kind == 3:
            header = header.replace(source_port=_PEER_PORT ^ 1)
        elif kind == 4:
            header = header.replace(destination_port=_PORT ^ 1 << choices.below(32))
        elif kind == 5:
            header = header.replace(type=choices.pick((0, 2, 0x101)))
        elif kind == 6:
            header = header.replace(forwarded=self._rules.sent + choices.pick((1, -1, -100, 1 << 31)) & _MASK)
        elif kind == 7:
            header = header.replace(length=choices.pick((0, length + 1, _MASK, 1)))
        elif kind == 8:
            payload += b"more"
        elif kind == 10:
            header, payload = header.replace(length=length + 4), payload + b"more"
        packet = header.pack() + payload
        self._take(packet[: choices.below(44)] if kind == 9 else packet)

    def _take(self, packet: bytes) -> None:
        owed = self._rules.hear(packet)
        try:
            answer = self._connection.take(packet)
        except SvsmError as error:
            expect(bool(self._rules.code), "an honest packet is refused")
            expect(error.code == self._rules.code, f"not refused for {self._rules.code}")
            raise
        expect(not self._rules.code, f"taken in spite of {self._rules.code}")
        expect((answer is not None) is owed, "strangers get RST, or nothing for an RST")
        expect(answer is None or answer.operation == VsockOperation.RST, "strangers get nothing but RST")

    def _receive(self) -> None:
        most = self._choices.pick((1, 100, 3000, 5000))
        data = self._connection.read(most)
        expect(data == self._rules.received[self._read : self._read + most], "what is read is what was sent")
        self._read += len(data)

    def _send(self) -> None:
        length = min(self._connection.window, 1 + self._choices.below(5000))
        if length:
            self._told(self._connection.data(length))
            self._rules.sent += length

    def _owed(self) -> None:
        rules, packet = self._rules, self._connection.owed()
        operation = None if packet is None else packet.operation
        if rules.reset_due:
            expect(operation == VsockOperation.RST, "a goodbye is answered with RST")
            rules.reset_due = False
        elif rules.asked and rules.state == "connected":
            expect(operation == VsockOperation.CREDIT_UPDATE, "a question for credit is answered")
        else:
            expect(operation in (None, VsockOperation.CREDIT_UPDATE), "nobody is reset who has not said goodbye")
        if packet is not None:
            self._told(packet)

    def _told(self, header: VsockHeader) -> None:
        expect(header.forwarded == self._read & _MASK, "what is said to be taken was taken")
        self._rules.told, self._rules.asked = self._read, False

    def _compare(self) -> None:
        connection, rules = self._connection, self._rules
        expect(connection.available == len(rules.received) - self._read, "what has arrived is there to be read")
        expect(connection.available <= _BUFFER, "the host has no more than its credit")
        expect(connection.state.value == rules.state, "the connection is in another state")
        expect(int(connection.peer_shutdown) == rules.shutdown, "what the host has shut down stays so")
        expect(connection.window == rules.window, "the window is what the host has room for")


def packets_run(data: bytes) -> None:
    """Run a program."""
    _Run(Choices(data)).run()
