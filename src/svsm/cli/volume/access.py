# SPDX-License-Identifier: MIT OR Apache-2.0
"""Keys, disks, volumes and output files, as the words on the command line name them.

A verb that only looks opens the image for reading, with a shared lock. A verb that writes takes the exclusive lock
that a boot takes as well, so that one of the two is refused (``block-in-use``). A pending commit is shown as carried
out, in memory, by those that look, and is carried out by those that write.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import gc
import importlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from svsm.cli.volume.words import BLOCKS
from svsm.formats.errors import BackendError, FormatError, StateError

if TYPE_CHECKING:
    from svsm.abi.block import BlockDevice
    from svsm.cli.volume.meter import Meter
    from svsm.storage.cocoonfs import FoundJournal, Volume
    from svsm.storage.cocoonfs.layout import ImageLayout
    from svsm.storage.drivers.file import FileDevice

__all__ = [
    "Opened",
    "changing",
    "contents",
    "device_of_file",
    "disk",
    "emit",
    "give",
    "key",
    "layout",
    "length_of",
    "looking",
    "needed_key",
    "opened_input",
    "output",
    "rounded",
    "writable",
]

_MAX_KEY_BYTES = 4096
_HEX = frozenset(b"0123456789abcdefABCDEF")
_SMALLEST_BLOCK = 128
_FILE_BLOCK = 512
_PIECE_BYTES = 1 << 20


def emit(members: dict[str, object], text: list[str], *, as_json: bool) -> None:
    """The answer of a verb: one JSON object, or lines for a person."""
    if as_json:
        import json

        print(json.dumps({"schema": 1, **members}))
    elif text:
        print("\n".join(text))


def rounded(asked: int | None, made: int) -> list[str]:
    """What a person is told of a size that a volume cannot have, in bytes; nothing where it has what was asked for."""
    if asked is None or asked == made:
        return []
    return [f"The size was rounded down, from {asked} to {made} bytes: a volume consists of whole blocks."]


# -- keys ------------------------------------------------------------------------------------------------------------


def key(arguments: argparse.Namespace, *, new: bool = False) -> bytes | None:
    """The volume key from --key-file or --key-fd (or the new one); None where neither was given.

    Raises:
        BackendError: ``volume-key-file``: it cannot be read.
        FormatError: ``volume-key-file``: it is empty or too long.
    """
    path: str | None = arguments.new_key_file if new else arguments.key_file
    descriptor: int | None = arguments.new_key_fd if new else arguments.key_fd
    if path is None and descriptor is None:
        return None
    try:
        data = _all_of(descriptor) if path is None else _beginning(path)
    except OSError as error:
        raise BackendError(
            f"cannot read the key: {error.strerror}",
            code="volume-key-file",
            hint="--key-file names a file with the key, --key-fd a descriptor that is open for reading",
            source=path or f"descriptor {descriptor}",
        ) from error
    if not data or len(data) > _MAX_KEY_BYTES:
        raise FormatError(
            "the key is empty or too long",
            code="volume-key-file",
            hint=f"a key has 1 to {_MAX_KEY_BYTES} raw bytes, or their hexadecimal digits",
            got=len(data),
        )
    digits = data.strip()
    if digits and len(digits) % 2 == 0 and set(digits) <= _HEX:
        return bytes.fromhex(digits.decode())
    return data


def _beginning(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_MAX_KEY_BYTES + 1)


def _all_of(descriptor: int | None) -> bytes:
    data = b""
    while descriptor is not None and len(data) <= _MAX_KEY_BYTES:
        part = os.read(descriptor, _MAX_KEY_BYTES + 1)
        if not part:
            break
        data += part
    return data


def needed_key(arguments: argparse.Namespace, *, new: bool = False) -> bytes:
    """The same where there must be one: the parser sees to that.

    Raises:
        StateError: ``volume-key-file``: there is none.
        BackendError, FormatError: As `key`.
    """
    found = key(arguments, new=new)
    if found is None:
        raise StateError("there is no key", code="volume-key-file", hint="give --key-file or --key-fd")
    return found


# -- disks -----------------------------------------------------------------------------------------------------------


@functools.cache
def load() -> None:
    """Import what every command on a volume needs.

    Its classes and functions live until the process ends, so the collector is kept from looking for garbage among
    them, now and then; that is a tenth of what a short command takes.
    """
    gc.disable()
    try:
        importlib.import_module("svsm.storage.cocoonfs")
        importlib.import_module("svsm.storage.drivers.file")
    finally:
        gc.freeze()
        gc.enable()


def device_of_file(descriptor: int, *, ignore_block_size: bool = False) -> FileDevice:
    """A file that will be written to, locked; the device owns the descriptor."""
    load()
    from svsm.storage.drivers.file import FileDevice

    return FileDevice(descriptor, block_size_bytes=_SMALLEST_BLOCK if ignore_block_size else _FILE_BLOCK)


def disk(image: str, *, writable: bool = False, ignore_block_size: bool = False) -> BlockDevice:
    """The file or block device with a volume.

    Raises:
        BackendError: ``volume-image``, ``block-io``.
        StateError: ``block-in-use``.
    """
    load()
    from svsm.storage.drivers.file import FileDevice

    try:
        if stat.S_ISBLK(os.stat(image).st_mode):
            from svsm.storage.drivers.linux import open_linux

            return open_linux(image, read_only=not writable)
        # Without O_NONBLOCK a FIFO in its place would keep us here for ever.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(image, flags)
    except OSError as error:
        raise BackendError(f"cannot open the image: {error.strerror}", code="volume-image", path=image) from error
    if writable:
        return device_of_file(descriptor, ignore_block_size=ignore_block_size)
    # The smallest block there is: a reader need not care what the medium writes at once.
    return FileDevice(descriptor, block_size_bytes=_SMALLEST_BLOCK, read_only=True)


@contextlib.contextmanager
def writable(arguments: argparse.Namespace) -> Iterator[BlockDevice]:
    """The image's disk with its exclusive lock, for as long as the block takes."""
    device = disk(arguments.image, writable=True, ignore_block_size=arguments.ignore_block_size)
    try:
        yield device
    finally:
        device.close()


# -- volumes ---------------------------------------------------------------------------------------------------------


class Opened:
    """An opened volume, and whether a commit was found pending."""

    def __init__(self, volume: Volume, *, pending: bool) -> None:
        self.volume = volume
        self.pending = pending


def _open(arguments: argparse.Namespace, device: BlockDevice, *, read_only: bool) -> Opened:
    from svsm.storage.cocoonfs import Decision, Expected, Volume
    from svsm.storage.cocoonfs.layout import ImageLayout

    found: list[FoundJournal] = []

    def decide(journal: FoundJournal) -> Decision:
        found.append(journal)
        return Decision.YES

    size_bytes: int | None = getattr(arguments, "expect_size", None)
    layout_bytes: bytes | None = getattr(arguments, "expect_layout", None)
    volume = Volume.open(
        device,
        needed_key(arguments),
        decide=decide,
        read_only=read_only,
        first_use=getattr(arguments, "first_use", False),
        expected=Expected(
            layout=None if layout_bytes is None else ImageLayout.parse(layout_bytes),
            salt=getattr(arguments, "expect_salt", None),
            min_size_bytes=size_bytes or 0,
            max_size_bytes=size_bytes,
        ),
        allow_weak=arguments.allow_weak,
    )
    return Opened(volume, pending=bool(found))


@contextlib.contextmanager
def looking(arguments: argparse.Namespace, progress: Meter | None = None) -> Iterator[Opened]:
    """The volume, opened without writing.

    Args:
        arguments: Of the verb.
        progress: Is told what is read; see `Meter.moving`.
    """
    device = disk(arguments.image)
    try:
        yield _open(arguments, _watched(device, progress), read_only=True)
    finally:
        device.close()


def _watched(device: BlockDevice, progress: Meter | None) -> BlockDevice:
    if progress is None:
        return device
    from svsm.cli.volume.meter import Watched

    return Watched(device, progress)


@contextlib.contextmanager
def changing(arguments: argparse.Namespace, progress: Meter | None = None) -> Iterator[Volume]:
    """The volume, locked and opened for changes; `progress` as for `looking`."""
    with writable(arguments) as device:
        yield _open(arguments, _watched(device, progress), read_only=False).volume


def layout(arguments: argparse.Namespace, base: ImageLayout | None = None) -> ImageLayout | None:
    """The configuration that the words name.

    Args:
        arguments: With what `words.add_layout` adds.
        base: What a volume has now; None where it is made anew.

    Returns:
        The configuration; None where there is a base and nothing was named.

    Raises:
        FormatError: ``cocoonfs-strength``, ``cocoonfs-layout``, ``cocoonfs-unsupported-…``.
    """
    from svsm.storage.cocoonfs.presets import layout_of, names_of, sizes_of
    from svsm.storage.cocoonfs.profiles import PROFILES

    named = {f"{name}_bytes": getattr(arguments, name) for name in BLOCKS}
    sizes = {name: value for name, value in named.items() if value is not None}
    family, cipher, strength = arguments.hash, arguments.cipher, arguments.strength
    if base is not None and not sizes and not any((arguments.profile, family, cipher, strength)):
        return None
    if None in (family, cipher, strength):
        defaults = ("sha2", "aes", 128) if base is None else names_of(base)
        if defaults is None:
            raise FormatError(
                "the volume has a combination of algorithms of its own",
                code="cocoonfs-strength",
                hint="name all of --hash, --cipher and --strength",
            )
        family, cipher, strength = family or defaults[0], cipher or defaults[1], strength or defaults[2]
    if base is not None and arguments.profile is None:
        sizes = {**sizes_of(base), **sizes}
    made = layout_of(family, cipher, strength, **{**PROFILES[arguments.profile or "reference"], **sizes})
    if not arguments.allow_weak:
        made.refuse_weak()
    return made


# -- files on this machine -------------------------------------------------------------------------------------------


def length_of(file: BinaryIO) -> int:
    """How many bytes an input has; 0 where that is not known before its end."""
    try:
        return os.fstat(file.fileno()).st_size
    except OSError:  # of a stream without a descriptor, too
        return 0


def contents(source: str, *, limit_bytes: int, progress: Meter | None = None) -> bytes:
    """What a file (or stdin, for ``-``) holds.

    Args:
        source: Its path.
        limit_bytes: What cannot fit anyhow is not read into memory.
        progress: Is told how much was read.

    Raises:
        BackendError: ``volume-input``.
        StateError: ``cocoonfs-full``.
    """
    try:
        with opened_input(source) as file:
            whole, parts, length = length_of(file), list[bytes](), 0
            while length <= limit_bytes and (part := file.read(min(_PIECE_BYTES, limit_bytes + 1 - length))):
                parts.append(part)
                length += len(part)
                if progress is not None:
                    progress("reading", min(length, whole) if whole else length, whole)
    except OSError as error:
        raise BackendError(f"cannot read the input: {error.strerror}", code="volume-input", path=source) from error
    if length > limit_bytes:
        raise StateError(
            "the input is larger than the volume", code="cocoonfs-full", hint="nothing was changed", limit=limit_bytes
        )
    return b"".join(parts)


@contextlib.contextmanager
def opened_input(source: str) -> Iterator[BinaryIO]:
    """A file for reading, or stdin for ``-``.

    Raises:
        OSError: It cannot be opened.
    """
    if source == "-":
        yield sys.stdin.buffer
        return
    with open(source, "rb") as file:
        yield file


@contextlib.contextmanager
def output(path: str | None, *, force: bool, image: str) -> Iterator[BinaryIO]:
    """Where results go: a new file of mode 0600, or stdout.

    Args:
        path: None or ``-`` for stdout.
        force: Whether a file that exists is overwritten.
        image: Is never overwritten.

    Raises:
        BackendError: ``volume-output``. A file that was begun is taken away again.
    """
    if path is None or path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if os.path.exists(path) and os.path.exists(image) and os.path.samefile(path, image):
        raise BackendError(
            "the output is the image itself", code="volume-output", hint="choose another name for the output"
        )
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            try:
                yield file
            except BaseException:
                if not force:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                raise
    except OSError as error:
        raise BackendError(
            f"cannot write the output: {error.strerror}",
            code="volume-output",
            hint="--force overwrites" if isinstance(error, FileExistsError) else None,
            path=path,
        ) from error


def give(arguments: argparse.Namespace, data: bytes, members: dict[str, object]) -> None:
    """Contents as the answer of a verb: to --output, to stdout, or within one JSON object.

    Args:
        arguments: With output, force, image and json.
        data: The contents.
        members: What else the JSON object says.

    Raises:
        BackendError: ``volume-output``.
    """
    to_stdout = arguments.output is None or arguments.output == "-"
    if not (to_stdout and arguments.json):
        with output(arguments.output, force=arguments.force, image=arguments.image) as file:
            file.write(data)
    if arguments.json:
        shown = {**members, "data": base64.b64encode(data).decode()} if to_stdout else members
        emit(shown, [], as_json=True)
