# SPDX-License-Identifier: MIT OR Apache-2.0
"""A whole system (`svsm boot`) for the benchmarks: started, watched from outside, and always taken away again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Arrived", "System", "family"]

_SVSM = (sys.executable, "-m", "svsm.cli.main")


@dataclasses.dataclass(frozen=True)
class Arrived:
    """An event, and when it was read."""

    ms: float
    """Since the command was started: interpreter and imports count."""
    event: dict[str, Any]


class System:
    """`svsm boot --json` on a state directory, up to `ready`.

    Args:
        state: The state directory.
        environment: More environment variables.

    Raises:
        RuntimeError: When it does not get ready.
    """

    def __init__(self, state: Path, environment: Mapping[str, str] | None = None) -> None:
        self._state = state
        self._begun = time.monotonic()
        self.process = subprocess.Popen(
            [*_SVSM, "boot", "--json", "--state", str(state)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self.events: list[Arrived] = []
        try:
            self.ready = self._read_until_ready()
        except BaseException:
            self.stop()
            raise

    def _read_until_ready(self) -> Arrived:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                arrived = Arrived((time.monotonic() - self._begun) * 1000, json.loads(line))
                self.events.append(arrived)
                if arrived.event["event"] == "ready":
                    return arrived
        raise RuntimeError("svsm boot did not get ready; its own words are above")

    def step(self, name: str) -> Arrived | None:
        """The end of a step, None when there was no such step."""
        for arrived in self.events:
            if (arrived.event["event"], arrived.event.get("step"), arrived.event.get("state")) == (
                "step",
                name,
                "done",
            ):
                return arrived
        return None

    def stop(self) -> None:
        """End it in order, or else by force."""
        subprocess.run([*_SVSM, "stop", "--state", str(self._state)], capture_output=True, check=False)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> System:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def family(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in family(int(child)))]
