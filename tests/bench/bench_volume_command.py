# SPDX-License-Identifier: MIT OR Apache-2.0
"""How long whole `svsm volume` commands take, and a batch of a thousand files beside a thousand runs of the peer.

    python -m tests.bench volume-command

Each command is a process of its own, as a person or a script starts it, on an 8 MiB volume; the best of several.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.bench.report import Result, Row, output
from tests.bench.volume_sides import reference_program

__all__ = ["bench"]

_KEY = bytes(range(32))
_INSTALLED = "import sys; from svsm.cli.main import main; sys.exit(main())"  # what the installed `svsm` does
_TARGET_MS = 80.0
_FILES = 1000
_TIMES = 9
_KIND = "6f1ed002-ab55-41a2-9c9c-0123456789ab"
_COMMANDS = {
    "provision": "provision {image}{turn} --size 8MiB",
    "info": "info {image}",
    "info, with the key": "info {image} --key-file {key}",
    "ls": "ls {image} --key-file {key}",
    "read 4 KiB": "read {image} 16 --key-file {key}",
    "write 4 KiB": "write {image} 16 {small} --key-file {key} --force",
    "rm": "rm {image} {turn} --key-file {key}",
    "map": "map {image} --key-file {key}",
    "export": "export {image} -o {archive}{turn} --key-file {key}",
    "aux add": "aux add {image} {kind} {small} --key-file {key}",
    "aux list": "aux list {image}",
    "aux read": "aux read {image} {kind}",
}
"""`turn` is another number each time; files of these numbers are there to be removed."""


def _best_ms(run: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best * 1000


def _process(*words: object) -> None:
    subprocess.run([str(word) for word in words], stdout=subprocess.DEVNULL, check=True)


def _one(svsm: Sequence[str], line: str, turns: Iterator[int], names: Mapping[str, object]) -> None:
    _process(*svsm, *line.format(**names, turn=next(turns)).split())


def _tool_batch(program: Path, image: Path, small: Path) -> float:
    """Milliseconds for a thousand runs."""
    options = ["-H", "sha2", "-C", "aes", "-t", "128", "-s", "32M"]
    _process(program, "-i", image, "-f", "mkfs", "-K", _KEY.hex(), "-I", "dd", *options)

    def write_all() -> None:
        for inode in range(16, 16 + _FILES):
            _process(program, "-i", image, "-f", "write-file", "-K", _KEY.hex(), "-i", small, inode)

    return _best_ms(write_all, 1)


def bench() -> Result:
    """For `python -m tests.bench`."""
    svsm = (sys.executable, "-c", _INSTALLED, "volume")
    program = reference_program()
    with tempfile.TemporaryDirectory() as folder:
        # Modules are compiled once, as they are when a program is installed, whatever the environment says.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "compiled")
        names = {name: Path(folder) / name for name in ("image", "key", "small", "archive", "many", "batch", "theirs")}
        names["key"].write_bytes(_KEY)
        names["small"].write_bytes(os.urandom(4096))
        _process(*svsm, "create", names["image"], "--size", "8MiB", "--key-file", names["key"])
        _process(*svsm, "write", names["image"], 16, names["small"], "--key-file", names["key"])
        rows: list[Row] = []
        names["batch"].write_text("".join(f"write {n} {names['small']}\n" for n in range(17, 17 + _TIMES)))
        _process(*svsm, "batch", names["image"], names["batch"], "--key-file", names["key"])
        for name, line in _COMMANDS.items():
            turns = iter(range(17, 17 + _TIMES))
            command = functools.partial(_one, svsm, line, turns, {**names, "kind": _KIND})
            rows.append(Row(name, _best_ms(command, _TIMES), "ms", _TARGET_MS))
        _process(*svsm, "create", names["many"], "--size", "32MiB", "--key-file", names["key"])
        names["batch"].write_text("".join(f"write {n} {names['small']}\n" for n in range(16, 16 + _FILES)))
        theirs = None if program is None else _tool_batch(program, names["theirs"], names["small"])
        ours = _best_ms(lambda: _process(*svsm, "batch", names["many"], names["batch"], "--key-file", names["key"]), 1)
        rows.append(Row("batch of 1,000 files of 4 KiB", ours, "ms", theirs and theirs / 5, theirs))
    peers = {"cocoonfs": output(str(program), "--version")} if program else {}
    return Result(rows, peers)
