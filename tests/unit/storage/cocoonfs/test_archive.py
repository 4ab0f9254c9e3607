# SPDX-License-Identifier: MIT OR Apache-2.0
"""Archives: what an export writes, what another tar reads of it, and what an import refuses."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import tarfile

import pytest

from svsm.formats.errors import FormatError, SvsmError
from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.archive import export_files, import_files, members
from svsm.storage.drivers.memory import MemoryDevice

KEY = b"archive"
FILES = {
    16: (0, b""),
    17: (255, b"x" * 512),
    1 << 32: (1, hashlib.shake_128(b"a").digest(5000)),
    (1 << 64) - 1: (7, b"end"),
}


def _volume(files: dict[int, tuple[int, bytes]] | None = None) -> Volume:
    volume = Volume.create(MemoryDevice(64 << 10), KEY, salt=b"")
    with volume.transaction() as transaction:
        for inode, (flags, data) in (files or {}).items():
            transaction.write(inode, data, flags)
    return volume


def _files(volume: Volume) -> dict[int, tuple[int, bytes]]:
    return {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()}


def _exported(files: dict[int, tuple[int, bytes]] | None = None) -> bytes:
    out = io.BytesIO()
    export_files(_volume(FILES if files is None else files), out)
    return out.getvalue()


def _refused(archive: bytes, volume: Volume | None = None) -> str:
    volume = _volume() if volume is None else volume
    before = (volume.counter, _files(volume))
    with pytest.raises(SvsmError) as caught:
        import_files(volume, io.BytesIO(archive))
    assert (volume.counter, _files(volume)) == before
    return caught.value.code


def test_round_trip() -> None:
    archive = _exported()
    assert archive == _exported()
    volume = _volume()
    counter = volume.counter
    assert import_files(volume, io.BytesIO(archive)) == 4
    assert _files(volume) == FILES
    assert volume.counter == counter + 1
    assert import_files(_volume(), io.BytesIO(_exported({}))) == 0


def test_another_program_reads_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(_exported())) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert found == {f"{inode:016x}.{flags:02x}": data for inode, (flags, data) in FILES.items()}


def test_another_program_writes_it() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for inode, (flags, data) in FILES.items():
            member = tarfile.TarInfo(f"{inode:016x}.{flags:02x}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    volume = _volume()
    import_files(volume, io.BytesIO(out.getvalue()))
    assert _files(volume) == FILES


def test_existing_files() -> None:
    volume = _volume({17: (3, b"mine"), 20: (0, b"stays")})
    assert _refused(_exported(), volume) == "cocoonfs-exists"
    import_files(volume, io.BytesIO(_exported()), replace=True)
    assert _files(volume) == {**FILES, 20: (0, b"stays")}


def _member(name: str, data: bytes = b"", **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for field, value in fields.items():
            setattr(member, field, value)
        archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return out.getvalue()


GOOD = f"{16:016x}.00"


@pytest.mark.parametrize(
    "archive",
    [
        b"",
        bytes(100),
        b"\x1f\x8b" + bytes(1022),
        _member("../../etc/passwd", b"x"),
        _member("/0000000000000010.00", b"x"),
        _member("0000000000000010", b"x"),
        _member("0000000000000010.00/", b"x"),
        _member("0000000000000010.0A", b"x"),
        _member("0000000000000003.00", b"x"),
        _member(GOOD, type=tarfile.SYMTYPE, linkname="x"),
        _member(GOOD, type=tarfile.LNKTYPE, linkname="x"),
        _member(GOOD, type=tarfile.DIRTYPE),
        _member(GOOD, type=tarfile.CHRTYPE),
        _member(GOOD, b"x", type=b"S"),
        _member(GOOD, b"a")[:1024] + _member(GOOD, b"b"),
        _member(GOOD, b"a")[:1024],
        _member(GOOD, b"a" * 2000)[:1500],
        _member(GOOD, b"a" * (400 << 10)),
    ],
)
def test_hostile(archive: bytes) -> None:
    assert _refused(archive) == "cocoonfs-archive"


def test_too_much_for_the_volume() -> None:
    assert _refused(_member(GOOD, b"a" * (62 << 10))) == "cocoonfs-full"


def test_endless() -> None:
    """A source that never ends is read no further than the volume could hold."""

    class Endless(io.RawIOBase):
        taken = 0
        numbers = itertools.count(16)
        rest = b""

        def read(self, length: int = -1) -> bytes:
            while len(self.rest) < length:
                self.rest += _member(f"{next(self.numbers):016x}.00", b"a" * 512)[:1024]
            piece, self.rest = self.rest[:length], self.rest[length:]
            Endless.taken += length
            return piece

    with pytest.raises(FormatError):
        import_files(_volume(), Endless())  # type: ignore[arg-type]
    assert Endless.taken < 1 << 20


def test_any_bytes() -> None:
    archive = _exported()
    rng = random.Random(1)
    for _ in range(400):
        damaged = bytearray(archive)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(archive) - 8000)] = rng.randrange(256)
        del damaged[rng.randrange(len(archive)) :]
        try:
            found = list(members(io.BytesIO(damaged), limit_bytes=1 << 16))
        except FormatError as error:
            assert error.code == "cocoonfs-archive"  # noqa: PT017 - most, not all, are refused
        else:
            assert len(found) <= 4
