# SPDX-License-Identifier: MIT OR Apache-2.0
"""The devices that a host offers while the kernel boots: the wanted one, too many others, none, and endless ones."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from svsm.abi.errors import BackendError
from svsm.abi.platform import Device, DeviceKind
from svsm.kernel import boot
from svsm.kernel.boot import Kernel
from svsm.kernel.console import Console
from svsm.kernel.simulated_platform import SimulatedPlatform


class Host:
    """The part of a platform that offers devices."""

    def __init__(self, offers: Iterator[Device]) -> None:
        self._offers = offers
        self.host_gone = False
        self.shutdown_asked = False
        self.waits = 0

    def next_device(self) -> Device | None:
        return next(self._offers, None)

    def end_service(self, _connection: socket.socket) -> None:
        raise AssertionError("no service runs")

    def take_interrupt(self) -> bool:
        return True

    def wait(self, *, deadline: float) -> bool:
        self.waits += 1
        if self.waits == 3:
            self.host_gone = True
        return True


def device(kind: DeviceKind) -> Device:
    return Device(kind, 0, 0, os.open(os.devnull, os.O_RDONLY))


def kernel(host: Host) -> Kernel:
    return Kernel(cast(SimulatedPlatform, host), Console(None), archive=-1)


def wanted(kernel: Kernel, kind: DeviceKind) -> Device:
    return kernel._device(kind)


def close(devices: list[Device]) -> None:
    for taken in devices:
        os.close(taken.descriptor)


def test_the_wanted_device_is_found_among_others_and_those_are_kept() -> None:
    kinds = [DeviceKind.CLIENT, DeviceKind.DISK, DeviceKind.SERIAL, DeviceKind.CLIENT]
    under_test = kernel(Host(map(device, kinds)))
    serial = wanted(under_test, DeviceKind.SERIAL)
    disk = wanted(under_test, DeviceKind.DISK)
    assert (serial.kind, disk.kind) == (DeviceKind.SERIAL, DeviceKind.DISK)
    assert [kept.kind for kept in under_test._devices] == [DeviceKind.CLIENT]
    close([serial, disk, *under_test._devices])


def test_many_others_are_kept_up_to_a_number_and_closed_beyond_it() -> None:
    others = [device(DeviceKind.CLIENT) for _ in range(200)]
    under_test = kernel(Host(iter([*others, device(DeviceKind.SERIAL)])))
    serial = wanted(under_test, DeviceKind.SERIAL)
    assert under_test._devices == others[:64]
    for closed in others[64:]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(closed.descriptor)
    close([serial, *under_test._devices])


def test_an_endless_row_of_others_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "_DEVICE_SECONDS", 0.05)
    under_test = kernel(Host(device(DeviceKind.CLIENT) for _ in itertools.count()))
    with pytest.raises(BackendError) as missing:
        wanted(under_test, DeviceKind.DISK)
    assert missing.value.code == "boot-device-missing"
    assert len(under_test._devices) == 64
    close(under_test._devices)


@pytest.mark.parametrize("shutdown", [False, True])
def test_nothing_comes_and_the_host_hangs_up_or_presses_the_button(shutdown: bool) -> None:
    host = Host(iter([]))
    host.shutdown_asked = shutdown
    with pytest.raises(BackendError) as missing:
        wanted(kernel(host), DeviceKind.DISK)
    assert missing.value.details["device"] == "disk"
    assert host.waits == (0 if shutdown else 3)
