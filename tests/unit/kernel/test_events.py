# SPDX-License-Identifier: MIT OR Apache-2.0
"""The event loop: readiness, timers, and callbacks that change the loop under its feet."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from svsm.kernel.events import READ, WRITE, EventLoop


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


def test_timers_fire_once_in_order_and_not_when_cancelled() -> None:
    clock = Clock()
    loop = EventLoop(clock)
    fired: list[str] = []
    loop.call_later(2, lambda: fired.append("b"))
    loop.call_later(1, lambda: fired.append("a"))
    loop.call_later(1, lambda: fired.append("never")).cancel()
    loop.run_once(0)
    assert fired == []
    clock.seconds = 5
    loop.run_once(0)
    loop.run_once(0)
    assert fired == ["a", "b"]
    loop.close()


def test_a_callback_may_unregister_another_source_of_the_same_round(loop: EventLoop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def ready(index: int) -> None:
        called.append(index)
        other = pairs[1 - index][0]
        loop.unregister(other)
        other.close()

    for index, (left, right) in enumerate(pairs):
        right.send(b"x")
        loop.register(left, READ, lambda _, index=index: ready(index))  # type: ignore[misc]
    loop.run_once(1)
    assert len(called) == 1
    loop.unregister(pairs[called[0]][0])
    for left, right in pairs:
        left.close()
        right.close()


def test_write_interest_and_stop(loop: EventLoop) -> None:
    left, right = socket.socketpair()
    seen: list[int] = []

    def ready(events: int) -> None:
        seen.append(events)
        loop.modify(left, READ)
        loop.call_soon(loop.stop)

    loop.register(left, READ | WRITE, ready)
    loop.run()
    assert seen == [WRITE]
    loop.unregister(left)
    left.close()
    right.close()


def test_deferred_calls_that_defer_more_do_not_starve_sources(loop: EventLoop) -> None:
    left, right = socket.socketpair()
    right.send(b"x")
    seen: list[bytes] = []

    def again() -> None:
        if not seen:
            loop.call_soon(again)

    loop.register(left, READ, lambda _: seen.append(left.recv(1)))
    loop.call_soon(again)
    assert loop.run_until(lambda: bool(seen), timeout_seconds=5)
    loop.unregister(left)
    left.close()
    right.close()


def test_run_until_gives_up(loop: EventLoop) -> None:
    assert not loop.run_until(lambda: False, timeout_seconds=0.01)
