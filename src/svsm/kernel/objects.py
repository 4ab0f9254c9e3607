# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a service's handles stand for, and what of it each process may open.

* `FileObject`: one file of the volume, by inode. Reading is immediate; replacing goes through `FileStore`, which
  calls back when the volume's commit is durable (later: when the broker's ledger has moved).
* `EventQueue`: what happens to a service: connections of clients, commands of its guest, reset, stop. The service
  has at most one WAIT on it; events that nobody waits for queue up, bounded.
* `SinkObject`: takes short writes: a log, an announcement.
* `ConnectionObject`: a client that the service has; the handle exists so that the kernel can count them.

A process names objects by short strings of its own namespace; it cannot name anything that it was not given.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from svsm.abi.syscall import Event
from svsm.formats.errors import SvsmError

__all__ = [
    "MAX_QUEUED_EVENTS",
    "ConnectionObject",
    "EventQueue",
    "FileObject",
    "FileStore",
    "KernelObject",
    "QueuedEvent",
    "SinkObject",
]

MAX_QUEUED_EVENTS = 128
"""More than 32 clients, or 32 commands with a reset before each, and a stop."""


class FileStore(Protocol):
    """The files of the volume, by inode number."""

    def read(self, inode: int) -> bytes | None:
        """The contents, None when there is no such file. Raises `SvsmError`."""

    def replace_many(self, changes: Mapping[int, bytes], done: Callable[[SvsmError | None], None]) -> None:
        """Replace whole files, all or none.

        `done(None)` is called exactly once when they are durable, `done(error)` when it failed (and then whether
        they were replaced is unknown); perhaps before this returns.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class FileObject:
    """One file of the volume."""

    store: FileStore
    inode: int
    max_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class SinkObject:
    """Takes short writes."""

    sink: Callable[[bytes], None]


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectionObject:
    """A client that was passed to the service."""


@dataclasses.dataclass(frozen=True, slots=True)
class QueuedEvent:
    """An event, and the client's socket that goes with a CONNECTION."""

    event: Event
    connection: socket.socket | None = None


class EventQueue:
    """What happens to a service, in order.

    Attributes:
        waiter: Takes the next event; set while the service waits, cleared by the delivery.
        on_answer: Takes (command id, response) when the service answers a COMMAND.
    """

    def __init__(self, on_answer: Callable[[int, bytes], None]) -> None:
        self._queue: deque[QueuedEvent] = deque()
        self.waiter: Callable[[QueuedEvent], None] | None = None
        self.on_answer = on_answer

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, entry: QueuedEvent) -> bool:
        """Deliver or queue; False when the queue is full: the event is the caller's again."""
        if self.waiter is not None:
            waiter, self.waiter = self.waiter, None
            waiter(entry)
            return True
        if len(self._queue) >= MAX_QUEUED_EVENTS:
            return False
        self._queue.append(entry)
        return True

    def wait(self, waiter: Callable[[QueuedEvent], None]) -> bool:
        """Have the next event delivered to `waiter`; False when somebody waits already."""
        if self.waiter is not None:
            return False
        if self._queue:
            waiter(self._queue.popleft())
        else:
            self.waiter = waiter
        return True

    def drain(self) -> list[QueuedEvent]:
        """Take everything out, when the service is gone."""
        entries = list(self._queue)
        self._queue.clear()
        self.waiter = None
        return entries


KernelObject = FileObject | SinkObject | ConnectionObject | EventQueue
