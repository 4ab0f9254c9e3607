# SPDX-License-Identifier: MIT OR Apache-2.0
"""The simulated SEV-SNP machine: one process that is firmware, memory controller and referee of one VM.

It serves three peers at once, each on its own channel, none of which it trusts more than it must: the host (PSP and
KVM commands), the kernel at VMPL0 (instructions), the vCPU process (guest code at VMPL2). Every change of a page goes
through `Machine.perform`, which is the one operation of boot-protocol §2:

    take the page from the vCPU, acknowledged → move or zero, punch the old place → commit to the RMP → show it anew

Nobody else runs in between, because this process does nothing else meanwhile. The kernel maps pages itself, so a host
that takes a validated page away ends the VM: on the chip the kernel would fault at its next touch.

The VM starts when the host first runs the launch VMSA: the loader's text is copied out of the measured pages and
executed in a confined process by a `Spawner`. It ends when that process ends, when the host says STOP or hangs up, or
when the machine finds a violation; `run_hardware` then tells the host and returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import json
import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from svsm.formats.errors import BackendError, ProtocolError, SvsmError
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.hardware_messages import HostCommand, Instruction, InstructionCode, Message
from svsm.formats.snp.page_info import PageType
from svsm.formats.snp.vcpu_messages import Access, Memory
from svsm.formats.snp.vmsa import VmsaView
from svsm.hardware.chip import Chip
from svsm.hardware.launch import Launch, LaunchState, corrected_cpuid_page, refused
from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.messages import Port
from svsm.hardware.rmp import PAGE, Change, Entry, Home, Outcome, Region, ReverseMap, UpdateCode
from svsm.hardware.sp import SecureProcessor
from svsm.hardware.vcpu_port import EFER_SVME, GuestStop, VcpuPort, load_registers, store_exit

__all__ = ["DEFAULT_REGIONS", "EndReason", "KernelStart", "Machine", "Spawned", "Spawner", "run_hardware"]

DEFAULT_REGIONS: Final = (
    Region(0x0000_0000, 0x1000_0000),
    Region(0x3000_0000, 0x0010_0000),
    Region(0x4000_0000, 0x0100_0000),
    Region(0xFFFF_FFFF_F000, PAGE),
)
"""Memory of svsm's own image: low memory for the image, a window that stays shared, the guest, the launch VMSA."""

_MAX_LAUNCH_PAGES: Final = 4096
_MAX_LOADER: Final = 1 << 20
_START_REGISTERS: Final = ("rip", "rcx", "rdx", "r8", "rsi", "rdi", "r9", "rbx")
_MAX_SERVICES: Final = 16
_GUEST_VMPL: Final = 2
_WORD: Final = (1 << 64) - 1
_LINGER_MS: Final = 2000
_SHARED_ACCESS: Final = Access.READ | Access.WRITE


class Spawned(Protocol):
    """A process that the spawner started."""

    def fileno(self) -> int:
        """Readable when the process has ended."""

    def collect(self) -> int:
        """Its wait status, waiting if need be."""

    def kill(self) -> None:
        """End it; nothing when it has ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class KernelStart:
    """What the launch VMSA says about the kernel to start; registers as in the brief of the image's entry point."""

    loader_text: bytes
    registers: Mapping[str, int]
    """rip, rcx (loader and its length), rdx, r8 (payload and its length), rsi (settings), rdi (launch configuration),
    r9 (device tree), rbx (secrets): byte addresses and lengths."""


class Spawner(Protocol):
    """Starts confined processes; `svsm.hardware.processes` has the real one."""

    def kernel(self, start: KernelStart, descriptors: Mapping[str, int]) -> Spawned:
        """Start the kernel. The descriptors stay the caller's."""

    def service(self, name: str, archive: int, parameters: Mapping[str, str]) -> tuple[Spawned, socket.socket]:
        """Start a service from the kernel's sealed archive; also gives the kernel's end of its syscall socket."""


class EndReason(enum.Enum):
    """Why a VM ended."""

    KERNEL_ENDED = "the kernel ended"
    STOPPED = "the host stopped it"
    VIOLATION = "the machine stopped it"


class _End(Exception):  # not an error: leaves the loop
    def __init__(self, reason: EndReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


class Machine:
    """One VM's hardware; see the module.

    Args:
        host: The host's channel.
        chip: Identity and signer.
        spawner: Starts kernel and services.
        memory: The three memories.
        regions: Which addresses have memory.
        vcpu: The vCPU process, or None: then no guest can run.
        kernel_descriptors: What the kernel gets besides memory and the instruction channel, by name.
        random_bytes: Source of keys.
    """

    def __init__(
        self,
        *,
        host: Port,
        chip: Chip,
        spawner: Spawner,
        memory: PhysicalMemory,
        regions: Sequence[Region] = DEFAULT_REGIONS,
        vcpu: VcpuPort | None = None,
        kernel_descriptors: Mapping[str, int] | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.rmp = ReverseMap(regions)
        self.memory = memory
        self.launch = Launch(chip, random_bytes)
        self._chip = chip
        self._host = host
        self._spawner = spawner
        self._vcpu = vcpu
        self._kernel_descriptors = dict(kernel_descriptors or {})
        self._sp: SecureProcessor | None = None
        self._kernel: Port | None = None
        self._kernel_process: Spawned | None = None
        self._services: dict[int, Spawned] = {}
        self._next_service = 1
        self._ghcb_msr = 0

    # ---- the loop ------------------------------------------------------------------------------------------------

    def serve(self) -> EndReason:
        """Serve until the VM ends, tell the host, end every process."""
        try:
            while True:
                self._step()
        except _End as end:
            return self._end(end)
        except SvsmError as error:
            return self._end(_End(EndReason.VIOLATION, str(error)))

    def _step(self) -> None:
        if self._vcpu is not None:
            while (stopped := self._vcpu.take_stop()) is not None:
                self._guest_stopped(stopped)
        waiting: dict[int, Callable[[], None]] = {self._host.fileno(): self._serve_host}
        if self._kernel is not None:
            waiting[self._kernel.fileno()] = self._serve_kernel
        if self._vcpu is not None:
            waiting[self._vcpu.fileno()] = self._vcpu.receive
        for number, process in self._services.items():
            waiting[process.fileno()] = functools.partial(self._service_ended, number)
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll():
            waiting[descriptor]()

    def _end(self, end: _End) -> EndReason:
        status = 0
        for process in self._services.values():
            process.kill()
            process.collect()
        if self._kernel_process is not None:
            # One that only closed its channel is given a moment to end by itself.
            if end.reason is not EndReason.KERNEL_ENDED or not _ended_within(self._kernel_process, _LINGER_MS):
                self._kernel_process.kill()
            status = self._kernel_process.collect()
        if self._vcpu is not None:
            self._vcpu.close()
        with contextlib.suppress(BackendError):
            text = end.text.encode()[:1024]
            self._host.send(
                Message(HostCommand.ENDED, (status & _WORD,), text, status=int(end.reason is EndReason.VIOLATION))
            )
        if self._kernel is not None:
            self._kernel.close()
        self._host.close()
        for descriptor in self._kernel_descriptors.values():
            os.close(descriptor)
        self._kernel_descriptors.clear()
        return end.reason

    # ---- pages ---------------------------------------------------------------------------------------------------

    def perform(self, change: Change) -> None:
        """Carry out one planned change: the only place where a page moves.

        Raises:
            BackendError: ``machine-vcpu``, ``machine-memory``: the VM ends.
        """
        if change.takes_validated:
            raise _End(EndReason.VIOLATION, f"the host took the validated page {change.gpa:#x} away")
        before, after = _guest_access(change.before), _guest_access(change.after)
        shows = self._vcpu is not None and self.launch.state is LaunchState.RUNNING and before != after
        if shows and self._vcpu is not None and before is not None:
            self._vcpu.unmap(change.gpa, change.length)
        self.memory.carry_out(change)
        self.rmp.commit(change)
        if shows and self._vcpu is not None and after is not None:
            self._vcpu.map(change.gpa, change.length, *after)

    def _show_all(self) -> None:
        """Tell the vCPU what it may see when the guest starts to exist."""
        if self._vcpu is None:
            return
        taken = sorted(self.rmp.extents(), key=lambda extent: extent[0])
        for region in self.rmp.regions:
            position = region.start
            for gpa, length, _ in taken:
                if not region.start <= gpa < region.end:
                    continue
                if gpa > position:
                    self._vcpu.map(position, gpa - position, Memory.SHARED, _SHARED_ACCESS)
                position = gpa + length
            if position < region.end:
                self._vcpu.map(position, region.end - position, Memory.SHARED, _SHARED_ACCESS)
        for gpa, length, entry in taken:
            access = _guest_access(entry)
            if access is not None:
                self._vcpu.map(gpa, length, *access)

    def _private(self, gpa: int, length: int) -> bytes:
        """Validated private memory, for what the processor itself reads."""
        pages = range(gpa - gpa % PAGE, gpa + length, PAGE)
        if not self.rmp.covers(gpa, length) or not all(
            self.rmp.entry(page).validated and self.rmp.entry(page).home is Home.PRIVATE for page in pages
        ):
            raise refused(FirmwareStatus.INVALID_PAGE_STATE, "not validated private memory")
        return self.memory.read(Home.PRIVATE, gpa, length)

    # ---- the host ------------------------------------------------------------------------------------------------

    def _serve_host(self) -> None:
        received = self._host.receive()
        if received is None:
            raise _End(EndReason.STOPPED, "the host hung up")
        message, descriptors = received
        for descriptor in descriptors:
            os.close(descriptor)
        if message.kind == HostCommand.STOP:
            raise _End(EndReason.STOPPED, "the host asked for it")
        handler = _HOST_COMMANDS.get(message.kind)
        try:
            if handler is None:
                raise refused(FirmwareStatus.INVALID_COMMAND, "no such command")
            answer = handler(self, message)
        except ProtocolError as error:
            if error.code != "psp-refused":
                raise
            status = error.details["status"]
            answer = message.answer(status=status if isinstance(status, int) else 1, payload=error.message.encode())
        self._host.send(answer)

    def _launch_start(self, message: Message) -> Message:
        self.launch.start(message.arguments[0])
        return message.answer()

    def _launch_update(self, message: Message) -> Message:
        page_type, gpa, pages, permissions, *_ = message.arguments
        if self.launch.state is not LaunchState.LAUNCH:
            raise refused(FirmwareStatus.INVALID_GUEST_STATE, "no guest is being launched")
        if not 0 < pages <= _MAX_LAUNCH_PAGES or permissions >> 24 or permissions & 0xF0F0F0:
            raise refused(FirmwareStatus.INVALID_PARAM, "impossible number of pages or permissions")
        if pages != 1 and page_type not in (PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED):
            raise refused(FirmwareStatus.INVALID_PARAM, "pages of this type come one at a time")
        outcome = self.rmp.plan_pre_guest(gpa, pages * PAGE)
        if outcome.change is None:
            invalid = outcome.code == UpdateCode.FAIL_INPUT
            status = FirmwareStatus.INVALID_ADDRESS if invalid else FirmwareStatus.INVALID_PAGE_STATE
            raise refused(status, "these pages cannot be launched")
        self.perform(outcome.change)
        contents = memoryview(self.memory.read(Home.PRIVATE, gpa, pages * PAGE))
        try:
            for offset in range(0, len(contents), PAGE):
                page = contents[offset : offset + PAGE]
                written = self.launch.update(page_type, gpa + offset, page)
                if written is not None:
                    self.memory.write(Home.PRIVATE, gpa + offset, written)
        except ProtocolError:
            # Only a page that comes alone is refused, so nothing of the run has entered the digest.
            if page_type == PageType.CPUID:
                corrected = corrected_cpuid_page(bytes(contents), self._chip)
                self.memory.write(Home.PRIVATE, gpa, corrected if corrected is not None else contents)
            self.perform(self.rmp.plan_reclaim(outcome.change))
            raise
        rights = (permissions & 0xF, permissions >> 8 & 0xF, permissions >> 16 & 0xF)
        vmsa = page_type == PageType.VMSA
        self.perform(self.rmp.plan_guest_valid(outcome.change, permissions=rights, vmsa=vmsa))
        return message.answer()

    def _launch_finish(self, message: Message) -> Message:
        block_present, author_key, *_ = message.arguments
        payload = message.payload
        expected = 32 + (96 + 4096 if block_present else 0)
        if len(payload) != expected:
            raise refused(FirmwareStatus.INVALID_LENGTH, "host data or ID block of the wrong size")
        self.launch.finish(
            host_data=payload[:32],
            id_block=payload[32:128] if block_present else None,
            id_auth=payload[128:] if block_present else None,
            author_key=bool(author_key),
        )
        if self.launch.context is not None:
            self._sp = SecureProcessor(self._chip, self.launch.context)
        self._show_all()
        return message.answer(payload=self.launch.digest)

    def _rmp_update(self, message: Message) -> Message:
        gpa, size_bytes, assign, pages, *_ = message.arguments
        if not 0 < pages <= _MAX_LAUNCH_PAGES:
            return message.answer(status=UpdateCode.FAIL_INPUT)
        for page in range(pages):
            outcome = self.rmp.plan_update(gpa + page * size_bytes, size_bytes, assign=bool(assign))
            if outcome.code != UpdateCode.SUCCESS:
                return message.answer(page, status=outcome.code)
            if outcome.change is not None:
                self.perform(outcome.change)
        return message.answer(pages)

    def _guest_request(self, message: Message) -> Message:
        request, response, *_ = message.arguments
        if self._sp is None:
            raise refused(FirmwareStatus.INVALID_GUEST_STATE, "no guest is running")
        if request % PAGE or response % PAGE or request == response:
            raise refused(FirmwareStatus.INVALID_ADDRESS, "request and response are two pages")
        if not self.rmp.is_shared(request, PAGE) or not self.rmp.is_shared(response, PAGE):
            raise refused(FirmwareStatus.INVALID_PAGE_STATE, "request and response are in shared memory")
        answer = self._sp.guest_request(self.memory.read(Home.SHARED, request, PAGE))
        self.memory.write(Home.SHARED, response, answer)
        return message.answer()

    def _certificates(self, message: Message) -> Message:
        return message.answer(payload=self._chip.certificates)

    def _cpuid(self, message: Message) -> Message:
        return message.answer(payload=self._chip.cpuid_page())

    # ---- running -------------------------------------------------------------------------------------------------

    def _vmrun(self, message: Message) -> Message:
        gpa, ghcb_msr, *_ = message.arguments
        if self._sp is None:
            raise refused(FirmwareStatus.INVALID_GUEST_STATE, "no guest was launched")
        if gpa % PAGE or not self.rmp.entry(gpa).vmsa:
            raise refused(FirmwareStatus.INVALID_PAGE_STATE, "not a VMSA page")
        page = self._private(gpa, PAGE)
        view = VmsaView(bytearray(page))
        if not view.get("efer") & EFER_SVME:
            raise refused(FirmwareStatus.INVALID_GUEST_STATE, "the VMSA is being edited (EFER.SVME is clear)")
        vmpl = view.get("vmpl")
        if vmpl == 0:
            self._start_kernel(view)
        elif vmpl == _GUEST_VMPL:
            self._run_guest(gpa, page, ghcb_msr, view.get("sev_features"))
        else:
            raise refused(FirmwareStatus.UNSUPPORTED, "only VMPL0 and VMPL2 run here")
        return message.answer()

    def _run_guest(self, gpa: int, page: bytes, ghcb_msr: int, sev_features: int) -> None:
        if self._vcpu is None:
            raise refused(FirmwareStatus.UNSUPPORTED, "this machine has no vCPU for guests")
        if self._vcpu.running is not None:
            raise refused(FirmwareStatus.RESOURCE_LIMIT, "the vCPU runs already")
        self.rmp.set_in_use(gpa, in_use=True)
        self._vcpu.run(gpa, load_registers(page, ghcb_msr=ghcb_msr), sev_features)

    def _guest_stopped(self, stopped: GuestStop) -> None:
        gpa = stopped.vmsa_gpa
        self.rmp.set_in_use(gpa, in_use=False)
        page = store_exit(self.memory.read(Home.PRIVATE, gpa, PAGE), stopped)
        self.memory.write(Home.PRIVATE, gpa, page)
        arguments = (gpa, stopped.exit_code, stopped.exit_info_1, stopped.exit_info_2, stopped.registers.ghcb_msr)
        self._host.send(Message(HostCommand.VMEXIT, arguments))

    def _start_kernel(self, view: VmsaView) -> None:
        if self._kernel is not None:
            raise refused(FirmwareStatus.INVALID_GUEST_STATE, "the kernel runs already")
        registers = {name: view.get(name) for name in _START_REGISTERS}
        if not 0 < registers["rcx"] <= _MAX_LOADER:
            raise refused(FirmwareStatus.INVALID_PARAM, "the VMSA names no loader")
        text = self._private(registers["rip"], registers["rcx"])
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._kernel = Port(mine, name="the kernel")
            descriptors = {home.value: descriptor for home, descriptor in self.memory.descriptors.items()}
            descriptors |= {"hardware": theirs.fileno(), **self._kernel_descriptors}
            self._kernel_process = self._spawner.kernel(KernelStart(text, registers), descriptors)
        for descriptor in self._kernel_descriptors.values():
            os.close(descriptor)
        self._kernel_descriptors.clear()

    # ---- the kernel ----------------------------------------------------------------------------------------------

    def _serve_kernel(self) -> None:
        if self._kernel is None:
            return
        try:
            received = self._kernel.receive()
        except SvsmError as error:
            raise _End(EndReason.VIOLATION, f"the kernel executed something impossible: {error}") from None
        if received is None:
            raise _End(EndReason.KERNEL_ENDED, "the kernel ended")
        message, descriptors = received
        try:
            self._execute(self._kernel, message, descriptors)
        except BackendError as error:
            if error.code != "machine-channel":
                raise
            raise _End(EndReason.KERNEL_ENDED, "the kernel ended") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _execute(self, kernel: Port, message: Message, descriptors: list[int]) -> None:
        gpa, size_bytes, word, *_ = message.arguments
        if message.kind == Instruction.PVALIDATE:
            outcome = self.rmp.plan_pvalidate(gpa, size_bytes, validate=bool(word))
            kernel.send(self._complete(message, outcome))
        elif message.kind == Instruction.RMPADJUST:
            outcome = self.rmp.plan_rmpadjust(gpa, size_bytes, word)
            kernel.send(self._complete(message, outcome))
        elif message.kind == Instruction.KILL:
            service = self._services.get(message.arguments[0])
            if service is not None:
                service.kill()
        elif message.kind == Instruction.SPAWN:
            self._spawn(kernel, message, descriptors)
        else:
            raise _End(EndReason.VIOLATION, f"the kernel executed the unknown instruction {message.kind:#x}")

    def _complete(self, message: Message, outcome: Outcome) -> Message:
        if outcome.change is not None:
            self.perform(outcome.change)
        return message.answer(int(outcome.carry), status=outcome.code)

    def _spawn(self, kernel: Port, message: Message, descriptors: list[int]) -> None:
        try:
            if len(self._services) >= _MAX_SERVICES or len(descriptors) != 1:
                raise ProtocolError("too many services, or no code", code="machine-spawn")
            name, parameters = _service_of(message.payload)
            process, syscalls = self._spawner.service(name, descriptors[0], parameters)
        except SvsmError:
            kernel.send(message.answer(status=InstructionCode.FAIL_INPUT))
            return
        with syscalls:
            number, self._next_service = self._next_service, self._next_service + 1
            self._services[number] = process
            kernel.send(message.answer(number), [syscalls.fileno()])

    def _service_ended(self, number: int) -> None:
        status = self._services.pop(number).collect()
        if self._kernel is not None:
            with contextlib.suppress(BackendError):
                self._kernel.send(Message(Instruction.SERVICE_ENDED, (number, status & _WORD)))


_HOST_COMMANDS: Final[dict[int, Callable[[Machine, Message], Message]]] = {
    HostCommand.LAUNCH_START: Machine._launch_start,
    HostCommand.LAUNCH_UPDATE: Machine._launch_update,
    HostCommand.LAUNCH_FINISH: Machine._launch_finish,
    HostCommand.RMP_UPDATE: Machine._rmp_update,
    HostCommand.GUEST_REQUEST: Machine._guest_request,
    HostCommand.CERTIFICATES: Machine._certificates,
    HostCommand.CPUID: Machine._cpuid,
    HostCommand.VMRUN: Machine._vmrun,
}


def _guest_access(entry: Entry) -> tuple[Memory, Access] | None:
    """How VMPL2 sees a page in this state; None when it does not."""
    if entry.home is Home.SHARED:
        return Memory.SHARED, _SHARED_ACCESS
    if entry.home is Home.VMPL2:
        return Memory.VMPL2, Access(entry.permissions[1])
    return None


def _ended_within(process: Spawned, milliseconds: int) -> bool:
    poll = select.poll()
    poll.register(process.fileno(), select.POLLIN)
    return bool(poll.poll(milliseconds))


def _service_of(payload: bytes) -> tuple[str, dict[str, str]]:
    try:
        request = json.loads(payload)
        name, parameters = request["service"], request["parameters"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ProtocolError("not a service to start", code="machine-spawn") from None
    texts = isinstance(parameters, dict) and all(isinstance(value, str) for value in parameters.values())
    if not isinstance(name, str) or not texts:
        raise ProtocolError("not a service to start", code="machine-spawn")
    return name, parameters


def run_hardware(
    host_socket: socket.socket,
    vcpu_socket: socket.socket | None,
    chip: Chip,
    spawner: Spawner,
    *,
    memory: Mapping[str, int] | None = None,
    regions: Sequence[Region] = DEFAULT_REGIONS,
    kernel_descriptors: Mapping[str, int] | None = None,
) -> EndReason:
    """The hardware process's main: one VM, from LAUNCH_START to its end.

    Args:
        host_socket: SOCK_SEQPACKET to the host.
        vcpu_socket: SOCK_SEQPACKET to `svsm.hardware.vcpu.run_vcpu`, or None for a machine without a guest.
        chip: Identity and signer.
        spawner: Starts kernel and services.
        memory: Descriptors of the memfds by name ("private", "vmpl2", "shared"); None makes new ones.
        regions: Which addresses have memory.
        kernel_descriptors: Passed on to the kernel by name ("host", "console"); closed here once it runs.

    Returns:
        Why the VM ended; the host has been told.
    """
    homes = {Home(name): descriptor for name, descriptor in memory.items()} if memory else None
    machine = Machine(
        host=Port(host_socket, name="the host"),
        chip=chip,
        spawner=spawner,
        memory=PhysicalMemory(homes),
        regions=regions,
        vcpu=VcpuPort(vcpu_socket) if vcpu_socket is not None else None,
        kernel_descriptors=kernel_descriptors,
    )
    return machine.serve()
