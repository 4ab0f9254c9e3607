# SPDX-License-Identifier: MIT OR Apache-2.0
"""The broker's key files: created once, atomically, readable by the broker's user alone.

A file that others can read, that is a link, or that belongs to somebody else is refused rather than repaired: its
content may be known already.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from svsm.formats.errors import BackendError, StateError

__all__ = ["private_directory", "read_or_create"]

_MAX_BYTES = 4096


def private_directory(path: Path) -> None:
    """Make sure that `path` is a directory of ours with mode 0700.

    Raises:
        StateError: ``broker-state-exposed``.
        BackendError: ``broker-state-io``.
    """
    try:
        if not path.exists():
            # A missing parent is a state directory of ours, and private too.
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise _io(error, path) from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise _exposed(path)


def read_or_create(path: Path, make: Callable[[], bytes], *, may_create: bool) -> bytes:
    """The file's bytes, which `make` supplies the first time.

    Args:
        path: The file.
        make: Gives the content of a new file.
        may_create: False where a missing file means that something was lost.

    Raises:
        StateError: ``broker-state-exposed`` or ``broker-key-missing``.
        BackendError: ``broker-state-io``.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        if not may_create:
            raise StateError(
                "the broker's database exists, and one of its keys does not",
                code="broker-key-missing",
                hint="restore the file from your backup; without it no stored key can be opened",
                path=str(path),
            ) from None
    except OSError as error:
        raise _io(error, path) from None
    try:
        _create(path, make())
        return _read(path)
    except OSError as error:
        raise _io(error, path) from None


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        private = stat.S_ISREG(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
        if not private or found.st_uid != os.geteuid():
            raise _exposed(path)
        return os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)


def _create(path: Path, content: bytes) -> None:
    # Written under another name and linked: whoever finds the name finds the whole content, and two creators at the
    # same time agree on the first one's.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        os.close(descriptor)
        os.unlink(temporary)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _exposed(path: Path) -> StateError:
    return StateError(
        "the broker's state is not private",
        code="broker-state-exposed",
        hint="it must belong to the broker's user and be closed to all others (directories 0700, files 0600)",
        path=str(path),
    )


def _io(error: OSError, path: Path) -> BackendError:
    return BackendError(
        f"the broker's state cannot be used: {error.strerror}",
        code="broker-state-io",
        hint="name a directory that the broker's user may write, on a disk with room and with hard links, with --state",
        path=str(path),
        errno=error.errno,
    )
