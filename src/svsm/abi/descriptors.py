# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a descriptor must be before it is taken for a client connection.

Landlock does not cover received descriptors: whoever is handed an open file can read it, whatever the policy says.
So every descriptor that crosses a boundary is looked at before anybody reads from it, by the kernel (from the host)
and again by a service (from a client, with CMD_SET_DATAFD). Only `fstat`, `getsockopt` and `getpeername` are used.
"""

from __future__ import annotations

import os
import socket
import stat

from svsm.formats.errors import PolicyError

__all__ = ["client_socket"]


def client_socket(descriptor: int) -> socket.socket:
    """Take `descriptor` over as a connected stream socket (Unix or TCP); it is closed when it is anything else.

    Returns:
        The socket, which owns the descriptor. `family` is AF_UNIX, AF_INET or AF_INET6.

    Raises:
        PolicyError: ``client-descriptor``; the descriptor is closed then.
    """
    taken: socket.socket | None = None
    try:
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            taken = socket.socket(fileno=descriptor)
            if _usable(taken):
                taken.settimeout(None)
                return taken
    except OSError:
        pass
    if taken is not None:
        taken.close()
    else:
        _close(descriptor)
    raise PolicyError("a descriptor is not a connected stream socket", code="client-descriptor")


def _usable(candidate: socket.socket) -> bool:
    if candidate.type != socket.SOCK_STREAM or candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    if candidate.family in (socket.AF_INET, socket.AF_INET6):
        if candidate.proto != socket.IPPROTO_TCP:
            return False
        # A peer that asked for SO_LINGER would make our close() wait for it.
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
        candidate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    elif candidate.family != socket.AF_UNIX:
        return False
    candidate.getpeername()
    return True


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        return
