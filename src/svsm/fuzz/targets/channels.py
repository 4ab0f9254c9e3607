# SPDX-License-Identifier: MIT OR Apache-2.0
"""The channels that the key comes over, with the attacker in the device's seat: see `svsm.fuzz.channels`."""

from __future__ import annotations

from svsm.fuzz.channels.console_run import ConsoleRun
from svsm.fuzz.channels.packets_run import packets_run
from svsm.fuzz.channels.vsock_run import VsockRun
from svsm.fuzz.target import Target

__all__ = ["ROWS"]


def _console(data: bytes) -> None:
    ConsoleRun(data).run()


def _vsock(data: bytes) -> None:
    VsockRun(data).run()


_SEEDS = [
    bytes([0, 2, 0, 0, 0, *(4, 200), *(33, 2, 0, 1), 1, 17]),
    bytes([5, 3, 0, 0, 0, *(4, 100), 1, 3, 1, 0, 1, 17]),
    bytes([4, 1, 1, 1, *(4, 100), 1]),  # a ring that lies
    bytes([4, 0, 3, 0]),  # another device
]

ROWS = (
    Target(
        "vsock-packets",
        "packets of a host to the key's vsock connection",
        packets_run,
        lambda: [b"\1" + bytes(40), b"\1" + bytes([0, 5, 0, 0, 3, 1, 0, 1, 100, 2, 50, 3]) * 4],
        max_bytes=256,
    ),
    Target(
        "vsock-device",
        "a virtio socket device that lies, on each ring",
        _vsock,
        lambda: _SEEDS,
        max_bytes=128,
    ),
    Target(
        "console-device",
        "a virtio console that lies, on each ring, with one port and with several",
        _console,
        lambda: _SEEDS,
        max_bytes=128,
    ),
)
