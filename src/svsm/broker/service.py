# SPDX-License-Identifier: MIT OR Apache-2.0
"""The broker's decisions: who gets which volume's key, and when a volume stops being new.

A challenge is spent first. Then the evidence picks the row by its HOST_DATA, and is verified against that row's own
root and that row's own list of launch digests, over this challenge and this key. Anything that is wrong is a no.
The caller learns one word for everything that concerns authenticity; the audit trail has the check that failed. Only
a genuine report with a digest that is not on the list is told apart, because its owner must be able to act on it.
What is granted has a line in the trail each time; what strangers can repeat at will is counted (`svsm.broker.tally`).

The key leaves only as a JWE to the attested key, beside a token that the kernel verifies against the key pinned in
its image (svsm.formats.release_token has the claims).
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from svsm.broker.audit import AuditLine, verify_chain
from svsm.broker.keyfiles import private_directory, read_or_create
from svsm.broker.sessions import CHALLENGE_BYTES, BrokerChannel, Limits, Sessions
from svsm.broker.store import Store, Volume
from svsm.broker.tally import Kind, Tally
from svsm.broker.vault import Vault, new_vault_key
from svsm.broker.verifier import ReportPolicy, Roots, Verdict, verify_evidence
from svsm.crypto import binding, jwe
from svsm.crypto.digests import equal
from svsm.crypto.ephemeral import EphemeralKey, check_point
from svsm.crypto.secure_channel import derive_channel_keys
from svsm.crypto.token import SigningKey
from svsm.formats.errors import FormatError, PolicyError, StateError, SvsmError
from svsm.formats.kbs import AttestRequest
from svsm.formats.launch_configuration import LaunchConfiguration
from svsm.formats.release_token import ReleaseClaims, VolumeState
from svsm.formats.runtime_messages import FormattedAcknowledged, Refused, parse_request
from svsm.formats.snp.report import Report

__all__ = ["DATABASE_NAME", "DIGEST_BYTES", "VOLUME_KEY_BYTES", "Broker"]

DATABASE_NAME = "broker.sqlite"
SIGNING_KEY_NAME = "signing.key"
VAULT_KEY_NAME = "vault.key"
VOLUME_KEY_BYTES = 32
DIGEST_BYTES = 48


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Broker:
    """One broker over one state directory. Safe for threads; open it after a fork.

    Use `open`.
    """

    def __init__(
        self,
        *,
        store: Store,
        vault: Vault,
        signing_key: SigningKey,
        limits: Limits,
        now: Callable[[], datetime.datetime],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._vault = vault
        self._signing_key = signing_key
        self._sessions = Sessions(limits)
        self._tally = Tally(store, now=now, clock=clock)
        self._now = now
        self._clock = clock

    @classmethod
    def open(
        cls,
        state_dir: Path | str,
        *,
        limits: Limits | None = None,
        now: Callable[[], datetime.datetime] = _utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> Broker:
        """Open a broker's state, or make it: directory 0700, database, signing key and vault key 0600.

        Args:
            state_dir: The broker's own directory.
            limits: How much is kept in memory.
            now: Wall time with time zone: certificates' dates, audit trail.
            clock: Monotonic seconds: sessions.

        Raises:
            StateError, BackendError, IntegrityError, FormatError: ``broker-*``, ``token-key``.
        """
        folder = Path(state_dir)
        private_directory(folder)
        fresh = not (folder / DATABASE_NAME).exists()
        vault_key = read_or_create(folder / VAULT_KEY_NAME, new_vault_key, may_create=fresh)
        signing_key = read_or_create(
            folder / SIGNING_KEY_NAME, lambda: SigningKey.generate().to_der(), may_create=fresh
        )
        return cls(
            store=Store(folder / DATABASE_NAME, now=now),
            vault=Vault(vault_key),
            signing_key=SigningKey.from_der(signing_key),
            limits=limits or Limits(),
            now=now,
            clock=clock,
        )

    def close(self) -> None:
        """Write what is still only counted, and close the database."""
        try:
            self._tally.flush(everything=True)
        finally:
            self._store.close()

    def flush_audit(self) -> None:
        """Write the counts whose minute is over; whoever serves the broker calls it every few seconds.

        Raises:
            BackendError: ``broker-database``; what could not be written is still counted.
        """
        self._tally.flush()

    @property
    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo (DER) of the signing key: what an image's settings page pins."""
        return self._signing_key.public_der

    # --- the owner's side -------------------------------------------------------------------------------------

    def create_volume(
        self,
        configuration: LaunchConfiguration,
        *,
        root: str,
        allowed: Sequence[bytes] = (),
        volume_key: bytes | None = None,
    ) -> Volume:
        """Make a row in state *new*, with a fresh key.

        Args:
            configuration: The VM's launch configuration; its SHA-256 is the HOST_DATA that picks the row.
            root: Whose reports count: ``amd:Milan``, ``simulated:<fingerprint>``, …
            allowed: Launch digests, 48 bytes each.
            volume_key: 32 bytes; random by default.

        Raises:
            StateError: ``broker-volume-exists``, ``broker-digest`` or ``root-name``.
        """
        Roots.parse(root)
        for digest in allowed:
            _check_digest(digest)
        key = os.urandom(VOLUME_KEY_BYTES) if volume_key is None else volume_key
        if len(key) != VOLUME_KEY_BYTES:
            raise StateError("a volume key has 32 bytes", code="broker-volume-key", got=len(key))
        row = Volume(
            volume_id=configuration.volume_id,
            name=configuration.name,
            configuration=configuration.to_json(),
            host_data=configuration.host_data(),
            root=root,
            wrapped_key=self._vault.wrap(key, volume_id=configuration.volume_id),
            state=VolumeState.NEW,
            created_at="",
            attestations=0,
            last_session=None,
            birth=None,
        )
        self._store.add(row, digests=allowed)
        return self.volume(configuration.volume_id)

    def enrol(self, configuration: LaunchConfiguration, *, root: str, digest: bytes) -> tuple[Volume, bool]:
        """The row of a launch configuration; made, with `digest` on its list, only if there is none.

        An existing row is left as it is: a changed image must not admit itself, a new machine must not take over.

        Returns:
            The row, and whether it was made now.

        Raises:
            StateError: As `create_volume`.
        """
        found = self._store.by_host_data(configuration.host_data())
        if found is not None:
            return found, False
        return self.create_volume(configuration, root=root, allowed=[digest]), True

    def allow(self, volume: str, digest: bytes) -> bool:
        """Put a launch digest on a volume's list.

        Args:
            volume: Its id or name.
            digest: 48 bytes.

        Returns:
            False when it was there already.

        Raises:
            StateError: ``broker-volume-unknown``, ``broker-volume-ambiguous`` or ``broker-digest``.
        """
        _check_digest(digest)
        return self._store.allow(self.volume(volume).volume_id, digest)

    def volumes(self) -> list[Volume]:
        """All rows."""
        return self._store.volumes()

    def volume(self, volume: str) -> Volume:
        """One row by id or name.

        Raises:
            StateError: ``broker-volume-unknown`` or ``broker-volume-ambiguous``.
        """
        found = [row for row in self._store.volumes() if volume in (row.volume_id, row.name)]
        exact = [row for row in found if row.volume_id == volume] or found
        if not exact:
            raise StateError(
                "the broker has no such volume",
                code="broker-volume-unknown",
                hint="list them with: svsm broker volume show",
                volume=volume[:80],
            )
        if len(exact) > 1:
            raise StateError("several volumes have this name", code="broker-volume-ambiguous", volume=volume[:80])
        return exact[0]

    def allowed_digests(self, volume_id: str) -> list[bytes]:
        """A volume's launch digests."""
        return self._store.digests(volume_id)

    def audit_trail(self) -> list[AuditLine]:
        """The audit trail, checked.

        Raises:
            IntegrityError: ``broker-audit-chain``.
        """
        lines = self._store.audit_lines()
        verify_chain(lines)
        return lines

    # --- the wire's side --------------------------------------------------------------------------------------

    def challenge(self) -> tuple[bytes, bytes]:
        """A session (16 bytes) and its challenge (32 bytes); nothing is kept of them."""
        return self._sessions.challenge(self._clock())

    def attest(self, session: bytes, body: bytes) -> str:
        """Judge evidence; on success the session may fetch its secret.

        Args:
            session: From the cookie.
            body: Of /attest, as received.

        Returns:
            The signed token.

        Raises:
            ProtocolError: ``broker-session-unknown`` or ``broker-challenge-used``.
            PolicyError: ``broker-evidence-refused``, ``broker-measurement-not-allowed`` or ``broker-busy``.
            FormatError, ProtocolError: ``json-*``, ``kbs-*``, the request itself.
        """
        request: AttestRequest | None = None
        volume: Volume | None = None
        verdict: Verdict | None = None
        try:
            challenge = self._sessions.spend(session, self._clock())
            request = AttestRequest.parse(body)
            volume = self._row_of(request, challenge)
            verdict = self._verify(request, volume, challenge)
            report = verdict.require()
            volume = self._store.attested(
                volume.volume_id, session=session, measurement=report.measurement, details=_details(verdict)
            )
        except SvsmError as refusal:
            self._refused(refusal, session, volume, verdict)
            if request is None:
                raise
            raise _told(refusal, verdict) from None
        return self._release(session, request, volume)

    def resource(self, session: bytes) -> bytes:
        """The JWE for an attested session; the same bytes each time it is asked for.

        Raises:
            ProtocolError: ``broker-session-unknown`` or ``broker-not-attested``.
        """
        release = self._sessions.release(session, self._clock())
        if release.recorded:
            self._tally.again(Kind("release", None, release.volume_id))
        else:
            self._store.record("release", reason=None, volume_id=release.volume_id, session=session, details={})
            release.recorded = True
        return release.secret

    def channel(self, session: bytes, frame: bytes) -> bytes:
        """One message of the run-time channel.

        Args:
            session: From the cookie; picks the keys, proves nothing.
            frame: Sealed request.

        Returns:
            The sealed answer: an acknowledgement or an authenticated refusal.

        Raises:
            ProtocolError: ``broker-session-unknown``.
            PolicyError: ``broker-channel-refused`` when the frame is not authentic.
        """
        channel = self._sessions.channel(session)
        with channel.lock:
            try:
                sequence, plaintext = channel.opener.open(frame)
            except SvsmError as forged:
                self._tally.signed(Kind("channel", forged.code, channel.volume_id), session=session, details={})
                raise PolicyError("the message is refused", code="broker-channel-refused") from None
            _, sealed = channel.sealer.seal(self._answer(channel, sequence, plaintext))
            return sealed

    def _answer(self, channel: BrokerChannel, sequence: int, plaintext: bytes) -> bytes:
        try:
            message = parse_request(plaintext)
        except FormatError as error:
            return Refused(reply_to=sequence, reason=error.code).pack()
        if message.session != channel.session:
            self._tally.signed(
                Kind("formatted", "broker-other-session", channel.volume_id),
                session=channel.session,
                details={"claimed": message.session.hex()},
            )
            return Refused(reply_to=sequence, reason="broker-other-session").pack()
        reason = self._store.formatted(
            channel.volume_id, session=message.session, counter=message.counter, root=message.root
        )
        if reason is not None:
            return Refused(reply_to=sequence, reason=reason).pack()
        return FormattedAcknowledged(
            reply_to=sequence, session=message.session, counter=message.counter, root=message.root
        ).pack()

    def _refused(self, refusal: SvsmError, session: bytes, volume: Volume | None, verdict: Verdict | None) -> None:
        """Into the trail: as a line, or counted where strangers could repeat it without end."""
        volume_id = None if volume is None else volume.volume_id
        details = {"detail": str(refusal)[:400], **({} if verdict is None else _details(verdict))}
        if verdict is not None and verdict.authentic:
            self._tally.signed(Kind("attest", refusal.code, volume_id), session=session, details=details)
        else:
            self._tally.unsigned("attest", refusal.code, session=session, claimed=volume_id, details=details)

    def _row_of(self, request: AttestRequest, challenge: bytes) -> Volume:
        """The row that the evidence claims; what follows decides whether rightly."""
        if len(request.nonce) != CHALLENGE_BYTES or not equal(request.nonce, challenge):
            raise PolicyError("the evidence is for another challenge", code="broker-other-challenge")
        check_point(request.key_x, request.key_y)
        volume = self._store.by_host_data(Report.parse(request.report).host_data)
        if volume is None:
            raise PolicyError("no volume has this HOST_DATA", code="broker-no-volume")
        return volume

    def _verify(self, request: AttestRequest, volume: Volume, challenge: bytes) -> Verdict:
        return verify_evidence(
            request.report,
            request.certificates or b"",
            accepted_root=volume.root,
            expected_report_data=binding.report_data(request.key_x, request.key_y, challenge),
            allowed_measurements=self._store.digests(volume.volume_id),
            expected_host_data=volume.host_data,
            policy=ReportPolicy(),
            at=self._now(),
        )

    def _release(self, session: bytes, request: AttestRequest, volume: Volume) -> str:
        """Sign the token and prepare the secret."""
        volume_key = self._vault.unwrap(volume.wrapped_key, volume_id=volume.volume_id)
        share = EphemeralKey.generate()
        claims = ReleaseClaims(
            challenge=request.nonce,
            key_hash=binding.key_hash(request.key_x, request.key_y),
            volume_id=volume.volume_id,
            state=volume.state,
            session=session,
            share_x=share.x,
            share_y=share.y,
            confirmation=binding.key_confirmation(
                volume_key, challenge=request.nonce, key_x=request.key_x, key_y=request.key_y
            ),
        )
        token = self._signing_key.sign_token(claims.pack())
        keys = derive_channel_keys(
            share.exchange(request.key_x, request.key_y), signing_input=token.rpartition(".")[0].encode("ascii")
        )
        secret = jwe.encrypt(volume_key, recipient_x=request.key_x, recipient_y=request.key_y)
        self._sessions.attested(session, volume_id=volume.volume_id, secret=secret.pack(), keys=keys, now=self._clock())
        return token


def _check_digest(digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise StateError("a launch digest has 48 bytes", code="broker-digest", got=len(digest))


def _details(verdict: Verdict) -> dict[str, str]:
    found = {"check": verdict.detail[:400], "authentic": "yes" if verdict.authentic else "no"}
    if verdict.root_fingerprint is not None:
        found["root"] = verdict.root_fingerprint.hex()
    if verdict.report is not None:
        found["measurement"] = verdict.report.measurement.hex()
    return found


def _told(refusal: SvsmError, verdict: Verdict | None) -> PolicyError:
    """What the caller learns of a refusal."""
    unlisted = refusal.code == "broker-measurement-not-allowed" or (
        verdict is not None and verdict.authentic and verdict.reason == "report-measurement"
    )
    if unlisted:
        return PolicyError("the launch digest is not allowed", code="broker-measurement-not-allowed")
    return PolicyError("the evidence is refused", code="broker-evidence-refused")
