# SPDX-License-Identifier: MIT OR Apache-2.0
"""Progress of long work: which commands show it, of what, and that a pipe gets nothing."""

from __future__ import annotations

import io
import re
import sys

import pytest

from svsm.cli.volume import meter as meters
from svsm.cli.volume.meter import Meter, Watched
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.cli.volume.conftest import Bench


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing."""

    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal = Terminal()
    meter = Meter(terminal)  # type: ignore[arg-type]
    meter("files", 1, 4)
    assert terminal.text == ""  # short work stays silent
    now[0] = 1.0
    meter("files", 2, 4)
    meter("files", 3, 4)
    assert terminal.text.count("\r") == 1
    assert " 50 %" in terminal.text
    meter.end()
    assert terminal.text.endswith("\r")
    meter = Meter(terminal)  # type: ignore[arg-type]
    disk = Watched(MemoryDevice(4096), meter)
    terminal.text, now[0] = "", 2.0
    disk.write([(0, bytes(512))])
    assert terminal.text == ""  # for no stage
    meter.moving("writing", 4096)
    disk.write([(0, bytes(1024))])
    assert (" 25 %" in terminal.text, disk.read([(0, 512)])) == (True, [bytes(512)])
    now[0] = 3.0
    assert disk.read([(0, 4096)]) == [bytes(4096)]
    assert "100 %" in terminal.text
    now[0] = 4.0
    meter("lines", 1234, 0)
    assert "lines        1,234" in terminal.text
    silent = Meter(None)
    now[0] = 9.0
    silent("files", 0, 0)
    silent.end()


def _as_stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal; each step is shown, as if all of it took long. No fixture: pytest's own come in between."""
    terminal = Terminal()
    monkeypatch.setattr(meters, "_PATIENCE_S", 0)
    monkeypatch.setattr(meters, "_INTERVAL_S", 0)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def _steps(terminal: Terminal) -> dict[str, list[int]]:
    """Per cents by stage, in order."""
    found: dict[str, list[int]] = {}
    for stage, share in re.findall(r"(\w+) +\[[#.]*\] +(\d+) %", terminal.text):
        found.setdefault(stage, []).append(int(share))
    assert terminal.text.endswith("\r")
    terminal.text = ""
    return found


def test_each_command_that_may_take_long_shows_how_far_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _as_stderr(monkeypatch)
    keyed = "--key-file @key"
    data = bytes(range(256)) * 160
    bench.put("in", data)
    bench.put("small", b"1")
    bench.run(f"write @image 16 @in {keyed}")
    steps = _steps(terminal)
    assert steps["reading"] == [100]
    assert steps["writing"][-1] == 100
    assert bench.run(f"read @image 16 {keyed}") == data
    steps = _steps(terminal)
    assert steps["reading"][0] < steps["reading"][-1] == 100
    bench.put("changes", f"write 17 {bench.folder}/small\nwrite 18 {bench.folder}/small\nrm 17\nrm 16\n".encode())
    bench.run(f"batch @image @changes {keyed}")
    steps = _steps(terminal)
    assert steps["lines"] == sorted(set(steps["lines"]))
    assert (len(steps["lines"]), steps["lines"][-1], steps["writing"][-1]) == (4, 100, 100)
    for verb in ("map", "ls"):
        bench.run(f"{verb} @image {keyed}")
        assert _steps(terminal)["files"][-1] == 100


def test_a_batch_of_unknown_length_counts_its_lines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        buffer = io.BytesIO(b"# nothing\nrm 0x100000000\n")

    terminal = _as_stderr(monkeypatch)
    monkeypatch.setattr(sys, "stdin", Stream)
    bench.run("batch @image - --key-file @key")
    assert "lines        2" in terminal.text
    assert "%" not in terminal.text.split("lines        2")[0]


def test_a_pipe_gets_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_PATIENCE_S", 0)
    bench.put("in", bytes(20_000))
    for line in ("write @image 16 @in", "read @image 16 -o @out", "ls @image", "map @image"):
        bench.run(f"{line} --key-file @key")
        assert bench.stderr == ""
