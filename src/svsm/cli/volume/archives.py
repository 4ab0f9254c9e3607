# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume export | import`: all files as a tar archive, in plaintext, and back in one transaction."""

from __future__ import annotations

import argparse
import sys

from svsm.cli.volume import access, words
from svsm.cli.volume.meter import meter
from svsm.formats.errors import BackendError

__all__ = ["add_verbs"]


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    export = words.verb(verbs, "export", "all files as a tar archive, in plaintext", _export)
    words.add_output(export, "the archive")
    importing = words.verb(verbs, "import", "files of an exported archive into a volume, all or none", _import)
    words.add_input(importing, "the archive")
    importing.add_argument("--force", action="store_true", help="replace files that exist")
    words.add_first_use(importing)
    for parser, writes in ((export, False), (importing, True)):
        words.add_key(parser)
        words.add_json(parser)
        words.add_access(parser, writes=writes)


def _export(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.archive import export_files

    to_stdout = arguments.output is None or arguments.output == "-"
    if to_stdout and (arguments.json or sys.stdout.isatty()):
        raise BackendError(
            "an archive does not go to a terminal or between JSON", code="volume-output", hint="give --output FILE"
        )
    with (
        access.looking(arguments) as opened,
        access.output(arguments.output, force=arguments.force, image=arguments.image) as file,
        meter() as progress,
    ):
        count = export_files(opened.volume, file, progress=progress)
    text = [] if to_stdout else [f"{count} files, in plaintext, in {arguments.output}"]
    access.emit({"files": count, "output": arguments.output}, text, as_json=arguments.json)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.archive import import_files

    with access.changing(arguments) as volume:
        try:
            with access.opened_input(arguments.source) as file, meter() as progress:
                count = import_files(volume, file, replace=arguments.force, progress=progress)
        except OSError as error:
            raise BackendError(f"cannot read the input: {error.strerror}", code="volume-input") from error
        members: dict[str, object] = {
            "files": count,
            "counter": str(volume.counter),
            "root_digest": volume.root_digest.hex(),
            "free_bytes": volume.free_bytes,
        }
    access.emit(members, [f"{count} files"], as_json=arguments.json)
    return 0
