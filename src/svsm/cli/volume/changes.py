# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume write | rm | batch`: changes to files, each command one commit, or as many as a batch says.

A batch is a file (or stdin) of one operation per line, in either form, and may mix them; empty lines and those that
begin with # do nothing:

    write INODE FILE [FLAGS]        {"op": "write", "inode": 16, "file": "state.bin", "flags": 0}
                                    {"op": "write", "inode": 16, "data": "c3RhdGU="}
    rm INODE                        {"op": "rm", "inode": 16}
    commit                          {"op": "commit"}

All of it is one commit, unless `commit` lines or `--commit-every` cut it. What was committed stays when a later line is
wrong; the error says how far it came.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from svsm.cli.volume import access, words
from svsm.cli.volume.meter import Meter, meter
from svsm.formats.errors import BackendError, FormatError, StateError, SvsmError

if TYPE_CHECKING:
    from svsm.storage.cocoonfs import Transaction, Volume

__all__ = ["add_verbs"]

_LINE_OVERHEAD = 4096
_MEMBERS = {
    "write": ({"inode"}, {"file", "data", "flags"}),
    "rm": ({"inode"}, set()),
    "commit": (set(), set()),
}
"""What an operation must have, and may have."""


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    write = words.verb(verbs, "write", "create or replace a file", _write)
    write.add_argument("inode", type=words.inode, metavar="INODE", help=words.INODE_HELP)
    words.add_input(write, "its contents")
    write.add_argument("--flags", type=words.number, default=0, metavar="N", help="the application's byte (default: 0)")
    rm = words.verb(verbs, "rm", "remove files, all or none", _rm)
    rm.add_argument("inodes", type=words.inode, nargs="+", metavar="INODE", help="their numbers, as ls has them")
    batch = words.verb(verbs, "batch", "many changes, by default in one commit", _batch)
    words.add_input(batch, "lines such as: write 16 FILE [FLAGS] | rm 17 | commit, or JSON objects")
    batch.add_argument("--commit-every", type=_count, metavar="N", help="commit after every N changes")
    for parser in (write, rm, batch):
        words.add_key(parser)
        words.add_json(parser)
        words.add_access(parser, writes=True)
        words.add_first_use(parser)
    for parser in (write, batch):
        parser.add_argument("--force", action="store_true", help="replace files that exist")


def _count(text: str) -> int:
    value = words.number(text)
    if not value:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _put(transaction: Transaction, inode: int, data: bytes, flags: int, *, force: bool) -> None:
    if not force and transaction.exists(inode):
        raise StateError(
            "there is such a file already", code="cocoonfs-exists", hint="--force replaces it", inode=inode
        )
    transaction.write(inode, data, flags)


def _write(arguments: argparse.Namespace) -> int:
    with meter() as progress, access.changing(arguments, progress) as volume:
        data = access.contents(arguments.source, limit_bytes=volume.size_bytes, progress=progress)
        progress.moving("writing", len(data))
        with volume.transaction() as transaction:
            _put(transaction, arguments.inode, data, arguments.flags, force=arguments.force)
        _report(arguments, volume, written=1, removed=0, commits=1)
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    with access.changing(arguments) as volume:
        with volume.transaction() as transaction:
            for inode in arguments.inodes:
                transaction.unlink(inode)
        _report(arguments, volume, written=0, removed=len(arguments.inodes), commits=1)
    return 0


def _report(arguments: argparse.Namespace, volume: Volume, **counts: int) -> None:
    members: dict[str, object] = {
        **counts,
        "counter": str(volume.counter),
        "root_digest": volume.root_digest.hex(),
        "free_bytes": volume.free_bytes,
    }
    access.emit(members, [], as_json=arguments.json)


# -- batch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Operation:
    """One line: the contents are `data`, or those of the file `path`."""

    op: str
    inode: int = 0
    flags: int = 0
    path: str | None = None
    data: bytes = b""


def _wrong(what: str) -> FormatError:
    return FormatError(
        f"the line is no operation: {what}",
        code="volume-batch",
        hint="lines are: write INODE FILE [FLAGS], rm INODE, commit; or JSON objects with these members",
    )


def _number(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise _wrong(f"{name} is no number of 64 bits")
    return value


def _from_json(text: str) -> _Operation:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong("this is not JSON") from error
    op = found.get("op") if isinstance(found, dict) else None
    if not isinstance(op, str) or op not in _MEMBERS:
        raise _wrong("op is write, rm or commit")
    needed, possible = _MEMBERS[op]
    sources = len({"file", "data"} & found.keys())
    if not {"op"} | needed <= found.keys() <= {"op"} | needed | possible or sources != (op == "write"):
        raise _wrong("members are missing, or there are others")
    path, data = found.get("file"), found.get("data", "")
    if not isinstance(data, str) or not isinstance(path, str | None):
        raise _wrong("file and data are strings")
    if path is not None and "\0" in path:
        raise _wrong("a path has no zero bytes")
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong("data is not base64") from error
    return _Operation(
        op,
        _number(found.get("inode", 0), "inode"),
        _number(found.get("flags", 0), "flags"),
        path,
        decoded,
    )


def _from_words(text: str) -> _Operation:
    try:
        op, *rest = shlex.split(text)
        if "\0" in text:
            raise ValueError("a path has no zero bytes")
        numbers = [words.inode(word) for word in (rest[:1] + rest[2:])]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise _wrong(str(error)) from error
    match op, len(rest):
        case "write", 2 | 3:
            return _Operation(op, numbers[0], numbers[1] if len(rest) > 2 else 0, rest[1])
        case "rm", 1:
            return _Operation(op, numbers[0])
        case "commit", 0:
            return _Operation(op)
    raise _wrong("unknown, or the wrong number of words")


def _lines(file: BinaryIO, limit_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines; of a line that is too long, the limit and a byte, so that memory is not asked for it."""
    return enumerate(iter(lambda: file.readline(limit_bytes + 1), b""), 1)


def _operation(line: bytes, limit_bytes: int) -> _Operation | None:
    """What a line asks for; None where it is empty or a comment."""
    if len(line) > limit_bytes:
        raise _wrong("it is longer than the volume could hold")
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise _wrong("it is not UTF-8") from error
    if not text or text.startswith("#"):
        return None
    return _from_json(text) if text.startswith("{") else _from_words(text)


class _Batch:
    """A transaction that is committed now and then, and what was done so far.

    Args:
        volume: Opened for changes.
        every: Commit after so many changes; None for never.
        force: Whether files are replaced.
        progress: Is told how much of a commit was written.
    """

    def __init__(self, volume: Volume, *, every: int | None, force: bool, progress: Meter) -> None:
        self._volume, self._every, self._force, self._progress = volume, every, force, progress
        self._transaction = volume.transaction()
        self._waiting = self._held = 0
        self._uncommitted = {"write": 0, "rm": 0}
        self.done = {"write": 0, "rm": 0}
        self.commits = self.line = 0

    def run(self, operation: _Operation) -> None:
        """One operation."""
        if operation.op == "commit":
            self.commit()
            return
        if operation.op == "rm":
            self._transaction.unlink(operation.inode)
        else:
            limit = self._volume.size_bytes
            data = operation.data if operation.path is None else access.contents(operation.path, limit_bytes=limit)
            self._held += len(data)
            if self._held > limit:  # it cannot fit; memory should not be asked for it
                raise StateError("the changes are larger than the volume", code="cocoonfs-full", limit=limit)
            _put(self._transaction, operation.inode, data, operation.flags, force=self._force)
        self._uncommitted[operation.op] += 1
        self._waiting += 1
        if self._waiting == self._every:
            self.commit()

    def commit(self) -> None:
        """Commit what waits."""
        if self._waiting:
            self._progress.moving("writing", self._held)
            self._transaction.commit()
            self.commits += 1
            self.done = {op: count + self._uncommitted[op] for op, count in self.done.items()}
            self._uncommitted = dict.fromkeys(self._uncommitted, 0)
            self._transaction = self._volume.transaction()
            self._waiting = self._held = 0


def _batch(arguments: argparse.Namespace) -> int:
    with meter() as progress, access.changing(arguments, progress) as volume:
        batch = _Batch(volume, every=arguments.commit_every, force=arguments.force, progress=progress)
        try:
            limit = 2 * volume.size_bytes + _LINE_OVERHEAD
            with access.opened_input(arguments.source) as file:
                whole, read = access.length_of(file), 0
                for batch.line, line in _lines(file, limit):
                    if (operation := _operation(line, limit)) is not None:
                        batch.run(operation)
                    read += len(line)
                    progress("lines", min(read, whole) if whole else batch.line, whole)
            batch.commit()
        except SvsmError as error:
            error.details |= {"line": batch.line, "commits": batch.commits}
            raise
        except OSError as error:
            raise BackendError(
                f"cannot read the batch: {error.strerror}", code="volume-input", path=arguments.source
            ) from error
        _report(arguments, volume, written=batch.done["write"], removed=batch.done["rm"], commits=batch.commits)
    return 0
