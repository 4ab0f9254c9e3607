# SPDX-License-Identifier: MIT OR Apache-2.0
"""The cached disk behind a virtio driver: SIGKILL drops what was not flushed, and only a flush keeps it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from svsm.storage.drivers.virtio.vhost_user import open_vhost_user
from svsm.testing.diskprocess import tear
from tests.support import await_listener

_KEPT, _LOST = b"kept" * 128, b"lost" * 128


def test_program(tmp_path: Path) -> None:
    path, address, spill = (tmp_path / name for name in ("disk", "socket", "spill"))
    path.write_bytes(bytes(64 << 10))
    process = subprocess.Popen(
        [sys.executable, "-m", "svsm.testing.vhost_user_disk", str(path), str(address), str(spill)]
    )
    try:
        await_listener(address, process)
        device = open_vhost_user(str(address))
        device.write([(0, _KEPT), (4096, _KEPT)])
        device.discard([(4096, 512)])
        device.flush()
        device.write([(512, _LOST)])
        assert device.read([(0, 512), (512, 512), (4096, 512)]) == [_KEPT, _LOST, bytes(512)]
    finally:
        process.kill()
        process.wait()
    device.close()
    content = path.read_bytes()
    assert (content[:512], content[512:]) == (_KEPT, bytes((64 << 10) - 512))
    spilled = spill.read_bytes()
    assert _LOST in spilled
    assert _KEPT not in spilled
    for seed in range(3):
        tear(path, spill, seed=seed)
        assert path.read_bytes()[512:1024].replace(b"lost", b"").strip(b"\0") == b""
