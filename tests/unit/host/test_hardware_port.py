# SPDX-License-Identifier: MIT OR Apache-2.0
"""The hardware's last words reach the host, however the channel ends."""

from __future__ import annotations

import socket

import pytest

from svsm.formats.errors import BackendError
from svsm.formats.snp.hardware_messages import HostCommand, Message
from svsm.host.hardware_port import HardwarePort


@pytest.fixture
def ends() -> tuple[HardwarePort, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return HardwarePort(ours), theirs


def last_words(hardware: socket.socket, text: bytes = b"the kernel ended") -> None:
    hardware.send(Message(HostCommand.ENDED, (0,), text).pack())
    hardware.close()


def test_a_command_that_was_left_unread(ends: tuple[HardwarePort, socket.socket]) -> None:
    port, hardware = ends
    port.stop()
    last_words(hardware)
    port.read_notice()
    notice = port.take_notice()
    assert notice is not None
    assert notice.kind == HostCommand.ENDED
    assert notice.payload == b"the kernel ended"
    with pytest.raises(BackendError, match="it hung up"):
        port.read_notice()
    port.close()


@pytest.mark.parametrize("unread", [True, False])
def test_a_command_to_hardware_that_is_gone(ends: tuple[HardwarePort, socket.socket], unread: bool) -> None:
    port, hardware = ends
    if unread:
        port.stop()
    hardware.send(Message(HostCommand.VMEXIT, (0,)).pack())
    last_words(hardware)
    with pytest.raises(BackendError, match="the hardware is gone"):
        port.ask(HostCommand.CPUID)
    kinds = []
    while (notice := port.take_notice()) is not None:
        kinds.append(notice.kind)
    assert kinds == [HostCommand.VMEXIT, HostCommand.ENDED]
    port.close()
