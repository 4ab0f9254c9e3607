# SPDX-License-Identifier: MIT OR Apache-2.0
"""The request loop: what is a call, what comes back, and what happens to everything else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.abi.errors import BackendError, ProtocolError, StateError
from svsm.abi.platform import PAGE_SIZE, Gpa
from svsm.formats.snp.vmsa import VmsaView
from svsm.kernel.protocols.table import Call, Reply, Result, Row, SvsmProtocol
from svsm.kernel.requests import GuestState, RequestLoop
from tests.unit.kernel.guest_platform import BASE, CALLING_AREA, VMSA, World
from tests.unit.kernel.test_vtpm_protocol import EchoTpm, request

SVME = 1 << 12
VMGEXIT = 0x403
QUERY_CORE = {"rax": 6, "rcx": 1}


class Guest:
    """A world with a started request loop, and the vCPU's part played by hand."""

    def __init__(self, tpm: EchoTpm | None = None) -> None:
        self.world = World.make(tpm)
        self.world.vmsa().set("efer", 0xD00 | SVME)
        self.loop = RequestLoop(self.world.platform, self.world.memory, self.world.table, VMSA)
        self.loop.start()

    def exit(self, *, code: int = VMGEXIT, pending: int = 1, **registers: int) -> VmsaView:
        """The vCPU stops with these registers."""
        vmsa = self.world.vmsa()
        vmsa.set("guest_exit_code", code)
        for name, value in registers.items():
            vmsa.set(name, value)
        self.world.poke(CALLING_AREA, bytes([pending]))
        self.loop.on_exit()
        return self.world.vmsa()


def test_start_enters_the_guest() -> None:
    guest = Guest()
    assert (guest.loop.state, guest.world.platform.runs) == (GuestState.RUNNING, 1)
    assert guest.world.vmsa().get("efer") & SVME


def test_a_call_is_answered_in_the_registers() -> None:
    guest = Guest()
    registers = {"rdx": 0x1111, "r8": 0x2222, "r9": 0x3333, "rbx": 0x4444, "rip": 0x5555}
    vmsa = guest.exit(**QUERY_CORE, **registers)
    assert (vmsa.get("rax"), vmsa.get("rcx")) == (Result.SUCCESS, 1 << 32 | 1)
    assert {name: vmsa.get(name) for name in registers} == registers
    assert guest.world.peek(CALLING_AREA, 1) == b"\0"
    assert (guest.loop.state, guest.loop.calls_served, guest.world.platform.runs) == (GuestState.RUNNING, 1, 2)


@pytest.mark.parametrize("pending", [0, 2, 0x80, 0xFF])
def test_vmgexit_without_a_pending_call_is_spurious(pending: int) -> None:
    guest = Guest()
    vmsa = guest.exit(pending=pending, **QUERY_CORE)
    assert (vmsa.get("rax"), vmsa.get("rcx")) == (6, 1)
    assert guest.world.peek(CALLING_AREA, 1)[0] == pending
    assert (guest.loop.state, guest.loop.calls_served, guest.world.platform.runs) == (GuestState.RUNNING, 0, 2)


def test_an_interrupted_guest_goes_on_and_its_pending_call_stays() -> None:
    guest = Guest()
    vmsa = guest.exit(code=0x60, **QUERY_CORE)
    assert vmsa.get("rax") == 6
    assert guest.world.peek(CALLING_AREA, 1) == b"\1"
    assert (guest.loop.state, guest.world.platform.runs) == (GuestState.RUNNING, 2)


def test_hlt_waits_for_resume() -> None:
    guest = Guest()
    vmsa = guest.exit(code=0x78, **QUERY_CORE)
    assert (guest.loop.state, guest.world.platform.runs, vmsa.get("efer") & SVME) == (GuestState.HALTED, 1, 0)
    guest.loop.resume()
    assert (guest.loop.state, guest.world.platform.runs) == (GuestState.RUNNING, 2)
    with pytest.raises(StateError):
        guest.loop.resume()


@pytest.mark.parametrize("code", [0x7F, 0x400, 0x401, 0, 0x403 | 1 << 32, (1 << 64) - 1])
def test_other_exits_stop_the_guest(code: int) -> None:
    guest = Guest()
    vmsa = guest.exit(code=code, guest_exit_info_1=0x11, guest_exit_info_2=0x22)
    assert (guest.loop.state, guest.world.platform.runs, vmsa.get("efer") & SVME) == (GuestState.STOPPED, 1, 0)
    assert guest.loop.stop_reason is not None
    assert hex(code) in guest.loop.stop_reason
    with pytest.raises(StateError):
        guest.loop.on_exit()


def test_an_unreadable_calling_area_stops_the_guest() -> None:
    guest = Guest()
    guest.world.platform.refuse["read", CALLING_AREA] = ProtocolError("no", code="platform-not-validated")
    guest.exit()
    assert guest.loop.state is GuestState.STOPPED
    assert guest.loop.stop_reason == "calling area not accessible: platform-not-validated"


def test_svme_is_clear_and_call_pending_cleared_while_a_call_is_served() -> None:
    guest = Guest()
    seen: list[tuple[int, bytes]] = []

    def look(_call: Call) -> Reply:
        seen.append((guest.world.vmsa().get("efer"), guest.world.peek(CALLING_AREA, 1)))
        return Reply(Result.SUCCESS, rdx=5, r8=6)

    guest.world.table.add(SvsmProtocol(number=7, name="test", calls={3: Row("LOOK", look)}))
    vmsa = guest.exit(rax=7 << 32 | 3, rcx=9)
    assert seen == [(0xD00, b"\0")]
    assert vmsa.get("efer") == 0xD00 | SVME
    assert [vmsa.get(name) for name in ("rax", "rcx", "rdx", "r8")] == [0, 9, 5, 6]


def _in_use() -> ProtocolError:
    return ProtocolError("in use", code="platform-instruction", instruction_code=3)


def test_a_vcpu_that_the_host_runs_again_is_not_written_over() -> None:
    guest = Guest()
    guest.world.platform.refuse["revoke", VMSA] = _in_use()
    before = {"rax": 6, "rcx": 1, "rip": 0x7777}
    vmsa = guest.exit(**before)
    assert guest.loop.state is GuestState.STOPPED
    assert "host runs the vCPU" in (guest.loop.stop_reason or "")
    assert {name: vmsa.get(name) for name in before} == before
    assert guest.world.peek(CALLING_AREA, 1) == b"\1"
    assert guest.world.platform.runs == 1


def test_an_exit_that_is_stored_while_the_vmsa_is_taken_is_the_one_that_counts() -> None:
    guest = Guest()
    platform = guest.world.platform
    adjust = platform.adjust

    def store(*arguments: Any, **more: Any) -> None:
        # The hardware finishes storing an exit (EFER.SVME and all) before it answers the instruction.
        platform.adjust = adjust  # type: ignore[method-assign]
        vmsa = guest.world.vmsa()
        vmsa.set("efer", vmsa.get("efer") | SVME)
        vmsa.set("rcx", 2 << 32 | 1)
        adjust(*arguments, **more)

    platform.adjust = store  # type: ignore[method-assign]
    vmsa = guest.exit(**QUERY_CORE)
    assert (vmsa.get("rax"), vmsa.get("rcx")) == (Result.SUCCESS, 0)  # there is no protocol 2 here
    assert guest.loop.state is GuestState.RUNNING


def test_nothing_is_written_once_the_host_can_run_the_vcpu() -> None:
    guest = Guest()
    guest.exit(**QUERY_CORE)
    log = guest.world.platform.log
    assert log[-3:] == [("write", VMSA), ("write", VMSA + 0xD0), ("run", VMSA)]
    assert guest.world.vmsa().get("guest_exit_code") == (1 << 64) - 1


def test_all_four_inputs_reach_the_handler() -> None:
    guest = Guest()
    seen: list[tuple[int, ...]] = []

    def look(call: Call) -> Reply:
        seen.append((call.protocol, call.number, call.rcx, call.rdx, call.r8, call.r9, call.vmsa_gpa))
        return Reply(Result.SUCCESS)

    guest.world.table.add(SvsmProtocol(number=0xFFFFFFFE, name="test", calls={0xFFFFFFFD: Row("LOOK", look)}))
    guest.exit(rax=0xFFFFFFFE_FFFFFFFD, rcx=1, rdx=2, r8=3, r9=(1 << 64) - 1)
    assert seen == [(0xFFFFFFFE, 0xFFFFFFFD, 1, 2, 3, (1 << 64) - 1, VMSA)]


def test_a_call_that_completes_later_keeps_the_vcpu_stopped() -> None:
    tpm = EchoTpm()
    tpm.later = True
    guest = Guest(tpm)
    request(guest.world, at=BASE + 0x10_0000)
    vmsa = guest.exit(rax=2 << 32 | 1, rcx=BASE + 0x10_0000, rdx=7)
    assert (guest.loop.state, guest.world.platform.runs, vmsa.get("efer") & SVME) == (GuestState.SERVING, 1, 0)
    tpm.waiting[0](b"\x80\x01\0\0\0\x0a\0\0\0\0")
    assert (guest.loop.state, guest.world.platform.runs, vmsa.get("efer") & SVME) == (GuestState.RUNNING, 2, SVME)
    assert [vmsa.get(name) for name in ("rax", "rcx", "rdx")] == [0, BASE + 0x10_0000, 7]


def test_calls_after_a_remap_use_the_new_area() -> None:
    guest = Guest()
    new_area = BASE + 0x10_0000
    assert guest.exit(rax=0, rcx=new_area).get("rax") == Result.SUCCESS
    guest.exit(**QUERY_CORE)  # pending in the old area only
    assert guest.loop.calls_served == 1
    guest.world.poke(new_area, b"\1")
    guest.exit(pending=0, **QUERY_CORE)
    assert guest.loop.calls_served == 2


def test_the_vmsa_is_no_buffer_for_a_tpm_response() -> None:
    """Otherwise a guest could have the SVSM write the VMSA, and with it the guest's own privilege level."""
    guest = Guest(EchoTpm(b"\xff" * 4092))
    request(guest.world, at=VMSA - 8)
    before = guest.world.peek(VMSA, PAGE_SIZE)
    vmsa = guest.exit(rax=2 << 32 | 1, rcx=VMSA - 8)
    assert vmsa.get("rax") == Result.INVALID_ADDRESS
    assert guest.world.peek(VMSA + 0xCA, 1) == before[0xCA:0xCB]


@given(st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1) | st.integers(BASE, BASE + 0xFFFF)] * 5), max_size=5))
def test_any_registers_end_in_a_result_code(calls: list[tuple[int, ...]]) -> None:
    guest = Guest(EchoTpm())
    for rax, rcx, rdx, r8, r9 in calls:
        area = guest.world.memory.calling_area(VMSA)
        guest.world.poke(area, b"\1")
        known = (rax >> 62) << 32 | rax & 7
        vmsa = guest.exit(rax=known, rcx=rcx, rdx=rdx, r8=r8, r9=r9)
        assert vmsa.get("rax") == 0 or vmsa.get("rax") >> 31 == 1
        assert guest.loop.state is GuestState.RUNNING


@pytest.mark.parametrize("code", ["platform-host-deadline", "platform-host-gone", "platform-host-refused"])
def test_a_host_that_does_not_run_the_vcpu_harms_its_own_guest_only(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()

    def refuse(vmsa_gpa: Gpa) -> None:
        raise BackendError("the host does not answer", code=code)

    monkeypatch.setattr(guest.world.platform, "run_guest", refuse)
    guest.exit(**QUERY_CORE)
    assert guest.loop.state is GuestState.STOPPED
    assert code in str(guest.loop.stop_reason)


def test_a_machine_that_failed_is_everybodys_end(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()

    def fail(vmsa_gpa: Gpa) -> None:
        raise BackendError("the hardware is gone", code="platform-hardware")

    monkeypatch.setattr(guest.world.platform, "run_guest", fail)
    with pytest.raises(BackendError):
        guest.exit(**QUERY_CORE)
