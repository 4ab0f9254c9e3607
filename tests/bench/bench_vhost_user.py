# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk over vhost-user: our front-end, one in C, and fio's nbd engine, on the same daemon and file, in turns.

    python -m tests.bench vhost-user

The C front-end (`vhost_user_bench.c`, built here) has the structure of ours and trusts the device; ours has every check
on, and copies into objects of its own. Both copy through bounce buffers, poll, and run on one processor, with
the daemon on another. A queue depth is so many requests in flight: ours gets a ring of that many entries, of which it
keeps one for large requests, so it has one less. Every round measures all of them one after the other, fio, which takes
long to start, in a few. Rounds are short and many, because what else runs on the machine's processors only ever makes
things slower: a figure is the best of the rounds, a ratio is that of the bests. The medians of the rounds' own ratios
are in the details.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from svsm.storage.drivers.virtio.blk import BlkPolicy
from svsm.storage.drivers.virtio.vhost_user import open_vhost_user
from svsm.testing.storage_daemon import StorageDaemon
from tests.bench.report import Result, Row, output
from tests.support import peer_source

__all__ = ["bench"]

_FILE_BYTES = 512 << 20
_ROUNDS = 25
_SECONDS = 0.1
_FIO_ROUNDS = 3
_FIO_SECONDS = 0.4
_READ_CALL_BYTES = 4 << 20  # what comes back stays in the processor's cache
_WRITE_CALL_BYTES = 16 << 20  # the device is idle between two calls
_SEQUENTIAL_BYTES = 32 << 20
_FIO_TARGET = 3.0


@dataclasses.dataclass(frozen=True)
class _Case:
    """One kind of load."""

    writing: bool
    block: int
    depth: int
    target: float
    """Of the C front-end's figure."""

    @property
    def sequential(self) -> bool:
        return self.block > 4096

    @property
    def name(self) -> str:
        size = f"{self.block >> 20} MiB sequential" if self.sequential else "4 KiB random"
        return f"{size} {'write' if self.writing else 'read'}, QD{self.depth}"


_CASES = [
    _Case(writing, block, depth, target)
    for block, depth, target in ((4096, 1, 0.35), (4096, 32, 0.95), (4096, 128, 0.95), (1 << 20, 4, 0.85))
    for writing in (False, True)
]


def _build(folder: Path) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("there is no C compiler")
    source = peer_source("vhost_user_bench.c")
    if source is None:
        raise RuntimeError("the C front-end's source is not there (set SVSM_PEER_SOURCES)")
    program = folder / "front-end"
    subprocess.run([compiler, "-O2", "-o", str(program), str(source)], check=True)
    return program


def _disk(folder: Path) -> Path:
    path = folder / "disk.raw"
    source = random.Random(1)
    with path.open("wb") as file:  # not sparse: holes read faster than data
        for _ in range(_FILE_BYTES >> 24):
            file.write(source.randbytes(1 << 24))
    return path


# ---- the contenders -------------------------------------------------------------------------------------------------


def _ours(socket: Path, case: _Case) -> float:
    """Requests per second, front-end and driver made anew."""
    if case.sequential:
        policy = BlkPolicy(large_bytes=case.block, large_slots=case.depth, queue_size=16, spins=4000)
    else:
        policy = BlkPolicy(queue_size=max(case.depth, 4), large_bytes=4096, large_slots=1, spins=4000, early_kick=True)
    driver = open_vhost_user(str(socket), policy=policy)
    try:
        blocks = driver.size_bytes // case.block
        call_bytes = (
            (_WRITE_CALL_BYTES if case.writing else _READ_CALL_BYTES) if not case.sequential else _SEQUENTIAL_BYTES
        )
        count = 1 if case.depth == 1 else call_bytes // case.block
        source = random.Random(case.depth)
        calls = []
        for number in range(64):
            if case.sequential:
                offsets = [(number * count + at) % blocks * case.block for at in range(count)]
            else:
                offsets = [source.randrange(blocks) * case.block for _ in range(count)]
            calls.append(offsets)
        data = bytes(case.block)
        writes = [[(offset, data) for offset in offsets] for offsets in calls]
        reads = [[(offset, case.block) for offset in offsets] for offsets in calls]
        done, began = 0, time.perf_counter()
        end = began + _SECONDS
        while True:
            for turn in range(64):
                if case.writing:
                    driver.write(writes[turn])
                else:
                    driver.read(reads[turn])
                now = time.perf_counter()
                if now >= end:
                    return (done + (turn + 1) * count) / (now - began)
            done += 64 * count
    finally:
        driver.close()


def _theirs(program: Path, socket: Path, case: _Case) -> float:
    command = [str(program), str(socket), "w" if case.writing else "r", str(case.block), str(case.depth), str(_SECONDS)]
    done = subprocess.run(command + ["s"] * case.sequential, capture_output=True, text=True, check=True, timeout=60)
    return float(json.loads(done.stdout)["iops"])


def _fio(socket: Path, case: _Case) -> float:
    kind = ("" if case.sequential else "rand") + ("write" if case.writing else "read")
    command = ["fio", "--name=nbd", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={socket}", f"--rw={kind}"]
    command += [
        f"--bs={case.block}",
        f"--iodepth={case.depth}",
        "--time_based",
        f"--runtime={int(_FIO_SECONDS * 1000)}ms",
    ]
    done = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True, check=True, timeout=60)
    figures = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(figures["write" if case.writing else "read"]["iops"])


# ---- the run --------------------------------------------------------------------------------------------------------


@contextmanager
def _daemon(folder: Path) -> Iterator[StorageDaemon]:
    found = shutil.which("qemu-storage-daemon")
    if found is None:
        raise RuntimeError("qemu-storage-daemon is not installed")
    with StorageDaemon(Path(found), _disk(folder), folder, direct=True, nbd=True) as daemon:
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) > 1:
            for thread in os.listdir(f"/proc/{daemon.pid}/task"):
                os.sched_setaffinity(int(thread), {processors[1]})
            os.sched_setaffinity(0, {processors[0]})  # and what this starts; the caller puts it back
        yield daemon


def bench() -> Result:
    """Run everything.

    Raises:
        RuntimeError: A peer is missing.
    """
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="vu", dir=where) as name:
        folder = Path(name)
        program = _build(folder)
        with _daemon(folder) as daemon:
            contenders: dict[str, Callable[[_Case], float]] = {
                "ours": lambda case: _ours(daemon.socket, case),
                "c": lambda case: _theirs(program, daemon.socket, case),
            }
            figures: dict[tuple[str, str], list[float]] = {}
            for turn in range(_ROUNDS):
                for case in _CASES:
                    for label, measure in contenders.items():
                        figures.setdefault((case.name, label), []).append(measure(case))
                    if turn < _FIO_ROUNDS and shutil.which("fio"):
                        figures.setdefault((case.name, "fio"), []).append(_fio(daemon.nbd_socket, case))
    return _result(figures)


def _result(figures: dict[tuple[str, str], list[float]]) -> Result:
    rows, medians = [], {}
    for case in _CASES:
        ours, c = figures[case.name, "ours"], figures[case.name, "c"]
        scale, unit = (case.block / 1e9, "GB/s") if case.sequential else (1e-3, "k/s")
        best = max(c) * scale
        rows.append(Row(case.name, max(ours) * scale, unit, case.target * best, best, more_is_better=True))
        medians[f"{case.name}, to C"] = statistics.median(a / b for a, b in zip(ours, c, strict=True))
        if fio := figures.get((case.name, "fio")):
            peer = max(fio) * scale
            target = _FIO_TARGET * peer if case.depth > 4 else None
            rows.append(Row("… to fio, nbd engine", max(ours) * scale, unit, target, peer, more_is_better=True))
            medians[f"{case.name}, to fio"] = statistics.median(a / b for a, b in zip(ours, fio, strict=False))
    peers = {
        "C, or fio": "vhost_user_bench.c; gcc " + output("gcc", "-dumpfullversion"),
        "fio": output("fio", "--version"),
        "qemu-storage-daemon": output("qemu-storage-daemon", "--version").split("\n")[0],
    }
    return Result(rows, peers, {"ratios, median of rounds": {key: round(value, 3) for key, value in medians.items()}})
