# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a driver owes to a device that has lied."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from svsm.formats.errors import BackendError, SvsmError
from svsm.fuzz.target import expect

__all__ = ["CANARY", "CONTENT", "DISK_BYTES", "Clock", "Debt"]

CANARY = b"\xc4\x9aPRIVATE\x9a\xc4canary"
"""Lies around everything that is written, and in what is refused: never to be seen in shared memory."""
DISK_BYTES = 32 << 10
CONTENT = bytes((block * 7 + at * 3) % 251 + 1 for block in range(DISK_BYTES // 512) for at in range(512))
"""Of every disk at the start: no zeros, and no block like its neighbour."""
_MOST_LOOKS = 2000


class Clock:
    """Time that passes when the driver waits; whoever looks at it without end is stopped.

    Attributes:
        now: Seconds.
        looks: How often it was asked since `begin`.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = 0
        self._begun = self.now

    def __call__(self) -> float:
        self.looks += 1
        if self.looks > _MOST_LOOKS:
            expect(False, "the driver never gives up")
        return self.now

    def pause(self, seconds: float) -> None:
        """Wait."""
        self.now += max(seconds, 1e-6)

    def begin(self) -> None:
        """A new call."""
        self.looks = 0
        self._begun = self.now

    @property
    def spent(self) -> float:
        """Seconds since `begin`."""
        return self.now - self._begun


@dataclasses.dataclass(slots=True)
class Debt:
    """What one call owes, lie by lie.

    Attributes:
        codes: The disk must die, of one of these.
        fails: The call must fail, and the disk may live.
        anything: There were lies whose effects add up to something that nobody predicts: any proper error will do.
        lies: How many lies there were.
    """

    codes: frozenset[str] = frozenset()
    fails: bool = False
    anything: bool = False
    lies: int = 0

    def die(self, *codes: str) -> None:
        """A lie that nobody may believe."""
        self.lies += 1
        self.codes |= frozenset(codes)

    def fail(self) -> None:
        """A lie, or a truth, that costs the request."""
        self.lies += 1
        self.fails = True

    def whatever(self) -> None:
        """A lie with many ends."""
        self.lies += 1
        self.anything = True

    def settle(self, error: SvsmError | None, fault: SvsmError | None, what: str) -> None:
        """Compare with what came of the call.

        Args:
            error: What the call raised.
            fault: The driver's, afterwards.
            what: The call, for the text.

        Raises:
            Broken: The driver has not done what it owes.
        """
        expect(error is None or isinstance(error, BackendError), f"{what}: an error of the wrong kind")
        expect(error is None or error.code == "block-io", f"{what}: an error that callers do not know")
        expect(fault is None or error is not None, f"{what}: a disk that died without an error")
        if fault is not None and error is not None:
            expect(error.details.get("violation") == fault.code, f"{what}: the violation is not named")
        if self.anything or self.lies > 1:
            if self.codes and not self.fails and not self.anything:
                expect(error is not None, f"{what}: several lies and no error")
            return
        if self.codes:
            expect(fault is not None, f"{what}: the disk lives after a lie ({_list(self.codes)})")
            expect(fault is None or fault.code in self.codes, f"{what}: not {_list(self.codes)}")
        elif self.fails:
            expect(error is not None, f"{what}: a failed request is called good")
            expect(fault is None, f"{what}: a failed request kills the disk")
        else:
            expect(error is None, f"{what}: an honest disk is refused")


def _list(codes: Iterable[str]) -> str:
    return " or ".join(sorted(codes))
