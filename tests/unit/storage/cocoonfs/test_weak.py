# SPDX-License-Identifier: MIT OR Apache-2.0
"""SHA-1 and TDES: only with the flag, and then like every other configuration (8-byte cipher blocks included)."""

from __future__ import annotations

import hashlib

import pytest

from svsm.formats.errors import PolicyError
from svsm.storage.cocoonfs import DEFAULT_LAYOUT, AuxMetadata, ImageLayout, Volume
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import check

KEY = b"weak"


def _data(seed: int, length: int) -> bytes:
    return hashlib.shake_128(b"weak %d" % seed).digest(length)


@pytest.mark.parametrize(
    "layout",
    [
        layout_of("sha1", "aes"),
        layout_of("sha2", "tdes"),
        layout_of("sha3", "tdes").replace(cipher_key_bits=128),
        layout_of("sha1", "tdes", data_block_bytes=2048),
        DEFAULT_LAYOUT.replace(kdf_hash=4),
    ],
)
def test_only_with_the_flag(layout: ImageLayout) -> None:
    device = MemoryDevice(256 << 10)
    with pytest.raises(PolicyError) as caught:
        Volume.create(device, KEY, salt=b"s", layout=layout)
    assert caught.value.code == "cocoonfs-weak"
    assert not any(device.data)
    aux = AuxMetadata(reserve_bytes=100)
    volume = Volume.create(device, KEY, salt=b"s", layout=layout, aux=aux, allow_weak=True)
    files = {16 + n: _data(n, length) for n, length in enumerate([0, 1, 7, 8, 9, 111, 112, 120, 121, 5000, 60_000])}
    for inode, data in files.items():
        with volume.transaction() as transaction:
            transaction.write(inode, data)
    with volume.transaction() as transaction:
        for inode in range(100, 140):
            transaction.write(inode, b"")
            files[inode] = b""
        transaction.unlink(20)
        del files[20]
    transaction = volume.transaction()
    transaction.write(17, _data(99, 3000))
    files[17] = _data(99, 3000)
    transaction.prepare()
    with pytest.raises(PolicyError):
        Volume.open(device, KEY)
    again = Volume.open(device, KEY, allow_weak=True)
    assert {info.inode: again.read(info.inode) for info in again.list()} == files
    check(again)
