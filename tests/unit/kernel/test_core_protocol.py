# SPDX-License-Identifier: MIT OR Apache-2.0
"""The core protocol, rule by rule."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.abi.errors import BackendError, ProtocolError
from svsm.abi.platform import PAGE_SIZE, Gpa, Permission
from svsm.kernel.protocols.guest_memory import GuestMemory, Region, VcpuArea
from svsm.kernel.protocols.table import ProtocolTable, Result, SvsmProtocol
from tests.unit.kernel.guest_platform import (
    BASE,
    CALLING_AREA,
    LAUNCH_VMSA,
    LENGTH,
    SECOND_CALLING_AREA,
    SECOND_VMSA,
    VMSA,
    World,
)
from tests.unit.kernel.test_vtpm_protocol import EchoTpm

REMAP_CA, PVALIDATE, QUERY_PROTOCOL, CONFIGURE_VTOM = 0, 1, 6, 7
LIST = BASE + 0x20_0000
TARGET = BASE + 0x10_0000
VALIDATE, IGNORE_CF = 4, 8
UNCHANGED = 0x8000_1010
SIZEMISMATCH = 0x8000_1006


def put_list(world: World, entries: list[int], *, start: int = 0, count: int | None = None, at: int = LIST) -> None:
    """A PVALIDATE list in guest memory, with reserved bytes that must survive."""
    header = struct.pack("<HHI", len(entries) if count is None else count, start, 0xDEADBEEF)
    world.poke(at, header + b"".join(entry.to_bytes(8, "little") for entry in entries))


def pvalidate(world: World, entries: list[int], *, start: int = 0) -> tuple[int | None, int]:
    """(result, `next` as written back); reserved bytes and entries must be untouched."""
    put_list(world, entries, start=start)
    before = world.peek(LIST, 8 + 8 * len(entries))
    result = world.result(0, PVALIDATE, LIST)
    after = world.peek(LIST, 8 + 8 * len(entries))
    assert (before[:2], before[4:]) == (after[:2], after[4:])
    return result, int.from_bytes(after[2:4], "little")


# --- dispatch and QUERY_PROTOCOL ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 4, 5, 8, 0xFFFFFFFF])
def test_core_calls_without_a_row(number: int) -> None:
    assert World.make().result(0, number) == Result.UNSUPPORTED_CALL


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5, 0xFFFFFFFF])
def test_unknown_protocols(protocol: int) -> None:
    assert World.make().result(protocol, 0) == Result.UNSUPPORTED_PROTOCOL


@pytest.mark.parametrize(
    ("protocol", "version", "answer"),
    [
        (0, 1, 1 << 32 | 1),
        (0, 0, 0),
        (0, 2, 0),
        (2, 1, 1 << 32 | 1),
        (2, 0xFFFFFFFF, 0),
        (1, 1, 0),
        (0xFFFFFFFF, 1, 0),
    ],
)
def test_query_protocol(protocol: int, version: int, answer: int) -> None:
    reply = World.make(EchoTpm()).call(0, QUERY_PROTOCOL, protocol << 32 | version, rdx=5, r8=6)
    assert reply is not None
    assert (reply.result, reply.rcx, reply.rdx, reply.r8) == (Result.SUCCESS, answer, None, None)


def test_query_protocol_without_tpm() -> None:
    reply = World.make().call(0, QUERY_PROTOCOL, 2 << 32 | 1)
    assert reply is not None
    assert reply.rcx == 0


def test_version_range_of_a_protocol_with_several() -> None:
    world = World.make()
    world.table.add(SvsmProtocol(number=9, name="nine", calls={}, min_version=2, max_version=4))
    answers = [world.call(0, QUERY_PROTOCOL, 9 << 32 | version) for version in range(6)]
    assert [answer.rcx for answer in answers if answer] == [0, 0, 4 << 32 | 2, 4 << 32 | 2, 4 << 32 | 2, 0]


def test_a_protocol_number_is_taken_once() -> None:
    with pytest.raises(Exception, match="twice") as caught:
        ProtocolTable([SvsmProtocol(number=9, name="a", calls={}), SvsmProtocol(number=9, name="b", calls={})])
    assert getattr(caught.value, "code", None) == "guest-protocol-twice"


def test_a_protocol_may_choose_its_answer_for_unknown_calls() -> None:
    world = World.make()
    unknown = Result.UNSUPPORTED_PROTOCOL
    world.table.add(SvsmProtocol(number=1, name="attest", calls={}, unknown_call=unknown))
    assert world.result(1, 7) == unknown


@pytest.mark.parametrize(("rcx", "result", "out"), [(1, 0, 0), (3, 0, 0), (0, Result.INVALID_REQUEST, None)])
def test_configure_vtom(rcx: int, result: int, out: int | None) -> None:
    reply = World.make().call(0, CONFIGURE_VTOM, rcx)
    assert reply is not None
    assert (reply.result, reply.rcx) == (result, out)


# --- REMAP_CA ----------------------------------------------------------------------------------------------------


def test_remap_moves_and_zeroes_eight_bytes() -> None:
    world = World.make()
    world.poke(TARGET, b"\xff" * 16)
    assert world.result(0, REMAP_CA, TARGET) == Result.SUCCESS
    assert world.memory.calling_area(VMSA) == TARGET
    assert world.peek(TARGET, 16) == bytes(8) + b"\xff" * 8


def test_remap_to_the_same_page() -> None:
    world = World.make()
    world.poke(CALLING_AREA, b"\xff" * 9)
    assert world.result(0, REMAP_CA, CALLING_AREA) == Result.SUCCESS
    assert world.memory.calling_area(VMSA) == CALLING_AREA
    assert world.peek(CALLING_AREA, 9) == bytes(8) + b"\xff"


@pytest.mark.parametrize(
    ("gpa", "result"),
    [
        (TARGET + 1, Result.INVALID_PARAMETER),
        (TARGET + 8, Result.INVALID_PARAMETER),
        (0x1_0000_0001, Result.INVALID_PARAMETER),
        (VMSA, Result.INVALID_ADDRESS),
        (SECOND_VMSA, Result.INVALID_ADDRESS),
        (SECOND_CALLING_AREA, Result.INVALID_ADDRESS),
        (LAUNCH_VMSA, Result.INVALID_ADDRESS),
        (BASE - PAGE_SIZE, Result.INVALID_ADDRESS),
        (BASE + LENGTH, Result.INVALID_ADDRESS),
        (0, Result.INVALID_ADDRESS),
        (0xFFFF_FFFF_FFFF_F000, Result.INVALID_ADDRESS),
    ],
)
def test_remap_refusals_change_nothing(gpa: int, result: int) -> None:
    world = World.make()
    world.platform.log.clear()
    assert world.result(0, REMAP_CA, gpa) == result
    assert world.memory.calling_area(VMSA) == CALLING_AREA
    assert world.platform.log == []


def test_remap_to_a_page_that_is_not_validated() -> None:
    world = World.make()
    world.platform.validated.discard(TARGET)
    assert world.result(0, REMAP_CA, TARGET) == Result.INVALID_ADDRESS
    assert world.memory.calling_area(VMSA) == CALLING_AREA


def test_the_old_calling_area_is_free_after_a_remap() -> None:
    world = World.make()
    assert world.result(0, REMAP_CA, TARGET) == Result.SUCCESS
    assert pvalidate(world, [CALLING_AREA]) == (Result.SUCCESS, 1)
    assert pvalidate(world, [TARGET]) == (Result.INVALID_ADDRESS, 0)


# --- PVALIDATE: the list -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 2, 4, 7])
def test_list_alignment(offset: int) -> None:
    assert World.make().result(0, PVALIDATE, LIST + offset) == Result.INVALID_PARAMETER


@pytest.mark.parametrize("gpa", [0, BASE - 8, BASE + LENGTH, VMSA, VMSA + 8, LAUNCH_VMSA, 0xFFFF_FFFF_FFFF_FFF8])
def test_list_outside_guest_memory(gpa: int) -> None:
    assert World.make().result(0, PVALIDATE, gpa) == Result.INVALID_ADDRESS


def test_list_on_a_page_that_is_not_validated() -> None:
    world = World.make()
    world.platform.validated.discard(LIST)
    assert world.result(0, PVALIDATE, LIST) == Result.INVALID_ADDRESS


@pytest.mark.parametrize(
    ("offset", "count", "start", "accepted"),
    [
        (0, 0, 0, False),
        (0, 1, 1, False),
        (0, 1, 2, False),
        (0, 0xFFFF, 0, False),
        (0, 512, 0, False),
        (0, 511, 510, True),
        (8, 511, 510, False),
        (8, 510, 509, True),
        (4080, 1, 0, True),
        (4080, 2, 0, False),
        (4088, 1, 0, False),
    ],
)
def test_list_header(offset: int, count: int, start: int, *, accepted: bool) -> None:
    world = World.make()
    world.platform.validated.discard(TARGET)
    put_list(world, [], count=count, start=start, at=LIST + offset)
    if accepted:
        world.poke(LIST + offset + 8 + 8 * start, (TARGET | VALIDATE).to_bytes(8, "little"))
    assert world.result(0, PVALIDATE, LIST + offset) == (Result.SUCCESS if accepted else Result.INVALID_PARAMETER)
    assert int.from_bytes(world.peek(LIST + offset + 2, 2), "little") == (count if accepted else start)


def test_processing_starts_at_next_and_earlier_entries_do_not_matter() -> None:
    world = World.make()
    garbage = 0xFF0
    assert pvalidate(world, [garbage, garbage, TARGET], start=2) == (Result.SUCCESS, 3)


@pytest.mark.parametrize("bad", range(4))
def test_next_is_the_index_of_the_failing_entry(bad: int) -> None:
    world = World.make()
    entries = [TARGET + PAGE_SIZE * index for index in range(4)]
    entries[bad] |= 0x10
    assert pvalidate(world, entries) == (Result.INVALID_PARAMETER, bad)
    still = [TARGET + PAGE_SIZE * index in world.platform.validated for index in range(4)]
    assert still == [index >= bad for index in range(4)]


def test_linux_resumes_after_a_size_mismatch() -> None:
    world = World.make()
    entries = [TARGET, BASE + 0x40_0000 | 1, TARGET + PAGE_SIZE]
    assert pvalidate(world, entries) == (SIZEMISMATCH, 1)
    assert pvalidate(world, entries, start=2) == (Result.SUCCESS, 3)


def test_the_list_is_read_once_even_when_an_entry_zeroes_it() -> None:
    world = World.make()
    entries = [LIST, LIST | VALIDATE, TARGET]
    put_list(world, entries)
    assert world.result(0, PVALIDATE, LIST) == Result.SUCCESS
    assert world.peek(LIST, 4) == struct.pack("<HH", 0, 3)
    assert TARGET not in world.platform.validated


def test_the_list_gives_up_its_own_page() -> None:
    world = World.make()
    put_list(world, [LIST, TARGET])
    assert world.result(0, PVALIDATE, LIST) == Result.INVALID_ADDRESS
    assert TARGET not in world.platform.validated


# --- PVALIDATE: entries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1 << bit for bit in range(4, 12)] + [2, 3, 0xFF0])
@pytest.mark.parametrize("action", [0, VALIDATE, VALIDATE | IGNORE_CF])
def test_entry_bits(bits: int, action: int) -> None:
    world = World.make()
    world.platform.log.clear()
    assert pvalidate(world, [TARGET | bits | action]) == (Result.INVALID_PARAMETER, 0)
    assert {operation for operation, _ in world.platform.log} == {"read", "write"}


def test_large_entry_alignment() -> None:
    world = World.make()
    world.platform.large_pages = True
    assert pvalidate(world, [BASE + 0x10_0000 | 1]) == (Result.INVALID_PARAMETER, 0)
    assert pvalidate(world, [BASE + 0x60_0000 | 1]) == (Result.SUCCESS, 1)


@pytest.mark.parametrize(
    "gpa",
    [
        0,
        BASE - PAGE_SIZE,
        BASE + LENGTH,
        VMSA,
        SECOND_VMSA,
        CALLING_AREA,
        SECOND_CALLING_AREA,
        LAUNCH_VMSA,
        0x000F_FFFF_FFFF_F000,
        0xFFFF_FFFF_FFFF_F000,
        BASE | 1,
        (BASE + LENGTH) | 1,
    ],
)
@pytest.mark.parametrize("action", [0, IGNORE_CF, VALIDATE, VALIDATE | IGNORE_CF])
def test_entry_addresses(gpa: int, action: int) -> None:
    world = World.make()
    world.platform.large_pages = True
    world.platform.log.clear()
    assert pvalidate(world, [gpa | action]) == (Result.INVALID_ADDRESS, 0)
    assert {operation for operation, _ in world.platform.log} == {"read", "write"}


def test_invalidate_revokes_before_it_gives_up() -> None:
    world = World.make()
    world.platform.log.clear()
    assert pvalidate(world, [TARGET]) == (Result.SUCCESS, 1)
    steps = [step for step in world.platform.log if step[1] == TARGET]
    assert steps == [("revoke", TARGET), ("revoke", TARGET), ("invalidate", TARGET)]
    assert {world.platform.permissions[TARGET, vmpl] for vmpl in (2, 3)} == {Permission.NONE}


def test_validate_zeroes_before_it_grants() -> None:
    world = World.make()
    world.platform.validated.discard(TARGET)
    world.poke(TARGET, b"\xaa" * PAGE_SIZE)
    world.platform.log.clear()
    assert pvalidate(world, [TARGET | VALIDATE]) == (Result.SUCCESS, 1)
    steps = [step for step in world.platform.log if step[1] == TARGET]
    assert steps == [("validate", TARGET), ("write", TARGET), ("grant", TARGET)]
    assert world.peek(TARGET, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert world.platform.permissions[TARGET, 2] == Permission.ALL
    assert (TARGET, 3) not in world.platform.permissions


def test_large_validate_zeroes_all_of_it() -> None:
    world = World.make()
    world.platform.large_pages = True
    start = BASE + 0x80_0000
    for offset in (0, 0x1000, 0x1F_F000):
        world.platform.validated.discard(start + offset)
        world.poke(start + offset, b"\xaa" * PAGE_SIZE)
    assert pvalidate(world, [start | 1 | VALIDATE]) == (Result.SUCCESS, 1)
    assert not any(any(world.platform.pages[start + offset]) for offset in (0, 0x1000, 0x1F_F000))


@pytest.mark.parametrize(
    ("entry", "result"),
    [
        (TARGET | VALIDATE, UNCHANGED),
        (TARGET | VALIDATE | IGNORE_CF, Result.SUCCESS),
        (TARGET + PAGE_SIZE, UNCHANGED),
        (TARGET + PAGE_SIZE | IGNORE_CF, Result.SUCCESS),
    ],
)
def test_unchanged_state(entry: int, result: int) -> None:
    world = World.make()
    world.platform.validated.discard(TARGET + PAGE_SIZE)
    world.poke(TARGET, b"\xaa" * PAGE_SIZE)
    assert pvalidate(world, [entry]) == (result, int(result == Result.SUCCESS))
    zeroed = world.peek(TARGET, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert zeroed == (entry == TARGET | VALIDATE | IGNORE_CF)


@pytest.mark.parametrize("instruction_code", [1, 2, 6])
@pytest.mark.parametrize("action", [IGNORE_CF, VALIDATE | IGNORE_CF])
def test_ignore_cf_swallows_only_unchanged(instruction_code: int, action: int) -> None:
    world = World.make()
    error = ProtocolError("no", code="platform-instruction", instruction_code=instruction_code)
    world.platform.refuse["validate", TARGET] = world.platform.refuse["invalidate", TARGET] = error
    assert pvalidate(world, [TARGET | action]) == (0x8000_1000 + instruction_code, 0)


@pytest.mark.parametrize("step", ["write", "grant"])
def test_a_page_that_cannot_be_handed_over_is_given_up(step: str) -> None:
    world = World.make()
    world.platform.validated.discard(TARGET)
    world.platform.refuse[step, TARGET] = ProtocolError("no", code="platform-refused")
    assert pvalidate(world, [TARGET | VALIDATE]) == (Result.INVALID_ADDRESS, 0)
    assert TARGET not in world.platform.validated


def test_a_dead_machine_is_not_a_result_code() -> None:
    world = World.make()
    world.platform.refuse["invalidate", TARGET] = BackendError("gone", code="test-gone")
    put_list(world, [TARGET])
    with pytest.raises(BackendError):
        world.result(0, PVALIDATE, LIST)


@given(st.binary(min_size=0, max_size=200), st.integers(0, 511), st.integers(0, (1 << 64) - 1))
def test_any_list_ends_in_a_result_code(data: bytes, slot: int, rcx: int) -> None:
    world = World.make()
    world.poke(LIST + slot * 8, data[: PAGE_SIZE - slot * 8])
    for gpa in (LIST + slot * 8, rcx):
        result = world.result(0, PVALIDATE, gpa)
        assert result is not None
        assert result == 0 or result >> 31 == 1
    for page in (VMSA, SECOND_VMSA, CALLING_AREA, SECOND_CALLING_AREA, LAUNCH_VMSA):
        assert page in world.platform.validated


# --- the registry ------------------------------------------------------------------------------------------------


def test_regions_join_and_must_be_pages() -> None:
    platform = World.make().platform
    memory = GuestMemory(platform, [Region(Gpa(0x2000), 0x1000), Region(Gpa(0x1000), 0x1000)])
    assert memory.contains(0x1FF8, 16)
    assert not memory.contains(0x2FF8, 16)
    assert not memory.contains(0x1000, 0)
    with pytest.raises(Exception, match="whole pages") as caught:
        GuestMemory(platform, [Region(Gpa(0x1000), 0x1800)])
    assert getattr(caught.value, "code", None) == "guest-memory-map"


@pytest.mark.parametrize(
    ("vmsa", "area"),
    [(TARGET, TARGET), (VMSA, TARGET), (TARGET, CALLING_AREA), (CALLING_AREA, TARGET), (TARGET, SECOND_VMSA)],
)
def test_vcpus_do_not_overlap(vmsa: Gpa, area: Gpa) -> None:
    with pytest.raises(Exception, match="overlap") as caught:
        World.make().memory.register(VcpuArea(Gpa(vmsa), Gpa(area)))
    assert getattr(caught.value, "code", None) == "guest-vcpu-overlap"


def test_a_call_changes_a_bounded_amount_of_memory_and_says_where_to_go_on() -> None:
    world = World.make()
    world.platform.large_pages = True
    large = BASE + (4 << 20)
    entries = [large | 1 << 3 | 1 << 2 | 1] * 6  # validated already, "never mind": each zeroes 2 MiB
    done, calls = 0, 0
    while done < len(entries):
        result, reached = pvalidate(world, entries, start=done)
        assert result in (Result.SUCCESS, Result.INCOMPLETE)
        assert 0 < reached - done <= 2
        assert (result == Result.SUCCESS) == (reached == len(entries))
        done, calls = reached, calls + 1
    assert calls == 3
