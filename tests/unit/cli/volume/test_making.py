# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume create | provision`: what they make, and what they leave alone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from svsm.cli.volume.words import size
from svsm.storage.cocoonfs import Volume, read_creation_info
from svsm.storage.cocoonfs.presets import layout_of, names_of, sizes_of
from svsm.storage.cocoonfs.profiles import PROFILES, TUNED, profile_of
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.cli.volume.conftest import KEY, Bench


def _memory(path: Path) -> MemoryDevice:
    return MemoryDevice(path.read_bytes(), block_size_bytes=128)


def test_create_gives_the_reference_default(bench: Bench) -> None:
    made = bench.json("create @new --size 0x10000 --salt 00ff --key-file @key")
    new = bench.folder / "new"
    assert (new.stat().st_size, new.stat().st_mode & 0o777) == (64 << 10, 0o600)
    volume = Volume.open(_memory(new), KEY)
    assert (volume.layout, volume.salt, volume.list()) == (layout_of(), b"\x00\xff", [])
    assert (made["size_bytes"], made["root_digest"]) == (64 << 10, volume.root_digest.hex())
    # A salt that is not named is random, and says so.
    assert len(bytes.fromhex(bench.json("create @other --size 64K --key-file @key")["salt"])) == 16


def test_profiles_algorithms_and_sizes(bench: Bench) -> None:
    bench.run("create @tuned --size 256KiB --profile tuned --key-file @key")
    assert bench.json("info @tuned")["profile"] == "tuned"
    bench.run(
        "create @new --size 256KiB --hash sha3 --cipher camellia --strength 256 --data-block 1KiB --key-file @key"
    )
    volume = Volume.open(_memory(bench.folder / "new"), KEY)
    assert volume.layout == layout_of("sha3", "camellia", 256, data_block_bytes=1024)
    assert bench.json("info @new")["algorithms"] == "sha3 camellia 256"
    bench.refused("create @x --size 64KiB --hash sm3 --strength 256 --key-file @key", "cocoonfs-strength")
    bench.refused("create @x --size 64KiB --data-block 3000 --key-file @key", "cocoonfs-layout")
    assert not (bench.folder / "x").exists()


def test_weak_algorithms_need_a_flag_each_time(bench: Bench) -> None:
    bench.refused("create @weak --size 64KiB --hash sha1 --key-file @key", "cocoonfs-weak", code=3)
    bench.run("create @weak --size 64KiB --hash sha1 --allow-weak --key-file @key")
    bench.refused("ls @weak --key-file @key", "cocoonfs-weak", code=3)
    assert bench.json("ls @weak --key-file @key --allow-weak")["files"] == []
    assert bench.json("check @weak --key-file @key", code=3)["findings"][0]["kind"] == "does-not-open"
    bench.refused("repair @weak --key-file @key", "cocoonfs-weak", code=3)
    bench.run("repair @weak --key-file @key --allow-weak")


def test_names_of_every_profile_and_preset() -> None:
    for name, sizes in PROFILES.items():
        layout = layout_of("sha2", "aes", 256, **sizes)
        assert profile_of(layout) == name
        assert layout_of("sha2", "aes", 256, **sizes_of(layout)) == layout
        assert names_of(layout) == ("sha2", "aes", 256)
    odd = layout_of().replace(kdf_hash=0x000C)
    assert names_of(odd) is None
    assert profile_of(layout_of(data_block_bytes=1024)) is None
    assert TUNED["data_block_bytes"] > layout_of().io_bytes


def test_nothing_is_overwritten_without_force(bench: Bench) -> None:
    for verb in ("create @image --key-file @key", "provision @image"):
        bench.refused(f"{verb} --size 64KiB", "volume-exists")
    bench.refused("create @new --key-file @key", "volume-size")
    bench.refused("create @ --key-file @key --force", "volume-image")
    details = bench.refused("create @none/new --size 64KiB --key-file @key", "volume-image")
    assert details["path"] == f"{bench.folder}/none/new"
    bench.run("create @image --size 32KiB --key-file @raw --force")
    assert bench.image.stat().st_size == 32 << 10
    assert bench.files() == {}


def test_a_volume_that_does_not_fit_leaves_no_file(bench: Bench) -> None:
    bench.refused("create @new --size 1KiB --key-file @key", "cocoonfs-too-small")
    bench.refused("provision @new --size 1KiB", "cocoonfs-too-small")
    bench.refused(f"create @new --size 64KiB --salt {'ab' * 256} --key-file @key", "cocoonfs-salt")
    bench.refused("create @new --size 64KiB --aux-reserve 32MiB --key-file @key", "cocoonfs-aux-full")
    bench.refused("create @new --size 64KiB --io-block 128 --key-file @key", "cocoonfs-device-blocks")
    assert not (bench.folder / "new").exists()
    bench.run("create @new --size 64KiB --io-block 128 --ignore-block-size --key-file @key")
    assert bench.files("new") == {}


@pytest.mark.parametrize("size", ["0", "5", "1000", "1KiB"])
@pytest.mark.parametrize("verb", ["create @new --key-file @key", "provision @new"])
def test_a_size_that_is_too_small_gets_a_hint(bench: Bench, verb: str, size: str) -> None:
    bench.refused(f"{verb} --size {size}", "cocoonfs-too-small")
    assert "hint: " in bench.stderr


@pytest.mark.parametrize(
    "line",
    [
        "create @new --key-file @key --size 70000",
        "provision @new --size 70000",
        "create @image --key-file @key --force --size 70000",
        "resize @image 70000 --key-file @key",
    ],
)
def test_a_size_that_is_rounded_down_is_said(bench: Bench, line: str) -> None:
    said = bench.run(line).decode()
    assert "The size was rounded down, from 70000 to 69632 bytes" in said
    assert "69632 bytes" in said.splitlines()[0]
    assert "The size was" not in bench.run(line.replace("@new", "@other").replace("70000", "69632")).decode()


def test_a_disk_in_use_is_refused(bench: Bench) -> None:
    with bench.image.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for line in (
            "create @image --force --size 32KiB --key-file @key",
            "provision @image --force",
            "write @image 16 @key --key-file @key",
            "repair @image --key-file @key",
            "rekey @image --key-file @key --new-key-file @wrong",
            "ls @image --key-file @key",
        ):
            bench.refused(line, "block-in-use")
        fcntl.flock(other, fcntl.LOCK_SH)
        # Those that look go together.
        assert len(bench.files()) == 1
    assert not [path for path in os.listdir(bench.folder) if path.startswith(".")]


def test_provision_and_first_use(bench: Bench) -> None:
    said = bench.json("provision @new --size 64KiB --salt aabb --aux-reserve 1KiB --profile reference")
    info = read_creation_info(_memory(bench.folder / "new"))
    assert (info.salt, info.layout.pack().hex()) == (b"\xaa\xbb", said["layout"])
    bench.refused("write @new 16 @raw --key-file @key", "cocoonfs-creation-info")
    line = "write @new 16 @raw --key-file @key --first-use"
    bench.refused(f"{line} --expect-salt aabbcc", "cocoonfs-unexpected", code=3)
    for wrong in ("0", "65535", "128KiB"):
        bench.refused(f"{line} --expect-size {wrong}", "cocoonfs-unexpected", code=3)
    other = layout_of("sm3").pack().hex()
    bench.refused(f"{line} --expect-layout {other}", "cocoonfs-unexpected", code=3)
    bench.refused(f"{line} --expect-layout 00", "record-length")
    assert bench.json("info @new")["state"] == "announced"
    bench.run(f"{line} --expect-salt aabb --expect-size 64KiB --expect-layout {said['layout']}")
    assert bench.files("new") == {16: (0, 32)}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("4096", 4096), ("0x1000", 4096), ("4KiB", 4096), ("4K", 4096), ("2 MiB", 2 << 20), ("1G", 1 << 30)],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "KiB", "4kb", "1.5MiB", "-1", "0x", "4 4", "١", "4KB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(Exception, match="not a size"):
        size(text)
