# SPDX-License-Identifier: MIT OR Apache-2.0
"""Chains that a holder of an accepted simulated root could sign, and that are refused all the same."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from svsm.broker.verifier import Roots, Verdict, verify
from svsm.formats.snp import certs
from svsm.formats.snp.tcb import Line
from svsm.hardware import authority as authority_module
from svsm.hardware.authority import Authority, Machine
from tests.simulated import NOW, authority, authority_keys, machine

_DAY = datetime.timedelta(days=1)
_PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)


def _judge(made: Machine) -> Verdict:
    signed = made.sign_report(made.new_report(5))
    roots = Roots.simulated(made.root_fingerprint)
    return verify(signed, made.vcek, chain=[made.ask, made.ark], roots=roots, at=NOW)


def _created() -> Machine:
    return Machine.create(Authority.create(Line.MILAN, now=NOW, keys=authority_keys()), now=NOW)


def _with_vcek(change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder], *, leave_out: str = "") -> Machine:
    """The machine with a VCEK of its authority that differs in one thing."""
    made = machine()
    builder = (
        x509.CertificateBuilder()
        .serial_number(1)
        .subject_name(authority_module._name("SEV-VCEK"))
        .issuer_name(authority().ask.subject)
        .not_valid_before(NOW - _DAY)
        .not_valid_after(NOW + _DAY)
        .public_key(made.key.public_key())
    )
    for oid, value in authority_module._vek_extensions(made.line, made.chip_id, made.tcb):
        if oid != leave_out:
            unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
            builder = builder.add_extension(unknown, critical=False)
    signed = change(builder).sign(authority().ask_key, hashes.SHA384(), rsa_padding=_PSS)
    return dataclasses.replace(made, vcek=signed.public_bytes(Encoding.DER))


def test_the_unchanged_chain_is_good() -> None:
    assert _judge(_created()).accepted
    assert _judge(_with_vcek(lambda builder: builder)).accepted


def test_an_unknown_critical_extension_is_refused_and_another_is_not() -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.999.1"), b"\x05\x00")
    assert _judge(_with_vcek(lambda b: b.add_extension(unknown, critical=True))).reason == "chain-extension"
    assert _judge(_with_vcek(lambda b: b.add_extension(unknown, critical=False))).accepted


def test_a_signing_key_that_is_an_authority_is_refused() -> None:
    ca = x509.BasicConstraints(ca=True, path_length=None)
    assert _judge(_with_vcek(lambda b: b.add_extension(ca, critical=True))).reason == "chain-constraints"


@pytest.mark.parametrize("oid", [certs.HWID_OID, certs.PRODUCT_OID, certs.LEVEL_OIDS["microcode"]])
def test_a_vcek_without_one_of_its_extensions_is_refused(oid: str) -> None:
    made = _with_vcek(lambda builder: builder, leave_out=oid)
    assert _judge(made).reason == ("report-signing-key" if oid == certs.HWID_OID else "vek-extension")


def test_a_vcek_of_another_product_name_is_refused() -> None:
    genoa = x509.UnrecognizedExtension(x509.ObjectIdentifier(certs.PRODUCT_OID), b"\x16\x05Genoa")
    made = _with_vcek(lambda b: b.add_extension(genoa, critical=False), leave_out=certs.PRODUCT_OID)
    assert _judge(made).reason == "report-product"


@pytest.mark.parametrize(
    "extra",
    [
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
        x509.NameAttribute(NameOID.COMMON_NAME, "other"),
        x509.NameAttribute(NameOID.DN_QUALIFIER, "x"),
    ],
)
def test_a_name_with_something_else_in_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, extra: x509.NameAttribute[str]
) -> None:
    original = authority_module._name
    monkeypatch.setattr(authority_module, "_name", lambda text: x509.Name([*original(text), extra]))
    assert _judge(_created()).reason in {"chain-name", "chain-incomplete"}


def test_a_name_that_lacks_something_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = authority_module._name
    monkeypatch.setattr(authority_module, "_name", lambda text: x509.Name(list(original(text))[1:]))
    assert _judge(_created()).reason == "chain-name"


def test_a_root_of_another_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = authority_module._name
    monkeypatch.setattr(authority_module, "_name", lambda text: original(text.replace("ARK-Milan", "ARK-Genoa")))
    assert _judge(_created()).reason == "chain-name"


def test_authorities_need_the_right_to_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    original = authority_module._key_usage

    def without_certificates(*, crl_sign: bool) -> x509.KeyUsage:
        usage = original(crl_sign=True)
        return x509.KeyUsage(False, False, False, False, False, False, usage.crl_sign, False, False)

    monkeypatch.setattr(authority_module, "_key_usage", without_certificates)
    assert _judge(_created()).reason == "chain-constraints"


@pytest.mark.parametrize(("is_authority", "length"), [(False, None), (True, 1), (True, None)])
def test_the_intermediate_has_path_length_0(
    monkeypatch: pytest.MonkeyPatch, *, is_authority: bool, length: int | None
) -> None:
    original = x509.BasicConstraints

    def constraints(ca: bool, path_length: int | None) -> x509.BasicConstraints:
        return original(is_authority, length) if path_length == 0 else original(ca, path_length)

    monkeypatch.setattr(x509, "BasicConstraints", constraints)
    made = _created()
    monkeypatch.undo()
    assert _judge(made).reason == "chain-constraints"


def test_an_intermediate_of_a_root_with_the_same_names_is_refused() -> None:
    ark_key, ask_key = authority_keys()
    twin = Machine.create(Authority.create(Line.MILAN, now=NOW, keys=(ask_key, ark_key)), now=NOW)
    mixed = dataclasses.replace(machine(), ask=twin.ask)
    assert _judge(mixed).reason == "chain-signature"
    mixed = dataclasses.replace(machine(), vcek=twin.vcek, key=twin.key)
    assert _judge(mixed).reason == "chain-signature"


def test_a_root_that_did_not_sign_itself_is_refused() -> None:
    ark_key, ask_key = authority_keys()
    builder = authority_module._authority_certificate(Line.MILAN, "ARK-Milan", ark_key, None, NOW)
    ark = builder.sign(ask_key, hashes.SHA384(), rsa_padding=_PSS).public_bytes(Encoding.DER)
    assert _judge(dataclasses.replace(machine(), ark=ark)).reason == "chain-signature"
