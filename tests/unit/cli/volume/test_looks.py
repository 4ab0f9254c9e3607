# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume info | ls | read`: what they print, and that they change nothing."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.file import FileDevice
from tests.unit.cli.volume.conftest import KEY, STATE, Bench

VISIBLE = {"state", "profile", "algorithms", "layout", "salt", "commit_pending", "device_bytes", "aux_records"}


@pytest.mark.parametrize("key", ["key", "raw"])
def test_ls_and_read(bench: Bench, key: str, unchanged: Callable[[], bool]) -> None:
    assert bench.run(f"ls @image --key-file @{key}") == b"0x100000000  flags 0x03  5 bytes\n"
    assert bench.files(key=key) == {STATE: (3, 5)}
    assert bench.run(f"read @image 0x100000000 --key-file @{key}") == b"state"
    read = bench.json(f"read @image {STATE} --key-file @{key}")
    assert (base64.b64decode(read["data"]), read["bytes"], read["inode"]) == (b"state", 5, STATE)
    assert unchanged()


def test_key_from_a_descriptor(bench: Bench) -> None:
    read, write = os.pipe()
    os.write(write, KEY[:10])
    os.write(write, KEY[10:])
    os.close(write)
    assert bench.run(f"read @image {STATE} --key-fd {read}") == b"state"
    os.close(read)
    bench.refused(f"read @image {STATE} --key-fd {read}", "volume-key-file")


def test_info_without_a_key_shows_what_everybody_sees(bench: Bench, unchanged: Callable[[], bool]) -> None:
    plain = bench.json("info @image")
    assert set(plain) >= VISIBLE
    assert (plain["salt"], plain["io_block_bytes"], plain["algorithms"]) == ("ddeeff", 512, "sha2 aes 128")
    assert (plain["profile"], plain["aux_reserve_bytes"], plain["commit_pending"]) == ("reference", 256, False)
    full = bench.json("info @image --key-file @key")
    assert full | plain == full
    assert (full["files"], full["size_bytes"]) == (1, 64 << 10)
    assert len(bytes.fromhex(full["root_digest"])) == 32
    assert int(full["counter"]) > 0
    assert b"free bytes" in bench.run("info @image --key-file @key")
    assert unchanged()


def test_info_of_an_announcement(bench: Bench) -> None:
    bench.run("provision @announced --size 64KiB --salt aa --aux-reserve 100")
    info = bench.json("info @announced")
    assert (info["state"], info["salt"], info["size_bytes"]) == ("announced", "aa", 64 << 10)
    assert (info["from_backup"], info["aux_reserve_bytes"]) == (False, 100)
    # Where the first copy is torn, the backup that a first use makes counts.
    bench.refused("ls @announced --key-file @key", "cocoonfs-creation-info")
    assert "--first-use" in bench.stderr


def test_damaged_auxiliary_metadata_does_not_hide_the_rest(bench: Bench) -> None:
    volume = Volume.open(FileDevice(os.open(bench.image, os.O_RDWR)), KEY)
    data = bytearray(bench.image.read_bytes())
    for begin, length in volume.image.aux.extents:
        data[begin * 128 : (begin + length) * 128] = bytes(128 * length)
    volume.close()
    bench.image.write_bytes(data)
    assert bench.json("info @image")["aux_records"] is None
    assert b"unknown" in bench.run("info @image")


def test_pending_commit_is_shown_and_left(bench: Bench) -> None:
    device = FileDevice(os.open(bench.image, os.O_RDWR))
    transaction = Volume.open(device, KEY).transaction()
    transaction.write(STATE, b"later!", 3)
    transaction.prepare()
    device.close()
    before = bench.image.read_bytes()
    assert bench.json("info @image")["commit_pending"] is True
    assert bench.json("info @image --key-file @key")["commit_pending"] is True
    assert bench.files() == {STATE: (3, 6)}
    assert bench.run(f"read @image {STATE} --key-file @key") == b"later!"
    assert bench.image.read_bytes() == before


def test_output(bench: Bench) -> None:
    output = bench.folder / "out"
    assert bench.run(f"read @image {STATE} --key-file @key -o @out") == b""
    assert output.read_bytes() == b"state"
    assert output.stat().st_mode & 0o777 == 0o600
    bench.refused(f"read @image {STATE} --key-file @key --output @out", "volume-output")
    bench.run(f"read @image {STATE} --key-file @key --output @out --force")
    # Not even with --force over the image itself.
    bench.refused(f"read @image {STATE} --key-file @key --output @image --force", "volume-output")


def test_a_fifo_in_the_place_of_an_image_is_refused_at_once(bench: Bench) -> None:
    os.mkfifo(bench.folder / "fifo")
    bench.refused("ls @fifo --key-file @key", "block-io")


@pytest.mark.parametrize(
    ("line", "code", "exit_code"),
    [
        ("ls @image --key-file @wrong", "cocoonfs-authentication", 3),
        ("ls @image --key-file @none", "volume-key-file", 1),
        ("ls @image --key-file @empty", "volume-key-file", 1),
        ("ls @none --key-file @key", "volume-image", 1),
        ("ls @ --key-file @key", "block-io", 1),
        ("ls @raw --key-file @key", "cocoonfs-no-magic", 1),
        ("read @image 77 --key-file @key", "cocoonfs-no-such-file", 1),
        ("read @image 3 --key-file @key", "cocoonfs-no-such-file", 1),
    ],
)
def test_refusals(bench: Bench, line: str, code: str, exit_code: int) -> None:
    bench.put("empty", b"")
    bench.refused(line, code, code=exit_code)


@pytest.mark.parametrize(("data", "got"), [(b"", "nothing"), (b"short", "nothing"), (b"\1" * 512, "01" * 8)])
def test_what_is_no_volume_says_what_is_there(bench: Bench, data: bytes, got: str) -> None:
    bench.put("other", data)
    assert bench.refused("info @other", "cocoonfs-no-magic")["got"] == got
    assert "hint: " in bench.stderr


@pytest.mark.parametrize("length", [0, 30, 100, 512, 40_000])
def test_truncated_images(bench: Bench, length: int) -> None:
    bench.put("short", bench.image.read_bytes()[:length])
    for verb in ("ls", "check", "map"):
        assert bench.json(f"{verb} @short --key-file @key", code=3 if verb == "check" else 1)["schema"] == 1


@pytest.mark.parametrize(
    "line",
    [
        "ls @image",
        "ls @image --key 00",
        "ls @image --key-file @key --key-fd 3",
        "read @image x --key-file @key",
        "read @image -1 --key-file @key",
        "read @image 18446744073709551616 --key-file @key",
        "create @new --size 8X --key-file @key",
        "create @new --size -1 --key-file @key",
        "create @new --size 64KiB --profile fast --key-file @key",
        "frobnicate @image",
        "aux add @image not-a-uuid @key",
        "batch @image @key --key-file @key --commit-every 0",
    ],
)
def test_misuse_is_a_usage_error(bench: Bench, line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.run(line)
    assert caught.value.code == 2
    assert not (bench.folder / "new").exists()


_LISTING = """
import sys
from svsm.cli.main import main
code = main(sys.argv[1:])
print(*sorted(sys.modules), sep="\\n", file=sys.stderr)
sys.exit(code)
"""


def test_a_short_command_imports_little(bench: Bench) -> None:
    """What each command waits for before it begins; `pathlib` alone would be a tenth more."""
    words = ["volume", "ls", str(bench.image), "--key-file", str(bench.folder / "key")]
    done = subprocess.run(
        [sys.executable, "-c", _LISTING, *words], capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(done.stderr.split())
    assert "svsm.storage.cocoonfs.volume" in modules
    for unwanted in ("numpy", "asyncio", "pathlib", "shutil", "json", "h11", "unicorn", "subprocess", "socket"):
        assert unwanted not in modules
    ours = {name for name in modules if name.startswith("svsm.")}
    assert {name.split(".")[1] for name in ours} <= {"abi", "cli", "formats", "storage"}
    assert {name for name in ours if name.startswith("svsm.cli.volume.")} == {
        "svsm.cli.volume.access",
        "svsm.cli.volume.looks",
        "svsm.cli.volume.meter",
        "svsm.cli.volume.words",
    }
