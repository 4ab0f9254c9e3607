# SPDX-License-Identifier: MIT OR Apache-2.0
"""How long volumes take beside the reference program, in one run, on the same file system, in turns.

    python -m tests.bench cocoonfs [--realtime] [--no-write]

Ours is in-process on an open volume, as the kernel uses it; the reference program is a whole process for each
operation, its start included. A target is what ours may take at most, made from what the reference took in this run:

* with the default configuration twice its time for 1 MiB and more (half its throughput), its time / 0.7 to make a
  volume, and three times its time without its start for files of 4 KiB;
* with the tuned block sizes (`profiles.TUNED`) its time / 1.5 to read and / 0.9 to write 64 MiB, half of its time to
  make a volume;
* for a thousand files in one commit a fifth of a thousand of its runs.

Then: whole commands of ours, and what a small commit costs in volumes of 8 MiB to 1 GiB (`volume_curve`).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.cocoonfs.profiles import TUNED
from tests.bench.report import ROOT, Result, Row, output
from tests.bench.volume_curve import curve_rows
from tests.bench.volume_sides import KEY, MIB, OurVolume, Side, TheirVolume, best_of_turns, reference_program

__all__ = ["bench"]

_SMALL, _LARGE, _HUGE = 4096, MIB, 64 * MIB
_NAMES = {_SMALL: "4 KiB", _LARGE: "1 MiB", _HUGE: "64 MiB"}
_TURNS = {_SMALL: 15, _LARGE: 7, _HUGE: 3}
_FILES, _RUNS = 1000, 50
_COMMAND_TARGET_MS = 80.0
_INODE = 1 << 32
_TUNED_FACTORS = {"mkfs": 1 / 2, "write 64 MiB": 1 / 0.9, "read 64 MiB": 1 / 1.5}


def _target(name: str, peer_ms: float, start_ms: float) -> float | None:
    if name == "mkfs":
        return peer_ms / 0.7
    if name.endswith("4 KiB"):
        return 3 * (peer_ms - start_ms)
    return 2 * peer_ms if name.endswith("MiB") else None


def _operations(sides: dict[str, Side], lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Milliseconds by operation and side."""
    found = {"mkfs": best_of_turns({name: side.mkfs for name, side in sides.items()}, 3)}
    for number, length in enumerate(lengths, _INODE):

        def write(side: Side, inode: int = number, length: int = length) -> None:
            side.write(inode, length)

        writes = {name: (lambda side=side, write=write: write(side)) for name, side in sides.items()}
        removes = {name: (lambda side=side, inode=number: side.remove(inode)) for name, side in sides.items()}
        reads = {name: (lambda side=side, inode=number: side.read(inode)) for name, side in sides.items()}
        found[f"write {_NAMES[length]}"] = best_of_turns(writes, _TURNS[length], removes)
        found[f"read {_NAMES[length]}"] = best_of_turns(reads, _TURNS[length])
    found["list"] = best_of_turns({name: side.list for name, side in sides.items()}, 7)
    return found


def _size_rows(where: str, folder: Path, size_mib: int, program: Path | None) -> list[Row]:
    lengths = (_SMALL, _LARGE, _HUGE) if size_mib > 100 else (_SMALL, _LARGE)
    ours = OurVolume(folder / "ours", size_mib * MIB, lengths)
    tuned = OurVolume(folder / "tuned", size_mib * MIB, lengths, layout_of("sha2", "aes", 128, **TUNED))
    sides: dict[str, Side] = {"ours": ours, "tuned": tuned}
    start = 0.0
    if program is not None:
        theirs = TheirVolume(program, folder / "theirs", size_mib * MIB, lengths)
        sides = {"theirs": theirs, **sides}
        start = best_of_turns({"start": theirs.start}, 15)["start"]
    rows = []
    for name, found in _operations(sides, lengths).items():
        peer = found.get("theirs")
        target = None if peer is None else _target(name, peer, start)
        rows.append(Row(f"{where} {size_mib} MiB: {name}", found["ours"], "ms", target, peer))
        target = None if peer is None or name not in _TUNED_FACTORS else peer * _TUNED_FACTORS[name]
        rows.append(Row(f"{where} {size_mib} MiB, tuned: {name}", found["tuned"], "ms", target, peer))
    for side in (ours, tuned):
        side.close()
    opened = best_of_turns({"": lambda: ours.open_and_read(_INODE)}, 7)[""]
    rows.append(Row(f"{where} {size_mib} MiB: open, read 4 KiB", opened, "ms"))
    return rows


def _many_rows(where: str, folder: Path, program: Path | None) -> list[Row]:
    """A thousand files: in one commit, by one command, and by runs of the reference program."""
    inodes = range(_INODE, _INODE + _FILES)
    image, contents, key = folder / "many", folder / "small", folder / "key"
    contents.write_bytes(bytes(range(256)) * 16)
    key.write_bytes(KEY)
    batch = folder / "batch"
    batch.write_text("".join(f"write {inode} {contents}\n" for inode in inodes), encoding="ascii")
    volume = OurVolume(image, 32 * MIB, (_SMALL,))
    volume.mkfs()
    library = best_of_turns({"": lambda: volume.write_many(inodes, _SMALL)}, 3, {"": volume.mkfs})[""]
    volume.mkfs()
    volume.close()
    run = functools.partial(_command, folder / "compiled")
    run("ls", image, "--key-file", key)
    command = best_of_turns({"": lambda: run("batch", image, batch, "--key-file", key)}, 1)[""]
    peer = None
    if program is not None:
        theirs = TheirVolume(program, folder / "theirs-many", 32 * MIB, (_SMALL,))
        theirs.mkfs()

        def runs() -> None:
            for inode in inodes[:_RUNS]:
                theirs.write(inode, _SMALL)

        peer = best_of_turns({"": runs}, 1)[""] / _RUNS * _FILES
    target = None if peer is None else peer / 5
    name = f"{where}: {_FILES} files of 4 KiB"
    return [
        Row(f"{name}, one commit", library, "ms", target, peer),
        Row(f"{name}, svsm volume batch", command, "ms", target, peer),
    ]


def _command_rows(where: str, folder: Path) -> list[Row]:
    """Whole commands that touch little."""
    image, contents, key = folder / "little", folder / "small", folder / "key"
    volume = OurVolume(image, 8 * MIB, (_SMALL,))
    volume.mkfs()
    volume.write(_INODE, _SMALL)
    volume.close()
    run = functools.partial(_command, folder / "compiled")
    words: dict[str, list[object]] = {
        "info": ["info", image],
        "ls": ["ls", image, "--key-file", key],
        "read 4 KiB": ["read", image, str(_INODE), "--key-file", key, "--output", "/dev/null", "--force"],
        "write 4 KiB": ["write", image, str(_INODE), contents, "--key-file", key, "--force"],
    }
    commands = {verb: functools.partial(run, *arguments) for verb, arguments in words.items()}
    best = best_of_turns(commands, 7)
    return [Row(f"{where}: svsm volume {verb}", taken, "ms", _COMMAND_TARGET_MS) for verb, taken in best.items()]


def _command(cache: Path, *words: object) -> None:
    """A command of ours, as a whole process. As in an installed program its modules are compiled already."""
    command = [sys.executable, "-m", "svsm.cli.main", "volume", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(cache)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"svsm volume {words[0]}: {done.stderr.strip()[-500:]}")


def bench(sizes_mib: Sequence[int] = (8, 128)) -> Result:
    """For `python -m tests.bench`."""
    program = reference_program()
    rows: list[Row] = []
    for where, parent in (("memory", Path("/dev/shm")), ("disk", ROOT)):
        if not parent.is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=parent, prefix=".bench-") as name:
            for size in sizes_mib:
                rows += _size_rows(where, Path(name), size, program)
            rows += _many_rows(where, Path(name), program)
            rows += _command_rows(where, Path(name))
    rows += curve_rows()
    peers = {"cocoonfs": output(str(program), "--version")} if program else {}
    details: dict[str, object] = {
        "peer": "a whole process for each operation; ours is in-process on an open volume",
        "memory, disk": "files on tmpfs, where flushes do nothing, and on the disk of the working tree",
        "tuned": dict(TUNED),
        "a thousand files": f"the peer's time is that of {_RUNS} runs, times {_FILES // _RUNS}",
    }
    return Result(rows, peers, details)
