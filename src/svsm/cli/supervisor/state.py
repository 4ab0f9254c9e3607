# SPDX-License-Identifier: MIT OR Apache-2.0
"""The state directory: one per virtual machine, versioned, locked while it runs, one subdirectory per role.

    state.json   version, and what the machine is called
    lock         held (flock) by the running supervisor; holds its process id
    machine/     hardware: the chip's keys and certificates
    broker/      broker: rows, wrapped keys, signing key
    host/        host: the disk image
    run/         sockets of the running instance, and its `ready` event

The directory and its subdirectories are 0700. A directory of another version is refused, never converted silently.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
import uuid
from pathlib import Path

from svsm.formats.errors import BackendError, StateError

__all__ = ["StateDirectory", "default_directory"]

_VERSION = 1
_NEW_IDENTITY = "state.json.new"
_FOLDERS = ("machine", "broker", "host", "run")


def default_directory() -> Path:
    """``$XDG_STATE_HOME/svsm``, or ``~/.local/state/svsm``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "svsm"


class StateDirectory:
    """A state directory on disk. Open it with `open_for_boot`, or `existing` to look at one."""

    def __init__(self, path: Path, identity: dict[str, str | int]) -> None:
        self.path = path
        self._identity = identity
        self._lock: int | None = None

    @property
    def volume_id(self) -> uuid.UUID:
        """The volume that this machine asks for."""
        return uuid.UUID(str(self._identity["volume_id"]))

    @property
    def name(self) -> str:
        """The machine's name, for people."""
        return str(self._identity["name"])

    def folder(self, role: str) -> Path:
        """The subdirectory of a role."""
        return self.path / role

    @classmethod
    def open_for_boot(cls, path: Path) -> StateDirectory:
        """Create the directory or check it, and take its lock.

        Raises:
            StateError: ``state-version`` for another version, ``state-foreign`` for a directory that is not ours,
                ``state-busy`` when an instance already runs on it.
            BackendError: ``state-unusable`` when the system does not let us.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as failed:
            raise _unusable(path, failed) from failed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_pid(lock)
            os.close(lock)
            raise StateError(
                f"another instance already runs on {path}",
                code="state-busy",
                hint=f"`svsm status --state {path}` shows it, `svsm stop --state {path}` ends it",
                process_id=owner,
            ) from None
        try:
            state = cls._create(path) if not (path / "state.json").exists() else cls.existing(path)
        except BaseException:
            os.close(lock)
            raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        state._lock = lock
        for name in _FOLDERS:
            state.folder(name).mkdir(mode=0o700, exist_ok=True)
        for leftover in state.folder("run").iterdir():
            leftover.unlink()
        return state

    @classmethod
    def _create(cls, path: Path) -> StateDirectory:
        # A first boot may have been killed before its rename.
        ours = {"lock", _NEW_IDENTITY}
        if strangers := [entry.name for entry in path.iterdir() if entry.name not in ours]:
            raise StateError(
                f"{path} is not empty and is no state directory",
                code="state-foreign",
                hint="name an empty directory, or one that `svsm boot` made",
                first=min(strangers),
            )
        path.chmod(0o700)
        identity: dict[str, str | int] = {"version": _VERSION, "name": "default", "volume_id": str(uuid.uuid4())}
        temporary = path / _NEW_IDENTITY
        temporary.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.rename(path / "state.json")
        return cls(path, identity)

    @classmethod
    def existing(cls, path: Path) -> StateDirectory:
        """The directory as it is, without taking the lock.

        Raises:
            StateError: ``state-missing``, ``state-version`` or ``state-foreign``.
            BackendError: ``state-unusable``.
        """
        try:
            identity = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StateError(
                f"there is no state directory at {path}", code="state-missing", hint="`svsm boot` makes one"
            ) from None
        except OSError as failed:
            raise _unusable(path, failed) from failed
        except ValueError:
            identity = None
        if not isinstance(identity, dict) or not {"version", "name", "volume_id"} <= identity.keys():
            raise StateError(f"{path}/state.json is damaged", code="state-foreign", hint="restore it from a backup")
        if identity["version"] != _VERSION:
            raise StateError(
                f"{path} has another version",
                code="state-version",
                hint="use the svsm release that made it",
                expected=_VERSION,
                got=identity["version"],
            )
        return cls(path, identity)

    def running_process(self) -> int | None:
        """The process id of the instance that holds the lock, or None when none runs."""
        try:
            lock = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_pid(lock)
        finally:
            os.close(lock)
        return None

    def stop(self, *, timeout_s: float) -> bool:
        """Ask the running instance to shut down in order, and wait for it.

        Returns:
            False when none was running.

        Raises:
            StateError: ``state-stop-timeout`` when it still runs after `timeout_s`.
        """
        process_id = self.running_process()
        if process_id is None:
            return False
        deadline = time.monotonic() + timeout_s
        os.kill(process_id, signal.SIGTERM)
        while self.running_process() is not None:
            if time.monotonic() > deadline:
                raise StateError(
                    "the instance did not stop in time",
                    code="state-stop-timeout",
                    hint=f"its state is safe at any moment: kill -9 {process_id} ends it with all its roles",
                    process_id=process_id,
                )
            time.sleep(0.02)
        return True


def _unusable(path: Path, failed: OSError) -> BackendError:
    return BackendError(
        f"the state directory {path} cannot be used: {failed.strerror}",
        code="state-unusable",
        hint="name a directory that you may write, with --state",
    )


def _read_pid(lock: int) -> int:
    try:
        return int(os.pread(lock, 32, 0).split()[0])
    except (ValueError, IndexError):
        return 0
