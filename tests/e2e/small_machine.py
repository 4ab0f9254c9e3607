# SPDX-License-Identifier: MIT OR Apache-2.0
"""A machine of three memfds, the real vCPU process, and as much of chip and host as the guest's calls need.

It stands between `RequestLoop` and `run_vcpu` where the simulated chip's own process stands in a boot: pages that
the kernel validates and grants are moved between memories and mapped in the vCPU; the "host" answers a VMPL switch
in the GHCB MSR. Single-threaded: `step` waits for the next exit of the guest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from svsm.abi.errors import ProtocolError
from svsm.abi.platform import PAGE_SIZE, Gpa, Permission, Vmpl
from svsm.formats.guest_mailbox import DATA_OFFSET, DONE_OFFSET, MAILBOX_BYTES, MailboxControl, MailboxFlags
from svsm.formats.record import Buffer
from svsm.formats.snp.vcpu_messages import Access, ExitCode, Memory, Registers
from svsm.formats.snp.vmsa import VmsaView
from svsm.kernel.guest_stub import GuestImage, build_guest_image
from svsm.kernel.protocols.core import core_protocol
from svsm.kernel.protocols.guest_memory import GuestMemory, Region, VcpuArea
from svsm.kernel.protocols.table import ProtocolTable
from svsm.kernel.protocols.vtpm import Tpm, vtpm_protocol
from svsm.kernel.requests import GuestState, RequestLoop
from tests.unit.hardware.vcpu_rig import VcpuRig

__all__ = ["BASE", "LENGTH", "MAILBOX", "Machine", "Outcome"]

BASE = Gpa(0x4000_0000)
LENGTH = 1 << 20
MAILBOX = Gpa(0x3000_0000)
VMSA = Gpa(0x0900_0000)
_FROM_VMSA = [name for name in Registers.__dataclass_fields__ if name not in {"fs_base", "gs_base", "ghcb_msr"}]
_SVME = 1 << 12


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one mailbox request brought back."""

    control: MailboxControl
    data: bytes

    @property
    def registers(self) -> tuple[int, int, int, int]:
        """RAX, RCX, RDX, R8."""
        control = self.control
        return control.result_rax, control.result_rcx, control.result_rdx, control.result_r8


class Machine:
    """See the module; it is a Platform too."""

    def __init__(self, tpm: Tpm | None = None, *, process: bool = True) -> None:
        self.rig = VcpuRig(process=process)
        self.private: dict[int, bytearray] = {VMSA: bytearray(PAGE_SIZE)}
        self.vmpl2: set[int] = set()
        self.shared = set(range(MAILBOX, MAILBOX + MAILBOX_BYTES, PAGE_SIZE))
        self.ghcb_msr = 0
        self.exits = 0
        self.rig.map(MAILBOX, MAILBOX_BYTES, Memory.SHARED, Access.READ | Access.WRITE)
        self.rig.map(BASE, LENGTH)
        self.vmpl2.update(range(BASE, BASE + LENGTH, PAGE_SIZE))
        self.image: GuestImage = build_guest_image(base_gpa=BASE, mailbox_gpa=MAILBOX)
        for gpa, page in self.image.pages.items():
            self.write(gpa, page)
        self.private[VMSA][:] = self.image.vmsa_page()
        memory = GuestMemory(self, [Region(BASE, LENGTH)])
        memory.register(VcpuArea(VMSA, self.image.calling_area_gpa))
        table = ProtocolTable([])
        table.add(core_protocol(self, memory, table))
        if tpm is not None:
            table.add(vtpm_protocol(memory, tpm))
        self.loop = RequestLoop(self, memory, table, VMSA)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.rig.close()

    # --- the test's side -------------------------------------------------------------------------------------

    def request(self, control: MailboxControl, data: bytes = b"", *, idle: Callable[[], None] | None = None) -> Outcome:
        """Put a request into the mailbox and run the guest until it has answered or cannot go on.

        Args:
            idle: Called while the vCPU waits for a service's answer.
        """
        self.rig.poke(MAILBOX + DATA_OFFSET, data, Memory.SHARED)
        done = int.from_bytes(self.rig.peek(MAILBOX + DONE_OFFSET, 8, Memory.SHARED), "little")
        self.rig.poke(MAILBOX, control.replace(request=done + 1, done=done).pack(), Memory.SHARED)
        if self.loop.state is GuestState.NOT_STARTED:
            self.loop.start()
        else:
            self.loop.resume()
        while self.loop.state in {GuestState.RUNNING, GuestState.SERVING}:
            if self.loop.state is GuestState.RUNNING:
                self.step()
            elif idle is not None:
                idle()
        return Outcome(
            MailboxControl.parse(self.rig.peek(MAILBOX, MailboxControl.SIZE, Memory.SHARED)),
            self.rig.peek(MAILBOX + DATA_OFFSET, PAGE_SIZE, Memory.SHARED),
        )

    def call(self, rax: int, rcx: int = 0, rdx: int = 0, r8: int = 0) -> Outcome:
        """One SVSM call with these registers."""
        flags = MailboxFlags.CALL | MailboxFlags.PENDING
        return self.request(MailboxControl(flags=flags, rax=rax, rcx=rcx, rdx=rdx, r8=r8))

    def step(self) -> None:
        """Wait for the running guest's exit and let the request loop handle it."""
        message = self.rig.exit()
        self.exits += 1
        view = VmsaView(self.private[VMSA])
        for name in _FROM_VMSA:
            view.set(name, getattr(message.registers, name))
        view.set("guest_exit_code", message.exit_code)
        view.set("guest_exit_info_1", message.exit_info_1)
        view.set("guest_exit_info_2", message.exit_info_2)
        self.ghcb_msr = message.registers.ghcb_msr
        if message.exit_code == ExitCode.VMGEXIT and self.ghcb_msr & 0xFFF == 0x16:
            self.ghcb_msr = 0x17  # the host: "switched"
        self.loop.on_exit()

    # --- Platform --------------------------------------------------------------------------------------------

    def _where(self, gpa: int) -> Memory | None:
        page = gpa & ~(PAGE_SIZE - 1)
        if page in self.private:
            return None
        if page in self.vmpl2:
            return Memory.VMPL2
        if page in self.shared:
            return Memory.SHARED
        raise ProtocolError("not validated", code="platform-not-validated", gpa=gpa)

    def read(self, gpa: Gpa, length: int) -> bytes:
        memory = self._where(gpa)
        if memory is None:
            offset = gpa % PAGE_SIZE
            return bytes(self.private[gpa - offset][offset : offset + length])
        return self.rig.peek(gpa, length, memory)

    def write(self, gpa: Gpa, data: Buffer) -> None:
        memory = self._where(gpa)
        if memory is None:
            offset = gpa % PAGE_SIZE
            self.private[gpa - offset][offset : offset + len(data)] = data
        else:
            self.rig.poke(gpa, bytes(data), memory)

    def validate(self, gpa: Gpa, *, size_bytes: int, validated: bool) -> bool:
        if size_bytes != PAGE_SIZE:
            raise ProtocolError("small pages only", code="platform-instruction", instruction_code=6)
        known = gpa in self.private or gpa in self.vmpl2
        if known == validated:
            return False
        if validated:
            self.private[gpa] = bytearray(b"\xee" * PAGE_SIZE)  # not zero: that is for the protocol to do
        else:
            self.private.pop(gpa, None)
            self.vmpl2.discard(gpa)
        return True

    def adjust(self, gpa: Gpa, *, size_bytes: int, vmpl: Vmpl, permissions: Permission, vmsa: bool) -> None:
        self._where(gpa)
        if vmpl != 2:
            return
        content = self.read(gpa, PAGE_SIZE)
        if permissions:
            self.private.pop(gpa, None)
            self.vmpl2.add(gpa)
            self.rig.poke(gpa, content)
            self.rig.map(gpa, PAGE_SIZE, Memory.VMPL2, Access(int(permissions)))
        else:
            self.rig.unmap(gpa, PAGE_SIZE)
            self.vmpl2.discard(gpa)
            self.private[gpa] = bytearray(content)
            self.rig.poke(gpa, bytes(PAGE_SIZE))

    def run_guest(self, vmsa_gpa: Gpa) -> None:
        view = VmsaView(self.private[vmsa_gpa])
        if not view.get("efer") & _SVME:
            raise AssertionError("VMRUN of a VMSA that the SVSM works on")
        state = {name: view.get(name) for name in _FROM_VMSA}
        self.rig.start(
            Registers(**state, fs_base=view.get("fs.base"), gs_base=view.get("gs.base"), ghcb_msr=self.ghcb_msr)
        )
