# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume aux …`: auxiliary metadata, records in clear text that need no key.

With a key a change is a commit and may be of any size; without it, it stays within the reserve that the volume has. An
announced volume has records as well, and they are changed without a key.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from svsm.cli.volume import access, words

if TYPE_CHECKING:
    from svsm.storage.cocoonfs.aux import AuxMetadata

__all__ = ["add_verbs"]

_LARGEST = 16 << 20


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    group = verbs.add_parser("aux", help="auxiliary metadata: records that need no key")
    inner = group.add_subparsers(dest="aux_verb", metavar="VERB", required=True)
    listing = words.verb(inner, "list", "list the records", _list)
    read = words.verb(inner, "read", "write a record's contents to stdout", _read)
    add = words.verb(inner, "add", "add a record behind those of its kind", _add)
    replace = words.verb(inner, "replace", "give a record other contents", _replace)
    remove = words.verb(inner, "remove", "remove a record", _remove)
    reserve = words.verb(inner, "reserve", "set the room for changes without the key", _reserve)
    for parser in (read, add, replace, remove):
        parser.add_argument("kind", type=_uuid, metavar="UUID", help="the record's kind")
    for parser in (read, replace, remove):
        parser.add_argument(
            "--index", type=words.number, default=0, metavar="N", help="which one of that kind (default: 0)"
        )
    for parser in (add, replace):
        words.add_input(parser, "its contents")
    words.add_output(read, "them")
    reserve.add_argument("reserve", type=_reserve_size, metavar="SIZE", help="or none: only the key can change records")
    for parser in (listing, read):
        words.add_json(parser)
    for parser in (add, replace, remove, reserve):
        words.add_key(parser, required=parser is reserve)
        words.add_json(parser)
        words.add_access(parser, writes=True)


def _uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a UUID: {text!r}") from None


def _reserve_size(text: str) -> int | None:
    return None if text == "none" else words.size(text)


def _seen(arguments: argparse.Namespace) -> AuxMetadata:
    from svsm.storage.cocoonfs.offline import read_aux

    device = access.disk(arguments.image)
    try:
        return read_aux(device)
    finally:
        device.close()


def _members(aux: AuxMetadata) -> dict[str, object]:
    counts: dict[uuid.UUID, int] = {}
    records: list[dict[str, object]] = []
    for entry in aux.entries:
        index = counts.get(entry.kind, 0)
        counts[entry.kind] = index + 1
        records.append({"uuid": str(entry.kind), "index": index, "bytes": len(entry.data)})
    return {"records": records, "reserve_bytes": aux.reserve_bytes}


def _list(arguments: argparse.Namespace) -> int:
    members = _members(_seen(arguments))
    records = members["records"]
    text = []
    if isinstance(records, list):
        text = [f"{record['uuid']}  index {record['index']}  {record['bytes']} bytes" for record in records]
    access.emit(members, text, as_json=arguments.json)
    return 0


def _read(arguments: argparse.Namespace) -> int:
    data = _seen(arguments).read(arguments.kind, arguments.index)
    named = {"uuid": str(arguments.kind), "index": arguments.index, "bytes": len(data)}
    access.give(arguments, data, named)
    return 0


def _change(arguments: argparse.Namespace, edit: Callable[[AuxMetadata], AuxMetadata]) -> int:
    from svsm.storage.cocoonfs.offline import read_aux, write_aux

    if access.key(arguments) is None:
        with access.writable(arguments) as device:
            changed = edit(read_aux(device))
            write_aux(device, changed)
    else:
        with access.changing(arguments) as volume, volume.transaction() as transaction:
            changed = edit(transaction.aux)
            transaction.set_aux(changed)
    access.emit(_members(changed), [], as_json=arguments.json)
    return 0


def _add(arguments: argparse.Namespace) -> int:
    data = access.contents(arguments.source, limit_bytes=_LARGEST)
    return _change(arguments, lambda aux: aux.add(arguments.kind, data))


def _replace(arguments: argparse.Namespace) -> int:
    data = access.contents(arguments.source, limit_bytes=_LARGEST)
    return _change(arguments, lambda aux: aux.replace(arguments.kind, data, arguments.index))


def _remove(arguments: argparse.Namespace) -> int:
    return _change(arguments, lambda aux: aux.remove(arguments.kind, arguments.index))


def _reserve(arguments: argparse.Namespace) -> int:
    return _change(arguments, lambda aux: aux.with_reserve(arguments.reserve))
