# SPDX-License-Identifier: MIT OR Apache-2.0
"""Configurations by operations by direction, with the reference program: what one side writes, the other reads.

Each case is a random configuration (block sizes over their range, every algorithm, salts of any length) and gives five
images, each written by one side and then read, and mostly changed, by the other:

1. ours, made or announced by us: files created, replaced, grown, removed, auxiliary metadata changed;
2. ours, the same with a commit pending that the program carries out;
3. the program's, changed by it;
4. the program's, made or announced by it;
5. ours again, changed by us.

`test_what_is_promised` counts images and what occurs in them; `./run test` prints how many images there were.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from svsm.storage.cocoonfs import AuxMetadata, Expected, Volume, provision, read_creation_info
from svsm.storage.cocoonfs.check import check
from svsm.storage.cocoonfs.offline import read_aux
from svsm.storage.drivers.memory import MemoryDevice
from tests.cocoonfs_support import content
from tests.interop.cocoonfs_cases import ALGORITHMS, Case, case_of
from tests.interop.cocoonfs_tool import Tool

pytestmark = pytest.mark.interop
KEY = hashlib.sha256(b"matrix").digest()
A, B = (uuid.UUID(int=n << 96 | 9) for n in (1, 2))
IMAGES_PER_CASE = 5
QUICK, LONG = range(13), range(13, 120)
Files = dict[int, tuple[int, bytes]]


def test_what_is_promised() -> None:
    """At least 60 images in the quick profile and 500 in the long one; each operation with many configurations."""
    quick, long = [case_of(seed) for seed in QUICK], [case_of(seed) for seed in (*QUICK, *LONG)]
    images = [IMAGES_PER_CASE * len(cases) for cases in (quick, long)]
    operations = [Counter(name for case in cases for name in case.operations) for cases in (quick, long)]
    assert images[0] >= 60
    assert images[1] >= 500
    assert len(operations[0]) == 10
    assert min(operations[1].values()) >= 24
    assert {case.algorithms for case in long} == set(ALGORITHMS)
    for name in quick[0].sizes:
        assert len({case.sizes[name] for case in long}) >= 4, name


def _apply(files: Files, changes: dict[int, bytes | None]) -> None:
    for inode, data in changes.items():
        if data is None:
            del files[inode]
        else:
            files[inode] = (inode % 256, data)


def _steps(case: Case, who: str, count: int) -> list[dict[int, bytes | None]]:
    """Create; then replace, grow, remove."""
    made: dict[int, bytes | None] = {16 + n: content(f"{case.seed} {who} {n}", 397 * n % 3000) for n in range(count)}
    replaced = {
        17: content(f"{case.seed} {who} replaced", 300),
        18: content(f"{case.seed} {who} grown", 9000),
        19: None,
        1 << 40: b"far",
    }
    return [made, replaced]


def _write_ours(volume: Volume, files: Files, changes: dict[int, bytes | None]) -> None:
    with volume.transaction() as transaction:
        for inode, data in changes.items():
            if data is None:
                transaction.unlink(inode)
            else:
                transaction.write(inode, data, inode % 256)
    _apply(files, changes)


def _write_theirs(tool: Tool, files: Files, changes: dict[int, bytes | None]) -> None:
    for inode, data in changes.items():
        if data is None:
            tool.remove(inode)
        else:
            tool.write(inode, data, inode % 256)
    _apply(files, changes)


def _they_agree(tool: Tool, device: MemoryDevice, files: Files, aux: AuxMetadata, sample: int) -> None:
    tool.give(device)
    assert tool.files() == {inode: flags for inode, (flags, _) in files.items()}
    for inode in sorted(files)[:: max(1, len(files) // sample)]:
        assert tool.read(inode) == files[inode][1]
    assert tool.aux() == [(entry.kind, entry.data) for entry in aux.entries]


def _we_agree(device: MemoryDevice, files: Files, aux: AuxMetadata) -> Volume:
    report = check(device, KEY)
    assert report.is_good, report.findings
    volume = Volume.open(device, KEY)
    assert {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()} == files
    assert volume.aux.entries == aux.entries
    assert read_aux(device).entries == aux.entries
    return volume


def _made_by_us(case: Case, tool: Tool) -> tuple[MemoryDevice, AuxMetadata]:
    aux = AuxMetadata(reserve_bytes=case.reserve)
    device = MemoryDevice(case.size, block_size_bytes=128)
    if not case.announced:
        Volume.create(device, KEY, salt=case.salt, layout=case.layout, aux=aux)
        return device, aux
    provision(device, salt=case.salt, layout=case.layout, aux=aux)
    tool.give(device)
    assert tool.files() == {}
    return tool.take(), aux


def _made_by_them(case: Case, tool: Tool) -> MemoryDevice:
    if not case.announced:
        tool.run("mkfs", "-K", KEY.hex(), *case.options, "-n")
        return tool.take()
    tool.run("write-mkfs-info-header", *case.options)
    device = tool.take()
    info = read_creation_info(device)
    assert (info.layout, info.salt) == (case.layout, case.salt)
    Volume.open(device, KEY, first_use=True, expected=Expected(case.layout, case.salt))
    tool.give(device)
    return device


def _ours_first(case: Case, tool: Tool) -> int:
    files: Files = {}
    device, aux = _made_by_us(case, tool)
    volume = Volume.open(device, KEY, trim=case.trim)
    for changes in _steps(case, "ours", 70 if case.many else 8):
        _write_ours(volume, files, changes)
    with volume.transaction() as transaction:
        aux = aux.add(B, content(f"{case.seed} b", 40))
        transaction.set_aux(aux)
    _they_agree(tool, device, files, aux, 4)
    # A commit that is pending: they carry it out.
    transaction = volume.transaction()
    pending: dict[int, bytes | None] = {16: content("pending", 700), 21: None, 900: content("new", 5000)}
    for inode, data in pending.items():
        transaction.unlink(inode) if data is None else transaction.write(inode, data, inode % 256)
    transaction.prepare()
    _apply(files, pending)
    _they_agree(tool, device, files, aux, 3)
    # And they go on.
    _write_theirs(tool, files, {16: b"theirs", 22: None})
    tool.edit_aux("add-entry", str(A), data=b"theirs", key=True)
    _we_agree(tool.take(), files, aux.add(A, b"theirs"))
    return 3


def _theirs_first(case: Case, tool: Tool) -> int:
    files: Files = {}
    _made_by_them(case, tool)
    for changes in _steps(case, "theirs", 12 if case.many else 6):
        _write_theirs(tool, files, changes)
    tool.edit_aux("add-entry", str(A), data=b"a", key=case.seed % 2 == 0)
    device = tool.take()
    aux = AuxMetadata().add(A, b"a")
    volume = _we_agree(device, files, aux)
    assert (volume.layout, volume.salt) == (case.layout, case.salt)
    _write_ours(volume, files, {17: b"ours", 20: None, 1 << 50: content("large", 7000)})
    with volume.transaction() as transaction:
        transaction.set_aux(volume.aux.add(B, b"ours"))
    _we_agree(device, files, aux.add(B, b"ours"))
    _they_agree(tool, device, files, aux.add(B, b"ours"), 3)
    return 2


@pytest.mark.parametrize("seed", [*QUICK, *[pytest.param(n, marks=pytest.mark.long) for n in LONG]])
def test_each_reads_what_the_other_writes(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    case, tool = case_of(seed), Tool(tmp_path, KEY)
    images = _ours_first(case, tool) + _theirs_first(case, tool)
    record_property("images", images)
    assert images == IMAGES_PER_CASE
