# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the verbs of `svsm volume` have in common on the command line: sizes, numbers, keys, configurations.

A key comes from a file or a descriptor and from nowhere else: the words of a command are there for every process of
the machine to read, and its environment for many. Paths stay strings here: `pathlib` takes longer to import than most
of these commands work.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

__all__ = [
    "BLOCKS",
    "FIRST_INODE",
    "INODE_HELP",
    "Verbs",
    "add_access",
    "add_first_use",
    "add_input",
    "add_json",
    "add_key",
    "add_layout",
    "add_output",
    "hexadecimal",
    "inode",
    "number",
    "size",
    "verb",
]

Verbs = argparse._SubParsersAction  # the type has no public name

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)(?: ?([KMGT])(?:iB)?| ?B)?")
BLOCKS = {
    "allocation_block": "unit of allocation, from 128",
    "io_block": "what the disk may write at once, 1 to 64 allocation blocks",
    "data_block": "unit of authentication, 1 to 64 allocation blocks",
    "tree_node": "of the authentication tree, at least an IO block",
    "bitmap_block": "of the allocation bitmap",
    "leaf_node": "of the index of files, 1 to 64 allocation blocks",
    "internal_node": "of the index of files, 1 to 64 allocation blocks",
}
"""Block sizes that can be named, as `presets.layout_of` has them without ``_bytes``."""
FIRST_INODE = 16
"""`layout.FIRST_USER_INODE`, which takes long to import."""
INODE_HELP = f"its number, which you choose: {FIRST_INODE} or more, at most 64 bits, decimal or 0x…"


def size(text: str) -> int:
    """A number of bytes: ``4096``, ``0x1000``, ``4KiB``, ``4K``; units are powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"not a size such as 8MiB or 0x1000: {text!r}")
    return int(found[1], 0 if found[1][:2] in ("0x", "0X") else 10) * _UNITS[found[2] or ""]


def number(text: str) -> int:
    """A number that is not negative, decimal or 0x…"""
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"negative: {text!r}")
    return value


def inode(text: str) -> int:
    """The number of a file, decimal or 0x…, of at most 64 bits."""
    value = number(text)
    if value >> 64:
        raise argparse.ArgumentTypeError(f"more than 64 bits: {text!r}")
    return value


def hexadecimal(text: str) -> bytes:
    """Bytes as hexadecimal digits."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not hexadecimal: {text!r}") from None


def verb(
    verbs: Verbs[argparse.ArgumentParser], name: str, summary: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A new verb on an image."""
    parser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("image", metavar="IMAGE", help="a file or block device")
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """The answer for programs."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_key(parser: argparse.ArgumentParser, *, required: bool = True, new: bool = False) -> None:
    """Where the volume key (or the new one) comes from.

    Args:
        parser: Of the verb.
        required: Whether the verb does nothing without it.
        new: Whether it is the key that the volume gets.
    """
    which = "new-" if new else ""
    keys = parser.add_mutually_exclusive_group(required=required)
    keys.add_argument(
        f"--{which}key-file",
        metavar="FILE",
        help=f"the {'new ' if new else ''}volume key: hexadecimal digits, or raw bytes",
    )
    keys.add_argument(f"--{which}key-fd", type=number, metavar="N", help="the same from an open descriptor")


def add_access(parser: argparse.ArgumentParser, *, writes: bool) -> None:
    """How a volume may look and be written to.

    Args:
        parser: Of the verb.
        writes: Whether the verb changes the volume.
    """
    parser.add_argument("--allow-weak", action="store_true", help="accept SHA-1 and TDES")
    if writes:
        parser.add_argument(
            "--ignore-block-size",
            action="store_true",
            help="accept IO blocks smaller than the disk's own; a power cut may then damage the volume",
        )


def add_first_use(parser: argparse.ArgumentParser) -> None:
    """Whether an announced volume is made now, and what it has to be."""
    parser.add_argument("--first-use", action="store_true", help="make the volume if it is only announced")
    parser.add_argument(
        "--expect-salt", type=hexadecimal, metavar="HEX", help="refuse a volume with another salt; see info"
    )
    parser.add_argument("--expect-size", type=size, metavar="SIZE", help="refuse a volume of another size; see info")
    parser.add_argument(
        "--expect-layout", type=hexadecimal, metavar="HEX", help="refuse a volume of another configuration; see info"
    )


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Where contents go."""
    parser.add_argument(
        "-o", "--output", metavar="FILE", help=f"write {what} there, readable by you only (default: stdout)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def add_input(parser: argparse.ArgumentParser, what: str) -> None:
    """Where contents come from."""
    parser.add_argument("source", metavar="FILE", help=f"{what}; - for stdin")


def add_layout(parser: argparse.ArgumentParser, *, keep: bool = False) -> None:
    """Configuration and salt of a volume to be made.

    Args:
        parser: Of the verb.
        keep: Whether the defaults are those of a volume that there is.
    """
    parser.add_argument("--salt", type=hexadecimal, metavar="HEX", help=_default("at most 255 bytes", "random", keep))
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--profile",
        choices=("reference", "tuned"),
        help=_default("block sizes: the reference program's, or ours for speed", "reference", keep),
    )
    group.add_argument(
        "--hash", choices=("sha2", "sha3", "sm3", "sha1"), help=_default("family of hashes", "sha2", keep)
    )
    group.add_argument(
        "--cipher", choices=("aes", "camellia", "sm4", "tdes"), help=_default("block cipher", "aes", keep)
    )
    group.add_argument("--strength", type=int, choices=(128, 192, 256), help=_default("security in bits", "128", keep))
    for name, summary in BLOCKS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=size, metavar="SIZE", help=summary)


def _default(summary: str, default: str, keep: bool) -> str:
    return f"{summary} (default: {'as it is' if keep else default})"
