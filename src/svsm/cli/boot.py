# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm boot`: the main job. Builds, measures, launches, attests, opens the volume, serves the TPMs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from svsm.cli.state_option import add_state

if TYPE_CHECKING:
    from svsm.cli.supervisor.disk import Disk, DiskKind
    from svsm.host.devices.key_channel import KeyChannel

__all__ = ["configure"]

_STARTED = time.monotonic()
_LAST_PORT = 65535
_LAST_ABI = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm boot`."""
    add_state(parser)
    parser.add_argument("--image", type=Path, metavar="FILE", help="boot this IGVM image (default: one is built)")
    parser.add_argument("--broker", metavar="URL", help="a broker elsewhere (default: one of this boot's own)")
    parser.add_argument("--broker-key", type=Path, metavar="PEM", help="that broker's public key, to pin in the image")
    parser.add_argument(
        "--serial",
        type=Path,
        metavar="SOCKET",
        help="a proxy elsewhere that listens on this socket (default: one of this boot's own)",
    )
    parser.add_argument(
        "--disk",
        type=_disk,
        metavar="KIND[:PATH]",
        help="where the volume is. file:PATH: a file or block device; qemu-virtio[:PATH], qemu-nvme[:PATH]: the same "
        "behind QEMU's device; direct:PATH: the same, with no device between; vhost-user:SOCKET: a vhost-user-blk "
        "daemon that listens there; process:SOCKET: a program that listens there and speaks the simple disk protocol "
        "of this project (python -m svsm.testing.diskprocess is one) (default: an 8 MiB file in the state directory)",
    )
    parser.add_argument(
        "--channel",
        type=_channel,
        metavar="KIND",
        help="what the key comes over: stream, uart16550, virtio-console or vsock (default: stream; with QEMU's disks "
        "always its COM3)",
    )
    parser.add_argument(
        "--tpm-tcp",
        type=_port,
        metavar="PORT",
        help="serve the TPM on loopback too: data on PORT, control on PORT+1 (default: only on a Unix socket)",
    )
    parser.add_argument(
        "--landlock-abi",
        type=_abi,
        metavar="N",
        help="confine every process as an older Linux would: with no later version than N of Landlock, the kernel's "
        "sandbox for files and ports; to see what is lost there (default: the latest that this Linux has)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON event per line")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    elsewhere = arguments.broker is not None or arguments.serial is not None
    if elsewhere and arguments.image is None and arguments.broker_key is None:
        parser.error("an image for somebody else's broker pins its key: give --broker-key PEM, or --image FILE")
    if arguments.broker_key is not None and not elsewhere:
        parser.error("--broker-key is the key of a broker elsewhere: it goes with --broker URL or --serial SOCKET")
    if arguments.broker_key is not None and arguments.image is not None:
        parser.error("--broker-key is pinned in an image that is built here: --image FILE has its own")
    from svsm.cli.supervisor.disk import DiskKind
    from svsm.cli.supervisor.progress import Progress
    from svsm.cli.supervisor.session import Options, Session
    from svsm.cli.supervisor.state import default_directory
    from svsm.host.devices.key_channel import KeyChannel

    disk = arguments.disk or DiskKind.FILE
    kind = disk if isinstance(disk, DiskKind) else disk.kind
    channel = arguments.channel or KeyChannel.STREAM
    if channel is not KeyChannel.STREAM and kind is not DiskKind.FILE:
        parser.error(f"--channel {channel} is a device beside the disk of our own: it goes with --disk file:PATH only")
    options = Options(
        state=(arguments.state or default_directory()).absolute(),
        image=arguments.image,
        broker=arguments.broker,
        broker_key=arguments.broker_key,
        serial=arguments.serial,
        disk=disk,
        channel=channel,
        tcp_port=arguments.tpm_tcp,
        landlock_cap=arguments.landlock_abi,
        debug=arguments.debug,
    )
    return Session(options, Progress(as_json=arguments.json, started=_STARTED)).run()


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else _LAST_PORT
    if port >= _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text} and the next are not two ports")
    return port


def _abi(text: str) -> int:
    version = int(text) if text.isdecimal() else _LAST_ABI + 1
    if version > _LAST_ABI:
        raise argparse.ArgumentTypeError(f"{text} is no Landlock ABI")
    return version


def _channel(text: str) -> KeyChannel:
    from svsm.host.devices.key_channel import KeyChannel

    try:
        return KeyChannel(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no channel: stream, uart16550, virtio-console or vsock") from None


def _disk(text: str) -> Disk | DiskKind:
    """A disk somewhere, or a kind for the state's own."""
    from svsm.cli.supervisor.disk import Disk, DiskKind

    word, colon, path = text.partition(":")
    kind = next((kind for kind in DiskKind if kind == word), None)
    if kind is None or (bool(colon) and not path) or (not colon and not kind.serves_the_states_own):
        raise argparse.ArgumentTypeError(
            f"{text} is no disk: file:PATH, vhost-user:SOCKET, qemu-virtio[:PATH], qemu-nvme[:PATH], direct:PATH "
            "or process:SOCKET"
        )
    return Disk(Path(path).absolute(), kind) if path else kind
