# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume aux …`, with the key and without it, in volumes and announcements."""

from __future__ import annotations

import base64

import pytest

from tests.unit.cli.volume.conftest import STATE, Bench

A, B = "00000001-0000-0000-0000-000000000000", "00000002-0000-0000-0000-000000000000"


def _records(bench: Bench, name: str = "image") -> list[tuple[str, int, int]]:
    return [(r["uuid"], r["index"], r["bytes"]) for r in bench.json(f"aux list @{name}")["records"]]


@pytest.mark.parametrize("key", ["", "--key-file @key"])
def test_every_verb(bench: Bench, key: str) -> None:
    bench.put("one", b"first")
    bench.put("two", b"second one")
    bench.run(f"aux add @image {B} @one {key}")
    bench.run(f"aux add @image {A} @one {key}")
    said = bench.json(f"aux add @image {A} @two {key}")
    assert (len(said["records"]), said["reserve_bytes"] is None) == (3, False)
    assert _records(bench) == [(A, 0, 5), (A, 1, 10), (B, 0, 5)]
    assert bench.run("aux list @image").decode().splitlines()[1] == f"{A}  index 1  10 bytes"
    bench.run(f"aux replace @image {B} @two {key}")
    bench.run(f"aux remove @image {A} --index 0 {key}")
    assert _records(bench) == [(A, 0, 10), (B, 0, 10)]
    assert bench.run(f"aux read @image {B}") == b"second one"
    assert base64.b64decode(bench.json(f"aux read @image {A}")["data"]) == b"second one"
    bench.run(f"aux read @image {A} -o @out")
    assert (bench.folder / "out").read_bytes() == b"second one"
    bench.refused(f"aux read @image {A} --index 1", "cocoonfs-no-such-aux")
    bench.refused(f"aux remove @image {A} --index 1 {key}", "cocoonfs-no-such-aux")
    bench.refused(f"aux replace @image {A} @none {key}", "volume-input")
    bench.refused(f"aux add @image {'0' * 32} @one {key}", "cocoonfs-aux-kind")
    assert bench.files() == {STATE: (3, 5)}
    assert bench.json("check @image --key-file @key")["good"]


def test_the_reserve_is_the_limit_without_the_key(bench: Bench) -> None:
    bench.put("large", bytes(3000))
    bench.refused(f"aux add @image {A} @large", "cocoonfs-aux-full")
    bench.run(f"aux add @image {A} @large --key-file @key")
    bench.run("aux reserve @image none --key-file @key")
    bench.refused(f"aux remove @image {A}", "cocoonfs-aux-full")
    assert bench.json("aux reserve @image 4KiB --key-file @key")["reserve_bytes"] == 4096
    bench.run(f"aux remove @image {A}")
    bench.refused("aux reserve @image 32MiB --key-file @key", "cocoonfs-aux-full")
    bench.refused(f"aux add @image {A} @large --key-file @wrong", "cocoonfs-authentication", code=3)


def test_records_of_an_announcement_become_the_volumes(bench: Bench) -> None:
    bench.put("one", b"first")
    bench.run("provision @new --size 64KiB --aux-reserve 512")
    bench.run(f"aux add @new {A} @one")
    bench.run("write @new 16 @one --key-file @key --first-use")
    assert _records(bench, "new") == [(A, 0, 5)]
    assert bench.json("info @new")["aux_reserve_bytes"] is not None
