# SPDX-License-Identifier: MIT OR Apache-2.0
"""How long volumes take: ours in-process, and as a whole process beside the reference program where it is installed.

    python -m tests.bench cocoonfs
    python -m tests.bench.bench_cocoonfs [--json FILE]
    python -m tests.bench.bench_cocoonfs --curve

Figures, no verdict. In-process times are the best of several, in memory, so without the disk's flushes; the line
"with flushes" is on a file. The ratio compares like with like only in the whole-process column.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.file import FileDevice
from svsm.storage.drivers.memory import MemoryDevice
from tests.bench.report import Result, Row

__all__ = ["bench"]

KEY = bytes(range(32))
SALT = b"\xdd\xee\xff"
MIB = 1 << 20
_TARGET_MIB = 8


def _best(run: Callable[[], object], times: int = 7) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def _write(volume: Volume, inode: int, data: bytes) -> None:
    with volume.transaction() as transaction:
        transaction.write(inode, data)


def _in_process(size: int) -> dict[str, float]:
    device = MemoryDevice(size)
    times = {"mkfs": _best(lambda: Volume.create(device, KEY, salt=SALT), 5 if size < 64 * MIB else 2)}
    volume = Volume.create(device, KEY, salt=SALT)
    small, large = os.urandom(4096), os.urandom(MIB)
    numbers = iter(range(1000, 2000))
    times["write 4 KiB, new"] = _best(lambda: _write(volume, next(numbers), small))
    times["write 4 KiB, replaced"] = _best(lambda: _write(volume, 16, small))
    times["write 1 MiB, new"] = _best(lambda: _write(volume, next(numbers), large), 2)
    _write(volume, 17, large)
    times["open"] = _best(lambda: Volume.open(device, KEY))
    times["list"] = _best(lambda: Volume.open(device, KEY).list())
    fresh = Volume.open(device, KEY)
    times["read 4 KiB, first"] = _best(lambda: fresh.read(16), 1)
    times["read 4 KiB"] = _best(lambda: fresh.read(16))
    times["read 1 MiB"] = _best(lambda: fresh.read(17))
    pending = volume.transaction()
    pending.write(16, small)
    pending.prepare()
    image = bytes(device.data)
    times["open and replay"] = min(_best(_opener(image), 1) for _ in range(5))
    with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
        file.truncate(size)
        on_file = Volume.create(FileDevice(os.open(file.name, os.O_RDWR)), KEY, salt=SALT)
        times["write 4 KiB, with flushes"] = _best(lambda: _write(on_file, 16, small))
        on_file.close()
    return times


class _Unflushed(FileDevice):
    """A file whose flushes do nothing: what the program takes, not what the medium does."""

    def flush(self) -> None:
        """Nothing."""


def _small_commits(size: int) -> dict[str, float]:
    """What a small commit takes in a volume of this size, in memory of a process of its own."""
    with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
        file.truncate(size)
        device = _Unflushed(os.open(file.name, os.O_RDWR))
        Volume.create(device, KEY, salt=SALT)
        device.close()
        run = [sys.executable, "-m", "tests.bench.bench_cocoonfs", "--small-commits", file.name]
        found: dict[str, float] = json.loads(subprocess.run(run, capture_output=True, check=True).stdout)
        return found


def _measure_small_commits(path: str) -> dict[str, float]:
    volume = Volume.open(_Unflushed(os.open(path, os.O_RDWR)), KEY)
    small, numbers = os.urandom(4096), iter(range(1000, 2000))
    times = {
        "write 4 KiB, new": _best(lambda: _write(volume, next(numbers), small), 30),
        "write 4 KiB, replaced": _best(lambda: _write(volume, 16, small), 30),
        "read 4 KiB": _best(lambda: volume.read(16), 30),
    }
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {**times, "peak memory in MiB": int(peak.split()[1]) / 1024}


def curve(sizes_mib: Sequence[int] = (8, 32, 128, 512, 1024)) -> dict[int, dict[str, float]]:
    """A small commit in volumes of these sizes: its cost follows the tree's height, and nothing else."""
    return {size: _small_commits(size * MIB) for size in sizes_mib}


def _opener(image: bytes) -> Callable[[], object]:
    device = MemoryDevice(image)
    return lambda: Volume.open(device, KEY)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _program() -> str | None:
    local = Path(__file__).resolve().parents[2] / ".peers" / "bin" / "cocoonfs"
    return str(local) if local.exists() else shutil.which("cocoonfs")


def _tool(size: int) -> dict[str, float]:
    program = _program()
    if program is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        image, small, large = (Path(folder) / name for name in ("image", "small", "large"))
        small.write_bytes(os.urandom(4096))
        large.write_bytes(os.urandom(MIB))

        def run(*words: object) -> None:
            command = [program, "-i", image, "-f", *words]
            subprocess.run([str(word) for word in command], check=True, capture_output=True)

        def mkfs() -> None:
            image.unlink(missing_ok=True)
            options = ["-H", "sha2", "-C", "aes", "-t", "128", "-s", f"{size >> 20}M"]
            run("mkfs", "-K", KEY.hex(), "-I", SALT.hex(), *options)

        key = ("-K", KEY.hex())
        times = {"mkfs": _best(mkfs, 3)}
        numbers = iter(range(1000, 2000))
        times["write 4 KiB, new"] = _best(lambda: run("write-file", *key, "-i", small, next(numbers)), 5)
        times["write 1 MiB, new"] = _best(lambda: run("write-file", *key, "-i", large, next(numbers)), 2)
        run("write-file", *key, "-i", small, 16)
        run("write-file", *key, "-i", large, 17)
        times["write 4 KiB, replaced"] = _best(lambda: run("write-file", *key, "-i", small, 16), 5)
        times["list"] = _best(lambda: run("list-files", *key), 5)
        times["read 4 KiB"] = _best(lambda: run("read-file", *key, "-o", "/dev/null", 16), 5)
        times["read 1 MiB"] = _best(lambda: run("read-file", *key, "-o", "/dev/null", 17), 5)
        return times


_TARGETS_MS = {
    "open": 10.0,
    "mkfs": 200.0,
    "read 4 KiB": 1.0,
    "write 4 KiB, new": 3.0,
    "write 4 KiB, replaced": 3.0,
    "read 1 MiB": 25.0,
}
"""For an 8 MiB volume."""


def bench(sizes_mib: Sequence[int] = (8, 128)) -> Result:
    """For `python -m tests.bench`. The peer is a whole process per operation: the ratio flatters us."""
    program = _program()
    rows: list[Row] = []
    for size in sizes_mib:
        tool = _tool(size * MIB)
        for name, value in _in_process(size * MIB).items():
            target = _TARGETS_MS.get(name) if size == _TARGET_MIB else None
            rows.append(Row(f"{size} MiB: {name}", value, "ms", target, tool.get(name)))
    peers = {"cocoonfs": _output(program, "--version")} if program else {}
    return Result(rows, peers, {"peer": "a whole process for each operation; ours is in-process"})


def main(words: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 128], metavar="MIB")
    parser.add_argument("--curve", action="store_true", help="a small commit in volumes of 8 MiB to 1 GiB, only")
    parser.add_argument("--small-commits", metavar="IMAGE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.small_commits:
        print(json.dumps(_measure_small_commits(arguments.small_commits)))
        return 0
    if arguments.curve:
        for size, figures in curve().items():
            print(f"{size:5} MiB  " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
        return 0
    program = _program()
    result: dict[str, Any] = {
        "schema": 1,
        "benchmark": "cocoonfs",
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "machine": {"kernel": platform.release(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "python": platform.python_version(),
        "peer": _output(program, "--version") if program else None,
        "milliseconds": {},
    }
    for size in arguments.sizes:
        ours, tool = _in_process(size * MIB), _tool(size * MIB)
        result["milliseconds"][f"{size} MiB"] = {"svsm, in-process": ours, "cocoonfs, whole process": tool}
        print(f"{size} MiB volume{'':<16}   ours, in-process   reference, process   ratio")
        for name, value in ours.items():
            peer = tool.get(name)
            right = "" if peer is None else f"{peer:15.2f} ms {value / peer:11.2f}"
            print(f"  {name:<28} {value:14.3f} ms {right}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
