# SPDX-License-Identifier: MIT OR Apache-2.0
"""The key's way to the kernel, with the attacker in the proxy's seat; and the broker's front door.

The proxy knows every message of honest parties and no key. Whatever it makes of them, the kernel takes exactly the
volume key that the broker released for this attempt, or none; a token, a secret, a sealed frame is the honest one or
refused. The broker answers every request with a status and a body that say what happened, never with a 500.
"""

from __future__ import annotations

import datetime
import functools
import json
import socket
import tempfile
from pathlib import Path

from svsm.abi.platform import AttestationReport
from svsm.broker.app import BrokerApp
from svsm.broker.http import HttpLimits, Request, Response, _Conversation
from svsm.broker.service import Broker
from svsm.broker.sessions import Limits
from svsm.crypto import binding, jwe
from svsm.crypto.secure_channel import ChannelKeys, Opener, Sealer, derive_channel_keys
from svsm.crypto.token import verify_token
from svsm.formats import kbs
from svsm.formats.errors import SvsmError
from svsm.formats.negotiation import AttestationAnswer, AttestationRequest, ChannelFrame, NegotiationAnswer
from svsm.formats.release_token import ReleaseClaims, VolumeState
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged
from svsm.formats.settings import Settings
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Broken, Target, expect
from svsm.fuzz.targets.material import BORN, CONFIGURATION, broker_key, chip_machine, ephemeral
from svsm.kernel.attestation import AttestationClient
from svsm.kernel.runtime_channel import RuntimeChannel

__all__ = ["ROWS"]

_VOLUME_KEY = bytes(range(100, 132))
_CHALLENGE = b"c" * 32
_SESSION = b"s" * 16
_DIGEST = bytes(range(48))
_MAX_STEPS = 16


def _report(report_data: bytes, *, host_data: bytes | None = None, vmpl: int = 0) -> bytes:
    machine = chip_machine()
    report = machine.new_report(3).replace(
        report_data=report_data,
        host_data=CONFIGURATION.host_data() if host_data is None else host_data,
        measurement=_DIGEST,
        vmpl=vmpl,
        policy=0x3_0000,
        report_id_ma=b"\xff" * 32,
    )
    return machine.sign_report(report)


@functools.cache
def _evidence(challenge: bytes) -> bytes:
    key = ephemeral(1)
    return _report(binding.report_data(key.x, key.y, challenge))


@functools.cache
def _release(challenge: bytes, volume_id: str, number: int) -> tuple[str, kbs.Jwe]:
    """What an honest broker answers to the kernel's key number 1 (or to another)."""
    key, share = ephemeral(number), ephemeral(50)
    confirmation = binding.key_confirmation(_VOLUME_KEY, challenge=challenge, key_x=key.x, key_y=key.y)
    claims = ReleaseClaims(
        challenge=challenge,
        key_hash=binding.key_hash(key.x, key.y),
        volume_id=volume_id,
        state=VolumeState.ACTIVE,
        session=_SESSION,
        share_x=share.x,
        share_y=share.y,
        confirmation=confirmation,
    )
    token = broker_key().sign_token(claims.pack())
    return token, jwe.encrypt(_VOLUME_KEY, recipient_x=key.x, recipient_y=key.y, sender=ephemeral(60))


def _answer(challenge: bytes, volume_id: str = CONFIGURATION.volume_id, number: int = 1) -> bytes:
    token, secret = _release(challenge, volume_id, number)
    return AttestationAnswer(success=True, secret=secret.ciphertext, decryption=secret.decryption(), token=token).pack()


def _client(data: bytes) -> None:
    choices = Choices(data)
    client = AttestationClient(
        settings=Settings(broker_public_key=broker_key().public_der),
        configuration_json=CONFIGURATION.to_json(),
        key=ephemeral(1),
    )
    challenge = choices.pick((_CHALLENGE, b"d" * 64))
    honest = NegotiationAnswer(challenge=challenge, extensions=("channel",)).pack()
    answers = (
        _answer(challenge),
        _answer(b"x" * 32),
        _answer(challenge, "00000000-1111-2222-3333-555555555555"),
        _answer(challenge, number=2),
        AttestationAnswer(success=False, reason="broker-busy").pack(),
    )
    for _ in range(_MAX_STEPS):
        if not choices.more:
            break
        operation = choices.below(4)
        try:
            if operation == 0:
                client.start()
            elif operation == 1:
                client.negotiated(choices.edited(honest))
            elif operation == 2:
                evidence = choices.edited(_evidence(challenge)) if choices.flag() else _evidence(challenge)
                client.reported(AttestationReport(report=evidence, certificates=choices.blob(16)))
            else:
                body = answers[choices.below(len(answers))]
                release = client.answered(choices.edited(body))
                expect(release.volume_key == _VOLUME_KEY, "the key is the one that the broker released")
                expect(body == answers[0], "only the answer to this attempt is taken")
                expect(release.configuration == CONFIGURATION, "the configuration is the launched one")
                return
        except SvsmError:
            continue


_HONEST_STEPS = bytes([0, 0, 1, 0, 2, 0, 0, 3, 0, 0])


def _token(data: bytes) -> None:
    choices = Choices(data)
    token, _ = _release(_CHALLENGE, CONFIGURATION.volume_id, 1)
    text = choices.edited(token.encode()) if choices.flag() else choices.rest()
    found = verify_token(text.decode("latin-1"), public_der=broker_key().public_der)
    expect(found.signing_input == token.rpartition(".")[0].encode(), "only what was signed verifies")
    expect(ReleaseClaims.parse(found.payload).volume_id == CONFIGURATION.volume_id, "claims are the signed ones")


def _jwe(data: bytes) -> None:
    choices = Choices(data)
    _, honest = _release(_CHALLENGE, CONFIGURATION.volume_id, 1)
    secret = kbs.Jwe.parse(choices.edited(honest.pack()) if choices.flag() else choices.rest())
    plain = jwe.decrypt(secret.ciphertext, secret.decryption(), key=ephemeral(1))
    expect(plain == _VOLUME_KEY, "only what was encrypted decrypts")


def _channel(data: bytes) -> None:
    """The relay of the run-time channel: forge, replay, reorder, drop."""
    choices = Choices(data)
    keys = derive_channel_keys(b"z" * 66, signing_input=b"signed")
    kernel, broker = RuntimeChannel(keys), _Desk(keys)
    wire: list[bytes] = []
    answers: list[bytes] = []
    taken: list[FormattedAcknowledged] = []
    for _ in range(_MAX_STEPS):
        if not choices.more:
            break
        operation = choices.below(3)
        try:
            if operation == 0:
                _, body = kernel.request(Formatted(session=_SESSION, counter=bytes(16), root=b"r" * 32))
                wire.append(body)
            elif operation == 1 and wire:
                answers.append(broker.answer(choices.edited(choices.pick(wire))))
            elif operation == 2 and answers:
                found = kernel.answer(choices.edited(choices.pick(answers)))
                if not isinstance(found, FormattedAcknowledged):
                    raise Broken("nobody forges a refusal")
                taken.append(found)
        except SvsmError:
            continue
    numbers = [found.reply_to for found in taken]
    expect(numbers == sorted(set(numbers)), "each answer is taken once, in order")


class _Desk:
    """The broker's end, reduced to acknowledging."""

    def __init__(self, keys: ChannelKeys) -> None:
        self._opener, self._sealer = Opener(keys.to_broker), Sealer(keys.to_kernel)

    def answer(self, body: bytes) -> bytes:
        """Acknowledge what authenticates."""
        sequence, plain = self._opener.open(ChannelFrame.parse(body).sealed)
        expect(b'"counter"' in plain, "only what was sealed opens")
        found = FormattedAcknowledged(reply_to=sequence, session=_SESSION, counter=bytes(16), root=b"r" * 32)
        return ChannelFrame(sealed=self._sealer.seal(found.pack())[1]).pack()


# --- the broker ------------------------------------------------------------------------------------------------


class _Front:
    """A broker in a folder that is in memory where the machine has one; made anew after some requests."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)
        self.seconds = 1000.0
        self.broker = Broker.open(
            self._folder.name,
            limits=Limits(sessions=64),
            now=lambda: BORN + datetime.timedelta(days=30),
            clock=lambda: self.seconds,
        )
        root = f"simulated:{chip_machine().root_fingerprint.hex()}"
        self.broker.create_volume(CONFIGURATION, root=root, allowed=[_DIGEST], volume_key=_VOLUME_KEY)
        self.app = BrokerApp(self.broker)
        self.requests = 0

    def close(self) -> None:
        """Take the broker and its folder away."""
        self.broker.close()
        self._folder.cleanup()


_fronts: list[_Front] = []
_MAX_REQUESTS = 2000


def _front() -> _Front:
    if not _fronts or _fronts[0].requests > _MAX_REQUESTS:
        if _fronts:
            _fronts.pop().close()
        _fronts.append(_Front())
    front = _fronts[0]
    front.seconds += 3600  # what an earlier input left has expired
    return front


_STATUSES = {200, 400, 401, 403, 404, 405, 409, 429}


def _checked(front: _Front, request: Request) -> Response:
    front.requests += 1
    answer = front.app(request)
    expect(answer.status in _STATUSES, f"status {answer.status} is one of the protocol's")
    expect(isinstance(json.loads(answer.body), dict), "every answer is a JSON object")
    if answer.status != 200:
        expect(kbs.ErrorBody.code_of(answer.body) is not None, "an error says its code")
    expect(_VOLUME_KEY not in answer.body and _VOLUME_KEY.hex().encode() not in answer.body, "no key leaves in clear")
    return answer


def _broker(data: bytes) -> None:
    choices, front = Choices(data), _front()
    key = ephemeral(3)
    cookie, challenge, honest = "", b"", False
    for _ in range(_MAX_STEPS):
        if not choices.more:
            break
        operation = choices.below(5)
        if operation == 0:
            body = choices.edited(kbs.AuthRequest().pack())
            answer = _checked(front, Request("POST", kbs.AUTH_PATH, "", body))
            if answer.status == 200:
                challenge, honest = kbs.AuthAnswer.parse(answer.body).nonce, False
                cookie = dict(answer.headers)["Set-Cookie"].split(";")[0]
        elif operation == 1:
            report = _report(
                binding.report_data(key.x, key.y, challenge or _CHALLENGE), vmpl=int(choices.below(8) == 7)
            )
            whole = AttestationRequest(report, chip_machine().certificates(), challenge, key.x, key.y)
            clean = kbs.AttestRequest.from_attestation(whole).pack()
            body = choices.edited(clean)
            answer = _checked(front, Request("POST", kbs.ATTEST_PATH, cookie, body))
            honest = honest or answer.status == 200
            expect(body == clean or answer.status != 200 or _same_request(body, whole), "a changed report is refused")
        elif operation == 2:
            path = choices.edited(kbs.DEFAULT_RESOURCE_PATH.encode()).decode("latin-1")
            answer = _checked(front, Request("GET", path, cookie, b""))
            expect(answer.status != 200 or honest, "the key is for who attested")
        elif operation == 3:
            body = choices.edited(kbs.ChannelBody(frame=bytes(60)).pack())
            answer = _checked(front, Request("POST", kbs.CHANNEL_PATH, cookie, body))
            expect(answer.status != 200, "nobody without the channel's keys speaks on it")
        else:
            target = choices.pick(
                (kbs.AUTH_PATH, kbs.ATTEST_PATH, kbs.CHANNEL_PATH, "/", choices.blob(40).decode("latin-1"))
            )
            method = choices.pick(("GET", "POST", "PUT", "HEAD"))
            _checked(
                front, Request(method, target, choices.edited(cookie.encode()).decode("latin-1"), choices.blob(200))
            )


def _same_request(body: bytes, whole: AttestationRequest) -> bool:
    """Another spelling of the same report, or another certificate table with the same certificates, is no change."""
    found = kbs.AttestRequest.parse(body)
    return (found.nonce, found.key_x, found.key_y) == (whole.challenge, whole.key_x, whole.key_y)


_BROKER_SEEDS = [bytes([0, 0, 1, 0, 0, 2, 0]), bytes([0, 0, 2, 0, 3, 0, 4, 0, 1, 0, 0]), b"\4\4\5/abc"]


def _http(data: bytes) -> None:
    """Bytes on a connection: h11, the limits around it, and the application."""
    front = _front()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        seen: list[Request] = []

        def app(request: Request) -> Response:
            seen.append(request)
            return _checked(front, request)

        limits = HttpLimits(header_bytes=2048, body_bytes=4096, requests_per_connection=8, request_seconds=1.0)
        try:
            _Conversation(ours, app, limits).run()
        except Exception as error:
            # The server's thread ends here too, for these.
            ends = isinstance(error, OSError) or type(error).__name__ == "_Ended"
            if not ends and type(error).__module__.split(".")[0] != "h11":
                raise
        ours.close()
        expect(len(seen) <= limits.requests_per_connection, "a connection has its number of requests")
        expect(all(len(request.body) <= limits.body_bytes for request in seen), "a body has its limit")
        answered = b"".join(iter(lambda: theirs.recv(1 << 16), b""))
        expect(not answered or answered.startswith(b"HTTP/1.1 "), "what comes back is HTTP")
        expect(b" 500 " not in answered.split(b"\r\n", 1)[0], "no defect shows as 500")


def _http_seeds() -> list[bytes]:
    body = kbs.AuthRequest().pack()
    head = b"POST /kbs/v0/auth HTTP/1.1\r\nHost: b\r\nContent-Length: %d\r\n\r\n" % len(body)
    chunked = b"POST /kbs/v0/attest HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    get = b"GET /kbs/v0/resource/default/sample/test HTTP/1.1\r\nHost: b\r\nCookie: kbs-session-id=00\r\n\r\n"
    expecting = b"POST / HTTP/1.1\r\nHost: b\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx"
    return [head + body, head + body + get, chunked, get * 3, expecting]


ROWS = (
    Target(
        "attestation-client",
        "the kernel's attestation against a hostile proxy",
        _client,
        lambda: [_HONEST_STEPS, b"\1" + _HONEST_STEPS[1:]],
        max_bytes=512,
    ),
    Target("token", "the broker's signed token", _token, lambda: [b"\1", b"\0a.b.c"], max_bytes=2048),
    Target("jwe", "the encrypted volume key", _jwe, lambda: [b"\1"], max_bytes=2048),
    Target(
        "runtime-channel", "the sealed channel after the boot", _channel, lambda: [b"\0\1\0\0\2\0\0"], max_bytes=256
    ),
    Target("broker-requests", "sequences of requests to the broker", _broker, lambda: _BROKER_SEEDS, max_bytes=512),
    Target("broker-http", "bytes on a connection to the broker", _http, _http_seeds),
)
