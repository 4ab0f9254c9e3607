# SPDX-License-Identifier: MIT OR Apache-2.0
"""The hypervisor of the simulated machine: it launches the image, relays GHCB exits, schedules the guest.

Untrusted, and written so that nothing depends on its honesty: it holds the shared memory and no other, and everything
secret passes it encrypted. It does what KVM and QEMU do for an SNP guest:

    kernel ──EXIT──▶ guest request, page state change ──command──▶ hardware ──answer──▶ kernel
    kernel ──EXIT RUN_VMPL──▶ VMRUN ──▶ hardware … VMEXIT notice ──▶ kernel's exit is answered
    listening sockets ──accept──▶ DEVICE message with the connection ──▶ kernel

A guest that asks for VMPL0 (RUN_VMPL by the MSR protocol) gets the MSR's answer at its next VMRUN; every other exit
is the kernel's to judge, since this machine emulates nothing for guests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from svsm.formats.errors import BackendError, FormatError, SvsmError
from svsm.formats.igvm import IgvmFile
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import MAX_MESSAGE, HostCommand, Message
from svsm.host.attachment import DeviceRelay
from svsm.host.hardware_port import HardwarePort
from svsm.host.launcher import NO_DEVICES, Launched, launch_image

__all__ = ["DeviceOffer", "Hypervisor", "HypervisorEnd", "Listener", "Notify"]

_PAGE: Final = 4096
_LARGE_PAGE: Final = 2 * 1024 * 1024
_GUEST_VMPL: Final = 2
_MAX_TEXT: Final = _PAGE
_FAILED: Final = 1 << 32
"""A page-state change that failed: high dword of SW_EXITINFO2 non-zero (AMD 56421 §4.1.6)."""
_MAX_OFFERS: Final = 256

Notify = Callable[[str, Mapping[str, object]], None]
"""Told what happens: "launched" (digest, host_data), "started", "terminated" (reason), "ended" (reason)."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceOffer:
    """A descriptor for the kernel; the hypervisor closes its copy once it is sent."""

    kind: ghcb.DeviceKind
    descriptor: int
    index: int = 0
    port: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Listener:
    """A socket front: each connection becomes a CLIENT device."""

    sock: socket.socket
    """Listening."""
    index: int
    """Which TPM."""
    port: int
    """0 control, 1 data."""


@dataclasses.dataclass(frozen=True, slots=True)
class HypervisorEnd:
    """How it ended."""

    reason: str
    violation: bool
    """The machine stopped the VM, it did not end by itself."""
    kernel_status: int
    """Exit status of the kernel, negative for a signal."""


class Hypervisor:
    """One VM's host side.

    Args:
        hardware: The machine.
        kernel: SOCK_SEQPACKET to the kernel; owned.
        shared_fd: The shared memfd.
        listeners: Socket fronts.
        mmio: The way to devices behind registers and ports.
        notify: See `Notify`.
    """

    def __init__(
        self,
        hardware: HardwarePort,
        kernel: socket.socket,
        shared_fd: int,
        *,
        listeners: Sequence[Listener] = (),
        mmio: DeviceRelay | None = None,
        notify: Notify = lambda _name, _details: None,
    ) -> None:
        kernel.setblocking(False)
        self._hardware = hardware
        self._kernel: socket.socket | None = kernel
        self._shared_fd = shared_fd
        self._listeners = list(listeners)
        self._mmio = mmio
        self._notify = notify
        self._outgoing: list[tuple[bytes, int | None]] = []
        self._vmsas: dict[int, int] = {}
        self._running: Message | None = None
        self._ghcb_msr = 0
        self._certificates: bytes | None = None

    # ---- start ---------------------------------------------------------------------------------------------------

    def launch(self, image: IgvmFile, configuration: bytes, device_tree: bytes = NO_DEVICES) -> Launched:
        """Launch an image; see `svsm.host.launcher.launch_image`."""
        launched = launch_image(
            self._hardware, self._shared_fd, image, configuration=configuration, device_tree=device_tree
        )
        self._notify("launched", {"digest": launched.digest.hex(), "host_data": launched.host_data.hex()})
        return launched

    def start(self, launched: Launched) -> None:
        """Run the boot processor: the kernel starts.

        Raises:
            FormatError: ``host-no-vmsa``.
            ProtocolError: ``host-psp-refused``.
        """
        if not launched.vmsas:
            raise FormatError("the image has no VMSA", code="host-no-vmsa")
        self._hardware.command(HostCommand.VMRUN, launched.vmsas[0], 0)
        self._notify("started", {})

    def offer(self, device: DeviceOffer) -> None:
        """Hand a device over, now or as soon as the kernel reads."""
        message = Message(ghcb.HostMessage.DEVICE, (device.kind, device.index, device.port))
        if self._kernel is None or len(self._outgoing) >= _MAX_OFFERS:
            os.close(device.descriptor)
            return
        self._queue(message.pack(), device.descriptor)

    def interrupt(self) -> None:
        """Wake the guest's vCPU if it has halted. May be called from another thread."""
        self._send_at_once(ghcb.HostMessage.INTERRUPT)

    def shutdown(self) -> None:
        """Press the power button. May be called from another thread."""
        self._send_at_once(ghcb.HostMessage.SHUTDOWN)

    def _send_at_once(self, kind: ghcb.HostMessage) -> None:
        kernel = self._kernel
        if kernel is not None:
            # A full channel means that the kernel has other things to read first, and then finds the guest's work.
            with contextlib.suppress(OSError):
                kernel.send(Message(kind).pack())

    # ---- the loop ------------------------------------------------------------------------------------------------

    def serve(self) -> HypervisorEnd:
        """Until the VM has ended."""
        while True:
            while (notice := self._hardware.take_notice()) is not None:
                if notice.kind == HostCommand.ENDED:
                    return self._ended(notice)
                self._guest_stopped(notice)
            try:
                self._wait()
            except BackendError as error:
                if error.code != "host-hardware":
                    raise
                while (notice := self._hardware.take_notice()) is not None:
                    if notice.kind == HostCommand.ENDED:
                        return self._ended(notice)
                return self._finish(HypervisorEnd(str(error), True, 0))

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._hardware, select.POLLIN)
        if self._kernel is not None:
            poll.register(self._kernel, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        for listener in self._listeners:
            poll.register(listener.sock, select.POLLIN)
        if self._mmio is not None and not self._mmio.closed:
            poll.register(self._mmio, select.POLLIN)
        for descriptor, events in poll.poll():
            if descriptor == self._hardware.fileno():
                self._hardware.read_notice()
            elif self._mmio is not None and descriptor == self._mmio.fileno():
                self._serve_device(self._mmio)
            elif self._kernel is not None and descriptor == self._kernel.fileno():
                self._flush()
                if events & ~select.POLLOUT:
                    self._serve_kernel()
            else:
                self._accept(descriptor)

    def _serve_device(self, mmio: DeviceRelay) -> None:
        answers, interrupted = mmio.receive()
        for answer in answers:
            self._queue(answer.pack(), None)
        if interrupted:
            self._send_at_once(ghcb.HostMessage.DEVICE_INTERRUPT)

    def _accept(self, descriptor: int) -> None:
        for listener in self._listeners:
            if listener.sock.fileno() == descriptor:
                with contextlib.suppress(OSError):
                    connection, _ = listener.sock.accept()
                    self.offer(DeviceOffer(ghcb.DeviceKind.CLIENT, connection.detach(), listener.index, listener.port))

    def _ended(self, notice: Message) -> HypervisorEnd:
        # The status travels as an unsigned word; it is a wait status with the sign of the signal.
        status = notice.arguments[0]
        status = status - (1 << 64) if status >> 63 else status
        text = notice.payload.decode(errors="replace")
        return self._finish(HypervisorEnd(text, bool(notice.status), status))

    def _finish(self, end: HypervisorEnd) -> HypervisorEnd:
        self._close_kernel()
        self._hardware.close()
        if self._mmio is not None and not self._mmio.closed:
            self._mmio.close()
        for listener in self._listeners:
            listener.sock.close()
        self._notify("ended", dataclasses.asdict(end))
        return end

    # ---- the kernel ----------------------------------------------------------------------------------------------

    def _serve_kernel(self) -> None:
        if self._kernel is None:
            return
        try:
            data, descriptors, _, _ = socket.recv_fds(self._kernel, MAX_MESSAGE + 1, 4)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        for descriptor in descriptors:
            os.close(descriptor)
        if not data:
            self._close_kernel()
            return
        try:
            message = Message.parse(data)
        except SvsmError:
            return
        if message.kind != ghcb.HostMessage.EXIT:
            return
        answer = self._exit(message)
        if answer is not None:
            self._queue(answer.pack(), None)

    def _exit(self, message: Message) -> Message | None:
        """Do what a GHCB exit asks for; None when the answer comes later, or never."""
        code, info_1, info_2, rax, rbx, *_ = message.arguments
        if code in (ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE, ghcb.ExitCode.IOIO):
            return self._mmio.access(message) if self._mmio is not None else message.answer(0, _FAILED)
        if code == ghcb.ExitCode.GUEST_REQUEST:
            return message.answer(0, self._relay(info_1, info_2))
        if code == ghcb.ExitCode.EXT_GUEST_REQUEST:
            return self._extended_request(message, info_1, info_2, rax, rbx)
        if code == ghcb.ExitCode.PAGE_STATE_CHANGE:
            return message.answer(0, self._change_pages(info_1))
        if code == ghcb.ExitCode.AP_CREATE:
            self._vmsas[info_1 >> 16 & 0xF] = info_2
            return message.answer()
        if code == ghcb.ExitCode.RUN_VMPL:
            return self._run_guest(message, info_1)
        if code == ghcb.ExitCode.TERMINATION:
            text = self._shared(info_2, min(rax, _MAX_TEXT)).decode(errors="replace")
            self._notify("terminated", {"reason": text, "code": info_1})
            self._hardware.stop()
            return None
        return message.answer(0, _FAILED)

    def _relay(self, request_gpa: int, response_gpa: int) -> int:
        return self._hardware.ask(HostCommand.GUEST_REQUEST, request_gpa, response_gpa).status

    def _extended_request(
        self, message: Message, request_gpa: int, response_gpa: int, data_gpa: int, pages: int
    ) -> Message:
        if self._certificates is None:
            self._certificates = self._hardware.ask(HostCommand.CERTIFICATES).payload
        needed = -(-len(self._certificates) // _PAGE)
        if pages < needed:
            return message.answer(0, ghcb.VmmError.INVALID_LENGTH << 32, needed)
        status = self._relay(request_gpa, response_gpa)
        if not status and self._certificates and data_gpa % _PAGE == 0:
            with contextlib.suppress(OSError, OverflowError):
                os.pwrite(self._shared_fd, self._certificates, data_gpa)
        return message.answer(0, status, pages)

    def _change_pages(self, list_gpa: int) -> int:
        try:
            entries = ghcb.parse_page_states(self._shared(list_gpa, ghcb.PSC_LIST_BYTES))
        except SvsmError:
            return _FAILED
        for entry in entries:
            if entry.operation not in (ghcb.PageOperation.PRIVATE, ghcb.PageOperation.SHARED):
                continue  # splitting and joining are the machine's own business
            size = _LARGE_PAGE if entry.large else _PAGE
            assign = int(entry.operation is ghcb.PageOperation.PRIVATE)
            answer = self._hardware.ask(HostCommand.RMP_UPDATE, entry.gpa, size, assign, 1)
            if answer.status:
                return _FAILED | answer.status
        return 0

    def _shared(self, gpa: int, length: int) -> bytes:
        try:
            return os.pread(self._shared_fd, length, gpa)
        except (OSError, OverflowError):
            return b""

    # ---- the guest -----------------------------------------------------------------------------------------------

    def _run_guest(self, message: Message, vmpl: int) -> Message | None:
        vmsa = self._vmsas.get(vmpl)
        if vmpl != _GUEST_VMPL or vmsa is None or self._running is not None:
            return message.answer(0, _FAILED)
        answer = self._hardware.ask(HostCommand.VMRUN, vmsa, self._ghcb_msr)
        if answer.status:
            return message.answer(0, _FAILED | answer.status)
        self._running = message
        return None

    def _guest_stopped(self, notice: Message) -> None:
        _, code, _, _, ghcb_msr, *_ = notice.arguments
        self._ghcb_msr = ghcb_msr
        if code == ghcb.ExitCode.VMGEXIT and ghcb.msr_run_vmpl_target(ghcb_msr) == 0:
            self._ghcb_msr = ghcb.MsrProtocol.RUN_VMPL_RESPONSE
        message, self._running = self._running, None
        if message is not None:
            self._queue(message.answer().pack(), None)

    # ---- sending -------------------------------------------------------------------------------------------------

    def _queue(self, data: bytes, descriptor: int | None) -> None:
        self._outgoing.append((data, descriptor))
        self._flush()

    def _flush(self) -> None:
        while self._outgoing and self._kernel is not None:
            data, descriptor = self._outgoing[0]
            try:
                socket.send_fds(self._kernel, [data], [] if descriptor is None else [descriptor])
            except BlockingIOError:
                return
            except OSError:
                self._close_kernel()
                return
            self._outgoing.pop(0)
            if descriptor is not None:
                os.close(descriptor)

    def _close_kernel(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None
        for _, descriptor in self._outgoing:
            if descriptor is not None:
                os.close(descriptor)
        self._outgoing.clear()
