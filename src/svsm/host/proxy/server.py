# SPDX-License-Identifier: MIT OR Apache-2.0
"""Accepts kernels' connections: one thread each, a bounded number, none able to end the others."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import stat
import threading
from pathlib import Path

from svsm.formats.errors import StateError, SvsmError
from svsm.host.proxy.relay import Limits, relay

__all__ = ["listen", "serve"]

_log = logging.getLogger(__name__)
_BACKLOG = 64


def listen(path: Path, *, replace: bool) -> socket.socket:
    """A listening Unix socket at `path`, for its owner only.

    Args:
        replace: Take the place of a socket that nobody listens on any more.

    Raises:
        StateError: ``proxy-socket-exists`` when something is there that may not be replaced.
    """
    if path.exists() or path.is_symlink():
        if not replace or not stat.S_ISSOCK(path.lstat().st_mode) or _answers(path):
            raise StateError(
                f"{path} exists already",
                code="proxy-socket-exists",
                hint="--force replaces a socket that nobody listens on any more",
            )
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(_BACKLOG)
    except OSError as failed:
        listener.close()
        raise StateError(
            f"cannot listen on {path}", code="proxy-socket", hint="name a path of at most 107 bytes in your own folder"
        ) from failed
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def serve(listener: socket.socket, url: str, *, limits: Limits | None = None, stop: int | None = None) -> None:
    """Relay every connection of `listener` to the broker at `url` until `stop` (a descriptor) is readable.

    A connection over the limit is closed at once, without an answer.
    """
    chosen = limits if limits is not None else Limits()
    places = threading.BoundedSemaphore(chosen.connections)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        if stop is not None:
            selector.register(stop, selectors.EVENT_READ)
        while True:
            if any(key.fd == stop for key, _ in selector.select()):
                return
            try:
                connection, _ = listener.accept()
            except OSError as failed:
                _log.warning("a connection could not be accepted: %s", failed)
                continue
            if not places.acquire(blocking=False):
                _log.warning("more than %d connections: one refused", chosen.connections)
                connection.close()
                continue
            threading.Thread(target=_carry, args=(connection, url, chosen, places), daemon=True).start()


def _carry(connection: socket.socket, url: str, limits: Limits, places: threading.BoundedSemaphore) -> None:
    try:
        relay(connection, url, limits)
    except (SvsmError, OSError) as ended:
        _log.warning("a connection ended: %s", ended)
    finally:
        with contextlib.suppress(OSError):
            connection.close()
        places.release()
