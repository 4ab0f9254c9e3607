# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm igvm build | inspect | measure`: the image owner's commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svsm.formats.igvm import IgvmFile
    from svsm.formats.snp.digest import KnownDigests
    from svsm.launch.id_block import IdBlockCheck

__all__ = ["HELP", "configure", "read_broker_key"]

HELP = "build, inspect and measure IGVM images"

_MAX_FILE_BYTES = 1 << 32


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `svsm igvm`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    inspect = verbs.add_parser("inspect", help="list what is in an IGVM file", description="List what is in a file.")
    inspect.add_argument("file", type=Path, metavar="FILE", help="an IGVM file")
    inspect.add_argument("--json", action="store_true", help="one JSON object")
    inspect.set_defaults(run=_inspect)

    measure = verbs.add_parser(
        "measure", help="compute the launch digest", description="Compute the launch digest of an IGVM or OVMF file."
    )
    measure.add_argument("file", type=Path, metavar="FILE", nargs="?", help="an IGVM file")
    measure.add_argument("--platform", choices=["sev-snp"], default="sev-snp", help="the platform (default: sev-snp)")
    measure.add_argument(
        "--native-zero", action="store_true", help="the loader launches empty pages as ZERO pages (Vanadium)"
    )
    measure.add_argument("--check-id-block", action="store_true", help="fail unless the file's ID blocks hold")
    _add_ovmf(measure)
    measure.add_argument("--json", action="store_true", help="one JSON object")
    measure.set_defaults(run=_measure)

    build = verbs.add_parser(
        "build",
        help="build our image, or the description of an OVMF launch",
        description="Build svsm's own image; with --ovmf, a file that describes QEMU's launch of a firmware.",
    )
    build.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the file to write")
    build.add_argument("--broker-key", type=Path, metavar="PEM", help="public key of the broker (P-384), pinned")
    build.add_argument("--policy", type=_number, default=0x3_0000, help="SNP guest policy (default: 0x30000)")
    build.add_argument("--force", action="store_true", help="overwrite OUT")
    _add_ovmf(build)
    build.add_argument("--json", action="store_true", help="one JSON object")
    build.set_defaults(run=_build)


def _add_ovmf(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("OVMF, as QEMU launches it without IGVM")
    group.add_argument("--ovmf", type=Path, metavar="FIRMWARE", help="a firmware file with SEV metadata")
    group.add_argument("--vcpus", type=_number, metavar="N", help="number of vCPUs (default: 1)")
    group.add_argument("--vcpu-type", metavar="TYPE", help="QEMU's CPU model, e.g. EPYC-Milan-v2 (default: EPYC-v4)")
    group.add_argument("--vcpu-signature", type=_number, metavar="N", help="CPUID signature instead of a model")
    group.add_argument("--guest-features", type=_number, metavar="N", help="SEV_FEATURES of each vCPU (default: 0x1)")


def _number(text: str) -> int:
    """Decimal or 0x… number, for argparse."""
    return int(text, 0)


def _inspect(arguments: argparse.Namespace) -> int:
    from svsm.launch.inspect import describe

    found = describe(_load(arguments.file))
    if arguments.json:
        print(json.dumps({"schema": 1, "file": str(arguments.file), **found}))
        return 0
    print(f"IGVM version {found['format_version']}, {found['headers']} headers, {found['file_data_bytes']} data bytes")
    for part in ("platforms", "launch"):
        entries = found[part]
        for entry in entries if isinstance(entries, list) else []:
            words = [f"{name}={_word(value)}" for name, value in entry.items() if name not in ("header", "registers")]
            print(entry.get("header", "SUPPORTED_PLATFORM"), *words)
            for name, value in entry.get("registers", {}).items():
                print(f"    {name:20} {value}")
    return 0


def _word(value: object) -> str:
    return "+".join(value) or "-" if isinstance(value, list) else str(value)


def _measure(arguments: argparse.Namespace) -> int:
    from svsm.formats.errors import FormatError
    from svsm.formats.igvm import Order
    from svsm.launch.digest import launch_digest, payload_digest
    from svsm.launch.id_block import check_id_blocks, demand_id_blocks

    ovmf = _ovmf(arguments)
    if (arguments.file is None) == (ovmf is None):
        return _usage("give an IGVM file, or --ovmf FIRMWARE")
    file = _load(arguments.file) if ovmf is None else ovmf
    native_zero = arguments.native_zero or ovmf is not None
    known: KnownDigests = {}
    digest = launch_digest(file, native_zero=native_zero, known=known)
    result: dict[str, object] = {
        "schema": 1,
        "file": str(arguments.file or arguments.ovmf),
        "platform": arguments.platform,
        "native_zero": native_zero,
        "launch_digest": digest.hex(),
    }
    on_kvm = launch_digest(file, order=Order.KVM, native_zero=native_zero, known=known)
    result["kvm_launch_digest"] = on_kvm.hex()
    result["native_zero_launch_digest"] = launch_digest(file, native_zero=True, known=known).hex()
    try:
        result["payload_digest"] = payload_digest(file).hex()
    except FormatError as error:
        if error.code != "igvm-not-our-layout":
            raise
    checks = check_id_blocks(file, digest)
    if arguments.check_id_block:
        demand_id_blocks(checks, digest)
    if checks:
        result["id_blocks"] = [_id_block(check) for check in checks]
    if on_kvm != digest:
        print("note: KVM launches VMSAs last and will report another digest", file=sys.stderr)
    if not all(check.holds for check in checks):
        print("warning: an ID block of the file does not hold; see --check-id-block", file=sys.stderr)
    _show(result, as_json=arguments.json)
    return 0


def _id_block(check: IdBlockCheck) -> dict[str, object]:
    return {
        "ld": check.block.launch_digest.hex(),
        "family_id": check.block.family_id.hex(),
        "image_id": check.block.image_id.hex(),
        "guest_svn": check.block.guest_svn,
        "policy": hex(check.block.policy),
        "id_key_digest": check.id_key_digest.hex(),
        "author_key_digest": check.author_key_digest.hex(),
        "digest_matches": check.digest_matches,
        "id_signature_valid": check.id_signature_valid,
        "author_signature_valid": check.author_signature_valid,
    }


def _build(arguments: argparse.Namespace) -> int:
    from svsm.launch.digest import launch_digest, payload_digest

    ovmf = _ovmf(arguments)
    if (arguments.broker_key is None) == (ovmf is None):
        return _usage("give --broker-key PEM for our own image, or --ovmf FIRMWARE")
    file = _own_image(arguments) if ovmf is None else ovmf
    image = file.pack()
    _store(arguments.output, image, force=arguments.force)
    result: dict[str, object] = {"schema": 1, "file": str(arguments.output), "bytes": len(image)}
    result["launch_digest"] = launch_digest(file, native_zero=ovmf is not None).hex()
    if ovmf is None:
        result["payload_digest"] = payload_digest(file).hex()
    else:
        result["native_zero"] = True
        print(
            "note: QEMU launches the firmware's memory sections as ZERO pages; measure with --native-zero",
            file=sys.stderr,
        )
    _show(result, as_json=arguments.json)
    return 0


def _own_image(arguments: argparse.Namespace) -> IgvmFile:
    import importlib

    from svsm.formats.errors import StateError
    from svsm.formats.settings import Settings
    from svsm.launch.build import describe_image

    settings = Settings(read_broker_key(arguments.broker_key)).pack()
    try:
        payload = importlib.import_module("svsm.launch.payload").build_payload()
    except ModuleNotFoundError as error:
        if error.name != "svsm.launch.payload":
            raise
        raise StateError("the payload builder is not installed", code="igvm-payload") from error
    return describe_image(loader=payload.loader, archive=payload.archive, settings=settings, policy=arguments.policy)


def read_broker_key(path: Path) -> bytes:
    """SubjectPublicKeyInfo of a P-384 key in a PEM file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    from svsm.formats.errors import FormatError

    hint = "`svsm broker key` prints the one to give"
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError("the file is not a public key in PEM", code="id-key", hint=hint, path=str(path)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FormatError("the broker's key must be on P-384", code="id-key", hint=hint, path=str(path))
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _ovmf(arguments: argparse.Namespace) -> IgvmFile | None:
    from svsm.formats.errors import FormatError
    from svsm.formats.ovmf import Ovmf
    from svsm.launch.ovmf_image import cpu_model_signature, describe_ovmf_launch

    given = [arguments.vcpus, arguments.vcpu_type, arguments.vcpu_signature, arguments.guest_features]
    if arguments.ovmf is None:
        if any(value is not None for value in given):
            raise FormatError("vCPU options need --ovmf", code="ovmf-launch", hint="an IGVM file has its own VMSAs")
        return None
    signature = arguments.vcpu_signature
    if signature is None:
        signature = cpu_model_signature(arguments.vcpu_type or "EPYC-v4")
    return describe_ovmf_launch(
        Ovmf.parse(_read(arguments.ovmf)),
        vcpus=1 if arguments.vcpus is None else arguments.vcpus,
        signature=signature,
        sev_features=1 if arguments.guest_features is None else arguments.guest_features,
        policy=getattr(arguments, "policy", 0x3_0000),
    )


def _load(path: Path) -> IgvmFile:
    from svsm.formats.igvm import IgvmFile

    return IgvmFile.parse(_read(path))


def _read(path: Path) -> bytes:
    from svsm.formats.errors import BackendError

    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise BackendError(f"cannot read {path}: {error.strerror}", code="igvm-file") from error


def _store(path: Path, data: bytes, *, force: bool) -> None:
    from svsm.formats.errors import BackendError, StateError

    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with open(os.open(path, flags, 0o644), "wb") as file:
            file.write(data)
    except FileExistsError as error:
        raise StateError(f"{path} exists", code="igvm-exists", hint="give --force to overwrite it") from error
    except OSError as error:
        raise BackendError(f"cannot write {path}: {error.strerror}", code="igvm-file") from error


def _show(result: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, list):
            for entry in value:
                print(f"{name}:")
                for key, part in entry.items():
                    print(f"    {key:24} {part}")
        elif name != "schema":
            print(f"{name:20} {value}")


def _usage(message: str) -> int:
    print(f"usage: {message}", file=sys.stderr)
    return 2
