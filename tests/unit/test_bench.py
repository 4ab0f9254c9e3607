# SPDX-License-Identifier: MIT OR Apache-2.0
"""The benchmarks' equipment: what is counted, what is kept. Not the figures."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import __main__ as runner
from tests.bench.bench_memory import _memory_files, _pss
from tests.bench.report import FIGURES, ROOT, Result, Row, circumstances, table, write
from tests.bench.system import family

_MIB = 1 << 20


def _mapped(name: str, size: int) -> tuple[int, mmap.mmap]:
    """A memory file, mapped and touched."""
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, size)
    mapping = mmap.mmap(descriptor, size)
    mapping[:] = b"x" * size
    return descriptor, mapping


@pytest.mark.parametrize(("name", "counts"), [("svsm-private", False), ("svsm-privateer", True), ("payload:x", True)])
def test_guest_memory_does_not_count_and_everything_else_does(name: str, *, counts: bool) -> None:
    size = 32 * _MIB
    pss, files = _pss(os.getpid())
    descriptor, mapping = _mapped(name, size)
    try:
        more, more_files = _pss(os.getpid())
        guest, other = _memory_files([os.getpid()])
    finally:
        mapping.close()
        os.close(descriptor)
    assert more_files - files == (size if counts else 0)
    assert abs(more - pss - (size if counts else 0)) < 8 * _MIB
    assert (other if counts else guest) >= size


def test_a_family_is_the_process_and_all_below() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        below = int(shell.stdout.readline())
        found = family(shell.pid)
        os.kill(below, 9)
    assert found == [shell.pid, below]
    assert family(shell.pid) == []


def test_figures_are_kept_with_their_circumstances(tmp_path: Path) -> None:
    rows = [Row("open", 0.5, "ms", 10.0, peer=2.0), Row("speed", 0.95, "×", 0.9, more_is_better=True)]
    result = Result(rows, {"peer": "1.0"}, {"runs": 3})
    members = json.loads(write("example", result, circumstances(), tmp_path).read_text())
    assert (members["schema"], members["benchmark"], members["peers"]) == (1, "example", {"peer": "1.0"})
    assert members["machine"]["cpus"] >= 1
    assert members["figures"][0] == {
        "name": "open",
        "value": 0.5,
        "unit": "ms",
        "target": 10.0,
        "peer": 2.0,
        "ratio": 0.25,
    }
    shown = table("example", result).splitlines()
    assert "≤ 10.0" in shown[1]
    assert shown[1].endswith("0.25")
    assert "≥ 0.9" in shown[2]


def test_an_unknown_name_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "no-such"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no-such" in done.stderr


def test_the_figures_in_the_repository_are_those_of_the_runner() -> None:
    kept = {path.stem: json.loads(path.read_text()) for path in FIGURES.glob("*.json")}
    assert set(kept) == set(runner.BENCHES)
    for name, members in kept.items():
        assert (members["benchmark"], members["schema"]) == (name, 1)
        assert members["commit"]
        assert all({"name", "value", "unit"} <= set(row) for row in members["figures"])
