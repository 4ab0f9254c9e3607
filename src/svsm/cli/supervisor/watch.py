# SPDX-License-Identifier: MIT OR Apache-2.0
"""The roles that run, what they have said, and what has gone wrong: the supervisor's only view of the system.

One selector waits for event pipes, ends of processes and signals. An event is kept under its name, the first one of
each, and `await_event` serves until one is there. What comes from confined and partly untrusted processes is bounded,
printable, and believed only as far as the role that says it is concerned (`svsm.cli.supervisor.roles`).

A failure is noted once, the first one; so is the wish to stop. Nothing here acts on either but `check`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable

from svsm.cli.supervisor.progress import Progress
from svsm.cli.supervisor.roles import Emit, EventPipe, Role, printable, start_role
from svsm.formats.errors import BackendError, PolicyError, StateError, SvsmError

__all__ = ["Event", "Watch"]

Event = dict[str, object]

_START_SECONDS = 90.0
_SHOWN = ("log", "proxy-log", "client-refused", "storage-failed", "disk-reset", "no-guest", "guest-stopped")
_MAX_REDUCED = 8
_MAX_WORD = 64
_MAX_PLACE = 160


class Watch:
    """What the supervisor watches.

    Args:
        progress: Where remarks of the roles go.
        debug: Roles keep their stderr, and failures name places in the code.
        complete_hint: Adds to a role's hint what only the supervisor knows.
    """

    def __init__(self, progress: Progress, *, debug: bool, complete_hint: Callable[[str], str]) -> None:
        self._progress = progress
        self._debug = debug
        self._complete_hint = complete_hint
        self._selector = selectors.DefaultSelector()
        self._roles: dict[str, Role] = {}
        self._consoles: list[tuple[EventPipe, Callable[[Event], None]]] = []
        self.facts: dict[str, Event] = {}
        self.reduced: set[str] = set()
        """What this computer cannot enforce of the isolation, as the roles say."""
        self.runs_guests = False
        self.failure: SvsmError | None = None
        self.stop_asked = False

    # --- roles ---

    def start(
        self, name: str, body: Callable[[Emit, int], None], keep: Iterable[int], *, messages: int | None = None
    ) -> None:
        """Fork a role that lives as long as the instance.

        Args:
            name: For events.
            body: See `start_role`.
            keep: The descriptors that it keeps.
            messages: A file that it prints to: its end is the hint when the role ends; stays the caller's.
        """
        role = start_role(name, body, keep=keep, debug=self._debug)
        role.messages = messages
        self._roles[name] = role
        self._selector.register(role.events, selectors.EVENT_READ, lambda: self._read_role(role))
        self._selector.register(role.pidfd, selectors.EVENT_READ, lambda: self._role_ended(role))

    def run(self, name: str, body: Callable[[Emit, int], None]) -> None:
        """Fork a role, and wait until its work is done.

        What another role fails with meanwhile is not this step's: the next `check` raises it.

        Raises:
            SvsmError: What it failed with; ``boot-role-ended``, ``boot-interrupted``.
        """
        role = start_role(name, body, debug=self._debug)
        self._roles[name] = role
        ended: list[bool] = []
        self._selector.register(role.pidfd, selectors.EVENT_READ, lambda: ended.append(True))
        while not ended:
            self._check_stop()
            self.poll(None)
        self._selector.unregister(role.pidfd)
        for event in role.read_events() or []:
            self._take(event)
        if self._roles.pop(name).collect():
            self.failure = self.failure or BackendError("a step's process failed", code="boot-role-ended", role=name)
            raise self.failure

    def dismiss(self, name: str) -> None:
        """Take away a role that has done its work."""
        role = self._roles.pop(name)
        for descriptor in (role.events, role.pidfd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        role.collect()

    def end(self, machine: Iterable[str], *, seconds: float) -> None:
        """Give the roles of the machine `seconds` to end by themselves, then end every role."""
        deadline = time.monotonic() + seconds
        waiting = [self._roles[name] for name in machine if name in self._roles]
        while any(_runs(role) for role in waiting) and time.monotonic() < deadline:
            self.poll(0.05)
        for role in self._roles.values():
            role.kill()
        for role in self._roles.values():
            role.collect()
        self._roles.clear()

    # --- waiting ---

    def await_event(self, name: str) -> Event:
        """Serve events until one of this name has come.

        Raises:
            SvsmError: The failure that came instead; ``boot-timeout``, ``boot-interrupted``.
        """
        deadline = time.monotonic() + _START_SECONDS
        while name not in self.facts:
            self.check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise BackendError(f"the boot does not get on: no '{name}' so far", code="boot-timeout")
            self.poll(left)
        self.check()
        return self.facts[name]

    def check(self) -> None:
        """Raise what has failed, or ``boot-interrupted`` when the operator wants to stop."""
        if self.failure is not None:
            raise self.failure
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop_asked:
            raise StateError("stopped while booting", code="boot-interrupted")

    def poll(self, timeout: float | None) -> None:
        """Serve what is there, waiting at most `timeout` seconds for it."""
        for key, _ in self._selector.select(timeout):
            key.data()

    def catch_signals(self) -> None:
        """From now on SIGTERM, SIGINT and SIGHUP set `stop_asked`."""
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._signals = (reader, writer)

        def asked() -> None:
            with contextlib.suppress(BlockingIOError):
                reader.recv(64)
            self.stop_asked = True

        self._selector.register(reader, selectors.EVENT_READ, asked)

    # --- events ---

    def kernel_console(self, mine: contextlib.ExitStack) -> int:
        """The writing end, closed here with `mine`, of the pipe on which the kernel speaks."""
        return self._pipe(mine, lambda event: self._take({**event, "role": "kernel"}))

    def service_console(self, mine: contextlib.ExitStack) -> int:
        """The same for the services, which are believed less."""
        return self._pipe(mine, self._take_service)

    def _pipe(self, mine: contextlib.ExitStack, take: Callable[[Event], None]) -> int:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        mine.callback(os.close, writer)
        pipe = EventPipe(reader)
        self._consoles.append((pipe, take))
        self._selector.register(pipe, selectors.EVENT_READ, lambda: self._read_console(pipe, take))
        return writer

    def _read_console(self, pipe: EventPipe, take: Callable[[Event], None]) -> None:
        events = pipe.read() if (pipe, take) in self._consoles else []
        if events is None:
            self._consoles.remove((pipe, take))
            self._selector.unregister(pipe)
            pipe.close()
        for event in events or []:
            take(event)

    def _read_role(self, role: Role) -> None:
        events = role.read_events()
        if events is None:
            self._selector.unregister(role.events)
            return
        for event in events:
            self._take(event)

    def _take_service(self, event: Event) -> None:
        """A service's loader says how it is confined, or why it does not start. Once clients can reach a service it
        may be hijacked, and nothing that it says ends the VM: that it died is the kernel's business."""
        if event["event"] == "confined":
            self._take_isolation(event)
        elif event["event"] in ("failed", "refused"):
            if "ready" not in self.facts:
                self._fail({**event, "role": "service"})
            else:
                self._progress.note(f"a service says that it failed: {printable(str(event.get('code')))[:_MAX_WORD]}")

    def _take(self, event: Event) -> None:
        name = str(event["event"])
        self._take_isolation(event)
        if name in ("failed", "refused"):
            self._fail(event)
        elif name in _SHOWN:
            self._show(name, event)
        if name != "guest" or self.runs_guests:  # the kernel says that it asks for it, not that it got it
            self.facts.setdefault(name, event)

    def _show(self, name: str, event: Event) -> None:
        self._progress.event(name, **{key: value for key, value in event.items() if key != "event"})
        if name == "log":
            self._progress.note(f"{event.get('tpm')}: {event.get('text')}")
        elif name == "proxy-log":
            self._progress.note(f"proxy: {event.get('text')}")
        elif name != "client-refused":
            self._progress.note(f"{name}: {event.get('message') or event.get('reason')}")

    def _take_isolation(self, event: Event) -> None:
        isolation = event.get("isolation")
        if isinstance(isolation, dict) and isinstance(isolation.get("reduced"), list):
            self.reduced |= {printable(str(entry))[:_MAX_WORD] for entry in isolation["reduced"][:_MAX_REDUCED]}

    # --- failures ---

    def _fail(self, event: Event) -> None:
        if self.failure is not None:
            return
        texts = {key: printable(value) for key, value in event.items() if isinstance(value, str)}
        code, message, hint = (texts.get(key) for key in ("code", "message", "hint"))
        details: dict[str, str] = {key: texts[key] for key in ("role", "reason") if key in texts}
        places = event.get("places")
        if isinstance(places, list) and places:
            if self._debug:
                details["places"] = json.dumps(places)
            elif code == "internal":
                # Seldom things happen without --debug. A kind and a place hold no secret.
                details |= {"error": texts.get("error", ""), "place": printable(str(places[-1]))[:_MAX_PLACE]}
        refused = event.get("exit_code") == PolicyError.exit_code or event.get("event") == "refused"
        kind = PolicyError if refused else BackendError
        hint = None if hint is None else self._complete_hint(hint)
        self.failure = kind(message or "no message", code=code or "role-fault", hint=hint, **details)

    def _role_ended(self, role: Role) -> None:
        self._selector.unregister(role.pidfd)
        while (events := role.read_events()) is not None:
            for event in events:
                self._take(event)
            if not events:
                break
        if role.name == "image" and "image" in self.facts:
            return  # the only one that has an end; `dismiss` takes it away
        if not self.stop_asked and self.failure is None:
            for pipe, take in list(self._consoles):
                self._read_console(pipe, take)
        if not self.stop_asked and self.failure is None:
            self.failure = self._vm_ended() if "host-ended" in self.facts else _role_failure(role)

    def _vm_ended(self) -> SvsmError:
        end = self.facts["host-ended"]
        return BackendError(
            "the virtual machine ended",
            code="boot-vm-ended",
            hint="the kernel's last events say more: run again with --json",
            reason=printable(str(end.get("reason"))),
            kernel_status=printable(str(end.get("kernel_status"))),
        )


def _role_failure(role: Role) -> SvsmError:
    ended = os.waitid(os.P_PIDFD, role.pidfd, os.WEXITED | os.WNOWAIT)
    if ended is None or ended.si_code == os.CLD_EXITED:
        how = f"with status {ended.si_status if ended is not None else 'unknown'}"
    else:
        how = f"by {signal.Signals(ended.si_status).name}"
    return BackendError(
        f"the {role.name} role ended {how}",
        code="boot-role-ended",
        hint=role.last_words() or "run again with --debug: the role then keeps its stderr",
        role=role.name,
    )


def _runs(role: Role) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(role.pidfd, selectors.EVENT_READ)
        return not selector.select(0)
