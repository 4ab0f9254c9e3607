# SPDX-License-Identifier: MIT OR Apache-2.0
"""The attestation client: from a fresh key to the volume key, believing nothing that the host says.

The wire is COCONUT's, through a proxy that the host runs. Of that wire the kernel does not believe

* what is to be hashed: `params` must be exactly the two names in their order, and the challenge 32 to 64 bytes, or
  else the host could buy a report over a key of its own;
* which volume this is: the launch configuration counts only if its SHA-256 is HOST_DATA in the kernel's own report;
* the secret: it counts only under a token that the pinned broker key signed, and only if that token is about this
  challenge, this key, this volume, and the confirmation shows that the signer knew the secret.

The order of the checks on the answer is fixed (boot-protocol.md §3.6): signature → challenge, key hash → volume id
→ unwrap → confirmation. The volume key leaves this module only after the last of them.

`AttestationClient` is the state machine, without I/O and good for one attempt (one ephemeral key each); `attest`
drives it over a channel.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol

from svsm.abi.errors import IntegrityError, PolicyError, ProtocolError, StateError
from svsm.abi.platform import AttestationReport
from svsm.crypto import binding, jwe
from svsm.crypto.digests import equal, sha256
from svsm.crypto.ephemeral import EphemeralKey
from svsm.crypto.secure_channel import derive_channel_keys
from svsm.crypto.token import VerifiedToken, verify_token
from svsm.formats.launch_configuration import LaunchConfiguration
from svsm.formats.negotiation import (
    CHANNEL_EXTENSION,
    PARAMETERS,
    AttestationAnswer,
    AttestationRequest,
    NegotiationAnswer,
    NegotiationRequest,
)
from svsm.formats.release_token import ReleaseClaims, VolumeState
from svsm.formats.settings import Settings
from svsm.formats.snp.report import Report
from svsm.kernel.channels.stream import FramedChannel
from svsm.kernel.runtime_channel import RuntimeChannel

__all__ = ["VOLUME_KEY_BYTES", "AttestationClient", "Release", "ReportSource", "attest"]

VOLUME_KEY_BYTES = 32
_CHALLENGE_BYTES = range(32, 65)


class ReportSource(Protocol):
    """The part of `Platform` that attestation needs."""

    def report(self, report_data: bytes) -> AttestationReport:
        """A VMPL0 report over 64 bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """What a completed attestation gives."""

    volume_key: bytes = dataclasses.field(repr=False)
    """32 bytes."""
    configuration: LaunchConfiguration
    """Authenticated by HOST_DATA."""
    state: VolumeState
    session: bytes
    """16 bytes, names this attestation at the broker."""
    runtime: RuntimeChannel | None
    """None behind a foreign proxy, which relays nothing after the key."""


class _Step(enum.Enum):
    START = enum.auto()
    NEGOTIATING = enum.auto()
    REPORTING = enum.auto()
    ATTESTING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class AttestationClient:
    """One attempt.

    Args:
        settings: The owner's settings, from the measured page.
        configuration_json: The launch configuration's bytes, not yet believed.
        key: The attempt's ephemeral key; fresh by default, and never to be used again.
    """

    def __init__(self, *, settings: Settings, configuration_json: bytes, key: EphemeralKey | None = None) -> None:
        self._settings = settings
        self._configuration_json = configuration_json
        self._key = key or EphemeralKey.generate()
        self._step = _Step.START
        self._challenge = b""
        self._foreign = True
        self._configuration: LaunchConfiguration | None = None
        self._measurement = b""

    @property
    def foreign(self) -> bool:
        """Whether the proxy is one that doesn't know our extension (known after the negotiation)."""
        return self._foreign

    def start(self) -> bytes:
        """Body of the first frame to send."""
        self._advance(_Step.START, _Step.NEGOTIATING)
        return NegotiationRequest(extensions=(CHANNEL_EXTENSION,)).pack()

    def negotiated(self, body: bytes) -> bytes:
        """Take the proxy's first answer.

        Returns:
            REPORT_DATA to have a report over, 64 bytes.

        Raises:
            FormatError: ``json-*``.
            ProtocolError: ``attestation-params`` or ``attestation-challenge``; nothing is hashed then.
        """
        self._advance(_Step.NEGOTIATING, _Step.FAILED)
        answer = NegotiationAnswer.parse(body)
        if answer.parameters != PARAMETERS:
            raise ProtocolError(
                "the host chose what the report should cover",
                code="attestation-params",
                expected=",".join(PARAMETERS),
                got=",".join(answer.parameters)[:80],
            )
        if len(answer.challenge) not in _CHALLENGE_BYTES:
            raise ProtocolError(
                "the challenge has an unacceptable length",
                code="attestation-challenge",
                expected="32 to 64",
                got=len(answer.challenge),
            )
        self._challenge = answer.challenge
        self._foreign = CHANNEL_EXTENSION not in answer.extensions
        self._step = _Step.REPORTING
        return binding.report_data(self._key.x, self._key.y, self._challenge)

    def reported(self, evidence: AttestationReport) -> bytes:
        """Take the chip's report.

        Returns:
            Body of the second frame to send.

        Raises:
            FormatError: ``record-length``, or the launch configuration's own codes once it is authentic.
            IntegrityError: ``attestation-report`` when the report is not over this attempt,
                ``attestation-launch-configuration`` when the configuration is not the one it was launched with.
        """
        self._advance(_Step.REPORTING, _Step.FAILED)
        report = Report.parse(evidence.report)
        wanted = binding.report_data(self._key.x, self._key.y, self._challenge)
        if not equal(report.report_data, wanted) or report.vmpl != 0:
            raise IntegrityError("the report is not the one that was asked for", code="attestation-report")
        if not equal(sha256(self._configuration_json), report.host_data):
            raise IntegrityError(
                "the launch configuration is not the one that this VM was launched with",
                code="attestation-launch-configuration",
                hint="HOST_DATA of the launch must be the SHA-256 of the launch configuration",
            )
        self._configuration = LaunchConfiguration.parse(self._configuration_json)
        self._measurement = report.measurement
        self._step = _Step.ATTESTING
        return AttestationRequest(
            report=evidence.report,
            certificates=evidence.certificates or None,
            challenge=self._challenge,
            key_x=self._key.x,
            key_y=self._key.y,
        ).pack()

    def answered(self, body: bytes) -> Release:
        """Take the proxy's second answer.

        Raises:
            FormatError: ``json-*``, ``token-claims``, ``token-key``, ``key-point``.
            PolicyError: ``attestation-refused``.
            ProtocolError: ``attestation-incomplete``.
            IntegrityError: ``attestation-no-token``, ``token-signature``, ``attestation-other-challenge``,
                ``attestation-other-key``, ``attestation-other-volume``, ``jwe-decrypt``,
                ``attestation-confirmation``.
        """
        self._advance(_Step.ATTESTING, _Step.FAILED)
        answer = AttestationAnswer.parse(body)
        if not answer.success:
            volume_id = self._configuration.volume_id if self._configuration else ""
            raise _refusal(answer.reason, volume_id, self._measurement)
        token = self._authentic(answer)
        claims = ReleaseClaims.parse(token.payload)
        configuration = self._about_this_attempt(claims)
        volume_key = self._unwrapped(answer, claims)
        runtime = None
        if not self._foreign:
            z = self._key.exchange(claims.share_x, claims.share_y)
            runtime = RuntimeChannel(derive_channel_keys(z, signing_input=token.signing_input))
        self._step = _Step.DONE
        return Release(
            volume_key=volume_key,
            configuration=configuration,
            state=claims.state,
            session=claims.session,
            runtime=runtime,
        )

    def _authentic(self, answer: AttestationAnswer) -> VerifiedToken:
        if answer.token is None:
            raise IntegrityError(
                "the key came without the broker's signed token",
                code="attestation-no-token",
                hint="use a broker that signs its answers (svsm broker serve)",
            )
        return verify_token(answer.token, public_der=self._settings.broker_public_key)

    def _about_this_attempt(self, claims: ReleaseClaims) -> LaunchConfiguration:
        if not equal(claims.challenge, self._challenge):
            raise IntegrityError("the token answers another challenge", code="attestation-other-challenge")
        if not equal(claims.key_hash, binding.key_hash(self._key.x, self._key.y)):
            raise IntegrityError("the token is for another key", code="attestation-other-key")
        if self._configuration is None or claims.volume_id != self._configuration.volume_id:
            raise IntegrityError("the token is for another volume", code="attestation-other-volume")
        return self._configuration

    def _unwrapped(self, answer: AttestationAnswer, claims: ReleaseClaims) -> bytes:
        if answer.secret is None or answer.decryption is None:
            raise ProtocolError("the answer claims success and brings no key", code="attestation-incomplete")
        volume_key = jwe.decrypt(answer.secret, answer.decryption, key=self._key)
        confirmation = binding.key_confirmation(
            volume_key, challenge=self._challenge, key_x=self._key.x, key_y=self._key.y
        )
        if not equal(confirmation, claims.confirmation) or len(volume_key) != VOLUME_KEY_BYTES:
            raise IntegrityError(
                "the key that came is not the one that the broker's token speaks of", code="attestation-confirmation"
            )
        return volume_key

    def _advance(self, wanted: _Step, following: _Step) -> None:
        # Until a step has succeeded the attempt counts as failed: its key must not serve a second try.
        if self._step is not wanted:
            raise StateError(
                "an attestation attempt was used out of order",
                code="attestation-order",
                expected=wanted.name,
                got=self._step.name,
            )
        self._step = following


def attest(
    line: FramedChannel,
    platform: ReportSource,
    *,
    settings: Settings,
    configuration_json: bytes,
    deadline: float,
) -> Release:
    """Make one attempt over `line`.

    Args:
        line: The frames of the serial line; stays open for the run-time channel.
        platform: Where reports come from.
        settings: The owner's settings, from the measured page.
        configuration_json: The launch configuration's bytes, not yet believed.
        deadline: For the whole attempt, `time.monotonic` seconds.

    Raises:
        SvsmError: Everything that the steps of `AttestationClient`, the line and the platform raise.
    """
    client = AttestationClient(settings=settings, configuration_json=configuration_json)
    line.send(client.start(), deadline=deadline)
    report_data = client.negotiated(line.receive(deadline=deadline))
    request = client.reported(platform.report(report_data))
    line.send(request, deadline=deadline)
    return client.answered(line.receive(deadline=deadline))


def _refusal(reason: str | None, volume_id: str, measurement: bytes) -> PolicyError:
    hint = "the broker's audit trail names the check that failed: svsm broker audit"
    if reason == "broker-measurement-not-allowed":
        hint = (
            "this image's launch digest is not on the volume's list; if you trust the image: "
            f"svsm broker volume allow {volume_id} {measurement.hex()}"
        )
    return PolicyError("the broker does not release the key", code="attestation-refused", hint=hint, reason=reason)
