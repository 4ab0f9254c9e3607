# SPDX-License-Identifier: MIT OR Apache-2.0
"""A small HTTP/1.1 server on h11: bounded in connections, headers, bodies and time, and nothing more.

One thread per connection. Every request has one deadline from its first byte to the last of its body, so a peer that
sends a byte at a time gains nothing; an idle connection is closed; beyond the connection limit a new one is told to
come back later. The application is a function from `Request` to `Response`; whatever it raises becomes a bare 500.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import threading
import time
from collections.abc import Callable

import h11

__all__ = ["HttpLimits", "HttpServer", "Request", "Response"]


_HEAD_READ_BYTES = 4096
_BODY_READ_BYTES = 64 << 10
_DRAIN_SECONDS = 0.5
_DRAIN_READS = 32
_TICK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request, completely read."""

    method: str
    target: str
    """As sent; a query string is part of it."""
    cookie: str
    """The Cookie header, "" when there is none or more than one."""
    body: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """One answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one server."""

    connections: int = 64
    header_bytes: int = 16 << 10
    """Request line and headers together."""
    body_bytes: int = 1 << 20
    requests_per_connection: int = 1000
    request_seconds: float = 10.0
    """From a request's first byte to its last, and again for its answer."""
    idle_seconds: float = 60.0
    """Between requests."""


class _Ended(Exception):
    """The connection is over; nothing more to say on it."""


class HttpServer:
    """Serves `app` on a listening socket, which it owns.

    Args:
        app: Answers requests, in many threads.
        listener: Listening.
        limits: Bounds.
        tick: Called every second or so while `run` runs, for what must happen without requests; must not raise.
    """

    def __init__(
        self,
        app: Callable[[Request], Response],
        listener: socket.socket,
        *,
        limits: HttpLimits | None = None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self._app = app
        self._tick = tick
        self._listener = listener
        self._limits = limits or HttpLimits()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._places = threading.BoundedSemaphore(self._limits.connections)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """``http://host:port`` of the listening socket."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Serve in a thread."""
        self._thread = threading.Thread(target=self.run, name="broker-http", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Serve until `stop`."""
        self._listener.setblocking(False)
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        try:
            next_tick = time.monotonic() + _TICK_SECONDS
            while not self._stopping:
                for descriptor, _ in poller.poll(_TICK_SECONDS * 1000):
                    if descriptor == self._listener.fileno():
                        self._accept()
                # By the clock and not by silence: a flood must not keep it from happening.
                if self._tick is not None and time.monotonic() >= next_tick:
                    self._tick()
                    next_tick = time.monotonic() + _TICK_SECONDS
        finally:
            self._listener.close()

    def interrupt(self) -> None:
        """Make `run` return soon; safe in a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def stop(self) -> None:
        """End `run`, close every connection, and wait for the thread if there is one."""
        self.interrupt()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # Gone again, or out of descriptors: a pause keeps the loop from spinning on the latter.
            time.sleep(0.01)
            return
        if not self._places.acquire(blocking=False):
            with contextlib.suppress(OSError), connection:
                connection.settimeout(0.1)
                connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
            return
        with self._lock:
            self._open.add(connection)
        try:
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()
        except RuntimeError:
            # No thread to be had: this peer comes back later, the server stays.
            self._forget(connection)

    def _converse(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError, _Ended, h11.ProtocolError):
                _Conversation(connection, self._app, self._limits).run()
        finally:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()
        self._places.release()


class _Conversation:
    """One connection."""

    def __init__(self, connection: socket.socket, app: Callable[[Request], Response], limits: HttpLimits) -> None:
        self._socket = connection
        self._app = app
        self._limits = limits
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._deadline = 0.0

    def run(self) -> None:
        for _ in range(self._limits.requests_per_connection):
            try:
                request = self._read_request()
            except h11.RemoteProtocolError as error:
                self._refuse(error.error_status_hint)
                return
            if request is None:
                return
            self._write(self._answer(request))
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    def _answer(self, request: Request) -> Response:
        try:
            return self._app(request)
        except Exception:
            # The application's own errors are answers already; this is a defect, and the peer learns nothing of it.
            return Response(500, (), b"")

    def _read_request(self) -> Request | None:
        head: h11.Request | None = None
        body = bytearray()
        self._deadline = time.monotonic() + self._limits.idle_seconds
        while True:
            event = self._next_event(in_body=head is not None)
            if isinstance(event, h11.Request):
                head = event
                if self._http.they_are_waiting_for_100_continue:
                    self._send(h11.InformationalResponse(status_code=100, headers=[]))
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._limits.body_bytes:
                    self._refuse(413)
                    raise _Ended
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return _request(head, bytes(body))
            else:
                return None

    def _next_event(self, *, in_body: bool) -> h11.Event | type[h11.PAUSED] | type[h11.NEED_DATA]:
        started = in_body
        while (event := self._http.next_event()) is h11.NEED_DATA:
            left = self._deadline - time.monotonic()
            if left <= 0:
                if started:
                    self._refuse(408)
                raise _Ended
            self._socket.settimeout(left)
            try:
                # Small bites of a head, because h11 bounds only what is incomplete.
                data = self._socket.recv(_BODY_READ_BYTES if in_body else _HEAD_READ_BYTES)
            except TimeoutError:
                continue
            quiet = self._http.trailing_data == (b"", False)
            self._http.receive_data(data)
            if quiet and not started:
                # The first byte of a request starts its clock.
                self._deadline = min(self._deadline, time.monotonic() + self._limits.request_seconds)
                started = True
        return event

    def _refuse(self, status: int) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        self._write(Response(status, (("Connection", "close"),), b""))
        # Closing with bytes unread resets the connection and can take the answer along: take what is on its way.
        self._socket.shutdown(socket.SHUT_WR)
        self._socket.settimeout(_DRAIN_SECONDS)
        for _ in range(_DRAIN_READS):
            if not self._socket.recv(64 << 10):
                break

    def _write(self, response: Response) -> None:
        headers = [*response.headers, ("Content-Length", str(len(response.body)))]
        self._deadline = time.monotonic() + self._limits.request_seconds
        self._send(h11.Response(status_code=response.status, headers=headers, reason=b""))
        if response.body:
            self._send(h11.Data(data=response.body))
        self._send(h11.EndOfMessage())

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._socket.settimeout(max(0.001, self._deadline - time.monotonic()))
            self._socket.sendall(data)


def _request(head: h11.Request, body: bytes) -> Request:
    cookies = [value for name, value in head.headers if name == b"cookie"]
    return Request(
        method=head.method.decode("ascii"),
        target=head.target.decode("latin-1"),
        cookie=cookies[0].decode("latin-1") if len(cookies) == 1 else "",
        body=body,
    )
