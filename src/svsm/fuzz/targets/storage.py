# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disk as an attacker writes it: a volume's bytes, a pending journal, a disk behind a socket.

The invariant is the one that the whole file system is for: whoever does not hold the key can make a volume refuse to
open, and nothing else. A file's contents, where they come back at all, are those that were written; with a journal
pending, all of them from before the commit or all from after it. A disk on which nobody with the key wrote opens as an
empty volume, if at all, and only where one that is announced may be made. Fields that only the key holder can make are
read by a target of their own.
"""

from __future__ import annotations

import functools
import itertools
import socket
import uuid
from collections.abc import Callable, Sequence

from svsm.abi.block import Extent
from svsm.formats.errors import SvsmError
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, Verdict, expect, judge
from svsm.storage.cocoonfs import encoding
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.auxarea import aux_extents
from svsm.storage.cocoonfs.check import check
from svsm.storage.cocoonfs.creation import CreationHeader, backup_offset, pack_blob
from svsm.storage.cocoonfs.decision import Decision, FoundJournal
from svsm.storage.cocoonfs.entities import block_payload_bytes
from svsm.storage.cocoonfs.expected import ANYTHING, Expected
from svsm.storage.cocoonfs.headers import find_header, probe, read_creation_info
from svsm.storage.cocoonfs.index import NodeFormat
from svsm.storage.cocoonfs.journal import Disguise, JournalLog
from svsm.storage.cocoonfs.keys import Keys
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT, ImageLayout, MutableHeader, StaticHeader
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.cocoonfs.provisioning import provision
from svsm.storage.cocoonfs.volume import Volume
from svsm.storage.drivers.memory import MemoryDevice
from svsm.storage.drivers.remote import (
    DISCARD,
    FLUSH,
    INFO,
    MAGIC,
    READ,
    STATUS_IO_ERROR,
    STATUS_OK,
    WRITE,
    BlockMessage,
    RemoteDevice,
)

__all__ = ["ROWS"]

_KEY = bytes(range(32))
_SALT = b"0123456789abcdef"
_OLD = {16: b"a" * 100, 17: bytes(range(256)) * 12, 0x1_0000_0000: b""}
_NEW = {16: b"b" * 700, 17: bytes(range(256)) * 12, 18: b"new", 0x1_0000_0000: b"x" * 33}
_SIZE = 128 << 10
_LIMIT_AB = 1024
_NODE_BYTES = block_payload_bytes(DEFAULT_LAYOUT.leaf_ab * DEFAULT_LAYOUT.ab_bytes, DEFAULT_LAYOUT.cipher.block_bytes)


def _random(start: int) -> Callable[[int], bytes]:
    """Random bytes that are the same each time."""
    import hashlib

    numbers = itertools.count(start)

    def draw(length: int) -> bytes:
        return hashlib.shake_128(next(numbers).to_bytes(8, "little")).digest(length)

    return draw


class _Tape(MemoryDevice):
    """A disk that remembers what it held after each write."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.states: list[bytes] = []

    def write(self, extents: Sequence[Extent]) -> None:
        super().write(extents)
        self.states.append(bytes(self.data))


@functools.cache
def _images() -> tuple[bytes, tuple[bytes, ...]]:
    """A volume with `_OLD`, and its states while `_NEW` is committed: before, pending, half applied, after."""
    device = MemoryDevice(_SIZE)
    volume = Volume.create(device, _KEY, salt=_SALT, random=_random(0))
    transaction = volume.transaction()
    for inode, data in _OLD.items():
        transaction.write(inode, data)
    transaction.commit()
    old = bytes(device.data)
    tape = _Tape(old)
    volume = Volume.open(tape, _KEY, random=_random(1000))
    transaction = volume.transaction()
    for inode, data in _NEW.items():
        transaction.write(inode, data)
    transaction.commit()
    return old, tuple(dict.fromkeys(tape.states))


def _contents(volume: Volume) -> dict[int, bytes]:
    return {entry.inode: volume.read(entry.inode) for entry in volume.list()}


def _damaged(choices: Choices, image: bytes) -> bytes:
    """Some edits that keep places where they are; the size changes only at the end."""
    changed = bytearray(image)
    for _ in range(choices.below(6)):
        # Half of the edits go to the first blocks, where the headers and the journal's head are.
        at = choices.unsigned(2) if choices.flag() else choices.unsigned(3) % len(changed)
        at %= len(changed)
        kind = choices.below(4)
        if kind == 0:
            changed[at] ^= 1 << choices.below(8)
        elif kind == 1:
            piece = choices.blob(32)
            changed[at : at + len(piece)] = piece
        elif kind == 2:
            source = choices.unsigned(3) % len(changed)
            piece = bytes(changed[source : source + 128 * choices.unsigned(1)])
            changed[at : at + len(piece)] = piece
        else:
            length = 128 * choices.unsigned(1)
            changed[at : at + length] = bytes(length)
    del changed[len(image) :]
    if choices.below(16) == 15:
        del changed[512 * choices.below(257) :]
    return bytes(changed)


def _open(data: bytes) -> None:
    choices = Choices(data)
    image = _images()[0]
    if choices.flag():
        image = _another_layout(choices, image)
    device = MemoryDevice(_damaged(choices, image))
    opens = _looked_at(device)
    volume = Volume.open(device, _KEY, random=_random(2000))
    expect(opens, "what opens, opens for a check")
    expect(_contents(volume) == _OLD, "a volume that opens holds what was written")
    if choices.flag():
        transaction = volume.transaction()
        transaction.write(16 + choices.below(4), choices.blob(200))
        transaction.unlink(17)
        transaction.commit()
        after = _contents(volume)
        expect(_contents(Volume.open(device, _KEY)) == after, "a commit is there after opening again")


def _looked_at(device: MemoryDevice) -> bool:
    """Everything that only looks at a disk, without the key and with it; whether a check could open a volume."""
    before = bytes(device.data)
    for look in (probe, find_header, read_creation_info, read_aux):
        judge(look, device)
    report = check(device, _KEY)
    expect(bytes(device.data) == before, "who only looks writes nothing")
    return report.opened


def _some_layout(choices: Choices) -> tuple[ImageLayout, bytes]:
    """A configuration, which may be none that there can be, and a salt."""
    packed = bytearray(DEFAULT_LAYOUT.pack())
    for _ in range(1 + choices.below(3)):
        packed[choices.below(len(packed))] = choices.unsigned(1)
    return ImageLayout.parse(bytes(packed)), choices.blob(32)


def _can_be_written(layout: ImageLayout) -> bool:
    try:
        layout.validate()
    except SvsmError:
        return False
    return layout.io_bytes <= 1 << 16


def _another_layout(choices: Choices, image: bytes) -> bytes:
    """The static header is in clear, and its checksum needs no key: whoever has the disk can write another one."""
    header = StaticHeader(*_some_layout(choices))
    if not _can_be_written(header.layout):
        return image
    written = header.pack()
    return written + image[len(written) :]


# -- disks on which nobody with the key wrote, or on which a volume is being made --------------------------------------

_AUX = AuxMetadata(reserve_bytes=256).add(uuid.UUID(int=5 << 64), b"where the broker is")
_OTHER_KIND = uuid.UUID(int=7 << 64)
_ANNOUNCED_BYTES = 64 << 10
_AS_ANNOUNCED = Expected(DEFAULT_LAYOUT, _SALT, 0, _ANNOUNCED_BYTES)


@functools.cache
def _announced_images() -> tuple[bytes, ...]:
    """A disk with an announcement and each state of it until the empty volume is made; last, another announcement."""
    device, other = MemoryDevice(_ANNOUNCED_BYTES), MemoryDevice(_ANNOUNCED_BYTES)
    provision(device, salt=_SALT, aux=_AUX)
    provision(other, salt=b"another")
    tape = _Tape(bytes(device.data))
    Volume.open(tape, _KEY, random=_random(4000), first_use=True)
    return tuple(dict.fromkeys((bytes(device.data), *tape.states, bytes(other.data))))


def _bytes(data: bytes) -> None:
    """A disk of bytes from anywhere. Some get a header whose checksums are right, which no engine would find."""
    choices = Choices(data)
    kind, size = choices.below(4), 512 * (1 + choices.below(64))
    aux = _AUX if choices.flag() else None
    layout, salt = DEFAULT_LAYOUT, _SALT
    if kind and choices.flag():
        layout, salt = _some_layout(choices)
        if not _can_be_written(layout):
            layout = DEFAULT_LAYOUT
    if kind < 2:
        content = (StaticHeader(layout, salt).pack() if kind else b"") + choices.rest()
    else:
        content = _announcement(choices, layout, salt, size, backup=kind == 3)
    _used_first(MemoryDevice(content[:size].ljust(size, b"\0")), ANYTHING, aux)


def _announcement(choices: Choices, layout: ImageLayout, salt: bytes, size: int, *, backup: bool) -> bytes:
    """Any bytes with one copy of an announcement, perhaps of another size, and with any auxiliary metadata."""
    encoded = _AUX.pack() if choices.flag() else choices.blob(64)
    image_ab = choices.number() if choices.flag() else size // layout.ab_bytes
    header = CreationHeader(layout, salt, image_ab, len(encoded))
    packed, blob = header.pack(), pack_blob(header, encoded)
    if not backup:
        return packed + blob + choices.rest()
    begin = max(0, (backup_offset(size) or 0) - len(blob))
    return choices.rest()[:begin].ljust(begin, b"\0") + blob + packed


def _announced(data: bytes) -> None:
    """An announcement, or any state while the volume is made, with edits; then its first use."""
    choices = Choices(data)
    states = _announced_images()
    device = MemoryDevice(_damaged(choices, states[choices.below(len(states))]))
    expected = _AS_ANNOUNCED if choices.flag() else ANYTHING
    aux = _AUX.add(_OTHER_KIND, choices.blob(255)) if choices.flag() else None
    _used_first(device, expected, aux)


def _used_first(device: MemoryDevice, expected: Expected, aux: AuxMetadata | None) -> None:
    """What may happen to a disk that nobody with the key wrote a file to: an empty volume, or an error."""
    _looked_at(device)
    if aux is not None and judge(write_aux, device, aux).verdict is Verdict.ACCEPTED:
        expect(read_aux(device).entries == aux.entries, "auxiliary metadata that was written can be read")
        _looked_at(device)
    before = bytes(device.data)
    try:
        volume = Volume.open(device, _KEY, random=_random(5000), first_use=True, expected=expected)
    except SvsmError as error:
        expect(error.code != "cocoonfs-unexpected" or bytes(device.data) == before, "what is unexpected is not made")
        raise
    expect(_contents(volume) == {}, "nobody wrote a file")
    same = judge(expected.check_creation, volume.layout, volume.salt, volume.size_bytes, volume.aux)
    expect(same.verdict is Verdict.ACCEPTED, "the volume is what was expected")
    transaction = volume.transaction()
    transaction.write(16, b"first")
    transaction.commit()
    expect(_contents(Volume.open(device, _KEY)) == {16: b"first"}, "a commit is there after opening again")


def _journal(data: bytes) -> None:
    choices = Choices(data)
    states = _images()[1]
    state = choices.below(len(states))
    device = MemoryDevice(_damaged(choices, states[state]))
    before = bytes(device.data)
    asked: list[FoundJournal] = []
    yes = choices.flag()

    def decide(found: FoundJournal) -> Decision:
        asked.append(found)
        return Decision.YES if yes else Decision.NO

    try:
        volume = Volume.open(device, _KEY, random=_random(3000), decide=decide)
    except SvsmError:
        expect(bool(asked) or bytes(device.data) == before, "a refused volume was not written")
        raise
    found = _contents(volume)
    expect(found in (_OLD, _NEW), "all of the old state or all of the new")
    # Once its blocks have begun to move, a commit was decided already: taken back then, it is whole or refused.
    expect(not asked or yes or state > _first_pending() or found == _OLD, "a commit that was taken back is gone")
    expect(_contents(Volume.open(device, _KEY)) == found, "what was settled stays settled")


@functools.cache
def _first_pending() -> int:
    """Number of the state in which the journal's head has just reached the disk."""
    for number, state in enumerate(_images()[1]):
        undecided = Volume.open(MemoryDevice(state), _KEY, decide=lambda _found: Decision.UNKNOWN)
        if undecided.pending is not None:
            return number
    raise AssertionError("no state has a pending journal")


@functools.cache
def _keys() -> Keys:
    return Keys(_KEY, StaticHeader(DEFAULT_LAYOUT, _SALT))


def _structures(data: bytes) -> None:
    """What only the key holder can write; a defect of another program must still be an error and no hang."""
    choices = Choices(data)
    kind = choices.below(8)
    body = choices.rest()
    node_payload = body[:_NODE_BYTES].ljust(_NODE_BYTES, b"\0")
    layout, nodes = DEFAULT_LAYOUT, NodeFormat(DEFAULT_LAYOUT)
    if kind == 0:
        log = JournalLog.parse(body, layout, _keys(), limit_ab=_LIMIT_AB)
        expect(JournalLog.parse(log.pack(layout, _keys()), layout, _keys(), limit_ab=_LIMIT_AB) == log, "logs survive")
    elif kind == 1:
        leaf = nodes.parse_leaf(node_payload, _LIMIT_AB)
        expect(nodes.parse_leaf(nodes.pack(leaf), _LIMIT_AB) == leaf, "a leaf survives")
    elif kind == 2:
        internal = nodes.parse_internal(node_payload, _LIMIT_AB)
        expect(nodes.parse_internal(nodes.pack(internal), _LIMIT_AB) == internal, "an internal node survives")
    elif kind == 3:
        header = MutableHeader.parse(body, layout)
        expect(header.pack(layout)[: MutableHeader.size_bytes(layout)] == body[: header.size_bytes(layout)], "headers")
    elif kind == 4:
        extents = encoding.decode_extents_list(body, limit_ab=_LIMIT_AB)
        again = encoding.decode_extents_list(encoding.encode_extents_list(extents), limit_ab=_LIMIT_AB)
        expect(again == extents, "an extents list survives")
        expect(all(length > 0 and begin + length <= _LIMIT_AB for begin, length in extents), "extents lie in the image")
    elif kind == 5:
        judge(lambda: encoding.decode_extent_pointer(body[:8], limit_ab=_LIMIT_AB))
        judge(lambda: encoding.decode_block_pointer(body[:8], length_ab=1 + len(body) % 8, limit_ab=_LIMIT_AB))
        judge(lambda: Disguise.parse(body))
    elif kind == 6:
        padded = body.ljust(_LIMIT_AB * layout.ab_bytes, b"\0")

        def read(extent: tuple[int, int]) -> bytes:
            return padded[extent[0] * layout.ab_bytes : sum(extent) * layout.ab_bytes]

        places = aux_extents(layout, padded[:16], _LIMIT_AB, read)
        expect(len(places) <= _LIMIT_AB, "a list of extents is bounded")
    else:
        header_found = StaticHeader.measure(body[:128].ljust(128, b"\0"))
        expect(header_found.layout.io_bytes > 0, "a layout has blocks")


def _structure_seeds() -> list[bytes]:
    layout, keys = DEFAULT_LAYOUT, _keys()
    log = JournalLog(
        tree_extents=((8, 8),),
        bitmap_extents=((16, 4),),
        fragments=((16, bytes(32)),),
        copies=(),
        digests=((24, 4),),
        trims=((2, 1),),
        disguise=Disguise(layout.cipher, bytes(16), bytes(16)),
    )
    lists = encoding.encode_extents_list(((8, 8), (100, 3), (64, 1)))
    header = MutableHeader(bytes(16), bytes(32), bytes(16), bytes(32), encoding.encode_block_pointer(8), 1024)
    return [
        b"\0" + log.pack(layout, keys),
        b"\1" + bytes(112),
        b"\2" + bytes(112),
        b"\3" + header.pack(layout),
        b"\4" + lists,
        b"\5" + encoding.encode_extent_pointer((8, 2)),
        b"\6" + encoding.encode_extent_pointer((4, 4)) * 2,
        b"\7" + StaticHeader(layout, _SALT).pack(),
    ]


def _byte_seeds() -> list[bytes]:
    """What tells the kinds of disks apart, and the beginnings of real ones."""
    images = [_images()[0], *_announced_images()[::4]]
    return [
        *(bytes([kind, 63, flag, 0, flag]) for kind in range(4) for flag in range(2)),
        *(bytes([0, 63, 1]) + image[:3072] for image in images),
        bytes([1, 63, 1, 0]) + images[0][len(StaticHeader(DEFAULT_LAYOUT, _SALT).pack()) :][:3072],
    ]


def _remote(data: bytes) -> None:
    """Everything that the disk's process will ever say is in its socket before the driver asks."""
    choices = Choices(data)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        info = BlockMessage(MAGIC, INFO, STATUS_OK, 0, 1, 512, 1 << 16).pack()
        said = [choices.edited(info) if choices.flag() else info]
        calls = [choices.below(4) for _ in range(1 + choices.below(6))]
        for number, call in enumerate(calls, 2):
            operation = (READ, WRITE, FLUSH, DISCARD)[call]
            length = 512 if operation == READ else 0
            status = STATUS_IO_ERROR if choices.below(16) == 15 else STATUS_OK
            reply = BlockMessage(MAGIC, operation, status, 0, number, 0, 0 if status else length).pack()
            said.append(
                choices.edited(reply + bytes(0 if status else length)) if choices.flag() else reply + b"\7" * length
            )
        theirs.sendall(b"".join(said)[: 1 << 16])
        theirs.shutdown(socket.SHUT_WR)
        device = RemoteDevice(ours, deadline_seconds=1.0)
        dead = False
        for call in calls:
            try:
                _one_call(device, call)
                expect(not dead, "a device that failed for good stays failed")
            except SvsmError as error:
                dead = dead or error.code == "block-protocol"
        device.close()


def _one_call(device: RemoteDevice, call: int) -> None:
    size = device.block_size_bytes
    expect(0 <= device.size_bytes <= 1 << 56 and device.size_bytes % size == 0, "a capacity is whole blocks")
    if call == 0:
        (got,) = device.read([(0, size)])
        expect(len(got) == size, "a read gives what was asked for")
    elif call == 1:
        device.write([(0, bytes(size))])
    elif call == 2:
        device.flush()
    else:
        device.discard([(0, size)])


ROWS = (
    Target("cocoonfs-open", "a volume whose bytes an attacker changed", _open, lambda: [bytes(2), b"\0\1" * 8]),
    Target("cocoonfs-bytes", "a disk of arbitrary bytes, opened for its first use", _bytes, _byte_seeds),
    Target(
        "cocoonfs-announced",
        "a volume that is announced or half made, changed by an attacker",
        _announced,
        lambda: [bytes([state, 0, 0, flag, flag]) for state in range(len(_announced_images())) for flag in range(2)],
    ),
    Target(
        "cocoonfs-journal", "the same with a commit pending", _journal, lambda: [bytes([0, n, 1]) for n in range(9)]
    ),
    Target("cocoonfs-structures", "CocoonFS structures behind the key", _structures, _structure_seeds),
    Target("block-remote", "a disk behind a socket: replies", _remote, lambda: [bytes(8), b"\0\5\0\1\2\3\0\1"]),
)
