# SPDX-License-Identifier: MIT OR Apache-2.0
"""Attacks on QEMU's rings: completions that QEMU made, changed before the driver sees them (`Interposer`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from svsm.formats.virtio import DeviceStatus, MmioRegister
from svsm.testing.hostile.catalogue import BOTH, IO_ERROR, PACKED, SPLIT, SURVIVED, dead
from svsm.testing.hostile.interposer import Interposer
from svsm.testing.hostile.mixture import Decisions
from svsm.testing.hostile.trial import Outcome, TrialError

if TYPE_CHECKING:
    from svsm.testing.hostile.qemu_trial import QemuTrial

__all__ = ["INTERPOSED", "InterposedAttack", "mixed"]


@dataclasses.dataclass(frozen=True, slots=True)
class InterposedAttack:
    """One case against QEMU's rings.

    Attributes:
        number: In the list.
        name: What appears to the driver.
        expected: The outcome.
        install: Puts hooks on the interposer.
        rings: Where it can be done.
        after: More steps, after the common workload.
    """

    number: int
    name: str
    expected: Outcome
    install: Callable[[Interposer], None] = lambda interposer: None
    rings: tuple[str, ...] = BOTH
    after: Callable[[QemuTrial], None] | None = None


INTERPOSED: Final[list[InterposedAttack]] = []


def _case(number: int, name: str, outcome: Outcome, install: Any = None, **rest: Any) -> None:
    if install is not None:
        rest["install"] = install
    INTERPOSED.append(InterposedAttack(number, name, outcome, **rest))


def _nth(number: int, act: Callable[[Interposer, int], None]) -> Callable[[Interposer], None]:
    """Change the `number`-th completion (from 0) like this."""

    def install(interposer: Interposer) -> None:
        def on_used(where: Interposer, position: int, count: int) -> None:
            if count == number:
                act(where, position)

        interposer.on_used = on_used

    return install


def _identifier(change: Callable[[int], int]) -> Callable[[Interposer], None]:
    def act(where: Interposer, position: int) -> None:
        identifier, length = where.element(position)
        where.set_element(position, change(identifier), length)

    return _nth(2, act)


def _length(change: Callable[[int], int]) -> Callable[[Interposer], None]:
    def act(where: Interposer, position: int) -> None:
        identifier, length = where.element(position)
        where.set_element(position, identifier, change(length))

    return _nth(1, act)


def _index(step: int) -> Callable[[Interposer], None]:
    return _nth(1, lambda where, position: where.set_index(where.index + step))


for _step, _name in ((1, "by one too many"), (7, "by more than are in flight"), (-2, "back"), (0x8000, "half around")):
    _case(1, f"QEMU's used index jumps {_name}", dead("virtio-used-index"), _index(_step), rings=SPLIT)
_case(2, "QEMU's identifier is beyond the ring", dead("virtio-used-id"), _identifier(lambda _: 0x7FFF))
_case(2, "QEMU's identifier is the largest", dead("virtio-used-id"), _identifier(lambda _: 0xFFFF))
_case(
    3, "QEMU's identifier has upper bits", dead("virtio-used-id"), _identifier(lambda is_: is_ | 1 << 31), rings=SPLIT
)
_case(
    4,
    "QEMU's identifier is another request's",
    dead("virtio-used-unexpected"),
    _identifier(lambda is_: is_ ^ 3),
    rings=("split", *PACKED),
)
_case(
    4,
    "QEMU's identifier is in the middle of a chain",
    dead("virtio-used-id"),
    _identifier(lambda is_: is_ + 1),
    rings=("split-direct",),
)


def _again(interposer: Interposer) -> None:
    before: list[int] = []

    def on_used(where: Interposer, position: int, count: int) -> None:
        identifier, length = where.element(position)
        if before:
            where.set_element(position, before[-1], length)
        before.append(identifier)

    interposer.on_used = on_used


_case(5, "QEMU's completion is the one before", dead("virtio-used-unexpected"), _again)
_case(6, "QEMU's length is one byte more", dead("virtio-used-length"), _length(lambda is_: is_ + 1))
_case(6, "QEMU's length is the largest", dead("virtio-used-length"), _length(lambda _: 0xFFFF_FFFF))
_case(7, "QEMU's length is 0", IO_ERROR, _length(lambda _: 0))
_case(7, "QEMU's length is that of the status", IO_ERROR, _length(lambda _: 1))


def _status(value: int) -> Callable[[Interposer], None]:
    def install(interposer: Interposer) -> None:
        looks = 0

        def on_status(honest: int) -> int:
            nonlocal looks
            looks += 1
            return value if looks == 2 else honest

        interposer.on_status = on_status

    return install


_case(9, "QEMU's status is 3", dead("virtio-blk-status"), _status(3))
_case(9, "QEMU's status is 255", dead("virtio-blk-status"), _status(0xFF))
_case(9, "QEMU's status is an error", IO_ERROR, _status(1))


def _scribble(trial: QemuTrial) -> None:
    results = trial.driver.read([(0, 4096), (8192, 8192)])
    before = [bytes(part) for part in results]
    saved = bytes(trial.shared)
    trial.shared[:] = b"\xee" * len(saved)
    if results != before:
        raise TrialError("a result is a view of shared memory")
    trial.shared[:] = saved


_case(10, "QEMU's data changes after the driver has returned it", SURVIVED, after=_scribble)


def _asks_for_reset(bits: int) -> Callable[[Interposer], None]:
    def install(interposer: Interposer) -> None:
        def on_used(where: Interposer, position: int, count: int) -> None:
            if count == 1:
                where.hiding = True
                where.on_read = lambda at, honest: honest | bits if at == MmioRegister.STATUS and honest else honest

        interposer.on_used = on_used

    return install


_case(
    26,
    "QEMU seems to ask for a reset and stops",
    dead("virtio-needs-reset"),
    _asks_for_reset(int(DeviceStatus.NEEDS_RESET)),
    after=lambda trial: trial.read(0, 512),
)
_case(
    26,
    "QEMU seems to have failed and stops",
    dead("virtio-needs-reset"),
    _asks_for_reset(int(DeviceStatus.FAILED)),
    after=lambda trial: trial.read(0, 512),
)


def _hide(trial: QemuTrial) -> None:
    cast(Interposer, trial.device).hiding = True
    trial.read(0, 512)


_case(27, "QEMU's completions do not appear", dead("virtio-timeout"), after=_hide)


def _deaf(interposer: Interposer) -> None:
    interposer.deaf = True


_case(27, "QEMU hears no kick", dead("virtio-timeout"), _deaf)


def _events(first: int, second: int) -> Callable[[Interposer], None]:
    return lambda interposer: setattr(
        interposer, "on_used", lambda where, position, count: where.set_events(first, second)
    )


_case(29, "QEMU's event fields are ones", SURVIVED, _events(0xFFFF, 0xFFFF))
_case(29, "QEMU's event fields say no kick", SURVIVED, _events(1, 1))


def _storm(trial: QemuTrial) -> None:
    interposer = cast(Interposer, trial.device)
    interposer.spurious = True
    trial.read(0, 4096, count=3)
    interposer.hiding = True
    trial.read(0, 512)


_case(30, "interrupts without end, and then QEMU seems silent", dead("virtio-timeout"), after=_storm)


def _flags(change: Callable[[int], int]) -> Callable[[Interposer], None]:
    return _nth(2, lambda where, position: where.set_flags(position, change(where.flags(position))))


_case(
    35, "QEMU's descriptor has the wrong wrap", dead("virtio-timeout"), _flags(lambda is_: is_ ^ 0x8080), rings=PACKED
)
_case(35, "only USED is set by QEMU", dead("virtio-timeout"), _flags(lambda _: 0x8000), rings=PACKED)
_case(35, "only AVAIL is set by QEMU", dead("virtio-timeout"), _flags(lambda _: 0x80), rings=PACKED)
_case(35, "QEMU sets every flag", SURVIVED, _flags(lambda is_: is_ | 0x7F7F), rings=PACKED)


def _reversed(interposer: Interposer) -> None:
    def on_batch(where: Interposer, positions: list[int]) -> None:
        elements = [where.element(position) for position in positions]
        for position, (identifier, length) in zip(positions, reversed(elements), strict=True):
            where.set_element(position, identifier, length)

    interposer.on_batch = on_batch


_case(31, "QEMU's completions appear in the opposite order", SURVIVED, _reversed, rings=SPLIT)


def mixed(data: bytes) -> InterposedAttack:
    """An attack that does to QEMU's completions and registers what the bytes say."""

    def install(interposer: Interposer) -> None:
        decisions = Decisions(data)
        honest_reads = 40 + decisions.byte()

        def on_used(where: Interposer, position: int, count: int) -> None:
            choice = decisions.byte()
            identifier, length = where.element(position)
            if choice % 8 == 1:
                where.set_element(position, decisions.edge(identifier), length)
            elif choice % 8 == 2:
                where.set_element(position, identifier, decisions.edge(length))
            elif choice % 8 == 3 and not where.packed:
                where.set_index(where.index + decisions.number(2))
            elif choice % 8 == 3:
                where.set_flags(position, decisions.number(2))
            elif choice % 8 == 4:
                where.set_events(decisions.number(2), decisions.number(2))

        def on_read(at: int, honest: int) -> int:
            nonlocal honest_reads
            honest_reads -= 1
            return honest if honest_reads > 0 or decisions.byte() < 224 else decisions.edge(honest)

        interposer.on_used = on_used
        interposer.on_read = on_read

    return InterposedAttack(34, "a mixture", dead("virtio-timeout"), install)
