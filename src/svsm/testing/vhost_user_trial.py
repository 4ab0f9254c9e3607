# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue of attacks over vhost-user: the same attacks, workload and promises, another transport.

The hostile device runs in a thread behind a socket (`svsm.testing.vhost_user_backend`), in real time, beside the
driver. Its registers are there, behind the messages, so most cases of the catalogue work as they are; `DIFFERENT` says
where the outcome is another one here, `IMPOSSIBLE` which cases have no place on this transport, and why. Those have
counterparts of the transport's own in `svsm.testing.hostile.vhost_user_attacks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from svsm.formats.errors import SvsmError
from svsm.host.devices.virtio_ring import Chain
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.vhost_user import VhostUserBlk, VhostUserTransport
from svsm.storage.drivers.virtio.vhost_user_socket import SharedMemory
from svsm.testing.hostile.attacks import ATTACKS
from svsm.testing.hostile.catalogue import SURVIVED, Attack, dead, refused
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.mixture import Decisions, message_mixture, mixture
from svsm.testing.hostile.trial import Kind, Outcome, Trial, TrialError, carry_out
from svsm.testing.hostile.vhost_user_attacks import MessageAttack
from svsm.testing.vhost_user_backend import Backend
from svsm.testing.virtio_harness import Clock, InlineRegisters, Machine, disk_file

__all__ = ["CASES", "DIFFERENT", "IMPOSSIBLE", "VhostUserTrial", "expected", "run", "run_mixture"]

_DISK_BYTES = 1 << 20
_DEADLINE_SECONDS = 10.0
_SHORT_DEADLINE_SECONDS = 0.4
"""Where the deadline is what must come."""
_LONGEST_SECONDS = 60.0

_NO_REGISTER = "the protocol has no such register"
_NO_NOTICE = "a changed capacity is not announced on this transport; own case under 20"
IMPOSSIBLE: Final = {
    "registers of version 1": _NO_REGISTER,
    "registers of version 3": _NO_REGISTER,
    "the configuration's generation never stands still": "one message carries one moment; own case under 19",
    "the generation stands still after three tries": "one message carries one moment; own case under 19",
    "the disk shrinks": _NO_NOTICE,
    "the disk grows": _NO_NOTICE,
    "the disk grows beyond all bounds": _NO_NOTICE,
    "the block size changes with the capacity": _NO_NOTICE,
    "no queue": "nobody asks for a queue's size; own cases with GET_QUEUE_NUM",
    "a queue of more than 32768": "nobody asks for a queue's size",
    "a queue of 2^32 - 1": "nobody asks for a queue's size",
    "the largest queue": "nobody asks for a queue's size",
    "a queue of 31": "nobody asks for a queue's size",
    "a queue of 2": "nobody asks for a queue's size",
    "a queue whose size changes": "nobody asks for a queue's size",
    "the queue is ready before it is set up": _NO_REGISTER,
    "a reset is never done": "a reset is GET_VRING_BASE; own cases under 25",
    "a later reset is never done": "a reset is GET_VRING_BASE; own cases under 25",
    "the device completes after its reset": "a new life is a new connection; own case under 28",
    "interrupts without end, and then no answer": "wake-ups are eventfds; own case under 30",
    "every bit of the interrupt status, always": _NO_REGISTER,
    "every bit of the interrupt status, always, and no kick wanted": _NO_REGISTER,
    "magic, version and device change after the probe": _NO_REGISTER,
    "no magic": _NO_REGISTER,
    "an empty slot": _NO_REGISTER,
    "a network card": "the protocol does not say what a back-end is",
    "registers of more than 32 bits": _NO_REGISTER,
    "registers below zero": _NO_REGISTER,
}
"""Cases of the catalogue that have no place here, by name, with the reason."""

DIFFERENT: Final = {
    "ACCESS_PLATFORM is not offered": SURVIVED,  # what it promises is a fact: the memory is all that was handed over
    "the queue never becomes ready": refused("vhost-user-refused"),
    "the device says FAILED and stops": dead("virtio-needs-reset"),  # by the error eventfd
    "the device resets itself": dead("virtio-timeout"),  # no register shows it
}
"""Other outcomes than in the catalogue, by name."""

CASES: Final = [attack for attack in ATTACKS if attack.name not in IMPOSSIBLE]


def expected(attack: Attack, ring: str) -> Outcome:
    """What must come of a case on this transport."""
    outcome = DIFFERENT.get(attack.name, attack.expected[ring])
    needs_reset = outcome.code == "virtio-needs-reset" and attack.name not in DIFFERENT
    return dead("vhost-user-gone") if needs_reset else outcome


class VhostUserTrial(Trial):
    """A `Trial` whose device is behind a socket.

    Args:
        message: A case of the transport's own instead of an attack on the device model, or with one.

    Attributes:
        deadline_seconds: The driver's.
        answer_seconds: How long the driver waits for a message's answer.
        findings: What was found in the device's thread.
    """

    _honest = False
    deadline_seconds = _DEADLINE_SECONDS
    answer_seconds = 5.0
    message: MessageAttack | None = None

    def start(self) -> None:
        """Make both sides. Raises what the driver raises, or what was found meanwhile."""
        self._began = time.monotonic()
        self.findings: list[BaseException] = []
        self._descriptor = disk_file(_DISK_BYTES, bytes(self.content))
        self.backend = Backend(self._descriptor, self._options, make=self._make)
        if self.message is not None:
            self.backend.script = self.message.script() if self.message.script else None
            self.backend.protocol_features = self.message.protocol_features
            if self.message.prepare is not None:
                self.message.prepare(self)
        self._policy = dataclasses.replace(self._policy, deadline_seconds=self.deadline_seconds, rekick_seconds=0.02)
        try:
            driver, memory = self._connect()
        except SvsmError as error:
            self.backend.join()
            os.close(self._descriptor)
            if self.findings:  # else they would count as a refusal
                raise self.findings[0] from error
            raise
        clock = Clock()
        registers = InlineRegisters(self.device, clock)
        self._machine = Machine(driver, self.device, memory, clock, registers, self._descriptor)

    def _connect(self) -> tuple[VirtioBlk, DmaMemory]:
        if self._memory_type is DmaMemory:
            driver = VhostUserBlk(self.backend.endpoint, policy=self._policy, answer_seconds=self.answer_seconds)
            return driver, driver._shared.dma
        shared = SharedMemory(memory_bytes(self._policy))
        memory = self._memory_type(shared.dma.bytes, address=shared.dma.address)
        transport = VhostUserTransport(self.backend.endpoint(), shared, answer_seconds=self.answer_seconds)
        try:
            return VirtioBlk(transport, memory, policy=self._policy), memory
        finally:
            shared.close()  # the back-end has a descriptor of its own by now, and both sides their mappings

    def _make(self, *arguments: Any) -> HostileBlk:
        device = HostileBlk(*arguments)
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

    @contextlib.contextmanager
    def repeatedly(self, act: Callable[[], object]) -> Iterator[None]:
        """Do something again and again, from another thread, as long as this is open."""
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                act()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def reconnect(self) -> None:
        """A new connection, to a device without hooks; the old one stays as it is."""
        self._honest = True
        self.driver.reconnect()

    def revive(self) -> None:
        """A new connection to a device that is honest."""
        self._honest = True
        self.backend.script = None
        self.backend.interrupted = self.backend.mapped = None
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


def run(attack: Attack | MessageAttack, ring: str) -> Outcome:
    """One trial of a case of `CASES` or of the transport's own.

    Raises:
        TrialError: A promise was broken.
    """
    if isinstance(attack, MessageAttack):
        trial = VhostUserTrial(attack.install, ring, options=attack.options, queues=attack.queues)
        trial.message = attack
        if attack.deadline_seconds is not None:
            trial.deadline_seconds = attack.deadline_seconds
            if attack.expected.kind is Kind.REFUSED:
                trial.answer_seconds = attack.deadline_seconds
        return carry_out(trial, attack.after)
    trial = VhostUserTrial(
        attack.install, ring, options=attack.options, queues=attack.queues, memory_type=attack.memory_type
    )
    if expected(attack, ring).code == "virtio-timeout":
        trial.deadline_seconds = _SHORT_DEADLINE_SECONDS
    return carry_out(trial, attack.after)


def run_mixture(data: bytes, ring: str, *, rounds: int = 0) -> Outcome:
    """A device and messages that take every decision from bytes, as `svsm.testing.hostile.mixture`.

    The first byte says how many messages are answered honestly.

    Raises:
        TrialError: A promise was broken.
    """
    decisions = Decisions(data)
    messages, device = decisions.byte() % 24, decisions.byte() % 2
    trial = VhostUserTrial(mixture(data[2:], rounds=rounds) if device else lambda device: None, ring)
    trial.message = MessageAttack(34, "a mixture", SURVIVED, script=lambda: message_mixture(data[2:], rounds=messages))
    trial.deadline_seconds = trial.answer_seconds = _SHORT_DEADLINE_SECONDS
    return carry_out(trial, None)
