# SPDX-License-Identifier: MIT OR Apache-2.0
"""What only a vhost-user back-end can do: its messages, its descriptors, the end of its socket.

Number 34 of the list, and for the numbers that are about registers what takes their place on this transport: the
answers that carry features, queues and configuration, acknowledgements, GET_VRING_BASE, the eventfds. Each case is a
`Script` for `svsm.testing.vhost_user_backend`, an attack on the device model, or steps that a trial takes afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from svsm.formats.errors import SvsmError
from svsm.formats.vhost_user import HeaderFlag, ProtocolFeature, Request, U64Payload, VringState
from svsm.host.devices.virtio_blk import BlkOptions
from svsm.host.devices.virtio_ring import Chain, DeviceRing
from svsm.storage.drivers.virtio.blk import VirtioBlk
from svsm.testing.hostile.catalogue import BOTH, SURVIVED, Install, dead, nth, refused
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.trial import Outcome, TrialError
from svsm.testing.vhost_user_backend import PROTOCOL_FEATURES, Conversation, Script, reply

if TYPE_CHECKING:
    from svsm.testing.vhost_user_trial import VhostUserTrial

__all__ = ["LIES", "MESSAGE_ATTACKS", "Liar", "MessageAttack", "lie"]

_DRIP_SECONDS: Final = 0.05
_SHORT_SECONDS: Final = 0.4
"""Where a deadline at the start is what must come."""
_LATER_SECONDS: Final = 1.5
"""Where it must come after the common workload, which must not meet it."""

Liar = Callable[[Request], Script]
"""Which answer is replaced → the script that does it."""


def lie(change: Callable[[Conversation, bytes], bytes]) -> Liar:
    """Put something in the place of an answer.

    Args:
        change: (conversation, the honest answer) → the bytes to send.
    """

    def make(target: Request) -> Script:
        def script(conversation: Conversation, request: Request, honest: bytes) -> bytes:
            # Where nothing is answered there is nothing to replace.
            return change(conversation, honest) if request is target and honest else honest

        return script

    return make


def _word(position: int, value: int) -> Liar:
    """One of the header's three words is another."""
    return lie(lambda _, honest: honest[: 4 * position] + value.to_bytes(4, "little") + honest[4 * position + 4 :])


def _resized(honest: bytes, by: int) -> bytes:
    """A payload that is longer or shorter, with a header that says so."""
    size = (len(honest) - 12 + by).to_bytes(4, "little")
    return (honest[:8] + size + honest[12:] + bytes(max(by, 0)))[: len(honest) + by]


def _closing(keep: int) -> Liar:
    def change(conversation: Conversation, honest: bytes) -> bytes:
        conversation.socket.sendall(honest[:keep])
        conversation.socket.shutdown(socket.SHUT_RDWR)
        raise EOFError

    return lie(change)


def _drip(conversation: Conversation, honest: bytes) -> bytes:
    for at in range(len(honest)):
        conversation.socket.sendall(honest[at : at + 1])
        time.sleep(_DRIP_SECONDS)
    return b""


def _with_descriptors(conversation: Conversation, honest: bytes) -> bytes:
    read, write = os.pipe()
    with contextlib.suppress(OSError):
        socket.send_fds(conversation.socket, [honest], [read, write])
    os.close(read)
    os.close(write)
    return b""


LIES: Final[dict[str, tuple[Liar, str]]] = {
    "answers something else": (_word(0, 77), "vhost-user-reply"),
    "answers in version 0": (_word(1, int(HeaderFlag.REPLY)), "vhost-user-reply"),
    "answers in version 2": (_word(1, 2 | HeaderFlag.REPLY), "vhost-user-reply"),
    "answers without the reply flag": (_word(1, 1), "vhost-user-reply"),
    "answers with flags that nobody knows": (_word(1, 1 << 31 | 5), "vhost-user-reply"),
    "answers with a payload too long": (lie(lambda _, honest: _resized(honest, 1)), "vhost-user-reply"),
    "answers with a payload too short": (lie(lambda _, honest: _resized(honest, -1)), "vhost-user-reply"),
    "announces 4 GiB of payload": (_word(2, 0xFFFF_FFFF), "vhost-user-reply"),
    "answers twice": (lie(lambda _, honest: honest + honest), "vhost-user-reply"),
    "floods": (lie(lambda _, honest: bytes(1 << 20)), "vhost-user-reply"),
    "sends descriptors": (lie(_with_descriptors), "vhost-user-reply"),
    "closes instead of answering": (_closing(0), "vhost-user-gone"),
    "closes in the header": (_closing(7), "vhost-user-gone"),
    "closes in the payload": (_closing(13), "vhost-user-gone"),
    "does not answer": (lie(lambda _, honest: b""), "vhost-user-timeout"),
    "answers half": (lie(lambda _, honest: honest[:-1]), "vhost-user-timeout"),
    "answers one byte at a time": (lie(_drip), "vhost-user-timeout"),
}
"""By what the back-end does: how, and the code that must come of it."""

_IDENTITY: Final = ("something else", "version", "reply flag", "nobody knows")
"""Lies about what the message is: this transport's number 32."""


@dataclasses.dataclass(frozen=True, slots=True)
class MessageAttack:
    """One case of this transport's own.

    Attributes:
        number: In the list.
        name: What the back-end does.
        expected: The outcome, on any ring.
        script: What is said instead; None is honest. Called for each trial.
        install: Makes the device do it.
        after: More steps, after the common workload.
        prepare: Called with the trial before the driver starts.
        options: What the device offers.
        protocol_features: What the back-end offers of them.
        deadline_seconds: The driver's, where another one is wanted; where the start must fail, also for each answer.
    """

    number: int
    name: str
    expected: Outcome
    script: Callable[[], Script] | None = None
    install: Install = lambda device: None
    after: Callable[[VhostUserTrial], None] | None = None
    prepare: Callable[[VhostUserTrial], None] | None = None
    options: BlkOptions | None = None
    protocol_features: int = PROTOCOL_FEATURES
    deadline_seconds: float | None = None
    rings: tuple[str, ...] = BOTH
    queues: int = 1


MESSAGE_ATTACKS: Final[list[MessageAttack]] = []


def _case(number: int, name: str, expected: Outcome, **rest: Any) -> None:
    MESSAGE_ATTACKS.append(MessageAttack(number, name, expected, **rest))


def _says(target: Request, payload: bytes) -> Callable[[], Script]:
    """That answer has this payload, in a good message."""
    return lambda: lambda _, request, honest: reply(request, payload) if request is target and honest else honest


def _number(value: int) -> bytes:
    return U64Payload(value).pack()


# ---- what stands for registers --------------------------------------------------------------------------------------

for _message in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR, Request.SET_VRING_ENABLE):
    _case(24, f"{_message.name} is refused", refused("vhost-user-refused"), script=_says(_message, _number(1)))
_case(
    14,
    "the choice of features is refused",
    refused("virtio-features-refused"),
    script=_says(Request.SET_FEATURES, _number(1 << 63)),
)
_case(15, "no protocol features", refused("vhost-user-features"), script=_says(Request.GET_FEATURES, _number(1 << 32)))
_case(15, "no CONFIG", refused("vhost-user-features"), protocol_features=int(ProtocolFeature.MQ))
_case(
    17,
    "every protocol feature is offered",
    SURVIVED,
    script=_says(Request.GET_PROTOCOL_FEATURES, _number((1 << 64) - 1)),
)
_case(17, "neither acknowledgements nor several queues", SURVIVED, protocol_features=int(ProtocolFeature.CONFIG))
_case(22, "the configuration is refused", refused("vhost-user-config"), script=_says(Request.GET_CONFIG, b""))
_case(
    22,
    "another part of the configuration",
    refused("vhost-user-reply"),
    script=_says(Request.GET_CONFIG, b"\x04" + bytes(3) + b"\x3c" + bytes(67)),
)
_case(
    22,
    "a configuration of ones",
    refused("virtio-blk-geometry"),
    script=_says(Request.GET_CONFIG, bytes(4) + b"\x3c" + bytes(7) + b"\xff" * 60),
)
for _count, _code in ((0, "virtio-queue-missing"), (257, "vhost-user-reply"), ((1 << 64) - 1, "vhost-user-reply")):
    _case(23, f"{_count} queues", refused(_code), script=_says(Request.GET_QUEUE_NUM, _number(_count)))


def _restless() -> Script:
    answers = 0

    def script(_: Conversation, request: Request, honest: bytes) -> bytes:
        nonlocal answers
        if request is not Request.GET_CONFIG:
            return honest
        answers += 1
        return honest if answers == 1 else honest[:24] + bytes(8) + honest[32:]

    return script


def _once(trial: VhostUserTrial) -> None:
    if trial.backend.requests.count(Request.GET_CONFIG) != 1:
        raise TrialError("the configuration was read again")


_case(19, "every answer about the configuration is another", SURVIVED, script=_restless, after=_once)


def _shrink(trial: VhostUserTrial) -> None:
    """Nothing announces it; who connects again sees it, and asks for nothing beyond."""
    trial.backend.disk.capacity = 8
    trial.reconnect()
    if trial.driver.size_bytes != 4096:
        raise TrialError("the driver missed a resize")
    before = trial.requests
    trial.attempt(lambda: trial.driver.read([(4096, 512)]))
    if trial.errors.pop().code != "block-range" or trial.requests != before:
        raise TrialError("a request went beyond the new end")
    trial.backend.disk.measure()


_case(20, "the disk shrinks between two connections", SURVIVED, after=_shrink)


def _reset_here(trial: VhostUserTrial) -> None:
    """A reset in the same connection, which is GET_VRING_BASE."""
    with contextlib.suppress(SvsmError):  # the driver remembers it, and the outcome is judged by that
        VirtioBlk.reconnect(trial.driver)
    trial.read(0, 512)


_case(
    25,
    "a queue does not stop",
    dead("vhost-user-timeout"),
    script=lambda: LIES["does not answer"][0](Request.GET_VRING_BASE),
    after=_reset_here,
    deadline_seconds=_LATER_SECONDS,
)
_case(
    25,
    "another queue has stopped",
    dead("vhost-user-reply"),
    script=_says(Request.GET_VRING_BASE, VringState(1, 0).pack()),
    after=_reset_here,
)


# ---- life, death and time -------------------------------------------------------------------------------------------


def _dies(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        raise EOFError

    nth(device, 3, act)


_case(26, "the back-end dies over a request", dead("vhost-user-gone"), install=_dies)


def _late(trial: VhostUserTrial) -> None:
    """Kill by timeout, connect again, then let the first connection complete what it was given."""
    held: list[tuple[DeviceRing, Chain, int]] = []
    old = trial.device
    old.on_complete = lambda ring, chain, written: held.append((ring, chain, written))
    trial.read(0, 4096, count=20)
    if trial.driver.fault is None or trial.driver.fault.code != "virtio-timeout":
        raise TrialError("no deadline")
    trial.errors.clear()
    trial.content[:] = trial.machine.content(0, len(trial.content))
    trial.reconnect()

    def afterwards(ring: DeviceRing, chain: Chain, written: int) -> None:
        while held:
            old_ring, chain_before, length = held.pop()
            for part in chain_before.parts:
                if part.device_writes:
                    old.window.put(part.address, b"\xdd" * part.length)
            old_ring.push(chain_before, length)
        ring.push(chain, written)

    trial.device.on_complete = afterwards
    trial.read(0, 4096, count=3)
    trial.read(0, 65536)


_case(
    28, "the old connection's device completes in the new one", SURVIVED, after=_late, deadline_seconds=_LATER_SECONDS
)


def _no_wake_ups(trial: VhostUserTrial) -> None:
    trial.backend.interrupted = lambda conversation: None


def _full_counters(trial: VhostUserTrial) -> None:
    trial.backend.interrupted = lambda conversation: conversation.wake(1 << 62)


def _storm(trial: VhostUserTrial) -> None:
    conversation = trial.backend.conversations[-1]
    trial.device.on_complete = lambda ring, chain, written: None
    with trial.repeatedly(conversation.wake):
        trial.read(0, 512)


_case(30, "no wake-up ever", SURVIVED, prepare=_no_wake_ups)
_case(30, "the counters of the wake-ups are filled", SURVIVED, prepare=_full_counters)
_case(
    30,
    "wake-ups without end, and then no answer",
    dead("virtio-timeout"),
    after=_storm,
    deadline_seconds=_LATER_SECONDS,
)

# ---- messages -------------------------------------------------------------------------------------------------------

for _name, (_liar, _code) in LIES.items():
    for _message in (Request.GET_FEATURES, Request.SET_MEM_TABLE, Request.SET_VRING_KICK):
        _case(
            32 if any(word in _name for word in _IDENTITY) else 34,
            f"{_message.name}: the back-end {_name}",
            refused(_code),
            script=lambda liar=_liar, message=_message: liar(message),
            deadline_seconds=_SHORT_SECONDS if _code == "vhost-user-timeout" else None,
        )
_case(34, "the memory is refused", refused("vhost-user-refused"), script=_says(Request.SET_MEM_TABLE, _number(1 << 63)))


def _unasked(trial: VhostUserTrial) -> None:
    trial.backend.conversations[-1].socket.sendall(reply(Request.GET_FEATURES, bytes(8)))
    trial.attempt(trial.driver.poll)


_case(34, "the back-end speaks without being asked", dead("vhost-user-reply"), after=_unasked)


def _hang_up(trial: VhostUserTrial) -> None:
    with contextlib.suppress(OSError):
        trial.backend.conversations[-1].socket.shutdown(socket.SHUT_RDWR)
    trial.read(0, 512)


_case(34, "the back-end closes the socket", dead("vhost-user-gone"), after=_hang_up)


def _reach_for_the_memory(trial: VhostUserTrial) -> None:
    def mapped(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        for length in (0, size // 2, size * 2):
            try:
                os.ftruncate(descriptor, length)
            except PermissionError:
                continue
            trial.findings.append(TrialError("the back-end can change the size of the memory"))
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            trial.findings.append(TrialError("the back-end can seal the memory"))

    trial.backend.mapped = mapped


_case(34, "the back-end changes size and seals of the memory", SURVIVED, prepare=_reach_for_the_memory)


def _fill_the_kick(trial: VhostUserTrial) -> None:
    for queue in trial.backend.conversations[-1].kicks():
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(queue, (1 << 64) - 2)
    trial.read(0, 4096, count=5)


_case(34, "the back-end fills the kick's counter", SURVIVED, after=_fill_the_kick)
