# SPDX-License-Identifier: MIT OR Apache-2.0
"""Starting a role: a forked process with the descriptors it was given, confined before it touches a hostile byte.

Roles are forks of the supervisor, which imported everything and holds no secret: their code pages are shared, and a
role needs no file of the interpreter once it runs. The kernel and its services are not roles in this sense: hardware
starts them by exec, from measured pages.

Each role has an event pipe: one JSON object per line, read by the supervisor. A role that ends with an `SvsmError`
says so there before it exits with the error's code.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from svsm.formats.errors import SvsmError

__all__ = ["Emit", "Role", "start_role"]


class Emit(Protocol):
    """Reports an event of a role."""

    def __call__(self, event: str, /, **members: object) -> None: ...


class Role:
    """A started role, as the supervisor sees it."""

    def __init__(self, name: str, process_id: int, events: int) -> None:
        self.name = name
        self.process_id = process_id
        self.events = events
        self.pidfd = os.pidfd_open(process_id)
        self._pending = b""

    def read_events(self) -> list[dict[str, object]] | None:
        """What the role has reported; None when its pipe is closed."""
        try:
            data = os.read(self.events, 1 << 16)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [event for line in lines if (event := _parse(line)) is not None]

    def terminate(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def collect(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        _, status = os.waitpid(self.process_id, 0)
        os.close(self.pidfd)
        os.close(self.events)
        return os.waitstatus_to_exitcode(status)


def _parse(line: bytes) -> dict[str, object] | None:
    # Events come from confined and partly untrusted processes: anything that is no object is dropped.
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def start_role(
    name: str,
    body: Callable[[Emit, int], None],
    *,
    keep: Mapping[str, int] | Iterable[int] = (),
    debug: bool = False,
) -> Role:
    """Fork a role.

    Args:
        name: For events.
        body: Runs in the child: (emit, supervisor's process id); confines itself.
        keep: The descriptors that the role keeps; all others are closed in it.
        debug: Leave it the terminal's stderr.

    Returns:
        The role; its event pipe is non-blocking.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    supervisor = os.getpid()
    gc.freeze()
    process_id = os.fork()
    if process_id:
        os.close(writer)
        os.set_blocking(reader, False)
        return Role(name, process_id, reader)
    status = 1
    try:
        _settle(set(keep.values() if isinstance(keep, Mapping) else keep) | {writer}, debug=debug)
        status = _run(name, body, writer, supervisor)
    finally:
        os._exit(status)


def _settle(keep: set[int], *, debug: bool) -> None:
    # The terminal's interrupt goes to the whole group; what it means is the supervisor's to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if debug else (0, 1, 2):
        os.dup2(null, descriptor)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in keep:
            with contextlib.suppress(OSError):
                os.close(number)


def _run(name: str, body: Callable[[Emit, int], None], writer: int, supervisor: int) -> int:
    def emit(event: str, /, **members: object) -> None:
        line = json.dumps({"event": event, "role": name, **members}).encode() + b"\n"
        with contextlib.suppress(OSError):
            os.write(writer, line)

    try:
        body(emit, supervisor)
    except SvsmError as error:
        reason = error.details.get("reason")
        emit(
            "failed",
            code=error.code,
            message=str(error),
            hint=error.hint,
            exit_code=error.exit_code,
            reason=reason if isinstance(reason, str) else None,
        )
        return error.exit_code
    except Exception as fault:  # the boundary of a process: whatever it was, the supervisor must hear of it
        import traceback

        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(fault.__traceback__)]
        emit("failed", code="role-fault", message=f"{type(fault).__name__}: {fault}", places=places[-6:], exit_code=1)
        return 1
    return 0
