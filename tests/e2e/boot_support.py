# SPDX-License-Identifier: MIT OR Apache-2.0
"""Booting whole systems in tests: instances, owners with brokers, and a man in the middle of the serial line.

An `Estate` is made once per run: a minted machine, a broker's keys, and one image that pins them; it also runs that
broker and an honest proxy as programs. A `Vm` is a state directory with a volume of its own at that broker; booting
it takes about a second and a half. An `Instance` is one run of `svsm boot`. A `Middleman` listens where the machine
expects the proxy, and does with each frame what its script says; behind it is the honest proxy.

State paths are short (`short_folder`), because a Unix socket's path has at most 107 bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svsm.broker.service import Broker
from svsm.confine import Role
from svsm.confine.identity import role_uid
from svsm.formats import tpm
from svsm.formats.frames import FrameDecoder, encode_frame
from svsm.formats.igvm import IgvmFile
from svsm.formats.settings import Settings
from svsm.hardware.machine_store import load_machine, mint
from svsm.launch.build import build_image
from svsm.launch.digest import launch_digest
from svsm.launch.payload import build_payload
from tests.simulated import authority_keys
from tests.support import await_listener

__all__ = [
    "SILENT",
    "Ended",
    "Estate",
    "HangUp",
    "Instance",
    "Middleman",
    "Raw",
    "Script",
    "Vm",
    "descendants",
    "estate",
    "gone_within_a_second",
    "honest",
    "is_alive",
    "process_of",
    "random_bytes",
    "sha256_of",
    "short_folder",
    "svsm",
]

SVSM = (sys.executable, "-m", "svsm.cli.main")
START_SECONDS = 60.0
_TPMS = ("vtpm0:socket", "guest0:svsm")

Event = dict[str, Any]


def short_folder() -> Path:
    """A new folder with a short path; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix="sv", dir="/tmp"))


def svsm(*words: str, check: bool = True, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command of svsm to its end."""
    done = subprocess.run([*SVSM, *words], capture_output=True, text=True, timeout=60, check=False, env=env)
    assert not check or done.returncode == 0, done.stderr
    return done


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes below a process, at this moment."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def gone_within_a_second(pids: Sequence[int]) -> None:
    """Assert that processes end within a second of a machine that has time for us.

    The second is counted in looks at them, 5 ms apart: on a machine with other work it is longer for us and for them.
    """
    left = list(pids)
    for _ in range(200):
        if not (left := [pid for pid in left if is_alive(pid)]):
            return
        time.sleep(0.005)
    raise AssertionError(f"outlived their supervisor by a second: {left}")


def process_of(pid: int, role: Role) -> int | None:
    """The process with the uid of a role below a supervisor that root started."""
    uid = role_uid(role)
    for candidate in filter(is_alive, descendants(pid)):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{candidate}/status").read_text().splitlines():
                if line.startswith("Uid:") and int(line.split()[1]) == uid:
                    return candidate
    return None


@dataclasses.dataclass(frozen=True)
class Ended:
    """How an instance ended by itself."""

    exit_code: int
    code: str | None
    """The stable code of its error."""
    hint: str
    details: Mapping[str, object]
    stderr: str


class Instance:
    """One run of `svsm boot --json`. Use as a context manager: nothing is left running."""

    def __init__(
        self,
        state: Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        wrap: Sequence[str] = (),
    ) -> None:
        self.state = state
        self.events: list[Event] = []
        self._pending = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self.process = subprocess.Popen(
            [*wrap, *SVSM, "boot", "--state", str(state), "--json", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._out = self.process.stdout.fileno()

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take it away, with everything below it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._stderr.close()

    def _read(self, timeout: float) -> bool:
        """Take in what it has printed; False at the end of its output."""
        if not select.select([self._out], [], [], max(0.0, timeout))[0]:
            return True
        data = os.read(self._out, 1 << 16)
        *lines, self._pending = (self._pending + data).split(b"\n")
        self.events += [json.loads(line) for line in lines]
        return bool(data)

    def find(self, event: str, **members: object) -> Event | None:
        """The first event like this so far."""
        for found in self.events:
            if found["event"] == event and members.items() <= found.items():
                return found
        return None

    def wait_for(self, event: str, *, seconds: float = START_SECONDS, **members: object) -> Event:
        """Wait for an event."""
        deadline = time.monotonic() + seconds
        while (found := self.find(event, **members)) is None:
            assert time.monotonic() < deadline, f"no {event} {members}: {self.events[-3:]}"
            assert self._read(deadline - time.monotonic()), f"ended before {event}: {self.events[-2:]} {self.stderr()}"
        return found

    def ready(self) -> Event:
        """Wait until it is ready."""
        return self.wait_for("ready")

    def facts(self) -> dict[str, str]:
        """The facts that it told so far."""
        return {event["name"]: event["value"] for event in self.events if event["event"] == "fact"}

    def ended(self, *, seconds: float = START_SECONDS) -> Ended:
        """Wait for its end."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"it goes on: {self.events[-3:]}"
        exit_code = self.process.wait(20)
        error = self.find("error") or {}
        return Ended(exit_code, error.get("code"), error.get("hint") or "", error.get("details") or {}, self.stderr())

    def stop(self) -> int:
        """Ask it to stop in order; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended(seconds=20).exit_code

    def kill(self) -> None:
        """SIGKILL to the supervisor; returns when everything below it is gone too (a second at most)."""
        below = descendants(self.process.pid)
        self.process.kill()
        self.process.wait(20)
        gone_within_a_second(below)

    def stderr(self) -> str:
        """What it printed for people."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")


def random_bytes(path: Path, *, seconds: float = 5.0) -> bytes | None:
    """Ask the TPM behind a data socket for eight random bytes; None when no answer comes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(str(path))
            connection.sendall(tpm.get_random(8))
            answer = connection.recv(4096)
        except OSError:
            return None
    return answer[12:] or None


# --- the serial line ---------------------------------------------------------------------------------------------


class HangUp(Exception):
    """A script closes the connection."""


@dataclasses.dataclass(frozen=True)
class Raw:
    """Bytes for the kernel that are no frame."""

    data: bytes


SILENT = None
"""A script that answers nothing."""

Ask = Callable[[bytes], bytes]
Script = Callable[[int, bytes, Ask], "bytes | Raw | None"]
"""(which frame of the kernel, its body, asks the honest proxy) → the body of the answer. Frame 0 is the negotiation,
1 the evidence, later ones the run-time channel."""


def honest(_number: int, body: bytes, ask: Ask) -> bytes:
    """The script of a proxy that does nothing else."""
    return ask(body)


class _Line:
    """Frames on a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = FrameDecoder()
        self._ready: list[bytes] = []

    def receive(self) -> bytes:
        while not self._ready:
            data = self._connection.recv(1 << 16)
            if not data:
                raise HangUp
            self._ready += self._decoder.feed(data)
        return self._ready.pop(0)

    def send(self, answer: bytes | Raw) -> None:
        self._connection.sendall(answer.data if isinstance(answer, Raw) else encode_frame(answer))


class Middleman:
    """Listens on `path`; what arrives goes through `script`. `seen` are the kernel's frames, `told` the answers."""

    def __init__(self, path: Path, upstream: Path, script: Script = honest) -> None:
        self.path = path
        self.seen: list[bytes] = []
        self.told: list[bytes] = []
        self._script = script
        self._upstream = upstream
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Middleman:
        return self

    def __exit__(self, *_error: object) -> None:
        for connection in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._carry, args=(connection,), daemon=True).start()

    def _carry(self, connection: socket.socket) -> None:
        kernel, behind = _Line(connection), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        proxy = _Line(behind)

        def ask(body: bytes) -> bytes:
            proxy.send(body)
            return proxy.receive()

        with behind, contextlib.suppress(HangUp, OSError):
            behind.connect(str(self._upstream))
            number = 0
            while True:
                body = kernel.receive()
                self.seen.append(body)
                answer = self._script(number, body, ask)
                if answer is not None:
                    kernel.send(answer)
                    self.told.append(answer.data if isinstance(answer, Raw) else answer)
                number += 1
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


# --- owners and machines -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vm:
    """A state directory whose volume has a row at the estate's broker."""

    estate: Estate
    state: Path
    volume_id: str

    @property
    def disk(self) -> Path:
        """Its default disk."""
        return self.state / "host" / "disk.img"

    def boot(self, *options: str, serial: Path | None = None, image: Path | None = None) -> Instance:
        """Boot it, through the honest proxy by default."""
        words = ["--serial", str(serial or self.estate.serial), "--image", str(image or self.estate.image)]
        return Instance(self.state, *words, *options)

    def middleman(self, script: Script = honest) -> Middleman:
        """A proxy of ours between this VM and the honest one."""
        return Middleman(self.state.parent / f"m{uuid.uuid4().hex[:6]}", self.estate.serial, script)

    def row(self) -> dict[str, Any]:
        """What its owner's broker says of its volume."""
        done = svsm("broker", "volume", "show", self.volume_id, "--state", str(self.estate.folder), "--json")
        found: dict[str, Any] = json.loads(done.stdout)["volumes"][0]
        return found

    def twin(self) -> Vm:
        """The same VM once more, on a state of its own, with a copy of what the host has."""
        state = self.estate.new_state(self.volume_id)
        if self.disk.exists():
            (state / "host").mkdir(mode=0o700)
            shutil.copyfile(self.disk, state / "host" / "disk.img")
        return Vm(self.estate, state, self.volume_id)


class Estate:
    """An owner: broker, proxy, machine, image; see the module."""

    def __init__(self) -> None:
        self.folder = short_folder()
        self.serial = self.folder / "serial"
        self.image = self.folder / "i.igvm"
        self._count = 0
        self._programs = contextlib.ExitStack()
        mint(self.folder / "machine", authority_keys=authority_keys())
        self.root = f"simulated:{load_machine(self.folder / 'machine').root_fingerprint.hex()}"
        broker = Broker.open(self.folder / "broker")
        self.public_key = broker.public_key
        broker.close()
        payload = build_payload()
        settings = Settings(self.public_key).pack()
        self.image.write_bytes(build_image(loader=payload.loader, archive=payload.archive, settings=settings))
        self.digest = launch_digest(IgvmFile.parse(self.image.read_bytes())).hex()
        self.url = self._start("broker", "serve", "--state", str(self.folder))
        self._start("proxy", "--url", self.url, "--serial", str(self.serial), ready=self.serial)

    def close(self) -> None:
        """End its programs and remove everything."""
        self._programs.close()
        shutil.rmtree(self.folder)

    def _start(self, *words: str, ready: Path | None = None) -> str:
        process = subprocess.Popen([*SVSM, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._programs.callback(process.communicate, timeout=10)
        self._programs.callback(process.send_signal, signal.SIGTERM)
        assert process.stdout is not None
        if ready is None:
            return process.stdout.readline().strip()
        await_listener(ready, process)
        return ""

    def new_state(self, volume_id: str) -> Path:
        """A state directory with the machine, before its first boot."""
        self._count += 1
        state = self.folder / f"s{self._count}"
        state.mkdir(mode=0o700)
        identity = {"version": 1, "name": "default", "volume_id": volume_id}
        (state / "state.json").write_text(json.dumps(identity))
        shutil.copytree(self.folder / "machine", state / "machine")
        return state

    def vm(self) -> Vm:
        """A VM with a new volume."""
        volume_id = str(uuid.uuid4())
        words = ["--root", self.root, "--name", "default", "--volume-id", volume_id, "--allow", self.digest]
        tpms = [word for name in _TPMS for word in ("--tpm", name)]
        svsm("broker", "volume", "create", "--state", str(self.folder), *words, *tpms)
        return Vm(self, self.new_state(volume_id), volume_id)

    def embedded(self) -> Path:
        """A state directory for `svsm boot --image` with its own embedded broker, before its first boot."""
        state = self.new_state(str(uuid.uuid4()))
        (state / "broker").mkdir(mode=0o700)
        for name in ("signing.key", "vault.key"):
            shutil.copyfile(self.folder / "broker" / name, state / "broker" / name)
            (state / "broker" / name).chmod(0o600)
        return state


@contextlib.contextmanager
def estate() -> Iterator[Estate]:
    """An estate, and its end."""
    made = Estate()
    try:
        yield made
    finally:
        made.close()
