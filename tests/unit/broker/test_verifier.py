# SPDX-License-Identifier: MIT OR Apache-2.0
"""The verifier on simulated evidence: each check refuses for its own reason, and no root is trusted unnamed."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from svsm.broker.verifier import CHECK_NAMES, ReportPolicy, Result, Roots, Verdict, verify, verify_evidence
from svsm.formats.errors import PolicyError, StateError
from svsm.formats.snp import certificate_table, certs
from svsm.formats.snp.policy import GuestPolicy, PlatformInfo
from svsm.formats.snp.report import P384_ORDER, VMPL_HOST, Report
from svsm.formats.snp.tcb import Line, Tcb
from svsm.hardware import authority as authority_module
from svsm.hardware.authority import Authority, Machine
from svsm.hardware.report_signer import sign_report
from tests.simulated import NOW, authority, authority_keys, machine

_DATA, _DIGEST, _HOST = b"d" * 64, b"m" * 48, b"h" * 32
_LATER = NOW + datetime.timedelta(days=30)


def _report(made: Machine | None = None, version: int = 5) -> Report:
    made = made or machine()
    return made.new_report(version).replace(report_data=_DATA, measurement=_DIGEST, host_data=_HOST, policy=0x30000)


def _judge(
    report: Report | bytes,
    policy: ReportPolicy | None = None,
    *,
    made: Machine | None = None,
    roots: Roots | None = None,
    at: datetime.datetime = _LATER,
    crl: bytes | None = None,
) -> Verdict:
    made = made or machine()
    signed = made.sign_report(report) if isinstance(report, Report) else report
    roots = roots if roots is not None else Roots.simulated(made.root_fingerprint)
    return verify(signed, made.vcek, chain=[made.ask, made.ark], roots=roots, at=at, policy=policy, crl=crl)


def _evidence(
    signed: bytes,
    table: bytes,
    root: Roots | str,
    *,
    data: bytes = _DATA,
    measurements: tuple[bytes, ...] = (b"other" * 9 + b"xyz", _DIGEST),
    host_data: bytes = _HOST,
    vek: bytes | None = None,
) -> Verdict:
    return verify_evidence(
        signed,
        table,
        accepted_root=root,
        expected_report_data=data,
        allowed_measurements=measurements,
        expected_host_data=host_data,
        at=_LATER,
        vek=vek,
    )


@pytest.mark.parametrize("line", list(Line))
@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_simulated_evidence_is_accepted_under_its_named_root(line: Line, version: int) -> None:
    made = machine(line)
    verdict = _judge(_report(made, version), made=made)
    assert verdict.accepted, verdict.detail
    assert (verdict.line, verdict.key, verdict.simulated) == (line.value, "VCEK", True)
    assert verdict.root_fingerprint == made.root_fingerprint
    assert [check.name for check in verdict.checks] == list(CHECK_NAMES)
    assert verdict.require() == verdict.report
    assert {"report-data", "measurement", "host-data", "tcb-minimum", "provisional", "revocation"} <= set(
        verdict.not_checked
    )


def test_a_broker_gets_every_value_checked() -> None:
    root = "simulated:" + machine().root_fingerprint.hex()
    signed, table = machine().sign_report(_report()), machine().certificates()
    verdict = _evidence(signed, table, root)
    assert verdict.accepted, verdict.detail
    assert not {"report-data", "measurement", "host-data"} & set(verdict.not_checked)
    assert _evidence(signed, table, root, data=bytes(64)).reason == "report-data"
    assert _evidence(signed, table, root, measurements=()).reason == "report-measurement"
    assert _evidence(signed, table, root, measurements=(bytes(48),)).reason == "report-measurement"
    assert _evidence(signed, table, root, host_data=bytes(32)).reason == "report-host-data"
    for bad in ("amd", "amd:Milan", "simulated:" + "0" * 64):
        assert _evidence(signed, table, bad).reason == "root-unknown"
    with pytest.raises(StateError):
        _evidence(signed, table, root, data=b"short")


def test_the_signing_key_is_chosen_by_the_report() -> None:
    made = machine()
    root = Roots.simulated(made.root_fingerprint)
    signed = made.sign_report(_report())
    assert _evidence(signed, b"", root).reason == "evidence-no-certificate"
    assert _evidence(signed, bytes(23), root).reason == "certificate-table-terminator"
    as_vlek = certificate_table.pack_table({certificate_table.VLEK: made.vcek, certificate_table.ARK: made.ark})
    assert _evidence(signed, as_vlek, root).reason == "evidence-no-certificate"
    claims_vlek = made.sign_report(_report().replace(key_info=1 << 2))
    both = certificate_table.pack_table(
        {certificate_table.VLEK: made.vcek, certificate_table.ASK: made.ask, certificate_table.ARK: made.ark}
    )
    assert _evidence(claims_vlek, both, root).reason == "report-signing-key"
    rest = certificate_table.pack_table({certificate_table.ASK: made.ask, certificate_table.ARK: made.ark})
    assert _evidence(signed, rest, root, vek=made.vcek).accepted
    without_ark = certificate_table.pack_table({certificate_table.VCEK: made.vcek, certificate_table.ASK: made.ask})
    assert _evidence(signed, without_ark, root).reason == "root-unknown"
    assert _evidence(signed, without_ark, Roots.simulated(made.ark)).accepted
    without_ask = certificate_table.pack_table({certificate_table.VCEK: made.vcek, certificate_table.ARK: made.ark})
    assert _evidence(signed, without_ask, root).reason == "chain-incomplete"


Change = Callable[[Report], Report]

_MILAN_23 = Tcb(4, 0, 23, 219).pack(Line.MILAN)
_MILAN_220 = Tcb(4, 0, 24, 220).pack(Line.MILAN)
_COMMITTED_ONLY = ReportPolicy(allow_provisional=False)
_AUTHOR = ReportPolicy(author_key_digests=frozenset({b"a" * 48}))
_IMAGE = ReportPolicy(family_id=b"f" * 16, image_id=b"i" * 16)

_REFUSALS: list[tuple[str, Change, ReportPolicy | None]] = [
    ("report-reserved", lambda r: r.replace(reserved_4c=1), None),
    ("report-unsigned", lambda r: r.replace(key_info=7 << 2), None),
    ("report-unsigned", lambda r: r.replace(key_info=1 << 1), None),
    ("report-signing-key", lambda r: r.replace(key_info=1 << 2), None),
    ("report-product", lambda r: r.replace(cpuid_model=0x11), None),
    ("report-product", lambda r: r.replace(cpuid_family=0x17), None),
    ("report-tcb-mismatch", lambda r: r.replace(reported_tcb=Tcb(3, 0, 24, 219).pack(Line.MILAN)), None),
    ("report-tcb", lambda r: r.replace(reported_tcb=b"\x04\0\x01\0\0\0\x18\xdb"), None),
    ("report-chip-mismatch", lambda r: r.replace(chip_id=b"c" * 64), None),
    ("report-chip-mismatch", lambda r: r.replace(chip_id=bytes(64)), None),
    ("report-data", lambda r: r.replace(report_data=b"D" + _DATA[1:]), ReportPolicy(report_data=_DATA)),
    ("report-vmpl", lambda r: r.replace(vmpl=1), None),
    ("report-vmpl", lambda r: r.replace(vmpl=VMPL_HOST), None),
    ("report-vmpl", lambda r: r, ReportPolicy(vmpls=frozenset({2}))),
    ("report-measurement", lambda r: r, ReportPolicy(measurements=frozenset())),
    ("report-policy-reserved", lambda r: r.replace(policy=0x10000), None),
    ("report-policy-reserved", lambda r: r.replace(policy=0x30000 | 1 << 26), None),
    ("report-debug", lambda r: r.replace(policy=0x30000 | GuestPolicy.DEBUG), None),
    ("report-migration", lambda r: r.replace(policy=0x30000 | GuestPolicy.MIGRATE_MA), None),
    ("report-migration", lambda r: r.replace(report_id_ma=bytes(32)), None),
    ("report-smt", lambda r: r, ReportPolicy(allow_smt=False)),
    ("report-policy-flag", lambda r: r, ReportPolicy(require_single_socket=True)),
    ("report-policy-flag", lambda r: r, ReportPolicy(require_page_swap_disable=True)),
    ("report-abi", lambda r: r.replace(policy=0x30137), ReportPolicy(min_abi=(1, 56))),
    ("report-id-key", lambda r: r, ReportPolicy(id_key_digests=frozenset({b"k" * 48}))),
    ("report-author-key", lambda r: r.replace(author_key_digest=b"a" * 48), _AUTHOR),
    ("report-image-id", lambda r: r, ReportPolicy(family_id=b"f" * 16)),
    ("report-image-id", lambda r: r.replace(family_id=b"f" * 16), _IMAGE),
    ("report-guest-svn", lambda r: r.replace(guest_svn=4), ReportPolicy(min_guest_svn=5)),
    ("report-host-data", lambda r: r, ReportPolicy(host_data=bytes(32))),
    ("report-tcb-order", lambda r: r.replace(committed_tcb=_MILAN_23), None),
    ("report-tcb-order", lambda r: r.replace(current_tcb=Tcb(3, 0, 24, 220).pack(Line.MILAN)), None),
    ("report-tcb-minimum", lambda r: r, ReportPolicy(min_tcb={"snp": 25})),
    ("report-tcb-minimum", lambda r: r.replace(launch_tcb=_MILAN_23), ReportPolicy(min_tcb={"snp": 24})),
    ("report-tcb-minimum", lambda r: r, ReportPolicy(min_tcb={"fmc": 0})),
    ("report-provisional", lambda r: r.replace(current_build=30), ReportPolicy(allow_provisional=False)),
    ("report-provisional", lambda r: r.replace(current_tcb=_MILAN_220), _COMMITTED_ONLY),
    ("report-platform-reserved", lambda r: r.replace(platform_info=1 << 6), None),
    ("report-platform", lambda r: r.replace(platform_info=0), ReportPolicy(require_alias_check=True)),
    ("report-platform", lambda r: r, ReportPolicy(require_ciphertext_hiding=True)),
    ("report-mitigation", lambda r: r.replace(launch_mit_vector=1), ReportPolicy(require_mitigations=1)),
    ("report-chip-list", lambda r: r, ReportPolicy(allowed_chip_ids=frozenset({b"c" * 64}))),
    ("report-chip-list", lambda r: r, ReportPolicy(denied_chip_ids=frozenset({machine().chip_id}))),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "change", "policy"), _REFUSALS)
def test_each_check_refuses_for_its_own_reason(reason: str, change: Change, policy: ReportPolicy | None) -> None:
    verdict = _judge(change(_report()), policy)
    assert verdict.reason == reason
    assert not verdict.accepted
    with pytest.raises(PolicyError) as refused:
        verdict.require()
    assert (refused.value.code, refused.value.exit_code) == (reason, 3)


def test_the_same_demands_are_met_by_a_report_that_meets_them() -> None:
    policy = ReportPolicy(
        report_data=_DATA,
        measurements=frozenset({_DIGEST}),
        allow_smt=False,
        require_single_socket=True,
        require_page_swap_disable=True,
        min_abi=(1, 55),
        id_key_digests=frozenset({b"k" * 48, b"l" * 48}),
        author_key_digests=frozenset({b"a" * 48}),
        family_id=b"f" * 16,
        image_id=b"i" * 16,
        min_guest_svn=5,
        host_data=_HOST,
        min_tcb={"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219},
        allow_provisional=False,
        require_alias_check=True,
        require_ciphertext_hiding=True,
        require_mitigations=6,
        allowed_chip_ids=frozenset({machine().chip_id}),
        denied_chip_ids=frozenset({bytes(64)}),
    )
    flags = GuestPolicy.MUST_BE_ONE | GuestPolicy.SINGLE_SOCKET | GuestPolicy.PAGE_SWAP_DISABLE
    report = _report().replace(
        policy=flags | 0x137,
        id_key_digest=b"k" * 48,
        author_key_digest=b"a" * 48,
        key_info=1,
        family_id=b"f" * 16,
        image_id=b"i" * 16,
        guest_svn=5,
        platform_info=PlatformInfo.ALIAS_CHECK_COMPLETE | PlatformInfo.CIPHERTEXT_HIDING,
        launch_mit_vector=7,
        current_mit_vector=14,
    )
    verdict = _judge(report, policy)
    assert verdict.accepted, verdict.detail
    assert verdict.not_checked == ("revocation",)


def test_what_the_policy_allows_is_allowed() -> None:
    loose = ReportPolicy(allow_debug=True, allow_migration=True, allow_provisional=True, vmpls=frozenset({0, 1}))
    report = _report().replace(policy=0xF0000, report_id_ma=bytes(32), vmpl=1, current_build=99)
    assert _judge(report, loose).accepted


def test_a_masked_chip_id_is_accepted_only_by_policy() -> None:
    masked = _report().replace(chip_id=bytes(64))
    assert _judge(masked).reason == "report-chip-mismatch"
    assert _judge(masked, ReportPolicy(allow_masked_chip_id=True)).accepted


def test_several_faults_are_all_listed_and_the_first_is_the_reason() -> None:
    report = _report().replace(vmpl=2, policy=0x30000 | GuestPolicy.DEBUG)
    verdict = _judge(report, ReportPolicy(host_data=bytes(32)))
    failed = [check.code for check in verdict.checks if check.result is Result.FAILED]
    assert failed == ["report-vmpl", "report-debug", "report-host-data"]
    assert verdict.reason == "report-vmpl"


def test_fields_of_a_forged_report_are_not_judged() -> None:
    signed = bytearray(machine().sign_report(_report().replace(vmpl=2)))
    signed[0x90] ^= 1
    verdict = _judge(bytes(signed))
    assert (verdict.reason, verdict.authentic) == ("report-signature", False)
    assert {check.result for check in verdict.checks if check.name in {"vmpl", "debug"}} == {Result.NOT_REACHED}


def test_a_signature_by_another_key_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    assert _judge(sign_report(other, _report())).reason == "report-signature"


def test_ecdsa_is_malleable_and_so_no_report_is_an_identity() -> None:
    signed = Report.parse(machine().sign_report(_report()))
    r, s = signed.signature
    twin = signed.with_signature(r, P384_ORDER - s).pack()
    assert twin != signed.pack()
    assert _judge(twin).accepted  # which is why freshness comes from REPORT_DATA alone
    swapped = signed.replace(
        signature_r=signed.signature_r[:48][::-1] + bytes(24), signature_s=signed.signature_s[:48][::-1] + bytes(24)
    )
    assert _judge(swapped.pack()).reason in {"report-signature", "report-signature-range"}


def test_a_simulated_root_is_trusted_only_by_name() -> None:
    for roots in (
        Roots(),
        Roots.amd(),
        Roots.amd(Line.MILAN),
        Roots.simulated(b"x" * 32),
        Roots.simulated(machine(Line.GENOA).ark),
    ):
        verdict = _judge(_report(), roots=roots)
        assert (verdict.accepted, verdict.reason) == (False, "root-unknown")
    for roots in (Roots.simulated(machine().ark), Roots.amd() | Roots.simulated(machine().root_fingerprint)):
        assert _judge(_report(), roots=roots).accepted


def test_root_names() -> None:
    assert Roots.parse("amd") == Roots.amd()
    assert Roots.parse("amd:Genoa") == Roots.amd(Line.GENOA)
    assert Roots.parse("simulated:" + "aB" * 32) == Roots.simulated(b"\xab" * 32)
    for bad in ("", "AMD", "amd:", "amd:Rome", "simulated:", "simulated:" + "a" * 63, "amd simulated:" + "a" * 64):
        with pytest.raises(StateError) as refused:
            Roots.parse(bad)
        assert refused.value.code == "root-name"
    with pytest.raises(StateError):
        Roots.simulated(machine().vcek)


def _unmarked(monkeypatch: pytest.MonkeyPatch, *, names: bool, extension: bool) -> Machine:
    """A machine whose certificates lack the mark: what somebody would forge."""
    with monkeypatch.context() as patch:
        if not names:
            original = authority_module._name
            patch.setattr(authority_module, "_name", lambda text: x509.Name(list(original(text))[:-1]))
        if not extension:
            other = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.999.1"), b"\x05\x00")
            patch.setattr(authority_module, "_mark_extension", lambda: other)
        return Machine.create(Authority.create(Line.MILAN, now=NOW, keys=authority_keys()), now=NOW)


def test_a_forged_root_with_amds_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forged = _unmarked(monkeypatch, names=False, extension=False)
    assert certs.parse_certificate(forged.ark).subject.like_amd
    assert not certs.parse_certificate(forged.ark).marked
    assert _judge(_report(forged), made=forged, roots=Roots.amd()).reason == "root-unknown"
    # Without its root it would have to lead to AMD's, whose key did not sign it.
    verdict = verify(forged.sign_report(_report(forged)), forged.vcek, roots=Roots.amd(), at=_LATER)
    assert verdict.reason == "chain-signature"
    with_ask = verify(
        forged.sign_report(_report(forged)), forged.vcek, chain=[forged.ask], roots=Roots.amd(), at=_LATER
    )
    assert with_ask.reason in {"chain-signature", "chain-issuer"}


@pytest.mark.parametrize(("names", "extension"), [(False, False), (False, True), (True, False)])
def test_a_simulated_root_must_carry_the_whole_mark(
    monkeypatch: pytest.MonkeyPatch, *, names: bool, extension: bool
) -> None:
    made = _unmarked(monkeypatch, names=names, extension=extension)
    assert _judge(_report(made), made=made).reason == "mark-missing"


def test_the_mark_is_forbidden_under_a_real_root(monkeypatch: pytest.MonkeyPatch) -> None:
    from svsm.broker.verifier.roots import AMD_FINGERPRINTS

    # No such chain exists; pretend that the simulated root is one of the pinned ones.
    monkeypatch.setitem(AMD_FINGERPRINTS, Line.MILAN, machine().root_fingerprint)
    assert _judge(_report(), roots=Roots.amd()).reason == "mark-forbidden"


def test_dates_of_every_certificate_count() -> None:
    day = datetime.timedelta(days=1)
    assert _judge(_report(), at=NOW - 2 * day).reason == "chain-not-yet-valid"
    assert _judge(_report(), at=NOW + 7 * 365 * day).accepted
    assert _judge(_report(), at=NOW + 7 * 365 * day + datetime.timedelta(seconds=1)).reason == "chain-expired"
    with pytest.raises(StateError) as refused:
        _judge(_report(), at=datetime.datetime(2026, 6, 2))
    assert refused.value.code == "verify-time"


def test_certificates_of_others_do_not_fit() -> None:
    made, genoa = machine(), machine(Line.GENOA)
    signed = made.sign_report(_report())
    both = Roots.simulated(made.root_fingerprint, genoa.root_fingerprint)

    def reason(vek: bytes, *chain: bytes) -> str | None:
        return verify(signed, vek, chain=chain, roots=both, at=_LATER).reason

    assert reason(made.vcek, made.ask, made.ark) is None
    assert reason(genoa.vcek, genoa.ask, genoa.ark) == "report-product"
    assert reason(made.vcek, genoa.ask, made.ark) == "chain-incomplete"
    assert reason(made.vcek, made.ask, genoa.ark) == "chain-issuer"
    assert reason(made.vcek, made.ask, made.ark, genoa.ark) == "chain-ambiguous"
    assert reason(made.ask, made.ark) == "chain-incomplete"
    assert reason(b"", made.ask) == "certificate-size"
    sibling = Machine.create(authority(), now=NOW)
    assert reason(sibling.vcek, made.ask, made.ark) == "report-chip-mismatch"


def test_every_changed_byte_of_a_certificate_is_refused() -> None:
    made = machine()
    signed = made.sign_report(_report())
    roots = Roots.simulated(made.root_fingerprint)
    for which, der in enumerate((made.vcek, made.ask, made.ark)):
        for position in range(0, len(der), 7):
            changed = bytearray(der)
            changed[position] ^= 1 << (position % 8)
            chain = [made.vcek, made.ask, made.ark]
            chain[which] = bytes(changed)
            verdict = verify(signed, chain[0], chain=chain[1:], roots=roots, at=_LATER)
            assert not verdict.accepted, (which, position)


def test_only_rsa_4096_signs_certificates() -> None:
    small = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    weak = Authority.create(Line.MILAN, now=NOW, keys=(small, small))
    made = Machine.create(weak, now=NOW)
    assert _judge(_report(made), made=made).reason == "chain-key"


def test_the_signing_key_is_on_p384() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    vcek = authority().issue_vcek(key.public_key(), chip_id=machine().chip_id, tcb=machine().tcb, now=NOW)
    made = dataclasses.replace(machine(), vcek=vcek.public_bytes(Encoding.DER))
    assert _judge(machine().sign_report(_report()), made=made).reason == "chain-key"


def _crl(serial: int, *, days: int = 60, signer: rsa.RSAPrivateKey | None = None) -> bytes:
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority().ark.subject).last_update(NOW)
    builder = builder.next_update(NOW + datetime.timedelta(days=days)).add_revoked_certificate(entry)
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    return builder.sign(signer or authority().ark_key, hashes.SHA384(), rsa_padding=pss).public_bytes(Encoding.DER)


def test_a_revocation_list_is_judged() -> None:
    clean = _judge(_report(), crl=_crl(99))
    assert clean.accepted
    assert "revocation" not in clean.not_checked
    assert _judge(_report(), crl=_crl(0x10001)).reason == "chain-revoked"
    assert _judge(_report(), crl=_crl(99, days=10)).reason == "crl-expired"
    assert _judge(_report(), crl=_crl(99, signer=authority().ask_key)).reason == "crl-signature"
    assert _judge(_report(), crl=b"nonsense").reason == "der"
    # A VCEK's serial number says nothing on the root's list: the intermediate issued it.
    assert _judge(_report(), crl=_crl(1)).accepted


@pytest.mark.parametrize(
    "values",
    [
        {"report_data": bytes(63)},
        {"measurements": frozenset({bytes(47)})},
        {"host_data": bytes(64)},
        {"allowed_chip_ids": frozenset({bytes(8)})},
        {"min_tcb": {"cpu": 1}},
    ],
)
def test_a_policy_that_nothing_can_meet_is_the_callers_mistake(values: dict[str, object]) -> None:
    with pytest.raises(StateError) as refused:
        ReportPolicy(**values)  # type: ignore[arg-type]
    assert refused.value.code == "report-policy"


def test_a_verdict_is_json() -> None:
    shown = _judge(_report()).to_json()
    assert shown["accepted"] is True
    assert list(shown) == [
        "accepted", "reason", "detail", "authentic", "root", "simulated", "product", "key", "not_checked", "checks",
    ]  # fmt: skip
