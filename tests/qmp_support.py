# SPDX-License-Identifier: MIT OR Apache-2.0
"""QEMU's monitor protocol, as much of it as tests need."""

from __future__ import annotations

import json
import socket
from typing import Any

__all__ = ["Monitor"]


class Monitor:
    """One connection, ready for commands; the socket stays the caller's."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        self._connection = connection
        self._received = b""
        assert self.ask("qmp_capabilities") == {}

    def ask(self, command: str, **arguments: object) -> Any:
        """What it returns; events and the greeting are passed over."""
        request = {"execute": command, "arguments": arguments}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._line())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def _line(self) -> bytes:
        while b"\n" not in self._received:
            part = self._connection.recv(4096)
            assert part, "QEMU closed its monitor"
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def resize(self, node: str, size_bytes: int) -> None:
        """``block_resize``, and one more turn of the main loop: devices are told in the one after the answer."""
        assert self.ask("block_resize", **{"node-name": node, "size": size_bytes}) == {}
        self.ask("query-status")
