# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vTPM protocol, rule by rule."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.abi.errors import BackendError
from svsm.abi.platform import PAGE_SIZE
from svsm.kernel.protocols.table import Result
from tests.unit.kernel.guest_platform import BASE, CALLING_AREA, LAUNCH_VMSA, LENGTH, VMSA, World

QUERY, CMD = 0, 1
BUFFER = BASE + 0x10_0000
GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")


class EchoTpm:
    """Answers with a fixed response, at once or when told."""

    def __init__(self, response: bytes | None = b"\x80\x01\0\0\0\x0a\0\0\0\0") -> None:
        self.response = response
        self.on = True
        self.later = False
        self.commands: list[bytes] = []
        self.waiting: list[Callable[[bytes | None], None]] = []

    def powered_on(self) -> bool:
        return self.on

    def submit(self, command: bytes, done: Callable[[bytes | None], None]) -> None:
        self.commands.append(command)
        if self.later:
            self.waiting.append(done)
        else:
            done(self.response)


def request(
    world: World,
    *,
    command: int = 8,
    locality: int = 0,
    size: int | None = None,
    at: int = BUFFER,
    body: bytes = GET_RANDOM,
) -> None:
    """A request in guest memory, the rest of its buffer filled with a pattern."""
    data = struct.pack("<IBI", command, locality, len(body) if size is None else size) + body
    world.poke(at, data + b"\x5a" * (PAGE_SIZE - len(data)))


def test_query() -> None:
    reply = World.make(EchoTpm()).call(2, QUERY, rcx=7, rdx=8)
    assert reply is not None
    assert (reply.result, reply.rcx, reply.rdx, reply.r8) == (Result.SUCCESS, 0x100, 0, None)


@pytest.mark.parametrize("number", [2, 3, 0xFFFFFFFF])
def test_unknown_calls(number: int) -> None:
    assert World.make(EchoTpm()).result(2, number, BUFFER) == Result.UNSUPPORTED_CALL


@pytest.mark.parametrize("offset", [0, 8, 0x123, 0xFFC, 0xFFD, 0xFFF])
def test_command_at_any_alignment(offset: int) -> None:
    tpm = EchoTpm()
    world = World.make(tpm)
    request(world, at=BUFFER + offset)
    before = world.peek(BUFFER + offset, PAGE_SIZE)
    reply = world.call(2, CMD, BUFFER + offset)
    assert reply is not None
    assert (reply.result, reply.rcx, reply.rdx, reply.r8) == (Result.SUCCESS, None, None, None)
    assert tpm.commands == [GET_RANDOM]
    after = world.peek(BUFFER + offset, PAGE_SIZE)
    assert tpm.response is not None
    assert after == (10).to_bytes(4, "little") + tpm.response + before[14:]


@pytest.mark.parametrize("size", [0, 1, 9, 4086, 4087])
def test_sizes_that_reach_the_tpm(size: int) -> None:
    tpm = EchoTpm()
    world = World.make(tpm)
    body = bytes(index % 251 for index in range(size))
    request(world, body=body)
    assert world.result(2, CMD, BUFFER) == Result.SUCCESS
    assert tpm.commands == [body]


@pytest.mark.parametrize(
    "change",
    [
        {"command": 0},
        {"command": 1},
        {"command": 9},
        {"command": 20},
        {"command": 8 << 24},
        {"command": 0xFFFFFFFF},
        {"locality": 1},
        {"locality": 4},
        {"locality": 255},
        {"size": 4088},
        {"size": 0xFFFFFFFF},
        {"size": 12 << 24},
    ],
)
def test_bad_requests(change: dict[str, int]) -> None:
    tpm = EchoTpm()
    world = World.make(tpm)
    request(world, command=change.get("command", 8), locality=change.get("locality", 0), size=change.get("size"))
    before = world.peek(BUFFER, PAGE_SIZE)
    assert world.result(2, CMD, BUFFER) == Result.INVALID_PARAMETER
    assert tpm.commands == []
    assert world.peek(BUFFER, PAGE_SIZE) == before


@pytest.mark.parametrize(
    "gpa",
    [0, 1, BASE - 4, BASE - 1, BASE + LENGTH, VMSA, VMSA - 1, LAUNCH_VMSA, BASE + LENGTH - 3, 0xFFFF_FFFF_FFFF_FFFF],
)
def test_first_word_is_not_the_guests(gpa: int) -> None:
    assert World.make(EchoTpm()).result(2, CMD, gpa) == Result.INVALID_PARAMETER


@pytest.mark.parametrize("gpa", [BASE + LENGTH - 4, BASE + LENGTH - PAGE_SIZE + 1, VMSA - 4, VMSA - PAGE_SIZE + 1])
def test_later_bytes_are_not_the_guests(gpa: int) -> None:
    tpm = EchoTpm()
    world = World.make(tpm)
    world.poke(gpa, struct.pack("<I", 8))
    assert world.result(2, CMD, gpa) == Result.INVALID_ADDRESS
    assert tpm.commands == []


@pytest.mark.parametrize(("page", "result"), [(0, Result.INVALID_PARAMETER), (1, Result.INVALID_ADDRESS)])
def test_pages_that_are_not_validated(page: int, result: int) -> None:
    world = World.make(EchoTpm())
    request(world, at=BUFFER + 0x800)
    world.platform.validated.discard(BUFFER + page * PAGE_SIZE)
    assert world.result(2, CMD, BUFFER + 0x800) == result


def test_the_last_whole_buffer_of_guest_memory() -> None:
    world = World.make(EchoTpm())
    request(world, at=BASE + LENGTH - PAGE_SIZE)
    assert world.result(2, CMD, BASE + LENGTH - PAGE_SIZE) == Result.SUCCESS


def test_the_rest_of_the_calling_area_page_is_a_buffer_too() -> None:
    world = World.make(EchoTpm())
    request(world, at=CALLING_AREA + 8)
    assert world.result(2, CMD, CALLING_AREA + 8) == Result.SUCCESS


def test_tpm_that_is_off() -> None:
    tpm = EchoTpm()
    tpm.on = False
    world = World.make(tpm)
    request(world)
    assert world.result(2, CMD, BUFFER) == Result.INVALID_REQUEST
    assert tpm.commands == []


@pytest.mark.parametrize(
    ("length", "result"),
    [
        (None, Result.INVALID_REQUEST),
        (4092, Result.SUCCESS),
        (4093, Result.INVALID_REQUEST),
        (4096, Result.INVALID_REQUEST),
    ],
)
def test_responses(length: int | None, result: int) -> None:
    tpm = EchoTpm(None if length is None else b"\xc3" * length)
    world = World.make(tpm)
    request(world)
    before = world.peek(BUFFER, PAGE_SIZE)
    assert world.result(2, CMD, BUFFER) == result
    after = world.peek(BUFFER, PAGE_SIZE)
    assert after == (struct.pack("<I", 4092) + b"\xc3" * 4092 if result == Result.SUCCESS else before)


def test_a_response_later() -> None:
    tpm = EchoTpm()
    tpm.later = True
    world = World.make(tpm)
    request(world)
    assert world.call(2, CMD, BUFFER) is None
    tpm.waiting[0](b"\x80\x01\0\0\0\x0a\0\0\1\1")
    assert world.peek(BUFFER, 14) == bytes.fromhex("0a000000 8001 0000000a 00000101")


def test_the_buffer_is_checked_again_when_the_response_comes() -> None:
    tpm = EchoTpm()
    tpm.later = True
    world = World.make(tpm)
    request(world)
    assert world.call(2, CMD, BUFFER) is None
    world.platform.validated.discard(BUFFER)
    tpm.waiting[0](b"\x80\x01\0\0\0\x0a\0\0\0\0")
    assert world.peek(BUFFER, 4) == struct.pack("<I", 8)


def test_answered_twice_is_noticed() -> None:
    tpm = EchoTpm()
    tpm.later = True
    world = World.make(tpm)
    request(world)
    world.call(2, CMD, BUFFER)
    tpm.waiting[0](b"")
    with pytest.raises(Exception, match="already") as caught:
        tpm.waiting[0](b"")
    assert getattr(caught.value, "code", None) == "guest-call-completed"


def test_a_dead_machine_is_not_a_result_code() -> None:
    world = World.make(EchoTpm())
    request(world)
    world.platform.refuse["read", BUFFER] = BackendError("gone", code="test-gone")
    with pytest.raises(BackendError):
        world.result(2, CMD, BUFFER)


@given(st.binary(max_size=64), st.integers(0, (1 << 64) - 1), st.integers(BASE - 16, BASE + LENGTH + 16))
def test_any_buffer_ends_in_a_result_code(data: bytes, anywhere: int, near: int) -> None:
    world = World.make(EchoTpm())
    world.poke(near, data)
    for gpa in (anywhere, near):
        assert world.result(2, CMD, gpa) in set(Result)
