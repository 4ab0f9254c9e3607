# SPDX-License-Identifier: MIT OR Apache-2.0
"""The boot log: nested headings with times for people, one JSON event per line for programs.

A heading opens when a step starts and is closed with the time it took; facts are the lines below it. In JSON every
event has `schema`, `event` and `at_ms` (since the start of the boot). Nothing secret is ever an event.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from svsm.cli.supervisor.roles import printable

__all__ = ["SCHEMA", "Progress"]

SCHEMA = 1


class Progress:
    """Where a boot reports to.

    Args:
        as_json: One JSON object per line on stdout instead of text on stderr.
        started: `time.monotonic` at which the boot began.
    """

    def __init__(self, *, as_json: bool, started: float | None = None, out: TextIO | None = None) -> None:
        self._as_json = as_json
        self._out = out if out is not None else (sys.stdout if as_json else sys.stderr)
        self._started = time.monotonic() if started is None else started
        self._depth = 0
        self._colour = not as_json and self._out.isatty()

    @property
    def elapsed_ms(self) -> int:
        """Milliseconds since the boot began."""
        return round((time.monotonic() - self._started) * 1000)

    @contextlib.contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """A heading around everything that happens inside."""
        begun = time.monotonic()
        if self._as_json:
            self._emit("step", step=name, state="started")
        else:
            self._line(title, style="1")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._as_json:
                self._emit("step", step=name, state="failed", took_ms=_ms(begun))
            else:
                self._line(f"✗ {title} failed", style="31")
            raise
        self._depth -= 1
        if self._as_json:
            self._emit("step", step=name, state="done", took_ms=_ms(begun))
        elif _ms(begun) >= 1:
            self._depth += 1
            self._line(f"{_ms(begun)} ms", style="2")
            self._depth -= 1

    def fact(self, name: str, value: str, *, label: str | None = None) -> None:
        """One thing worth knowing: `name` is the JSON key, `label` what a person reads."""
        if self._as_json:
            self._emit("fact", name=name, value=value)
        else:
            self._line(f"{label or name.replace('_', ' '):16} {value}")

    def note(self, text: str) -> None:
        """A remark that a person should read."""
        if self._as_json:
            self._emit("note", text=text)
        else:
            self._line(f"! {text}", style="33")

    def event(self, name: str, /, **members: object) -> None:
        """An event for programs; people see it only through `fact` and `note`."""
        if self._as_json:
            self._emit(name, **members)

    def _emit(self, event: str, /, **members: object) -> None:
        print(
            json.dumps({"schema": SCHEMA, "event": event, "at_ms": self.elapsed_ms, **members}),
            file=self._out,
            flush=True,
        )

    def _line(self, text: str, *, style: str = "") -> None:
        stamp = f"[{self.elapsed_ms / 1000:7.3f}] "
        body = "  " * self._depth + printable(text)
        if self._colour and style:
            body = f"\x1b[{style}m{body}\x1b[0m"
        print(stamp + body, file=self._out, flush=True)


def _ms(begun: float) -> int:
    return round((time.monotonic() - begun) * 1000)
