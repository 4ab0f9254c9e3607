# SPDX-License-Identifier: MIT OR Apache-2.0
"""Recordings of everything that writes to a volume, for the enumeration of power cuts."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace

from svsm.formats.errors import FormatError, SvsmError
from svsm.storage.cocoonfs import (
    AuxMetadata,
    CreationInfo,
    Decision,
    FoundJournal,
    Probe,
    Volume,
    probe,
    provision,
    read_creation_info,
)
from svsm.storage.cocoonfs.check import Severity, check
from svsm.storage.cocoonfs.creation import backup_offset
from svsm.storage.cocoonfs.group import CommitGroup
from svsm.storage.cocoonfs.headers import find_header
from svsm.storage.cocoonfs.layout import CREATION_MAGIC
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.cocoonfs.repair import repair
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk
from tests.cocoonfs_support import content, fixed_random
from tests.unit.storage.cocoonfs.cuts import Outcome, WatchedDevice, Workload
from tests.unit.storage.cocoonfs.faulty import commit_with_a_fault, leak
from tests.unit.storage.cocoonfs.recorder import KEY, Configuration, Recorder, judge, state_of

__all__ = ["WORKLOADS"]

A, B = (uuid.UUID(int=n << 96 | 7) for n in (1, 2))
AUX = AuxMetadata(reserve_bytes=200).add(A, b"where the broker is")
Files = dict[int, bytes | None]


def _device(configuration: Configuration, data: bytes | bytearray | int) -> MemoryDevice:
    return MemoryDevice(data, block_size_bytes=configuration.block_size)


def _base(configuration: Configuration, aux: AuxMetadata = AUX) -> bytes:
    device = _device(configuration, configuration.size)
    layout = configuration.layout
    volume = Volume.create(device, KEY, salt=b"salt", layout=layout, aux=aux, random=fixed_random("base"))
    with volume.transaction() as transaction:
        transaction.write(16, content("sixteen", 1500), 1)
        transaction.write(17, content("seventeen", 700), 2)
        transaction.write(18, content("eighteen", 60), 3)
    return bytes(device.data)


def _commits(
    name: str, configuration: Configuration, steps: Iterable[Callable[[Volume], None]], initial: bytes | None = None
) -> Workload:
    """One commit each; while it runs the state before and after it, behind it only the latter."""
    recorder = Recorder(configuration, initial or _base(configuration))
    volume = recorder.open()
    old = state_of(volume)
    for number, step in enumerate(steps):
        recorder.phase(f"started {number}")
        step(volume)
        new = state_of(volume)
        recorder.allow(old, new)
        recorder.phase(f"acknowledged {number}")
        recorder.allow(new)
        old = new
    return recorder.workload(name)


def _change(changes: Files) -> Callable[[Volume], None]:
    def step(volume: Volume) -> None:
        with volume.transaction() as transaction:
            for inode, data in changes.items():
                if data is None:
                    transaction.unlink(inode)
                else:
                    transaction.write(inode, data)

    return step


def create_replace_unlink(configuration: Configuration) -> Workload:
    """Two transactions of several files each: new, replaced, removed."""
    steps: list[Files] = [
        {16: content("new sixteen", 1800), 18: None, 19: content("nineteen", 100)},
        {16: content("newer sixteen", 1500), 17: content("new seventeen", 800), 19: None},
    ]
    return _commits("create, replace, unlink", configuration, map(_change, steps))


def grow_and_shrink(configuration: Configuration) -> Workload:
    """A file that grows into the holes that others left, so that its extents are listed apart, and shrinks again."""
    device = _device(configuration, _base(configuration))
    volume = Volume.open(device, KEY, random=fixed_random("holes"))
    _change({inode: content(f"{inode}", 300) for inode in range(20, 30)})(volume)
    _change(dict.fromkeys(range(20, 30, 2)))(volume)
    steps: list[Files] = [{17: content("grown", volume.free_bytes // 2)}, {17: content("shrunk", 10)}]
    return _commits("grow and shrink", configuration, map(_change, steps), bytes(device.data))


def many_files(configuration: Configuration) -> Workload:
    """The index gets a second level, and loses it again."""
    steps: list[Files] = [
        {inode: content(f"many {inode}", inode * 7 % 90) for inode in range(100, 116)},
        dict.fromkeys(range(100, 114)),
    ]
    return _commits("many files", configuration, map(_change, steps))


def aux_with_key(configuration: Configuration) -> Workload:
    """Auxiliary metadata and a file in one transaction: larger storage, then smaller."""

    def step(aux: AuxMetadata, inode: int) -> Callable[[Volume], None]:
        def run(volume: Volume) -> None:
            with volume.transaction() as transaction:
                transaction.set_aux(aux)
                transaction.write(inode, b"together")

        return run

    larger = AUX.add(B, content("b", 900))
    return _commits("auxiliary metadata with the key", configuration, [step(larger, 20), step(larger.remove(B), 21)])


def aux_without_key(configuration: Configuration) -> Workload:
    """Two changes of auxiliary metadata without the key, the first of which uses its reserve up."""
    changes = (AUX.add(B, content("b", 60)), AUX.replace(A, b"elsewhere"))
    return _keyless("auxiliary metadata without the key", configuration, AUX, changes)


def much_aux_without_key(configuration: Configuration) -> Workload:
    """The same where each copy has several extents, with a third change back to the beginning."""
    roomy = replace(configuration, size=4 * configuration.size)
    start = AUX.with_reserve(9000)
    one = start.add(B, content("b", 7000))
    return _keyless("much auxiliary metadata without the key", roomy, start, (one, one.remove(A), start))


def _keyless(name: str, configuration: Configuration, aux: AuxMetadata, changes: tuple[AuxMetadata, ...]) -> Workload:
    recorder = Recorder(configuration, _base(configuration, aux))
    for number, changed in enumerate(changes):
        recorder.phase(f"started {number}")
        write_aux(recorder.disk, changed)
        recorder.allow(_aux_state(recorder, aux), _aux_state(recorder, changed))
        recorder.phase(f"acknowledged {number}")
        recorder.allow(_aux_state(recorder, changed))
        aux = changed
    return recorder.workload(name, _judge_aux)


def _aux_state(recorder: Recorder, aux: AuxMetadata) -> Outcome:
    volume = Volume.open(_device(recorder.configuration, recorder.initial), KEY)
    return (volume.root_digest, volume.read(16), aux)


def _judge_aux(device: WatchedDevice) -> Outcome:
    """Read without the key first, then with it, which mends; and then the next change goes well."""
    try:
        keyless = read_aux(device)
        volume = Volume.open(device, KEY)
        if volume.aux != keyless:
            return "another opinion with the key"
        found = (volume.root_digest, volume.read(16), keyless)
        changed = keyless.replace(keyless.entries[0].kind, b"next")
        write_aux(device, changed)
        volume = Volume.open(device, KEY)
        if (volume.aux, volume.read(16)) != (changed, found[1]):
            return "the next change was lost"
    except SvsmError as error:
        return error.code
    return found


def over_a_torn_head(configuration: Configuration) -> Workload:
    """Two commits where an earlier one was cut off while the beginning of its journal was written."""
    initial = bytearray(_base(configuration))
    volume = Volume.open(_device(configuration, initial), KEY, random=fixed_random("torn"))
    pending = _device(configuration, initial)
    other = Volume.open(pending, KEY, random=fixed_random("torn")).transaction()
    other.write(16, content("torn", 1200))
    other.prepare()
    head = volume.image.volume.places.journal_head[0] * configuration.layout.ab_bytes
    initial[head : head + 128] = pending.data[head : head + 128]
    steps: list[Files] = [{16: content("new", 1300), 18: None}, {17: content("new seventeen", 500)}]
    return _commits("over a torn head", configuration, map(_change, steps), bytes(initial))


def groups(configuration: Configuration) -> Workload:
    """Two groups of three transactions: one commit each."""

    def step(base: int) -> Callable[[Volume], None]:
        def run(volume: Volume) -> None:
            group = CommitGroup(volume)
            for number in range(3):
                transaction = group.transaction()
                transaction.write(base + number, content(f"group {base + number}", 40 * number))
                group.add(transaction)
            assert group.commit() == [None] * 3

        return run

    return _commits("groups", configuration, [step(30), step(32)])


def _ledger(*answers: Decision) -> Callable[[FoundJournal], Decision]:
    left = list(answers)
    return lambda _found: left.pop(0)


def decided_no(configuration: Configuration) -> Workload:
    """A commit that is taken back, and one after it."""
    recorder = Recorder(configuration, _base(configuration))
    volume = recorder.open(_ledger(Decision.NO, Decision.YES))
    old = state_of(volume)
    transaction = volume.transaction()
    transaction.write(16, content("refused", 900))
    recorder.phase("asked")
    prepared = transaction.prepare()
    refused = judge(WatchedDevice(recorder.disk.content, configuration.block_size))
    assert prepared.decide(volume.decide) is Decision.NO
    recorder.allow(old, refused)
    recorder.phase("refused")
    recorder.allow(old)
    recorder.phase("started")
    _change({16: content("taken", 1000), 18: None})(volume)
    recorder.allow(old, state_of(volume))
    recorder.phase("acknowledged")
    recorder.allow(state_of(volume))
    return recorder.workload("decided with no, then another commit")


def decided_later(configuration: Configuration) -> Workload:
    """A commit that waits, is decided, and one after it."""
    recorder = Recorder(configuration, _base(configuration))
    volume = recorder.open(_ledger(Decision.UNKNOWN, Decision.YES, Decision.YES))
    old = state_of(volume)
    recorder.phase("started")
    with contextlib.suppress(SvsmError):
        _change({16: content("waits", 900), 18: None})(volume)
    assert volume.pending is not None
    new = judge(WatchedDevice(recorder.disk.content, configuration.block_size))
    recorder.allow(old, new)
    recorder.phase("prepared")
    assert volume.decide_again() is Decision.YES
    recorder.allow(new)
    recorder.phase("next")
    _change({17: content("next", 600)})(volume)
    recorder.allow(new, state_of(volume))
    return recorder.workload("decided later, then another commit")


def _pending(configuration: Configuration) -> tuple[bytes, Outcome, Outcome]:
    """A disk with a pending commit, and the states before and after it."""
    device = _device(configuration, _base(configuration))
    volume = Volume.open(device, KEY, random=fixed_random("pending"), trim=configuration.trim)
    old = state_of(volume)
    transaction = volume.transaction()
    transaction.write(16, content("pending", 1700))
    transaction.write(30, content("thirty", 500))
    transaction.unlink(18)
    prepared = transaction.prepare()
    pending = bytes(device.data)
    prepared.apply()
    return pending, old, state_of(volume)


def replay_at_open(configuration: Configuration) -> Workload:
    """A pending commit carried out at open, and a commit after it."""
    pending, _, new = _pending(configuration)
    recorder = Recorder(configuration, pending)
    recorder.phase("opens")
    recorder.allow(new)
    volume = recorder.open()
    recorder.phase("next")
    _change({17: content("next", 600), 31: content("thirty-one", 900)})(volume)
    recorder.allow(new, state_of(volume))
    return recorder.workload("replay at open, then a commit")


def taken_back_at_open(configuration: Configuration) -> Workload:
    """A pending commit decided with no at open, and a commit after it."""
    pending, old, new = _pending(configuration)
    recorder = Recorder(configuration, pending)
    recorder.phase("opens")
    recorder.allow(old, new)
    volume = recorder.open(_ledger(Decision.NO, Decision.YES))
    recorder.phase("next")
    _change({17: content("next", 600), 31: content("thirty-one", 900)})(volume)
    recorder.allow(old, state_of(volume))
    return recorder.workload("taken back at open, then a commit")


# -- without a volume yet --------------------------------------------------------------------------------------


def _kept(volume: Volume) -> Outcome:
    """Everything but what another creation draws anew."""
    return _contents(volume.salt, volume.aux, {info.inode: volume.read(info.inode) for info in volume.list()})


def _contents(salt: bytes, aux: AuxMetadata, files: dict[int, bytes]) -> str:
    return hashlib.sha256(repr((salt, aux.pack(), sorted(files.items()))).encode()).hexdigest()[:16]


def _judge_beginning(device: WatchedDevice) -> Outcome:
    """What a disk holds by its header; what is announced is made, and must be as it was announced."""
    try:
        if probe(device) is Probe.BLANK:
            return "blank"
        header = find_header(device)
        volume = Volume.open(device, KEY, first_use=True, random=fixed_random("judge"))
        if isinstance(header, CreationInfo):
            if _kept(volume) != _contents(header.salt, header.aux, {}):
                return "made otherwise than announced"
            return ("announced", header.salt, header.aux)
        return _kept(volume)
    except SvsmError as error:
        return error.code


def _judge_first_use(device: WatchedDevice) -> Outcome:
    """What opening for the first time finds or makes."""
    try:
        kept = _kept(Volume.open(device, KEY, first_use=True, random=fixed_random("judge")))
        return kept if _kept(Volume.open(device, KEY)) == kept else "another volume when opened again"
    except SvsmError as error:
        return error.code


def _then_a_file(recorder: Recorder, volume: Volume) -> None:
    """A commit behind a creation: what it has to keep apart from shows there."""
    recorder.phase("made")
    old = _kept(volume)
    _change({16: content("first", 1000)})(volume)
    recorder.allow(old, _kept(volume))
    recorder.phase("written")
    recorder.allow(_kept(volume))


def _creation(name: str, configuration: Configuration, initial: bytes, *old: Outcome) -> Workload:
    recorder = Recorder(configuration, initial)
    recorder.phase("creates")
    layout, trim = configuration.layout, configuration.trim
    volume = Volume.create(recorder.disk, KEY, salt=b"x", layout=layout, random=fixed_random("new"), trim=trim)
    recorder.allow("blank", _kept(volume), *old)
    _then_a_file(recorder, volume)
    return recorder.workload(name, _judge_beginning)


def creation_over_nothing(configuration: Configuration) -> Workload:
    """A volume on a blank disk, and its first file."""
    return _creation("creation on a blank disk", configuration, bytes(configuration.size))


def creation_over_a_volume(configuration: Configuration) -> Workload:
    """A volume over another one with the same key, and its first file."""
    initial = _base(configuration)
    old = _kept(Volume.open(_device(configuration, initial), KEY))
    return _creation("creation over a volume", configuration, initial, old)


def _announced(configuration: Configuration, salt: bytes = b"salt") -> bytes:
    device = _device(configuration, configuration.size)
    provision(device, salt=salt, layout=configuration.layout, aux=AUX)
    return bytes(device.data)


def _interrupted(configuration: Configuration, salt: bytes) -> bytes:
    """An announced disk on which the volume was begun to be made: only the backup is intact."""
    initial = _announced(configuration, salt)
    for write in range(100):
        disk = PowerCutDisk(initial, block_size=configuration.block_size, cut_at_write=write)
        with contextlib.suppress(SvsmError):
            Volume.open(disk, KEY, first_use=True, random=fixed_random())
        device = _device(configuration, disk.content)
        with contextlib.suppress(FormatError):
            if read_creation_info(device).is_backup:
                return disk.content
    raise AssertionError("no moment of a first format leaves the backup alone")


def _first_format(name: str, configuration: Configuration, initial: bytes) -> Workload:
    recorder = Recorder(configuration, initial)
    recorder.phase("makes")
    volume = Volume.open(recorder.disk, KEY, first_use=True, random=fixed_random("made"), trim=configuration.trim)
    recorder.allow(_kept(volume))
    _then_a_file(recorder, volume)
    return recorder.workload(name, _judge_first_use)


def first_format(configuration: Configuration) -> Workload:
    """An announced volume made at first open, and its first file."""
    return _first_format("first format", configuration, _announced(configuration))


def first_format_from_the_backup(configuration: Configuration) -> Workload:
    """The same where an earlier attempt was cut off."""
    return _first_format("first format from the backup", configuration, _interrupted(configuration, b"salt"))


def _announcement(name: str, configuration: Configuration, initial: bytes, *old: Outcome) -> Workload:
    recorder = Recorder(configuration, initial)
    recorder.phase("announces")
    provision(recorder.disk, salt=b"new", layout=configuration.layout, aux=AUX)
    first: Outcome = ("announced", b"new", AUX)
    recorder.allow("blank", "cocoonfs-no-magic", "cocoonfs-creation-damaged", first, *old)
    recorder.phase("announced")
    changed = AUX.replace(A, content("moved", 700))
    write_aux(recorder.disk, changed)
    second: Outcome = ("announced", b"new", changed)
    recorder.allow(first, second)
    recorder.phase("changed")
    recorder.allow(second)
    return recorder.workload(name, _judge_beginning)


def announcing_over_a_volume(configuration: Configuration) -> Workload:
    """A volume announced where there is one, and its records changed."""
    initial = _base(configuration)
    old = _kept(Volume.open(_device(configuration, initial), KEY))
    return _announcement("announcing over a volume", configuration, initial, old)


def announcing_over_an_interrupted_creation(configuration: Configuration) -> Workload:
    """A volume announced where another announcement's backup is, and its records changed."""
    initial = _interrupted(configuration, b"older")
    name = "announcing over an interrupted creation"
    return _announcement(name, configuration, initial, ("announced", b"older", AUX))


# -- repair ----------------------------------------------------------------------------------------------------


def _judge_repair(device: WatchedDevice) -> Outcome:
    """Files and records, and whether a check is content."""
    try:
        report = check(device, KEY)
        if report.worst is Severity.ERROR:
            return tuple(finding.kind for finding in report.findings)
        return (report.is_good, _kept(Volume.open(device, KEY)))
    except SvsmError as error:
        return error.code


def _repair(name: str, configuration: Configuration, initial: bytes) -> Workload:
    recorder = Recorder(configuration, initial)
    kept = _kept(Volume.open(_device(configuration, initial), KEY, read_only=True))
    recorder.phase("repairs")
    assert repair(recorder.disk, KEY).is_good
    recorder.allow((False, kept), (True, kept))
    recorder.phase("repaired")
    recorder.allow((True, kept))
    volume = recorder.open()
    recorder.phase("next")
    _change({16: content("after it", 1200)})(volume)
    # A commit that is cut off may leave a torn head again, which is a warning.
    recorder.allow(*((good, state) for good in (False, True) for state in (kept, _kept(volume))))
    return recorder.workload(name, _judge_repair)


def repair_of_torn_parts(configuration: Configuration) -> Workload:
    """A torn journal head, a torn copy of auxiliary metadata, a left-over backup."""
    initial = _base(configuration)
    disk = PowerCutDisk(initial, block_size=configuration.block_size, cut_at_write=3)
    with contextlib.suppress(SvsmError):
        write_aux(disk, AUX.add(B, b"b"))
    damaged = bytearray(disk.content)
    volume = Volume.open(_device(configuration, initial), KEY)
    head = volume.image.volume.places.journal_head[0] * configuration.layout.ab_bytes
    damaged[head : head + 20] = b"CCFSJRNL" + bytes(12)
    place = backup_offset(len(damaged))
    assert place is not None
    block = place // configuration.layout.ab_bytes
    assert not volume.image.used.any_used(block, block + 1)
    damaged[place : place + 8] = CREATION_MAGIC
    return _repair("repair of torn parts", configuration, bytes(damaged))


def repair_of_a_leak(configuration: Configuration) -> Workload:
    """Blocks that nothing uses are given back."""
    device = _device(configuration, _base(configuration))
    commit_with_a_fault(Volume.open(device, KEY, random=fixed_random("leak")), leak)
    return _repair("repair of a leak", configuration, bytes(device.data))


WORKLOADS = (
    create_replace_unlink,
    grow_and_shrink,
    many_files,
    aux_with_key,
    aux_without_key,
    much_aux_without_key,
    over_a_torn_head,
    groups,
    decided_no,
    decided_later,
    replay_at_open,
    taken_back_at_open,
    creation_over_nothing,
    creation_over_a_volume,
    first_format,
    first_format_from_the_backup,
    announcing_over_a_volume,
    announcing_over_an_interrupted_creation,
    repair_of_torn_parts,
    repair_of_a_leak,
)
