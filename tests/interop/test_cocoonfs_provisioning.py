# SPDX-License-Identifier: MIT OR Apache-2.0
"""Announced volumes and auxiliary metadata, in turn with the reference program."""

from __future__ import annotations

import hashlib
import random
import uuid
from pathlib import Path

import pytest

from svsm.storage.cocoonfs import AuxMetadata, Expected, Volume, provision, read_creation_info
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice
from tests.cocoonfs_support import content
from tests.interop.cocoonfs_tool import Tool

pytestmark = pytest.mark.interop
KEY = hashlib.sha256(b"provisioning interop").digest()
A, B, C, D = (uuid.UUID(int=n << 96 | 9) for n in (1, 2, 3, 4))


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    return Tool(tmp_path, KEY)


def _entries(aux: AuxMetadata) -> list[tuple[uuid.UUID, bytes]]:
    return [(entry.kind, entry.data) for entry in aux.entries]


@pytest.mark.parametrize("reserve", [None, 1024])
def test_they_format_what_we_announce(tool: Tool, reserve: int | None) -> None:
    aux = AuxMetadata(reserve_bytes=reserve).add(B, content("b", 700)).add(A, b"")
    device = MemoryDevice(64 << 10, block_size_bytes=128)
    provision(device, salt=b"\xdd\xee", aux=aux)
    tool.give(device)
    assert tool.aux() == _entries(aux)
    tool.write(16, b"theirs")
    opened = Volume.open(tool.take(), KEY, expected=Expected(salt=b"\xdd\xee", aux=aux))
    assert (opened.read(16), opened.aux) == (b"theirs", aux)


def test_we_format_what_they_announce(tool: Tool) -> None:
    tool.run("write-mkfs-info-header", "-I", "ddee", "-H", "sha3", "-C", "camellia", "-t", "256", "-s", "128K")
    tool.edit_aux("add-entry", str(B), data=content("b", 700))
    device = tool.take()
    layout = layout_of("sha3", "camellia", 256)
    info = read_creation_info(device)
    assert (info.layout, info.salt, info.size_bytes) == (layout, b"\xdd\xee", 128 << 10)
    volume = Volume.open(device, KEY, first_use=True, expected=Expected(layout, b"\xdd\xee"))
    with volume.transaction() as transaction:
        transaction.write(16, b"ours")
    tool.give(device)
    assert tool.read(16) == b"ours"
    assert tool.aux() == [(B, content("b", 700))]
    tool.edit_aux("add-entry", str(A), data=b"more")
    assert read_aux(tool.take()).of(A) == (b"more",)


@pytest.mark.parametrize("seed", [0, *[pytest.param(n, marks=pytest.mark.long) for n in range(1, 25)]])
def test_auxiliary_metadata_in_turn(tool: Tool, seed: int) -> None:
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
        kind, data = rng.choice([A, B, C, D]), content(f"{seed} {turn}", rng.choice([0, 30, 300]))
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
