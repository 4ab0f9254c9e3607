# SPDX-License-Identifier: MIT OR Apache-2.0
"""A whole system under a test's control, and raw TPM commands for its socket.

`System` is `svsm boot` as a process: started, waited for, stopped in order, or killed with everything that belongs to
it. `PowerCutDisk` is its disk as a program of its own, behind the virtio driver or without one, whose cache is lost,
or reaches the file in pieces, when it dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

from svsm.broker.service import Broker
from svsm.formats import tpm
from svsm.formats.settings import Settings
from svsm.formats.tpm import CommandHeader
from svsm.launch.build import build_image
from svsm.launch.payload import build_payload
from svsm.testing.diskprocess import tear
from tests.e2e.boot_support import Event, Instance, descendants, is_alive, short_folder
from tests.support import await_listener

__all__ = [
    "OWNER",
    "PowerCutDisk",
    "System",
    "TpmClient",
    "folder",
    "nv_define",
    "nv_read",
    "nv_write",
    "pcr_extend",
    "pcr_read",
]

OWNER = 0x4000_0001
_NV_OWNER = 0x0000_0002 | 0x0002_0000 | 0x0200_0000  # TPMA_NV: OWNERWRITE, OWNERREAD, NO_DA
_PASSWORD = bytes.fromhex("00000009 40000009 0000 00 0000")
_RETRY = 0x922
_SHA256 = 0x000B


def _command(code: int, handles: Sequence[int], body: bytes, *, authorised: bool = True) -> bytes:
    rest = b"".join(handle.to_bytes(4, "big") for handle in handles) + (_PASSWORD if authorised else b"") + body
    return CommandHeader(0x8002 if authorised else 0x8001, 10 + len(rest), code).pack() + rest


def nv_define(index: int, size: int) -> bytes:
    """TPM2_NV_DefineSpace of an index that the owner (empty password) reads and writes."""
    public = index.to_bytes(4, "big") + _SHA256.to_bytes(2, "big") + _NV_OWNER.to_bytes(4, "big") + bytes(2)
    public += size.to_bytes(2, "big")
    return _command(0x12A, [OWNER], bytes(2) + len(public).to_bytes(2, "big") + public)


def nv_write(index: int, data: bytes) -> bytes:
    """TPM2_NV_Write from offset 0, by the owner."""
    return _command(0x137, [OWNER, index], len(data).to_bytes(2, "big") + data + bytes(2))


def nv_read(index: int, size: int) -> bytes:
    """TPM2_NV_Read from offset 0, by the owner."""
    return _command(0x14E, [OWNER, index], size.to_bytes(2, "big") + bytes(2))


def pcr_extend(number: int, digest: bytes) -> bytes:
    """TPM2_PCR_Extend of the SHA-256 bank."""
    return _command(0x182, [number], bytes.fromhex("00000001 000b") + digest)


def pcr_read(number: int) -> bytes:
    """TPM2_PCR_Read of the SHA-256 bank; the digest ends the response."""
    select = bytearray(3)
    select[number // 8] |= 1 << number % 8
    return _command(0x17E, [], bytes.fromhex("00000001 000b 03") + select, authorised=False)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder with a short path."""
    made = short_folder()
    yield made
    shutil.rmtree(made)


class TpmClient:
    """One connection to a data socket."""

    def __init__(self, where: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(30)
        try:
            self._socket.connect(str(where))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> TpmClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, command: bytes) -> bytes:
        """The whole response; OSError when the TPM is gone."""
        self._socket.sendall(command)
        response = b""
        while len(response) < 10 or len(response) < int.from_bytes(response[2:6], "big"):
            part = self._socket.recv(8192)
            if not part:
                raise ConnectionResetError("the TPM closed the connection")
            response += part
        return response

    def exchange(self, message: bytes, length: int) -> bytes:
        """Send something else and receive exactly so many bytes."""
        self._socket.sendall(message)
        return self._socket.recv(length, socket.MSG_WAITALL)

    def run(self, command: bytes) -> bytes:
        """As `ask`, repeated while the TPM says RETRY; the command must succeed."""
        response = self.ask(command)
        while tpm.response_code(response) == _RETRY:
            response = self.ask(command)
        assert tpm.response_code(response) == 0, response.hex()
        return response

    def read_index(self, index: int, size: int) -> bytes:
        """An NV index's contents."""
        return self.run(nv_read(index, size))[16 : 16 + size]


class PowerCutDisk:
    """A disk program on a file of its own.

    Args:
        folder: Where its files go.
        kind: "vhost-user": the kernel's virtio driver reaches it (`svsm.testing.vhost_user_disk`); "process": the
            kernel has a connection and no driver (`svsm.testing.diskprocess`).
        size_bytes: Of the file.
    """

    def __init__(
        self, folder: Path, *, kind: Literal["vhost-user", "process"] = "vhost-user", size_bytes: int = 8 << 20
    ) -> None:
        self.kind = kind
        self.image, self.socket, self.spill = (folder / name for name in ("disk.img", "disk.sock", "disk.spill"))
        with self.image.open("wb") as file:
            file.truncate(size_bytes)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def option(self) -> str:
        """For `--disk`."""
        return f"{self.kind}:{self.socket}"

    def start(self) -> None:
        """Listen; the cache is empty."""
        self.socket.unlink(missing_ok=True)
        program = {"vhost-user": "svsm.testing.vhost_user_disk", "process": "svsm.testing.diskprocess"}[self.kind]
        command = [sys.executable, "-m", program, str(self.image), str(self.socket), str(self.spill)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        await_listener(self.socket, self.process)

    def collect(self, *, torn: int | None) -> None:
        """After it was killed: what it had not flushed is lost, or pieces of it still reach the file."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if torn is not None and self.spill.exists():
            tear(self.image, self.spill, seed=torn)
        self.spill.unlink(missing_ok=True)


class System:
    """`svsm boot` on one state directory, as often as wanted.

    Args:
        folder: Where the state goes; short.
        options: Of `svsm boot`.
        wrap: Words before the command.
        environment: Added to this process's.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        wrap: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.state = folder / "state"
        self.options = options
        self.ready: Event = {}
        self._wrap = wrap
        self._environment = {**os.environ, **(environment or {})}
        self._instance: Instance | None = None

    def pin_image(self) -> None:
        """Before the first boot: one image for all boots, whatever happens to the checkout meanwhile."""
        self.state.mkdir(mode=0o700)
        identity = {"version": 1, "name": "default", "volume_id": str(uuid.uuid4())}
        (self.state / "state.json").write_text(json.dumps(identity))
        broker = Broker.open(self.state / "broker")
        settings = Settings(broker.public_key).pack()
        broker.close()
        payload = build_payload()
        image = self.state.parent / "image.igvm"
        image.write_bytes(build_image(loader=payload.loader, archive=payload.archive, settings=settings))
        self.options = (*self.options, "--image", str(image))

    @property
    def where(self) -> Path:
        """The socket TPM's data socket; its control socket has ".ctrl" behind."""
        return self.state / "run" / "vtpm0.sock"

    @property
    def tcti(self) -> str:
        """What tpm2-tools take."""
        return str(self.ready["tcti"])

    @property
    def instance(self) -> Instance:
        """The run under way."""
        assert self._instance is not None
        return self._instance

    def processes(self) -> list[int]:
        """The supervisor and all below it."""
        pid = self.instance.process.pid
        return [pid, *descendants(pid)]

    def launch(self) -> None:
        """Start and return at once."""
        self._instance = Instance(self.state, *self.options, env=self._environment, wrap=self._wrap)

    def start(self) -> Event:
        """Start and wait until it is ready."""
        self.launch()
        self.ready = self.instance.ready()
        return self.ready

    def stop(self) -> int:
        """In order; the exit code."""
        code = self.instance.stop()
        self.close()
        return code

    def kill(self, *, together_with: Sequence[int] = (), rng: random.Random | None = None) -> None:
        """SIGKILL to every process of it and to others; returns when none of its own is left.

        Without `rng` all stop at the same instant, as when the power goes: nobody sees anybody hang up. With it they
        die one after the other in random order, and the living react to it (a kernel whose host is gone shuts its
        TPMs down in order, if it has the time).
        """
        own = self.processes()
        pids = [*own, *together_with]
        signals = [signal.SIGSTOP, signal.SIGKILL]
        if rng is not None:
            rng.shuffle(pids)
            signals = signals[rng.randrange(2) :]
        for number in signals:
            for pid in pids:  # whoever was born since dies with its parent
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.close()
        deadline = time.monotonic() + 5
        while any(map(is_alive, own)):
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def close(self) -> None:
        """Leave nothing behind, whatever state it is in."""
        if self._instance is not None:
            self._instance.close()
            self._instance = None
