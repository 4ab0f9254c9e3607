# SPDX-License-Identifier: MIT OR Apache-2.0
"""What version 0.1.2 of the reference program left: journals are replayed or taken back, an unsorted list is read.

`data/cocoonfs-0.1.2/manifest.json` says how the images were made, and what is in them.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import uuid
from pathlib import Path
from typing import Any

import pytest

from svsm.formats.errors import StateError
from svsm.storage.cocoonfs import Decision, FoundJournal, Volume
from svsm.storage.cocoonfs.check import check
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.drivers.memory import MemoryDevice

_FOLDER = Path(__file__).parent / "data" / "cocoonfs-0.1.2"
_MANIFEST: dict[str, Any] = json.loads((_FOLDER / "manifest.json").read_text(encoding="utf-8"))
_KEY = bytes.fromhex(_MANIFEST["key"])
Record = tuple[uuid.UUID, bytes]
_JOURNALS = {entry["file"]: entry for entry in _MANIFEST["journals"]}


def _device(entry: dict[str, Any]) -> MemoryDevice:
    data = lzma.decompress((_FOLDER / entry["file"]).read_bytes())
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    return MemoryDevice(data, block_size_bytes=128)


def _holds(volume: Volume, files: list[list[Any]]) -> bool:
    expected = {inode: (flags, hashlib.shake_128(seed.encode()).digest(length)) for inode, flags, seed, length in files}
    return {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()} == expected


def test_the_images_are_there() -> None:
    assert len(_JOURNALS) == 6
    assert {entry["phase"] for entry in _JOURNALS.values()} == {"pending", "half-applied"}
    assert all(entry["old"] != entry["new"] for entry in _JOURNALS.values())


@pytest.mark.parametrize("file", _JOURNALS)
def test_replayed(file: str) -> None:
    entry = _JOURNALS[file]
    device = _device(entry)
    asked: list[FoundJournal] = []

    def decide(found: FoundJournal) -> Decision:
        asked.append(found)
        return Decision.YES

    volume = Volume.open(device, _KEY, decide=decide)
    assert asked == [(volume.counter, volume.root_digest)]
    assert _holds(volume, entry["new"])
    report = check(device, _KEY)
    assert (report.is_good, report.findings, report.pending) == (True, [], False)
    assert _holds(Volume.open(device, _KEY), entry["new"])


@pytest.mark.parametrize("file", _JOURNALS)
def test_taken_back(file: str) -> None:
    """With no the old state is there, unless a part of the commit was carried out: then nothing is written."""
    entry = _JOURNALS[file]
    device = _device(entry)
    before = bytes(device.data)
    if entry["phase"] == "half-applied":
        with pytest.raises(StateError) as caught:
            Volume.open(device, _KEY, decide=lambda _: Decision.NO)
        assert caught.value.code == "cocoonfs-half-applied"
        assert bytes(device.data) == before
        return
    assert _holds(Volume.open(device, _KEY, decide=lambda _: Decision.NO), entry["old"])
    report = check(device, _KEY)
    assert (report.is_good, report.findings, report.pending) == (True, [], False)
    assert _holds(Volume.open(device, _KEY), entry["old"])


def _order(device: MemoryDevice, records: list[Record]) -> list[Record]:
    """The records as they lie on the disk; what protects an extent's beginning is one byte, added to each."""
    for mask in range(256):
        plain = bytes(device.data).translate(bytes(byte ^ mask for byte in range(256)))
        if all(kind.bytes in plain for kind, _ in records):
            return sorted(records, key=lambda record: plain.index(record[0].bytes))
    raise AssertionError


def test_an_unsorted_list_is_read() -> None:
    """0.1.2 put a record before the last greater one, 5 2 9, and then refuses that; ours reads it, and sorts it."""
    entry = _MANIFEST["aux_unsorted"]
    device = _device(entry)
    five, nine, two = ((uuid.UUID(kind), data.encode()) for kind, data in entry["added"])
    assert _order(device, [five, nine, two]) == [five, two, nine]
    aux = read_aux(device)
    assert [(one.kind, one.data) for one in aux.entries] == [two, five, nine]
    assert Volume.open(device, _KEY).aux == aux
    write_aux(device, aux)
    assert _order(device, [five, nine, two]) == [two, five, nine]
    report = check(device, _KEY)
    assert (report.is_good, report.findings) == (True, [])
