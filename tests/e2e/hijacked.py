# SPDX-License-Identifier: MIT OR Apache-2.0
"""A system whose TPM processes and whose host obey an attacker, for tests of what that is good for.

`HijackedSystem` boots from a copy of the sources in which the measured TPM service makes, on a TPM command that does
not exist, whatever raw system call the command says, as code that took over its C library would. The image is
built from that copy and its digest enrolled, so everything around the service is the real thing. In the same copy the
host answers a TCP connection to the TPM's control port by handing the kernel descriptors that are no clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from svsm.formats.tpm import CommandHeader
from tests.e2e.boot_support import descendants, short_folder
from tests.e2e.tpm_support import System, TpmClient

__all__ = [
    "BAD_DESCRIPTORS",
    "I386_GETPID",
    "HijackedSystem",
    "Pointer",
    "role_of",
    "smuggle",
    "unprivileged_interpreter",
]

_ROOT = Path(__file__).parents[2]
_CODE = 0x2000_0BAD
_NOBODY = 65534
I386_GETPID = -1
"""In place of a number: getpid by the 32-bit entry, out of a measured page."""

BAD_DESCRIPTORS = 9
"""How many descriptors, one by one, the hijacked host offers as clients."""

_SERVICE = """

def _hijacked(command: bytes) -> bytes:
    import ctypes
    import json
    from svsm.confine import callbacks, libc

    kept = []

    def value(given):
        if isinstance(given, int):
            return given
        data = bytes.fromhex(given) if isinstance(given, str) else b"".join(
            (value(word) % 2**64).to_bytes(8, "little") for word in given
        )
        kept.append(ctypes.create_string_buffer(data, len(data) or 1))
        return ctypes.addressof(kept[-1])

    number, arguments = json.loads(command[10:])
    if number < 0:
        result = ctypes.CFUNCTYPE(ctypes.c_int)(callbacks._Slots.base + 2048)()
    else:
        result = libc.syscall(number, *map(value, arguments))
    answer = json.dumps([result, [buffer.raw[:1024].hex() for buffer in kept]]).encode()
    return b"\\x80\\x01" + (10 + len(answer)).to_bytes(4, "big") + bytes(4) + answer
"""

_HOST = """
    def _smuggle(self, listener: Listener) -> None:
        stream, end = socket.socketpair()
        unconnected, listening = socket.socket(socket.AF_UNIX), listener.sock.dup()
        datagram, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        sequenced, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kept = [stream, end, unconnected, listening, datagram, sequenced, _]
        read, write = os.pipe()
        singles = [os.open("/proc/self/exe", os.O_PATH), os.open("/", os.O_PATH | os.O_DIRECTORY)]
        singles += [os.dup(self._shared_fd), read, write]
        singles += [os.dup(sock.fileno()) for sock in (unconnected, listening, datagram, sequenced)]
        for descriptor in singles:
            self.offer(DeviceOffer(ghcb.DeviceKind.CLIENT, descriptor, 0, 1))
        # An index that no TPM has, the TPM that has no socket, and the system's own parts out of turn.
        for kind, index in ((3, 7), (3, 1), (1, 0), (2, 0)):
            self.offer(DeviceOffer(ghcb.DeviceKind(kind), os.dup(stream.fileno()), index, 1))
        while self._outgoing:
            select.select([], [self._kernel], [], 1)
            self._flush()
        for count in (2, 253):
            message = Message(ghcb.HostMessage.DEVICE, (ghcb.DeviceKind.CLIENT, 0, 1)).pack()
            select.select([], [self._kernel], [], 1)
            socket.send_fds(self._kernel, [message], [stream.fileno()] * count)
"""


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, path
    path.write_text(text.replace(old, new))


def _sources(folder: Path) -> Path:
    """The copy with the attacker in it."""
    sources = folder / "src"
    shutil.copytree(_ROOT / "src", sources, ignore=shutil.ignore_patterns("__pycache__"))
    server = sources / "svsm" / "services" / "vtpm" / "server.py"
    _edit(
        server,
        '        """A command of a data client."""\n',
        f'        if command[6:10] == bytes.fromhex("{_CODE:08x}"):\n            return _hijacked(command)\n',
    )
    server.write_text(server.read_text() + _SERVICE)
    _edit(
        sources / "svsm" / "confine" / "callbacks.py",
        "    return bytes(page) + bytes([0xCC]) * (_PAGE_BYTES - len(page))\n",
        '    page += bytes.fromhex("b814000000cd80c3")\n'  # mov eax, 20 ; int 0x80 ; ret
        "    return bytes(page) + bytes([0xCC]) * (_PAGE_BYTES - len(page))\n",
    )
    hypervisor = sources / "svsm" / "host" / "hypervisor.py"
    _edit(
        hypervisor,
        "                    connection, _ = listener.sock.accept()\n",
        "                    connection, _ = listener.sock.accept()\n"
        "                    if connection.family == socket.AF_INET and listener.port == 0:\n"
        "                        self._smuggle(listener)\n"
        "                        continue\n",
    )
    _edit(hypervisor, "\n    def _ended(self, notice: Message)", f"{_HOST}\n    def _ended(self, notice: Message)")
    return sources


class Pointer(list["int | str | Pointer"]):
    """An argument that points to these words; a `str` argument points to these bytes (hex)."""


class HijackedSystem(System):
    """See the module.

    Args:
        options: More options of `svsm boot`.
        interpreter: Run everything as nobody, with this Python; None: as who runs the tests.
    """

    def __init__(self, *options: str, interpreter: str | None = None) -> None:
        self.folder = short_folder()
        sources = _sources(self.folder)
        path = [str(sources)]
        wrap: tuple[str, ...] = ()
        self.folder.chmod(0o755)
        where = self.folder / "run"
        where.mkdir()
        if interpreter is not None:
            path.append(sysconfig.get_paths()["purelib"])
            os.chown(where, _NOBODY, _NOBODY)
            # The words that follow begin with the interpreter of the tests, which nobody may not be able to read.
            script = f'shift; exec setpriv --reuid {_NOBODY} --regid {_NOBODY} --clear-groups "{interpreter}" "$@"'
            wrap = ("/bin/sh", "-c", script, "sh")
        environment = {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
        if interpreter is not None:
            environment |= {"HOME": str(where), "XDG_CACHE_HOME": str(where / "cache")}
        super().__init__(where, "--tpm-tcp", "0", *options, wrap=wrap, environment=environment)

    def remove(self) -> None:
        """End it and remove the copy."""
        self.close()
        shutil.rmtree(self.folder)

    def call(self, number: int, *arguments: int | str | Pointer) -> tuple[int, list[bytes]] | None:
        """Have the socket TPM's process make a system call.

        Returns:
            Its answer (or minus the errno) and the buffers as they are then; None when the process died of it.
        """
        body = json.dumps([number, arguments]).encode()
        command = CommandHeader(0x8001, 10 + len(body), _CODE).pack() + body
        try:
            with TpmClient(self.where) as client:
                response = client.ask(command)
        except ConnectionResetError:
            return None
        result, buffers = json.loads(response[10:])
        return result, [bytes.fromhex(buffer) for buffer in buffers]

    def pids(self) -> dict[str, list[int]]:
        """The processes by role; needs the right to look."""
        found: dict[str, list[int]] = {}
        for pid in descendants(self.instance.process.pid):
            found.setdefault(role_of(pid) or "other", []).append(pid)
        return found


def role_of(pid: int) -> str | None:
    """The role of a payload process ("kernel", "vtpm"), from what the loader was told; None for other processes."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == b"SVSM_ROLE":
                return value.decode()
    return None


def unprivileged_interpreter() -> str:
    """A Python that nobody can run with what svsm needs; skips where there is none."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    path = os.pathsep.join([str(_ROOT / "src"), sysconfig.get_paths()["purelib"]])
    for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [candidate, "-c", "import cryptography.hazmat.bindings._rust, _cffi_backend, svsm"],
                env={"PYTHONPATH": path},
                user=_NOBODY,
                group=_NOBODY,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                check=False,
            )
            if done.returncode == 0:
                return candidate
    pytest.skip("no Python here that another user can run together with svsm's packages")


def smuggle(tcti: str) -> None:
    """Make the hijacked host hand over what is no client."""
    host, port = (part.partition("=")[2] for part in tcti.partition(":")[2].split(","))
    with socket.create_connection((host, int(port) + 1)):
        return
