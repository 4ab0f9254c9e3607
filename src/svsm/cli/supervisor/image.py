# SPDX-License-Identifier: MIT OR Apache-2.0
"""The image that is launched: built, or read from a file, by a worker process.

Building takes as long as importing what the roles need, so the two run side by side: the worker is forked first, and
needs the broker's key, which goes into the settings page, only at the end. What comes back is a sealed memfd and its
digests. So the image exists once, not in the heap of every role that is forked afterwards, and neither do the
sources, hashes and archives that building it takes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from svsm.cli.supervisor.release import Release
from svsm.cli.supervisor.roles import Emit
from svsm.confine.sealing import seal
from svsm.formats.errors import BackendError

if TYPE_CHECKING:
    from svsm.formats.igvm import IgvmFile
    from svsm.formats.record import Buffer
    from svsm.formats.snp.digest import KnownDigests
    from svsm.launch.payload import Payload

__all__ = ["Image", "image_body"]


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """An image, ready to launch."""

    descriptor: int
    """A sealed memfd."""
    size_bytes: int
    launch_digest: str
    """Computed from the file; hex."""
    payload_digest: str
    """Hex."""
    release: Release | None
    """What it was built from; None for an image from a file."""

    @classmethod
    def of(cls, descriptor: int, event: Mapping[str, object]) -> Image:
        """The image in `descriptor` that the worker's ``image`` event describes."""
        release = event["release"]
        return cls(
            descriptor,
            int(str(event["size_bytes"])),
            str(event["launch_digest"]),
            str(event["payload_digest"]),
            Release(**release) if isinstance(release, dict) else None,
        )


def image_body(source: Path | None, broker_key: int, output: int) -> Callable[[Emit, int], None]:
    """The worker: fills `output` and reports ``image`` with size and digests.

    Args:
        source: The file to launch; None builds the image from the code that is installed here.
        broker_key: Where the public key to pin is read from, up to the end; not read with a `source`.
        output: An empty memfd.
    """

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.confine import enter
        from svsm.confine.identity import role_uid
        from svsm.confine.lists import Role
        from svsm.confine.process import bind_to_parent
        from svsm.formats.igvm import IgvmFile
        from svsm.launch.digest import launch_digest, payload_digest
        from svsm.launch.payload import build_payload

        bind_to_parent(supervisor)
        payload = None
        if source is None:
            payload = build_payload()
            file = _describe(payload, broker_key)
            data: Buffer = file.pack()
        else:
            data = _read(source)
            # Somebody else's bytes: parsed as the host's role would, and with no more than a service may do.
            enter(Role.SERVICE, uid=role_uid(Role.HOST), parent=supervisor)
            file = IgvmFile.parse(data)
        _fill(output, data)
        known: KnownDigests = {}
        digests = launch_digest(file, known=known).hex(), payload_digest(file, known=known).hex()
        release = None if payload is None else dataclasses.asdict(Release.of(payload, digests[1]))
        emit("image", size_bytes=len(data), launch_digest=digests[0], payload_digest=digests[1], release=release)

    return body


def _describe(payload: Payload, broker_key: int) -> IgvmFile:
    from svsm.formats.settings import Settings
    from svsm.launch.build import describe_image

    with open(broker_key, "rb") as pipe:
        settings = Settings(pipe.read())
    return describe_image(loader=payload.loader, archive=payload.archive, settings=settings.pack())


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as failed:
        raise BackendError(
            f"the image {source} cannot be read: {failed.strerror}",
            code="boot-image",
            hint="check the path and its permissions; without --image one is built",
        ) from failed


def _fill(output: int, data: Buffer) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(output, view) :]
        seal(output)
    except OSError as failed:
        raise BackendError(
            f"the image cannot be kept in memory: {failed.strerror}",
            code="boot-image",
            hint="free some memory, or allow this user more of it (ulimit, control group)",
        ) from failed
