# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our message formats against the recorded sessions of COCONUT's aproxy (vectors/aproxy), byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest

from svsm.formats.errors import FormatError, ProtocolError, SvsmError
from svsm.formats.frames import FrameDecoder, encode_frame
from svsm.formats.kbs import AttestAnswer, AttestRequest, AuthAnswer, AuthRequest, Jwe, JweHeader
from svsm.formats.negotiation import (
    AttestationAnswer,
    AttestationRequest,
    NegotiationAnswer,
    NegotiationRequest,
)
from tests.support import vectors


def scenario(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((vectors("aproxy") / f"{name}.json").read_text())
    return loaded


def frames(name: str, sender: str) -> list[bytes]:
    return [e["json"].encode() for e in scenario(name)["events"] if e.get("from") == sender and "json" in e]


def bodies(name: str, sender: str) -> list[bytes]:
    return [e["body"].encode() for e in scenario(name)["events"] if e.get("from") == sender and "body" in e]


@pytest.mark.parametrize("name", ["success", "success-certs-buf", "attestation-certs-empty", "auth-nonce-64"])
def test_every_message_packs_to_the_recorded_bytes(name: str) -> None:
    first, request = frames(name, "svsm")
    challenge, answer = frames(name, "proxy")
    auth, attest, _ = bodies(name, "proxy")
    nonce, token, jwe = bodies(name, "kbs")

    assert NegotiationRequest.parse(first).pack() == first
    assert NegotiationAnswer.parse(challenge).pack() == challenge
    assert AuthRequest.parse(auth).pack() == auth
    assert AuthAnswer.parse(nonce).pack() == nonce
    assert AttestAnswer.parse(token).pack() == token
    assert Jwe.parse(jwe).pack() == jwe
    assert AttestationRequest.parse(request).pack() == request
    ours = AttestRequest.from_attestation(AttestationRequest.parse(request))
    # aproxy builds the evidence as a sorted map: ours writes the same order
    assert ours.pack() == attest
    assert AttestRequest.parse(attest) == ours

    # what a relay makes of the broker's two answers
    parsed = Jwe.parse(jwe)
    relayed = AttestationAnswer(
        success=True,
        secret=parsed.ciphertext,
        decryption=parsed.decryption(),
        token=AttestAnswer.parse(token).token,
    )
    assert relayed.pack() == answer
    assert AttestationAnswer.parse(answer) == relayed


def test_the_failure_frame_is_exactly_the_recorded_one() -> None:
    failure = frames("attest-403", "proxy")[-1]
    assert failure == AttestationAnswer(success=False).pack()
    assert AttestationAnswer.parse(failure) == AttestationAnswer(success=False)


def test_the_header_of_ours_is_the_one_that_survives_the_foreign_proxy() -> None:
    crypto = scenario("success")["crypto"]
    header = JweHeader.parse(crypto["protected_base64url"])
    assert header.protected() == crypto["protected_base64url"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attestation-certs-null", FormatError),
        ("attestation-evidence-unknown", FormatError),
        ("attestation-no-key", FormatError),
        ("attestation-report-unpadded", FormatError),
        ("attestation-report-urlsafe", FormatError),
        ("tee-changes", ProtocolError),
    ],
)
def test_attestation_requests_that_the_foreign_proxy_refuses(name: str, kind: type[SvsmError]) -> None:
    body = frames(name, "svsm")[1]
    with pytest.raises(kind):
        AttestationRequest.parse(body)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("negotiation-duplicate-member", FormatError),
        ("negotiation-malformed-json", FormatError),
        ("negotiation-trailing-bytes", FormatError),
        ("negotiation-as-array", FormatError),
        ("version-as-string", FormatError),
        ("version-four-parts", ProtocolError),
        ("version-0.1.1", ProtocolError),
        ("version-0.2.0", ProtocolError),
        ("version-1.0.0", ProtocolError),
        ("tee-tdx", ProtocolError),
        ("tee-unknown", ProtocolError),
        ("tee-uppercase", ProtocolError),
    ],
)
def test_negotiations_that_are_refused(name: str, kind: type[SvsmError]) -> None:
    with pytest.raises(kind):
        NegotiationRequest.parse(frames(name, "svsm")[0])


@pytest.mark.parametrize("name", ["auth-missing-extra-params", "auth-nonce-unpadded", "auth-nonce-urlsafe"])
def test_auth_answers_that_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        AuthAnswer.parse(bodies(name, "kbs")[0])


@pytest.mark.parametrize(
    "name",
    ["resource-compact-jwe", "resource-malformed-json", "resource-missing-tag", "resource-plain-secret"],
)
def test_resources_that_are_not_a_flattened_jwe(name: str) -> None:
    with pytest.raises(FormatError):
        Jwe.parse(bodies(name, "kbs")[2])


def test_extra_members_and_white_space_do_not_matter() -> None:
    for name in ("success-extra-members", "success-whitespace-in-json"):
        first, request = frames(name, "svsm")
        assert NegotiationRequest.parse(first) == NegotiationRequest()
        assert AttestationRequest.parse(request) == AttestationRequest.parse(frames("success", "svsm")[1])


@pytest.mark.parametrize("name", ["success", "success-whitespace-in-json"])
def test_the_recorded_length_prefixes(name: str) -> None:
    for event in scenario(name)["events"]:
        if "length_prefix" in event:
            body = event["json"].encode()
            frame = bytes.fromhex(event["length_prefix"]) + body
            assert encode_frame(body) == frame
            assert FrameDecoder().feed(frame) == [body]


@pytest.mark.parametrize(
    "name",
    ["length-big-endian", "oversized-length-2^62", "oversized-length-2^63", "oversized-length-64MiB"],
)
def test_recorded_lengths_that_are_refused_at_once(name: str) -> None:
    raw = next(bytes.fromhex(e["raw"]) for e in scenario(name)["events"] if "raw" in e)
    decoder = FrameDecoder()
    with pytest.raises(FormatError) as refused:
        decoder.feed(raw[:8])
    assert refused.value.code == "frame-too-long"
    assert decoder.pending_bytes == 8
