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

Then: what a small commit costs in volumes of 8 MiB to 1 GiB (`volume_curve`). Whole commands of ours are
`bench_volume_command`'s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.cocoonfs.profiles import TUNED
from tests.bench.report import ROOT, Result, Row, output
from tests.bench.volume_curve import curve_rows
from tests.bench.volume_sides import MIB, OurVolume, Side, TheirVolume, best_of_turns, reference_program

__all__ = ["bench"]

_SMALL, _LARGE, _HUGE = 4096, MIB, 64 * MIB
_NAMES = {_SMALL: "4 KiB", _LARGE: "1 MiB", _HUGE: "64 MiB"}
_TURNS = {_SMALL: 15, _LARGE: 7, _HUGE: 3}
_FILES, _RUNS = 1000, 50
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


def _many_row(where: str, folder: Path, program: Path | None) -> Row:
    """A thousand files: in one commit, and by runs of the reference program."""
    inodes = range(_INODE, _INODE + _FILES)
    volume = OurVolume(folder / "many", 32 * MIB, (_SMALL,))
    volume.mkfs()
    library = best_of_turns({"": lambda: volume.write_many(inodes, _SMALL)}, 3, {"": volume.mkfs})[""]
    volume.close()
    peer = None
    if program is not None:
        theirs = TheirVolume(program, folder / "theirs-many", 32 * MIB, (_SMALL,))
        theirs.mkfs()

        def runs() -> None:
            for inode in inodes[:_RUNS]:
                theirs.write(inode, _SMALL)

        peer = best_of_turns({"": runs}, 1)[""] / _RUNS * _FILES
    return Row(f"{where}: {_FILES} files of 4 KiB, one commit", library, "ms", peer and peer / 5, peer)


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
            rows.append(_many_row(where, Path(name), program))
    rows += curve_rows()
    peers = {"cocoonfs": output(str(program), "--version")} if program else {}
    details: dict[str, object] = {
        "peer": "a whole process for each operation; ours is in-process on an open volume",
        "memory, disk": "files on tmpfs, where flushes do nothing, and on the disk of the working tree",
        "tuned": dict(TUNED),
        "a thousand files": f"the peer's time is that of {_RUNS} runs, times {_FILES // _RUNS}",
    }
    return Result(rows, peers, details)
