# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sockets of an instance: Unix sockets for their owner only, pairs of loopback ports, connections to others."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from svsm.formats.errors import BackendError, StateError

__all__ = ["BACKLOG", "connect", "connect_serial", "listen", "tcp_pair"]

BACKLOG = 16
_TRIES = 64


def listen(path: Path) -> socket.socket:
    """A listening Unix stream socket at `path`, mode 0600.

    Raises:
        StateError: ``boot-socket``.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as failed:
        listener.close()
        raise StateError(
            f"cannot listen on {path}: {failed}",
            code="boot-socket",
            hint="a Unix socket's path has at most 107 bytes: choose a shorter --state",
        ) from failed
    finally:
        os.umask(previous)
    return listener


def tcp_pair(port: int) -> tuple[socket.socket, socket.socket]:
    """Two listening sockets on neighbouring loopback ports, data and control; port 0 picks a free pair.

    Raises:
        StateError: ``boot-socket``.
    """
    for _ in range(_TRIES if port == 0 else 1):
        try:
            data = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
        except OSError:
            continue
        try:
            return data, socket.create_server(("127.0.0.1", data.getsockname()[1] + 1), backlog=BACKLOG)
        except (OSError, OverflowError):
            data.close()
    raise StateError("no two neighbouring ports are free", code="boot-socket", hint="name another port", port=port)


def connect(path: Path) -> int:
    """A connection to a Unix stream socket; OSError where nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        return connection.detach()


def connect_serial(path: Path) -> int:
    """The serial line: a connection to the proxy.

    Raises:
        BackendError: ``serial-connect``.
    """
    try:
        return connect(path)
    except OSError as failed:
        raise BackendError(
            f"no proxy listens on {path}: {failed.strerror}",
            code="serial-connect",
            hint="start one with: svsm proxy --url URL --serial SOCKET",
        ) from failed
