# SPDX-License-Identifier: MIT OR Apache-2.0
"""The simulated machine on disk: mint it once, load it at each start. The only part of the authority that does I/O.

See `svsm.hardware.authority` for what the directory holds and who may read it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from svsm.formats.errors import BackendError, FormatError, StateError
from svsm.formats.snp import certs
from svsm.formats.snp.tcb import Line, Tcb
from svsm.hardware.authority import Authority, Machine

__all__ = ["load_machine", "mint", "root_fingerprint"]

_SCHEMA: Final = 1
_MAX_FILE_BYTES: Final = 64 * 1024


def mint(
    directory: Path,
    *,
    product: Line = Line.MILAN,
    force: bool = False,
    now: datetime.datetime | None = None,
    authority_keys: tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey] | None = None,
) -> Machine:
    """Make a machine: its authority, its chip, its certificates. Takes seconds, for two RSA-4096 keys.

    Args:
        directory: Where its files go; must not exist or be empty, unless `force`. An existing one keeps its owner.
        product: The product line to imitate.
        force: Replace what is there. Volumes bound to the old root stay bound to it.
        now: Start of validity; the system's clock by default.
        authority_keys: RSA-4096 keys of ARK and ASK, for tests that mint often.

    Raises:
        StateError: ``machine-exists``.
        BackendError: ``machine-io``.
    """
    if _occupied(directory) and not force:
        raise StateError(
            f"there is a machine in {directory} already",
            code="machine-exists",
            hint="--force replaces it; volumes that accept only the old machine's root then refuse the new one",
        )
    moment = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    authority = Authority.create(product, now=moment, keys=authority_keys)
    machine = Machine.create(authority, now=moment)
    about = {
        "schema": _SCHEMA,
        "simulated": True,
        "product": product.value,
        "chip_id": machine.chip_id.hex(),
        "tcb": machine.tcb.components(),
    }
    files = {
        "machine.json": json.dumps(about, indent=2, sort_keys=True).encode() + b"\n",
        "vcek.pem": x509.load_der_x509_certificate(machine.vcek).public_bytes(Encoding.PEM),
        "cert_chain.pem": authority.ask.public_bytes(Encoding.PEM) + authority.ark.public_bytes(Encoding.PEM),
        "vcek.key.pem": _private_pem(machine.key),
        "ask.key.pem": _private_pem(authority.ask_key),
        "ark.key.pem": _private_pem(authority.ark_key),
    }
    try:
        _publish(directory, files)
    except OSError as error:
        raise BackendError(
            f"the machine cannot be stored in {directory}: {error.strerror}", code="machine-io"
        ) from error
    return load_machine(directory)


def _occupied(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BackendError(f"{directory} cannot be read: {error.strerror}", code="machine-io") from error


def _publish(directory: Path, files: dict[str, bytes]) -> None:
    """Write all files beside the directory, then put them in its place by renaming."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".{directory.name}.new-*"):
        # Of a process that was killed while it minted: nobody has used those keys.
        shutil.rmtree(leftover, ignore_errors=True)
    staged = directory.with_name(f".{directory.name}.new-{secrets.token_hex(8)}")
    staged.mkdir(mode=0o700)
    try:
        for name, content in files.items():
            descriptor = os.open(staged / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _replace(directory, staged)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _replace(directory: Path, staged: Path) -> None:
    if directory.exists():
        _take_owner(staged, directory)
    if _occupied(directory):
        # Two renames: killed between them, the old machine is under the name `.old-` and can be renamed back.
        old = directory.with_name(f".{directory.name}.old-{secrets.token_hex(8)}")
        directory.rename(old)
        staged.rename(directory)
        shutil.rmtree(old)
    else:
        staged.rename(directory)  # takes the place of an empty directory in one step
    parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _take_owner(staged: Path, directory: Path) -> None:
    """The role that runs the hardware may have its own uid; what it owned before, it owns after."""
    owner = directory.stat()
    if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
        for path in (*staged.iterdir(), staged):
            os.chown(path, owner.st_uid, owner.st_gid)


def _private_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_machine(directory: Path) -> Machine:
    """Load a machine: what the chip has, without its authority's keys.

    Raises:
        StateError: ``machine-missing``, ``machine-damaged``, ``machine-schema``.
        BackendError: ``machine-io``.
    """
    about = _about(directory)
    vcek = _certificates(directory, "vcek.pem", 1)[0]
    ask, ark = _certificates(directory, "cert_chain.pem", 2)
    key = _private_key(directory, "vcek.key.pem")
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if spki != vcek.public_key:
        raise _damaged("the chip's key and certificate do not belong together")
    line, chip_id, tcb = about
    extensions = certs.vek_extensions(vcek)
    if extensions.hwid != chip_id or dict(extensions.levels) != tcb.components():
        raise _damaged("the chip's description and certificate do not belong together")
    return Machine(line, chip_id, tcb, vcek.raw, ask.raw, ark.raw, key)


def root_fingerprint(directory: Path) -> bytes:
    """SHA-256 of the machine's ARK in DER, 32 bytes, without looking at any of its keys.

    Raises:
        StateError: ``machine-missing``, ``machine-damaged``.
        BackendError: ``machine-io``.
    """
    _, ark = _certificates(directory, "cert_chain.pem", 2)
    return hashlib.sha256(ark.raw).digest()


def _damaged(message: str) -> StateError:
    return StateError(
        message,
        code="machine-damaged",
        hint="restore the machine's directory, or mint a new one: svsm machine init --force",
    )


def _about(directory: Path) -> tuple[Line, bytes, Tcb]:
    try:
        about = json.loads(_read(directory, "machine.json"))
        if about["schema"] != _SCHEMA:
            raise StateError("the machine was made by another version of svsm", code="machine-schema")
        return Line(about["product"]), bytes.fromhex(about["chip_id"]), Tcb(**about["tcb"])
    except (ValueError, KeyError, TypeError):
        raise _damaged("machine.json is damaged") from None


def _certificates(directory: Path, name: str, count: int) -> list[certs.Certificate]:
    try:
        found = certs.certificates_from(_read(directory, name))
    except FormatError as error:
        raise _damaged(f"{name} is damaged: {error.message}") from error
    if len(found) != count:
        raise _damaged(f"{name} holds {len(found)} certificates, not {count}")
    return found


def _private_key(directory: Path, name: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(directory, name), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _damaged(f"{name} is damaged")
    return key


def _read(directory: Path, name: str) -> bytes:
    try:
        with (directory / name).open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        raise StateError(
            f"there is no machine in {directory}", code="machine-missing", hint="mint one: svsm machine init"
        ) from None
    except OSError as error:
        raise BackendError(f"{name} cannot be read: {error.strerror}", code="machine-io") from error
