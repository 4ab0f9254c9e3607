# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm machine init | show | report`: the simulated SEV-SNP machine's identity, and evidence signed by it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from svsm.cli.state_option import add_state

if TYPE_CHECKING:
    from svsm.hardware.authority import Machine

__all__ = ["HELP", "configure"]

HELP = "the simulated SEV-SNP machine's identity"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `svsm machine`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    init = verbs.add_parser("init", help="mint the machine: root, intermediate, chip key (takes some seconds)")
    init.add_argument(
        "--product", choices=["Milan", "Genoa", "Turin"], default="Milan", help="what chip to imitate (default: Milan)"
    )
    init.add_argument("--force", action="store_true", help="replace the machine that is there")
    init.set_defaults(run=_init)
    show = verbs.add_parser("show", help="chip, certificates and root fingerprint")
    show.set_defaults(run=_show)
    report = verbs.add_parser(
        "report",
        help="make a signed report and its certificate table, to try verifiers with",
        description="Writes the 1184 bytes of the report and then the certificate table. The report is of no guest.",
    )
    report.add_argument("output", type=Path, metavar="FILE", help="where to write it")
    report.add_argument("--version", type=int, choices=[3, 5], default=5, help="report version (default: 5)")
    report.add_argument(
        "--report-data", type=_report_data, default=bytes(64), metavar="HEX", help="up to 64 bytes, zero-padded"
    )
    report.add_argument("--force", action="store_true", help="overwrite FILE")
    report.set_defaults(run=_report)
    for verb in (init, show, report):
        add_state(verb)
    for verb in (init, show):
        verb.add_argument("--json", action="store_true", help="one JSON object")


def _init(arguments: argparse.Namespace) -> int:
    from svsm.cli.supervisor.state import StateDirectory, default_directory
    from svsm.formats.snp.tcb import Line
    from svsm.hardware.machine_store import mint

    # Taking the lock keeps a running instance's identity from being pulled from under it.
    state = StateDirectory.open_for_boot(arguments.state or default_directory())
    directory = state.folder("machine")
    machine = mint(directory, product=Line(arguments.product), force=arguments.force)
    _print_machine(machine, directory, as_json=arguments.json)
    return 0


def _load(arguments: argparse.Namespace) -> tuple[Machine, Path]:
    from svsm.cli.supervisor.state import default_directory
    from svsm.hardware.machine_store import load_machine

    directory: Path = (arguments.state or default_directory()) / "machine"
    return load_machine(directory), directory


def _show(arguments: argparse.Namespace) -> int:
    machine, directory = _load(arguments)
    _print_machine(machine, directory, as_json=arguments.json)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from svsm.formats.errors import BackendError, StateError

    machine, _ = _load(arguments)
    report = machine.new_report(arguments.version).replace(report_data=arguments.report_data)
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if arguments.force else os.O_EXCL)
    try:
        with os.fdopen(os.open(arguments.output, flags, 0o666), "wb") as file:
            file.write(machine.sign_report(report) + machine.certificates())
    except FileExistsError:
        raise StateError(
            f"{arguments.output} exists", code="report-exists", hint="give --force to overwrite it"
        ) from None
    except OSError as error:
        raise BackendError(f"cannot write {arguments.output}: {error.strerror}", code="report-file") from error
    return 0


def _report_data(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError("not hexadecimal") from None
    if len(value) > 64:
        raise argparse.ArgumentTypeError("more than 64 bytes")
    return value.ljust(64, b"\0")


def _print_machine(machine: Machine, directory: Path, *, as_json: bool) -> None:
    from svsm.formats.snp.certs import parse_certificate

    facts: dict[str, object] = {
        "directory": str(directory),
        "simulated": True,
        "product": machine.line.value,
        "chip_id": machine.chip_id.hex(),
        "tcb": machine.tcb.components(),
        "root_fingerprint": machine.root_fingerprint.hex(),
        "vcek_not_after": parse_certificate(machine.vcek).not_after.isoformat(),
    }
    if as_json:
        print(json.dumps({"schema": 1, **facts}))
        return
    for name, value in facts.items():
        shown = str(machine.tcb) if name == "tcb" else value
        print(f"{name:18} {shown}")
