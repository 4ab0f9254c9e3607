# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sealing memory of which somebody holds a page: waited for, for a while."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from svsm.confine import sealing
from svsm.kernel import loader

Seal = Callable[[int], None]
SEALS = [
    pytest.param(sealing.seal, id="confine"),
    pytest.param(lambda descriptor: loader._seal(descriptor, "a file"), id="loader"),
]


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("m", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, bytes(4096))
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("seal", SEALS)
def test_pages_that_are_held_for_longer_than_the_system_waits(seal: Seal, memory: int, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.lseek(memory, 0, os.SEEK_SET)
    assert os.splice(memory, writer, 4096) == 4096  # the pipe holds the page itself, not a copy
    with pytest.raises(OSError, match="busy"):
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    release = threading.Timer(0.2, os.read, (reader, 4096))
    release.start()
    seal(memory)
    release.join()
    assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) == sealing.ALL_SEALS


def _always(code: int) -> Callable[..., int]:
    def refuse(*_arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    return refuse


def test_it_ends(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", _always(errno.EBUSY))
    with pytest.raises(OSError, match="busy"):
        sealing.seal(memory)
    with pytest.raises(loader.Refusal) as refused:
        loader._seal(memory, "a file")
    assert refused.value.code == "payload-archive"


@pytest.mark.parametrize("seal", SEALS)
def test_other_failures_are_not_tried_again(seal: Seal, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", _always(errno.EPERM))
    with pytest.raises(PermissionError):
        seal(memory)
