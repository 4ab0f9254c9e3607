# SPDX-License-Identifier: MIT OR Apache-2.0
"""A first boot with a disk that only announces a volume: made if it is ours to the byte, left alone otherwise."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import pytest

from svsm.abi.block import Range
from svsm.formats.errors import PolicyError, SvsmError
from svsm.formats.release_token import VolumeState
from svsm.kernel.decision import AlwaysYes
from svsm.kernel.disk import VolumeDisk
from svsm.kernel.volume_birth import Action, Birth
from svsm.storage.cocoonfs import DEFAULT_LAYOUT, AuxMetadata, Volume, provision
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk

KEY, ID = b"k" * 32, "5f0c0cde-0a3f-4a0a-9a1f-1a6b2c3d4e5f"
SALT = uuid.UUID(ID).bytes
SIZE = 64 << 10


def _birth(state: VolumeState = VolumeState.NEW) -> Birth:
    return Birth(state=state, session=bytes(16), can_report=True)


def _disk(device: MemoryDevice | PowerCutDisk) -> VolumeDisk:
    return VolumeDisk(device, key=KEY, volume_id=ID, source=AlwaysYes())


def test_ours_is_made() -> None:
    device = MemoryDevice(SIZE)
    provision(device, salt=SALT, aux=AuxMetadata(reserve_bytes=64).add(uuid.uuid4(), b"a broker's address"))
    disk = _disk(device)
    assert _birth().decide(disk) is Action.FORMAT
    volume = disk.format()
    assert (volume.salt, volume.layout, volume.size_bytes) == (SALT, DEFAULT_LAYOUT, SIZE)
    assert _birth().decide(_disk(device)) is Action.USE


@pytest.mark.parametrize("kind", ["salt", "weak", "other cipher", "smaller", "damaged"])
def test_anything_else_is_left_alone(kind: str) -> None:
    device = MemoryDevice(SIZE)
    layout = {"weak": layout_of("sha1"), "other cipher": layout_of("sha2", "sm4")}.get(kind, DEFAULT_LAYOUT)
    provision(
        device,
        salt=b"theirs" if kind == "salt" else SALT,
        layout=layout,
        size_bytes=SIZE // 2 if kind == "smaller" else None,
        allow_weak=True,
    )
    if kind == "damaged":
        device.data[60] ^= 1
    before = bytes(device.data)
    with pytest.raises(PolicyError) as caught:
        _birth().decide(_disk(device))
    assert caught.value.code == "birth-somebodys-volume"
    assert bytes(device.data) == before


@pytest.mark.parametrize("size", [(16 << 30) + 512, 1 << 50, 1 << 73])
def test_a_disk_without_end_is_not_formatted(size: int) -> None:
    """The host says how large its disk is; that must not decide how much memory the kernel takes."""

    class Endless(MemoryDevice):
        size_bytes = size

        def read(self, ranges: Sequence[Range]) -> list[bytes]:
            return [bytes(length) for _, length in ranges]

    device = Endless(SIZE)
    disk = _disk(device)
    assert _birth().decide(disk) is Action.FORMAT
    with pytest.raises(PolicyError) as caught:
        disk.format()
    assert (caught.value.code, any(device.data)) == ("disk-too-large", False)


def test_an_announcement_is_no_volume_that_was_used() -> None:
    device = MemoryDevice(SIZE)
    provision(device, salt=SALT)
    with pytest.raises(PolicyError) as caught:
        _birth(VolumeState.ACTIVE).decide(_disk(device))
    assert caught.value.code == "birth-other-volume"


def test_a_first_format_that_was_cut_off_is_done_again() -> None:
    device = MemoryDevice(SIZE)
    provision(device, salt=SALT)
    whole = PowerCutDisk(bytes(device.data))
    _disk(whole).format()
    outcomes = set()
    for number in range(whole.writes):
        disk = PowerCutDisk(bytes(device.data), cut_at_write=number)
        with pytest.raises(SvsmError):
            _disk(disk).format()
        again = MemoryDevice(disk.content)
        found = _disk(again)
        action = _birth().decide(found)
        outcomes.add(action)
        if action is Action.FORMAT:
            found.format()
        assert Volume.open(again, KEY).salt == SALT
    assert outcomes == {Action.FORMAT, Action.USE}
