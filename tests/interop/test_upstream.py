# SPDX-License-Identifier: MIT OR Apache-2.0
"""Faults in other people's programs, shown: a reproducer for each that docs/UPSTREAM.md says is shown here.

A program that has been mended makes its test fail; then the page changes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.formats.errors import BackendError
from svsm.formats.virtio import BlkFeature
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.memory import MemoryDevice
from svsm.storage.drivers.virtio.blk import BlkPolicy
from svsm.storage.drivers.virtio.split import SplitQueue
from svsm.storage.drivers.virtio.vhost_user import VhostUserBlk, VhostUserTransport, open_vhost_user
from svsm.testing.hostile import qemu_trial
from svsm.testing.hostile.trial import Outcome
from svsm.testing.storage_daemon import StorageDaemon
from tests.qmp_support import Monitor
from tests.support import peer, vectors

pytestmark = pytest.mark.interop

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "UPSTREAM.md"
_TESTS = Path(__file__).resolve().parents[1]
_MIB = 1 << 20
_KEY = hashlib.sha256(b"upstream").hexdigest()


def test_every_reproducer_on_the_page_exists() -> None:
    page = _PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`tests/([\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for file, test in named:
        source = (_TESTS / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, (file, test)
    own = Path(__file__).read_text(encoding="utf-8")
    for test in re.findall(r"^def (test_\w+)\(", own, re.M)[1:]:
        assert test in page, f"{test} is not on the page"


# ---- QEMU -----------------------------------------------------------------------------------------------------------


def test_features_that_were_not_offered_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that cannot work with a choice of features must not keep FEATURES_OK (VIRTIO 1.2 §2.2.2); QEMU does."""
    attack = next(one for one in qemu_trial.CASES if one.name == "every feature bit is offered")
    accepted: list[int] = []
    outcome = qemu_trial.QemuTrial.outcome

    def look(trial: qemu_trial.QemuTrial) -> Outcome:
        accepted.append(trial.driver.features)
        return outcome(trial)

    monkeypatch.setattr(qemu_trial.QemuTrial, "outcome", look)
    qemu_trial.run(attack, "split", program=peer("qemu-system-x86_64"))
    assert accepted[0] & BlkFeature.RO, "the disk is writable, so QEMU did not offer this"


# ---- qemu-storage-daemon --------------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vu") as made:
        image = Path(made) / "disk.raw"
        with image.open("wb") as file:
            file.truncate(_MIB)
        yield Path(made)


def _daemon(folder: Path, **options: bool) -> StorageDaemon:
    return StorageDaemon(peer("qemu-storage-daemon"), folder / "disk.raw", folder, **options)


def _transport(driver: VhostUserBlk) -> VhostUserTransport:
    assert isinstance(driver._transport, VhostUserTransport)
    return driver._transport


def test_the_error_eventfd_is_silent(folder: Path) -> None:
    """libvhost-user gives up on a ring, closes the socket, and does not signal what SET_VRING_ERR gave it for that."""
    with _daemon(folder) as daemon:
        driver = open_vhost_user(str(daemon.socket), policy=BlkPolicy(indirect=False, packed=False))
        error = os.dup(_transport(driver)._vrings[0].error)
        queue = driver._lanes[0].queue
        assert isinstance(queue, SplitQueue)
        queue._heads[:] = [60000] * len(queue._heads)
        with pytest.raises(BackendError) as caught:
            driver.read([(0, 4096)])
        assert caught.value.details["violation"] == "vhost-user-gone"
        with pytest.raises(BlockingIOError):
            os.eventfd_read(error)
        os.close(error)
        driver.close()


def test_the_name_is_shorter_than_its_length_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GET_ID: a used length of 21 (20 bytes and the status), of which the name and its zero are written."""
    with _daemon(folder) as daemon:
        driver = open_vhost_user(str(daemon.socket))

        def fill(memory: DmaMemory, offset: int, length: int) -> None:
            memory.bytes[offset : offset + length] = b"\xee" * length

        monkeypatch.setattr(DmaMemory, "zero", fill)
        assert driver.get_id() == b"vhost_user_blk"
        monkeypatch.undo()
        assert max(driver._lanes[0].queue.written) == 21
        assert bytes(driver._shared.dma.bytes).count(b"vhost_user_blk\0" + b"\xee" * 5) == 1
        driver.close()


def test_a_resize_does_not_reach_the_front_end(folder: Path) -> None:
    """`block_resize` of the exported node changes it, and neither the configuration nor a later connection's."""
    with _daemon(folder, monitor=True) as daemon, socket.socket(socket.AF_UNIX) as monitor:
        driver = open_vhost_user(str(daemon.socket))
        monitor.connect(str(daemon.monitor_socket))
        ask = Monitor(monitor).ask
        assert ask("block_resize", **{"node-name": "disk", "size": 2 * _MIB}) == {}
        assert (folder / "disk.raw").stat().st_size == 2 * _MIB
        assert int.from_bytes(_transport(driver).configuration(0, 8), "little") * 512 == _MIB
        driver.reconnect()
        sizes = driver.size_bytes
        driver.close()
    assert sizes == _MIB


# ---- the reference CocoonFS tool ------------------------------------------------------------------------------------


def _tool(image: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(peer("cocoonfs")), "-i", str(image), "-f", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def _mkfs(image: Path, *words: str) -> subprocess.CompletedProcess[str]:
    layout = ("-H", "sha2", "-C", "aes", "-t", "128", "-K", _KEY, "-I", "00")
    return _tool(image, "mkfs", *layout, *words)


def test_sizes_without_a_unit_are_doubled(tmp_path: Path) -> None:
    image = tmp_path / "image"
    for words, size in (("1048576B", _MIB), ("1M", _MIB), ("1048576", 2 * _MIB)):
        image.unlink(missing_ok=True)
        assert _mkfs(image, "-s", words).returncode == 0
        assert image.stat().st_size == size


def test_block_sizes_round_down_silently(tmp_path: Path) -> None:
    headers = []
    for words in ("128B", "200B"):
        image = tmp_path / words
        assert _mkfs(image, "-s", "1M", "--allocation-block-size", words).returncode == 0
        headers.append(image.read_bytes()[:40])
    assert headers[0] == headers[1]


def test_some_sizes_are_cut(tmp_path: Path) -> None:
    image = tmp_path / "image"
    for size in (559104, 559616, 560640):
        image.unlink(missing_ok=True)
        assert _mkfs(image, "-s", f"{size}B").returncode == 0
        assert image.stat().st_size == 558080


def test_the_size_of_an_existing_file_is_lost(tmp_path: Path) -> None:
    """The default of ``-s`` is "backing file's size", but the file is emptied before it is measured."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * _MIB))
    done = _mkfs(image)
    assert done.returncode != 0
    assert "NoSpace" in done.stdout + done.stderr
    assert image.stat().st_size == 0


def test_a_journal_that_is_refused_has_been_half_applied(tmp_path: Path) -> None:
    """A journal over distant bitmap regions, written by 0.1.2: 0.1.3 refuses it, and has changed the image.

    Ours refuses it and leaves every byte (`tests/vectors/test_cocoonfs.py`).
    """
    root = vectors("cocoonfs")
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    entry = next(one for one in manifest["crash"] if one["expect"] == "refuse")
    scenario = next(one for one in manifest["crash_scenarios"] if one["name"] == entry["scenario"])
    image = tmp_path / "image"
    before = lzma.decompress((root / entry["file"]).read_bytes())
    image.write_bytes(before)
    done = _tool(image, "list-files", "-K", scenario["key"])
    assert "AuthenticationFailure" in done.stdout + done.stderr
    assert image.read_bytes() != before


def test_a_list_that_0_1_2_left_unsorted_is_not_read(tmp_path: Path) -> None:
    """0.1.2 put the record 2 between 5 and 9; 0.1.3, which sorts, refuses the list until ours has written it anew."""
    image, folder = tmp_path / "image", _TESTS / "vectors" / "data" / "cocoonfs-0.1.2"
    device = MemoryDevice(lzma.decompress((folder / "aux-unsorted.img.xz").read_bytes()), block_size_bytes=128)
    image.write_bytes(device.data)
    done = _tool(image, "aux-fs-metadata", "list-entries")
    assert "FsFormatError(15)" in done.stdout + done.stderr
    write_aux(device, read_aux(device))
    image.write_bytes(device.data)
    (tmp_path / "record").write_bytes(b"1")
    kinds = [f"{number:08x}-0000-0000-0000-000000000009" for number in (1, 2, 5, 7, 9)]
    for kind in (kinds[3], kinds[0]):
        edit = ("aux-fs-metadata", "edit", "add-entry", "-i", str(tmp_path / "record"), kind)
        assert _tool(image, *edit).returncode == 0
    assert _tool(image, "aux-fs-metadata", "list-entries").stdout.split() == kinds
    assert len(read_aux(MemoryDevice(image.read_bytes(), block_size_bytes=128)).entries) == 5
