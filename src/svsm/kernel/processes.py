# SPDX-License-Identifier: MIT OR Apache-2.0
"""Processes as the kernel sees them: a syscall socket, a namespace, a handle table.

`Process` reads requests, dispatches them to objects, and sends each answer when its work is complete, in any order.
It never blocks: what cannot be sent waits in a bounded queue, what takes long (a commit, a WAIT) answers later.

A service is untrusted. Whatever it sends that the syscall interface does not allow ends *it*: the socket is closed,
its handles are gone, `on_exit` is called once, and nobody else notices. A reply that is still under way then (a
commit) finds no one and is dropped; the commit itself stands.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Mapping

from svsm.abi import syscall
from svsm.abi.syscall import Call, Event, EventKind, FrameHeader, FrameReader, Reply, Request, Status
from svsm.formats.errors import BackendError, ProtocolError, SvsmError
from svsm.kernel.events import READ, WRITE, EventLoop
from svsm.kernel.objects import (
    ConnectionObject,
    EventQueue,
    FileObject,
    KernelObject,
    QueuedEvent,
    SinkObject,
)

__all__ = ["Process", "ProcessTable"]

_CHUNK_BYTES = 65536
_REQUESTS_PER_TURN = 8
_DONTWAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Process:
    """One running service.

    Args:
        loop: The kernel's.
        name: For logs.
        connection: The kernel's end of the syscall socket; owned.
        namespace: What the service may open, by name.
        on_exit: Called once when it is over, with the reason when it was the service's fault.
    """

    def __init__(
        self,
        loop: EventLoop,
        name: str,
        connection: socket.socket,
        namespace: Mapping[str, KernelObject],
        on_exit: Callable[[Process, SvsmError | None], None],
    ) -> None:
        self.name = name
        self._loop = loop
        self._connection = connection
        self._namespace = dict(namespace)
        self._on_exit = on_exit
        self._reader = FrameReader()
        self._inbox: deque[tuple[FrameHeader, bytes]] = deque()
        self._handles: dict[int, KernelObject] = {}
        self._next_handle = 1
        self._pending: set[int] = set()
        self._outgoing: deque[tuple[bytes, socket.socket | None]] = deque()
        self.alive = True
        connection.setblocking(False)
        loop.register(connection, READ, self._ready)

    @property
    def connections(self) -> int:
        """Clients that the service has not given back."""
        return sum(isinstance(entry, ConnectionObject) for entry in self._handles.values())

    def end(self, reason: SvsmError | None = None) -> None:
        """Take everything away from the service; it finds its socket closed."""
        if not self.alive:
            return
        self.alive = False
        self._loop.unregister(self._connection)
        self._connection.close()
        for _, client in self._outgoing:
            if client is not None:
                client.close()
        self._outgoing.clear()
        self._inbox.clear()
        self._handles.clear()
        self._pending.clear()
        self._on_exit(self, reason)

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._flush()
            if events & READ:
                self._receive()
        except SvsmError as error:
            self.end(error)

    def _receive(self) -> None:
        if self._inbox:
            return  # what came before is served first, in turns
        # Plain recv: descriptors that a service attaches are dropped by the operating system, unseen.
        try:
            chunk = self._connection.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self.end(None)
            return
        self._inbox.extend(self._reader.feed(chunk))
        self._serve_some()

    def _serve_some(self) -> None:
        """A few requests, then it is the others' turn: one chunk can hold thousands."""
        for _ in range(_REQUESTS_PER_TURN):
            if not self._inbox or not self.alive:
                return
            self._request(*self._inbox.popleft())
        if self._inbox:
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        try:
            self._serve_some()
        except SvsmError as error:
            self.end(error)

    def _request(self, header: FrameHeader, body: bytes) -> None:
        request = Request.parse(header, body)
        if request.id in self._pending:
            raise ProtocolError("a syscall id is used twice", code="syscall-id", got=request.id)
        if len(self._pending) + len(self._outgoing) >= syscall.MAX_PENDING:
            raise ProtocolError("too many syscalls are outstanding", code="syscall-pending")
        self._pending.add(request.id)
        _DISPATCH[request.call](self, request)

    def _reply(
        self, request_id: int, status: Status, body: bytes = b"", *, client: socket.socket | None = None
    ) -> None:
        """Answer a request; `client` goes along and is closed here after."""
        if not self.alive or request_id not in self._pending:
            if client is not None:
                client.close()
            return
        self._pending.remove(request_id)
        self._outgoing.append((Reply(request_id, status, body, int(client is not None)).pack(), client))
        if len(self._outgoing) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._outgoing and self.alive:
            frame, client = self._outgoing[0]
            try:
                if client is None:
                    sent = self._connection.send(frame, _DONTWAIT)
                else:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, client.fileno().to_bytes(4, "little"))]
                    sent = self._connection.sendmsg([frame], rights, _DONTWAIT)
                    client.close()
            except BlockingIOError:
                break
            except OSError:
                self._loop.call_soon(self.end)
                return
            if sent < len(frame):
                self._outgoing[0] = (frame[sent:], None)
            else:
                self._outgoing.popleft()
        if self.alive:
            self._loop.modify(self._connection, READ | WRITE if self._outgoing else READ)

    # --- the calls ---

    def _new_handle(self, entry: KernelObject) -> int | None:
        if len(self._handles) >= syscall.MAX_HANDLES:
            return None
        while self._next_handle in self._handles:
            self._next_handle = self._next_handle % 0xFFFFFFFF + 1
        handle = self._next_handle
        self._next_handle = handle % 0xFFFFFFFF + 1
        self._handles[handle] = entry
        return handle

    def _open(self, request: Request) -> None:
        entry = self._namespace.get(syscall.decode_open(request.body))
        if entry is None:
            return self._reply(request.id, Status.NOT_FOUND)
        handle = self._new_handle(entry)
        if handle is None:
            return self._reply(request.id, Status.LIMIT)
        return self._reply(request.id, Status.OK, syscall.encode_handle(handle))

    def _close(self, request: Request) -> None:
        known = self._handles.pop(syscall.decode_handle(request.body), None) is not None
        self._reply(request.id, Status.OK if known else Status.BAD_HANDLE)

    def _read(self, request: Request) -> None:
        handle, offset, length = syscall.decode_read(request.body)
        entry = self._handles.get(handle)
        if not isinstance(entry, FileObject):
            return self._reply(request.id, Status.BAD_HANDLE)
        try:
            contents = entry.store.read(entry.inode)
        except SvsmError:
            return self._reply(request.id, Status.FAILED)
        if contents is None:
            return self._reply(request.id, Status.NOT_FOUND)
        wanted = min(length, syscall.MAX_FILE_BYTES)
        return self._reply(request.id, Status.OK, contents[offset : offset + wanted])

    def _replace(self, request: Request) -> None:
        changes: dict[int, bytes] = {}
        store = None
        for handle, data in syscall.decode_replace(request.body).items():
            entry = self._handles.get(handle)
            if not isinstance(entry, FileObject) or entry.inode in changes or store not in (None, entry.store):
                return self._reply(request.id, Status.BAD_HANDLE)
            if len(data) > entry.max_bytes:
                return self._reply(request.id, Status.TOO_LARGE)
            store = entry.store
            changes[entry.inode] = data

        def done(error: SvsmError | None) -> None:
            self._reply(request.id, Status.OK if error is None else Status.FAILED)

        if store is not None:
            try:
                store.replace_many(changes, done)
            except SvsmError as error:
                done(error)
        return None

    def _wait(self, request: Request) -> None:
        entry = self._handles.get(syscall.decode_handle(request.body))
        if not isinstance(entry, EventQueue):
            return self._reply(request.id, Status.BAD_HANDLE)
        if not entry.wait(lambda queued: self._deliver(request.id, queued)):
            return self._reply(request.id, Status.BUSY)
        return None

    def _deliver(self, request_id: int, queued: QueuedEvent) -> None:
        event = queued.event
        if event.kind is EventKind.CONNECTION:
            handle = self._new_handle(ConnectionObject())
            if handle is None:
                if queued.connection is not None:
                    queued.connection.close()
                return self._reply(request_id, Status.LIMIT)
            event = Event(event.kind, endpoint=event.endpoint, transport=event.transport, handle=handle)
        return self._reply(request_id, Status.OK, event.pack(), client=queued.connection)

    def _answer(self, request: Request) -> None:
        handle, command_id, response = syscall.decode_answer(request.body)
        entry = self._handles.get(handle)
        if not isinstance(entry, EventQueue):
            return self._reply(request.id, Status.BAD_HANDLE)
        self._reply(request.id, Status.OK)
        return entry.on_answer(command_id, response)

    def _write(self, request: Request) -> None:
        handle, data = syscall.decode_write(request.body)
        entry = self._handles.get(handle)
        if not isinstance(entry, SinkObject):
            return self._reply(request.id, Status.BAD_HANDLE)
        self._reply(request.id, Status.OK)
        return entry.sink(data)


_DISPATCH: dict[Call, Callable[[Process, Request], None]] = {
    Call.OPEN: Process._open,
    Call.CLOSE: Process._close,
    Call.READ: Process._read,
    Call.REPLACE: Process._replace,
    Call.WAIT: Process._wait,
    Call.ANSWER: Process._answer,
    Call.WRITE: Process._write,
}


class ProcessTable:
    """Every service that runs, and how one is started.

    Args:
        loop: The kernel's.
        spawn: ``Platform.spawn`` with the archive bound: (service, parameters) → the kernel's end of its socket.
        kill: ``Platform.end_service``: called once for each process when it is over, so that it really is.
    """

    MAX_PROCESSES = 32

    def __init__(
        self,
        loop: EventLoop,
        spawn: Callable[[str, Mapping[str, str]], socket.socket],
        kill: Callable[[socket.socket], None],
    ) -> None:
        self.loop = loop
        self._spawn = spawn
        self._kill = kill
        self._processes: set[Process] = set()

    def __len__(self) -> int:
        return len(self._processes)

    def start(
        self,
        service: str,
        parameters: Mapping[str, str],
        namespace: Mapping[str, KernelObject],
        on_exit: Callable[[Process, SvsmError | None], None],
    ) -> Process:
        """Start a service.

        Raises:
            BackendError: ``process-limit``, or what the platform raises when it cannot.
        """
        if len(self._processes) >= self.MAX_PROCESSES:
            raise BackendError("too many processes", code="process-limit")

        connection = self._spawn(service, parameters)

        def ended(process: Process, reason: SvsmError | None) -> None:
            self._processes.discard(process)
            self._kill(connection)
            on_exit(process, reason)

        process = Process(self.loop, service, connection, namespace, ended)
        self._processes.add(process)
        return process

    def end_all(self) -> None:
        """Take every service's socket away."""
        for process in list(self._processes):
            process.end(None)
