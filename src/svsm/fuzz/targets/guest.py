# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the guest and a hijacked service can do to the kernel: SVSM calls with any registers, syscalls with any frames.

`_Memory` is a platform in a dictionary that also is the judge: every access of the kernel on the guest's behalf passes
through it, and one that the guest could not have made itself (outside its memory, on a VMSA, a page handed out that
still holds somebody's data) is a broken invariant, whatever the result code says.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final

from svsm.abi import syscall
from svsm.abi.errors import ProtocolError
from svsm.abi.platform import PAGE_SIZE, Gpa, Permission, Vmpl
from svsm.abi.syscall import Event, EventKind, FrameReader, Reply, Request
from svsm.formats.errors import SvsmError
from svsm.formats.record import Buffer
from svsm.formats.snp.vmsa import VmsaView
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect
from svsm.fuzz.targets.material import open_descriptors
from svsm.kernel.events import EventLoop
from svsm.kernel.objects import MAX_QUEUED_EVENTS, EventQueue, FileObject, KernelObject, QueuedEvent, SinkObject
from svsm.kernel.processes import Process, ProcessTable
from svsm.kernel.protocols.core import core_protocol
from svsm.kernel.protocols.guest_memory import GuestMemory, Region, VcpuArea
from svsm.kernel.protocols.table import ProtocolTable
from svsm.kernel.protocols.vtpm import MAX_COMMAND_BYTES, vtpm_protocol
from svsm.kernel.requests import EXIT_HLT, EXIT_INTR, EXIT_VMGEXIT, GuestState, RequestLoop
from svsm.testing.file_store import MemoryFileStore

__all__ = ["ROWS"]

_BASE: Final = 0x4000_0000
_LENGTH: Final = 4 << 20
_LARGE: Final = 2 << 20
_AREA: Final = _BASE + 0x3000
_VMSA: Final = _BASE + 0x8000
_OTHER_AREA: Final = _BASE + 0xA000
_OTHER_VMSA: Final = _BASE + 0xB000
_LAUNCH_VMSA: Final = _BASE + 0xF000
_VMPL_OFFSET: Final = 0xCA
_EFER_OFFSET: Final = 0xD0
_MAX_STEPS: Final = 24
_PLACES: Final = (
    _BASE, _BASE + 0x1000, _BASE + 0x1FF8, _AREA, _AREA - 8, _VMSA, _VMSA - 8, _VMSA + 0xC8, _OTHER_AREA, _OTHER_VMSA,
    _LAUNCH_VMSA, _LAUNCH_VMSA - 4, _BASE + _LARGE, _BASE + _LENGTH - 0x1000, _BASE + _LENGTH - 8, _BASE + _LENGTH,
    _BASE - 8, _BASE - 0x1000, 0, 0x1000, 0x800_0000, 0xFFFF_FFFF_F000, (1 << 64) - 8, (1 << 52) - 0x1000,
)  # fmt: skip


class _Memory:
    """See the module."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.given_up: set[int] = set()
        self.runs = 0
        self.large_pages = False
        self.busy = 0
        """How many more times the host runs the vCPU just when the kernel wants its VMSA."""

    def page(self, gpa: int) -> bytearray:
        """The page of an address, whatever its state."""
        return self.pages.setdefault(gpa & -PAGE_SIZE, bytearray(PAGE_SIZE))

    def _guests(self, gpa: int, length: int) -> None:
        expect(gpa >= _BASE and gpa + length <= _BASE + _LENGTH, "the kernel stays in the guest's memory")
        for forbidden in (_OTHER_VMSA, _LAUNCH_VMSA):
            expect(not (gpa < forbidden + PAGE_SIZE and forbidden < gpa + length), "no VMSA is touched for the guest")

    def _own_vmsa(self, gpa: int, length: int) -> bool:
        inside = gpa < _VMSA + PAGE_SIZE and gpa + length > _VMSA
        allowed = ((_VMSA, PAGE_SIZE), (_VMSA + _EFER_OFFSET, 8))
        expect(not inside or (gpa, length) in allowed, "its VMSA is the request loop's")
        return inside

    def _check_state(self, gpa: int) -> None:
        if gpa & -PAGE_SIZE in self.given_up:
            raise ProtocolError("not validated", code="platform-not-validated", gpa=gpa)

    def read(self, gpa: Gpa, length: int) -> bytes:
        self._guests(gpa, length)
        self._own_vmsa(gpa, length)
        self._check_state(gpa)
        return bytes(self.page(gpa)[gpa % PAGE_SIZE :][:length])

    def write(self, gpa: Gpa, data: Buffer) -> None:
        self._guests(gpa, len(data))
        page = self.page(gpa)
        if self._own_vmsa(gpa, len(data)):
            kept = len(data) < PAGE_SIZE or data[_VMPL_OFFSET] == page[_VMPL_OFFSET]
            expect(kept, "a guest keeps its privilege level")
        self._check_state(gpa)
        page[gpa % PAGE_SIZE : gpa % PAGE_SIZE + len(data)] = data

    def _check_page_call(self, gpa: int, size_bytes: int) -> None:
        self._guests(gpa, size_bytes)
        expect(gpa % size_bytes == 0, "pages are aligned")
        expect(not gpa <= _VMSA < gpa + size_bytes, "a VMSA keeps its state")
        if size_bytes != PAGE_SIZE and not self.large_pages:
            raise ProtocolError("size mismatch", code="platform-instruction", gpa=gpa, instruction_code=6)

    def validate(self, gpa: Gpa, *, size_bytes: int, validated: bool) -> bool:
        self._check_page_call(gpa, size_bytes)
        pages = set(range(gpa, gpa + size_bytes, PAGE_SIZE))
        given_up = pages & self.given_up
        if (not given_up) if validated else (given_up == pages):
            return False
        self.given_up = self.given_up - pages if validated else self.given_up | pages
        if not validated:
            for page in pages:
                self.pages[page] = bytearray(b"\xaa" * PAGE_SIZE)  # somebody else's by now
        return True

    def adjust(self, gpa: Gpa, *, size_bytes: int, vmpl: Vmpl, permissions: Permission, vmsa: bool) -> None:
        if vmsa:
            expect((gpa, size_bytes, permissions) == (_VMSA, PAGE_SIZE, Permission.NONE), "a question about its VMSA")
            self.busy -= 1
            if self.busy >= 0:
                raise ProtocolError("in use", code="platform-instruction", gpa=gpa, instruction_code=3)
            return
        self._check_page_call(gpa, size_bytes)
        expect(vmpl in (2, 3), "rights of lower levels only")
        for page in range(gpa, gpa + size_bytes, PAGE_SIZE):
            self._check_state(page)
            expect(not permissions or not any(self.page(page)), "a page is empty when the guest gets it")

    def run_guest(self, vmsa_gpa: Gpa) -> None:
        expect(vmsa_gpa == _VMSA, "the vCPU that runs is this one")
        self.runs += 1


class _Tpm:
    """Answers at once, later, too long, or never."""

    def __init__(self) -> None:
        self.mode = 0
        self.waiting: list[Callable[[bytes | None], None]] = []

    def powered_on(self) -> bool:
        return self.mode != 4

    def submit(self, command: bytes, done: Callable[[bytes | None], None]) -> None:
        expect(len(command) <= MAX_COMMAND_BYTES, "a command fits its buffer")
        if self.mode == 0:
            done(command[::-1])
        elif self.mode == 1:
            done(None)
        elif self.mode == 2:
            done(b"\xee" * 4093)
        else:
            self.waiting.append(done)


def _place(choices: Choices) -> int:
    return (choices.pick(_PLACES) + choices.unsigned(1)) & ((1 << 64) - 1) if choices.flag() else choices.pick(_PLACES)


def _calls(data: bytes) -> None:
    choices = Choices(data)
    platform, tpm = _Memory(), _Tpm()
    platform.large_pages = choices.flag()
    memory = GuestMemory(platform, [Region(Gpa(_BASE), _LENGTH)], protected=[Gpa(_LAUNCH_VMSA)])
    memory.register(VcpuArea(Gpa(_VMSA), Gpa(_AREA)))
    memory.register(VcpuArea(Gpa(_OTHER_VMSA), Gpa(_OTHER_AREA)))
    table = ProtocolTable([])
    table.add(core_protocol(platform, memory, table))
    table.add(vtpm_protocol(memory, tpm))
    vmsa = VmsaView(platform.page(_VMSA))
    vmsa.set("efer", 0x1D00)
    platform.page(_VMSA)[_VMPL_OFFSET] = 2
    loop = RequestLoop(platform, memory, table, Gpa(_VMSA))
    loop.start()
    for _ in range(_MAX_STEPS):
        if not choices.more or loop.state is GuestState.STOPPED:
            break
        _guest_step(choices, platform, memory, loop, tpm)
        expect(bool(vmsa.get("efer") & 0x1000) == (loop.state is GuestState.RUNNING), "SVME is set while it may run")
    expect(len(tpm.waiting) <= 1, "one vCPU waits for one command")


def _guest_step(choices: Choices, platform: _Memory, memory: GuestMemory, loop: RequestLoop, tpm: _Tpm) -> None:
    operation = choices.below(7)
    if operation == 6:
        _write_list(choices, platform)
        if loop.state is GuestState.RUNNING:
            _exit(choices, platform, memory, loop, registers=(0, 1, _BASE))
    elif operation == 5:
        platform.busy = choices.below(12)
    elif operation == 0:  # the guest writes its memory
        gpa, piece = _place(choices), choices.blob(48)
        if gpa >= _BASE and gpa + len(piece) <= _BASE + _LENGTH and not _on_vmsa(gpa, len(piece)):
            for at, value in enumerate(piece, gpa):
                if at & -PAGE_SIZE not in platform.given_up:
                    platform.page(at)[at % PAGE_SIZE] = value
    elif operation == 1:
        tpm.mode = choices.below(5)
    elif operation == 2 and tpm.waiting:
        tpm.waiting.pop(0)(choices.blob(64) if choices.flag() else None)
    elif operation == 3 and loop.state is GuestState.HALTED:
        loop.resume()
    elif loop.state is GuestState.RUNNING:
        _exit(choices, platform, memory, loop)


def _write_list(choices: Choices, platform: _Memory) -> None:
    """The guest writes a PVALIDATE list to its first page."""
    entries = [
        _place(choices) & -PAGE_SIZE | choices.pick((0, 4, 8, 12, 1, 5, 13, choices.unsigned(1))) for _ in range(3)
    ]
    count = choices.below(5)
    words = [count | choices.below(2) << 16, *entries]
    if _BASE not in platform.given_up:
        packed = b"".join((word & ((1 << 64) - 1)).to_bytes(8, "little") for word in words)
        platform.page(_BASE)[: len(packed)] = packed


def _on_vmsa(gpa: int, length: int) -> bool:
    return any(gpa < vmsa + PAGE_SIZE and gpa + length > vmsa for vmsa in (_VMSA, _OTHER_VMSA, _LAUNCH_VMSA))


def _exit(
    choices: Choices,
    platform: _Memory,
    memory: GuestMemory,
    loop: RequestLoop,
    registers: tuple[int, int, int] | None = None,
) -> None:
    vmsa = VmsaView(platform.page(_VMSA))
    code = choices.pick((EXIT_VMGEXIT, EXIT_VMGEXIT, EXIT_VMGEXIT, EXIT_INTR, EXIT_HLT, choices.number()))
    vmsa.set("guest_exit_code", code & ((1 << 64) - 1))
    known = choices.pick(((0, 0), (0, 1), (0, 6), (0, 7), (2, 0), (2, 1), (choices.unsigned(1), choices.unsigned(1))))
    protocol, number, rcx = registers or (*known, _place(choices) if choices.flag() else choices.number())
    vmsa.set("rax", protocol << 32 | number)
    vmsa.set("rcx", rcx)
    for name in ("rdx", "r8", "r9"):
        vmsa.set(name, choices.number())
    area = memory.calling_area(Gpa(_VMSA))
    if area & -PAGE_SIZE not in platform.given_up:
        platform.page(area)[area % PAGE_SIZE] = choices.pick((1, 1, 1, 0, 2))
    before = {name: vmsa.get(name) for name in ("rip", "r9", "rbx", "rsp", "cr3")}
    served = loop.calls_served
    loop.on_exit()
    expect({name: vmsa.get(name) for name in before} == before, "a call changes no other register")
    if loop.calls_served > served:
        result = vmsa.get("rax")
        expect(result == 0 or 0x8000_0000 <= result < 0x8000_3000, "a result is one of the specification's")


def _pvalidate_seed() -> bytes:
    """Poke a list of one entry that gives up a page, then call PVALIDATE on it."""
    entries = (1).to_bytes(2, "little") + bytes(6) + (_BASE + 0x5000).to_bytes(8, "little")
    poke = bytes([0, 0, 0, len(entries)]) + entries
    call = bytes([4, 0, 1, 1, 0, 0, 0, 0, 0, 0])
    return bytes([0]) + poke + call


# --- a hijacked service ----------------------------------------------------------------------------------------


class _Kernel:
    """The kernel's side of one service whose process is the attacker's."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.store = MemoryFileStore()
        self.later: list[Callable[[], None]] = []
        self.exits: list[SvsmError | None] = []
        self.killed = 0
        self.requests = 0
        self.deaf = False
        """The service does not read."""
        self.lines: list[bytes] = []
        self.events = EventQueue(lambda _command, response: expect(len(response) <= 4096, "answers are bounded"))
        self.store.files[1] = bytes(range(250)) * 4
        kernel_end, self.service = socket.socketpair()
        kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the smallest: replies have to wait
        self.service.setblocking(False)
        table = ProcessTable(self.loop, lambda _service, _parameters: kernel_end, self._kill)
        namespace: dict[str, KernelObject] = {
            "state": FileObject(self.store, 1, 1000),
            "other": FileObject(self.store, 2, 1000),
            "log": SinkObject(self.lines.append),
            "events": self.events,
        }
        self.process = table.start("test", {}, namespace, self._exited)

    def _kill(self, _connection: socket.socket) -> None:
        self.killed += 1

    def _exited(self, _process: Process, reason: SvsmError | None) -> None:
        self.exits.append(reason)

    def turn(self) -> None:
        for _ in range(4):
            self.loop.run_once(0)

    def close(self) -> None:
        self.service.close()
        self.process.end()
        for queued in self.events.drain():
            if queued.connection is not None:
                queued.connection.close()
        self.loop.close()


_REQUESTS: Final[tuple[tuple[syscall.Call, Callable[[int], bytes]], ...]] = (
    (syscall.Call.OPEN, lambda _handle: b"state"),
    (syscall.Call.OPEN, lambda _handle: b"events"),
    (syscall.Call.OPEN, lambda _handle: b"log"),
    (syscall.Call.READ, lambda handle: syscall.encode_read(handle, 0, 1000)),
    (syscall.Call.REPLACE, lambda handle: syscall.encode_replace({handle: b"abc"})),
    (syscall.Call.WAIT, syscall.encode_handle),
    (syscall.Call.ANSWER, lambda handle: syscall.encode_answer(handle, 1, b"response")),
    (syscall.Call.WRITE, lambda handle: syscall.encode_write(handle, b"line")),
    (syscall.Call.CLOSE, syscall.encode_handle),
)


def _service(data: bytes) -> None:
    choices = Choices(data)
    opened = open_descriptors()
    kernel = _Kernel()
    reader = FrameReader()
    try:
        for _ in range(_MAX_STEPS):
            if not choices.more:
                break
            _service_step(choices, kernel)
            kernel.turn()
            chunk = b"" if kernel.deaf else _received(kernel.service)
            for header, body in reader.feed(chunk):
                Reply.parse(header, body)
            expect(len(kernel.events) <= MAX_QUEUED_EVENTS, "events are bounded")
            expect(kernel.process.connections <= syscall.MAX_HANDLES, "handles are bounded")
        expect(set(kernel.store.files) <= {1, 2}, "only its own files are written")
        expect(all(len(contents) <= 1000 for contents in kernel.store.files.values()), "a file has its limit")
    finally:
        kernel.close()
    expect(len(kernel.exits) == kernel.killed == 1, "its end is told once, and it is killed once")
    expect(open_descriptors() <= opened, "no descriptor is left")


def _service_step(choices: Choices, kernel: _Kernel) -> None:
    operation = choices.below(6)
    try:
        if operation <= 3:
            call, body = choices.pick(_REQUESTS)
            kernel.requests += 1
            number = choices.below(4) if operation == 2 else 100 + kernel.requests
            handle = 1 + choices.below(3)
            frame = Request(number, call, choices.edited(body(handle))).pack()
            for _ in range(choices.pick((1, 1, 1, 8)) if operation == 1 else 1):
                kernel.service.send(choices.edited(frame) if operation == 3 else frame)
        elif operation == 4:
            kernel.service.send(choices.blob(64))
        else:
            _happen(choices, kernel)
    except OSError:
        pass


def _happen(choices: Choices, kernel: _Kernel) -> None:
    """Something happens to the service: a command, a client, the end."""
    kind = choices.below(4)
    if kind == 3:
        kernel.deaf = choices.flag()
    elif kind == 0:
        kernel.events.push(QueuedEvent(Event(EventKind.COMMAND, command_id=1, command=b"\x80\1" + bytes(8))))
    elif kind == 1:
        ours, theirs = socket.socketpair()
        theirs.close()
        if not kernel.events.push(QueuedEvent(Event(EventKind.CONNECTION), ours)):
            ours.close()
    else:
        kernel.events.push(QueuedEvent(Event(EventKind.STOP)))


def _received(connection: socket.socket) -> bytes:
    try:
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 16)
    except OSError:
        return b""
    for descriptor in descriptors:
        os.close(descriptor)
    return data


def _service_seeds() -> list[bytes]:
    """Open two objects and use them; a client that comes while the service does not read."""
    opened = bytes([0, 0, 0, 0, 0, 1, 0, 0])  # "state" is 1, "events" is 2
    used = bytes([0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 1, 5, 0, 0, 6, 0, 1])
    deaf = bytes([5, 3, 1]) + bytes([0, 3, 0, 0]) * 6 + bytes([0, 5, 0, 1, 5, 1])
    return [opened + used, opened + deaf, bytes([5, 0, 5, 1, 0, 1, 0, 0, 0, 5, 0, 0])]


ROWS = (
    Target(
        "guest-calls",
        "SVSM calls of a guest: any registers, any memory, any order",
        _calls,
        lambda: [_pvalidate_seed(), bytes([1, *([4, 0, 5, 0, 1, 0, 0, 0, 0, 0] * 4)])],
        max_bytes=512,
    ),
    Target(
        "hijacked-service",
        "syscalls of a service whose process is the attacker's",
        _service,
        _service_seeds,
        max_bytes=512,
    ),
)
