# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume check | repair`: exit codes, and a report that says what to do."""

from __future__ import annotations

import os

import pytest

from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.file import FileDevice
from tests.unit.cli.volume.conftest import KEY, STATE, Bench


def _large_file(bench: Bench) -> int:
    """Where a file of 20,000 bytes begins, in bytes."""
    bench.put("in", bytes(20_000))
    bench.run("write @image 16 @in --key-file @key")
    volume = Volume.open(FileDevice(os.open(bench.image, os.O_RDWR)), KEY)
    entry = volume.image.find(16)
    assert entry is not None
    (begin, _), *_ = volume.image.extents_of(entry)[0]
    volume.close()
    return begin * 128


def test_a_good_volume(bench: Bench) -> None:
    report = bench.json("check @image --key-file @key")
    assert (report["good"], report["files"], report["findings"]) == (True, 1, [])
    assert report["counter"] == bench.json("info @image --key-file @key")["counter"]
    assert bench.run("check @image --key-file @key").decode().splitlines()[-1] == "The volume is good."
    before = bench.image.read_bytes()
    assert bench.json("repair @image --key-file @key")["done"] == []
    assert bench.image.read_bytes() == before


def test_damage_is_exit_code_3_and_never_repaired(bench: Bench) -> None:
    place = _large_file(bench) + 5000
    data = bytearray(bench.image.read_bytes())
    data[place] ^= 1
    bench.image.write_bytes(data)
    report = bench.json("check @image --key-file @key", code=3)
    assert {finding["kind"] for finding in report["findings"]} >= {"not-authentic", "file"}
    text = bench.run("check @image --key-file @key", code=3).decode()
    assert "error: " in text
    assert "restore" in text
    assert bench.json("repair @image --key-file @key", code=3)["done"] == []
    assert "Nothing was written" in bench.run("repair @image --key-file @key", code=3).decode()
    assert bench.image.read_bytes() == data


def test_a_wrong_key_is_exit_code_3(bench: Bench) -> None:
    report = bench.json("check @image --key-file @wrong", code=3)
    assert [finding["kind"] for finding in report["findings"]] == ["does-not-open"]
    assert "does not open" in bench.run("check @image --key-file @wrong", code=3).decode()


@pytest.mark.parametrize("as_json", [True, False])
def test_repair_carries_out_a_pending_commit(bench: Bench, as_json: bool) -> None:
    device = FileDevice(os.open(bench.image, os.O_RDWR))
    transaction = Volume.open(device, KEY).transaction()
    transaction.write(99, b"pending")
    transaction.prepare()
    device.close()
    assert bench.json("check @image --key-file @key")["pending"] is True
    if as_json:
        report = bench.json("repair @image --key-file @key")
        assert (len(report["done"]), report["after"]["pending"]) == (1, False)
    else:
        assert "mended: The pending commit" in bench.run("repair @image --key-file @key").decode()
    assert bench.files() == {STATE: (3, 5), 99: (0, 7)}
    assert bench.json("check @image --key-file @key")["pending"] is False
