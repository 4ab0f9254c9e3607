# SPDX-License-Identifier: MIT OR Apache-2.0
"""The guest at VMPL2: its memory, its first vCPU, and the loop that serves its calls.

The kernel takes the pages of the guest's image from the host, validates them, fills them and gives them to VMPL2;
what of the guest's memory it has not validated the guest accepts itself, by PVALIDATE calls. The vCPU's VMSA is a
private page outside the guest's memory map: a guest that could write it would choose its own privilege level.
"""

from __future__ import annotations

from typing import Final

from svsm.abi.platform import PAGE_SIZE, Gpa, Permission, Platform, Vmpl
from svsm.kernel.guest_stub import GuestImage, build_guest_image
from svsm.kernel.protocols.core import core_protocol
from svsm.kernel.protocols.guest_memory import GuestMemory, Region, VcpuArea
from svsm.kernel.protocols.table import ProtocolTable
from svsm.kernel.protocols.vtpm import Tpm, vtpm_protocol
from svsm.kernel.requests import GuestState, RequestLoop

__all__ = ["GUEST_BASE", "GUEST_BYTES", "MAILBOX_GPA", "Guest"]

GUEST_BASE: Final = Gpa(0x4000_0000)
GUEST_BYTES: Final = 16 << 20
MAILBOX_GPA: Final = Gpa(0x3008_0000)
"""In the range that stays shared, where the host writes it."""
_VMSA_GPA: Final = Gpa(0x0700_0000)
_SMALL_PAGES_BYTES: Final = 256 << 10
"""Of the guest's memory, the part that comes in 4 KiB pages; the rest is 2 MiB pages."""
_LARGE_PAGE: Final = 2 << 20
_GUEST_VMPL: Final = Vmpl(2)


class Guest:
    """One guest with one vCPU.

    Args:
        platform: The hardware.
        tpm: The guest's TPM, or None: then the vTPM protocol does not exist.
        launch_vmsa_gpa: The kernel's own VMSA page, which no call may name.
    """

    def __init__(self, platform: Platform, *, tpm: Tpm | None, launch_vmsa_gpa: Gpa) -> None:
        self._platform = platform
        self._interrupted = False
        image = build_guest_image(base_gpa=GUEST_BASE, mailbox_gpa=MAILBOX_GPA)
        self._load(image)
        memory = GuestMemory(platform, [Region(GUEST_BASE, GUEST_BYTES)], protected=[launch_vmsa_gpa])
        memory.register(VcpuArea(vmsa_gpa=_VMSA_GPA, calling_area_gpa=image.calling_area_gpa))
        table = ProtocolTable([])
        table.add(core_protocol(platform, memory, table))
        if tpm is not None:
            table.add(vtpm_protocol(memory, tpm))
        self._loop = RequestLoop(platform, memory, table, _VMSA_GPA)

    def _load(self, image: GuestImage) -> None:
        platform = self._platform
        platform.change_state(GUEST_BASE, size_bytes=_SMALL_PAGES_BYTES, private=True)
        large = Gpa(GUEST_BASE + _LARGE_PAGE)
        platform.change_state(large, size_bytes=GUEST_BYTES - _LARGE_PAGE, private=True)
        for gpa, contents in image.pages.items():
            platform.validate(gpa, size_bytes=PAGE_SIZE, validated=True)
            platform.write(gpa, contents)
            platform.adjust(gpa, size_bytes=PAGE_SIZE, vmpl=_GUEST_VMPL, permissions=Permission.ALL, vmsa=False)
        platform.change_state(_VMSA_GPA, size_bytes=PAGE_SIZE, private=True)
        platform.validate(_VMSA_GPA, size_bytes=PAGE_SIZE, validated=True)
        platform.write(_VMSA_GPA, image.vmsa_page())
        platform.adjust(_VMSA_GPA, size_bytes=PAGE_SIZE, vmpl=_GUEST_VMPL, permissions=Permission.NONE, vmsa=True)

    def start(self) -> None:
        """Run its vCPU for the first time."""
        self._loop.start()

    @property
    def stopped(self) -> str | None:
        """Why the guest does not run any more, or None."""
        return self._loop.stop_reason if self._loop.state is GuestState.STOPPED else None

    def on_hardware_event(self) -> None:
        """The hardware or the host has something: serve the vCPU's exit, let a halted vCPU go on.

        An interrupt that comes while the vCPU runs is remembered until it halts, or a wake-up could be lost between
        the guest's last look into its mailbox and its HLT.

        Raises:
            BackendError: The machine failed underneath.
        """
        self._interrupted = self._platform.take_interrupt() or self._interrupted
        if self._loop.state is GuestState.RUNNING and self._platform.guest_exit() is not None:
            self._loop.on_exit()
        if self._interrupted and self._loop.state is GuestState.HALTED:
            self._interrupted = False
            self._loop.resume()
