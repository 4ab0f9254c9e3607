# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a volume promises its users: files, transactions, two-step commits, fullness, refusals."""

from __future__ import annotations

import contextlib
import hashlib
import random

import pytest

from svsm.formats.errors import FormatError, IntegrityError, StateError, SvsmError
from svsm.storage.cocoonfs import Decision, FileInfo, FoundJournal, Probe, Volume, probe
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import check, image_of

KEY = hashlib.sha256(b"volume").digest()


def _content(seed: int, length: int) -> bytes:
    return hashlib.shake_128(b"volume %d" % seed).digest(length)


def _created(size: int = 64 << 10) -> tuple[MemoryDevice, Volume]:
    device = MemoryDevice(size)
    return device, Volume.create(device, KEY, salt=b"\xdd\xee\xff")


def _put(volume: Volume, files: dict[int, bytes]) -> None:
    with volume.transaction() as transaction:
        for inode, data in files.items():
            transaction.write(inode, data)


def _code(call: object, *arguments: object, **named: object) -> str:
    assert callable(call)
    with pytest.raises(SvsmError) as caught:
        call(*arguments, **named)
    return caught.value.code


def test_empty() -> None:
    _, volume = _created()
    assert volume.list() == []
    assert volume.size_bytes == 64 << 10
    assert len(volume.root_digest) == 32
    assert _code(volume.read, 16) == "cocoonfs-no-such-file"
    assert _code(volume.read, 1) == "cocoonfs-no-such-file"
    assert not volume.exists(3)
    check(volume)


@pytest.mark.parametrize(
    "length", [0, 1, 95, 96, 111, 112, 113, 128, 479, 495, 496, 511, 8175, 8176, 8191, 8192, 30000]
)
def test_lengths(length: int) -> None:
    device, volume = _created()
    data = _content(length, length)
    with volume.transaction() as transaction:
        transaction.write((1 << 64) - 1, data, 255)
    again = Volume.open(device, KEY)
    assert again.read((1 << 64) - 1) == data
    assert again.list() == [FileInfo((1 << 64) - 1, 255)]


def test_contents_that_look_like_padding() -> None:
    device, volume = _created()
    files = {16: bytes(100), 17: b"\x01", 18: b"\x10" * 16, 19: b"\x10" * 111, 20: bytes(1000) + b"\x02\x02"}
    _put(volume, files)
    again = Volume.open(device, KEY)
    assert {inode: again.read(inode) for inode in files} == files


def test_two_step_commit() -> None:
    device, volume = _created()
    _put(volume, {16: b"old"})
    counter, digest = volume.counter, volume.root_digest
    transaction = volume.transaction()
    transaction.write(16, b"new")
    prepared = transaction.prepare()
    assert (volume.counter, volume.root_digest, volume.read(16)) == (counter, digest, b"old")
    assert prepared.counter == counter + 1
    assert prepared.root_digest != digest
    other = volume.transaction()
    other.write(17, b"x")
    assert _code(other.prepare) == "cocoonfs-commit-pending"
    prepared.cancel()
    assert _code(prepared.apply) == "cocoonfs-commit-ended"
    assert Volume.open(device, KEY).root_digest == digest
    transaction = volume.transaction()
    transaction.write(16, b"newer")
    prepared = transaction.prepare()
    prepared.apply()
    assert _code(prepared.cancel) == "cocoonfs-commit-ended"
    assert (volume.counter, volume.root_digest) == (prepared.counter, prepared.root_digest)
    again = Volume.open(device, KEY)
    assert (again.counter, again.root_digest, again.read(16)) == (prepared.counter, prepared.root_digest, b"newer")
    check(again)


def test_decide_sees_the_commit() -> None:
    device, volume = _created()
    _put(volume, {16: b"old"})
    transaction = volume.transaction()
    transaction.write(16, b"new")
    prepared = transaction.prepare()
    pending = bytes(device.data)
    for answer in (Decision.YES, Decision.NO):
        seen: list[FoundJournal] = []
        disk = MemoryDevice(pending)

        def decide(found: FoundJournal, answer: Decision = answer, seen: list[FoundJournal] = seen) -> Decision:
            seen.append(found)
            return answer

        opened = Volume.open(disk, KEY, decide=decide)
        assert [(found.counter, found.root_digest) for found in seen] == [(prepared.counter, prepared.root_digest)]
        assert opened.read(16) == (b"new" if answer is Decision.YES else b"old")
        assert Volume.open(disk, KEY).read(16) == opened.read(16)


def test_transaction_rules() -> None:
    _, volume = _created()
    transaction = volume.transaction()
    assert _code(transaction.write, 15, b"") == "cocoonfs-inode"
    assert _code(transaction.write, 1 << 64, b"") == "cocoonfs-inode"
    assert _code(transaction.write, 16, b"", 256) == "cocoonfs-flags"
    assert _code(transaction.unlink, 16) == "cocoonfs-no-such-file"
    assert _code(transaction.unlink, 1) == "cocoonfs-inode"
    transaction.write(16, b"x")
    assert transaction.read(16) == b"x"
    transaction.unlink(16)
    assert _code(transaction.read, 16) == "cocoonfs-no-such-file"
    assert _code(transaction.unlink, 16) == "cocoonfs-no-such-file"
    transaction.commit()
    assert _code(transaction.write, 16, b"") == "cocoonfs-transaction-ended"
    counter = volume.counter
    with volume.transaction():
        pass
    assert volume.counter == counter
    with pytest.raises(SvsmError), volume.transaction() as transaction:  # noqa: PT012 - the block is what is tested
        transaction.write(16, b"lost")
        transaction.write(3, b"")
    assert volume.list() == []


def test_full_and_nothing_lost() -> None:
    """A volume that is filled to the brim says so, keeps what it has, and lets everything be removed again."""
    device, volume = _created()
    files: dict[int, bytes] = {}
    codes = set()
    rng = random.Random(5)
    for inode in range(16, 400):
        data = _content(inode, rng.choice([50, 300, 1000, 5000]))
        try:
            _put(volume, {inode: data})
            files[inode] = data
        except StateError as error:
            codes.add(error.code)
    assert codes == {"cocoonfs-full"}
    assert volume.free_bytes < 9000
    check(volume)
    again = Volume.open(device, KEY)
    assert {info.inode: again.read(info.inode) for info in again.list()} == files
    order = list(files)
    rng.shuffle(order)
    for inode in order:
        with again.transaction() as transaction:
            transaction.unlink(inode)
    assert again.list() == []
    check(again)
    _put(again, {16: _content(1, 40000)})


def test_removing_a_fragmented_file_from_a_full_volume() -> None:
    """Files in many pieces, all over a volume without any room left, can still be removed one by one."""
    _, volume = _created(512 << 10)
    count = 0
    while volume.free_bytes > 60_000:
        _put(volume, {1000 + n: _content(n, 300) for n in range(count, count + 50)})
        count += 50
    for start in range(0, count, 50):
        with volume.transaction() as transaction:
            for n in range(start, start + 50, 2):
                transaction.unlink(1000 + n)
    inode, largest = 16, 0
    for size in (64 << 10, 20 << 10, 8 << 10, 2 << 10, 200):
        with contextlib.suppress(StateError):
            while True:
                _put(volume, {inode: _content(inode, size)})
                entry = image_of(volume).find(inode)
                assert entry is not None
                largest = max(largest, len(image_of(volume).extents_of(entry)[0]))
                inode += 1
    assert volume.free_bytes < 100_000  # holes smaller than an IO block, and the reserve for removals
    assert largest > 10
    for number in range(16, inode):
        with volume.transaction() as transaction:
            transaction.unlink(number)
    check(volume)


def test_too_large_for_the_volume() -> None:
    device, volume = _created()
    _put(volume, {16: b"kept"})
    before = bytes(device.data)
    assert _code(_put, volume, {17: bytes(1 << 20)}) == "cocoonfs-full"
    assert bytes(device.data) == before
    assert volume.read(16) == b"kept"
    assert not volume.failed


def test_fragmented_file_uses_a_list() -> None:
    device, volume = _created(1 << 20)
    _put(volume, {100 + n: _content(n, 900) for n in range(700)})
    with volume.transaction() as transaction:
        for n in range(0, 700, 2):
            transaction.unlink(100 + n)
    _put(volume, {16: _content(1, volume.free_bytes - 360_000 - 40_000)})
    data = _content(2, 250_000)
    _put(volume, {17: data})
    image = image_of(volume)
    entry = image.find(17)
    assert entry is not None
    extents, lists = image.extents_of(entry)
    assert len(extents) > 100
    assert lists
    check(volume)
    again = Volume.open(device, KEY)
    assert again.read(17) == data
    with again.transaction() as transaction:
        transaction.unlink(17)
    check(again)


def test_index_grows_and_shrinks() -> None:
    device, volume = _created(1 << 20)
    rng = random.Random(3)
    inodes = rng.sample(range(16, 1 << 32), 500)
    for start in range(0, 500, 50):
        _put(volume, dict.fromkeys(inodes[start : start + 50], b""))
    check(volume)
    assert image_of(volume).root[1] >= 4
    assert [info.inode for info in Volume.open(device, KEY).list()] == sorted(inodes)
    rng.shuffle(inodes)
    for start in range(0, 500, 20):
        with volume.transaction() as transaction:
            for inode in inodes[start : start + 20]:
                transaction.unlink(inode)
        check(volume)
    assert image_of(volume).root == (image_of(volume).entry_leaf, 1)
    assert Volume.open(device, KEY).list() == []


def test_counter_wraps() -> None:
    """The counter starts anywhere in 128 bits, so it must pass the end."""
    device, volume = _created()
    image = image_of(volume)
    image.counter = (1 << 128) - 1
    _put(volume, {16: b"x"})
    assert volume.counter == 0
    assert Volume.open(device, KEY).counter == 0


def test_probe() -> None:
    device, _ = _created()
    assert probe(device) is Probe.COCOONFS
    assert probe(MemoryDevice(64 << 10)) is Probe.BLANK
    assert probe(MemoryDevice(0)) is Probe.BLANK
    assert probe(MemoryDevice(b"CCFSMKFS".ljust(512))) is Probe.CREATION_INFO
    backup = bytearray(64 << 10)
    at = (((512 >> 5) - 1) << 5) * 128
    backup[at : at + 8] = b"CCFSMKFS"
    assert probe(MemoryDevice(backup)) is Probe.CREATION_INFO


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: bytes(len(data)), "cocoonfs-no-magic"),
        (lambda data: data[:512], "cocoonfs-truncated"),
        (lambda data: data[:2048], "cocoonfs-truncated"),
        (lambda data: data[:-512], "cocoonfs-truncated"),
        (lambda data: b"", "cocoonfs-no-magic"),
        (lambda data: data[:40] + b"\xfe" + data[41:], "cocoonfs-header"),
        (lambda data: data[:20] + b"\0" + data[21:], "cocoonfs-header"),
    ],
)
def test_refusals(change: object, code: str) -> None:
    device, _ = _created()
    assert callable(change)
    changed = MemoryDevice(change(bytes(device.data)))
    before = bytes(changed.data)
    assert _code(Volume.open, changed, KEY) == code
    assert bytes(changed.data) == before


def test_creation_limits() -> None:
    device = MemoryDevice(64 << 10)
    assert _code(Volume.create, device, KEY, salt=bytes(256)) == "cocoonfs-salt"
    assert _code(Volume.create, device, KEY, salt=b"", size_bytes=1 << 20) == "cocoonfs-too-small"
    for size in (0, 512, 1024, 2048):
        assert _code(Volume.create, MemoryDevice(size), KEY, salt=b"") == "cocoonfs-too-small"
    layout = DEFAULT_LAYOUT.replace(index_leaf_node_allocation_blocks_log2=7)
    assert _code(Volume.create, device, KEY, salt=b"", layout=layout) == "cocoonfs-layout"
    blocky = MemoryDevice(64 << 10, block_size_bytes=4096)
    assert _code(Volume.create, blocky, KEY, salt=b"") == "cocoonfs-device-blocks"
    assert not any(device.data)
    volume = Volume.create(device, KEY, salt=bytes(255), size_bytes=32 << 10)
    assert volume.size_bytes == 32 << 10


@pytest.mark.parametrize(
    "size",
    [
        6144,
        6656,
        7168,
        8192,
        10240,
        16384,
        99840,
        558080,
        558592,
        559104,
        559616,
        560640,
    ],
)
def test_sizes(size: int) -> None:
    device = MemoryDevice(size)
    volume = Volume.create(device, KEY, salt=b"salt")
    assert size - 4096 < volume.size_bytes <= size
    check(volume)


@pytest.mark.long
def test_many_sizes() -> None:
    for size in [*range(6144, 80 << 10, 512), *range(540 << 10, 580 << 10, 512), *range(17855488, 17868288, 512)]:
        device = MemoryDevice(size)
        volume = Volume.create(device, KEY, salt=b"", random=bytes)
        assert size - 4096 < volume.size_bytes <= size


@pytest.mark.parametrize("hashes", [0x000B, 0x000C, 0x000D, 0x0012, 0x0027, 0x0028, 0x0029])
@pytest.mark.parametrize("cipher", [(6, 128), (6, 256), (0x13, 128), (0x26, 192)])
def test_other_algorithms(hashes: int, cipher: tuple[int, int]) -> None:
    layout = DEFAULT_LAYOUT.replace(
        auth_tree_node_hash=hashes,
        auth_tree_data_hmac_hash=hashes,
        preauth_hmac_hash=hashes,
        auth_tree_root_hmac_hash=hashes,
        kdf_hash=hashes,
        cipher_algorithm=cipher[0],
        cipher_key_bits=cipher[1],
    )
    device = MemoryDevice(64 << 10)
    volume = Volume.create(device, KEY, salt=b"", layout=layout)
    _put(volume, {16: _content(1, 3000)})
    transaction = volume.transaction()
    transaction.write(17, _content(2, 2000))
    transaction.prepare()
    again = Volume.open(device, KEY)
    assert (again.read(16), again.read(17)) == (_content(1, 3000), _content(2, 2000))
    check(again)


def test_unknown_algorithms() -> None:
    device = MemoryDevice(64 << 10)
    for field, value, code in [
        ("auth_tree_node_hash", 5, "cocoonfs-unsupported-hash"),
        ("kdf_hash", 0xFFFF, "cocoonfs-unsupported-hash"),
        ("cipher_algorithm", 2, "cocoonfs-unsupported-cipher"),
        ("cipher_key_bits", 512, "cocoonfs-unsupported-cipher"),
    ]:
        layout = DEFAULT_LAYOUT.replace(**{field: value})
        with pytest.raises(FormatError) as caught:
            Volume.create(device, KEY, salt=b"", layout=layout)
        assert caught.value.code == code


def test_disk_that_changes_after_opening() -> None:
    """What was checked once is kept; what is read later is checked later."""
    device, volume = _created()
    _put(volume, {16: _content(1, 3000)})
    volume = Volume.open(device, KEY)
    device.data[:] = bytes(len(device.data))
    with pytest.raises(IntegrityError) as caught:
        volume.read(16)
    assert caught.value.code == "cocoonfs-authentication"


def test_random_is_used_for_everything_secret() -> None:
    """Two commits of the same contents leave different ciphertext, and nothing of the contents in clear."""
    device, volume = _created()
    data = b"a secret that must not be seen on the disk " * 20
    _put(volume, {16: data})
    first = bytes(device.data)
    _put(volume, {17: data})
    for at in range(0, len(data) - 32, 16):
        assert data[at : at + 32] not in bytes(device.data)
        assert data[at : at + 32] not in first
    assert KEY not in bytes(device.data)


@pytest.mark.parametrize("share", [2, 7])
def test_removing_many_files_from_a_full_volume(share: int) -> None:
    """A volume that is filled with files of a few KiB keeps room for the journal that removes many of them at once."""
    device, volume = _created(256 << 10)
    count, step = 0, 32
    while step:
        try:
            _put(volume, {16 + n: _content(n, 2000) for n in range(count, count + step)})
        except StateError:
            step //= 2
        else:
            count += step
    assert count > 80
    names = random.Random(share).sample(range(16, 16 + count), count // share)
    with volume.transaction() as transaction:
        for inode in names:
            transaction.unlink(inode)
    assert len(volume.list()) == count - len(names)
    check(Volume.open(device, KEY))
