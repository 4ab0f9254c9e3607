# SPDX-License-Identifier: MIT OR Apache-2.0
"""The matrix: attack × transport × ring, each cell a case that can be run, or the reason why there is none.

`cells` lists every case of a transport with what must come of it, `absent` says why a number has none somewhere.
`markdown` is the table in docs/hostile.md, which a test keeps current.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from svsm.testing import vhost_user_trial
from svsm.testing.hostile import qemu_trial
from svsm.testing.hostile.attacks import ABSENT, ATTACKS, NUMBERS
from svsm.testing.hostile.catalogue import PACKED
from svsm.testing.hostile.qemu_attacks import INTERPOSED
from svsm.testing.hostile.trial import RINGS, Kind, Outcome
from svsm.testing.hostile.vhost_user_attacks import MESSAGE_ATTACKS

__all__ = ["TITLES", "TRANSPORTS", "Cell", "absent", "cells", "markdown"]

TRANSPORTS: Final = ("mmio", "vhost-user", "qemu")
"""Our device model behind simulated registers, the same behind a socket, and QEMU's device with somebody in between."""

TITLES: Final = {
    1: "used index jumps",
    2: "identifier beyond the ring",
    3: "identifier with upper bits",
    4: "identifier of what is not in flight",
    5: "completed twice",
    6: "length too large",
    7: "length too small, status OK",
    8: "changes between two readings",
    9: "status that cannot be, or was never written",
    10: "data changes afterwards",
    11: "descriptors overwritten",
    12: "indirect tables overwritten",
    13: "chain made a loop",
    14: "FEATURES_OK not kept",
    15: "legacy downgrade",
    16: "ACCESS_PLATFORM not offered",
    17: "features that lie",
    18: "features change",
    19: "configuration never stable",
    20: "capacity",
    21: "block size, topology",
    22: "limits",
    23: "queue sizes and numbers",
    24: "queue not taken, or taken already",
    25: "reset not done",
    26: "asks for a reset, fails, dies",
    27: "no completion",
    28: "completion after a reset",
    29: "kicks suppressed",
    30: "interrupts without reason, or none",
    31: "order",
    32: "identity changes",
    33: "old or swapped contents",
    34: "vhost-user messages and descriptors",
    35: "packed ring: wraps, positions, flags",
}
"""The attacks, by number."""

_QEMU_READS = "QEMU is who reads them: what it does then is no attack on the driver (docs/UPSTREAM.md)"
_QEMU_ABSENT: Final = {
    11: _QEMU_READS,
    12: _QEMU_READS,
    13: _QEMU_READS,
    28: "QEMU does not write after a reset, and who stands between cannot make it",
}
_VHOST_ONLY = "messages, descriptors and sockets of a vhost-user back-end: that transport's own cases"


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One case on one transport and ring.

    Attributes:
        number: Of the attack.
        name: What the device does.
        transport: One of `TRANSPORTS`.
        ring: One of `RINGS`.
        expected: What must come of it.
        run: Does it. Raises `TrialError`, or whatever the driver lets out, when a promise is broken.
    """

    number: int
    name: str
    transport: str
    ring: str
    expected: Outcome
    run: Callable[[], Outcome]


def _mmio() -> Iterable[Cell]:
    for attack in ATTACKS:
        for ring, outcome in attack.expected.items():
            yield Cell(attack.number, attack.name, "mmio", ring, outcome, functools.partial(attack.run, ring))


def _vhost_user() -> Iterable[Cell]:
    for attack in vhost_user_trial.CASES:
        for ring in attack.expected:
            yield Cell(
                attack.number,
                attack.name,
                "vhost-user",
                ring,
                vhost_user_trial.expected(attack, ring),
                functools.partial(vhost_user_trial.run, attack, ring),
            )
    for message in MESSAGE_ATTACKS:
        for ring in RINGS:
            yield Cell(
                message.number,
                message.name,
                "vhost-user",
                ring,
                message.expected,
                functools.partial(vhost_user_trial.run, message, ring),
            )


def _qemu(program: Path | None) -> Iterable[Cell]:
    for attack in qemu_trial.CASES:
        for ring in attack.expected:
            yield Cell(
                attack.number,
                attack.name,
                "qemu",
                ring,
                qemu_trial.expected(attack, ring),
                functools.partial(qemu_trial.run, attack, ring, program=program),
            )
    for case in INTERPOSED:
        for ring in case.rings:
            yield Cell(
                case.number,
                case.name,
                "qemu",
                ring,
                case.expected,
                functools.partial(qemu_trial.run, case, ring, program=program),
            )


def cells(transport: str, *, program: Path | None = None) -> list[Cell]:
    """Every case of a transport, by number.

    Args:
        transport: One of `TRANSPORTS`.
        program: QEMU, where it is not the one in PATH.
    """
    made = _mmio() if transport == "mmio" else _vhost_user() if transport == "vhost-user" else _qemu(program)
    return sorted(made, key=lambda cell: cell.number)


def absent(number: int, transport: str, ring: str) -> str:
    """Why a number has no case there; empty where it has one."""
    if number == 34:
        return "" if transport == "vhost-user" else _VHOST_ONLY
    if transport == "qemu" and number in _QEMU_ABSENT:
        return _QEMU_ABSENT[number]
    if transport == "qemu" and number == 31 and ring in PACKED:
        return "the driver looks at one position at a time; what comes behind it is not there yet"
    return ABSENT.get((number, ring), "")


# ---- the page -------------------------------------------------------------------------------------------------------

_LETTERS: Final = {Kind.REFUSED: "R", Kind.DEAD: "D", Kind.ERROR: "E", Kind.SURVIVED: "S"}


def _summary(outcomes: list[Outcome]) -> str:
    counts = collections.Counter(_LETTERS[outcome.kind] for outcome in outcomes)
    return " ".join(f"{counts[letter]}{letter}" for letter in _LETTERS.values() if counts[letter])


def markdown() -> str:
    """The whole matrix as tables: the cells, then the reasons of those that are not there."""
    places = [(transport, ring) for transport in TRANSPORTS for ring in RINGS]
    there: dict[tuple[int, str, str], list[Outcome]] = collections.defaultdict(list)
    for transport in TRANSPORTS:
        for cell in cells(transport):
            there[cell.number, transport, cell.ring].append(cell.expected)
    head = " | ".join(f"{transport} {ring}" for transport, ring in places)
    lines = [f"| | attack | {head} |", "|---" * (len(places) + 2) + "|"]
    reasons: dict[tuple[int, str], list[str]] = collections.defaultdict(list)
    for number in NUMBERS:
        row = []
        for transport, ring in places:
            outcomes = there[number, transport, ring]
            row.append(_summary(outcomes) or "–")
            if not outcomes:
                reasons[number, absent(number, transport, ring)].append(f"{transport} {ring}")
        lines.append(f"| {number} | {TITLES[number]} | {' | '.join(row)} |")
    total = {transport: sum(len(there[n, transport, r]) for n in NUMBERS for r in RINGS) for transport in TRANSPORTS}
    lines.append("")
    lines.append("Cells: " + ", ".join(f"{transport} {count}" for transport, count in total.items()) + ".")
    lines += ["", "| | not on | because |", "|---|---|---|"]
    for (number, reason), where in reasons.items():
        lines.append(f"| {number} | {_places(where)} | {reason} |")
    return "\n".join(lines) + "\n"


def _places(where: list[str]) -> str:
    if len(where) == len(TRANSPORTS) * len(RINGS):
        return "all"
    named = []
    for transport in TRANSPORTS:
        rings = [place.removeprefix(f"{transport} ") for place in where if place.startswith(f"{transport} ")]
        if rings:
            named.append(transport if len(rings) == len(RINGS) else f"{transport} ({', '.join(rings)})")
    return "; ".join(named)
