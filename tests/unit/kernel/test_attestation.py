# SPDX-License-Identifier: MIT OR Apache-2.0
"""The attestation client against an honest and against every dishonest proxy: boot-protocol.md §3."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from svsm.crypto import binding, jwe
from svsm.crypto.ephemeral import EphemeralKey
from svsm.crypto.token import SigningKey
from svsm.formats.errors import IntegrityError, PolicyError, ProtocolError, StateError, SvsmError
from svsm.formats.negotiation import AttestationAnswer, AttestationRequest, NegotiationAnswer
from svsm.formats.release_token import ReleaseClaims, VolumeState
from svsm.formats.strict_json import base64_std, base64_url, compact, from_base64_url
from svsm.kernel.attestation import AttestationClient
from tests.key_support import Chip, Desk, Relay, configuration, run


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "broker")


def refused(client: AttestationClient, chip: Chip, relay: Relay) -> SvsmError:
    with pytest.raises(SvsmError) as caught:
        run(client, chip, relay)
    return caught.value


def test_honest_parties_agree(desk: Desk) -> None:
    release, _ = desk.attest()
    assert len(release.volume_key) == 32
    assert release.state is VolumeState.NEW
    assert release.configuration == desk.configuration
    assert release.runtime is not None
    again, _ = desk.attest()
    assert again.volume_key == release.volume_key
    assert again.session != release.session
    assert release.volume_key.hex() not in repr(release)


def test_no_step_twice_and_none_after_a_failure(desk: Desk) -> None:
    client, relay, chip = desk.client(), desk.relay(), desk.chip()
    with pytest.raises(StateError):
        client.negotiated(b"{}")
    answer = relay.negotiate(client.start())
    with pytest.raises(StateError):
        client.start()
    with pytest.raises(SvsmError):
        client.negotiated(b"{}")
    with pytest.raises(StateError) as spent:
        client.negotiated(answer)
    assert spent.value.code == "attestation-order"
    assert chip.reports == 0


@pytest.mark.parametrize(
    "params",
    [
        (),
        ("Challenge",),
        ("EcPublicKeyBytes",),
        ("Challenge", "EcPublicKeyBytes"),
        ("EcPublicKeyBytes", "Challenge", "Challenge"),
        ("EcPublicKeyBytes", "EcPublicKeyBytes", "Challenge"),
        ("EcPublicKeyBytes", "Challenge", "Other"),
        ("ecpublickeybytes", "challenge"),
    ],
)
def test_the_host_does_not_choose_what_is_hashed(desk: Desk, params: tuple[str, ...]) -> None:
    class Host(Relay):
        def negotiate(self, body: bytes) -> bytes:
            honest = NegotiationAnswer.parse(super().negotiate(body))
            return dataclasses.replace(honest, parameters=params).pack()

    chip = desk.chip()
    error = refused(desk.client(), chip, Host(desk.relay().app))
    assert (error.code, chip.reports) == ("attestation-params", 0)


def test_a_report_over_the_hosts_own_key_cannot_be_bought(desk: Desk) -> None:
    """["Challenge"] with x'‖y'‖nonce as the challenge, 164 bytes; and the same under honest params."""
    own = EphemeralKey.generate()
    nonce = b"n" * 32
    for params in (("Challenge",), ("EcPublicKeyBytes", "Challenge")):

        class Host(Relay):
            parameters = params

            def negotiate(self, body: bytes) -> bytes:
                return NegotiationAnswer(challenge=own.x + own.y + nonce, parameters=self.parameters).pack()

        chip = desk.chip()
        error = refused(desk.client(), chip, Host(desk.relay().app))
        assert error.code in ("attestation-params", "attestation-challenge")
        assert chip.reports == 0


@pytest.mark.parametrize("length", [0, 1, 31, 65, 98, 164, 1024])
def test_challenges_of_other_lengths(desk: Desk, length: int) -> None:
    client = desk.client()
    client.start()
    with pytest.raises(ProtocolError) as caught:
        client.negotiated(NegotiationAnswer(challenge=bytes(length)).pack())
    assert caught.value.code == "attestation-challenge"


@pytest.mark.parametrize("length", [32, 48, 64])
def test_challenges_of_accepted_lengths_are_hashed_in_our_order(desk: Desk, length: int) -> None:
    key = EphemeralKey.generate()
    client = AttestationClient(settings=desk.settings, configuration_json=desk.configuration.to_json(), key=key)
    client.start()
    data = client.negotiated(NegotiationAnswer(challenge=b"c" * length).pack())
    assert data == binding.report_data(key.x, key.y, b"c" * length)


def test_another_launch_configuration_than_the_reports(desk: Desk) -> None:
    other = configuration()
    client = AttestationClient(settings=desk.settings, configuration_json=other.to_json())
    error = refused(client, desk.chip(), desk.relay())
    assert (type(error), error.code) == (IntegrityError, "attestation-launch-configuration")


def test_the_configuration_is_not_parsed_before_it_is_authentic(desk: Desk) -> None:
    client = AttestationClient(settings=desk.settings, configuration_json=b"[" * 1000)
    assert refused(client, desk.chip(), desk.relay()).code == "attestation-launch-configuration"


@pytest.mark.parametrize("vmpl", [1, 3, 0xFFFFFFFF])
def test_a_report_that_is_not_ours(desk: Desk, vmpl: int) -> None:
    chip = dataclasses.replace(desk.chip(), vmpl=vmpl)
    assert refused(desk.client(), chip, desk.relay()).code == "attestation-report"


def test_a_report_over_something_else(desk: Desk) -> None:
    class Elsewhere(Chip):
        def report(self, report_data: bytes):  # type: ignore[no-untyped-def]
            return super().report(bytes(64))

    chip = Elsewhere(host_data=desk.configuration.host_data())
    assert refused(desk.client(), chip, desk.relay()).code == "attestation-report"


def test_no_from_the_broker_has_a_hint(desk: Desk) -> None:
    chip = dataclasses.replace(desk.chip(), measurement=b"x" * 48)
    error = refused(desk.client(), chip, desk.relay())
    assert (type(error), error.code, error.exit_code) == (PolicyError, "attestation-refused", 3)
    assert error.details["reason"] == "broker-measurement-not-allowed"
    command = f"svsm broker volume allow {desk.configuration.volume_id} {(b'x' * 48).hex()}"
    assert (error.hint or "").endswith(command)


# --- the answer ------------------------------------------------------------------------------------------------


class Swap(Relay):
    """Changes the answer by a function."""

    def __init__(self, desk: Desk, change: object) -> None:
        super().__init__(desk.relay().app)
        self.change = change

    def attest(self, body: bytes) -> bytes:
        answer = AttestationAnswer.parse(super().attest(body))
        changed: AttestationAnswer = self.change(answer)  # type: ignore[operator]
        return changed.pack()


def answer_code(desk: Desk, change: object) -> str:
    return refused(desk.client(), desk.chip(), Swap(desk, change)).code


def test_missing_token(desk: Desk) -> None:
    assert answer_code(desk, lambda a: dataclasses.replace(a, token=None)) == "attestation-no-token"


def test_success_without_a_key(desk: Desk) -> None:
    assert answer_code(desk, lambda a: dataclasses.replace(a, secret=None)) == "attestation-incomplete"
    assert answer_code(desk, lambda a: dataclasses.replace(a, decryption=None)) == "attestation-incomplete"


def test_token_of_another_broker(desk: Desk, tmp_path: Path) -> None:
    other = SigningKey.generate()

    def resign(answer: AttestationAnswer) -> AttestationAnswer:
        payload = from_base64_url((answer.token or "").split(".")[1], what="payload")
        return dataclasses.replace(answer, token=other.sign_token(payload))

    assert answer_code(desk, resign) == "token-signature"


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        "..",
        "x" * 20000,
        base64_url(compact({"alg": "none"})) + "." + base64_url(b"{}") + ".",
        base64_url(compact({"alg": "HS256", "typ": "JWT"})) + "." + base64_url(b"{}") + "." + base64_url(bytes(32)),
    ],
)
def test_tokens_that_are_none(desk: Desk, token: str) -> None:
    assert answer_code(desk, lambda a: dataclasses.replace(a, token=token)) == "token-signature"


def test_every_part_of_the_token_is_signed(desk: Desk) -> None:
    def flip(part: int, place: int) -> object:
        def change(answer: AttestationAnswer) -> AttestationAnswer:
            parts = (answer.token or "").split(".")
            text = parts[part]
            parts[part] = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
            return dataclasses.replace(answer, token=".".join(parts))

        return change

    for part in range(3):
        for place in (0, 5, 20):
            assert answer_code(desk, flip(part, place)) == "token-signature"


def test_replayed_token_and_answer(desk: Desk) -> None:
    recorded: list[AttestationAnswer] = []

    def record(answer: AttestationAnswer) -> AttestationAnswer:
        recorded.append(answer)
        return answer

    run(desk.client(), desk.chip(), Swap(desk, record))
    assert answer_code(desk, lambda a: recorded[0]) == "attestation-other-challenge"
    only_token = lambda a: dataclasses.replace(a, token=recorded[0].token)  # noqa: E731
    assert answer_code(desk, only_token) == "attestation-other-challenge"


def test_the_proxy_swaps_the_ephemeral_key(desk: Desk) -> None:
    """The broker refuses: the report is not over the proxy's key."""
    own = EphemeralKey.generate()

    class Host(Relay):
        def attest(self, body: bytes) -> bytes:
            request = AttestationRequest.parse(body)
            return super().attest(dataclasses.replace(request, key_x=own.x, key_y=own.y).pack())

    error = refused(desk.client(), desk.chip(), Host(desk.relay().app))
    assert (error.code, error.details["reason"]) == ("attestation-refused", "broker-evidence-refused")
    assert "report-data" in desk.reasons()


def test_a_token_for_another_key_is_refused(desk: Desk) -> None:
    """Even a genuine signature over the right challenge does not help, if it speaks of another key."""

    def change(answer: AttestationAnswer) -> AttestationAnswer:
        return dataclasses.replace(answer, token=reissue(desk, answer, key_hash=bytes(32)))

    assert answer_code(desk, change) == "attestation-other-key"


def test_a_token_for_another_volume_is_refused(desk: Desk) -> None:
    def change(answer: AttestationAnswer) -> AttestationAnswer:
        return dataclasses.replace(answer, token=reissue(desk, answer, volume_id=configuration().volume_id))

    assert answer_code(desk, change) == "attestation-other-volume"


def test_the_proxy_swaps_only_the_jwe_under_a_genuine_token(desk: Desk) -> None:
    class Host(Relay):
        def attest(self, body: bytes) -> bytes:
            request = AttestationRequest.parse(body)
            forged = jwe.encrypt(b"h" * 32, recipient_x=request.key_x, recipient_y=request.key_y)
            answer = AttestationAnswer.parse(super().attest(body))
            return dataclasses.replace(answer, secret=forged.ciphertext, decryption=forged.decryption()).pack()

    error = refused(desk.client(), desk.chip(), Host(desk.relay().app))
    assert (type(error), error.code) == (IntegrityError, "attestation-confirmation")


def test_a_key_of_another_length_is_refused_even_if_confirmed(desk: Desk) -> None:
    class Host(Relay):
        def attest(self, body: bytes) -> bytes:
            request = AttestationRequest.parse(body)
            short = b"k" * 16
            forged = jwe.encrypt(short, recipient_x=request.key_x, recipient_y=request.key_y)
            answer = AttestationAnswer.parse(super().attest(body))
            confirmation = binding.key_confirmation(
                short, challenge=request.challenge, key_x=request.key_x, key_y=request.key_y
            )
            token = reissue(desk, answer, confirmation=confirmation)
            return dataclasses.replace(
                answer, secret=forged.ciphertext, decryption=forged.decryption(), token=token
            ).pack()

    assert refused(desk.client(), desk.chip(), Host(desk.relay().app)).code == "attestation-confirmation"


@pytest.mark.parametrize("part", ["epk_x", "epk_y", "wrapped_cek", "aad", "iv", "tag"])
def test_every_part_of_the_encrypted_key_counts(desk: Desk, part: str) -> None:
    def change(answer: AttestationAnswer) -> AttestationAnswer:
        parts = answer.decryption
        assert parts is not None
        value: bytes = getattr(parts, part)
        flipped = value[:-1] + bytes([value[-1] ^ 1])
        return dataclasses.replace(answer, decryption=dataclasses.replace(parts, **{part: flipped}))

    def cut(answer: AttestationAnswer) -> AttestationAnswer:
        parts = answer.decryption
        assert parts is not None
        return dataclasses.replace(answer, decryption=dataclasses.replace(parts, **{part: getattr(parts, part)[:-1]}))

    assert answer_code(desk, change) == "jwe-decrypt"
    assert answer_code(desk, cut) == "jwe-decrypt"


def test_the_order_of_the_checks(desk: Desk) -> None:
    """A token that is wrong in everything is refused for the earliest reason, one fault removed after another."""
    foreign = configuration().volume_id
    faults: dict[str, object] = {
        "challenge": b"x" * 32,
        "key_hash": bytes(32),
        "volume_id": foreign,
        "confirmation": bytes(32),
    }
    codes = [
        "attestation-other-challenge",
        "attestation-other-key",
        "attestation-other-volume",
        "attestation-confirmation",
    ]
    for number, code in enumerate(codes):
        left = dict(list(faults.items())[number:])

        def change(answer: AttestationAnswer, left: dict[str, object] = left) -> AttestationAnswer:
            return dataclasses.replace(answer, token=reissue(desk, answer, **left))

        assert answer_code(desk, change) == code
    unsigned = lambda a: dataclasses.replace(a, token=(a.token or "")[:-4] + "AAAA")  # noqa: E731
    assert answer_code(desk, unsigned) == "token-signature"


def test_a_foreign_proxy_gives_the_key_and_no_channel(desk: Desk) -> None:
    relay = Relay(desk.relay().app, extensions=())
    client = desk.client()
    release = run(client, desk.chip(), relay)
    assert client.foreign
    assert release.runtime is None


def test_a_host_may_claim_another_extension(desk: Desk) -> None:
    client = desk.client()
    client.start()
    client.negotiated(NegotiationAnswer(challenge=bytes(32), extensions=("chan",)).pack())
    assert client.foreign


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"success":true}',
        b'{"success":false,"reason":"' + b"x" * 100000 + b'"}',
        b'{"success":true,"secret":"","decryption":null,"token":{"Cwt":"x"}}',
        compact({"success": True, "secret": base64_std(b"x"), "decryption": {"epk": {}}, "token": {"Jwt": "x"}}),
    ],
)
def test_hostile_answers(desk: Desk, body: bytes) -> None:
    class Host(Relay):
        def attest(self, _: bytes) -> bytes:
            return body

    refused(desk.client(), desk.chip(), Host(desk.relay().app))


def reissue(desk: Desk, answer: AttestationAnswer, **changes: object) -> str:
    """The broker's signature over changed claims: what only a broker that errs could send."""
    payload = from_base64_url((answer.token or "").split(".")[1], what="payload")
    claims = dataclasses.replace(ReleaseClaims.parse(payload), **changes)  # type: ignore[arg-type]
    signing_key = SigningKey.from_der((desk.folder / "signing.key").read_bytes())
    return signing_key.sign_token(claims.pack())
