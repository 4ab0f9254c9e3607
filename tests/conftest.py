# SPDX-License-Identifier: MIT OR Apache-2.0
"""What holds for every test: how Hypothesis searches, and that no process outlives the run.

In CI Hypothesis is derandomised: a change lands or not because of what it does, never because of the dice. Elsewhere
it searches at random, so that the searches of many runs add up.

Every process that a test starts inherits a variable with this run's name. When the run ends, a process that still has
it was left over, and the run fails: a leak would also hold locks, sockets and memory in the hands of users.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import in_ci

_MARK = "SVSM_TEST_RUN"
_GRACE_S = 5.0

settings.register_profile("ci", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if in_ci() else "here")


def pytest_configure(config: pytest.Config) -> None:
    """Name the run, unless this is one of its workers."""
    if not hasattr(config, "workerinput"):
        os.environ[_MARK] = uuid.uuid4().hex


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when processes of it are left."""
    if hasattr(session.config, "workerinput"):
        return
    end = time.monotonic() + _GRACE_S
    while (left := _left_over(os.environ[_MARK])) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        for line in left:
            if reporter is not None:
                reporter.write_line(f"LEFT OVER when the tests ended: {line}", red=True)


def _left_over(name: str) -> list[str]:
    """Processes with this run's name that are neither this one nor an ancestor of it."""
    wanted = f"{_MARK}={name}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) in _lineage() or wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it ended, or is somebody else's
        found.append(f"{folder.name} {command[:300]}")
    return found


def _lineage() -> set[int]:
    """This process and those above it."""
    process, line = os.getpid(), set[int]()
    while process > 0 and process not in line:
        line.add(process)
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        process = int(status.rpartition(")")[2].split()[1])
    return line
