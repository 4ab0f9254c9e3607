# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume` on a real block device: a loop device over a file."""

from __future__ import annotations

import os

from tests.unit.cli.volume.conftest import Bench
from tests.unit.storage.drivers.test_linux import Attach, attach

__all__ = ["attach"]  # a fixture: pytest finds it here


def test_every_kind_of_verb(bench: Bench, attach: Attach) -> None:
    bench.put("disk", bytes(256 << 10))
    device = attach(bench.folder / "disk")
    bench.refused(f"create {device} --key-file @key", "volume-exists")
    made = bench.json(f"create {device} --key-file @key --force --size 128KiB --profile tuned")
    assert made["size_bytes"] == 128 << 10
    bench.run(f"write {device} 16 @raw --key-file @key")
    assert bench.run(f"read {device} 16 --key-file @key") == bytes(range(32))
    info = bench.json(f"info {device} --key-file @key")
    assert (info["device_bytes"], info["size_bytes"], info["files"]) == (256 << 10, 128 << 10, 1)
    assert bench.json(f"check {device} --key-file @key")["good"]
    bench.refused(f"resize {device} 256KiB --key-file @key", "cocoonfs-exists")
    held = os.open(device, os.O_RDWR | os.O_EXCL)
    bench.refused(f"rm {device} 16 --key-file @key", "block-in-use")
    os.close(held)
    bench.run(f"provision {device} --force --salt aa")
    assert bench.json(f"info {device}")["size_bytes"] == 256 << 10
