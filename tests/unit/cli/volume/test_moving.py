# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume export | import | resize | rekey`, and archives and folders that are not what they should be."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.unit.cli.volume.conftest import STATE, Bench

KEYED = "--key-file @key"


def test_export_and_import(bench: Bench) -> None:
    said = bench.json(f"export @image {KEYED} -o @out.tar")
    assert said["files"] == 1
    archive = bench.folder / "out.tar"
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as tar:
        assert [member.name for member in tar] == ["0000000100000000.03"]
    assert bench.run(f"export @image {KEYED}") == archive.read_bytes()
    bench.refused(f"export @image {KEYED} -o @out.tar", "volume-output")
    bench.refused(f"export @image {KEYED} -o @image --force", "volume-output")
    bench.refused(f"export @image {KEYED}", "volume-output")  # with --json
    bench.run(f"create @new --size 64KiB {KEYED}")
    assert bench.json(f"import @new @out.tar {KEYED}")["files"] == 1
    assert bench.files("new") == bench.files()
    bench.refused(f"import @image @out.tar {KEYED}", "cocoonfs-exists")
    bench.run(f"import @image @out.tar {KEYED} --force")
    bench.refused(f"import @image @none {KEYED}", "volume-input")
    bench.refused(f"import @image @ {KEYED}", "volume-input")


def test_an_export_that_fails_leaves_no_file(bench: Bench) -> None:
    bench.refused("export @image --key-file @wrong -o @out.tar", "cocoonfs-authentication", code=3)
    assert not (bench.folder / "out.tar").exists()


def _tar(path: Path, *members: tuple[str, bytes, bytes], size: int | None = None) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    if size is not None:  # a header that promises what does not come
        raw = bytearray(path.read_bytes())
        raw[124:136] = f"{size:011o}\0".encode()
        raw[148:156] = b" " * 8
        raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
        path.write_bytes(raw)


GOOD = "0000000000000010.00"


@pytest.mark.parametrize(
    ("members", "size"),
    [
        ([("../../etc/passwd", tarfile.REGTYPE, b"x")], None),
        ([("/etc/passwd", tarfile.REGTYPE, b"x")], None),
        ([(GOOD, tarfile.SYMTYPE, b"")], None),
        ([(GOOD, tarfile.LNKTYPE, b"")], None),
        ([(GOOD, tarfile.DIRTYPE, b"")], None),
        ([(GOOD, tarfile.CHRTYPE, b"")], None),
        ([(GOOD, tarfile.XHDTYPE, b"30 path=x\n")], None),
        ([(GOOD, tarfile.REGTYPE, b"x"), (GOOD, tarfile.REGTYPE, b"y")], None),
        ([("0000000000000003.00", tarfile.REGTYPE, b"x")], None),
        ([("0000000000000010.00 ", tarfile.REGTYPE, b"x")], None),
        ([(GOOD, tarfile.REGTYPE, b"x")], 0o77777777777),
        ([(GOOD, tarfile.REGTYPE, b"x")], 30_000),
    ],
)
def test_hostile_archives(bench: Bench, members: list[tuple[str, bytes, bytes]], size: int | None) -> None:
    _tar(bench.folder / "bad.tar", *members, size=size)
    bench.refused(f"import @image @bad.tar {KEYED}", "cocoonfs-archive")


def test_an_archive_larger_than_the_volume_is_refused(bench: Bench) -> None:
    _tar(bench.folder / "many.tar", *[(f"{n:016x}.00", tarfile.REGTYPE, bytes(9000)) for n in range(16, 80)])
    bench.refused(f"import @image @many.tar {KEYED}", "cocoonfs-archive")


def test_resize(bench: Bench) -> None:
    assert bench.json(f"resize @image 128KiB {KEYED}")["size_bytes"] == 128 << 10
    assert bench.image.stat().st_size == 128 << 10
    assert bench.files() == {STATE: (3, 5)}
    bench.refused(f"resize @image 4KiB {KEYED}", "cocoonfs-full")
    bench.refused(f"resize @image 1KiB {KEYED}", "cocoonfs-too-small")
    assert "copied and compared" in bench.run(f"resize @image 32KiB {KEYED}").decode()
    assert bench.json(f"check @image {KEYED}")["good"]
    assert sorted(path.name for path in bench.folder.iterdir()) == ["image", "key", "raw", "wrong"]


def test_rekey(bench: Bench) -> None:
    bench.refused("rekey @image --key-file @wrong --new-key-file @wrong", "cocoonfs-authentication", code=3)
    bench.refused(f"rekey @ {KEYED} --new-key-file @wrong", "block-io")
    said = bench.json(f"rekey @image {KEYED} --new-key-file @wrong --salt 01")
    assert said["files"] == 1
    bench.refused(f"ls @image {KEYED}", "cocoonfs-authentication", code=3)
    assert bench.files(key="wrong") == {STATE: (3, 5)}
    info = bench.json("info @image")
    assert (info["salt"], info["algorithms"], info["aux_reserve_bytes"]) == ("01", "sha2 aes 128", 256)


def test_another_configuration_keeps_what_is_not_named(bench: Bench) -> None:
    bench.run(f"resize @image 256KiB --profile tuned {KEYED}")
    bench.run(f"resize @image 256KiB --strength 256 {KEYED}")
    info = bench.json("info @image")
    assert (info["profile"], info["algorithms"]) == ("tuned", "sha2 aes 256")
    bench.refused(f"resize @image 256KiB --hash sha1 --strength 128 {KEYED}", "cocoonfs-weak", code=3)
    assert bench.files() == {STATE: (3, 5)}
