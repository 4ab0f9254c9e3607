# SPDX-License-Identifier: MIT OR Apache-2.0
"""qemu-storage-daemon with one disk: over vhost-user, and over NBD where something else is to look at the same file.

Always taken away again: used as a context, and killed by the kernel when its starter dies (`setpriv`, where there
is one). `kill` is what it is here for: the daemon is gone in the middle of whatever it was doing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from svsm.formats.errors import BackendError
from svsm.testing.listening import listens

__all__ = ["StorageDaemon"]

_START_SECONDS = 10.0
_END_SECONDS = 5.0


class StorageDaemon:
    """A running daemon.

    Args:
        program: Path of qemu-storage-daemon.
        image: The raw file that it serves.
        folder: Where the sockets go; a path short enough for a socket.
        queues: Of the vhost-user device.
        read_only: Serve it for reading.
        direct: ``aio=native`` with O_DIRECT, for measuring; needs a file system that has it.
        nbd: Serve the same node over NBD too.
        monitor: Have a QMP socket.

    Raises:
        BackendError: ``storage-daemon`` when it does not start.

    Attributes:
        socket: vhost-user.
        nbd_socket: NBD.
        monitor_socket: QMP.
    """

    def __init__(
        self,
        program: Path,
        image: Path,
        folder: Path,
        *,
        queues: int = 1,
        read_only: bool = False,
        direct: bool = False,
        nbd: bool = False,
        monitor: bool = False,
    ) -> None:
        self.socket = folder / "vu.sock"
        self.nbd_socket = folder / "nbd.sock"
        self.monitor_socket = folder / "qmp.sock"
        writable, reading = ("off", "on") if read_only else ("on", "off")
        cache = "aio=native,cache.direct=on," if direct else ""
        common = f"discard=unmap,read-only={reading}"
        export = f"type=vhost-user-blk,id=vu,node-name=disk,addr.type=unix,addr.path={self.socket},writable={writable}"
        self._command = [str(program)]
        self._command += ["--blockdev", f"driver=file,node-name=file,filename={image},{cache}{common}"]
        self._command += ["--blockdev", f"driver=raw,node-name=disk,file=file,{common}"]
        self._command += ["--export", f"{export},num-queues={queues}"]
        if nbd:
            self._command += ["--nbd-server", f"addr.type=unix,addr.path={self.nbd_socket}"]
            self._command += ["--export", f"type=nbd,id=nbd,node-name=disk,writable={writable},name=disk"]
        if monitor:
            self._command += ["--chardev", f"socket,id=qmp,path={self.monitor_socket},server=on,wait=off"]
            self._command += ["--monitor", "chardev=qmp"]
        guard = shutil.which("setpriv")
        if guard is not None:
            self._command = [guard, "--pdeathsig", "KILL", *self._command]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Of the running process."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it, also again after `kill`."""
        self.socket.unlink(missing_ok=True)
        self.nbd_socket.unlink(missing_ok=True)
        self.monitor_socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_SECONDS
        while not listens(self.socket):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise BackendError("the storage daemon does not start", code="storage-daemon")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It stands still, and its sockets stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it in order, or by force."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
