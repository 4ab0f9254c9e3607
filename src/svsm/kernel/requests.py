# SPDX-License-Identifier: MIT OR Apache-2.0
"""The request loop: what the SVSM does each time a guest vCPU stops (AMD 58019 §4).

    start ──▶ RUNNING ──exit──▶ a call?  ──yes──▶ SERVING ──reply──▶ RUNNING
                 ▲                 │ no                 (at once, or whenever the service answers)
                 ├──── spurious, interrupted ◀──┤
                 └── resume ── HALTED ◀── HLT ──┤
                               STOPPED ◀── fault, shutdown: for good

An exit is a call only if the VMSA says VMGEXIT *and* the calling area's call_pending was 1; call_pending is cleared
before anything is served. While the SVSM works on a VMSA its EFER.SVME is clear, which keeps the host from running
that vCPU; it is set again just before re-entry, as the last thing that is written. A host may have run the vCPU again
before it said that it had stopped: that shows as a VMSA in use, and such a guest is stopped. Otherwise the registers
that the SVSM writes back would undo what the guest has done meanwhile. Inputs that a call does not change come back
unchanged.

Nothing here waits: `on_exit` handles one exit and returns, `Call.complete` continues a call later. What the guest
does wrong ends in a result code or, where it can get no answer, in STOPPED with a reason; it never ends the kernel.
A guest that cannot go on (a nested page fault on a page it has no right to, a triple fault, an unreadable calling
area) is not re-entered: it would only exit again. The hardware's failure (`BackendError`) does pass through.
"""

from __future__ import annotations

import enum
from typing import Final

from svsm.abi.errors import BackendError, StateError, SvsmError
from svsm.abi.platform import PAGE_SIZE, Gpa, Permission
from svsm.formats.snp.vmsa import VMSA_FIELDS, VmsaView
from svsm.kernel.protocols.core import GUEST_VMPL
from svsm.kernel.protocols.guest_memory import CALLING_AREA_BYTES, GuestMemory, GuestPlatform
from svsm.kernel.protocols.table import Call, ProtocolTable, Reply

__all__ = ["EXIT_HLT", "EXIT_INTR", "EXIT_NONE", "EXIT_VMGEXIT", "GuestState", "RequestLoop"]

EXIT_INTR: Final = 0x60
EXIT_HLT: Final = 0x78
EXIT_VMGEXIT: Final = 0x403
EXIT_NONE: Final = (1 << 64) - 1
"""In a VMSA that runs, or will: there has been no exit."""
_EFER_SVME: Final = 1 << 12
_EFER_OFFSET: Final = VMSA_FIELDS["efer"][0]
_EFER_BYTES: Final = VMSA_FIELDS["efer"][1]
_MAX_TAKES: Final = 4
"""Tries to take a VMSA: the hardware may be storing an exit at the same moment, once."""


class GuestState(enum.Enum):
    """What one guest vCPU is doing."""

    NOT_STARTED = "not-started"
    RUNNING = "running"
    SERVING = "serving"
    """Stopped in a call that a service has not answered yet."""
    HALTED = "halted"
    """It executed HLT and waits for `resume`."""
    STOPPED = "stopped"


class RequestLoop:
    """One guest vCPU.

    Args:
        platform: Runs it.
        memory: The guest's memory; the vCPU is registered there, with its calling area.
        table: The protocols that it may call.
        vmsa_gpa: Which vCPU.
    """

    def __init__(self, platform: GuestPlatform, memory: GuestMemory, table: ProtocolTable, vmsa_gpa: Gpa) -> None:
        self._platform = platform
        self._memory = memory
        self._table = table
        self._vmsa_gpa = vmsa_gpa
        self._page = bytearray(PAGE_SIZE)
        self.state = GuestState.NOT_STARTED
        self.stop_reason: str | None = None
        """Why the state is STOPPED; not secret."""
        self.calls_served = 0

    def start(self) -> None:
        """Run the vCPU for the first time.

        Raises:
            StateError: ``guest-state`` when it has been started.
        """
        self._demand(GuestState.NOT_STARTED)
        if self._load() is not None:
            self._enter()

    def resume(self) -> None:
        """Let a halted vCPU go on: something has happened that it may want to see.

        Raises:
            StateError: ``guest-state`` when it is not halted.
        """
        self._demand(GuestState.HALTED)
        self._enter()

    def on_exit(self) -> None:
        """The vCPU has stopped (`Platform.guest_exit` said so): serve its call, or decide what else to do.

        Raises:
            StateError: ``guest-state`` when it was not running.
        """
        self._demand(GuestState.RUNNING)
        vmsa = self._load()
        if vmsa is None:
            return
        code = vmsa.get("guest_exit_code")
        if code == EXIT_HLT:
            self.state = GuestState.HALTED
        elif code == EXIT_VMGEXIT:
            self._on_vmgexit(vmsa)
        elif code == EXIT_INTR:
            self._enter()
        else:
            self._stop(f"exit code {code:#x}, {vmsa.get('guest_exit_info_1'):#x}, {vmsa.get('guest_exit_info_2'):#x}")

    def _on_vmgexit(self, vmsa: VmsaView) -> None:
        try:
            pending = self._take_call_pending()
        except BackendError:
            raise
        except SvsmError as error:
            self._stop(f"calling area not accessible: {error.code}")
            return
        if not pending:
            self._enter()
            return
        self.state = GuestState.SERVING
        call = Call(
            rax=vmsa.get("rax"),
            rcx=vmsa.get("rcx"),
            rdx=vmsa.get("rdx"),
            r8=vmsa.get("r8"),
            r9=vmsa.get("r9"),
            vmsa_gpa=self._vmsa_gpa,
            finish=self._finish,
        )
        reply = self._table.dispatch(call)
        if reply is not None:
            call.complete(reply)

    def _take_call_pending(self) -> bool:
        area = self._memory.calling_area(self._vmsa_gpa)
        pending = self._memory.read(area, CALLING_AREA_BYTES)[0]
        if pending != 1:
            return False
        self._memory.write(area, b"\0")
        return True

    def _finish(self, reply: Reply) -> None:
        self._demand(GuestState.SERVING)
        vmsa = VmsaView(self._page)
        vmsa.set("rax", reply.result)
        for name, value in (("rcx", reply.rcx), ("rdx", reply.rdx), ("r8", reply.r8)):
            if value is not None:
                vmsa.set(name, value)
        self.calls_served += 1
        try:
            self._enter()
        except BackendError as error:
            # An answer may come from a service's callback, where nobody else waits for this host. A host that does
            # not run the vCPU harms its own guest; a machine that has failed is everybody's end.
            if not error.code.startswith("platform-host"):
                raise
            self._stop(f"the host does not run the vCPU: {error.code}")

    # --- the VMSA --------------------------------------------------------------------------------------------

    def _load(self) -> VmsaView | None:
        """Take the VMSA into our hands: clear EFER.SVME in it, see that it is not in use, then read it.

        None when the host runs it now; the guest is stopped then.
        """
        vmsa = VmsaView(self._page)
        for _ in range(_MAX_TAKES):
            self._page[:] = self._platform.read(self._vmsa_gpa, PAGE_SIZE)
            if not vmsa.get("efer") & _EFER_SVME and self._is_idle():
                # Nobody can have entered it since it was clear, so what follows the question is final.
                self._page[:] = self._platform.read(self._vmsa_gpa, PAGE_SIZE)
                if not vmsa.get("efer") & _EFER_SVME:
                    return vmsa
            self._write_efer(vmsa.get("efer") & ~_EFER_SVME)
        self._stop("the host runs the vCPU while the SVSM works on it")
        return None

    def _is_idle(self) -> bool:
        """RMPADJUST that changes nothing: it fails for the VMSA of a vCPU that runs."""
        try:
            self._platform.adjust(
                self._vmsa_gpa, size_bytes=PAGE_SIZE, vmpl=GUEST_VMPL, permissions=Permission.NONE, vmsa=True
            )
        except BackendError:
            raise
        except SvsmError:
            return False
        return True

    def _write_efer(self, value: int) -> None:
        self._platform.write(Gpa(self._vmsa_gpa + _EFER_OFFSET), value.to_bytes(_EFER_BYTES, "little"))

    def _enter(self) -> None:
        vmsa = VmsaView(self._page)
        vmsa.set("guest_exit_code", EXIT_NONE)
        self._platform.write(self._vmsa_gpa, self._page)
        # From here on the host can run it; nothing else may be written.
        self._write_efer(vmsa.get("efer") | _EFER_SVME)
        self.state = GuestState.RUNNING
        self._platform.run_guest(self._vmsa_gpa)

    def _stop(self, reason: str) -> None:
        self.state = GuestState.STOPPED
        self.stop_reason = reason

    def _demand(self, state: GuestState) -> None:
        if self.state is not state:
            raise StateError(
                "the vCPU is not in the state for this", code="guest-state", expected=state.value, got=self.state.value
            )
