# SPDX-License-Identifier: MIT OR Apache-2.0
"""The checks that tie a report to its key, and those on an authentic report, in the order of a relying party.

Each rule takes the report and what it is held against, and returns a sentence when it passes, None when nobody gave a
value to check against, and raises the refusal otherwise. Values that an attacker may guess at are compared in constant
time. TCB versions are compared per component (`svsm.formats.snp.tcb`), never as numbers.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Callable, Iterable
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from svsm.broker.verifier.chain import Chain, load_vek_key
from svsm.broker.verifier.policy import ReportPolicy
from svsm.formats.errors import IntegrityError, PolicyError
from svsm.formats.snp.certs import VekExtensions
from svsm.formats.snp.policy import GuestPolicy, PlatformInfo
from svsm.formats.snp.report import VMPL_HOST, Report, SigningKey
from svsm.formats.snp.tcb import Line, Tcb, line_of_cpuid

__all__ = ["AUTHENTICITY_RULES", "POLICY_RULES", "Case"]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What the rules look at."""

    report: Report
    chain: Chain
    extensions: VekExtensions
    policy: ReportPolicy

    @property
    def line(self) -> Line:
        """The product line, as the certificate chain proves it."""
        return self.chain.line


Rule = Callable[[Case], str | None]


def _signing_key(case: Case) -> str:
    claimed = case.report.signing_key
    if claimed == SigningKey.NONE or case.report.mask_chip_key:
        raise PolicyError("the firmware left the report unsigned", code="report-unsigned")
    wanted = SigningKey.VLEK if case.chain.key == "VLEK" else SigningKey.VCEK
    if claimed != wanted:
        raise IntegrityError(
            f"the report says that another kind of key than the {case.chain.key} signed it",
            code="report-signing-key",
            expected=wanted,
            got=claimed,
        )
    if (case.extensions.hwid is None) == (case.chain.key == "VCEK"):
        raise IntegrityError("a VCEK names its chip, a VLEK does not", code="report-signing-key")
    return case.chain.key


def _product(case: Case) -> str:
    if case.extensions.product.partition("-")[0] != case.line:
        raise IntegrityError("the signing key is another product's", code="report-product", got=case.extensions.product)
    if not case.report.has_cpuid:
        return f"{case.extensions.product} (the report does not say)"
    said = line_of_cpuid(case.report.cpuid_family, case.report.cpuid_model)
    if said is not case.line:
        raise IntegrityError(
            "the report comes from another product than its key",
            code="report-product",
            expected=str(case.line),
            family=case.report.cpuid_family,
            model=case.report.cpuid_model,
        )
    return case.extensions.product


def _tcb_match(case: Case) -> str:
    reported = Tcb.parse(case.report.reported_tcb, case.line)
    certified = case.extensions.levels
    if reported.components() != dict(certified):
        raise IntegrityError(
            "the reported TCB is not the one of the signing key",
            code="report-tcb-mismatch",
            expected=", ".join(f"{name}={level}" for name, level in certified.items()),
            got=str(reported),
        )
    return str(reported)


def _chip_match(case: Case) -> str:
    hwid, chip = case.extensions.hwid, case.report.chip_id
    if hwid is None:
        return f"a VLEK belongs to a provider: {case.extensions.csp_id}"
    if not any(chip) and case.policy.allow_masked_chip_id:
        return "CHIP_ID is masked, as the policy allows"
    used = case.line.chip_id_bytes
    if len(hwid) != used or chip[:used] != hwid or any(chip[used:]):
        raise IntegrityError("the report comes from another chip than its key", code="report-chip-mismatch")
    return hwid.hex()


def _signature(case: Case) -> str:
    key = load_vek_key(case.chain.vek.public_key)
    r, s = case.report.signature
    try:
        key.verify(utils.encode_dss_signature(r, s), case.report.signed_part, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise IntegrityError("the report's signature is wrong", code="report-signature") from None
    return "ECDSA P-384 with SHA-384"


def _report_data(case: Case) -> str | None:
    if case.policy.report_data is None:
        return None
    if not hmac.compare_digest(case.report.report_data, case.policy.report_data):
        raise PolicyError("REPORT_DATA is not bound to this challenge and key", code="report-data")
    return "bound to this challenge and key"


def _vmpl(case: Case) -> str:
    if case.report.vmpl not in case.policy.vmpls:
        who = "the host" if case.report.vmpl == VMPL_HOST else f"software at VMPL {case.report.vmpl}"
        raise PolicyError(f"{who} asked for the report", code="report-vmpl", got=case.report.vmpl)
    return f"VMPL {case.report.vmpl}"


def _one_of(value: bytes, allowed: Iterable[bytes]) -> bool:
    # No early exit: which entry matched must not show in time.
    return sum(hmac.compare_digest(value, candidate) for candidate in allowed) > 0


def _measurement(case: Case) -> str | None:
    if case.policy.measurements is None:
        return None
    if not _one_of(case.report.measurement, case.policy.measurements):
        raise PolicyError(
            "the launch digest is not allowed", code="report-measurement", got=case.report.measurement.hex()
        )
    return case.report.measurement.hex()


def _policy_form(case: Case) -> str:
    bits = case.report.guest_policy
    if bits.reserved or not bits.has(GuestPolicy.MUST_BE_ONE):
        raise PolicyError(
            "the guest policy has reserved bits set, or bit 17 not", code="report-policy-reserved", got=bits.value
        )
    return hex(bits.value)


def _debug(case: Case) -> str:
    if case.report.guest_policy.has(GuestPolicy.DEBUG) and not case.policy.allow_debug:
        raise PolicyError("the host may debug the guest: DEBUG is set", code="report-debug")
    return "DEBUG is set, as the policy allows" if case.report.guest_policy.has(GuestPolicy.DEBUG) else "no debugging"


def _migration(case: Case) -> str:
    allowed = case.report.guest_policy.has(GuestPolicy.MIGRATE_MA)
    if (allowed or case.report.has_migration_agent) and not case.policy.allow_migration:
        raise PolicyError("a migration agent may take the guest away", code="report-migration")
    return "a migration agent, as the policy allows" if case.report.has_migration_agent else "no migration agent"


def _smt(case: Case) -> str | None:
    if case.policy.allow_smt is None:
        return None
    if case.report.guest_policy.has(GuestPolicy.SMT) and not case.policy.allow_smt:
        raise PolicyError("the guest policy allows SMT", code="report-smt")
    return "as the policy wants"


def _single_socket(case: Case) -> str | None:
    return _policy_bit(case, case.policy.require_single_socket, GuestPolicy.SINGLE_SOCKET, "SINGLE_SOCKET")


def _page_swap(case: Case) -> str | None:
    return _policy_bit(case, case.policy.require_page_swap_disable, GuestPolicy.PAGE_SWAP_DISABLE, "PAGE_SWAP_DISABLE")


def _policy_bit(case: Case, required: bool | None, mask: int, name: str) -> str | None:
    if required is None:
        return None
    if required and not case.report.guest_policy.has(mask):
        raise PolicyError(f"the guest policy does not demand {name}", code="report-policy-flag", field=name)
    return "as the policy wants"


def _abi(case: Case) -> str | None:
    if case.policy.min_abi is None:
        return None
    if case.report.guest_policy.abi < case.policy.min_abi:
        raise PolicyError("the guest policy admits older firmware", code="report-abi")
    return "{}.{}".format(*case.report.guest_policy.abi)


def _id_key(case: Case) -> str | None:
    if case.policy.id_key_digests is None:
        return None
    if not _one_of(case.report.id_key_digest, case.policy.id_key_digests):
        raise PolicyError("the image is not signed by an allowed ID key", code="report-id-key")
    return case.report.id_key_digest.hex()


def _author_key(case: Case) -> str | None:
    if case.policy.author_key_digests is None:
        return None
    digest = case.report.author_key_digest
    if not case.report.author_key_enabled or not _one_of(digest, case.policy.author_key_digests):
        raise PolicyError("the ID key is not signed by an allowed author key", code="report-author-key")
    return digest.hex()


def _image(case: Case) -> str | None:
    wanted = ((case.policy.family_id, case.report.family_id), (case.policy.image_id, case.report.image_id))
    if all(value is None for value, _ in wanted):
        return None
    if not all(value is None or hmac.compare_digest(value, got) for value, got in wanted):
        raise PolicyError("FAMILY_ID or IMAGE_ID is another image's", code="report-image-id")
    return "as given"


def _guest_svn(case: Case) -> str | None:
    if case.policy.min_guest_svn is None:
        return None
    if case.report.guest_svn < case.policy.min_guest_svn:
        raise PolicyError(
            "the image is older than allowed",
            code="report-guest-svn",
            expected=case.policy.min_guest_svn,
            got=case.report.guest_svn,
        )
    return str(case.report.guest_svn)


def _host_data(case: Case) -> str | None:
    if case.policy.host_data is None:
        return None
    if not hmac.compare_digest(case.report.host_data, case.policy.host_data):
        raise PolicyError("HOST_DATA is not the launch configuration's", code="report-host-data")
    return case.report.host_data.hex()


def _tcb_order(case: Case) -> str:
    reported, committed, current = (
        Tcb.parse(data, case.line)
        for data in (case.report.reported_tcb, case.report.committed_tcb, case.report.current_tcb)
    )
    if committed.below(reported) or current.below(committed):
        raise PolicyError("REPORTED, COMMITTED and CURRENT TCB contradict each other", code="report-tcb-order")
    return "REPORTED ≤ COMMITTED ≤ CURRENT"


def _tcb_minimum(case: Case) -> str | None:
    if case.policy.min_tcb is None:
        return None
    tcbs = {
        "REPORTED": case.report.reported_tcb,
        "COMMITTED": case.report.committed_tcb,
        "LAUNCH": case.report.launch_tcb,
    }
    for name, data in tcbs.items():
        low = Tcb.parse(data, case.line).below(dict(case.policy.min_tcb))
        if low:
            raise PolicyError(f"{name}_TCB is below the minimum", code="report-tcb-minimum", field=", ".join(low))
    return "no component below its minimum"


def _provisional(case: Case) -> str | None:
    if case.policy.allow_provisional is None:
        return None
    report = case.report
    current = (report.current_tcb, report.current_major, report.current_minor, report.current_build)
    committed = (report.committed_tcb, report.committed_major, report.committed_minor, report.committed_build)
    if current != committed and not case.policy.allow_provisional:
        raise PolicyError("firmware runs that the host can still roll back", code="report-provisional")
    return "committed firmware" if current == committed else "provisional firmware, as the policy allows"


def _platform_form(case: Case) -> str:
    if case.report.platform.reserved:
        raise PolicyError(
            "PLATFORM_INFO has reserved bits set", code="report-platform-reserved", got=case.report.platform_info
        )
    return ", ".join(case.report.platform.names()) or "nothing set"


def _alias_check(case: Case) -> str | None:
    return _platform_bit(case, case.policy.require_alias_check, PlatformInfo.ALIAS_CHECK_COMPLETE, "alias check")


def _ciphertext_hiding(case: Case) -> str | None:
    return _platform_bit(
        case, case.policy.require_ciphertext_hiding, PlatformInfo.CIPHERTEXT_HIDING, "ciphertext hiding"
    )


def _platform_bit(case: Case, required: bool | None, mask: int, name: str) -> str | None:
    if required is None:
        return None
    if required and not case.report.platform.has(mask):
        raise PolicyError(f"the platform lacks: {name}", code="report-platform", field=name)
    return "as the policy wants"


def _mitigations(case: Case) -> str | None:
    wanted = case.policy.require_mitigations
    if wanted is None:
        return None
    both = case.report.launch_mit_vector & case.report.current_mit_vector
    if both & wanted != wanted:
        raise PolicyError("a mitigation is missing", code="report-mitigation", expected=wanted, got=both)
    return hex(both)


def _chip_masked(case: Case) -> str:
    if not any(case.report.chip_id) and not case.policy.allow_masked_chip_id:
        raise PolicyError(
            "the report does not say which chip it comes from",
            code="report-chip-masked",
            hint="the policy must allow masked chip ids, as hosts with a VLEK have them",
        )
    return "named" if any(case.report.chip_id) else "masked, as the policy allows"


def _chip_list(case: Case) -> str | None:
    allowed, denied = case.policy.allowed_chip_ids, case.policy.denied_chip_ids
    if allowed is None and denied is None:
        return None
    chip = case.report.chip_id
    if (allowed is not None and chip not in allowed) or (denied is not None and chip in denied):
        raise PolicyError("this chip is not allowed", code="report-chip-list", got=chip.hex())
    return chip.hex()


AUTHENTICITY_RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("signing-key", _signing_key),
    ("product", _product),
    ("tcb-match", _tcb_match),
    ("chip-match", _chip_match),
    ("signature", _signature),
)
"""What ties the report to the certificate; the first failure ends verification."""

POLICY_RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("report-data", _report_data),
    ("vmpl", _vmpl),
    ("measurement", _measurement),
    ("policy-reserved", _policy_form),
    ("debug", _debug),
    ("migration", _migration),
    ("smt", _smt),
    ("single-socket", _single_socket),
    ("page-swap-disable", _page_swap),
    ("abi", _abi),
    ("id-key", _id_key),
    ("author-key", _author_key),
    ("image-id", _image),
    ("guest-svn", _guest_svn),
    ("host-data", _host_data),
    ("tcb-order", _tcb_order),
    ("tcb-minimum", _tcb_minimum),
    ("provisional", _provisional),
    ("platform-reserved", _platform_form),
    ("alias-check", _alias_check),
    ("ciphertext-hiding", _ciphertext_hiding),
    ("mitigations", _mitigations),
    ("chip-masked", _chip_masked),
    ("chip-list", _chip_list),
)
"""What an owner demands of an authentic report; all of them run, the first failure is the reason."""
