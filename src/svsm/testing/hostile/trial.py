# SPDX-License-Identifier: MIT OR Apache-2.0
"""One driver, one hostile device, one working life: what came of it.

The workload writes, reads back, flushes, reads many things at once, discards, asks for the name and looks for a
resize. Beside the result it watches three promises, whatever the device does: nothing but `SvsmError` comes out, no
byte that the caller did not write to the disk is ever in shared memory (canaries lie around everything written, and
in what is refused), and time stays bounded. A device that is dead must stay dead until `reconnect`, and a device that
has become honest by then must work again.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import mmap
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.host.devices.virtio_blk import ALL_FEATURES, BlkOptions
from svsm.host.devices.virtio_ring import Chain
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.virtio_harness import SMALL_POLICY, Machine, disk_file, virtio_disk

__all__ = ["CANARY", "RINGS", "Kind", "Outcome", "Trial", "TrialError", "carry_out", "policy_of", "run"]

CANARY: Final = b"\xc4\x9aPRIVATE\x9a\xc4canary"
"""Never written to the disk, so never to be seen in shared memory."""

RINGS: Final = ("split", "split-direct", "packed", "packed-direct")
"""Both rings, with and without indirect descriptors."""

TrialT = TypeVar("TrialT", bound="Trial")

_DISK_BYTES = 1 << 20
_LONGEST_SECONDS = 600.0
_LOOK_EVERY = 16


class Kind(enum.StrEnum):
    """How a trial ended."""

    REFUSED = "refused"
    """The driver did not start."""
    DEAD = "dead"
    """An operation failed and the device is not used any more."""
    ERROR = "error"
    """An operation failed and the driver went on."""
    SURVIVED = "survived"
    """Everything worked, with the right contents."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    kind: Kind
    code: str = ""
    """Of the refusal, or of the violation that killed the device."""

    def __str__(self) -> str:
        return f"{self.kind} {self.code}".strip()


class TrialError(Exception):
    """A promise was broken: the finding that all this looks for."""


def policy_of(ring: str) -> BlkPolicy:
    """The driver's settings for one of `RINGS`."""
    return dataclasses.replace(SMALL_POLICY, packed=ring.startswith("packed"), indirect=not ring.endswith("-direct"))


@functools.cache
def _contents() -> bytes:
    """The disk's, before the work. Random so that no block is like another."""
    return os.urandom(_DISK_BYTES)


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise TrialError(what)


class Trial:
    """A driver with a hostile device.

    Args:
        install: Puts hooks on the device before the driver sees it.
        ring: One of `RINGS`.
        options: What the device offers.
        memory_type: How the driver sees the shared memory.
        queues: How many the driver wants.
    """

    def __init__(
        self,
        install: Callable[[HostileBlk], None],
        ring: str,
        *,
        options: BlkOptions | None = None,
        memory_type: type[DmaMemory] = DmaMemory,
        queues: int = 1,
    ) -> None:
        self.content = bytearray(_contents())
        self.errors: list[SvsmError] = []
        self.requests = 0
        self._install = install
        self._machine: Machine | None = None
        self._devices: list[HostileBlk] = []
        self._memory_type = memory_type
        self._policy = dataclasses.replace(policy_of(ring), queues=queues)
        self._options = options or BlkOptions(features=ALL_FEATURES, queue_size=32)

    # ---- the parts -------------------------------------------------------------------------------------------------

    @property
    def machine(self) -> Machine:
        """Both sides."""
        _demand(self._machine is not None, "there is no machine")
        return self._machine  # type: ignore[return-value]  # demanded above

    @property
    def driver(self) -> VirtioBlk:
        """The driver."""
        return self.machine.driver

    @property
    def device(self) -> HostileBlk:
        """The device."""
        return self._devices[-1]

    def start(self) -> None:
        """Make the machine. Raises what the driver raises."""

        def make(*arguments: Any) -> HostileBlk:
            device = HostileBlk(*arguments)
            self._devices.append(device)
            self._install(device)
            given = device.on_request

            def watch(chain: Chain) -> None:
                self._watch(chain)
                if given is not None:
                    given(chain)

            device.on_request = watch
            return device

        descriptor = disk_file(_DISK_BYTES, bytes(self.content))
        try:
            self._machine = virtio_disk(
                descriptor,
                options=self._options,
                policy=self._policy,
                make=make,
                memory_type=self._memory_type,
            )
        except SvsmError:
            os.close(descriptor)
            raise

    def _watch(self, chain: Chain) -> None:
        """What the device may write is clean, but for the byte that means "no status yet"."""
        self.requests += 1
        writable = [part for part in chain.parts if part.device_writes]
        for part in writable[:-1]:
            _demand(not any(self.device.window.take(part.address, part.length)), "a buffer is not zeroed before a read")
        if self.requests % _LOOK_EVERY == 0:
            self.look_for_canaries()

    @property
    def machine_memory(self) -> mmap.mmap:
        """What both sides see."""
        memory = self.device.window.bytes.obj
        _demand(isinstance(memory, mmap.mmap), "the shared memory is not a mapping")
        return memory  # type: ignore[return-value]  # demanded above

    def look_for_canaries(self) -> None:
        """No private byte in anything shared."""
        _demand(self.machine_memory.find(CANARY, 0) < 0, "a private byte is in shared memory")

    # ---- the work --------------------------------------------------------------------------------------------------

    def attempt(self, call: Callable[[], object]) -> bool:
        """Do something; an `SvsmError` of the interface's kinds is noted, anything else is a finding."""
        try:
            call()
        except (BackendError, StateError) as error:
            self.errors.append(error)
            return False
        except SvsmError as error:
            raise TrialError(f"{type(error).__name__} {error.code} came out of the interface") from error
        finally:
            self._bounded()
            self.look_for_canaries()
        return True

    def _bounded(self) -> None:
        if self._machine is not None:
            clock = self._machine.clock
            _demand(clock.now < 1000.0 + _LONGEST_SECONDS, "it took too long")

    def write(self, offset: int, data: bytes) -> None:
        """A write whose data lies between canaries; if it fails, the range holds what the file says (old or new)."""
        around = bytearray(CANARY + data + CANARY)
        view = memoryview(around)[len(CANARY) : len(CANARY) + len(data)]
        if self.attempt(lambda: self.driver.write([(offset, view)])):
            self.content[offset : offset + len(data)] = data
        else:
            self.content[offset : offset + len(data)] = self.machine.content(offset, len(data))

    def read(self, offset: int, length: int, *, count: int = 1) -> None:
        """Read the same range `count` times at once; a result that is not an error is right."""
        got: list[bytes] = []
        if self.attempt(lambda: got.extend(self.driver.read([(offset, length)] * count))):
            expected = bytes(self.content[offset : offset + length])
            _demand(got == [expected] * count, "wrong contents were returned as good")

    def work(self) -> None:
        """The whole workload."""
        driver = self.driver
        size = driver.size_bytes
        block = driver.block_size_bytes
        if size:
            self.write(0, os.urandom(block))
            self.read(0, block)
            self.read(block, 8 * block, count=5)
            self.write(16 * block, os.urandom(24 * block))
            self.read(16 * block, 24 * block)
            self.read(0, block, count=90)
        self.attempt(driver.flush)
        self.attempt(driver.get_id)
        if size:
            start, end = 64 * block, 80 * block
            if not self.attempt(lambda: driver.discard([(start, end - start)])):
                self.content[start:end] = self.machine.content(start, end - start)
            elif driver.geometry.discard:
                self.content[start:end] = self.after_discard(start, end - start)
            self.read(64 * block, 16 * block)
        self.attempt(driver.poll)
        self._refuses(block)

    def after_discard(self, offset: int, length: int) -> bytes:
        """What a discarded range must hold: zeros, says our device model."""
        return bytes(length)

    def _refuses(self, block: int) -> None:
        """What is refused must not reach shared memory either."""
        size = self.driver.size_bytes  # it may have grown meanwhile
        poison = CANARY * (block // len(CANARY) + 1)
        self.attempt(lambda: self.driver.write([(0, bytes(block)), (size + block, poison[:block])]))
        _demand(self.errors[-1].code in ("block-range", "block-read-only", "block-alignment"), "a write beyond the end")
        self.errors.pop()
        if self.driver.fault is not None:
            self.attempt(lambda: self.driver.write([(0, poison[:block])]))
        self.look_for_canaries()

    # ---- the verdict -----------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        """After the work."""
        fault = self.driver.fault
        if fault is not None:
            for error in self.errors:
                _demand(
                    error.code in ("block-io", "block-range", "block-read-only"), f"{error.code} from a dead device"
                )
            _demand(not self.attempt(lambda: self.driver.read([(0, 0)])), "a dead device answers")
            return Outcome(Kind.DEAD, fault.code)
        if self.errors:
            return Outcome(Kind.ERROR, self.errors[0].code)
        return Outcome(Kind.SURVIVED)

    def revive(self) -> None:
        """The device becomes honest; a reset must bring the driver back, with the truth about what was written."""
        self.device.be_honest()
        self.machine.registers.spurious = False
        self.driver.reconnect()
        self.errors.clear()
        self.content[:] = self.machine.content(0, len(self.content))
        self.read(0, self.driver.block_size_bytes)
        self.read(0, 32 * self.driver.block_size_bytes, count=3)
        self.attempt(self.driver.flush)
        if self.errors:  # unflushed writes may have been lost: said once
            _demand(self.errors[-1].code == "block-io", "a flush after a reset")
            self.errors.clear()
        self.write(0, os.urandom(self.driver.block_size_bytes))
        self.read(0, self.driver.block_size_bytes)
        self.attempt(self.driver.flush)
        _demand(not self.errors, f"an honest device does not work again: {self.errors}")

    def close(self) -> None:
        """End it. Closing never raises, whatever the device does."""
        if self._machine is not None:
            self._machine.close()


def run(
    install: Callable[[HostileBlk], None],
    ring: str,
    *,
    options: BlkOptions | None = None,
    after: Callable[[Trial], None] | None = None,
    memory_type: type[DmaMemory] = DmaMemory,
    queues: int = 1,
) -> Outcome:
    """One trial.

    Args:
        install: The attack.
        ring: One of `RINGS`.
        options: What the device offers.
        after: More steps, after the common workload.
        memory_type: How the driver sees the shared memory.
        queues: How many the driver wants.

    Raises:
        TrialError: A promise was broken.
    """
    return carry_out(Trial(install, ring, options=options, memory_type=memory_type, queues=queues), after)


def carry_out(trial: TrialT, after: Callable[[TrialT], None] | None) -> Outcome:
    """Start, work, and live again where the disk has died; ends the trial in any case.

    Raises:
        TrialError: A promise was broken.
    """
    try:
        trial.start()
    except SvsmError as error:
        return Outcome(Kind.REFUSED, error.code)
    try:
        trial.work()
        if after is not None:
            after(trial)
        outcome = trial.outcome()
        if outcome.kind is Kind.DEAD and not trial.device.stuck:
            trial.revive()
        return outcome
    finally:
        trial.close()
