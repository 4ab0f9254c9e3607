# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue of hostile rings over vhost-user: the same attacks, workload and promises, another transport.

The hostile device runs in a thread behind a socket (`svsm.testing.vhost_user_backend`), in real time, beside the
driver. What it does with registers cannot be done here; `RING_CASES` are the cases of the catalogue that need none. A
device that asks for a reset closes the socket instead, as libvhost-user does.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.host.devices.virtio_ring import Chain
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.vhost_user import VhostUserBlk
from svsm.testing.hostile.attacks import ATTACKS
from svsm.testing.hostile.catalogue import Attack
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.trial import Kind, Outcome, Trial, TrialError
from svsm.testing.vhost_user_backend import Backend
from svsm.testing.virtio_harness import Clock, InlineRegisters, Machine, disk_file

__all__ = ["RING_CASES", "VhostUserTrial", "expected", "run"]

_DISK_BYTES = 1 << 20
_DEADLINE_SECONDS = 10.0
_SHORT_DEADLINE_SECONDS = 0.4
"""Where the deadline is what must come."""
_LONGEST_SECONDS = 60.0
_ORDER_AND_TIME = ("never completes", "never takes a request", "wants no kicks", "event fields", "opposite", "starves")

RING_CASES: Final = [
    attack
    for attack in ATTACKS
    if attack.memory_type is DmaMemory
    and attack.after is None
    and (attack.install.__module__.endswith("ring_attacks") or any(words in attack.name for words in _ORDER_AND_TIME))
]


def expected(attack: Attack, ring: str) -> Outcome:
    """What must come of a case on this transport."""
    outcome = attack.expected[ring]
    return Outcome(Kind.DEAD, "vhost-user-gone") if outcome.code == "virtio-needs-reset" else outcome


class VhostUserTrial(Trial):
    """A `Trial` whose device is behind a socket."""

    _honest = False
    deadline_seconds = _DEADLINE_SECONDS

    def start(self) -> None:
        """Make both sides. Raises what the driver raises."""
        self._began = time.monotonic()
        self.findings: list[BaseException] = []
        self._descriptor = disk_file(_DISK_BYTES, bytes(self.content))
        self.backend = Backend(self._descriptor, self._options, make=self._make)
        policy = dataclasses.replace(self._policy, deadline_seconds=self.deadline_seconds, rekick_seconds=0.02)
        try:
            driver = VhostUserBlk(self.backend.endpoint, policy=policy)
        except SvsmError:
            self.backend.join()
            os.close(self._descriptor)
            raise
        clock = Clock()
        registers = InlineRegisters(self.device, clock)
        self._machine = Machine(driver, self.device, driver._shared.dma, clock, registers, self._descriptor)

    def _make(self, *arguments: object) -> HostileBlk:
        device = HostileBlk(*arguments)  # type: ignore[arg-type]
        self._devices.append(device)
        if not self._honest:
            self._install(device)
        given = device.on_request

        def watch(chain: Chain) -> None:
            try:
                self._watch(chain)
            except TrialError as finding:  # this is the device's thread
                self.findings.append(finding)
            if given is not None:
                given(chain)

        device.on_request = watch
        return device

    def _bounded(self) -> None:
        if time.monotonic() > self._began + _LONGEST_SECONDS:
            raise TrialError("it took too long")

    def revive(self) -> None:
        """A new connection to a device that is honest."""
        self._honest = True
        self.driver._transport.close()
        self.backend.join()
        super().revive()

    def outcome(self) -> Outcome:
        """After the work."""
        if self.findings:
            raise self.findings[0]
        return super().outcome()

    def close(self) -> None:
        """End both sides."""
        if self._machine is not None:
            self.driver.close()
            self.backend.join()
            os.close(self._descriptor)
        if self.findings:
            raise self.findings[0]


def run(attack: Attack, ring: str) -> Outcome:
    """One trial of a case of `RING_CASES`.

    Raises:
        TrialError: A promise was broken.
    """
    trial = VhostUserTrial(attack.install, ring, options=attack.options, queues=attack.queues)
    if expected(attack, ring).code == "virtio-timeout":
        trial.deadline_seconds = _SHORT_DEADLINE_SECONDS
    try:
        trial.start()
    except SvsmError as error:
        return Outcome(Kind.REFUSED, error.code)
    try:
        trial.work()
        outcome = trial.outcome()
        if outcome.kind is Kind.DEAD:
            trial.revive()
        return outcome
    finally:
        trial.close()
