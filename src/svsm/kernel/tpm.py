# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's side of one TPM: its process, its clients or its guest's commands, its death and replacement.

A TPM whose process died is started again, but in a mode in which it answers TPM_RC_FAILURE to everything: PCRs must
not start anew under a running guest. That ends with the machine, which is when the guest of the SVSM front resets, or
with the socket front's CMD_INIT. Only a process that died before it ever served may be replaced by one that starts
normally. A service that keeps dying is started ever more slowly.

Until `release` nothing reaches the TPM: on a volume's first boot no answer may leave before the broker has
acknowledged the format. What comes before waits, bounded.

Clients' descriptors come from the host. `connect` checks each (a connected stream socket, of the family that the
endpoint is for), caps their number and passes it on unread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Literal

from svsm.abi.descriptors import client_socket
from svsm.abi.syscall import MAX_COMMAND_BYTES, MAX_FILE_BYTES, Endpoint, Event, EventKind, Transport
from svsm.formats.errors import BackendError, PolicyError, ProtocolError, StateError, SvsmError
from svsm.formats.tpm import EK_NAME_BYTES, MIN_COMMAND_BYTES, RC_COMMAND_SIZE, failure_response
from svsm.kernel.events import EventLoop, Timer
from svsm.kernel.objects import (
    MAX_QUEUED_EVENTS,
    EventQueue,
    FileObject,
    FileStore,
    KernelObject,
    QueuedEvent,
    SinkObject,
)
from svsm.kernel.processes import Process, ProcessTable

__all__ = ["MAX_TPM_CLIENTS", "TpmService", "tpm_state_inode"]

MAX_TPM_CLIENTS = 32
_MAX_WAITING = 32
_COMMAND_DEADLINE_SECONDS = 120.0
_STOP_DEADLINE_SECONDS = 5.0
_START_DEADLINE_SECONDS = 30.0
_MAX_LOG_LINES = 32
_FIRST_DELAY_SECONDS = 0.05
_MAX_DELAY_SECONDS = 10.0
_HEALTHY_SECONDS = 60.0
_NAMESPACE = 1
_INODES_PER_TPM = 16


def tpm_state_inode(index: int) -> int:
    """The inode of the state file of the TPM that the launch configuration lists at `index`."""
    return (_NAMESPACE << 32) + _INODES_PER_TPM * index


class TpmService:
    """One TPM.

    Args:
        processes: The process table.
        name: Of the launch configuration, for logs.
        front: ``socket`` or ``svsm``.
        store: The volume's files.
        inode: Of this TPM's state file.
        log: Takes lines about this TPM, never secret.
        on_ready: Called each time a process is ready, with the EK's name (None: not known).
        parameters: More parameters for the service.
    """

    def __init__(
        self,
        processes: ProcessTable,
        *,
        name: str,
        front: Literal["socket", "svsm"],
        store: FileStore,
        inode: int,
        log: Callable[[str], None],
        on_ready: Callable[[bytes | None], None],
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.front = front
        self.ek_name: bytes | None = None
        self.restarts = 0
        self._processes = processes
        self._loop: EventLoop = processes.loop
        self._state = FileObject(store, inode, MAX_FILE_BYTES)
        self._log = log
        self._on_ready = on_ready
        self._parameters = dict(parameters or {})
        self._process: Process | None = None
        self._events = EventQueue(self._answered)
        self._served = False
        self._ready = False
        self._released = False
        self._stopping: Callable[[], None] | None = None
        self._stop_timer: Timer | None = None
        self._start_timer: Timer | None = None
        self._log_lines_left = 0
        self._waiting: list[QueuedEvent] = []
        self._commands: dict[int, tuple[Callable[[bytes], None], Timer]] = {}
        self._next_command = 1
        self._delay_seconds = _FIRST_DELAY_SECONDS
        self._started_at = 0.0

    @property
    def ready(self) -> bool:
        """Whether a process is there and has said that it can serve."""
        return self._ready

    @property
    def running(self) -> bool:
        """Whether a process is there."""
        return self._process is not None

    def start(self) -> None:
        """Start the process.

        Raises:
            StateError: ``tpm-started``.
            BackendError: What the platform says.
        """
        if self._process is not None:
            raise StateError("this TPM is running", code="tpm-started")
        self._events = EventQueue(self._answered)
        namespace: dict[str, KernelObject] = {
            "state": self._state,
            "events": self._events,
            "log": SinkObject(self._log_line),
            "announce": SinkObject(self._announced),
        }
        parameters = {**self._parameters, "front": self.front, "start": "failed" if self._served else "fresh"}
        self._started_at = self._loop.now()
        self._log_lines_left = _MAX_LOG_LINES
        self._start_timer = self._loop.call_later(_START_DEADLINE_SECONDS, self._start_overdue)
        try:
            self._process = self._processes.start("vtpm", parameters, namespace, self._exited)
        except SvsmError:
            self._start_timer.cancel()
            raise

    def release(self) -> None:
        """From now on answers may leave: deliver what has waited and what comes."""
        self._released = True
        self._deliver_waiting()

    def connect(self, descriptor: int, endpoint: Endpoint, transport: Transport) -> None:
        """A client of the socket front, from the host; the descriptor is owned from now on.

        Raises:
            PolicyError: ``client-descriptor``, ``client-limit``, ``client-front``; the descriptor is closed then.
        """
        client = client_socket(descriptor)
        if (client.family == socket.AF_UNIX) != (transport is Transport.UNIX):
            client.close()
            raise PolicyError("a client is connected by another transport than said", code="client-descriptor")
        if self.front != "socket":
            client.close()
            raise PolicyError("this TPM has no socket front", code="client-front")
        in_service = self._process.connections if self._process is not None else 0
        if in_service + len(self._events) + len(self._waiting) >= MAX_TPM_CLIENTS:
            client.close()
            raise PolicyError("too many clients", code="client-limit")
        self._push(QueuedEvent(Event(EventKind.CONNECTION, endpoint=endpoint, transport=transport), client))

    def execute(self, command: bytes, callback: Callable[[bytes], None], *, locality: int = 0) -> None:
        """A command of the guest (front ``svsm``); `callback` gets the response, once, after this has returned.

        Raises:
            StateError: ``tpm-front`` when this TPM belongs to the socket, ``tpm-busy`` when too many wait.
            ProtocolError: ``tpm-command-size`` when it cannot be a TPM command.
        """
        if self.front != "svsm":
            raise StateError("this TPM is behind a socket", code="tpm-front")
        if not MIN_COMMAND_BYTES <= len(command) <= MAX_COMMAND_BYTES:
            raise ProtocolError("a TPM command has an impossible size", code="tpm-command-size", got=len(command))
        if len(self._commands) >= _MAX_WAITING:
            raise StateError("too many TPM commands wait", code="tpm-busy")
        command_id = self._next_command
        self._next_command = command_id % 0xFFFFFFFF + 1
        timer = self._loop.call_later(_COMMAND_DEADLINE_SECONDS, self._overdue)
        self._commands[command_id] = (callback, timer)
        self._push(
            QueuedEvent(Event(EventKind.COMMAND, command_id=command_id, locality=locality, command=bytes(command)))
        )

    def powered_on(self) -> bool:
        """Whether commands are taken: a TPM in failure mode is on, and answers that itself."""
        return self.front == "svsm" and self._stopping is None

    def submit(self, command: bytes, done: Callable[[bytes | None], None]) -> None:
        """`execute` for the SVSM protocol: never raises; `done` gets None when there will be no response.

        A command that is shorter than a header gets the TPM's own answer to that, TPM_RC_COMMAND_SIZE.
        """
        if len(command) < MIN_COMMAND_BYTES:
            self._loop.call_soon(lambda: done(failure_response(RC_COMMAND_SIZE)))
            return
        try:
            self.execute(command, done)
        except SvsmError:
            self._loop.call_soon(lambda: done(None))

    def stop(self, done: Callable[[], None]) -> None:
        """End in order (TPM2_Shutdown, then the process); `done` is called once, at the latest after 5 s."""
        self._stopping = done
        if self._process is None:
            self._finished()
            return
        self._stop_timer = self._loop.call_later(_STOP_DEADLINE_SECONDS, self._stop_overdue)
        if not self._ready or not self._events.push(QueuedEvent(Event(EventKind.STOP))):
            self._process.end(None)

    # --- inside ---

    def _push(self, entry: QueuedEvent) -> None:
        """Hand over what is for the service, or keep it until the service is ready and may answer."""
        if self._ready and self._released:
            if not self._events.push(entry):
                self._refuse(entry)
            return
        if len(self._waiting) < MAX_QUEUED_EVENTS:
            self._waiting.append(entry)
        else:
            self._refuse(entry)

    def _deliver_waiting(self) -> None:
        if self._ready and self._released:
            waiting, self._waiting = self._waiting, []
            for entry in waiting:
                self._push(entry)

    def _refuse(self, entry: QueuedEvent) -> None:
        if entry.connection is not None:
            entry.connection.close()
        if entry.event.kind is EventKind.COMMAND:
            self._complete(entry.event.command_id, failure_response())

    def _announced(self, data: bytes) -> None:
        if self._ready or len(data) not in (0, EK_NAME_BYTES):
            raise ProtocolError("the TPM service announces what it should not", code="tpm-announce", got=len(data))
        self._ready = True
        if self._start_timer is not None:
            self._start_timer.cancel()
        self.ek_name = bytes(data) or None
        self._served = self._served or self._released
        # Soon, not now: what the callbacks of others raise is not this service's fault.
        self._loop.call_soon(lambda: self._on_ready(self.ek_name))
        self._deliver_waiting()

    def _answered(self, command_id: int, response: bytes) -> None:
        if command_id not in self._commands or len(response) < MIN_COMMAND_BYTES:
            raise ProtocolError("the TPM service answers what was not asked", code="tpm-answer", got=command_id)
        self._complete(command_id, response)

    def _complete(self, command_id: int, response: bytes) -> None:
        entry = self._commands.pop(command_id, None)
        if entry is not None:
            callback, timer = entry
            timer.cancel()
            self._loop.call_soon(lambda: callback(response))

    def _log_line(self, data: bytes) -> None:
        if self._log_lines_left == 0:  # a service that floods the log would use up the console, and the host's patience
            return
        self._log_lines_left -= 1
        text = data.decode("utf-8", "replace")
        self._log("".join(c if c.isprintable() else "?" for c in text))

    def _overdue(self) -> None:
        if self._process is not None:
            self._process.end(BackendError("the TPM service did not answer in time", code="tpm-overdue"))

    def _start_overdue(self) -> None:
        if self._process is not None and not self._ready:
            self._process.end(BackendError("the TPM service did not start in time", code="tpm-start-overdue"))

    def _stop_overdue(self) -> None:
        if self._process is not None:
            self._process.end(None)

    def _exited(self, process: Process, reason: SvsmError | None) -> None:
        """The process is gone: fail what it owed, and start another, which answers failure."""
        del process
        self._served = self._served or (self._ready and self._released)
        self._process = None
        self._ready = False
        if self._start_timer is not None:
            self._start_timer.cancel()
        for entry in self._events.drain():
            self._refuse(entry)
        queued = {entry.event.command_id for entry in self._waiting}
        for command_id in [known for known in self._commands if known not in queued]:
            self._complete(command_id, failure_response())
        if self._stopping is not None:
            self._finished()
            return
        self._log(f"the process of TPM {self.name} ended ({reason.code if reason else 'no reason given'})")
        if self._loop.now() - self._started_at > _HEALTHY_SECONDS:
            self._delay_seconds = _FIRST_DELAY_SECONDS
        self._loop.call_later(self._delay_seconds, self._restart)
        self._delay_seconds = min(2 * self._delay_seconds, _MAX_DELAY_SECONDS)

    def _restart(self) -> None:
        if self._process is not None or self._stopping is not None:
            return
        self.restarts += 1
        try:
            self.start()
        except SvsmError as error:
            self._log(f"TPM {self.name} cannot be started again ({error.code})")
            self._loop.call_later(_MAX_DELAY_SECONDS, self._restart)

    def _finished(self) -> None:
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        done, self._stopping = self._stopping, _nothing
        if done is not None:
            done()
        for entry in self._waiting:
            self._refuse(entry)
        self._waiting = []


def _nothing() -> None:
    return
