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


def _start(path: Path, address: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    address.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "svsm.testing.diskprocess", str(path), str(address)])
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


def test_usage() -> None:
    assert diskprocess.main([]) == 2
