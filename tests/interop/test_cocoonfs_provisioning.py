# SPDX-License-Identifier: MIT OR Apache-2.0
"""Announced volumes and auxiliary metadata, in turn with the reference program; volumes of every configuration."""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from svsm.storage.cocoonfs import AuxMetadata, Expected, Volume, provision, read_creation_info
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice
from tests.support import peer

pytestmark = pytest.mark.interop
KEY = hashlib.sha256(b"provisioning interop").digest()
A, B, C, D = (uuid.UUID(int=n << 96 | 9) for n in (1, 2, 3, 4))


def _data(seed: str, length: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(length)


class _Tool:
    def __init__(self, folder: Path) -> None:
        self._program = peer("cocoonfs")
        self._image, self._in, self._out = folder / "image", folder / "in", folder / "out"

    def run(self, *arguments: str, refused: bool = False) -> str:
        command = [str(self._program), "-i", str(self._image), "-f", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode != 0) == refused, done.stderr + done.stdout
        return done.stdout

    def give(self, device: MemoryDevice) -> None:
        self._image.write_bytes(device.data)

    def take(self) -> MemoryDevice:
        return MemoryDevice(self._image.read_bytes(), block_size_bytes=128)

    def files(self) -> dict[int, int]:
        listed = self.run("list-files", "-K", KEY.hex())
        return {int(line.split()[0]): int(line.split()[1], 16) for line in listed.splitlines()}

    def read(self, inode: int) -> bytes:
        self._out.unlink(missing_ok=True)
        self.run("read-file", "-K", KEY.hex(), "-o", str(self._out), str(inode))
        return self._out.read_bytes()

    def write(self, inode: int, data: bytes) -> None:
        self._in.write_bytes(data)
        self.run("write-file", "-K", KEY.hex(), "-i", str(self._in), str(inode))

    def aux(self) -> list[tuple[uuid.UUID, bytes]]:
        found: list[tuple[uuid.UUID, bytes]] = []
        for line in self.run("aux-fs-metadata", "list-entries").splitlines():
            kind = uuid.UUID(line.split()[0])
            index = sum(1 for known, _ in found if known == kind)
            self._out.unlink(missing_ok=True)
            self.run("aux-fs-metadata", "read-entry", "-o", str(self._out), str(kind), str(index))
            found.append((kind, self._out.read_bytes()))
        return found

    def edit_aux(self, *what: str, data: bytes = b"", key: bool = False) -> None:
        self._in.write_bytes(data)
        source = ["-i", str(self._in)] if what[0] == "add-entry" else []
        self.run("aux-fs-metadata", "edit", *(["-K", KEY.hex()] if key else []), what[0], *source, *what[1:])


@pytest.fixture
def tool(tmp_path: Path) -> _Tool:
    return _Tool(tmp_path)


def _entries(aux: AuxMetadata) -> list[tuple[uuid.UUID, bytes]]:
    return [(entry.kind, entry.data) for entry in aux.entries]


@pytest.mark.parametrize("reserve", [None, 1024])
def test_they_format_what_we_announce(tool: _Tool, reserve: int | None) -> None:
    aux = AuxMetadata(reserve_bytes=reserve).add(B, _data("b", 700)).add(A, b"")
    device = MemoryDevice(64 << 10, block_size_bytes=128)
    provision(device, salt=b"\xdd\xee", aux=aux)
    tool.give(device)
    assert tool.aux() == _entries(aux)
    tool.write(16, b"theirs")
    opened = Volume.open(tool.take(), KEY, expected=Expected(salt=b"\xdd\xee", aux=aux))
    assert (opened.read(16), opened.aux) == (b"theirs", aux)


def test_we_format_what_they_announce(tool: _Tool) -> None:
    tool.run("write-mkfs-info-header", "-I", "ddee", "-H", "sha3", "-C", "camellia", "-t", "256", "-s", "128K")
    tool.edit_aux("add-entry", str(B), data=_data("b", 700))
    device = tool.take()
    layout = layout_of("sha3", "camellia", 256)
    info = read_creation_info(device)
    assert (info.layout, info.salt, info.size_bytes) == (layout, b"\xdd\xee", 128 << 10)
    volume = Volume.open(device, KEY, first_use=True, expected=Expected(layout, b"\xdd\xee"))
    with volume.transaction() as transaction:
        transaction.write(16, b"ours")
    tool.give(device)
    assert tool.read(16) == b"ours"
    assert tool.aux() == [(B, _data("b", 700))]
    tool.edit_aux("add-entry", str(A), data=b"more")
    assert read_aux(tool.take()).of(A) == (b"more",)


@pytest.mark.parametrize("seed", [0, *[pytest.param(n, marks=pytest.mark.long) for n in range(1, 25)]])
def test_auxiliary_metadata_in_turn(tool: _Tool, seed: int) -> None:
    """Both change it in turn, with and without the key."""
    rng = random.Random(seed)
    device = MemoryDevice(256 << 10, block_size_bytes=128)
    aux = AuxMetadata(reserve_bytes=rng.choice([16, 1024, 9000]))
    if rng.random() < 0.5:
        provision(device, salt=b"x", aux=aux)
    else:
        Volume.create(device, KEY, salt=b"x", aux=aux)
    for turn in range(8):
        with_key = rng.random() < 0.5 or not aux.reserve_bytes
        kind, data = rng.choice([A, B, C, D]), _data(f"{seed} {turn}", rng.choice([0, 30, 300]))
        changed = aux.remove(aux.entries[-1].kind) if len(aux.entries) > 2 else aux.add(kind, data)
        if turn % 2:
            if with_key:
                volume = Volume.open(device, KEY, first_use=True)
                with volume.transaction() as transaction:
                    transaction.set_aux(changed)
            else:
                write_aux(device, changed)
            aux = changed
        else:
            tool.give(device)
            aux = aux.add(kind, data)
            tool.edit_aux("add-entry", str(kind), data=data, key=with_key)
            device = tool.take()
        assert read_aux(device) == aux
        tool.give(device)
        assert tool.aux() == _entries(aux)
    assert Volume.open(device, KEY, first_use=True).aux == aux


def _sizes(rng: random.Random) -> dict[str, int]:
    unit = 128 << rng.choice([0, 0, 1, 2, 5])
    io = unit << rng.randint(0, 6 if unit < 1024 else 2)
    return {
        "allocation_block_bytes": unit,
        "io_block_bytes": io,
        "data_block_bytes": unit << rng.randint(0, 6 if unit < 1024 else 2),
        "tree_node_bytes": io << rng.randint(0, 3) if io > 128 else 256,
        "bitmap_block_bytes": unit << rng.randint(0, 4),
        "leaf_node_bytes": unit << rng.randint(0, 3),
        "internal_node_bytes": unit << rng.randint(0, 3),
    }


_OPTIONS = {
    "allocation_block_bytes": "--allocation-block-size",
    "io_block_bytes": "--io-block-size",
    "data_block_bytes": "--auth-tree-data-block-size",
    "tree_node_bytes": "--auth-tree-node-size",
    "bitmap_block_bytes": "--allocation-bitmap-file-block-size",
    "leaf_node_bytes": "--inode-index-tree-leaf-node-size",
    "internal_node_bytes": "--inode-index-tree-internal-node-size",
}
_ALGORITHMS = [
    *itertools.product(("sha2", "sha3"), ("aes", "camellia"), (128, 192, 256)),
    *itertools.product(("sha2", "sha3", "sm3"), ("sm4",), (128,)),
    *itertools.product(("sm3",), ("aes", "camellia"), (128,)),
]


def _configuration(seed: int) -> tuple[tuple[str, str, int], dict[str, int], bytes, int]:
    rng = random.Random(f"configuration {seed}")
    sizes = _sizes(rng)
    largest = max(sizes["io_block_bytes"], sizes["data_block_bytes"], sizes["tree_node_bytes"])
    size = max(64 << 10, 64 * largest) + 512 * rng.randint(0, 40) // largest * largest
    return _ALGORITHMS[seed % len(_ALGORITHMS)], sizes, rng.randbytes(rng.randint(0, 255)), size


@pytest.mark.parametrize("seed", [*range(6), *[pytest.param(n, marks=pytest.mark.long) for n in range(6, 150)]])
def test_every_configuration(tool: _Tool, seed: int) -> None:
    """Block sizes over their range, each algorithm, salts of any length: made by each, changed by the other."""
    algorithms, sizes, salt, size = _configuration(seed)
    family, cipher, strength = algorithms
    layout = layout_of(family, cipher, strength, **sizes)
    files: dict[int, bytes] = {16 + n: _data(f"{seed} {n}", 411 * n) for n in range(8)}
    device = MemoryDevice(size, block_size_bytes=128)
    volume = Volume.create(device, KEY, salt=salt, layout=layout, aux=AuxMetadata(reserve_bytes=seed % 3 * 500 or None))
    with volume.transaction() as transaction:
        for inode, data in files.items():
            transaction.write(inode, data)
    tool.give(device)
    assert {inode: tool.read(inode) for inode in tool.files()} == files
    tool.write(17, b"theirs")
    assert Volume.open(tool.take(), KEY).read(17) == b"theirs"

    options: list[Any] = [item for name, value in sizes.items() for item in (_OPTIONS[name], f"{value}B")]
    names = ["-H", family, "-C", cipher, "-t", str(strength), "-I", salt.hex(), "-s", f"{size // 128 * 128}B"]
    tool.run("mkfs", "-K", KEY.hex(), *names, *options, "-n")
    for inode, data in files.items():
        tool.write(inode, data)
    device = tool.take()
    opened = Volume.open(device, KEY)
    assert (opened.layout, opened.salt) == (layout, salt)
    assert {info.inode: opened.read(info.inode) for info in opened.list()} == files
    with opened.transaction() as transaction:
        transaction.write(17, b"ours")
    tool.give(device)
    assert tool.read(17) == b"ours"
