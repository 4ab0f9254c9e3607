# SPDX-License-Identifier: MIT OR Apache-2.0
"""A folder with keys and a small volume, and the command as main runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svsm.cli.main import main
from svsm.storage.cocoonfs import AuxMetadata, Volume
from svsm.storage.drivers.file import FileDevice

KEY = bytes(range(32))
STATE = 0x1_0000_0000


class Bench:
    """Runs `svsm volume` in a folder that holds `key`, `raw`, `wrong` and `image` (one file, 5 bytes, flags 3)."""

    def __init__(self, folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        self.folder = folder
        self.image = folder / "image"
        self._captured = capfdbinary

    def run(self, line: str, *, code: int = 0) -> bytes:
        """Run a command line; @ stands for the folder. What it wrote to stdout comes back."""

        words = [word.replace("@", f"{self.folder}/") for word in line.split()]
        self._captured.readouterr()
        found = main(["volume", *words])
        out = self._captured.readouterr()
        assert found == code, out.err.decode()
        self.stderr = out.err.decode()
        return out.out

    def json(self, line: str, *, code: int = 0) -> dict[str, Any]:
        """The same with --json."""
        found: dict[str, Any] = json.loads(self.run(f"{line} --json", code=code))
        assert found["schema"] == 1
        return found

    def refused(self, line: str, error: str, *, code: int = 1) -> dict[str, Any]:
        """Run what must fail with an error code; its details come back. The image stays as it is."""
        before = self.image.read_bytes() if self.image.is_file() else None
        found = self.json(line, code=code)
        assert found["code"] == error, self.stderr
        assert "error: " in self.stderr
        assert before is None or self.image.read_bytes() == before
        details: dict[str, Any] = found["details"]
        return details

    def files(self, name: str = "image", key: str = "key") -> dict[int, tuple[int, int]]:
        """inode -> (flags, length)"""
        return {
            file["inode"]: (file["flags"], file["bytes"])
            for file in self.json(f"ls @{name} --key-file @{key}")["files"]
        }

    def put(self, name: str, data: bytes) -> Path:
        """A file in the folder."""
        path = self.folder / name
        path.write_bytes(data)
        return path


@pytest.fixture
def bench(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Bench:
    """See `Bench`."""
    bench = Bench(tmp_path, capfdbinary)
    bench.put("image", bytes(64 << 10))
    bench.put("key", KEY.hex().encode() + b"\n")
    bench.put("raw", KEY)
    bench.put("wrong", b"\1" * 32)
    device = FileDevice(os.open(bench.image, os.O_RDWR))
    volume = Volume.create(device, KEY, salt=b"\xdd\xee\xff", aux=AuxMetadata(reserve_bytes=256))
    with volume.transaction() as transaction:
        transaction.write(STATE, b"state", 3)
    volume.close()
    return bench


@pytest.fixture
def unchanged(bench: Bench) -> Callable[[], bool]:
    """Whether the image is what it was when the test began."""
    before = bench.image.read_bytes()
    return lambda: bench.image.read_bytes() == before
