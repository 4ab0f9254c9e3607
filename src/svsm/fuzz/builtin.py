# SPDX-License-Identifier: MIT OR Apache-2.0
"""A small mutational engine of our own, for where atheris is not installed.

Deterministic: the same target, inputs, seed and number of executions do the same. It sees no coverage. In its place
it has the reason for which an input was refused: an input that is refused by a line that refused none before (or is
the first that is accepted) is kept and mutated further, which is enough to work a way through a parser's checks.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable

from svsm.fuzz.target import Finding, Target, execute

__all__ = ["Run", "fuzz", "minimised", "mutated"]

_WORDS = (
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b'"',
    b"{",
    b"]",
    b"\\u0000",
    b"=",
    b"1e9",
)
_MAX_POOL = 2048


@dataclasses.dataclass(slots=True)
class Run:
    """What a run has done."""

    executions: int = 0
    accepted: int = 0
    reasons: int = 0
    """Different reasons for a refusal."""
    kept: list[bytes] = dataclasses.field(default_factory=list)
    """Inputs that showed something new."""
    findings: dict[str, tuple[bytes, str]] = dataclasses.field(default_factory=dict)
    """By signature: the shortest input, and the text."""


def mutated(data: bytes, other: bytes, dice: random.Random, *, max_bytes: int) -> bytes:
    """A few random changes to `data`, some of them taken from `other`."""
    changed = bytearray(data)
    for _ in range(1 << dice.randrange(4)):
        at = dice.randrange(len(changed) + 1)
        kind = dice.randrange(9)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = dice.randrange(256)
        elif kind == 2:
            del changed[at : at + 1 + dice.randrange(16)]
        elif kind == 3:
            changed[at:at] = dice.randbytes(1 + dice.randrange(8))
        elif kind == 4:
            word = dice.choice(_WORDS)
            changed[at : at + (len(word) if dice.randrange(2) else 0)] = word
        elif kind == 5:
            width = dice.choice((1, 2, 4, 8))
            number = (dice.choice((0, 1, 2, 0xFF, 1 << 16, 1 << 31, 1 << 32, len(changed))) - dice.randrange(2)) % (
                1 << 64
            )
            order: str = dice.choice(("little", "big"))
            packed = number.to_bytes(8, "little")[:width]
            changed[at : at + width] = packed if order == "little" else packed[::-1]
        elif kind == 6 and other:
            start = dice.randrange(len(other))
            piece = other[start : start + 1 + dice.randrange(64)]
            changed[at : at + (len(piece) if dice.randrange(2) else 0)] = piece
        elif kind == 7:
            end = min(len(changed), at + 1 + dice.randrange(32))
            changed[end:end] = changed[at:end]
        elif kind == 8 and dice.randrange(8) == 0:
            del changed[at:]
    return bytes(changed[:max_bytes])


def fuzz(
    target: Target,
    inputs: Iterable[bytes],
    *,
    seed: int,
    seconds: float | None = None,
    executions: int | None = None,
    first_finding: bool = False,
    clock: Callable[[], float] = time.monotonic,
    on_finding: Callable[[Finding, bytes], None] = lambda _finding, _data: None,
) -> Run:
    """Run every input, then mutations of those that showed something new, until a limit is reached.

    Args:
        inputs: Seeds and corpus; all of them run, whatever the limits say.
        seed: Of the random choices.
        seconds: Time for mutations.
        executions: Number of mutations.
        first_finding: End with the first finding.
        clock: What `seconds` are measured with.
        on_finding: Called for the first input of each signature, and for each shorter one.
    """
    dice = random.Random(seed)
    run, seen, pool = Run(), set[str](), [b""]
    known = {bytes(data) for data in inputs}
    ends = None if seconds is None else clock() + seconds

    def one(data: bytes) -> None:
        run.executions += 1
        try:
            outcome = execute(target, data)
        except Finding as finding:
            earlier = run.findings.get(finding.signature)
            if earlier is None or len(data) < len(earlier[0]):
                run.findings[finding.signature] = (data, finding.text)
                on_finding(finding, data)
            return
        run.accepted += not outcome.reason
        if outcome.reason not in seen:
            seen.add(outcome.reason)
            run.reasons += bool(outcome.reason)
            pool.append(data)
            if data not in known:
                run.kept.append(data)
        elif data in known and len(pool) < _MAX_POOL:
            pool.append(data)

    one(b"")
    for data in sorted(known):
        one(data)
    done = 0
    while (executions is None or done < executions) and (ends is None or clock() < ends):
        if first_finding and run.findings:
            break
        done += 1
        one(mutated(dice.choice(pool), dice.choice(pool), dice, max_bytes=target.max_bytes))
    return run


def minimised(target: Target, data: bytes, *, seconds: float = 30.0) -> tuple[bytes, Finding | None]:
    """The shortest input found that has the finding of `data`, and that finding; None when `data` has none.

    Cuts ever smaller pieces out, then sets bytes to zero, as long as the signature stays the same.
    """
    finding = _finding(target, data)
    if finding is None:
        return data, None
    ends = time.monotonic() + seconds

    def same(candidate: bytes) -> bool:
        found = _finding(target, candidate) if time.monotonic() < ends else None
        return found is not None and found.signature == finding.signature

    piece = max(1, len(data) // 2)
    while piece:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + piece :]
            if same(shorter):
                data = shorter
            else:
                at += piece
        piece //= 2
    for at in range(len(data)):
        simpler = data[:at] + b"\0" + data[at + 1 :]
        if data[at] and same(simpler):
            data = simpler
    return data, _finding(target, data) or finding


def _finding(target: Target, data: bytes) -> Finding | None:
    try:
        execute(target, data)
    except Finding as finding:
        return finding
    return None
