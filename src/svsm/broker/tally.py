# SPDX-License-Identifier: MIT OR Apache-2.0
"""What strangers can repeat at will is counted in the audit trail, not written down line by line.

The first refusal of a kind has its line at once. While that is less than `period_seconds` ago, further ones are
counted, and written as one line with their number when the time is over. So a kind (event, reason, volume) has one
line a period however many arrive, and every one is either a line or in a line's `count`.

Attempts that nobody signed are one kind for each reason, for at most `reasons` reasons at a time; more are counted as
"other". Evidence that a genuine chip signed is told apart by its volume, and has lines of its own as long as the
volume's allowance lasts: a few at once, then one a period. A recording of such evidence can be sent by anybody.

Counts live in memory until their time is over or the broker is closed; what a kill takes is at most one period's.
Where the database refuses a line, the count stays and is tried again. Times are `time.monotonic` seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from svsm.broker.store import Store
from svsm.formats.errors import SvsmError

__all__ = ["Kind", "Tally", "TallyLimits"]

_OTHER: Final = "other"
_RETRY_SECONDS: Final = 5.0


class Kind(NamedTuple):
    """What is counted together."""

    event: str
    reason: str | None
    """Code of the refusal; None for what was granted."""
    volume_id: str | None
    """Only where something genuine names it."""


@dataclasses.dataclass(frozen=True, slots=True)
class TallyLimits:
    """How much of the trail strangers may fill."""

    period_seconds: float = 60.0
    reasons: int = 32
    """Kinds without a volume, told apart at a time."""
    lines_per_volume: int = 8
    """Lines at once for genuine evidence of a volume that is refused, and for each other event; then one a period."""


@dataclasses.dataclass(slots=True)
class _Count:
    due: float
    """When the next line of this kind may be written."""
    number: int = 0
    since: str = ""
    """Wall time of the first one counted."""


@dataclasses.dataclass(slots=True)
class _Allowance:
    lines: float
    at: float


class Tally:
    """Counts for one broker's trail; safe for threads."""

    def __init__(
        self,
        store: Store,
        *,
        now: Callable[[], datetime.datetime],
        clock: Callable[[], float],
        limits: TallyLimits | None = None,
    ) -> None:
        self._store = store
        self._now = now
        self._clock = clock
        self._limits = limits or TallyLimits()
        self._lock = threading.Lock()
        self._counts: dict[Kind, _Count] = {}
        self._allowances: dict[tuple[str, str | None], _Allowance] = {}
        self._next_due = math.inf

    def unsigned(
        self, event: str, reason: str, *, session: bytes, claimed: str | None, details: dict[str, str]
    ) -> None:
        """An attempt with nothing authentic in it was refused.

        Args:
            event: As in the trail.
            reason: Code of the refusal.
            session: From the cookie.
            claimed: The volume that it claims to be of; only in the line, counted together with others.
            details: For the line.

        Raises:
            BackendError: ``broker-database``; it is counted all the same.
        """
        with self._lock:
            now = self._try_to_settle()
            kind = Kind(event, reason, None)
            if kind not in self._counts and sum(known.volume_id is None for known in self._counts) >= (
                self._limits.reasons
            ):
                kind, details = Kind(event, _OTHER, None), {**details, "code": reason}
            count = self._count(kind, now)
            if count.number or now < count.due:
                self._add(count, now)
                return
            count.due = now + self._limits.period_seconds
            self._line(kind, count, session=session, volume_id=claimed, details=details)

    def signed(self, kind: Kind, *, session: bytes, details: dict[str, str]) -> None:
        """Something genuine of a volume was refused; its own line while the volume's allowance lasts.

        Raises:
            BackendError: ``broker-database``; it is counted all the same.
        """
        with self._lock:
            now = self._try_to_settle()
            count = self._count(kind, now)
            if self._take((kind.event, kind.volume_id), now):
                self._line(kind, count, session=session, volume_id=kind.volume_id, details=details)
            else:
                self._add(count, now)

    def again(self, kind: Kind) -> None:
        """Something that has its line was repeated: count it only."""
        with self._lock:
            now = self._try_to_settle()
            self._add(self._count(kind, now), now)

    def flush(self, *, everything: bool = False) -> None:
        """Write the counts whose time is over, or all of them.

        Raises:
            BackendError: ``broker-database``; what could not be written is still counted.
        """
        with self._lock:
            self._settle(everything=everything)

    def _try_to_settle(self) -> float:
        """Write what is due; where the database fails, the attempt at hand must be counted all the same."""
        with contextlib.suppress(SvsmError):
            self._settle()
        return self._clock()

    def _settle(self, *, everything: bool = False) -> None:
        now = self._clock()
        if now < self._next_due and not everything:
            return
        # What fails below is tried again, but not by each request.
        self._next_due = now + _RETRY_SECONDS
        for kind, count in list(self._counts.items()):
            if count.number and (everything or count.due <= now):
                details = {"count": str(count.number), "since": count.since}
                self._store.record(
                    kind.event, reason=kind.reason, volume_id=kind.volume_id, session=None, details=details
                )
                count.number, count.due = 0, now + self._limits.period_seconds
            elif not count.number and count.due <= now:
                del self._counts[kind]
        full = float(self._limits.lines_per_volume)
        for name in [name for name in self._allowances if self._filled(name, now) >= full]:
            del self._allowances[name]
        self._next_due = min((count.due for count in self._counts.values()), default=math.inf)

    def _count(self, kind: Kind, now: float) -> _Count:
        return self._counts.setdefault(kind, _Count(due=now))

    def _add(self, count: _Count, now: float) -> None:
        if not count.number:
            count.since = self._now().astimezone(datetime.UTC).isoformat(timespec="milliseconds")
            if count.due <= now:
                count.due = now + self._limits.period_seconds
        count.number += 1
        self._next_due = min(self._next_due, count.due)

    def _line(
        self, kind: Kind, count: _Count, *, session: bytes, volume_id: str | None, details: dict[str, str]
    ) -> None:
        try:
            self._store.record(kind.event, reason=kind.reason, volume_id=volume_id, session=session, details=details)
        except SvsmError:
            self._add(count, self._clock())
            raise
        self._next_due = min(self._next_due, count.due)

    def _take(self, name: tuple[str, str | None], now: float) -> bool:
        lines = self._filled(name, now)
        self._allowances[name] = _Allowance(lines - 1 if lines >= 1 else lines, now)
        return lines >= 1

    def _filled(self, name: tuple[str, str | None], now: float) -> float:
        full = float(self._limits.lines_per_volume)
        known = self._allowances.get(name)
        if known is None:
            return full
        return min(full, known.lines + (now - known.at) / self._limits.period_seconds)
