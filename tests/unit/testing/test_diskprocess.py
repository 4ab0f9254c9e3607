# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disk as a program of its own: it serves a file on a socket, and SIGKILL drops what was not flushed."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.remote import RemoteDevice
from svsm.testing import diskprocess


def _start(path: Path, address: Path, *more: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    address.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "svsm.testing.diskprocess", str(path), str(address), *more])
    deadline = time.monotonic() + 20
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(address))
        except OSError:
            connection.close()
            assert time.monotonic() < deadline
            time.sleep(0.01)
            continue
        return process, connection


def test_program(tmp_path: Path) -> None:
    path, address = tmp_path / "disk", tmp_path / "socket"
    path.write_bytes(bytes(64 << 10))
    process, connection = _start(path, address)
    device = RemoteDevice(connection)
    volume = Volume.create(device, b"key", salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, b"acknowledged")
    device.write([(63 << 10, b"lost" * 128)])
    assert device.read([(63 << 10, 512)]) == [b"lost" * 128]
    process.kill()
    process.wait()
    device.close()
    assert b"lost" * 128 not in path.read_bytes()
    process, connection = _start(path, address)
    device = RemoteDevice(connection)
    assert Volume.open(device, b"key").read(16) == b"acknowledged"
    device.close()
    process.kill()
    process.wait()


def test_torn_cache(tmp_path: Path) -> None:
    """Some of what was in the cache, and nothing else, may be on the disk after a power cut."""
    path, spill = tmp_path / "disk", tmp_path / "spill"
    path.write_bytes(bytes(64 << 10))
    process, connection = _start(path, tmp_path / "socket", str(spill))
    device = RemoteDevice(connection)
    device.write([(0, b"flushed " * 64)])
    device.flush()
    device.write([(0, b"lost" * 128), (4096, b"torn" * 1024)])
    process.kill()
    process.wait()
    device.close()
    before = path.read_bytes()
    assert before == (b"flushed " * 64).ljust(64 << 10, b"\0")
    seen = set()
    for seed in range(20):
        path.write_bytes(before)
        diskprocess.tear(path, spill, seed=seed)
        after = path.read_bytes()
        for at in range(0, len(after), 128):
            written = b"lost" * 32 if at < 512 else b"torn" * 32 if 4096 <= at < 8192 else before[at : at + 128]
            assert after[at : at + 128] in (before[at : at + 128], written)
        seen.add(after)
    assert len(seen) > 10


def test_usage() -> None:
    assert diskprocess.main([]) == 2
