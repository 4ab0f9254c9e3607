# SPDX-License-Identifier: MIT OR Apache-2.0
"""Names for every descriptor and every mapped memfd of a running system, as the table in docs/DESIGN.md calls them.

A descriptor is named by what it reaches, not by what its holder says: a memfd by its name and its seals, a file by its
path, a pipe by who holds its other end, a Unix socket by who holds its peer (asked from the kernel with sock_diag), a
pidfd by its process. What fits no row keeps a name of its own (with everybody who holds an end in it), so it can't
equal the table.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["COLUMNS", "Table", "Unit", "count_descriptors", "design_table", "mapped_memories", "unix_sockets"]

DESIGN = Path(__file__).parents[2] / "docs" / "DESIGN.md"
COLUMNS = ("supervisor", "broker", "proxy", "host", "device", "hardware", "spawner", "kernel", "vtpm", "vcpu")
_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MEMORIES = {"svsm-private": "private memory", "svsm-vmpl2": "VMPL2 memory", "svsm-shared": "shared memory"}
_SEALED = {"payload:archive": "archive, sealed", "loader": "loader's text, sealed"}
_FILES = {
    r"^/dev/null$": "`/dev/null`",
    r"/out$": "standard output and error",
    r"/state/lock$": "state lock",
    r"/host/disk\.img$": "disk",
    r"/broker/broker\.sqlite$": "broker database",
}
_LISTENERS = {
    "serial.sock": "serial line, listening",
    "vtpm0.sock": "TPM front, listening",
    "vtpm0.sock.ctrl": "TPM front, listening",
    "guest.sock": "guest driver, listening",
}
_CHANNELS = {
    ("host", "hardware", "seqpacket"): "host ↔ hardware",
    ("host", "device", "seqpacket"): "host ↔ device",
    ("hardware", "kernel", "seqpacket"): "hardware ↔ kernel",
    ("host", "kernel", "seqpacket"): "host ↔ kernel",
    ("hardware", "vcpu", "seqpacket"): "hardware ↔ vcpu",
    ("hardware", "spawner", "seqpacket"): "hardware ↔ spawner",
    ("kernel", "vtpm", "stream"): "syscall socket",
    ("supervisor", "host", "stream"): "power button",
    ("supervisor", "broker", "seqpacket"): "enrolment",
    ("supervisor", "supervisor", "stream"): "signal wake-up",
    ("proxy", "kernel", "stream"): "serial line, connected",
    ("test", "kernel", "stream"): "serial line, connected",
    ("test", "vtpm", "stream"): "TPM client",
}
_KINDS = {1: "stream", 5: "seqpacket"}
_LISTEN = 10


@dataclasses.dataclass(frozen=True)
class Unit:
    """A process and the column it belongs to."""

    pid: int
    column: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The table: row → column → how many. A cell with words counts only while what they say goes on."""

    quiet: Mapping[str, Mapping[str, int]]
    passing: Mapping[tuple[str, str], str]
    """(row, column) → the words."""

    def column(self, name: str) -> dict[str, int]:
        """What a process of that column holds while nothing passes."""
        return {row: cells[name] for row, cells in self.quiet.items() if cells[name]}


def design_table(heading: str, text: str | None = None) -> Table:
    """The table whose first header cell is `heading`, out of docs/DESIGN.md."""
    lines = iter((DESIGN.read_text(encoding="utf-8") if text is None else text).splitlines())
    header = next(_cells(line) for line in lines if line.startswith(f"| {heading} |"))
    assert tuple(header[1:]) == COLUMNS, header
    assert set(next(lines)) <= set("|-: ")
    quiet: dict[str, dict[str, int]] = {}
    passing: dict[tuple[str, str], str] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        row, *cells = _cells(line)
        assert len(cells) == len(COLUMNS), line
        assert row not in quiet, line
        quiet[row] = {}
        for column, cell in zip(COLUMNS, cells, strict=True):
            match = re.fullmatch(r"(\d+)?( .+)?", cell)
            assert match, f"{row}: neither a number nor a number with words: {cell}"
            quiet[row][column] = int(match[1]) if match[1] and not match[2] else 0
            if match[2]:
                passing[row, column] = match[2].strip()
    return Table(quiet, passing)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@dataclasses.dataclass(frozen=True)
class UnixSocket:
    """What sock_diag says about one socket."""

    kind: str
    state: int
    name: str
    peer: int


def unix_sockets() -> dict[int, UnixSocket]:
    """Every Unix socket of this network namespace by inode: NETLINK_SOCK_DIAG, sock_diag(7)."""
    found: dict[int, UnixSocket] = {}
    body = struct.pack("<BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFF_FFFF, 0, 0x1 | 0x4, 0xFFFF_FFFF, 0xFFFF_FFFF)
    request = struct.pack("<IHHII", 16 + len(body), 20, 0x301, 1, 0) + body  # SOCK_DIAG_BY_FAMILY, REQUEST | DUMP
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:
        diag.settimeout(5)
        diag.send(request)
        while True:
            data = diag.recv(1 << 18)
            while data:
                length, kind = struct.unpack_from("<IH", data)
                if kind == 3:  # NLMSG_DONE
                    return found
                assert kind == 20, f"sock_diag answers {kind}"
                _family, type_, state, _, inode = struct.unpack_from("<BBBBI", data, 16)
                attributes = dict(_attributes(data[32:length]))
                name = attributes.get(0, b"").rstrip(b"\0").decode(errors="replace")
                peer = int.from_bytes(attributes.get(2, b"")[:4], "little")
                found[inode] = UnixSocket(_KINDS.get(type_, str(type_)), state, name, peer)
                data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterable[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("<HH", data)
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]


@dataclasses.dataclass
class _Look:
    """One look at everything: who holds which inode."""

    units: Mapping[int, str]
    sockets: Mapping[int, UnixSocket]
    holders: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    readers: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    writers: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))


Held = tuple[str, str, int, str]
"""Target, fdinfo, file mode, path in /proc."""


def _held(pid: int) -> list[Held]:
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        try:
            info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
            found.append((os.readlink(path), info, int(info.split("flags:")[1].split()[0], 8), path))
        except FileNotFoundError:  # closed meanwhile: the look is repeated until it is quiet
            continue
    return found


def count_descriptors(units: Iterable[Unit]) -> dict[int, collections.Counter[str]]:
    """Every process's descriptors: row name → how many."""
    columns = {unit.pid: unit.column for unit in units}
    held = {pid: _held(pid) for pid in columns}
    look = _Look(columns, unix_sockets())
    for pid, column in [*columns.items(), (os.getpid(), "test")]:
        for target, _, flags, _path in held.get(pid) or _held(pid):
            look.holders[target].append(column)
            if flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR):
                look.writers[target].append(column)
            if flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR):
                look.readers[target].append(column)
    return {
        pid: collections.Counter(_name(look, target, info, path) for target, info, _, path in entries)
        for pid, entries in held.items()
    }


def _name(look: _Look, target: str, info: str, path: str) -> str:
    if target.startswith("/memfd:"):
        return _memfd(target, path)
    if target.startswith("/"):
        return next((name for pattern, name in _FILES.items() if re.search(pattern, target)), target)
    if target.startswith("pipe:"):
        return _pipe(look, target)
    if target.startswith("socket:"):
        return _socket(look, target)
    if target == "anon_inode:[pidfd]" and (match := re.search(r"^Pid:\s+(\d+)$", info, re.M)):
        return {"kernel": "pidfd of kernel or vtpm", "vtpm": "pidfd of kernel or vtpm", "": "pidfd of a stranger"}.get(
            look.units.get(int(match[1]), ""), "pidfd of a role"
        )
    return {"anon_inode:[eventpoll]": "epoll", "anon_inode:[eventfd]": "eventfd"}.get(target, target)


def _memfd(target: str, path: str) -> str:
    name = target.removeprefix("/memfd:").removesuffix(" (deleted)")
    wanted = _SIZE_SEALS if name in _MEMORIES else _ALL_SEALS
    descriptor = os.open(path, os.O_RDONLY)
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    os.close(descriptor)
    known = _MEMORIES.get(name) or _SEALED.get(name)
    return known if known is not None and seals & wanted == wanted else f"memfd {name} with seals {seals:#x}"


def _pipe(look: _Look, target: str) -> str:
    readers, writers = sorted(look.readers[target]), sorted(look.writers[target])
    if readers == ["supervisor"]:
        if writers == ["kernel"]:
            return "kernel console"
        if set(writers) == {"hardware", "vtpm"}:
            return "service console"
        if len(writers) == 1 and writers[0] != "supervisor":
            return "event pipe"
    if readers == writers and len(readers) == 1:
        return "pipe to itself"
    return f"pipe {'+'.join(writers)} → {'+'.join(readers)}"


def _socket(look: _Look, target: str) -> str:
    inode = int(target[8:-1])
    here = sorted(look.holders[target])
    found = look.sockets.get(inode)
    if found is None:
        return _tcp(inode, here)
    if found.state == _LISTEN:
        name = _LISTENERS.get(os.path.basename(found.name), f"listener {found.name}")
        return name if len(here) == 1 else f"{name} of {'+'.join(here)}"
    there = sorted(look.holders.get(f"socket:[{found.peer}]", []))
    for (left, right, kind), name in _CHANNELS.items():
        if found.kind == kind and (here, there) in (([left], [right]), ([right], [left])):
            return name
    return f"{found.kind} socket {'+'.join(here)} ↔ {'+'.join(there) or 'nobody'}"


def _tcp(inode: int, here: list[str]) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[9]) == inode:
            local = fields[1].startswith("0100007F:")
            return "HTTP, listening on loopback" if fields[3] == "0A" and local else f"TCP {fields[1]} ↔ {fields[2]}"
    return f"socket {inode} of {'+'.join(here)}"


def mapped_memories(pid: int) -> set[str]:
    """The memfds that a process maps, as the table of mappings calls them; and memory without a file that may run."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(None, 5)
        path = fields[5].removesuffix(" (deleted)") if len(fields) > 5 else ""
        if path.startswith("/memfd:"):
            name = path.removeprefix("/memfd:")
            if name.startswith("payload:native/"):
                found.add("the payload's shared objects")
            else:
                found.add(_MEMORIES.get(name, name))
        elif "x" in fields[1] and not path.startswith(("/", "[vdso]", "[vsyscall]")):
            found.add("code written at run time")
    return found
