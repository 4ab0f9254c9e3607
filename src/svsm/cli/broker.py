# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm broker`: the volume owner's side. Serve keys, make volumes, say which images may have them.

All verbs work on the broker's part of a state directory (``DIR/broker``), also while a broker serves from it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from svsm.cli.state_option import add_state
from svsm.formats.errors import BackendError, FormatError, StateError

if TYPE_CHECKING:
    from svsm.broker.service import Broker
    from svsm.broker.store import Volume
    from svsm.formats.launch_configuration import LaunchConfiguration

__all__ = ["HELP", "configure"]

HELP = "the volume owner's key broker"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `svsm broker`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    serve = verbs.add_parser("serve", help="answer attestation requests over HTTP")
    _state(serve)
    serve.add_argument(
        "--listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="where to listen (default: 127.0.0.1:0, loopback and any free port; the URL is printed)",
    )
    serve.set_defaults(run=_serve)
    key = verbs.add_parser("key", help="print the public key that an image's settings must pin")
    _state(key)
    key.add_argument("--json", action="store_true", help="one JSON object")
    key.set_defaults(run=_key)
    audit = verbs.add_parser("audit", help="print every decision with its reason, and check the trail")
    _state(audit)
    audit.add_argument("--json", action="store_true", help="one JSON object")
    audit.set_defaults(run=_audit)
    volume = verbs.add_parser("volume", help="create and show volumes, allow launch digests")
    nouns = volume.add_subparsers(dest="volume_verb", metavar="VERB", required=True)
    _configure_create(nouns.add_parser("create", help="make a volume: a row with a fresh key, in state new"))
    allow = nouns.add_parser("allow", help="let images with a launch digest have a volume's key")
    _state(allow)
    allow.add_argument("volume", metavar="VOLUME", help="its id or name")
    allow.add_argument("digest", metavar="DIGEST", help="launch digest, 96 hexadecimal digits")
    allow.set_defaults(run=_allow)
    show = nouns.add_parser("show", help="show volumes, their states and allowed digests")
    _state(show)
    show.add_argument("volume", metavar="VOLUME", nargs="?", help="its id or name (default: all)")
    show.add_argument("--json", action="store_true", help="one JSON object")
    show.set_defaults(run=_show)


def _configure_create(parser: argparse.ArgumentParser) -> None:
    _state(parser)
    parser.add_argument(
        "--root",
        required=True,
        help="whose reports count: amd:Milan, amd:Genoa, amd:Turin, amd (any of them), or simulated:FINGERPRINT",
    )
    parser.add_argument("--configuration", type=Path, metavar="FILE", help="launch configuration (JSON) to make it for")
    parser.add_argument("--name", help="name of the VM (without --configuration)")
    parser.add_argument("--volume-id", metavar="UUID", help="id of the volume (default: random)")
    parser.add_argument(
        "--tpm", action="append", default=[], metavar="NAME:FRONT", help="a TPM with front socket or svsm; repeatable"
    )
    parser.add_argument("--allow", action="append", default=[], metavar="DIGEST", help="allowed launch digest")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the launch configuration to this new file")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=_create)


def _state(parser: argparse.ArgumentParser) -> None:
    add_state(parser)


def _folder(arguments: argparse.Namespace) -> Path:
    from svsm.cli.supervisor.state import default_directory

    base: Path = arguments.state or default_directory()
    return base / "broker"


@contextlib.contextmanager
def _open(arguments: argparse.Namespace, *, must_exist: bool) -> Iterator[Broker]:
    from svsm.broker.service import DATABASE_NAME, Broker

    folder = _folder(arguments)
    if must_exist and not (folder / DATABASE_NAME).exists():
        raise StateError(
            "there is no broker in this state directory",
            code="broker-no-state",
            hint="name it with --state, or make one with: svsm broker volume create",
            path=str(folder),
        )
    broker = Broker.open(_as_owner(folder))
    try:
        yield broker
    finally:
        broker.close()


def _as_owner(folder: Path) -> Path:
    """Become the user whom the folder belongs to, where root calls; the folder's path from then on.

    `svsm boot`, started by root, gives its broker a uid of its own. Whatever is made in there must stay that user's,
    and the folders above are closed to it: so this process enters the folder for good. Everything is imported before.
    """
    if os.geteuid() != 0 or not folder.exists() or (owner := folder.stat()).st_uid == 0:
        return folder
    try:
        os.chroot(folder)
        os.chdir("/")
        os.setgroups([])
        os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
        os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    except OSError as error:
        raise BackendError(
            f"cannot become the broker's user: {error.strerror}", code="broker-user", errno=error.errno
        ) from None
    return Path("/")


def _serve(arguments: argparse.Namespace) -> int:
    from svsm.broker.app import serve

    listener = _listen(arguments.listen)
    with _open(arguments, must_exist=False) as broker:
        server = serve(broker, listener)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.interrupt())
        print(server.url, flush=True)
        try:
            server.run()
        finally:
            server.stop()
    return 0


def _listen(where: str) -> socket.socket:
    host, separator, port = where.rpartition(":")
    try:
        if not separator or not host or not 0 <= int(port) <= 0xFFFF:
            raise ValueError
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=128)
    except ValueError:
        raise FormatError("not an address to listen at", code="broker-listen", got=where[:80]) from None
    except OSError as error:
        raise BackendError(
            f"cannot listen at {where[:80]}: {error.strerror}", code="broker-listen", errno=error.errno
        ) from None


def _key(arguments: argparse.Namespace) -> int:
    from svsm.crypto.digests import sha256
    from svsm.formats.strict_json import base64_std

    with _open(arguments, must_exist=True) as broker:
        der: bytes = broker.public_key
    if arguments.json:
        print(json.dumps({"schema": 1, "public_key": der.hex(), "sha256": sha256(der).hex()}))
        return 0
    text = base64_std(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    print("\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----"]))
    return 0


def _create(arguments: argparse.Namespace) -> int:
    configuration = _configuration(arguments)
    allowed = [_digest(text) for text in arguments.allow]
    if arguments.output is not None:
        _write_new(arguments.output, configuration.to_json())
    with _open(arguments, must_exist=False) as broker:
        row = broker.create_volume(configuration, root=arguments.root, allowed=allowed)
        _print_volumes([_facts(broker, row)], as_json=arguments.json, key="volume")
    return 0


def _configuration(arguments: argparse.Namespace) -> LaunchConfiguration:
    import uuid

    from svsm.formats.launch_configuration import LaunchConfiguration, TpmConfiguration, TpmFront

    if arguments.configuration is not None:
        try:
            return LaunchConfiguration.parse(arguments.configuration.read_bytes())
        except OSError as error:
            raise BackendError(f"cannot read it: {error.strerror}", code="broker-file", errno=error.errno) from None
    if arguments.name is None:
        raise StateError("a volume needs --name or --configuration", code="broker-usage")
    tpms = []
    for text in arguments.tpm:
        name, _, front = text.partition(":")
        if front not in {known.value for known in TpmFront}:
            raise FormatError("a TPM is written NAME:socket or NAME:svsm", code="broker-usage", got=text[:80])
        tpms.append(TpmConfiguration(name=name, front=TpmFront(front)))
    volume_id = arguments.volume_id or str(uuid.uuid4())
    return LaunchConfiguration(volume_id=volume_id, name=arguments.name, tpms=tuple(tpms))


def _allow(arguments: argparse.Namespace) -> int:
    digest = _digest(arguments.digest)
    with _open(arguments, must_exist=True) as broker:
        added = broker.allow(arguments.volume, digest)
    print("allowed" if added else "was allowed already")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with _open(arguments, must_exist=True) as broker:
        rows = broker.volumes() if arguments.volume is None else [broker.volume(arguments.volume)]
        _print_volumes([_facts(broker, row) for row in rows], as_json=arguments.json, key="volumes")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    with _open(arguments, must_exist=True) as broker:
        lines = broker.audit_trail()
    if arguments.json:
        shown = [{**line.to_json(), "hash": line.hash.hex()} for line in lines]
        print(json.dumps({"schema": 1, "lines": shown}))
        return 0
    for line in lines:
        words = [line.at, line.event, line.decision, line.reason or "", line.volume_id or ""]
        details = " ".join(f"{name}={value}" for name, value in line.details.items())
        print(" ".join(word for word in [*words, details] if word))
    counted = sum(line.decisions for line in lines if "count" in line.details)
    more = f" ({counted} decisions are only counted)" if counted else ""
    print(f"{len(lines)} lines, chain intact{more}", file=sys.stderr)
    return 0


def _facts(broker: Broker, row: Volume) -> dict[str, object]:
    return {
        "volume_id": row.volume_id,
        "name": row.name,
        "state": row.state.value,
        "root": row.root,
        "host_data": row.host_data.hex(),
        "created_at": row.created_at,
        "attestations": row.attestations,
        "allowed": [digest.hex() for digest in broker.allowed_digests(row.volume_id)],
        "counter": None if row.birth is None else row.birth.counter.hex(),
        "root_digest": None if row.birth is None else row.birth.root.hex(),
    }


def _print_volumes(volumes: list[dict[str, object]], *, as_json: bool, key: str) -> None:
    if as_json:
        print(json.dumps({"schema": 1, key: volumes if key == "volumes" else volumes[0]}))
        return
    for number, facts in enumerate(volumes):
        if number:
            print()
        for name, value in facts.items():
            if isinstance(value, list):
                for item in value or ["none"]:
                    print(f"{name:14} {item}")
            elif value is not None:
                print(f"{name.replace('_', ' '):14} {value}")


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 48:
        raise FormatError("a launch digest is 96 hexadecimal digits", code="broker-digest", got=text[:100])
    return digest


def _write_new(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise BackendError(f"cannot write {path}: {error.strerror}", code="broker-file", errno=error.errno) from None
