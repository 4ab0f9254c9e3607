# SPDX-License-Identifier: MIT OR Apache-2.0
"""The broker over real sockets: paths and statuses, and peers that are broken, slow, huge or many."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.broker.app import BrokerApp, serve
from svsm.broker.http import HttpLimits, HttpServer, Request, Response
from svsm.formats import kbs
from svsm.formats.errors import ProtocolError
from tests.key_support import Desk

LIMITS = HttpLimits(connections=4, header_bytes=4096, body_bytes=1 << 20, request_seconds=0.4, idle_seconds=0.8)


class Served:
    """A server in a thread."""

    def __init__(self, app: BrokerApp, limits: HttpLimits = LIMITS) -> None:
        self.server = HttpServer(app, socket.create_server(("127.0.0.1", 0)), limits=limits)
        self.server.start()
        self.port = int(self.server.url.rpartition(":")[2])

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        return connection

    def raw(self, data: bytes) -> bytes:
        """Send bytes, close our side, read everything."""
        with self.connect() as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            return read_all(connection)

    def request(self, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[str, str]]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        client.request(method, target, body=body or None, headers=headers)
        answer = client.getresponse()
        found = answer.status, answer.read(), dict(answer.getheaders())
        client.close()
        return found


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except OSError:
        pass
    return data


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "broker")


@pytest.fixture
def served(desk: Desk) -> Iterator[Served]:
    found = Served(BrokerApp(desk.broker))
    yield found
    found.server.stop()
    desk.broker.close()


def test_auth_over_http(served: Served) -> None:
    status, body, headers = served.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())
    assert status == 200
    assert len(kbs.AuthAnswer.parse(body).nonce) == 32
    assert kbs.parse_cookie_header(headers["Set-Cookie"].split(";")[0]) is not None


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/kbs/v0/auth", 405),
        ("POST", "/kbs/v0/auth?x=1", 404),
        ("POST", "/kbs/v0/auth/", 404),
        ("DELETE", "/kbs/v0/resource/default/sample/test", 405),
        ("POST", "/kbs/v0/attest", 401),
        ("POST", "/svsm/v0/channel", 401),
        ("GET", "/kbs/v0/resource/default/sample/test", 401),
        ("GET", "/kbs/v0/resource/../../etc/passwd", 401),
        ("GET", "/kbs/v0/resource/%2e%2e", 401),
    ],
)
def test_paths_and_methods(served: Served, method: str, target: str, status: int) -> None:
    found, body, headers = served.request(method, target)
    assert found == status
    error = json.loads(body)
    assert error["type"].startswith(kbs.ERROR_TYPE_PREFIX)
    assert kbs.ErrorBody.code_of(body)
    assert (status == 405) == ("Allow" in headers)


def test_other_resources_do_not_exist_for_an_attested_session(served: Served, desk: Desk) -> None:
    _, relay = desk.attest()
    for path in ("default/sample/other", "other/sample/test", "a/../b", "default/sample"):
        status, body, _ = served.request("GET", kbs.RESOURCE_PREFIX + path, Cookie=relay.cookie)
        assert (status, kbs.ErrorBody.code_of(body)) == (404, "broker-path")
    assert served.request("GET", kbs.DEFAULT_RESOURCE_PATH, Cookie=relay.cookie)[0] == 200


@pytest.mark.parametrize(
    "cookie",
    ["", "x", "kbs-session-id=", "kbs-session-id=zz", "kbs-session-id=" + "a" * 31, "kbs-session-id=" + "A" * 32],
)
def test_cookies_that_name_no_session(served: Served, cookie: str) -> None:
    assert served.request("GET", kbs.DEFAULT_RESOURCE_PATH, Cookie=cookie)[0] == 401


def test_two_cookie_headers_name_no_session(served: Served, desk: Desk) -> None:
    _, relay = desk.attest()
    line = f"Cookie: {relay.cookie}\r\n"
    head = f"GET {kbs.DEFAULT_RESOURCE_PATH} HTTP/1.1\r\nHost: x\r\n"
    assert b" 200 " in served.raw(f"{head}{line}\r\n".encode())[:20]
    assert b" 401 " in served.raw(f"{head}{line}{line}\r\n".encode())[:20]


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"", (b"",)),
        (b"\x00\x01\x02\x03\r\n\r\n", (b"400",)),
        (b"GET / HTTP/9\r\n\r\n", (b"400", b"505")),
        (b"GET / HTTP/1.1\r\n\r\n", (b"400",)),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", (b"400",)),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", (b"400",)),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", (b"501", b"400")),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 8192 + b"\r\n\r\n", (b"431", b"400")),
        (b"A" * 100_000, (b"431", b"400")),
        (b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nshort", (b"400", b"")),
        (b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", (b"400",)),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), (b"400", b"")),
    ],
)
def test_broken_requests(served: Served, data: bytes, statuses: tuple[bytes, ...]) -> None:
    answer = served.raw(data)
    assert answer[9:12] in statuses
    assert served.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_over_the_limit(served: Served, chunked: bool) -> None:
    head = b"POST /kbs/v0/attest HTTP/1.1\r\nHost: x\r\n"
    size = (1 << 20) + 70_000
    if chunked:
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + bytes(0x10000) + b"\r\n") * 18
    else:
        data = head + b"Content-Length: %d\r\n\r\n" % size + bytes(size)
    assert served.raw(data)[9:12] == b"413"


def test_a_request_that_drips_is_cut_off(served: Served) -> None:
    with served.connect() as connection:
        started = time.monotonic()
        connection.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        answer = b""
        connection.settimeout(0.05)
        while time.monotonic() - started < 3:
            try:
                connection.sendall(b"x")
                piece = connection.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
            answer += piece
            if not piece:
                break
        assert time.monotonic() - started < 2
        assert answer[9:12] in (b"408", b"")


def test_an_idle_connection_is_closed(served: Served) -> None:
    with served.connect() as connection:
        started = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - started < 3


def test_too_many_connections_are_told_to_come_back(served: Served) -> None:
    held = [served.connect() for _ in range(LIMITS.connections)]  # accepted in this order, before the next one
    with served.connect() as one_more:
        assert b" 503 " in read_all(one_more)[:20]
    for connection in held:
        connection.close()
    body = kbs.AuthRequest().pack()
    request = b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    deadline = time.monotonic() + 10  # a place is free again when its thread has seen the end
    while (status := served.raw(request)[9:12]) in (b"503", b""):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert status == b"200"


def test_keep_alive_pipelining_and_expect(served: Served) -> None:
    body = kbs.AuthRequest().pack()
    one = b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert served.raw(one * 3).count(b"HTTP/1.1 200") == 3
    expecting = one.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    answer = served.raw(expecting)
    assert answer.startswith(b"HTTP/1.1 100")
    assert b"HTTP/1.1 200" in answer


def test_a_flood_of_sessions_keeps_nobody_out(served: Served, desk: Desk) -> None:
    app = BrokerApp(desk.broker)
    request = Request(method="POST", target=kbs.AUTH_PATH, cookie="", body=kbs.AuthRequest().pack())
    assert {app(request).status for _ in range(5000)} == {200}
    assert served.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())[0] == 200
    assert len(desk.attest()[0].volume_key) == 32


def test_counts_reach_the_trail_without_another_request(desk: Desk) -> None:
    server = serve(desk.broker, socket.create_server(("127.0.0.1", 0)))
    server.start()
    for _ in range(3):
        with pytest.raises(ProtocolError):
            desk.broker.attest(bytes(16), b"{}")
    desk.clock.seconds += 60
    deadline = time.monotonic() + 10
    while len(desk.broker.audit_trail()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert desk.broker.audit_trail()[-1].details["count"] == "2"
    server.stop()


class Slowly:
    """As many drip-feeding connections as the server has places, for as long as the block lasts."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.held: list[socket.socket] = []

    def __enter__(self) -> Slowly:
        self.held = [self.served.connect() for _ in range(self.served.server._limits.connections)]
        for connection in self.held:
            connection.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Le")
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.held:
            connection.close()


def usage(client_sockets: int) -> tuple[int, int]:
    """Descriptors without the client's, and threads."""
    return len(os.listdir("/proc/self/fd")) - client_sockets, threading.active_count()


def storm(served: Served, number: int) -> None:
    """Open `number` connections while slow ones have every place; the server stays within its bounds."""
    places = served.server._limits.connections
    descriptors, threads = usage(0)
    answers: dict[bytes, int] = {}
    with Slowly(served) as slow:
        for turn in range(number):
            with served.connect() as connection:
                answer = read_all(connection)[9:12]
                answers[answer] = answers.get(answer, 0) + 1
                if turn % 64 == 0:
                    now_descriptors, now_threads = usage(len(slow.held) + 1)
                    assert now_descriptors <= descriptors + places + 2
                    assert now_threads <= threads + places
                    assert len(served.server._open) <= places
    # A slow one is cut off by its deadline, and an idle one may then have its place: most were told to come back.
    assert set(answers) <= {b"503", b""}
    assert answers[b"503"] > number // 2
    deadline = time.monotonic() + 5
    while served.server._open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert served.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())[0] == 200
    after_descriptors, after_threads = usage(0)
    assert after_descriptors <= descriptors + 1
    assert after_threads <= threads + 1


@pytest.fixture
def patient(desk: Desk) -> Iterator[Served]:
    """A server with the limits that a real one has, but for the time a request may take."""
    found = Served(BrokerApp(desk.broker), limits=HttpLimits(request_seconds=120.0, idle_seconds=120.0))
    yield found
    found.server.stop()
    desk.broker.close()


def test_connections_beyond_the_limit_cost_no_thread_and_no_descriptor(patient: Served) -> None:
    storm(patient, 1000)


@pytest.mark.long
def test_ten_thousand_connections(patient: Served) -> None:
    storm(patient, 10_000)


def test_slow_peers_lose_their_places_after_a_requests_time(served: Served) -> None:
    """Slow loris: every place taken by heads that never end; the places come back while it goes on."""
    with Slowly(served):
        started = time.monotonic()
        body = kbs.AuthRequest().pack()
        request = b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        answers = [served.raw(request)[9:12]]
        while answers[-1] != b"200" and time.monotonic() - started < 5:
            time.sleep(0.02)
            answers.append(served.raw(request)[9:12])
        assert answers[0] in (b"503", b"")
        assert answers[-1] == b"200"
        assert time.monotonic() - started < LIMITS.request_seconds + 1.5


def test_a_defect_in_the_application_is_a_bare_500() -> None:
    def broken(_: Request) -> Response:
        raise ZeroDivisionError("secret detail")

    server = HttpServer(broken, socket.create_server(("127.0.0.1", 0)))
    server.start()
    client = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=5)
    client.request("GET", "/")
    answer = client.getresponse()
    assert (answer.status, answer.read()) == (500, b"")
    client.close()
    server.stop()


def test_stop_ends_open_connections(desk: Desk) -> None:
    server = serve(desk.broker, socket.create_server(("127.0.0.1", 0)))
    thread = threading.Thread(target=server.run)
    thread.start()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5)
    deadline = time.monotonic() + 30
    while not server._open:  # accepted, and served by a thread that waits for its request
        assert time.monotonic() < deadline
        time.sleep(0.005)
    server.stop()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert read_all(connection) == b""
    connection.close()
