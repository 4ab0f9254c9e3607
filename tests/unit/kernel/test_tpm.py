# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's side of a TPM, with the test in the service's seat: what a hostile service or guest can make it do."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Literal

import pytest

from svsm.abi import syscall
from svsm.abi.syscall import Call, Endpoint, Event, EventKind, FrameReader, Reply, Request, Status, Transport
from svsm.formats import tpm
from svsm.formats.errors import BackendError, PolicyError, ProtocolError, StateError
from svsm.kernel.events import EventLoop
from svsm.kernel.processes import ProcessTable
from svsm.kernel.tpm import MAX_TPM_CLIENTS, TpmService, tpm_state_inode
from svsm.testing.file_store import MemoryFileStore

NAME = b"\x00\x0b" + bytes(32)
COMMAND = tpm.get_random(8)


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Seat:
    """A TPM of the kernel, and the service's end of each socket that it started."""

    def __init__(self, front: Literal["socket", "svsm"] = "svsm") -> None:
        self.clock = Clock()
        self.loop = EventLoop(self.clock)
        self.services: list[socket.socket] = []
        self.killed: list[socket.socket] = []
        self.parameters: list[Mapping[str, str]] = []
        self.lines: list[str] = []
        self.names: list[bytes | None] = []
        self.refuse_spawn = False
        self.tpm = TpmService(
            ProcessTable(self.loop, self._spawn, self.killed.append),
            name="t",
            front=front,
            store=MemoryFileStore(),
            inode=tpm_state_inode(0),
            log=self.lines.append,
            on_ready=self.names.append,
        )
        self.tpm.start()
        self.tpm.release()
        self._ids = 0

    def _spawn(self, service: str, parameters: Mapping[str, str]) -> socket.socket:
        assert service == "vtpm"
        if self.refuse_spawn:
            raise BackendError("no", code="spawn-failed")
        kernel_end, service_end = socket.socketpair()
        service_end.settimeout(0)
        self.services.append(service_end)
        self.parameters.append(parameters)
        return kernel_end

    def turn(self) -> None:
        """Let the kernel work."""
        for _ in range(4):
            self.loop.run_once(0)

    def ask(self, call: Call, body: bytes) -> Reply | None:
        """A syscall of the running service; None when it is not answered (yet)."""
        self._ids += 1
        self.services[-1].sendall(Request(self._ids, call, body).pack())
        self.turn()
        try:
            data, descriptors, _, _ = socket.recv_fds(self.services[-1], 1 << 16, 4)
        except BlockingIOError:
            return None
        for descriptor in descriptors:
            socket.socket(fileno=descriptor).close()
        frames = FrameReader().feed(data)
        return Reply.parse(*frames[0]) if frames else None

    def open(self, name: str) -> int:
        """A handle."""
        reply = self.ask(Call.OPEN, name.encode())
        assert reply is not None
        return syscall.decode_handle(reply.body)

    def announce(self, data: bytes = NAME) -> None:
        """Be ready."""
        self.ask(Call.WRITE, syscall.encode_write(self.open("announce"), data))

    def next_event(self, handle: int) -> Event | None:
        """What WAIT gives at once."""
        reply = self.ask(Call.WAIT, syscall.encode_handle(handle))
        return None if reply is None or reply.status is not Status.OK else Event.parse(reply.body)

    def later(self, seconds: float) -> None:
        """Time passes."""
        self.clock.seconds += seconds
        self.turn()

    def close(self) -> None:
        """The end."""
        for service in self.services:
            service.close()
        self.turn()
        self.loop.close()


@pytest.fixture
def seat() -> Iterator[Seat]:
    made = Seat()
    yield made
    made.close()


def test_it_starts_fresh_and_after_it_served_only_in_failure_mode(seat: Seat) -> None:
    assert dict(seat.parameters[0]) == {"front": "svsm", "start": "fresh"}
    seat.services[0].close()  # died before it ever served: nobody has seen PCRs of it
    seat.turn()
    seat.later(1)
    assert seat.parameters[1]["start"] == "fresh"
    seat.announce()
    seat.services[1].close()
    seat.turn()
    seat.later(1)
    assert seat.parameters[2]["start"] == "failed"


@pytest.mark.parametrize("data", [b"x", bytes(33), bytes(35)])
def test_a_wrong_announcement_ends_the_service(seat: Seat, data: bytes) -> None:
    seat.services[0].sendall(Request(1, Call.OPEN, b"announce").pack())
    seat.turn()
    seat.services[0].sendall(Request(2, Call.WRITE, syscall.encode_write(1, data)).pack())
    seat.turn()
    assert not seat.tpm.running
    assert seat.names == []
    assert "tpm-announce" in seat.lines[0]


def test_a_second_announcement_and_a_made_up_answer_end_the_service() -> None:
    for attack in ("announce", "answer"):
        seat = Seat()
        seat.announce()
        handle = seat.open("events")
        if attack == "announce":
            seat.announce()
        else:
            seat.ask(Call.ANSWER, syscall.encode_answer(handle, 77, bytes(10)))
        assert not seat.tpm.running
        assert seat.names == [NAME]
        seat.close()


def test_a_short_answer_ends_the_service_and_the_guest_gets_a_failure(seat: Seat) -> None:
    seat.announce()
    handle = seat.open("events")
    answers: list[bytes] = []
    seat.tpm.execute(COMMAND, answers.append)
    event = seat.next_event(handle)
    assert event is not None
    assert (event.kind, event.command) == (EventKind.COMMAND, COMMAND)
    seat.ask(Call.ANSWER, syscall.encode_answer(handle, event.command_id, b"short"))
    assert answers == [tpm.failure_response()]
    assert not seat.tpm.running


def test_commands_are_bounded_and_checked(seat: Seat) -> None:
    for size in (0, 9, 4097):
        with pytest.raises(ProtocolError):
            seat.tpm.execute(bytes(size), lambda _: None)
    for _ in range(32):
        seat.tpm.execute(COMMAND, lambda _: None)
    with pytest.raises(StateError) as caught:
        seat.tpm.execute(COMMAND, lambda _: None)
    assert caught.value.code == "tpm-busy"
    done: list[bytes | None] = []
    seat.tpm.submit(COMMAND, done.append)
    seat.turn()
    assert done == [None]


def test_after_a_death_what_was_owed_fails_and_the_next_service_starts_as_failed(seat: Seat) -> None:
    seat.announce()
    answers: list[bytes] = []
    seat.tpm.execute(COMMAND, answers.append)
    seat.services[0].close()
    seat.turn()
    assert answers == [tpm.failure_response()]
    seat.later(1)
    assert seat.parameters[1]["start"] == "failed"


def test_a_service_that_never_answers_or_never_starts_is_ended(seat: Seat) -> None:
    seat.later(31)
    assert "tpm-start-overdue" in seat.lines[0]
    seat.later(1)
    seat.announce()
    answers: list[bytes] = []
    seat.tpm.execute(COMMAND, answers.append)
    seat.later(100)
    assert answers == []
    seat.later(21)
    assert answers == [tpm.failure_response()]
    assert "tpm-overdue" in seat.lines[1]


def test_restarts_become_slow_and_a_spawn_that_fails_is_tried_again(seat: Seat) -> None:
    for _ in range(20):
        seat.services[-1].close()
        seat.turn()
        seat.later(20)
    assert len(seat.services) == 21
    seat.services[-1].close()
    seat.turn()
    seat.later(9)
    assert len(seat.services) == 21
    seat.refuse_spawn = True
    seat.later(2)
    assert "cannot be started again" in seat.lines[-1]
    seat.refuse_spawn = False
    seat.later(11)
    assert len(seat.services) == 22


def test_the_log_of_a_service_is_bounded_and_printable(seat: Seat) -> None:
    handle = seat.open("log")
    for _ in range(100):
        seat.ask(Call.WRITE, syscall.encode_write(handle, b"a\x1b[2Jb\n\xff"))
    assert len(seat.lines) == 32
    assert set(seat.lines) == {"a?[2Jb?\ufffd"}


def test_fronts_exclude_each_other() -> None:
    seat = Seat("socket")
    with pytest.raises(StateError):
        seat.tpm.execute(COMMAND, lambda _: None)
    assert not seat.tpm.powered_on()
    seat.close()
    guest = Seat("svsm")
    left, right = socket.socketpair()
    with right, pytest.raises(PolicyError) as caught:
        guest.tpm.connect(left.detach(), Endpoint.DATA, Transport.UNIX)
    assert caught.value.code == "client-front"
    guest.close()


def test_clients_that_nobody_takes_are_capped() -> None:
    seat = Seat("socket")
    ends = []
    for _ in range(MAX_TPM_CLIENTS):
        left, right = socket.socketpair()
        ends.append(right)
        seat.tpm.connect(left.detach(), Endpoint.DATA, Transport.UNIX)
    left, right = socket.socketpair()
    ends.append(right)
    with pytest.raises(PolicyError):
        seat.tpm.connect(left.detach(), Endpoint.DATA, Transport.UNIX)
    finished: list[bool] = []
    seat.tpm.stop(lambda: finished.append(True))
    assert finished == [True]
    for end in ends:
        assert end.recv(1) == b""
        end.close()
    seat.close()


def test_stop_asks_first_and_does_not_wait_for_ever(seat: Seat) -> None:
    seat.announce()
    handle = seat.open("events")
    finished: list[bool] = []
    seat.tpm.stop(lambda: finished.append(True))
    event = seat.next_event(handle)
    assert event is not None
    assert event.kind is EventKind.STOP
    seat.later(4)
    assert finished == []
    seat.later(2)
    assert finished == [True]
    seat.later(100)
    assert len(seat.services) == 1  # it is not started again


def test_inodes_are_apart() -> None:
    assert tpm_state_inode(0) == 1 << 32
    assert tpm_state_inode(3) == (1 << 32) + 48
