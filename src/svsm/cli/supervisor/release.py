# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which release booted last, so that a refusal can say what changed: our code, or the environment under it.

The payload digest covers both: the code that is measured, and the manifest with the hashes of the interpreter, its
library and the system's shared objects. When an update of Python or libc changes it, the volume's owner has something
else to decide than when svsm changed; the note that this module makes is what tells the two apart. It is only a
note: nothing is allowed or refused because of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svsm.launch.payload import Payload

__all__ = ["Release", "last_release", "remember", "what_changed"]

_FILE = "release.json"
_OWN = "code/svsm/"


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """What an image was built from."""

    payload_digest: str
    environment: str
    """Digest of the manifest's environment: interpreter, standard library, system and third-party objects."""
    code: str
    """Digest of the measured members that are svsm's own."""

    @classmethod
    def of(cls, payload: Payload, payload_digest: str) -> Release:
        """Take a payload's identity apart."""
        manifest = payload.manifest
        environment = dataclasses.replace(manifest, roles={})
        with zipfile.ZipFile(io.BytesIO(payload.archive)) as archive:
            own = sorted((x.filename, x.CRC, x.file_size) for x in archive.infolist() if x.filename.startswith(_OWN))
        return cls(
            payload_digest=payload_digest,
            environment=hashlib.sha256(environment.pack()).hexdigest(),
            code=hashlib.sha256(json.dumps([own, hashlib.sha256(payload.loader).hexdigest()]).encode()).hexdigest(),
        )


def last_release(state: Path) -> Release | None:
    """The release that was ready last on this state, None when there was none or the note is damaged."""
    try:
        members = json.loads((state / _FILE).read_text(encoding="utf-8"))
        return Release(**{name: str(members[name]) for name in ("payload_digest", "environment", "code")})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(state: Path, release: Release) -> None:
    """Note the release that is ready now."""
    with contextlib.suppress(OSError):
        (state / _FILE).write_text(json.dumps(dataclasses.asdict(release)) + "\n", encoding="utf-8")


def what_changed(before: Release | None, now: Release) -> str | None:
    """One line about why the payload digest is another one; None when it is not, or nothing is known."""
    if before is None or before.payload_digest == now.payload_digest:
        return None
    code, environment = before.code != now.code, before.environment != now.environment
    if code and environment:
        return "since the last boot, svsm's measured code and the environment (Python, libc, libraries) both changed"
    if environment:
        return "since the last boot the environment changed (Python, libc or another library); svsm's own code did not"
    return "since the last boot, svsm's measured code changed; the environment did not"
