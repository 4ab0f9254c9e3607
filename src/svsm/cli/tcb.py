# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm tcb`: what the measured payload consists of, module by module and object by object.

Without options it prints docs/TCB.md: the part that is the same on every machine. `--json` adds the hashes, of the
payload and of the environment that its manifest pins, which differ between machines.
"""

from __future__ import annotations

import argparse
import json

__all__ = ["configure"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm tcb`."""
    parser.add_argument("--json", action="store_true", help="one JSON object, with hashes")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from svsm.launch.payload import build_payload, tcb_table

    if not arguments.json:
        print(tcb_table(), end="")
        return 0
    import hashlib

    payload = build_payload()
    manifest = payload.manifest
    print(
        json.dumps(
            {
                "schema": 1,
                "loader_bytes": len(payload.loader),
                "loader_sha256": hashlib.sha256(payload.loader).hexdigest(),
                "archive_bytes": len(payload.archive),
                "archive_sha256": hashlib.sha256(payload.archive).hexdigest(),
                "python": manifest.python,
                "interpreter_sha256": manifest.interpreter,
                "objects": dict(sorted(manifest.objects.items())),
                "libraries": dict(sorted(manifest.libraries.items())),
                "standard_sources": {name: listed.sha256 for name, listed in sorted(manifest.sources.items())},
                "standard_extensions": {name: listed.sha256 for name, listed in sorted(manifest.extensions.items())},
                "roles": {
                    name: {"entry": role.entry, "objects": [load.name for load in role.loads]}
                    for name, role in sorted(manifest.roles.items())
                },
            }
        )
    )
    return 0
