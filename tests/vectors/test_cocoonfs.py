# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reference program's images: they open, read, and replay exactly as its manifest says."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from svsm.abi.block import Range
from svsm.cli.volume.words import size
from svsm.formats.errors import FormatError, IntegrityError
from svsm.storage.cocoonfs import (
    AuxMetadata,
    CreationInfo,
    Decision,
    Expected,
    FoundJournal,
    Probe,
    Volume,
    probe,
    read_creation_info,
)
from svsm.storage.cocoonfs.offline import read_aux
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice
from tests.support import vectors


class _NoDiscard(MemoryDevice):
    """Discards do nothing, as on the files that the reference program wrote to."""

    def discard(self, ranges: Sequence[Range]) -> None:
        return None


@functools.cache
def _manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((vectors("cocoonfs") / "manifest.json").read_text())
    return loaded


def _names(kind: str) -> list[str]:
    try:
        entries = _manifest()[kind]
    except pytest.skip.Exception:
        return []
    return [entry["file"] for entry in entries]


def _entry(kind: str, file: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in _manifest()[kind] if entry["file"] == file)
    return found


def _device(entry: dict[str, Any], options: dict[str, Any]) -> MemoryDevice:
    data = (vectors("cocoonfs") / entry["file"]).read_bytes()
    if entry["compression"] == "xz":
        data = lzma.decompress(data)
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    return _NoDiscard(data, block_size_bytes=128 if options["force_small_device_blocks"] else 4096)


def _same_files(volume: Volume, files: dict[str, Any]) -> bool:
    found = {info.inode: info.flags for info in volume.list()}
    if found != {int(inode): described["flags"] for inode, described in files.items()}:
        return False
    for inode, described in files.items():
        data = volume.read(int(inode))
        if len(data) != described["length"] or hashlib.sha256(data).hexdigest() != described["sha256"]:
            return False
    return True


def _same_aux(found: AuxMetadata, described: list[dict[str, Any]]) -> bool:
    return [(str(e.kind), len(e.data), hashlib.sha256(e.data).hexdigest()) for e in found.entries] == [
        (e["uuid"], e["length"], e["sha256"]) for e in described
    ]


def _first_use(device: MemoryDevice, key: bytes, info: CreationInfo, entry: dict[str, Any]) -> None:
    """Make the volume that the reference program announced: with what its manifest says, and nothing else."""
    expected = Expected(salt=bytes.fromhex(entry["salt"]), min_size_bytes=info.size_bytes)
    volume = Volume.open(device, key, first_use=True, expected=expected)
    for opened in (volume, Volume.open(device, key, expected=expected)):
        assert opened.layout == info.layout
        assert opened.aux == info.aux
        assert opened.list() == []
    with volume.transaction() as transaction:
        transaction.write(16, b"first")
    assert Volume.open(device, key).read(16) == b"first"


def test_the_vectors_are_there() -> None:
    vectors("cocoonfs")
    assert len(_names("images")) == 60
    assert len(_names("crash")) == 39


@pytest.mark.parametrize("file", _names("images"))
def test_image(file: str) -> None:
    entry = _entry("images", file)
    device = _device(entry, entry)
    before = bytes(device.data)
    key = bytes.fromhex(entry["key"])
    if entry["state"] == "creation-info-only":
        assert probe(device) is Probe.CREATION_INFO
        with pytest.raises(FormatError) as caught:
            Volume.open(device, key)
        assert caught.value.code == "cocoonfs-creation-info"
        assert _same_aux(read_aux(device), entry["aux"])
    else:
        assert probe(device) is Probe.COCOONFS
        assert _same_aux(read_aux(device), entry["aux"])
        volume = Volume.open(device, key)
        assert _same_aux(volume.aux, entry["aux"])
        assert _same_files(volume, entry["files"])
        listed = "".join(f"{info.inode} 0x{info.flags:02x}\n" for info in volume.list())
        assert listed == entry["list_files"]
    assert bytes(device.data) == before
    if entry["state"] == "creation-info-only":
        info = read_creation_info(device)
        if device.size_bytes < info.size_bytes:  # "trimmed": to be put on a disk of that size
            with pytest.raises(FormatError) as caught:
                Volume.open(device, key, first_use=True)
            assert caught.value.code == "cocoonfs-too-small"
            device = _NoDiscard(before.ljust(info.size_bytes, b"\0"), block_size_bytes=device.block_size_bytes)
        _first_use(device, key, info, entry)


_BLOCK_SIZES = {
    "--allocation-block-size": "allocation_block_bytes",
    "--io-block-size": "io_block_bytes",
    "--auth-tree-data-block-size": "data_block_bytes",
    "--auth-tree-node-size": "tree_node_bytes",
    "--allocation-bitmap-file-block-size": "bitmap_block_bytes",
    "--inode-index-tree-leaf-node-size": "leaf_node_bytes",
}
_RESERVE = "--aux-fs-metadata-extra-reserve-capacity"


def _refusals() -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = _manifest()["refused"]
    except pytest.skip.Exception:
        return []
    return found


def _code_for(message: str) -> str:
    """Our error for the reference program's: algorithms that do not go together, room, block sizes; none for a word."""
    if "invalid value" in message:
        return ""
    if "doesn't support specified target security strength" in message:
        return "cocoonfs-strength"
    return "cocoonfs-too-small" if "NoSpace" in message else "cocoonfs-layout"


@pytest.mark.parametrize("entry", _refusals(), ids=lambda entry: " ".join(entry["options"]))
def test_refused(entry: dict[str, Any]) -> None:
    """What its mkfs refuses is refused here too, each for its own reason; there is none that ours would accept."""
    options = dict(zip(entry["options"][::2], entry["options"][1::2], strict=True))
    algorithms = options.pop("-H"), options.pop("-C"), int(options.pop("-t"))
    code = _code_for(entry["message"])
    if not code:
        with pytest.raises(argparse.ArgumentTypeError):
            size(options["-s"])
        return
    device = MemoryDevice(size(options.pop("-s")), block_size_bytes=128)
    reserve = None if options.pop(_RESERVE, "") == "disabled" else 1024
    sizes = {_BLOCK_SIZES[name]: size(text) for name, text in options.items()}

    def make() -> None:
        layout = layout_of(*algorithms, **sizes)  # type: ignore[arg-type]
        assert code == "cocoonfs-too-small"
        Volume.create(device, b"key", salt=b"", layout=layout, aux=AuxMetadata(reserve_bytes=reserve))

    with pytest.raises(FormatError) as caught:
        make()
    assert caught.value.code == code
    assert not any(device.data)


def test_refusals_of_every_kind_are_there() -> None:
    vectors("cocoonfs")
    kinds = Counter(_code_for(entry["message"]) for entry in _refusals())
    assert kinds == {"cocoonfs-strength": 10, "cocoonfs-too-small": 2, "cocoonfs-layout": 5, "": 1}


@pytest.mark.parametrize("file", _names("images"))
def test_wrong_key(file: str) -> None:
    entry = _entry("images", file)
    if entry["state"] == "creation-info-only":
        return
    key = bytearray.fromhex(entry["key"])
    key[0] ^= 1
    with pytest.raises(IntegrityError) as caught:
        Volume.open(_device(entry, entry), bytes(key))
    assert caught.value.code == "cocoonfs-authentication"


@pytest.mark.parametrize("file", _names("crash"))
def test_crash(file: str) -> None:
    entry = _entry("crash", file)
    scenario = next(s for s in _manifest()["crash_scenarios"] if s["name"] == entry["scenario"])
    device = _device(entry, scenario)
    before = bytes(device.data)
    key = bytes.fromhex(scenario["key"])
    if probe(device) is Probe.CREATION_INFO:
        with pytest.raises(FormatError) as refused:
            Volume.open(device, key)
        assert refused.value.code == "cocoonfs-creation-info"
        assert bytes(device.data) == before
        sides = ["old", "new"] if entry["expect"] == "same" else [entry["expect"]]
        info = read_creation_info(device)
        assert all(_same_aux(info.aux, scenario[side]["aux"]) for side in sides)
        _first_use(device, key, info, scenario)
        return
    if entry["expect"] == "refuse":
        with pytest.raises(IntegrityError) as caught:
            Volume.open(device, key)
        assert caught.value.code == "cocoonfs-authentication"
        assert bytes(device.data) == before  # the reference program has half applied it by then
        return
    volume = Volume.open(device, key)
    sides = ["old", "new"] if entry["expect"] == "same" else [entry["expect"]]
    assert all(_same_files(volume, scenario[side]["files"]) for side in sides)
    assert all(_same_aux(volume.aux, scenario[side]["aux"]) for side in sides)
    expected = entry["reference"]["0.1.3"].get("sha256_after_open")
    if expected is not None and not entry["file"].startswith("crash/aux-keyless"):  # torn copies: only we mend them
        assert hashlib.sha256(device.data).hexdigest() == expected


@pytest.mark.parametrize("file", _names("crash"))
def test_crash_taken_back(file: str) -> None:
    """With `decide` saying no, a pending journal leaves the old contents; where none is pending it is not asked."""
    entry = _entry("crash", file)
    if entry["phase"] != "journal-valid" or entry["expect"] != "new":
        return
    scenario = next(s for s in _manifest()["crash_scenarios"] if s["name"] == entry["scenario"])
    device = _device(entry, scenario)
    asked: list[int] = []

    def decide(found: FoundJournal) -> Decision:
        asked.append(found.counter)
        return Decision.NO

    volume = Volume.open(device, bytes.fromhex(scenario["key"]), decide=decide)
    assert asked == [volume.counter + 1]
    assert _same_files(volume, scenario["old"]["files"])


@pytest.mark.parametrize("file", _names("images"))
def test_continue_writing(file: str) -> None:
    """Volumes of every configuration that opens also take a transaction of ours."""
    entry = _entry("images", file)
    if entry["state"] == "creation-info-only" or entry["size"] <= 6144:
        return  # not a volume yet, or no room for a file
    device = _device(entry, entry)
    key = bytes.fromhex(entry["key"])
    volume = Volume.open(device, key)
    files = {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()}
    with volume.transaction() as transaction:
        transaction.write(1 << 48, b"ours", 7)
        for inode in list(files)[:1]:
            transaction.unlink(inode)
            del files[inode]
    files[1 << 48] = (7, b"ours")
    for opened in (volume, Volume.open(device, key)):
        assert {info.inode: (info.flags, opened.read(info.inode)) for info in opened.list()} == files
