# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the supervisor believes of what its roles write: bounded, in their own names, no control characters.

And which step is to blame for what a role fails with.
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from svsm.cli.supervisor.image import image_body
from svsm.cli.supervisor.progress import Progress
from svsm.cli.supervisor.roles import Emit, EventPipe, Role, printable
from svsm.cli.supervisor.watch import Event, Watch
from svsm.formats.errors import BackendError, StateError, SvsmError


def _watch(out: io.StringIO | None = None, *, debug: bool = False) -> Watch:
    progress = Progress(as_json=True, out=out or io.StringIO())
    return Watch(progress, debug=debug, complete_hint=lambda hint: hint)


@pytest.fixture
def pipe() -> Iterator[tuple[EventPipe, int]]:
    reader, writer = os.pipe()
    yield EventPipe(reader), writer
    os.close(writer)


def test_events_come_whole_whatever_the_pieces(pipe: tuple[EventPipe, int]) -> None:
    events, writer = pipe
    os.write(writer, b'{"event":"a"}\n{"ev')
    assert events.read() == [{"event": "a"}]
    os.write(writer, b'ent":"b"}\nnonsense\n[]\n{"event":1}\n')
    assert events.read() == [{"event": "b"}]
    assert events.read() == []


def test_a_line_without_end_is_dropped_and_the_next_one_is_not(pipe: tuple[EventPipe, int]) -> None:
    events, writer = pipe
    for _ in range(40):
        os.write(writer, b"x" * 60_000)
        assert events.read() == []
        assert len(events._pending) <= 64 << 10
    os.write(writer, b'"}\n{"event":"after"}\n')
    assert events.read() == [{"event": "after"}]


def test_a_role_speaks_in_its_own_name_only() -> None:
    reader, writer = os.pipe()
    role = Role("host", os.getpid(), reader)
    for name in ("host", "host-launched", "failed", "ready", "attested", "refused", "hostile", "broker"):
        os.write(writer, json.dumps({"event": name}).encode() + b"\n")
    assert [event["event"] for event in role.read_events() or []] == ["host", "host-launched", "failed"]
    os.close(writer)
    assert role.read_events() is None
    role.events.close()
    os.close(role.pidfd)


def test_no_escape_sequence_reaches_the_terminal() -> None:
    assert printable("\x1b]0;owned\x07 é\n\u202e") == "?]0;owned? é??"
    out = io.StringIO()
    progress = Progress(as_json=False, out=out)
    progress.note("vtpm0: \x1b[2J\r\ngone")
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def _failure_of(event: Event, *, debug: bool) -> SvsmError:
    watch = _watch(debug=debug)
    watch._fail(event)
    assert watch.failure is not None
    return watch.failure


def test_an_unforeseen_failure_names_its_place_even_without_debug() -> None:
    event: Event = {"event": "failed", "code": "internal", "error": "KeyError", "places": ["a.py:1 f", "b.py:2 \x1b"]}
    assert _failure_of(event, debug=False).details == {"error": "KeyError", "place": "b.py:2 ?"}
    assert _failure_of(event, debug=True).details == {"places": json.dumps(event["places"])}
    assert _failure_of(event | {"code": "storage-failed"}, debug=False).details == {}


def test_a_step_is_not_blamed_for_another_role_that_fails_meanwhile(tmp_path: Path) -> None:
    """The image is read while a first boot mints its machine."""
    out = io.StringIO()
    progress, watch = Progress(as_json=True, out=out), _watch()
    output = os.memfd_create("image")
    watch.start("image", image_body(tmp_path / "none", -1, output), [output])
    os.close(output)
    while watch.failure is None:
        watch.poll(60)
    with progress.step("mint", "Minting"):
        watch.run("mint", lambda emit, _supervisor: emit("mint"))
    assert "mint" in watch.facts
    with pytest.raises(BackendError) as failed, progress.step("image", "Image"):
        watch.await_event("image")
    assert failed.value.code == "boot-image"
    steps = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(step["step"], step["state"]) for step in steps] == [
        *(("mint", "started"), ("mint", "done")),
        *(("image", "started"), ("image", "failed")),
    ]
    watch.end([], seconds=0)


def _refuses(_emit: Emit, _supervisor: int) -> None:
    raise BackendError("no", code="machine-store")


def _breaks(_emit: Emit, _supervisor: int) -> None:
    os._exit(7)


@pytest.mark.parametrize(("body", "code"), [(_refuses, "machine-store"), (_breaks, "boot-role-ended")])
def test_a_step_is_blamed_for_its_own_process(body: Callable[[Emit, int], None], code: str) -> None:
    watch = _watch()
    with pytest.raises(BackendError) as failed:
        watch.run("mint", body)
    assert failed.value.code == code
    with pytest.raises(BackendError):
        watch.check()


def test_a_step_ends_when_the_operator_wants_to_stop() -> None:
    watch = _watch()
    watch.stop_asked = True
    with pytest.raises(StateError) as stopped:
        watch.run("mint", lambda _emit, _supervisor: signal.pause())
    assert stopped.value.code == "boot-interrupted"
    watch.end([], seconds=0)


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Roles are forked off with the heap frozen."""
    yield
    gc.unfreeze()
