# SPDX-License-Identifier: MIT OR Apache-2.0
"""A TPM without the rest of the machine: plays kernel and host for one vTPM service.

    python -m svsm.testing.tpm_harness --state FILE [--unix PATH] [--tcp PORT] [--mssim PORT] [--confined]

The event loop, the process table, the syscalls and the service are the real ones; missing is the
encrypted volume: the state lies in FILE, in the clear. Without --confined the service runs from the Python path, as any
process does. For tests and measurements only.

Listens on PATH and PATH.ctrl (Unix), PORT and PORT+1 (TCP): data and control, as swtpm's clients expect it; --mssim:
PORT data, PORT+1 platform. Prints one JSON line when the TPM is ready.
SIGTERM ends in order, SIGUSR1 makes every later store fail, SIGUSR2 makes stores work again; a line says from when on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from svsm.abi.syscall import Endpoint, Transport
from svsm.formats.errors import BackendError, SvsmError
from svsm.kernel.events import READ, EventLoop
from svsm.kernel.objects import FileStore
from svsm.kernel.processes import ProcessTable
from svsm.kernel.tpm import TpmService, tpm_state_inode

__all__ = ["Harness", "PathFileStore", "spawn_unconfined"]

_CHILD = (
    "import sys, json; from svsm.services.vtpm import run; sys.exit(run(int(sys.argv[1]), json.loads(sys.argv[2])))"
)


class PathFileStore:
    """A `FileStore` whose one file is a path, replaced by rename, with fsync or without."""

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self._path = path
        self._fsync = fsync
        self.fail = False

    def read(self, inode: int) -> bytes | None:
        """See `FileStore`."""
        del inode
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def replace_many(self, changes: Mapping[int, bytes], done: Callable[[SvsmError | None], None]) -> None:
        """See `FileStore`."""
        if self.fail:
            done(BackendError("told to fail", code="harness-store"))
            return
        for data in changes.values():
            beside = self._path.with_name(self._path.name + ".new")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.write(descriptor, data)
            if self._fsync:
                os.fsync(descriptor)
            os.close(descriptor)
            beside.replace(self._path)
        done(None)


def spawn_unconfined(children: list[subprocess.Popen[bytes]]) -> Callable[[str, Mapping[str, str]], socket.socket]:
    """A spawn function that runs the service from the Python path; each child is added to `children`."""

    def spawn(service: str, parameters: Mapping[str, str]) -> socket.socket:
        del service
        kernel_end, service_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        number = service_end.fileno()
        children[:] = [child for child in children if child.poll() is None]
        with service_end:
            command = [sys.executable, "-c", _CHILD, str(number), json.dumps(dict(parameters))]
            children.append(subprocess.Popen(command, pass_fds=(number,), stdin=subprocess.DEVNULL))
        return kernel_end

    return spawn


def spawn_confined() -> Callable[[str, Mapping[str, str]], socket.socket]:
    """A spawn function that runs the service as a boot does: out of a measured payload, locked down."""
    from svsm.hardware.spawn import sealed_memfd, spawn_service
    from svsm.launch.payload import ENTRIES, build_payload

    payload = build_payload(entries={"vtpm": ENTRIES["vtpm"]})
    archive = sealed_memfd("payload:archive", payload.archive)

    def spawn(service: str, parameters: Mapping[str, str]) -> socket.socket:
        process, kernel_end = spawn_service(archive, service, parameters, loader_text=payload.loader)
        os.close(process.descriptor)
        return kernel_end

    return spawn


class Harness:
    """One TPM service with its kernel and host, in this thread.

    Args:
        store: Where the state goes.
        front: ``socket`` or ``svsm``.
        release: Let answers leave at once.
        confined: Run the service out of a measured payload; `children` stays empty then.
    """

    def __init__(
        self,
        store: FileStore,
        *,
        front: Literal["socket", "svsm"] = "socket",
        release: bool = True,
        confined: bool = False,
    ) -> None:
        self.loop = EventLoop()
        self.children: list[subprocess.Popen[bytes]] = []
        spawn = spawn_confined() if confined else spawn_unconfined(self.children)
        self.processes = ProcessTable(self.loop, spawn, lambda _connection: None)
        self.lines: list[str] = []
        self.ready_names: list[bytes | None] = []
        self.refused: list[str] = []
        self._listeners: list[socket.socket] = []
        self.tpm = TpmService(
            self.processes,
            name="harness",
            front=front,
            store=store,
            inode=tpm_state_inode(0),
            log=self.lines.append,
            on_ready=self.ready_names.append,
        )
        if release:
            self.tpm.release()
        self.tpm.start()

    def until(self, done: Callable[[], bool], timeout_seconds: float = 20.0) -> None:
        """Serve until `done()`.

        Raises:
            BackendError: ``harness-timeout``.
        """
        if not self.loop.run_until(done, timeout_seconds=timeout_seconds):
            raise BackendError("the TPM harness waited too long", code="harness-timeout", log="; ".join(self.lines))

    def listen(self, listener: socket.socket, endpoint: Endpoint, transport: Transport) -> None:
        """Serve a listening socket, as the host does."""
        listener.setblocking(False)
        self._listeners.append(listener)

        def accept(_: int) -> None:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            try:
                self.tpm.connect(client.detach(), endpoint, transport)
            except SvsmError as error:
                self.refused.append(error.code)

        self.loop.register(listener, READ, accept)

    def listen_unix(self, path: Path) -> None:
        """Data on `path`, control on `path`.ctrl."""
        for endpoint, where in ((Endpoint.DATA, str(path)), (Endpoint.CONTROL, f"{path}.ctrl")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(where)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(where)
            listener.listen(16)
            self.listen(listener, endpoint, Transport.UNIX)

    def listen_tcp(self, port: int, second: Endpoint = Endpoint.CONTROL) -> None:
        """Data on `port`, `second` on the next, on the loopback address."""
        for endpoint, number in ((Endpoint.DATA, port), (second, port + 1)):
            listener = socket.create_server(("127.0.0.1", number))
            self.listen(listener, endpoint, Transport.TCP)

    def close(self) -> None:
        """Stop the TPM in order and release everything."""
        finished: list[bool] = []
        self.tpm.stop(lambda: finished.append(True))
        self.loop.run_until(lambda: bool(finished), timeout_seconds=10)
        for listener in self._listeners:
            self.loop.unregister(listener)
            listener.close()
        self.loop.close()
        for child in self.children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="svsm.testing.tpm_harness")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--unix", type=Path)
    parser.add_argument("--tcp", type=int)
    parser.add_argument("--mssim", type=int)
    parser.add_argument("--fsync", action="store_true")
    parser.add_argument("--confined", action="store_true")
    options = parser.parse_args(arguments)
    store = PathFileStore(options.state, fsync=options.fsync)
    harness = Harness(store, confined=options.confined)
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)

    def on_signal(_: int) -> None:
        for number in wake.recv(64):
            if number == signal.SIGTERM:
                harness.loop.stop()
            else:
                store.fail = number == signal.SIGUSR1
                _say(event="stores", fail=store.fail)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    harness.loop.register(wake, READ, on_signal)
    harness.until(lambda: harness.tpm.ready)
    if options.unix:
        harness.listen_unix(options.unix)
    if options.tcp:
        harness.listen_tcp(options.tcp)
    if options.mssim:
        harness.listen_tcp(options.mssim, Endpoint.PLATFORM)
    name = harness.tpm.ek_name
    pid = harness.children[-1].pid if harness.children else None
    _say(event="ready", ek_name=name.hex() if name else None, service_pid=pid)
    harness.loop.run()
    harness.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
