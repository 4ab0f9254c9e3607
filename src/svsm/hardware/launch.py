# SPDX-License-Identifier: MIT OR Apache-2.0
"""The launch of one guest, as the AMD-SP does it: LAUNCH_START, LAUNCH_UPDATE, LAUNCH_FINISH (AMD 56860 §8.16 to 8.18).

A state machine over pages that it is handed: it computes the digest, checks policy and ID block, and makes the
secrets page. Where the pages are is `svsm.hardware.machine`'s business. Whatever is refused is refused with a firmware
status, and the guest's state stays as it was, except that a failed LAUNCH_FINISH may be repeated.

The digest is computed page by page through `LaunchDigest.update`; the tools measure a file through
`LaunchDigest.extend` over a launch plan. `svsm boot` compares the two.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from svsm.formats.errors import FormatError, ProtocolError
from svsm.formats.record import Buffer
from svsm.formats.snp.cpuid_page import CpuidFunction, pack_cpuid_page, parse_cpuid_page
from svsm.formats.snp.digest import LaunchDigest
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.id_block import (
    ALGORITHM_ECDSA_P384_SHA384,
    CURVE_P384,
    EcdsaSignature,
    IdAuth,
    IdBlock,
    PspPublicKey,
    key_digest,
)
from svsm.formats.snp.page_info import PageType
from svsm.formats.snp.policy import GuestPolicy, PlatformInfo
from svsm.formats.snp.secrets import fresh_secrets
from svsm.hardware.chip import Chip, cpuid_functions

__all__ = ["GuestContext", "Launch", "LaunchState", "corrected_cpuid_page", "refused"]

_NO_KEY: Final = bytes(48)


def refused(status: FirmwareStatus, message: str) -> ProtocolError:
    """The exception that carries a firmware status; code ``psp-refused``, ``status`` in its details."""
    return ProtocolError(message, code="psp-refused", status=int(status), name=status.name)


class LaunchState(enum.Enum):
    """GSTATE_* of the guest context."""

    INIT = "init"
    LAUNCH = "launch"
    RUNNING = "running"


@dataclasses.dataclass(frozen=True, slots=True)
class GuestContext:
    """What the AMD-SP knows about a running guest."""

    policy: int
    measurement: bytes
    host_data: bytes
    report_id: bytes
    vmpcks: tuple[bytes, bytes, bytes, bytes] = dataclasses.field(repr=False)
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    guest_svn: int = 0
    id_key_digest: bytes = _NO_KEY
    author_key_digest: bytes = _NO_KEY
    author_key_enabled: bool = False


class Launch:
    """One guest from nothing to running.

    Args:
        chip: The processor.
        random_bytes: Source of keys and of REPORT_ID.
    """

    def __init__(self, chip: Chip, random_bytes: Callable[[int], bytes]) -> None:
        self._chip = chip
        self._random = random_bytes
        self._digest = LaunchDigest()
        self._policy = 0
        self._vmpcks = tuple(random_bytes(32) for _ in range(4))
        self._report_id = random_bytes(32)
        self.state = LaunchState.INIT
        self.context: GuestContext | None = None

    @property
    def digest(self) -> bytes:
        """The launch digest so far, 48 bytes."""
        return self._digest.value

    def start(self, policy: int) -> None:
        """LAUNCH_START.

        Raises:
            ProtocolError: ``psp-refused`` with INVALID_GUEST_STATE, INVALID_PARAM or POLICY_FAILURE.
        """
        self._expect(LaunchState.INIT)
        _check_policy(GuestPolicy(policy), self._chip)
        self._policy = policy
        self.state = LaunchState.LAUNCH

    def update(self, page_type: int, gpa: int, contents: Buffer) -> bytes | None:
        """LAUNCH_UPDATE of one page.

        Args:
            page_type: A `PageType`.
            gpa: Its address.
            contents: 4096 bytes as the host prepared them.

        Returns:
            What the page holds afterwards, when that is not `contents`: the secrets, or zeros.

        Raises:
            ProtocolError: ``psp-refused``; INVALID_PARAM for a CPUID page that claims what the chip does not have
                (the host gets `corrected_cpuid_page`).
        """
        self._expect(LaunchState.LAUNCH)
        try:
            kind = PageType(page_type)
        except ValueError:
            raise refused(FirmwareStatus.INVALID_PARAM, "no such page type") from None
        written: bytes | None = None
        if kind is PageType.SECRETS:
            written = self._secrets()
        elif kind is PageType.ZERO:
            written = bytes(len(contents))
        elif kind is PageType.CPUID and corrected_cpuid_page(bytes(contents), self._chip) is not None:
            raise refused(FirmwareStatus.INVALID_PARAM, "the CPUID page claims what the chip does not have")
        self._digest.update(kind, gpa, contents)
        return written

    def finish(self, *, host_data: bytes, id_block: bytes | None, id_auth: bytes | None, author_key: bool) -> None:
        """LAUNCH_FINISH: afterwards `context` is set and the guest may run.

        Args:
            host_data: 32 bytes.
            id_block: 96 bytes, or None; then `id_auth` has 4096.
            author_key: Whether `id_auth` carries an author key.

        Raises:
            ProtocolError: ``psp-refused`` with BAD_MEASUREMENT, POLICY_FAILURE, BAD_SIGNATURE, INVALID_PARAM.
        """
        self._expect(LaunchState.LAUNCH)
        if len(host_data) != 32 or (id_block is None) != (id_auth is None) or (author_key and id_auth is None):
            raise refused(FirmwareStatus.INVALID_PARAM, "host data or ID block of the wrong size")
        keys = self._vmpcks
        context = GuestContext(
            policy=self._policy,
            measurement=self._digest.value,
            host_data=host_data,
            report_id=self._report_id,
            vmpcks=(keys[0], keys[1], keys[2], keys[3]),
        )
        if id_block is not None and id_auth is not None:
            context = _with_id_block(context, id_block, id_auth, author_key=author_key)
        self.context = context
        self.state = LaunchState.RUNNING

    def _secrets(self) -> bytes:
        keys = self._vmpcks
        return fresh_secrets(vmpcks=(keys[0], keys[1], keys[2], keys[3]), fms=self._chip.fms).pack()

    def _expect(self, state: LaunchState) -> None:
        if self.state is not state:
            raise refused(FirmwareStatus.INVALID_GUEST_STATE, f"the guest is in state {self.state.value}")


def _check_policy(policy: GuestPolicy, chip: Chip) -> None:
    if policy.reserved or not policy.has(GuestPolicy.MUST_BE_ONE):
        raise refused(FirmwareStatus.INVALID_PARAM, "the policy has reserved bits wrong")
    platform = PlatformInfo(chip.platform_info)
    too_new = policy.abi > (chip.firmware.major, chip.firmware.minor)
    smt = platform.has(PlatformInfo.SMT_ENABLED) and not policy.has(GuestPolicy.SMT)
    # The simulated memory is not AES-XTS, RAPL is not off and nothing hides ciphertext unless the platform says so.
    wanted = (
        (GuestPolicy.RAPL_DIS, platform.has(PlatformInfo.RAPL_DISABLED)),
        (GuestPolicy.CIPHERTEXT_HIDING, platform.has(PlatformInfo.CIPHERTEXT_HIDING)),
        (GuestPolicy.MEM_AES_256_XTS, False),
        (GuestPolicy.MIGRATE_MA, False),
    )
    if too_new or smt or any(policy.has(bit) and not offered for bit, offered in wanted):
        raise refused(FirmwareStatus.POLICY_FAILURE, "the platform is not what the policy demands")


def corrected_cpuid_page(page: bytes, chip: Chip) -> bytes | None:
    """The page with every claim cut down to what the chip has, or None when nothing had to be cut.

    A function that the chip does not have reads as zeros; bits that the chip does not have are cleared; what names or
    counts something (vendor, model, address sizes, largest leaf) must be the chip's or, where it is a limit, less.
    """
    known = {function.key: function for function in cpuid_functions(chip)}
    try:
        functions = parse_cpuid_page(page)
    except FormatError:
        return pack_cpuid_page(known.values())
    fixed = []
    for function in functions:
        real = known.get(function.key)
        fixed.append(_cut(function, real))
    corrected = pack_cpuid_page(fixed)
    return None if corrected == page else corrected


_EXACT: Final = frozenset({0, 1, 0x8000_0000, 0x8000_0008})
"""Functions whose EAX is a name or a limit; EBX of the vendor leaves and the bit fields follow below."""


def _cut(function: CpuidFunction, real: CpuidFunction | None) -> CpuidFunction:
    if real is None:
        return function.replace(eax=0, ebx=0, ecx=0, edx=0)
    limit = function.eax_in in (0, 0x8000_0000)
    if limit:
        return real.replace(eax=min(function.eax, real.eax))
    eax = real.eax if function.eax_in in _EXACT or function.eax_in == 0x8000_0001 else function.eax & real.eax
    # EBX of function 1 holds the APIC id and the number of processors: the host's to say.
    ebx = function.ebx if function.eax_in == 1 else function.ebx & real.ebx
    return function.replace(eax=eax, ebx=ebx, ecx=function.ecx & real.ecx, edx=function.edx & real.edx)


def _with_id_block(context: GuestContext, block_bytes: bytes, auth_bytes: bytes, *, author_key: bool) -> GuestContext:
    if len(block_bytes) != IdBlock.SIZE or len(auth_bytes) != IdAuth.SIZE:
        raise refused(FirmwareStatus.INVALID_PARAM, "ID block or authentication data of the wrong size")
    block, auth = IdBlock.parse(block_bytes), IdAuth.parse(auth_bytes)
    if block.version != 1 or auth.id_key_algorithm != ALGORITHM_ECDSA_P384_SHA384:
        raise refused(FirmwareStatus.INVALID_PARAM, "unknown ID block version or algorithm")
    if author_key and auth.author_key_algorithm != ALGORITHM_ECDSA_P384_SHA384:
        raise refused(FirmwareStatus.INVALID_PARAM, "unknown author key algorithm")
    _verify(auth.id_key, auth.id_block_signature, block_bytes)
    if author_key:
        _verify(auth.author_key, auth.id_key_signature, auth.id_key.pack())
    if block.launch_digest != context.measurement:
        raise refused(FirmwareStatus.BAD_MEASUREMENT, "the guest is not the one that the ID block names")
    if block.policy != context.policy:
        raise refused(FirmwareStatus.POLICY_FAILURE, "the policy is not the one that the ID block names")
    return dataclasses.replace(
        context,
        family_id=block.family_id,
        image_id=block.image_id,
        guest_svn=block.guest_svn,
        id_key_digest=key_digest(auth.id_key),
        author_key_digest=key_digest(auth.author_key) if author_key else _NO_KEY,
        author_key_enabled=author_key,
    )


def _verify(key: PspPublicKey, signature: EcdsaSignature, message: bytes) -> None:
    if key.curve != CURVE_P384:
        raise refused(FirmwareStatus.INVALID_PARAM, "the ID or author key is not on P-384")
    r, s = signature.values
    try:
        public = ec.EllipticCurvePublicNumbers(*key.coordinates, ec.SECP384R1()).public_key()
        public.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        raise refused(FirmwareStatus.BAD_SIGNATURE, "an ID block signature does not verify") from None
