# SPDX-License-Identifier: MIT OR Apache-2.0
"""The format read twice: a decoder that shares nothing with the library comes to the same files and digests."""

from __future__ import annotations

import ast
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.memory import MemoryDevice
from tests.support import vectors
from tests.vectors import second_reading
from tests.vectors.second_reading import Mismatch, SecondReading

THREE = ["crypto-sha3-camellia-256", "frag-chained-list", "geo-ab4k"]


def _images() -> list[dict[str, Any]]:
    loaded = json.loads((vectors("cocoonfs") / "manifest.json").read_text())
    return [entry for entry in loaded["images"] if entry["state"] == "clean"]


def _read(entry: dict[str, Any]) -> bytes:
    data = (vectors("cocoonfs") / entry["file"]).read_bytes()
    return lzma.decompress(data) if entry["compression"] == "xz" else data


def _check(entry: dict[str, Any]) -> int:
    image, key = _read(entry), bytes.fromhex(entry["key"])
    found = SecondReading(image, key)
    described = {int(inode): (file["flags"], file["length"], file["sha256"]) for inode, file in entry["files"].items()}
    assert described == {
        inode: (flags, len(data), hashlib.sha256(data).hexdigest()) for inode, (flags, data) in found.files.items()
    }
    volume = Volume.open(MemoryDevice(image, block_size_bytes=128), key)
    assert {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()} == found.files
    return found.digests


def test_it_shares_nothing() -> None:
    """No import of the library, directly or by way of the tests."""
    source = Path(second_reading.__file__).read_text()
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    assert {name.split(".")[0] for name in imported} == {
        "__future__",
        "collections",
        "cryptography",
        "dataclasses",
        "zlib",
    }
    assert "import_module" not in source
    assert "__import__" not in source


@pytest.mark.parametrize("name", THREE)
def test_three_images(name: str) -> None:
    entry = next(entry for entry in _images() if entry["name"] == name)
    digests = _check(entry)
    print(f"{name}: {digests} digests")
    assert digests > 90


@pytest.mark.long
def test_all_clean_images() -> None:
    digests = [_check(entry) for entry in _images()]
    print(f"{len(digests)} images, {sum(digests)} digests")
    assert len(digests) >= 56


def test_it_refuses() -> None:
    """Not anything goes: a changed byte of a file, another key."""
    entry = next(entry for entry in _images() if entry["name"] == "crypto-sha2-aes-128")
    image, key = bytearray(_read(entry)), bytes.fromhex(entry["key"])
    with pytest.raises(Mismatch, match="entry leaf"):
        SecondReading(bytes(image), b"another key")
    volume = Volume.open(MemoryDevice(image, block_size_bytes=128), key)
    pointer = volume.image.find(19)
    assert pointer is not None
    image[volume.image.extents_of(pointer)[0][0][0] * 128 + 40] ^= 1
    with pytest.raises(Mismatch, match="digest of data block"):
        SecondReading(bytes(image), key)
