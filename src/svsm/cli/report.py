# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm report show | verify`: look into SEV-SNP attestation reports, and decide whether to believe them."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svsm.broker.verifier import ReportPolicy, Roots, Verdict
    from svsm.formats.snp.report import Report
    from svsm.formats.snp.tcb import Line

__all__ = ["HELP", "configure"]

HELP = "show and verify SEV-SNP attestation reports"
_MAX_FILE_BYTES = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `svsm report`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    show = verbs.add_parser("show", help="every field of a report; nothing is verified")
    show.add_argument("report", type=Path, metavar="REPORT", help="a report, alone or in an envelope (docs/reports.md)")
    show.add_argument("--json", action="store_true", help="one JSON object")
    show.set_defaults(run=_show)
    verify = verbs.add_parser(
        "verify",
        help="decide whether a report is genuine and meets your demands",
        description="Exit 0: accepted. Exit 3: refused, with a reason code. Demands that are not made are listed.",
    )
    _add_evidence(verify)
    _add_demands(verify)
    verify.set_defaults(run=_verify)


def _add_evidence(verify: argparse.ArgumentParser) -> None:
    verify.add_argument(
        "report", type=Path, metavar="REPORT", help="a report, alone or in an envelope (docs/reports.md)"
    )
    verify.add_argument("--vcek", type=Path, metavar="CERT", help="VCEK or VLEK, DER or PEM; PEM may hold its chain")
    verify.add_argument(
        "--chain", type=Path, action="append", default=[], metavar="FILE", help="ASK or ARK; AMD's own are built in"
    )
    verify.add_argument("--crl", type=Path, metavar="FILE", help="the root's revocation list, DER")
    verify.add_argument("--at", type=_date, metavar="DATE", help="judge dates as of then (2025-06-01, or with a time)")
    verify.add_argument(
        "--simulated-root",
        action="append",
        default=[],
        metavar="FINGERPRINT|FILE",
        help="trust this simulated root; whoever holds its key can sign any report",
    )
    verify.add_argument("--json", action="store_true", help="one JSON object")


def _add_demands(verify: argparse.ArgumentParser) -> None:
    add = verify.add_argument_group("demands").add_argument
    add("--report-data", type=_hex(64), metavar="HEX", help="REPORT_DATA must be this (64 bytes)")
    add("--measurement", type=_hex(48), action="append", metavar="HEX", help="a launch digest that is allowed")
    add("--host-data", type=_hex(32), metavar="HEX", help="HOST_DATA must be this (32 bytes)")
    add("--vmpl", type=int, choices=range(4), action="append", help="a VMPL that is allowed (default: 0 only)")
    add("--allow-debug", action="store_true", help="accept a guest that its host may debug")
    add("--allow-migration", action="store_true", help="accept a migration agent")
    add("--refuse-smt", action="store_true", help="the guest policy must forbid SMT")
    add("--require-single-socket", action="store_true", help="the guest policy must have SINGLE_SOCKET")
    add("--require-page-swap-disable", action="store_true", help="the guest policy must have PAGE_SWAP_DISABLE")
    add("--min-abi", type=_abi, metavar="MAJOR.MINOR", help="least ABI version in the guest policy")
    add("--id-key-digest", type=_hex(48), action="append", metavar="HEX", help="an ID key that is allowed")
    add("--author-key-digest", type=_hex(48), action="append", metavar="HEX", help="an author key that is allowed")
    add("--family-id", type=_hex(16), metavar="HEX", help="FAMILY_ID must be this")
    add("--image-id", type=_hex(16), metavar="HEX", help="IMAGE_ID must be this")
    add("--min-guest-svn", type=_number, metavar="N", help="least GUEST_SVN")
    add("--min-tcb", type=_tcb, metavar="NAME=N,…", help="least levels, e.g. bootloader=3,snp=8,microcode=115")
    provisional = verify.add_mutually_exclusive_group()
    provisional.add_argument("--refuse-provisional", action="store_true", help="firmware must be committed")
    provisional.add_argument("--allow-provisional", action="store_true", help="say that it need not be")
    add("--require-alias-check", action="store_true", help="the platform must have completed its alias check")
    add("--require-ciphertext-hiding", action="store_true", help="the platform must hide ciphertexts")
    add("--require-mitigations", type=_number, metavar="MASK", help="bits that both mitigation vectors must have")
    add("--allow-masked-chip-id", action="store_true", help="accept CHIP_ID zero, as hosts with a VLEK have it")
    add("--chip-id", type=_hex(64), action="append", metavar="HEX", help="a chip that is allowed")
    add("--deny-chip-id", type=_hex(64), action="append", metavar="HEX", help="a chip that is not")


def _verify(arguments: argparse.Namespace) -> int:
    from svsm.broker.verifier import verify
    from svsm.formats.errors import FormatError
    from svsm.formats.snp.evidence import open_evidence

    evidence = open_evidence(_read(arguments.report))
    vek = evidence.vek if arguments.vcek is None else _read(arguments.vcek)
    if vek is None:
        raise FormatError(
            "no certificate of the signing key", code="evidence-no-certificate", hint="give the VCEK or VLEK by --vcek"
        )
    verdict = verify(
        evidence.report,
        vek,
        chain=[*evidence.chain, *map(_read, arguments.chain)],
        roots=_roots(arguments.simulated_root),
        at=arguments.at or datetime.datetime.now(datetime.UTC),
        policy=_policy(arguments),
        crl=None if arguments.crl is None else _read(arguments.crl),
    )
    if arguments.json:
        print(json.dumps({"schema": 1, **verdict.to_json()}))
    else:
        _print_verdict(verdict)
    return 0 if verdict.accepted else 3


def _policy(arguments: argparse.Namespace) -> ReportPolicy:
    from svsm.broker.verifier import ReportPolicy

    def several(values: list[bytes] | None) -> frozenset[bytes] | None:
        return None if values is None else frozenset(values)

    def flag(given: bool) -> bool | None:
        return True if given else None

    return ReportPolicy(
        report_data=arguments.report_data,
        vmpls=frozenset(arguments.vmpl or [0]),
        measurements=several(arguments.measurement),
        allow_debug=arguments.allow_debug,
        allow_migration=arguments.allow_migration,
        allow_smt=False if arguments.refuse_smt else None,
        require_single_socket=flag(arguments.require_single_socket),
        require_page_swap_disable=flag(arguments.require_page_swap_disable),
        min_abi=arguments.min_abi,
        id_key_digests=several(arguments.id_key_digest),
        author_key_digests=several(arguments.author_key_digest),
        family_id=arguments.family_id,
        image_id=arguments.image_id,
        min_guest_svn=arguments.min_guest_svn,
        host_data=arguments.host_data,
        min_tcb=arguments.min_tcb,
        allow_provisional=False if arguments.refuse_provisional else flag(arguments.allow_provisional),
        require_alias_check=flag(arguments.require_alias_check),
        require_ciphertext_hiding=flag(arguments.require_ciphertext_hiding),
        require_mitigations=arguments.require_mitigations,
        allowed_chip_ids=several(arguments.chip_id),
        denied_chip_ids=several(arguments.deny_chip_id),
        allow_masked_chip_id=arguments.allow_masked_chip_id,
    )


def _roots(named: list[str]) -> Roots:
    from svsm.broker.verifier import Roots

    roots = Roots.amd()
    for name in named:
        fingerprint = name.removeprefix("simulated:")
        is_fingerprint = len(fingerprint) == 64 and set(fingerprint) <= set("0123456789abcdefABCDEF")
        roots |= Roots.simulated(bytes.fromhex(fingerprint) if is_fingerprint else _read(Path(name)))
    return roots


def _print_verdict(verdict: Verdict) -> None:
    print("accepted" if verdict.accepted else f"refused: {verdict.reason}")
    if verdict.simulated:
        print("  under a SIMULATED root: no silicon vouches for this")
    for check in verdict.checks:
        if check.result in {"not_reached", "not_checked"}:
            continue
        code = f" [{check.code}]" if check.code else ""
        print(f"  {check.result:7} {check.name:18} {check.detail}{code}")
    if verdict.not_checked:
        print(f"  not checked, since no value was given: {', '.join(verdict.not_checked)}")
    if not verdict.authentic:
        print("  Nothing that the report says was looked at further: it is not proved authentic.")


def _show(arguments: argparse.Namespace) -> int:
    from svsm.formats.errors import FormatError
    from svsm.formats.snp.evidence import open_evidence
    from svsm.formats.snp.report import REPORT_BYTES, Report, validate_report

    evidence = open_evidence(_read(arguments.report))
    if len(evidence.report) != REPORT_BYTES:
        raise FormatError(
            "a report has 1184 bytes", code="report-length", expected=REPORT_BYTES, got=len(evidence.report)
        )
    report = Report.parse(evidence.report)
    fault: str | None = None
    try:
        validate_report(report)
    except FormatError as error:
        fault = error.code
    fields = _fields(report)
    if arguments.json:
        print(json.dumps({"schema": 1, "form": evidence.form, "fault": fault, **fields}))
        return 0
    if fault is not None:
        print(f"not a valid report: {fault}")
    for name, value in fields.items():
        print(f"{name:20} {_word(value)}")
    return 0


def _word(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={level}" for name, level in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _fields(report: Report) -> dict[str, object]:
    """Every field by its name in the specification, in values that JSON has."""
    from svsm.formats.snp.report import VMPL_HOST

    line, how = _line(report)
    major, minor = report.guest_policy.abi
    return {
        "version": report.version,
        "product": None if line is None else line.value,
        "product_from": how,
        "vmpl": "host" if report.vmpl == VMPL_HOST else report.vmpl,
        "guest_svn": report.guest_svn,
        "policy": hex(report.policy),
        "policy_flags": report.guest_policy.names(),
        "policy_abi": f"{major}.{minor}",
        "measurement": report.measurement.hex(),
        "report_data": report.report_data.hex(),
        "host_data": report.host_data.hex(),
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "id_key_digest": report.id_key_digest.hex(),
        "author_key_digest": report.author_key_digest.hex(),
        "author_key_enabled": report.author_key_enabled,
        "signing_key": {0: "VCEK", 1: "VLEK", 7: "none"}.get(report.signing_key, f"reserved {report.signing_key}"),
        "mask_chip_key": report.mask_chip_key,
        "report_id": report.report_id.hex(),
        "report_id_ma": report.report_id_ma.hex(),
        "chip_id": report.chip_id.hex(),
        "cpuid": [report.cpuid_family, report.cpuid_model, report.cpuid_stepping] if report.has_cpuid else None,
        "platform_info": hex(report.platform_info),
        "platform_flags": report.platform.names(),
        "current_tcb": _tcb_of(report.current_tcb, line),
        "reported_tcb": _tcb_of(report.reported_tcb, line),
        "committed_tcb": _tcb_of(report.committed_tcb, line),
        "launch_tcb": _tcb_of(report.launch_tcb, line),
        "current_firmware": f"{report.current_major}.{report.current_minor}.{report.current_build}",
        "committed_firmware": f"{report.committed_major}.{report.committed_minor}.{report.committed_build}",
        "launch_mitigations": hex(report.launch_mit_vector) if report.has_mitigation_vectors else None,
        "current_mitigations": hex(report.current_mit_vector) if report.has_mitigation_vectors else None,
    }


def _line(report: Report) -> tuple[Line | None, str]:
    """The product line for display. Version 2 does not say; a short chip id can only be Turin's."""
    from svsm.formats.snp.tcb import Line, line_of_cpuid

    if report.has_cpuid:
        return line_of_cpuid(report.cpuid_family, report.cpuid_model), "cpuid"
    if any(report.chip_id) and not any(report.chip_id[8:]):
        return Line.TURIN, "guessed from the chip id"
    return None, "unknown; TCB read as on Milan and Genoa"


def _tcb_of(data: bytes, line: Line | None) -> dict[str, int] | str:
    from svsm.formats.errors import FormatError
    from svsm.formats.snp.tcb import Line, Tcb

    try:
        return Tcb.parse(data, line or Line.MILAN).components()
    except FormatError:
        return data.hex()


def _read(path: Path) -> bytes:
    from svsm.formats.errors import BackendError

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BackendError(f"cannot read {path}: {error.strerror}", code="report-file") from error
    if len(data) > _MAX_FILE_BYTES:
        raise BackendError(f"{path} is larger than 1 MiB", code="report-file")
    return data


def _hex(length: int) -> Callable[[str], bytes]:
    def hexadecimal(text: str) -> bytes:
        try:
            value = bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            raise argparse.ArgumentTypeError("not hexadecimal") from None
        if len(value) != length:
            raise argparse.ArgumentTypeError(f"{len(value)} bytes given, {length} needed")
        return value

    return hexadecimal


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError("not a number") from None
    if value < 0:
        raise argparse.ArgumentTypeError("negative")
    return value


def _abi(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return _number(major), _number(minor or "0")


def _tcb(text: str) -> dict[str, int]:
    levels: dict[str, int] = {}
    for item in text.split(","):
        name, _, level = item.partition("=")
        if name not in ("fmc", "bootloader", "tee", "snp", "microcode"):
            raise argparse.ArgumentTypeError(f"no such component: {name}")
        levels[name] = _number(level)
    return levels


def _date(text: str) -> datetime.datetime:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("not a date such as 2025-06-01 or 2025-06-01T12:00:00+00:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
