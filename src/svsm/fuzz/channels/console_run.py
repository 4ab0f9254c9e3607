# SPDX-License-Identifier: MIT OR Apache-2.0
"""Programs against the console channel: see `line_run`."""

from __future__ import annotations

import struct
from typing import Final

from svsm.formats.virtio_console import ConsoleConfig, port_queues
from svsm.fuzz.channels.line_run import POLICY, Echo, LineRun
from svsm.fuzz.channels.rules import ConsoleRules
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import expect
from svsm.host.devices.virtio_console import ConsoleBackend, ConsoleOptions
from svsm.kernel.channels.virtio_console import ConsoleChannel, ConsolePolicy

__all__ = ["ConsoleRun"]

_CONTROL: Final = struct.Struct("<IHH")
_PORT, _CONTROL_QUEUE = 2, 2
_EVENTS: Final = (6, 6, 6, 6, 6, 1, 2, 4, 0, 3, 5, 7, 9, 0xFFFF)
_COUNTS: Final = (0, _PORT, 512, 1 << 31, 1)


class ConsoleRun(LineRun):
    """Over a virtio console, with one port or with several."""

    rules: ConsoleRules
    channel: ConsoleChannel

    def backend(self) -> ConsoleBackend:
        """One port, or four."""
        self._several, self._floods = bool(self.form & 1), self.form & 6 == 6
        self._port = _PORT if self._several else 0
        self.rules = ConsoleRules(self._port)
        self._receive_queue = port_queues(self._port)[0]
        ports = 4 if self._several else 1
        return ConsoleBackend(Echo(), ConsoleOptions(common=self.common, ports=ports, port=self._port))

    def open(self) -> ConsoleChannel:
        """The driver."""
        policy = ConsolePolicy(port=self._port, line=POLICY)
        return ConsoleChannel(self.transport, self.memory, policy=policy, clock=self.clock, pause=self.clock.pause)

    def heard(self, index: int, data: bytes) -> None:
        """Control messages to the rules, everything else is the stream."""
        if index == self._receive_queue:
            self.delivered += data
        elif index == _CONTROL_QUEUE:
            self.rules.hear(data)

    def sent(self, index: int, data: bytes) -> None:
        """The far end looks at it."""

    def say(self, index: int, room: int) -> bytes | None:
        """The truth, bytes of no sense, nothing in a buffer, or control messages."""
        choices = self.choices
        if self._floods:
            return _CONTROL.pack(7, 1, 1) if index == _CONTROL_QUEUE else None
        honest = 2 if self.rules.added or index != _CONTROL_QUEUE else 4  # nearly all that is said before is the end
        if not choices.more or (kind := choices.below(6)) < honest:
            return self.speaker.honest(index, room)
        if index != _CONTROL_QUEUE:
            return choices.raw(kind * 2) if kind < 5 else b""
        port = choices.pick((self._port, self._port, self._port, 0, 3, 1 << 31))
        message = _CONTROL.pack(port, choices.pick(_EVENTS), choices.below(2))
        return message[: choices.below(9)] if kind == 4 else message

    def misconfigure(self, choices: Choices) -> None:
        """Ports that are not there."""
        if self._several:
            self.speaker.configured = ConsoleConfig(ports=choices.pick(_COUNTS)).pack()
            self.expected_start = "console-port"

    def bounded(self) -> None:
        """What is held has its buffers behind it."""
        held = sum(len(data) for _, data in self.channel._held)
        expect(held <= POLICY.buffers * POLICY.buffer_bytes, "more is held than there are buffers for")
