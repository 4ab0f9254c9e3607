# SPDX-License-Identifier: MIT OR Apache-2.0
"""A hostile vhost-user back-end for any front-end: on a socket, with one attack, and a report of what came of it.

What the back-end sees is what it can tell: how many messages and requests there were, whether the lie was told, what
came after it, and who ended the connection. Where the front-end is a command that this starts, there is also how that
ended: by itself, by a signal (it crashed), or not at all in the time it had (it hangs).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from svsm.formats.vhost_user import Request
from svsm.formats.virtio import BlkFeature, DeviceStatus, Feature, MmioRegister, SplitDescriptor
from svsm.host.devices.virtio_blk import BlkOptions
from svsm.host.devices.virtio_ring import Chain, DeviceRing, DeviceSplitRing
from svsm.storage.drivers.dma import DmaMemory
from svsm.testing.hostile.catalogue import Install
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.mixture import message_mixture, mixture
from svsm.testing.hostile.qemu_front_end import BOOT_SECTOR
from svsm.testing.hostile.trial import RINGS
from svsm.testing.hostile.vhost_user_attacks import MESSAGE_ATTACKS
from svsm.testing.vhost_user_backend import PROTOCOL_FEATURES, Backend, Conversation, Script
from svsm.testing.vhost_user_trial import CASES
from svsm.testing.virtio_harness import disk_file

__all__ = ["HONEST", "Plan", "Report", "plans", "seeded", "serve"]

_QUEUE_ENTRIES: Final = 1024
_POLL_SECONDS: Final = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What the back-end does.

    Attributes:
        number: Of the attack; 0 for none or a mixture.
        name: Of the case.
        rings: Where it can be done.
        install: Makes the device do it.
        script: What is said instead.
        options: What the device offers, where the case needs something else than all.
        protocol_features: What is offered of them.
    """

    number: int
    name: str
    rings: tuple[str, ...] = RINGS
    install: Install = lambda device: None
    script: Callable[[], Script] | None = None
    options: BlkOptions | None = None
    protocol_features: int = PROTOCOL_FEATURES


HONEST: Final = Plan(0, "honest")


def plans() -> list[Plan]:
    """Every case that needs nothing but a front-end: no steps of a trial, no view of the driver's memory."""
    made = [
        Plan(attack.number, attack.name, tuple(attack.expected), attack.install, None, attack.options)
        for attack in CASES
        if attack.after is None and attack.memory_type is DmaMemory
    ]
    made += [
        Plan(case.number, case.name, case.rings, case.install, case.script, case.options, case.protocol_features)
        for case in MESSAGE_ATTACKS
        if case.after is None and case.prepare is None
    ]
    return sorted(made, key=lambda plan: plan.number)


def seeded(data: bytes, *, rounds: int = 0, messages: bool = False) -> Plan:
    """A mixture: the device, or what is said, decided by bytes."""
    if messages:
        return Plan(0, f"messages {data.hex()}", script=lambda: message_mixture(data, rounds=rounds))
    return Plan(0, f"mixture {data.hex()}", install=mixture(data, rounds=rounds))


@dataclasses.dataclass(slots=True)
class Report:
    """What came of it.

    Attributes:
        number, attack, ring: What was done.
        connections: How many the front-end made.
        messages, requests: How much it asked, by messages and in rings.
        lies: How often something was said or done that an honest back-end would not.
        requests_after: Requests taken after the first lie.
        connection: ``open`` at the end, ``front-end`` or ``back-end`` closed it, ``none`` was made.
        front_end: How the command ended: ``exit N``, ``signal N``, ``killed after N s``; empty without one.
        verdict: ``crash``, ``hang``, ``error``, ``went on``; ``left``, ``waits`` without a command; ``not reached``.
        output: The last line that the command printed.
    """

    number: int
    attack: str
    ring: str
    connections: int = 0
    messages: int = 0
    requests: int = 0
    lies: int = 0
    requests_after: int = 0
    connection: str = "none"
    front_end: str = ""
    verdict: str = "not reached"
    output: str = ""

    def as_json(self) -> dict[str, Any]:
        """With stable keys."""
        return dataclasses.asdict(self)


class _Observed(HostileBlk):
    """Counts lies and requests."""

    report: Report
    _pushed: list[tuple[Chain, int]]

    def lied(self, offset: int, honest: int) -> int:
        """As the base's."""
        value = super().lied(offset, honest)
        self.report.lies += value != honest
        return value

    def write32(self, offset: int, value: int) -> None:
        """As the base's."""
        self.report.lies += offset == MmioRegister.QUEUE_NOTIFY and self.deaf
        super().write32(offset, value)

    def complete(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """A completion; a lie if it is not the honest one."""
        report = self.report
        report.requests += 1
        report.requests_after += bool(report.lies)
        if self.on_complete is None:
            super().complete(ring, chain, written)
            return
        pushed = self._pushed = []
        push = ring.push

        def watched(what: Chain, length: int) -> None:
            pushed.append((what, length))
            push(what, length)

        before = self._visible(ring, chain)
        ring.push = watched  # type: ignore[method-assign,assignment]  # looked at for the length of one call
        try:
            self.on_complete(ring, chain, written)
        except BaseException:
            report.lies += 1
            raise
        finally:
            ring.push = push  # type: ignore[method-assign]  # as it was
        honest = pushed == [(chain, written)] and not self.status & DeviceStatus.NEEDS_RESET
        report.lies += not honest or self._visible(ring, chain) != before

    def finished(self, ring: DeviceRing) -> None:
        """The end of a batch; whatever is done instead of the interrupt is a lie."""
        self.report.lies += self.on_finished is not None
        super().finished(ring)

    def _visible(self, ring: DeviceRing, chain: Chain) -> tuple[bytes, bytes, int]:
        """What an honest completion leaves as it is: status, a split ring's descriptors, how far that ring is ahead."""
        status = chain.parts[-1]
        table, ahead = b"", 0
        if isinstance(ring, DeviceSplitRing):
            table = self.window.take(ring.addresses.descriptors, SplitDescriptor.SIZE * ring.size)
            ahead = ring.next_used - len(self._pushed)
        return self.window.take(status.address, status.length), table, ahead


def _offered(plan: Plan, ring: str, queues: int) -> BlkOptions:
    options = plan.options or BlkOptions()
    features = options.features & ~int(Feature.ACCESS_PLATFORM)
    if not ring.startswith("packed"):
        features &= ~int(Feature.RING_PACKED)
    if ring.endswith("-direct"):
        features &= ~int(Feature.INDIRECT_DESC)
    if queues < 2:
        features &= ~int(BlkFeature.MQ)
    return dataclasses.replace(options, features=features, queue_size=_QUEUE_ENTRIES, queues=queues)


@contextlib.contextmanager
def _listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        try:
            made.bind(str(path))
        except OSError as error:  # without a path, and without a number where the path is too long
            failed = OSError(error.errno or errno.ENAMETOOLONG, f"cannot listen: {error.strerror or error}", str(path))
            failed.add_note("--socket names a new file in a folder that exists, in at most 107 bytes")
            raise failed from error
        try:
            made.listen(4)
            made.settimeout(_POLL_SECONDS)
            yield made
        finally:
            path.unlink(missing_ok=True)


def serve(
    plan: Plan,
    path: Path,
    *,
    ring: str = "split",
    queues: int = 1,
    size_bytes: int = 16 << 20,
    seconds: float = 10.0,
    command: Sequence[str] = (),
    on_listening: Callable[[], None] | None = None,
) -> Report:
    """Serve one attack until the front-end has left, its command has ended, or the time is over.

    Args:
        plan: The attack.
        path: Where to listen; must not exist.
        ring: What is offered: one of `RINGS`.
        queues: How many there are.
        size_bytes: Of the disk: zeroed memory behind a boot sector that ends a QEMU (`qemu_front_end`).
        seconds: How long the front-end has.
        command: Its words, with ``{socket}`` for the path; without one, whoever connects.
        on_listening: Called once a front-end can connect.

    Raises:
        OSError: The socket cannot be made, or the command not be started.
    """
    report = Report(plan.number, plan.name, ring)
    disk = disk_file(size_bytes, BOOT_SECTOR)

    def make(*arguments: Any) -> HostileBlk:
        device = _Observed(*arguments)
        device.report = report
        plan.install(device)
        return device

    script = plan.script() if plan.script is not None else None
    told: list[bool] = []

    def observed(conversation: Conversation, request: Request, honest: bytes) -> bytes:
        said = honest
        try:
            said = script(conversation, request, honest) if script is not None else honest
        except EOFError:
            told.append(True)
            report.lies += 1
            raise
        report.lies += said != honest
        return said

    backend = Backend(
        disk, _offered(plan, ring, queues), script=observed, make=make, protocol_features=plan.protocol_features
    )
    with _listener(path) as listener:
        if on_listening is not None:
            on_listening()
        output = b""
        process = _start(command, path)
        try:
            _attend(listener, backend, report, process, seconds)
        finally:
            if process is not None:
                output = _end(process, report)
    report.messages = backend.answered
    report.connection = _ended(backend, report, told=bool(told))
    backend.join()
    os.close(disk)
    report.verdict = _verdict(report)
    report.output = output.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
    return report


def _start(command: Sequence[str], path: Path) -> subprocess.Popen[bytes] | None:
    if not command:
        return None
    words = [word.replace("{socket}", str(path)) for word in command]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _attend(
    listener: socket.socket,
    backend: Backend,
    report: Report,
    process: subprocess.Popen[bytes] | None,
    seconds: float,
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            backend.serve(listener.accept()[0])
            report.connections += 1
        if process is not None:
            if process.poll() is not None:
                return
        elif backend.conversations and not any(one.is_alive() for one in backend.conversations):
            return


def _end(process: subprocess.Popen[bytes], report: Report) -> bytes:
    """How the command ended; ends it if it has not."""
    late = process.poll() is None
    if late:
        process.kill()
    output, _ = process.communicate()
    code = process.returncode
    report.front_end = "killed: it did not end" if late else f"signal {-code}" if code < 0 else f"exit {code}"
    return output


def _ended(backend: Backend, report: Report, *, told: bool) -> str:
    if not report.connections:
        return "none"
    last: threading.Thread = backend.conversations[-1]
    if last.is_alive():
        return "open"
    own = told or not isinstance(backend.conversations[-1].ended, EOFError | OSError)
    return "back-end" if own else "front-end"


def _verdict(report: Report) -> str:
    if report.front_end.startswith("signal"):
        return "crash"
    if report.front_end.startswith("killed"):
        return "hang" if report.lies else "not reached"
    if report.front_end and report.front_end != "exit 0":
        return "error"
    if not report.lies:
        return "not reached"
    if report.front_end or report.requests_after:
        return "went on"
    return "waits" if report.connection == "open" else "left"
