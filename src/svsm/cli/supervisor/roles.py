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

__all__ = ["Emit", "EventPipe", "Role", "printable", "start_role"]

_MAX_LINE_BYTES = 64 << 10
_MAX_WORDS_BYTES = 500


class Emit(Protocol):
    """Reports an event of a role."""

    def __call__(self, event: str, /, **members: object) -> None: ...


def printable(text: str) -> str:
    """What a process says, without what would move a terminal's cursor, or rename its window."""
    return "".join(character if character.isprintable() else "?" for character in text)


class EventPipe:
    """The reading end of a pipe with one JSON object per line; whoever writes into it may be hostile.

    Args:
        descriptor: Made non-blocking; owned.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._pending = b""
        self._skips = False

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._descriptor

    def read(self) -> list[dict[str, object]] | None:
        """The events that have come; None when nobody can write any more."""
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return []
        if not data:
            return None
        first, *more = data.split(b"\n")
        lines = [self._pending + first, *more]
        *lines, self._pending = lines
        if self._skips and lines:
            del lines[0]
            self._skips = False
        if len(self._pending) > _MAX_LINE_BYTES:  # no end in sight: such a line is dropped
            self._pending, self._skips = b"", True
        return [event for line in lines if (event := _parse(line)) is not None]

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


class Role:
    """A started role, as the supervisor sees it."""

    def __init__(self, name: str, process_id: int, events: int) -> None:
        self.name = name
        self.process_id = process_id
        self.events = EventPipe(events)
        self.pidfd = os.pidfd_open(process_id)
        self.messages: int | None = None
        """A file that it prints to."""

    def last_words(self) -> str:
        """The end of what it has printed, if it prints to a file."""
        if self.messages is None:
            return ""
        size = os.fstat(self.messages).st_size
        text = os.pread(self.messages, _MAX_WORDS_BYTES, max(0, size - _MAX_WORDS_BYTES)).decode(errors="replace")
        return printable(" ".join(text.split()))

    def read_events(self) -> list[dict[str, object]] | None:
        """What the role has reported under its own name; None when its pipe is closed.

        A hijacked role must not speak for the kernel: its events are `failed`, its name, and its name with more.
        """
        events = self.events.read()
        return None if events is None else [event for event in events if self._may_say(str(event["event"]))]

    def _may_say(self, event: str) -> bool:
        return event in ("failed", self.name) or event.startswith(f"{self.name}-")

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def collect(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        _, status = os.waitpid(self.process_id, 0)
        os.close(self.pidfd)
        self.events.close()
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
        return Role(name, process_id, reader)
    status = 1
    try:
        _settle(set(keep.values() if isinstance(keep, Mapping) else keep) | {writer}, debug=debug)
        status = _run(name, body, writer, supervisor)
    finally:
        os._exit(status)


def _settle(keep: set[int], *, debug: bool) -> None:
    # A terminal, a shell and a service manager signal the whole group; what that means is the supervisor's to decide.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
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
