# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's side of the syscall interface, against services that behave and services that do not."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svsm.abi import syscall
from svsm.abi.syscall import Call, Event, EventKind, FrameHeader, FrameReader, Reply, Request, Status
from svsm.formats.errors import BackendError, SvsmError
from svsm.kernel.events import EventLoop
from svsm.kernel.objects import (
    MAX_QUEUED_EVENTS,
    EventQueue,
    FileObject,
    KernelObject,
    QueuedEvent,
    SinkObject,
)
from svsm.kernel.processes import Process, ProcessTable
from svsm.testing.file_store import MemoryFileStore


class SlowStore(MemoryFileStore):
    """Replaces when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []

    def replace_many(self, changes: Mapping[int, bytes], done: Callable[[SvsmError | None], None]) -> None:
        now = super().replace_many
        self.waiting.append(lambda: now(changes, done))


class Service:
    """The test in a service's seat, with raw access to the socket."""

    def __init__(self, store: MemoryFileStore | None = None) -> None:
        self.loop = EventLoop()
        self.store = store or MemoryFileStore()
        self.lines: list[bytes] = []
        self.answers: list[tuple[int, bytes]] = []
        self.exits: list[SvsmError | None] = []
        self.events = EventQueue(lambda command_id, response: self.answers.append((command_id, response)))
        namespace: dict[str, KernelObject] = {
            "state": FileObject(self.store, 1, 1000),
            "other": FileObject(self.store, 2, 1000),
            "log": SinkObject(self.lines.append),
            "events": self.events,
        }
        kernel_end, self.socket = socket.socketpair()
        self.killed: list[socket.socket] = []
        self.socket.settimeout(0)
        self.table = ProcessTable(self.loop, lambda service, parameters: kernel_end, self.killed.append)
        self.process = self.table.start("test", {}, namespace, self._exited)
        self._reader = FrameReader()
        self._next_id = 100

    def _exited(self, process: Process, reason: SvsmError | None) -> None:
        assert process is self.process
        self.exits.append(reason)

    def turn(self) -> None:
        """Let the kernel work."""
        for _ in range(3):
            self.loop.run_once(0)

    def send(self, call: Call, body: bytes, request_id: int | None = None) -> int:
        """One request."""
        self._next_id += 1
        number = self._next_id if request_id is None else request_id
        self.socket.sendall(Request(number, call, body).pack())
        self.turn()
        return number

    def replies(self) -> list[Reply]:
        """What has come."""
        try:
            return [Reply.parse(*frame) for frame in self._reader.feed(self.socket.recv(1 << 20))]
        except BlockingIOError:
            return []

    def ask(self, call: Call, body: bytes) -> Reply:
        """A request that is answered at once."""
        number = self.send(call, body)
        (reply,) = self.replies()
        assert reply.id == number
        return reply

    def open(self, name: str) -> int:
        """A handle."""
        return syscall.decode_handle(self.ask(Call.OPEN, name.encode()).body)

    def close(self) -> None:
        """The end."""
        self.socket.close()
        self.process.end()
        self.loop.close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def test_files_are_read_and_replaced(service: Service) -> None:
    handle, other = service.open("state"), service.open("other")
    assert service.ask(Call.READ, syscall.encode_read(handle, 0, 100)).status is Status.NOT_FOUND
    assert service.ask(Call.REPLACE, syscall.encode_replace({handle: b"abcdef", other: b"x"})).status is Status.OK
    assert service.store.files == {1: b"abcdef", 2: b"x"}
    assert service.store.replacements == 1
    assert service.ask(Call.READ, syscall.encode_read(handle, 2, 3)).body == b"cde"
    assert service.ask(Call.READ, syscall.encode_read(handle, 1 << 60, 3)).body == b""


def test_a_service_reaches_only_what_it_was_given(service: Service) -> None:
    assert service.ask(Call.OPEN, b"key").status is Status.NOT_FOUND
    log, state = service.open("log"), service.open("state")
    for call, body in (
        (Call.READ, syscall.encode_read(log, 0, 1)),
        (Call.READ, syscall.encode_read(999, 0, 1)),
        (Call.WAIT, syscall.encode_handle(state)),
        (Call.WRITE, syscall.encode_write(state, b"x")),
        (Call.ANSWER, syscall.encode_answer(state, 1, b"")),
        (Call.REPLACE, syscall.encode_replace({log: b"x"})),
        (Call.CLOSE, syscall.encode_handle(999)),
    ):
        assert service.ask(call, body).status is Status.BAD_HANDLE
    assert service.exits == []
    assert service.ask(Call.CLOSE, syscall.encode_handle(state)).status is Status.OK
    assert service.ask(Call.READ, syscall.encode_read(state, 0, 1)).status is Status.BAD_HANDLE


def test_too_large_files_and_failing_stores_are_told(service: Service) -> None:
    handle = service.open("state")
    assert service.ask(Call.REPLACE, syscall.encode_replace({handle: bytes(1001)})).status is Status.TOO_LARGE
    service.store.fail = BackendError("no", code="block-io")
    assert service.ask(Call.REPLACE, syscall.encode_replace({handle: b"x"})).status is Status.FAILED
    assert service.store.files == {}


def test_one_file_by_two_handles_is_not_replaced_twice(service: Service) -> None:
    first, second = service.open("state"), service.open("state")
    reply = service.ask(Call.REPLACE, syscall.encode_replace({first: b"a", second: b"b"}))
    assert reply.status is Status.BAD_HANDLE
    assert service.store.files == {}


def test_a_commit_answers_late_and_others_meanwhile() -> None:
    store = SlowStore()
    service = Service(store)
    handle, log = service.open("state"), service.open("log")
    slow = service.send(Call.REPLACE, syscall.encode_replace({handle: b"new"}))
    assert service.replies() == []
    assert service.ask(Call.WRITE, syscall.encode_write(log, b"line")).status is Status.OK
    assert service.lines == [b"line"]
    store.waiting.pop()()
    service.turn()
    (reply,) = service.replies()
    assert (reply.id, reply.status) == (slow, Status.OK)
    service.close()


def test_a_commit_that_ends_after_the_service_stands_and_finds_no_one() -> None:
    store = SlowStore()
    service = Service(store)
    service.send(Call.REPLACE, syscall.encode_replace({service.open("state"): b"new"}))
    service.close()
    store.waiting.pop()()
    assert store.files == {1: b"new"}


def test_events_are_queued_waited_for_and_answered(service: Service) -> None:
    handle = service.open("events")
    waiting = service.send(Call.WAIT, syscall.encode_handle(handle))
    assert service.replies() == []
    assert service.ask(Call.WAIT, syscall.encode_handle(handle)).status is Status.BUSY
    assert service.events.push(QueuedEvent(Event(EventKind.COMMAND, command_id=5, command=b"cmd")))
    assert service.events.push(QueuedEvent(Event(EventKind.STOP)))
    (reply,) = service.replies()
    assert reply.id == waiting
    assert Event.parse(reply.body).command == b"cmd"
    assert Event.parse(service.ask(Call.WAIT, syscall.encode_handle(handle)).body).kind is EventKind.STOP
    service.ask(Call.ANSWER, syscall.encode_answer(handle, 5, b"rsp"))
    assert service.answers == [(5, b"rsp")]


def test_the_queue_is_bounded(service: Service) -> None:
    pushed = sum(service.events.push(QueuedEvent(Event(EventKind.STOP))) for _ in range(1000))
    assert pushed == MAX_QUEUED_EVENTS


def test_a_connection_arrives_with_its_descriptor_and_a_handle_that_counts_it(service: Service) -> None:
    handle = service.open("events")
    service.send(Call.WAIT, syscall.encode_handle(handle))
    left, right = socket.socketpair()
    service.events.push(QueuedEvent(Event(EventKind.CONNECTION), left))
    data, descriptors, _, _ = socket.recv_fds(service.socket, 4096, 4)
    ((header, body),) = FrameReader().feed(data)
    event = Event.parse(Reply.parse(header, body).body)
    assert (len(descriptors), header.descriptors, service.process.connections) == (1, 1, 1)
    assert left.fileno() == -1  # the kernel keeps no copy
    with socket.socket(fileno=descriptors[0]) as passed, right:
        passed.send(b"hello")
        assert right.recv(5) == b"hello"
    service.ask(Call.CLOSE, syscall.encode_handle(event.handle))
    assert service.process.connections == 0


def test_handles_are_bounded(service: Service) -> None:
    for _ in range(syscall.MAX_HANDLES):
        assert service.ask(Call.OPEN, b"log").status is Status.OK
    assert service.ask(Call.OPEN, b"log").status is Status.LIMIT


BAD = {
    "syscall-frame": FrameHeader(0xFFFFFFFF, 1, 1, 0, 0).pack(),
    "syscall-call": FrameHeader(12, 1, 77, 0, 0).pack(),
    "syscall-descriptors": FrameHeader(12, 1, 1, 1, 0).pack(),
    "syscall-name": Request(1, Call.OPEN, b"").pack(),
    "cursor-truncated": Request(1, Call.READ, b"").pack(),
    "cursor-trailing": Request(1, Call.CLOSE, bytes(5)).pack(),
    "syscall-replace": Request(1, Call.REPLACE, bytes(4)).pack(),
}


@pytest.mark.parametrize("code", BAD)
def test_a_bad_frame_ends_the_service_and_nothing_else(service: Service, code: str) -> None:
    service.socket.sendall(BAD[code] + Request(9, Call.OPEN, b"log").pack())
    service.turn()
    (reason,) = service.exits
    assert len(service.killed) == 1  # its process too, or it would keep the clients that it holds
    assert reason is not None
    assert reason.code == code
    assert not service.process.alive
    assert len(service.table) == 0
    assert service.socket.recv(100) == b""


def test_an_id_used_twice_and_too_many_requests_end_the_service() -> None:
    for again, code in ((True, "syscall-id"), (False, "syscall-pending")):
        service = Service(SlowStore())
        handle = service.open("state")
        for index in range(syscall.MAX_PENDING + 1):
            body = syscall.encode_replace({handle: b"x"})
            try:
                service.send(Call.REPLACE, body, request_id=1 if again else index)
            except OSError:
                break
        (reason,) = service.exits
        assert reason is not None
        assert reason.code == code
        service.close()


def test_a_service_that_does_not_read_its_answers_is_ended_and_bounded() -> None:
    service = Service()
    service.store.files[1] = bytes(1000)
    service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    handle = service.open("state")
    service.store.files[1] = bytes(syscall.MAX_FILE_BYTES)
    for index in range(100):
        try:
            service.send(Call.READ, syscall.encode_read(handle, 0, syscall.MAX_FILE_BYTES), request_id=index)
        except OSError:
            break
    assert service.exits
    assert service.exits[0] is not None
    assert service.exits[0].code == "syscall-pending"
    service.close()


def test_a_chunk_of_many_requests_is_served_in_turns_and_completely() -> None:
    service = Service()
    handle = service.open("log")
    frames = [Request(1000 + i, Call.WRITE, syscall.encode_write(handle, b"x")).pack() for i in range(100)]
    service.socket.sendall(b"".join(frames))
    service.loop.run_once(0)
    assert 0 < len(service.lines) <= 16  # one turn is short
    assert service.loop.run_until(lambda: len(service.lines) == 100, timeout_seconds=5)
    assert [reply.id for reply in service.replies()] == list(range(1000, 1100))
    assert service.exits == []
    service.close()


def test_descriptors_that_a_service_sends_are_dropped(service: Service) -> None:
    with open("/dev/null", "rb") as file:
        socket.send_fds(service.socket, [Request(1, Call.OPEN, b"log").pack()], [file.fileno()] * 100)
    service.turn()
    assert service.replies()[0].status is Status.OK


def test_the_end_of_a_service_is_noticed(service: Service) -> None:
    service.socket.close()
    service.turn()
    assert service.exits == [None]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_whatever_a_service_sends_the_kernel_goes_on(chunks: list[bytes]) -> None:
    service = Service()
    for chunk in chunks:
        try:
            service.socket.sendall(chunk)
        except OSError:
            break
        service.turn()
    service.close()
    assert len(service.exits) == 1
