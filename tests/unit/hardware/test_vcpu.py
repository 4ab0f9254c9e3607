# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vCPU: real machine code in memfds that another party writes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.formats.errors import ProtocolError, StateError
from svsm.formats.snp.vcpu_messages import Access, ExitCode, Kind, Memory, NestedFault, ack
from svsm.hardware import vcpu as vcpu_module
from svsm.hardware.vcpu import load_engine, run_vcpu
from tests.support import absent
from tests.unit.hardware.vcpu_rig import CODE, DATA, GUEST, GUEST_BYTES, TABLES, VcpuRig, registers

try:
    load_engine()
except StateError:  # an optional extra; CI installs it
    raise absent("unicorn is not installed") from None

HLT = b"\xf4"
VMGEXIT = b"\xf3\x0f\x01\xd9"
WRMSR = b"\x0f\x30"
RDMSR = b"\x0f\x32"
GHCB = 0xC0010130
FOREVER = b"\xeb\xfe"
PATTERN = {"rax": 1, "rbx": 1 << 63, "rcx": 3, "rdx": 4, "rsi": 5, "rdi": 6, "rbp": 7, "rsp": 8, "r8": 9, "r9": 10}
PATTERN |= {"r10": 11, "r11": 12, "r12": 13, "r13": 14, "r14": 15, "r15": (1 << 64) - 1, "fs_base": 17, "gs_base": 18}
OUTSIDE = 0x8000_0000
NPF = ExitCode.NESTED_PAGE_FAULT


@pytest.fixture
def rig() -> Iterator[VcpuRig]:
    with VcpuRig() as made:
        made.map(GUEST, GUEST_BYTES)
        yield made


def load(address: int) -> bytes:
    """mov rbx, address; mov al, [rbx]; hlt"""
    return b"\x48\xbb" + struct.pack("<Q", address) + b"\x8a\x03" + HLT


def store(address: int) -> bytes:
    """mov rbx, address; mov [rbx], al; hlt"""
    return b"\x48\xbb" + struct.pack("<Q", address) + b"\x88\x03" + HLT


def jump(address: int) -> bytes:
    """mov rbx, address; jmp rbx"""
    return b"\x48\xbb" + struct.pack("<Q", address) + b"\xff\xe3"


def start_counting(rig: VcpuRig, counter: int, body: bytes = b"", **changes: int) -> None:
    """Start `again: inc qword [rcx]; body; jmp again`, and wait until it counts: then it is known to run."""
    again = b"\x48\xff\x01" + body
    rig.poke(CODE, again + b"\xeb" + struct.pack("<b", -len(again) - 2))
    rig.start(registers(rcx=counter, **changes), time_limit_us=0)
    deadline = time.monotonic() + 30
    while rig.peek(counter, 8) == bytes(8):
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- exits and registers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "exit_code"), [(VMGEXIT, ExitCode.VMGEXIT), (HLT, ExitCode.HLT)])
def test_every_register_goes_in_and_comes_out(rig: VcpuRig, code: bytes, exit_code: ExitCode) -> None:
    before = registers(**PATTERN, ghcb_msr=0xABCD)
    rig.poke(CODE, code)
    message = rig.run(before)
    assert (message.exit_code, message.exit_info_1, message.exit_info_2) == (exit_code, 0, 0)
    assert message.registers == dataclasses.replace(before, rip=CODE + len(code))


def test_a_run_goes_on_where_the_last_one_stopped(rig: VcpuRig) -> None:
    message = rig.execute(VMGEXIT + b"\xff\xc0" + VMGEXIT, rax=5)
    message = rig.run(message.registers)
    assert (message.exit_code, message.registers.rax, message.registers.rip) == (ExitCode.VMGEXIT, 6, CODE + 10)


@pytest.mark.parametrize(
    ("code", "vector"),
    [(b"\x0f\x0b", 6), (b"\x0f\x01\xd9", 6), (b"\xcc", 3), (b"\x31\xc9\xf7\xf1", 0), (b"\xcd\x80", 0x80)],
    ids=["ud2", "vmmcall", "int3", "div", "int80"],
)
def test_exceptions_have_no_handler(rig: VcpuRig, code: bytes, vector: int) -> None:
    message = rig.execute(code + HLT)
    assert (message.exit_code, message.exit_info_1) == (ExitCode.SHUTDOWN, vector)
    for _ in range(2):
        assert rig.execute(load(0x10_0000_0000)).exit_info_1 == 14  # not a double fault of the one before
    assert rig.execute(VMGEXIT).exit_code == ExitCode.VMGEXIT


def test_page_fault_by_the_guests_own_tables(rig: VcpuRig) -> None:
    address = 0x10_0000_0000  # the rig's tables end at 8 GiB
    message = rig.execute(load(address))
    assert (message.exit_code, message.exit_info_1, message.exit_info_2) == (ExitCode.SHUTDOWN, 14, address)


@pytest.mark.parametrize("change", [{"efer": 0x1000}, {"efer": 0x1400}, {"cr0": 0x33}, {"cr0": 0x80000000}])
def test_only_64_bit_mode_with_paging(rig: VcpuRig, change: dict[str, int]) -> None:
    state = registers(**change)
    message = rig.run(state)
    assert (message.exit_code, message.registers) == (ExitCode.INVALID, state)


# --- the GHCB MSR ------------------------------------------------------------------------------------------------


def test_wrmsr_of_the_ghcb_msr_is_seen(rig: VcpuRig) -> None:
    message = rig.execute(WRMSR + VMGEXIT, rcx=GHCB, rax=0xFFFFFFFF_00000016, rdx=0xFFFFFFFF_00000002)
    assert message.registers.ghcb_msr == 2 << 32 | 0x16


def test_rdmsr_of_the_ghcb_msr_returns_what_the_host_left(rig: VcpuRig) -> None:
    message = rig.execute(RDMSR + VMGEXIT, rcx=GHCB, rax=1 << 40, rdx=1 << 40, ghcb_msr=0x12345678_00000017)
    assert (message.registers.rax, message.registers.rdx) == (0x17, 0x12345678)
    assert (message.exit_code, message.registers.rip) == (ExitCode.VMGEXIT, CODE + 6)


def test_write_then_read_in_one_block_and_twice(rig: VcpuRig) -> None:
    code = WRMSR + b"\x31\xc0\x31\xd2" + RDMSR + VMGEXIT
    for value in (0x16, 0x17):
        message = rig.execute(code, rcx=GHCB, rax=value, rdx=9)
        assert (message.registers.rax, message.registers.rdx, message.registers.ghcb_msr) == (value, 9, 9 << 32 | value)


def test_other_registers_do_not_touch_it(rig: VcpuRig) -> None:
    message = rig.execute(WRMSR + RDMSR + VMGEXIT, rcx=0xC0010131, rax=1, ghcb_msr=7)
    assert message.registers.ghcb_msr == 7


def test_the_opcode_inside_another_instruction_is_no_access(rig: VcpuRig) -> None:
    message = rig.execute(b"\xb8" + WRMSR + WRMSR + VMGEXIT, rcx=GHCB, ghcb_msr=7)
    assert (message.registers.ghcb_msr, message.registers.rax) == (7, 0x300F300F)


def test_more_sites_than_hooks_are_kept_for(rig: VcpuRig) -> None:
    code = b"".join(WRMSR + b"\xff\xc0\xeb\x00" for _ in range(600))
    message = rig.execute(code + VMGEXIT, rcx=GHCB, rax=0)
    assert (message.exit_code, message.registers.ghcb_msr, message.registers.rax) == (ExitCode.VMGEXIT, 599, 600)


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "bits", "rip"),
    [(load, NestedFault(0), CODE + 10), (store, NestedFault.WRITE, CODE + 10), (jump, NestedFault.FETCH, OUTSIDE)],
)
def test_what_is_not_mapped_is_a_fault(rig: VcpuRig, code: object, bits: NestedFault, rip: int) -> None:
    assert callable(code)
    message = rig.execute(code(OUTSIDE))
    assert (message.exit_code, message.exit_info_1, message.exit_info_2) == (NPF, bits | NestedFault.RMP, OUTSIDE)
    assert message.registers.rip == rip


@pytest.mark.parametrize(
    ("access", "code", "bits"),
    [
        (Access.READ, load, None),
        (Access.READ, store, NestedFault.WRITE | NestedFault.PRESENT),
        (Access.READ | Access.WRITE, store, None),
        (Access.READ | Access.WRITE, jump, NestedFault.FETCH | NestedFault.PRESENT),
        (Access.READ | Access.EXECUTE_SUPERVISOR, jump, None),
        (Access.READ | Access.EXECUTE_SUPERVISOR, store, NestedFault.WRITE | NestedFault.PRESENT),
        (Access.NONE, load, NestedFault(0)),
    ],
)
def test_permissions(rig: VcpuRig, access: Access, code: object, bits: NestedFault | None) -> None:
    assert callable(code)
    rig.map(DATA, 0x1000, access=access)
    rig.poke(DATA, HLT)
    message = rig.execute(code(DATA))
    if bits is None:
        assert message.exit_code == ExitCode.HLT
    else:
        assert (message.exit_code, message.exit_info_1) == (NPF, bits | NestedFault.RMP)
        assert message.exit_info_2 == DATA
        assert rig.peek(DATA, 1) == HLT


def test_shared_memory_is_data_only(rig: VcpuRig) -> None:
    rig.map(OUTSIDE, 0x1000, Memory.SHARED)
    rig.poke(OUTSIDE, HLT, Memory.SHARED)
    assert rig.execute(load(OUTSIDE)).registers.rax == 0xF4
    message = rig.execute(jump(OUTSIDE))
    assert (message.exit_code, message.exit_info_1) == (
        NPF,
        NestedFault.RMP | NestedFault.FETCH | NestedFault.PRESENT,
    )


def test_a_fault_names_the_guest_physical_address(rig: VcpuRig) -> None:
    rig.poke(TABLES + 0x1000 + 5 * 8, struct.pack("<Q", OUTSIDE | 0x83))  # 5 GiB → OUTSIDE
    message = rig.execute(load((5 << 30) + 0x123))
    assert (message.exit_code, message.exit_info_2) == (NPF, OUTSIDE + 0x123)


def test_an_access_across_the_end_of_what_is_mapped(rig: VcpuRig) -> None:
    rig.unmap(DATA + 0x1000, 0x1000)
    message = rig.execute(b"\x48\xbb" + struct.pack("<Q", DATA + 0xFFC) + b"\x48\x8b\x03" + HLT)
    assert (message.exit_code, message.exit_info_2 & ~0xFFF) == (NPF, DATA + 0x1000)


def test_a_hole_in_a_range_leaves_the_rest(rig: VcpuRig) -> None:
    rig.unmap(DATA, 0x1000)
    rig.unmap(DATA, 0x1000)
    assert rig.execute(load(DATA)).exit_code == NPF
    rig.poke(DATA - 1, b"\x77")
    rig.poke(DATA + 0x1000, b"\x78")
    assert rig.execute(load(DATA - 1)).registers.rax == 0x77
    assert rig.execute(load(DATA + 0x1000)).registers.rax == 0x78


def test_a_page_that_moves_to_shared_memory(rig: VcpuRig) -> None:
    rig.poke(DATA, b"\x11")
    rig.poke(DATA, b"\x22", Memory.SHARED)
    assert rig.execute(load(DATA)).registers.rax == 0x11
    rig.unmap(DATA, 0x1000)
    rig.map(DATA, 0x1000, Memory.SHARED)
    assert rig.execute(load(DATA)).registers.rax == 0x22
    rig.map(DATA, 0x1000, Memory.VMPL2)
    assert rig.execute(load(DATA)).registers.rax == 0x11


def test_the_process_maps_only_what_the_guest_sees(rig: VcpuRig) -> None:
    def mapped() -> int:
        total = 0
        for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[5].startswith("/memfd:VMPL2"):
                start, end = (int(value, 16) for value in fields[0].split("-"))
                total += end - start
        return total

    assert mapped() == GUEST_BYTES
    rig.unmap(DATA, 0x3000)
    assert mapped() == GUEST_BYTES - 0x3000
    rig.unmap(0, 1 << 48)
    assert mapped() == 0


# --- memory in more ranges than are mapped in advance ------------------------------------------------------------

PIECES = 0x5000_0000
PIECE_COUNT = 200
TARGET = 0x5100_0000


def cut_up(rig: VcpuRig) -> list[bytes]:
    """Pages that alternate between the two memories, and their contents."""
    contents = [bytes([index % 251 + 1]) * 0x1000 for index in range(PIECE_COUNT)]
    for index, content in enumerate(contents):
        memory = Memory.SHARED if index % 2 else Memory.VMPL2
        rig.poke(PIECES + index * 0x1000, content, memory)
        rig.map(PIECES + index * 0x1000, 0x1000, memory)
    rig.map(TARGET, 0x40_0000)
    return contents


def test_a_copy_over_all_pieces(rig: VcpuRig) -> None:
    contents = cut_up(rig)
    message = rig.execute(b"\xf3\x48\xa5" + HLT, rsi=PIECES, rdi=TARGET, rcx=PIECE_COUNT * 0x200)
    assert (message.exit_code, message.registers.rcx) == (ExitCode.HLT, 0)
    assert rig.peek(TARGET, PIECE_COUNT * 0x1000) == b"".join(contents)
    message = rig.execute(
        b"\xf3\x48\xa5" + HLT, rsi=TARGET, rdi=PIECES, rcx=PIECE_COUNT * 0x200
    )  # and with more active
    assert message.exit_code == ExitCode.HLT


def test_accesses_across_the_borders_of_pieces(rig: VcpuRig) -> None:
    contents = cut_up(rig)
    # loop: mov rax, [rbx]; add r8, rax; not rax; mov [rbx], rax; add rbx, 0x1000; dec rcx; jnz loop; hlt
    code = bytes.fromhex("488b03 4901c0 48f7d0 488903 4881c300100000 48ffc9 75e8") + HLT
    message = rig.execute(code, rbx=PIECES + 0xFFC, rcx=PIECE_COUNT - 1)
    words = [left[-4:] + right[:4] for left, right in itertools.pairwise(contents)]
    assert message.exit_code == ExitCode.HLT
    assert message.registers.r8 == sum(int.from_bytes(word, "little") for word in words) % (1 << 64)
    for index in (0, 1, 150, PIECE_COUNT - 2):
        border = PIECES + index * 0x1000 + 0xFFC
        first, second = (Memory.SHARED, Memory.VMPL2) if index % 2 else (Memory.VMPL2, Memory.SHARED)
        seen = rig.peek(border, 4, first) + rig.peek(border + 4, 4, second)
        assert seen == bytes(byte ^ 0xFF for byte in words[index])


def test_flags_survive_the_first_touch_of_a_piece(rig: VcpuRig) -> None:
    cut_up(rig)
    # cmp ecx, ecx (ZF=1); mov al, [rbx]; setz r8b; stc; mov [rbx+0x1000], al; setc r9b
    code = bytes.fromhex("39c9 8a03 410f94c0 f9 888300100000 410f92c1") + HLT
    message = rig.execute(code, rbx=PIECES + 0x1000 * (PIECE_COUNT - 4))
    assert (message.registers.r8, message.registers.r9) == (1, 1)


def test_code_in_pieces(rig: VcpuRig) -> None:
    cut_up(rig)
    for index in range(0, PIECE_COUNT, 2):  # inc eax; jmp two pages on
        last = index == PIECE_COUNT - 2
        rig.poke(PIECES + index * 0x1000, HLT if last else b"\xff\xc0\xe9" + struct.pack("<i", 0x2000 - 7))
    message = rig.run(registers(rip=PIECES))
    assert (message.exit_code, message.registers.rax) == (ExitCode.HLT, PIECE_COUNT // 2 - 1)


def test_page_tables_in_a_piece_that_is_not_mapped_yet(rig: VcpuRig) -> None:
    cut_up(rig)
    tables = PIECES + 0x1000 * (PIECE_COUNT - 2)
    rig.poke(tables, struct.pack("<Q", tables | 3) + struct.pack("<7Q", *(index << 30 | 0x83 for index in range(1, 8))))
    assert rig.execute(load(DATA), cr3=tables).exit_code == ExitCode.HLT
    rig.poke(TABLES + 8, struct.pack("<Q", tables - 0x2000 | 3))  # 512 GiB: tables that only data needs
    rig.poke(tables - 0x2000, struct.pack("<8Q", *(index << 30 | 0x83 for index in range(8))))
    rig.poke(DATA, b"\x99")
    message = rig.execute(load((1 << 39) + DATA))
    assert (message.exit_code, message.registers.rax) == (ExitCode.HLT, 0x99)


def test_what_is_denied_stays_denied_among_many_pieces(rig: VcpuRig) -> None:
    cut_up(rig)
    for index in (3, PIECE_COUNT - 3):
        address = PIECES + index * 0x1000
        assert rig.execute(store(address)).exit_code == ExitCode.HLT
        rig.unmap(address, 0x1000)
        message = rig.execute(store(address))
        assert (message.exit_code, message.exit_info_1) == (NPF, NestedFault.RMP | NestedFault.WRITE)
        rig.map(address, 0x1000, Memory.SHARED, Access.READ)
        message = rig.execute(store(address))
        assert message.exit_info_1 == NestedFault.RMP | NestedFault.WRITE | NestedFault.PRESENT


@pytest.mark.parametrize("change", ["unmap", "map"])
def test_changes_where_the_guests_tables_map_nothing(rig: VcpuRig, change: str) -> None:
    """Unicorn looks at the guest's own tables when memory goes away, and must not fault over what it finds there."""
    rig.map(PIECES, 0x10_0000)
    rig.poke(TABLES, struct.pack("<Q", 0) + bytes(510 * 8) + struct.pack("<Q", TABLES + 0x1000 | 3))
    rig.poke(CODE, FOREVER)
    rip = -(1 << 39) % (1 << 64) + CODE
    message = rig.run(registers(rip=rip), time_limit_us=3_000)
    assert message.exit_code == ExitCode.INTR
    for index in range(6):
        if change == "unmap":
            rig.unmap(PIECES + index * 0x2000, 0x1000)
        else:
            rig.map(PIECES + 0x20_0000 + index * 0x2000, 0x1000)
    rig.poke(CODE, VMGEXIT + b"\x0f\x0b")
    message = rig.run(message.registers)
    assert (message.exit_code, message.registers.rip) == (ExitCode.VMGEXIT, rip + 4)
    message = rig.run(message.registers)
    assert (message.exit_code, message.exit_info_1) == (ExitCode.SHUTDOWN, 6)


def test_many_pieces_cost_the_chip_little(rig: VcpuRig) -> None:
    started = time.monotonic()
    for index in range(0, 4096, 2):
        rig.map(PIECES + index * 0x1000, 0x1000)
    assert time.monotonic() - started < 10  # 0.1 s; mapped in advance it was minutes


def test_page_tables_that_the_guest_may_not_see(rig: VcpuRig) -> None:
    rig.unmap(TABLES + 0x1000, 0x1000)
    message = rig.execute(HLT)
    assert (message.exit_code, message.exit_info_1) == (NPF, NestedFault.RMP)
    assert message.exit_info_2 == TABLES + 0x1000 + 8


# --- what other processes do to memory ---------------------------------------------------------------------------


def test_code_written_by_another_process_is_executed(rig: VcpuRig) -> None:
    for value in range(20):
        message = rig.execute(b"\xb8" + struct.pack("<I", value) + VMGEXIT)
        assert message.registers.rax == value


def test_code_of_a_page_that_was_taken_and_given_back(rig: VcpuRig) -> None:
    rig.poke(DATA, b"\xb0\x01" + HLT)
    assert rig.execute(jump(DATA)).registers.rax == 1
    rig.unmap(DATA, 0x1000)
    rig.poke(DATA, b"\xb0\x02" + HLT)
    rig.map(DATA, 0x1000)
    assert rig.execute(jump(DATA)).registers.rax == 2


def test_page_tables_written_by_another_process_are_used(rig: VcpuRig) -> None:
    rig.poke(DATA, b"\x11")
    entry = TABLES + 0x1000 + 5 * 8
    rig.poke(entry, struct.pack("<Q", GUEST | 0x83))
    assert rig.execute(load((5 << 30) + DATA - GUEST)).registers.rax == 0x11
    rig.poke(entry, struct.pack("<Q", OUTSIDE | 0x83))
    assert rig.execute(load((5 << 30) + DATA - GUEST)).exit_code == NPF


# --- a guest that does not stop ----------------------------------------------------------------------------------


def test_time_limit(rig: VcpuRig) -> None:
    rig.poke(CODE, FOREVER)
    started = time.monotonic()
    message = rig.run(registers(), time_limit_us=20_000)
    assert (message.exit_code, message.registers.rip) == (ExitCode.INTR, CODE)
    assert 0.02 <= time.monotonic() - started < 2


def test_a_stopped_guest_goes_on(rig: VcpuRig) -> None:
    rig.poke(CODE, b"\xff\xc0" + b"\xeb\xfc")  # inc eax; jmp
    first = rig.run(registers(), time_limit_us=5_000)
    second = rig.run(first.registers, time_limit_us=5_000)
    assert 0 < first.registers.rax < second.registers.rax


def test_stop(rig: VcpuRig) -> None:
    start_counting(rig, DATA)
    rig.stop()
    assert rig.exit().exit_code == ExitCode.INTR


def test_stop_of_an_idle_vcpu_is_nothing(rig: VcpuRig) -> None:
    rig.stop()
    assert rig.execute(VMGEXIT).exit_code == ExitCode.VMGEXIT


def test_stop_ends_a_guest_made_of_new_msr_sites(rig: VcpuRig) -> None:
    """The block is searched, hooked and started again for each; a stop has to get through in between."""
    step = WRMSR + b"\xeb\x00"
    count = GUEST_BYTES // 2 // len(step)
    start = GUEST + GUEST_BYTES // 4
    code = step * count
    rig.poke(start, code + b"\xe9" + struct.pack("<i", -len(code) - 5))
    message = rig.run(registers(rip=start, rcx=GHCB), time_limit_us=30_000)
    assert message.exit_code == ExitCode.INTR


def test_unmap_reaches_a_running_guest(rig: VcpuRig) -> None:
    start_counting(rig, DATA)
    rig.unmap(DATA, 0x1000)
    after = rig.peek(DATA, 8)
    assert after != bytes(8)
    message = rig.exit()
    assert (message.exit_code, message.exit_info_2) == (NPF, DATA)
    assert rig.peek(DATA, 8) == after


def test_map_reaches_a_running_guest_that_goes_on(rig: VcpuRig) -> None:
    rig.poke(DATA, b"\x01", Memory.SHARED)
    start_counting(rig, DATA + 0x1000, b"\x80\x3b\x00" + b"\x74\x01" + HLT, rbx=DATA)  # until [rbx] != 0
    rig.map(DATA, 0x1000, Memory.SHARED)
    assert rig.exit().exit_code == ExitCode.HLT


# --- the process -------------------------------------------------------------------------------------------------


def test_hanging_up_ends_a_running_guest() -> None:
    rig = VcpuRig()
    rig.map(GUEST, GUEST_BYTES)
    start_counting(rig, DATA)
    rig.close()
    assert rig.failure is None


@pytest.mark.parametrize("data", [b"\0", b"\0" * 16, ack(1), b"\1" * 512])
def test_what_is_no_message_ends_the_process(data: bytes) -> None:
    rig = VcpuRig()
    rig.sock.send(data)
    assert rig.sock.recv(16) == b""
    rig.close()
    assert rig.failure is not None
    assert getattr(rig.failure, "code", "") in {"vcpu-message", "record-truncated", "record-length"}


def test_run_while_running_ends_the_process() -> None:
    rig = VcpuRig()
    rig.map(GUEST, GUEST_BYTES)
    rig.poke(CODE, FOREVER)
    rig.start(registers(), time_limit_us=0)
    rig.start(registers(), time_limit_us=0)
    assert rig.sock.recv(16) == b""
    rig.close()
    assert isinstance(rig.failure, ProtocolError)
    assert rig.failure.details["got"] == Kind.RUN


def test_without_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)
    vcpu_module._unicorn.cache_clear()
    try:
        with pytest.raises(StateError) as caught:
            run_vcpu(VcpuRig.__new__(VcpuRig), vmpl2_fd=-1, shared_fd=-1)  # type: ignore[arg-type]
    finally:
        vcpu_module._unicorn.cache_clear()
    assert caught.value.code == "guest-unicorn-missing"
    assert caught.value.hint is not None
    assert "svsm[guest]" in caught.value.hint


@pytest.mark.parametrize("confined", [False, True])
def test_a_vcpu_in_a_process_of_its_own(*, confined: bool) -> None:
    with VcpuRig(process=True, confined=confined) as rig:
        rig.map(GUEST, GUEST_BYTES)
        assert rig.execute(WRMSR + VMGEXIT, rcx=GHCB, rax=0x16).registers.ghcb_msr == 0x16
        assert rig.execute(load(OUTSIDE)).exit_code == NPF
        rig.unmap(DATA, 0x1000)
        rig.poke(CODE, FOREVER)
        assert rig.run(registers(), time_limit_us=5_000).exit_code == ExitCode.INTR
        assert os.path.exists(f"/proc/{rig.pid}")
