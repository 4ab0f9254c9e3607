# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm tcb`: what the measured payload consists of, module by module and object by object.

`--markdown` (the default) prints docs/TCB.md: the part that is the same on every machine. `--json` adds the hashes, of
the payload and of the environment that its manifest pins, and what those objects are called here. `--release` prints
one line: this environment and the payload digest that belongs to it, an entry of a release's list.
"""

from __future__ import annotations

import argparse
import json

__all__ = ["configure"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm tcb`."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="docs/TCB.md (the default)")
    form.add_argument("--json", action="store_true", help="one JSON object, with hashes and versions")
    form.add_argument("--release", action="store_true", help="one JSON line: this environment and its payload digest")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(_contents()))
    elif arguments.release:
        print(json.dumps(_release()))
    else:
        from svsm.launch.payload_tcb import tcb_table

        print(tcb_table(), end="")
    return 0


def _contents() -> dict[str, object]:
    import hashlib

    from svsm.launch.payload import build_payload
    from svsm.launch.payload_tcb import versions

    payload = build_payload()
    manifest = payload.manifest
    return {
        "schema": 1,
        "loader_bytes": len(payload.loader),
        "loader_sha256": hashlib.sha256(payload.loader).hexdigest(),
        "archive_bytes": len(payload.archive),
        "archive_sha256": hashlib.sha256(payload.archive).hexdigest(),
        "python": manifest.python,
        "interpreter_sha256": manifest.interpreter,
        "versions": versions(manifest),
        "objects": dict(sorted(manifest.objects.items())),
        "libraries": dict(sorted(manifest.libraries.items())),
        "standard_sources": {name: listed.sha256 for name, listed in sorted(manifest.sources.items())},
        "standard_extensions": {name: listed.sha256 for name, listed in sorted(manifest.extensions.items())},
        "roles": {
            name: {"entry": role.entry, "objects": [load.name for load in role.loads]}
            for name, role in sorted(manifest.roles.items())
        },
    }


def _release() -> dict[str, object]:
    from svsm.cli.supervisor.release import Release
    from svsm.launch.build import describe_image
    from svsm.launch.digest import payload_digest
    from svsm.launch.payload import build_payload

    payload = build_payload()
    # Whose settings follow makes no difference: their page is measured after the payload.
    file = describe_image(loader=payload.loader, archive=payload.archive, settings=b"")
    release = Release.of(payload, payload_digest(file).hex())
    return {
        "schema": 1,
        "environment": {"python": payload.manifest.python, "digest": release.environment},
        "code": release.code,
        "payload_digest": release.payload_digest,
        # Registers of the start's VMSA, which is measured behind the settings.
        "loader_bytes": len(payload.loader),
        "archive_bytes": len(payload.archive),
    }
