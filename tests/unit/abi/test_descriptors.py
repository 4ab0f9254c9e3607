# SPDX-License-Identifier: MIT OR Apache-2.0
"""A descriptor is a connected stream socket, or it is closed."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from svsm.abi.descriptors import client_socket
from svsm.formats.errors import PolicyError


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _listener() -> int:
    return socket.create_server(("127.0.0.1", 0)).detach()


def _unconnected() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


def _datagram() -> int:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    right.close()
    return left.detach()


def _packets() -> int:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    right.close()
    return left.detach()


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _pipe() -> int:
    left, right = os.pipe()
    os.close(right)
    return left


def _folder() -> int:
    return os.open(Path("/"), os.O_RDONLY | os.O_DIRECTORY)


@pytest.mark.parametrize("make", [_listener, _unconnected, _datagram, _packets, _file, _pipe, _folder])
def test_anything_but_a_connected_stream_socket_is_closed(make: object) -> None:
    descriptor = make() if callable(make) else -1
    with pytest.raises(PolicyError) as caught:
        client_socket(descriptor)
    assert caught.value.code == "client-descriptor"
    assert not _is_open(descriptor)


def test_a_descriptor_that_is_not_open_is_refused() -> None:
    with pytest.raises(PolicyError):
        client_socket(987654)


def test_connected_unix_and_tcp_sockets_are_taken() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with right, client_socket(left.detach()) as taken:
        taken.send(b"x")
        assert right.recv(1) == b"x"
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with accepted, client_socket(client.detach()) as taken:
            assert taken.family == socket.AF_INET
            taken.send(b"y")
            assert accepted.recv(1) == b"y"
