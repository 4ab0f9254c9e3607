# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vCPU process: executes the guest's x86-64 code at VMPL2, on Unicorn.

It holds the socket to the chip and the VMPL2 and shared memfds, nothing else. The chip sends registers (RUN), this
process executes until something happens that real hardware would exit for, and sends them back (EXIT).

Where Unicorn differs from a CPU, and what is done about it:

* VMGEXIT (``F3 0F 01 D9``) is an invalid instruction to it: the hook for those ends the run, and the bytes at RIP
  say whether it was one.
* WRMSR and RDMSR of an unknown register pass silently. Every block of guest code is searched for their opcodes
  before it is executed; where they occur, a hook on that address is installed, the translation is thrown away and
  the block starts again. The hook keeps the GHCB MSR and skips RDMSR.
* Translations stay valid for it when *another* process writes guest code, so the cache is dropped at every entry;
  registers, CR3 with them, are written anew, which drops the cached page-table walks.
* It delivers no exception to the guest's IDT: any exception ends the run with SHUTDOWN, and if there is a next run it
  gets a new emulator, since the old one would report a double fault. No interrupt is injected.
* It has no notion of the RMP: what the guest must not reach is not mapped (`vcpu_memory`), and the access then
  ends the run as a nested page fault that names the GPA. Its page-table walk reads zero where nothing is mapped;
  a page fault is therefore looked into before it is believed.
* A running guest is only stopped from another thread: `_Watch` wakes up every 2 ms while one runs, looks whether
  the chip has said something or the time is up, and stops it between two instructions.

Segment registers and extended state (x87, SSE) stay in this process from one RUN to the next, and start as Unicorn
has them in 64-bit mode, CPL 0: there is one process per vCPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import operator
import select
import socket
import threading
import time
from typing import Any, Final

from svsm.formats.errors import ProtocolError, StateError
from svsm.formats.snp.vcpu_messages import (
    MAX_MESSAGE_BYTES,
    MSR_GHCB,
    Access,
    ExitCode,
    ExitMessage,
    Kind,
    MapMessage,
    Memory,
    Message,
    NestedFault,
    Registers,
    RunMessage,
    UnmapMessage,
    ack,
    parse_message,
)
from svsm.hardware.vcpu_memory import GuestMemory

__all__ = ["Vcpu", "load_engine", "run_vcpu"]

_VMGEXIT: Final = b"\xf3\x0f\x01\xd9"
_WRMSR: Final = b"\x0f\x30"
_RDMSR: Final = b"\x0f\x32"
_CR0_PG: Final = 1 << 31
_CR0_PE: Final = 1
_EFER: Final = 0xC0000080
_EFER_LMA: Final = 1 << 10
_EFER_LME: Final = 1 << 8
_EFER_SVME: Final = 1 << 12
_MASK32: Final = 0xFFFF_FFFF
_MAX_BLOCK_BYTES: Final = 8192
_FETCH_RIGHT: Final = 4
_PAGE_FAULT_VECTOR: Final = 14
_TICK_SECONDS: Final = 0.002
_GENERAL: Final = (
    *(field.name for field in dataclasses.fields(Registers) if field.name not in {"cr0", "cr3", "efer", "ghcb_msr"}),
    # CR4 is among those before; CR3 and CR0 are checked against it, and PG comes last.
    *("cr3", "cr0"),
)
_general: Final = operator.attrgetter(*_GENERAL)
_MAX_SITES: Final = 256
"""Hooked addresses of MSR instructions; the guest chooses them, so that their number needs an end."""


def load_engine() -> None:
    """Import Unicorn, so that a confined process has it in memory before it loses the file system.

    Raises:
        StateError: ``guest-unicorn-missing`` when the package is not installed.
    """
    _unicorn()


@functools.cache
def _unicorn() -> Any:
    try:
        import unicorn
        import unicorn.unicorn_py3.unicorn as binding
        import unicorn.x86_const
    except ImportError as missing:
        raise StateError(
            "no guest can run: the CPU emulator Unicorn is not installed",
            code="guest-unicorn-missing",
            hint="install the extra: pip install 'svsm[guest]'",
        ) from missing
    # The binding has no method for it: bytes at a *virtual* address, by the guest's own page tables.
    binding.uclib.uc_vmem_read.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
    ]
    module: Any = unicorn
    module.Uc(module.UC_ARCH_X86, module.UC_MODE_64)  # the first one imports the rest of the binding
    return module


@dataclasses.dataclass(slots=True)
class _Outcome:
    """What hooks saw of the current run; reset at every entry into the emulator."""

    fault: tuple[int, int] | None = None
    """UC_MEM_* kind and GPA of an access that no mapping allows."""
    invalid: bool = False
    vector: int | None = None
    msr_sites: list[int] = dataclasses.field(default_factory=list)


class Vcpu:
    """One virtual CPU: the emulator with its hooks and its memory.

    Args:
        descriptors: The memfd of each memory the guest may see; offset = GPA.

    Raises:
        StateError: ``guest-unicorn-missing``.
    """

    def __init__(self, descriptors: dict[Memory, int]) -> None:
        self._uc_module = _unicorn()
        self._const = self._uc_module.x86_const
        self._engine = self._new_engine()
        self.memory = GuestMemory(self._engine, descriptors, cr3=self._const.UC_X86_REG_CR3)
        self._library = self._uc_module.unicorn_py3.unicorn.uclib
        numbers = [getattr(self._const, f"UC_X86_REG_{name.upper()}") for name in _GENERAL]
        self._numbers = (ctypes.c_int * len(numbers))(*numbers)
        self._values = (ctypes.c_uint64 * len(numbers))()
        addresses = [ctypes.addressof(self._values) + 8 * index for index in range(len(numbers))]
        self._places = (ctypes.c_void_p * len(numbers))(*addresses)
        self._code = ctypes.create_string_buffer(_MAX_BLOCK_BYTES)
        self._read_virtual = self._library.uc_vmem_read
        uc = self._uc_module
        self._unmapped_kinds = (uc.UC_MEM_READ_UNMAPPED, uc.UC_MEM_WRITE_UNMAPPED, uc.UC_MEM_FETCH_UNMAPPED)
        self._sites: dict[int, int] = {}
        self._stopped = False
        self._seen = _Outcome()
        self._ghcb_msr = 0
        self._efer_svme = 0
        self._spent = False

    def _new_engine(self) -> Any:
        uc = self._uc_module
        engine = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        engine.ctl_exits_enabled(True)  # otherwise one virtual address would be "the end"
        engine.ctl_set_exits([])
        engine.hook_add(uc.UC_HOOK_INSN_INVALID, self._on_invalid)
        engine.hook_add(uc.UC_HOOK_MEM_INVALID, self._on_fault)
        engine.hook_add(uc.UC_HOOK_INTR, self._on_exception)
        engine.hook_add(uc.UC_HOOK_BLOCK, self._on_block)
        return engine

    # --- registers -------------------------------------------------------------------------------------------

    def load(self, registers: Registers) -> bool:
        """Put `registers` into the CPU; False when they are no 64-bit state with paging on."""
        wanted = _EFER_LMA | _EFER_LME
        if registers.efer & wanted != wanted or registers.cr0 & (_CR0_PG | _CR0_PE) != _CR0_PG | _CR0_PE:
            return False
        if self._spent:
            # It would take the next exception for one within the last: nobody has taken that one from it.
            self._spent = False
            self._sites.clear()
            self._engine = self._new_engine()
            self.memory.move(self._engine)
        self._efer_svme = registers.efer & _EFER_SVME
        self._engine.reg_write(self._const.UC_X86_REG_MSR, (_EFER, registers.efer & ~_EFER_SVME))
        self._values[:] = list(_general(registers))
        # One call with arrays made once: the binding's own batch takes apart every pair, 40 µs each way.
        self._library.uc_reg_write_batch(self._engine._uch, self._numbers, self._places, len(_GENERAL))
        self._ghcb_msr = registers.ghcb_msr
        return True

    def save(self) -> Registers:
        """The CPU's registers."""
        self._library.uc_reg_read_batch(self._engine._uch, self._numbers, self._places, len(_GENERAL))
        efer = self._engine.reg_read(self._const.UC_X86_REG_MSR, _EFER) & ~_EFER_SVME | self._efer_svme
        return Registers(**dict(zip(_GENERAL, self._values, strict=True)), efer=efer, ghcb_msr=self._ghcb_msr)

    # --- execution -------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Make `enter` return soon. The only method that another thread may call, as often as it likes."""
        self._stopped = True
        self._engine.emu_stop()

    def enter(self) -> tuple[ExitCode, int, int] | None:
        """Execute until something happens.

        Returns:
            (exit code, exit_info_1, exit_info_2), or None when `stop` ended it and the guest can simply go on.
        """
        self._stopped = False
        self.memory.settle()
        self.memory.walk(self._engine.reg_read(self._const.UC_X86_REG_CR3), self._rip())
        while not self._stopped:
            self._seen = _Outcome()
            self._engine.ctl_flush_tb()
            try:
                self._engine.emu_start(self._rip(), 0)
            except self._uc_module.UcError as error:
                reason = self._failed(error.errno)
                if reason is not None:
                    return reason
            if self._seen.vector is not None:
                reason = self._exception(self._seen.vector)
                if reason is not None:
                    return reason
            elif self._seen.msr_sites:
                self._hook_sites(self._seen.msr_sites)
            elif not self._stopped:
                # HLT ends the run without a word. (One that coincides with a stop wakes up at once: allowed.)
                return ExitCode.HLT, 0, 0
        return None

    def _hook_sites(self, sites: list[int]) -> None:
        if len(self._sites) + len(sites) > _MAX_SITES:
            for handle in self._sites.values():
                self._engine.hook_del(handle)
            self._sites.clear()
        for site in sites:
            self._sites[site] = self._engine.hook_add(self._uc_module.UC_HOOK_CODE, self._on_msr, None, site, site)

    def _failed(self, errno: int) -> tuple[ExitCode, int, int] | None:
        if self._seen.fault is not None:
            kind, gpa = self._seen.fault
            return ExitCode.NESTED_PAGE_FAULT, int(self._fault_bits(kind)), gpa
        if self._seen.invalid and self._bytes_at(self._rip(), len(_VMGEXIT)) == _VMGEXIT:
            self._set_rip(self._rip() + len(_VMGEXIT))
            return ExitCode.VMGEXIT, 0, 0
        if self._seen.vector is not None:
            return self._exception(self._seen.vector)
        return ExitCode.SHUTDOWN, 6 if self._seen.invalid else 0, errno

    def _exception(self, vector: int) -> tuple[ExitCode, int, int] | None:
        """An exception: the exit for it, or None when the instruction can be tried again."""
        address = 0
        if vector == _PAGE_FAULT_VECTOR:
            address = self._engine.reg_read(self._const.UC_X86_REG_CR2)
            added, denied = self.memory.walk(self._engine.reg_read(self._const.UC_X86_REG_CR3), address)
            if added and denied is None:
                return None
            self._spent = True
            if denied is not None:
                return ExitCode.NESTED_PAGE_FAULT, int(NestedFault.RMP), denied
        self._spent = True
        return ExitCode.SHUTDOWN, vector, address

    def _fault_bits(self, kind: int) -> NestedFault:
        uc = self._uc_module
        bits = NestedFault.RMP
        if kind in (uc.UC_MEM_WRITE_PROT, uc.UC_MEM_READ_PROT, uc.UC_MEM_FETCH_PROT):
            bits |= NestedFault.PRESENT
        if kind in (uc.UC_MEM_WRITE_PROT, uc.UC_MEM_WRITE_UNMAPPED):
            bits |= NestedFault.WRITE
        if kind in (uc.UC_MEM_FETCH_PROT, uc.UC_MEM_FETCH_UNMAPPED):
            bits |= NestedFault.FETCH
        return bits

    def _rip(self) -> int:
        return int(self._engine.reg_read(self._const.UC_X86_REG_RIP))

    def _set_rip(self, value: int) -> None:
        self._engine.reg_write(self._const.UC_X86_REG_RIP, value & (1 << 64) - 1)

    def _bytes_at(self, address: int, length: int) -> bytes:
        """Code bytes at a virtual address; b"" where the guest could not fetch them."""
        if self._read_virtual(self._engine._uch, address, _FETCH_RIGHT, self._code, length):
            return b""
        return self._code.raw[:length]

    # --- hooks: called by the emulator -----------------------------------------------------------------------

    def _on_invalid(self, _engine: Any, _data: Any) -> bool:
        self._seen.invalid = True
        return False

    def _on_fault(self, _engine: Any, kind: int, gpa: int, _size: int, _value: int, _data: Any) -> bool:
        if kind in self._unmapped_kinds and self.memory.touch(gpa):
            return True
        self._seen.fault = (kind, gpa)
        return False

    def _on_exception(self, engine: Any, vector: int, _data: Any) -> None:
        self._seen.vector = vector
        engine.emu_stop()

    def _on_block(self, engine: Any, address: int, size: int, _data: Any) -> None:
        code = self._bytes_at(address, min(size, _MAX_BLOCK_BYTES))
        if _WRMSR not in code and _RDMSR not in code:
            return
        found = {address + at for at in range(len(code) - 1) if code[at : at + 2] in (_WRMSR, _RDMSR)}
        unknown = sorted(found - self._sites.keys())
        if unknown:
            self._seen.msr_sites = unknown
            engine.emu_stop()

    def _on_msr(self, engine: Any, address: int, _size: int, _data: Any) -> None:
        if engine.reg_read(self._const.UC_X86_REG_ECX) & _MASK32 != MSR_GHCB:
            return
        opcode = self._bytes_at(address, 2)
        if opcode == _WRMSR:
            high = engine.reg_read(self._const.UC_X86_REG_EDX) & _MASK32
            self._ghcb_msr = high << 32 | engine.reg_read(self._const.UC_X86_REG_EAX) & _MASK32
        elif opcode == _RDMSR:
            engine.reg_write(self._const.UC_X86_REG_RAX, self._ghcb_msr & _MASK32)
            engine.reg_write(self._const.UC_X86_REG_RDX, self._ghcb_msr >> 32)
            self._set_rip(address + 2)


class _Watch(threading.Thread):
    """Stops the guest when the chip has sent something or the deadline has passed.

    Level-triggered: it repeats `stop` on every tick until the main thread says that the guest has left, because a
    stop that arrives just before the emulator starts is lost. It sleeps on an event while no guest runs, and looks
    once more after announcing that, so that a wake-up cannot be missed.
    """

    def __init__(self, vcpu: Vcpu, sock: socket.socket) -> None:
        super().__init__(name="vcpu-watch", daemon=True)
        self._vcpu = vcpu
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._wake = threading.Event()
        self._asleep = False
        self._running = False
        self._ended = False
        self.deadline: float | None = None

    def enter(self) -> None:
        """The guest is about to run."""
        self._running = True
        if self._asleep:
            self._wake.set()

    def leave(self) -> None:
        """The guest has stopped."""
        self._running = False

    def end(self) -> None:
        """No guest will run any more."""
        self._ended = True
        self._wake.set()
        self.join()

    def run(self) -> None:
        """The thread."""
        idle = 0
        while not self._ended:
            time.sleep(_TICK_SECONDS)
            idle = 0 if self._running else idle + 1
            if self._running and (self._poll.poll(0) or self._late()):
                self._vcpu.stop()
            elif idle > 25:
                self._sleep()

    def _late(self) -> bool:
        deadline = self.deadline
        return deadline is not None and time.monotonic() >= deadline

    def _sleep(self) -> None:
        self._wake.clear()
        self._asleep = True
        if not self._running and not self._ended:
            self._wake.wait()
        self._asleep = False


class _Session:
    """One vCPU's conversation with the chip."""

    def __init__(self, sock: socket.socket, vcpu: Vcpu) -> None:
        self._sock = sock
        self._vcpu = vcpu
        self._watch = _Watch(vcpu, sock)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def serve(self) -> None:
        """Until the chip closes its end."""
        self._watch.start()
        try:
            while (message := self._receive()) is not None:
                if isinstance(message, RunMessage):
                    if not self._run(message):
                        return
                else:
                    self._change(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # the chip is gone; so are we
        finally:
            self._watch.end()
            self._vcpu.memory.close()

    def _receive(self) -> Message | None:
        data = self._sock.recv(MAX_MESSAGE_BYTES)
        return parse_message(data) if data else None

    def _change(self, message: Message) -> bool:
        """Do what a message that is not RUN asks for; True when it was STOP."""
        if isinstance(message, MapMessage):
            self._vcpu.memory.map(message.gpa, message.length, Memory(message.memory), Access(message.access))
        elif isinstance(message, UnmapMessage):
            self._vcpu.memory.unmap(message.gpa, message.length)
        elif message.kind == Kind.STOP:
            return True
        else:
            raise ProtocolError("not a message for a vCPU at this point", code="vcpu-message", got=message.kind)
        self._sock.send(ack(message.sequence))
        return False

    def _run(self, message: RunMessage) -> bool:
        """Run the guest to its next exit; False when the chip hung up meanwhile."""
        if not self._vcpu.load(message.registers):
            self._answer(message, (ExitCode.INVALID, 0, 0), message.registers)
            return True
        limit = message.time_limit_us
        self._watch.deadline = time.monotonic() + limit / 1e6 if limit else None
        reason: tuple[ExitCode, int, int] | None = None
        while reason is None:
            self._watch.enter()
            try:
                reason = self._vcpu.enter()
            finally:
                self._watch.leave()
            while reason is None and self._poll.poll(0):
                waiting = self._receive()
                if waiting is None:
                    return False
                if self._change(waiting):
                    reason = (ExitCode.INTR, 0, 0)
            if reason is None and self._watch.deadline is not None and time.monotonic() >= self._watch.deadline:
                reason = (ExitCode.INTR, 0, 0)
        self._answer(message, reason, self._vcpu.save())
        return True

    def _answer(self, run: RunMessage, reason: tuple[ExitCode, int, int], registers: Registers) -> None:
        code, info_1, info_2 = reason
        self._sock.send(
            ExitMessage(
                kind=Kind.EXIT,
                reserved_04=0,
                sequence=run.sequence,
                exit_code=code,
                exit_info_1=info_1,
                exit_info_2=info_2,
                registers=registers,
            ).pack()
        )


def run_vcpu(sock: socket.socket, *, vmpl2_fd: int, shared_fd: int) -> None:
    """The vCPU process's main: serve the chip until it closes its end of the socket.

    Args:
        sock: SOCK_SEQPACKET, blocking; `svsm.formats.snp.vcpu_messages` on it.
        vmpl2_fd: The memfd of VMPL2 pages; offset = GPA.
        shared_fd: The memfd of shared pages; offset = GPA.

    Raises:
        StateError: ``guest-unicorn-missing``.
        FormatError, ProtocolError: The chip sent something that is no message; the process ends.
        BackendError: ``vcpu-map`` when memory cannot be mapped.
    """
    _Session(sock, Vcpu({Memory.VMPL2: vmpl2_fd, Memory.SHARED: shared_fd})).serve()
