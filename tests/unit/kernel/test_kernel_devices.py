# SPDX-License-Identifier: MIT OR Apache-2.0
"""A host that offers devices without end: the kernel keeps few of them, and goes on to its other work."""

from __future__ import annotations

import os
from typing import cast

from svsm.abi.platform import Device, DeviceKind
from svsm.kernel.boot import Kernel
from svsm.kernel.console import Console
from svsm.kernel.simulated_platform import SimulatedPlatform


class Flood:
    """There is always one more device, of a kind that nobody waits for."""

    host_gone = False
    shutdown_asked = False

    def __init__(self) -> None:
        self.given: list[int] = []

    def next_device(self) -> Device:
        self.given.append(os.open("/dev/null", os.O_RDONLY))
        return Device(DeviceKind.CLIENT, 0, 0, self.given[-1])

    def wait(self, *, deadline: float) -> bool:
        del deadline
        return True

    def ended_services(self) -> list[int]:
        return []

    def spawn(self) -> None: ...

    def end_service(self) -> None: ...

    def open_now(self) -> int:
        return sum(os.path.exists(f"/proc/self/fd/{number}") for number in set(self.given))


def _kernel(flood: Flood) -> Kernel:
    return Kernel(cast(SimulatedPlatform, flood), Console(None), archive=-1)


def test_while_serving_each_event_takes_a_few() -> None:
    flood = Flood()
    kernel = _kernel(flood)
    for _ in range(3):
        kernel._hardware_event()
    assert len(flood.given) <= 3 * 70
    assert flood.open_now() == 0  # nobody has a TPM here, so each was closed
