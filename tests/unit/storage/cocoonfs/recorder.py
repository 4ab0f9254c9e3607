# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that records with what is allowed at each moment, and how the media that it may leave are judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from svsm.formats.errors import SvsmError
from svsm.storage.cocoonfs import Decision, FoundJournal, ImageLayout, Volume
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT
from svsm.storage.cocoonfs.presets import layout_of
from svsm.testing.powercut import PowerCutDisk
from tests.cocoonfs_support import fixed_random
from tests.unit.storage.cocoonfs.cuts import Judge, Outcome, WatchedDevice, Workload

__all__ = ["CONFIGURATIONS", "KEY", "Configuration", "Recorder", "judge", "state_of"]

KEY = b"cuts"


@dataclass(frozen=True, slots=True)
class Configuration:
    """A layout, the device's block size, the device's size, whether trims are on."""

    name: str
    layout: ImageLayout
    block_size: int
    size: int
    trim: bool


CONFIGURATIONS = (
    Configuration("blocks of 512 bytes", DEFAULT_LAYOUT, 512, 24 << 10, trim=False),
    Configuration("blocks of 512 bytes, trims", DEFAULT_LAYOUT, 512, 24 << 10, trim=True),
    Configuration("blocks of 128 bytes, trims", DEFAULT_LAYOUT, 128, 24 << 10, trim=True),
    Configuration(
        "sha3, IO block 1024 on blocks of 256 bytes",
        layout_of("sha3", "aes", 128, io_block_bytes=1024, data_block_bytes=512),
        256,
        48 << 10,
        trim=True,
    ),
)


def state_of(volume: Volume) -> Outcome:
    """Counter and digest of all contents."""
    files = [(info.inode, info.flags, volume.read(info.inode)) for info in volume.list()]
    digest = hashlib.sha256(repr((files, volume.aux.pack(), volume.root_digest)).encode())
    return (volume.counter, digest.hexdigest()[:16])


def judge(device: WatchedDevice) -> Outcome:
    """The state that opening finds; opening again must find the same, and write nothing more."""
    try:
        found = state_of(Volume.open(device, KEY))
        if device.is_changed:
            settled = bytes(device.data)
            if state_of(Volume.open(device, KEY)) != found or bytes(device.data) != settled:
                return "not settled by the first opening"
    except SvsmError as error:
        return error.code
    return found


class Recorder:
    """A disk that records, and the outcomes that are allowed while it does."""

    def __init__(self, configuration: Configuration, initial: bytes) -> None:
        self.configuration = configuration
        self.initial = initial
        self.disk = PowerCutDisk(initial, block_size=configuration.block_size)
        self.allowed: dict[str, frozenset[Outcome]] = {}
        self._labels: list[str] = []

    def phase(self, label: str) -> None:
        """From here on, what `allow` says for this label is allowed."""
        self.disk.mark(label)
        self._labels.append(label)

    def allow(self, *outcomes: Outcome) -> None:
        """For the label of the last phase."""
        self.allowed[self._labels[-1]] = frozenset(outcomes)

    def open(self, decide: Callable[[FoundJournal], Decision] | None = None) -> Volume:
        """The volume on the disk."""
        return Volume.open(
            self.disk,
            KEY,
            random=fixed_random(),
            trim=self.configuration.trim,
            decide=decide or (lambda _found: Decision.YES),
        )

    def workload(self, name: str, judge: Judge = judge) -> Workload:
        """What was recorded."""
        name = f"{name} ({self.configuration.name})"
        return Workload(name, self.initial, self.disk.events, self.configuration.block_size, self.allowed, judge)
