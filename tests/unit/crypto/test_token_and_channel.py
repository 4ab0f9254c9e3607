# SPDX-License-Identifier: MIT OR Apache-2.0
"""The signed token and the run-time channel's cryptography."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from svsm.crypto.ephemeral import EphemeralKey
from svsm.crypto.secure_channel import Opener, Sealer, derive_channel_keys
from svsm.crypto.token import SigningKey, verify_token
from svsm.formats.errors import FormatError, IntegrityError, SvsmError
from svsm.formats.release_token import ReleaseClaims, VolumeState
from svsm.formats.strict_json import base64_url, canonical, compact, from_base64_url, parse_object

KEY = SigningKey.generate()
P384_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


def test_a_token_verifies_under_its_key_only() -> None:
    token = KEY.sign_token(b'{"a":1}')
    verified = verify_token(token, public_der=KEY.public_der)
    assert verified.payload == b'{"a":1}'
    assert token.startswith(verified.signing_input.decode())
    with pytest.raises(IntegrityError) as other:
        verify_token(token, public_der=SigningKey.generate().public_der)
    assert other.value.code == "token-signature"


def test_an_independent_reading_of_the_signature() -> None:
    """ES384 (RFC 7518 §3.4): r ‖ s, 48 bytes each, over the ASCII of header.payload."""
    header, payload, signature = KEY.sign_token(b"x").split(".")
    raw = from_base64_url(signature, what="signature")
    public = serialization.load_der_public_key(KEY.public_der)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    der = encode_dss_signature(int.from_bytes(raw[:48], "big"), int.from_bytes(raw[48:], "big"))
    public.verify(der, f"{header}.{payload}".encode(), ec.ECDSA(hashes.SHA384()))
    assert parse_object(from_base64_url(header, what="header"), what="header", max_bytes=99).names == {"alg", "typ"}


def test_other_algorithms_with_the_same_key_are_not_tokens() -> None:
    private = serialization.load_der_private_key(KEY.to_der(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    for header in ({"alg": "ES384"}, {"alg": "ES384", "typ": "JWT"}, {"typ": "svsm-release+jws", "alg": "ES384"}):
        signing_input = base64_url(compact(header)) + "." + base64_url(b"{}")
        r, s = decode_dss_signature(private.sign(signing_input.encode(), ec.ECDSA(hashes.SHA384())))
        token = signing_input + "." + base64_url(r.to_bytes(48, "big") + s.to_bytes(48, "big"))
        with pytest.raises(IntegrityError):
            verify_token(token, public_der=KEY.public_der)


def test_a_malleable_signature_changes_nothing_that_is_believed() -> None:
    """(r, n-s) verifies too: the channel keys depend on what was signed, not on the signature."""
    token = KEY.sign_token(b"{}")
    signing_input, _, signature = token.rpartition(".")
    raw = from_base64_url(signature, what="signature")
    twin_s = P384_ORDER - int.from_bytes(raw[48:], "big")
    twin = f"{signing_input}.{base64_url(raw[:48] + twin_s.to_bytes(48, 'big'))}"
    first, second = (verify_token(t, public_der=KEY.public_der) for t in (token, twin))
    assert first == second


@given(st.text(max_size=60))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with pytest.raises(IntegrityError):
        verify_token(text, public_der=KEY.public_der)


def test_keys_of_other_kinds_are_refused() -> None:
    p256 = ec.generate_private_key(ec.SECP256R1())
    der = p256.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    for bad in (der, b"", b"x" * 120, KEY.public_der[:-1]):
        with pytest.raises(FormatError) as caught:
            verify_token(KEY.sign_token(b""), public_der=bad)
        assert caught.value.code == "token-key"
        with pytest.raises(FormatError):
            SigningKey.from_der(bad)
    assert SigningKey.from_der(KEY.to_der()).public_der == KEY.public_der


def test_claims_round_trip_and_are_strict() -> None:
    claims = ReleaseClaims(
        challenge=b"c" * 32,
        key_hash=b"h" * 32,
        volume_id="11111111-2222-3333-4444-555555555555",
        state=VolumeState.NEW,
        session=b"s" * 16,
        share_x=b"x" * 66,
        share_y=b"y" * 66,
        confirmation=b"m" * 32,
    )
    packed = claims.pack()
    assert ReleaseClaims.parse(packed) == claims
    assert "confirmation" in repr(claims)
    for old, new in ((b'"new"', b'"old"'), (b'"version":1', b'"version":2'), (b'"session":"73', b'"session":"7')):
        with pytest.raises(SvsmError):
            ReleaseClaims.parse(packed.replace(old, new))
    for end in range(0, len(packed), 7):
        with pytest.raises(SvsmError):
            ReleaseClaims.parse(packed[:end])


# --- the channel -----------------------------------------------------------------------------------------------


def pair() -> tuple[Sealer, Opener]:
    return Sealer(b"k" * 32), Opener(b"k" * 32)


def test_both_ends_derive_the_same_two_keys() -> None:
    kernel, broker = EphemeralKey.generate(), EphemeralKey.generate()
    one = derive_channel_keys(kernel.exchange(broker.x, broker.y), signing_input=b"t")
    two = derive_channel_keys(broker.exchange(kernel.x, kernel.y), signing_input=b"t")
    other = derive_channel_keys(broker.exchange(kernel.x, kernel.y), signing_input=b"u")
    assert one == two
    assert len({one.to_broker, one.to_kernel, other.to_broker, other.to_kernel}) == 4
    assert one.to_broker.hex() not in repr(one)


def test_messages_open_once_and_in_order() -> None:
    sealer, opener = pair()
    sealed = [sealer.seal(f"message {number}".encode())[1] for number in range(4)]
    assert opener.open(sealed[0]) == (0, b"message 0")
    assert opener.open(sealed[2]) == (2, b"message 2")
    for old in (sealed[0], sealed[1], sealed[2]):
        with pytest.raises(IntegrityError) as caught:
            opener.open(old)
        assert caught.value.code == "channel-replayed"
    assert opener.open(sealed[3]) == (3, b"message 3")


def test_every_flipped_bit_and_every_truncation_is_forged() -> None:
    sealer, _ = pair()
    _, sealed = sealer.seal(b"payload")
    for place in range(len(sealed)):
        for bit in (1, 128):
            changed = bytearray(sealed)
            changed[place] ^= bit
            with pytest.raises(IntegrityError) as caught:
                Opener(b"k" * 32).open(bytes(changed))
            assert caught.value.code == "channel-forged"
    for end in range(len(sealed)):
        with pytest.raises(IntegrityError):
            Opener(b"k" * 32).open(sealed[:end])


def test_a_forged_number_does_not_move_the_window() -> None:
    sealer, opener = pair()
    _, first = sealer.seal(b"a")
    with pytest.raises(IntegrityError):
        opener.open((1 << 40).to_bytes(8, "little") + first[8:])
    assert opener.open(first) == (0, b"a")


def test_another_directions_message_does_not_open() -> None:
    with pytest.raises(IntegrityError):
        Opener(b"j" * 32).open(pair()[0].seal(b"a")[1])


def test_canonical_is_sorted_and_compact() -> None:
    assert canonical({"b": 1, "a": {"d": "é", "c": []}}) == '{"a":{"c":[],"d":"é"},"b":1}'.encode()
