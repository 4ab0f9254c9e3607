# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's event loop: one thread, readiness callbacks, timers.

The kernel never waits for one service, one client or the broker while others have work: whoever would wait registers
a callback instead. Callbacks must not block. An exception in a callback ends `run`: who serves an untrusted peer
catches that peer's errors itself, so what gets here is a fault of the kernel, and the kernel stops.

Time is an argument (`clock`), monotonic and without meaning outside: nothing in the kernel trusts wall time.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["READ", "WRITE", "EventLoop", "Timer"]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

_MAX_SOON_PER_ROUND = 64


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class Timer:
    """A callback at a time; `cancel` takes it back."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call. Harmless when it has been called."""
        self._callback = None

    def fire(self) -> None:
        """Call, once."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    @property
    def live(self) -> bool:
        """Whether it is still to be called."""
        return self._callback is not None


class EventLoop:
    """Readiness, timers and deferred calls.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._stopped = False

    def now(self) -> float:
        """The clock."""
        return self._clock()

    def register(self, source: _HasFileno, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(ready events)` whenever `source` is ready for one of `events` (READ, WRITE)."""
        self._selector.register(source, events, callback)

    def modify(self, source: _HasFileno, events: int) -> None:
        """Wait for other events of a registered source."""
        key = self._selector.get_key(source)
        if key.events != events:
            self._selector.modify(source, events, key.data)

    def unregister(self, source: _HasFileno) -> None:
        """Forget a source; before it is closed."""
        self._selector.unregister(source)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once, after `seconds`."""
        timer = Timer(self._clock() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call once, in this round or the next, after the caller has returned."""
        self._soon.append(callback)

    def stop(self) -> None:
        """Make `run` return after the current round."""
        self._stopped = True

    def run(self) -> None:
        """Serve until `stop`."""
        self._stopped = False
        while not self._stopped:
            self.run_once(None)

    def run_until(self, done: Callable[[], bool], *, timeout_seconds: float) -> bool:
        """Serve until `done()` or the time is over; returns whether it is done."""
        deadline = self._clock() + timeout_seconds
        while not done():
            left = deadline - self._clock()
            if left <= 0:
                return False
            self.run_once(left)
        return True

    def run_once(self, timeout_seconds: float | None) -> None:
        """One round: wait for something at most `timeout_seconds` (None: without end), then serve it."""
        for key, ready in self._selector.select(self._wait_seconds(timeout_seconds)):
            # Someone earlier in this round may have unregistered it, or put another source in its place.
            try:
                current = self._selector.get_key(key.fileobj)
            except (KeyError, ValueError):
                continue
            if current.data is key.data and ready & current.events:
                key.data(ready)
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()
        for _ in range(min(len(self._soon), _MAX_SOON_PER_ROUND)):
            self._soon.popleft()()

    def _wait_seconds(self, limit: float | None) -> float | None:
        if self._soon or self._stopped:
            return 0
        while self._timers and not self._timers[0][2].live:
            heapq.heappop(self._timers)
        if not self._timers:
            return limit
        until_timer = max(0.0, self._timers[0][0] - self._clock())
        return until_timer if limit is None else min(limit, until_timer)

    def close(self) -> None:
        """Release the selector. Sources stay open: they are their owners'."""
        self._selector.close()
