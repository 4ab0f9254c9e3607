# SPDX-License-Identifier: MIT OR Apache-2.0
"""The key exchange's recipes against recorded and published values.

Origins: vectors/aproxy/success.json (a recorded session; every intermediate value is in it, and jwcrypto opened the
same JWE); RFC 5869 appendix A.1 and A.3 (HKDF); RFC 7518 appendix C (Concat KDF, on its own Z).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

from svsm.crypto import binding, jwe
from svsm.crypto.ephemeral import EphemeralKey, check_point
from svsm.crypto.kdf import concat_kdf, hkdf
from svsm.formats.errors import FormatError, IntegrityError
from svsm.formats.kbs import Jwe, JweHeader
from svsm.formats.negotiation import AttestationAnswer, Decryption
from tests.support import vectors


def recorded(name: str = "success") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((vectors("aproxy") / f"{name}.json").read_text())
    return loaded


def private(numbers: dict[str, str]) -> EphemeralKey:
    return EphemeralKey(ec.derive_private_key(int(numbers["d"], 16), ec.SECP521R1()))


def test_every_recorded_intermediate_value() -> None:
    crypto = recorded()["crypto"]
    kernel, broker = private(crypto["svsm_private_key_p521"]), private(crypto["kbs_ephemeral_private_key_p521"])
    assert kernel.x.hex() == crypto["svsm_private_key_p521"]["x"]
    assert broker.y.hex() == crypto["kbs_ephemeral_private_key_p521"]["y"]
    z = bytes.fromhex(crypto["z"])
    assert kernel.exchange(broker.x, broker.y) == broker.exchange(kernel.x, kernel.y) == z
    assert concat_kdf(z, algorithm=b"ECDH-ES+A256KW", length=32).hex() == crypto["kek"]
    challenge = bytes.fromhex(crypto["challenge"])
    assert binding.report_data(kernel.x, kernel.y, challenge).hex() == crypto["report_data"]
    values = iter([bytes.fromhex(crypto["cek"]), bytes.fromhex(crypto["iv"])])
    made = jwe.encrypt(
        bytes.fromhex(crypto["plaintext"]),
        recipient_x=kernel.x,
        recipient_y=kernel.y,
        sender=broker,
        random=lambda length: next(values),
    )
    body = next(e["body"] for e in reversed(recorded()["events"]) if e.get("from") == "kbs")
    assert made.pack().decode() == body
    assert made.protected == crypto["protected_base64url"]
    assert made.encrypted_key.hex() == crypto["wrapped_cek"]


STRICTER = {"jwe-alg-enc-unknown", "jwe-epk-crv-p256", "jwe-duplicate-extra", "jwe-sorted-extra-before-epk"}
"""Headers that COCONUT's kernel would open and ours refuses: another algorithm or curve, a member twice,
`apu` and `apv` (empty there, but whoever writes them must mean something by them)."""


def opens(ciphertext: bytes | None, parts: Decryption | None, expected: str) -> bool:
    assert ciphertext is not None
    assert parts is not None
    kernel = private(recorded()["crypto"]["svsm_private_key_p521"])
    try:
        plaintext = jwe.decrypt(ciphertext, parts, key=kernel)
    except IntegrityError:
        return False
    assert plaintext.hex() == expected
    return True


def test_every_recorded_header_opens_as_delivered_exactly_where_the_record_says() -> None:
    expected = recorded()["crypto"]["plaintext"]
    judged = 0
    for path in sorted(vectors("aproxy").glob("jwe-*.json")):
        scenario = recorded(path.stem)
        about = scenario["jwe"]
        if "aad_forwarded" not in about:
            continue
        judged += 1
        frames = [e["json"] for e in scenario["events"] if e.get("from") == "proxy" and "json" in e]
        answer = AttestationAnswer.parse(frames[-1].encode())
        wanted = about.get("opens_with_forwarded_aad", False) and path.stem not in STRICTER
        assert opens(answer.secret, answer.decryption, expected) == wanted, path.stem
        # and what a proxy delivers that forwards the header as it came
        body = next(e["body"] for e in reversed(scenario["events"]) if e.get("from") == "kbs")
        try:
            original = Jwe.parse(body.encode())
            parts = original.decryption()
        except FormatError:
            assert path.stem == "jwe-duplicate-extra"
            continue
        wanted = about.get("opens_with_original_protected", False) and path.stem not in STRICTER
        assert opens(original.ciphertext, parts, expected) == wanted, path.stem
    assert judged == 18


@pytest.mark.parametrize("name", ["success", "success-certs-buf", "success-one-byte-writes"])
def test_what_the_foreign_proxy_delivered_opens(name: str) -> None:
    frames = [e["json"] for e in recorded(name)["events"] if e.get("from") == "proxy" and "json" in e]
    answer = AttestationAnswer.parse(frames[-1].encode())
    assert opens(answer.secret, answer.decryption, recorded()["crypto"]["plaintext"])


def test_hkdf_of_rfc_5869() -> None:
    first = hkdf(b"\x0b" * 22, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42)
    assert first.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")
    third = hkdf(b"\x0b" * 22, salt=None, info=b"", length=42)
    assert third.hex() == ("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8")


def test_fresh_values_each_time_and_a_round_trip() -> None:
    key = EphemeralKey.generate()
    one = jwe.encrypt(b"secret", recipient_x=key.x, recipient_y=key.y)
    two = jwe.encrypt(b"secret", recipient_x=key.x, recipient_y=key.y)
    assert {one.iv, one.encrypted_key, one.protected}.isdisjoint({two.iv, two.encrypted_key, two.protected})
    assert jwe.decrypt(one.ciphertext, one.decryption(), key=key) == b"secret"
    with pytest.raises(IntegrityError) as other:
        jwe.decrypt(one.ciphertext, one.decryption(), key=EphemeralKey.generate())
    assert other.value.code == "jwe-decrypt"


def test_the_header_must_name_the_point_that_is_used() -> None:
    """A sender who authenticates a header with one point and uses another is refused, though everything opens."""
    key, sender, other = EphemeralKey.generate(), EphemeralKey.generate(), EphemeralKey.generate()
    kek = concat_kdf(sender.exchange(key.x, key.y), algorithm=b"ECDH-ES+A256KW", length=32)
    for named in (sender, other):
        aad = JweHeader(epk_x=named.x, epk_y=named.y).protected().encode()
        sealed = AESGCM(b"c" * 32).encrypt(b"i" * 12, b"secret", aad)
        parts = Decryption(
            epk_x=sender.x,
            epk_y=sender.y,
            wrapped_cek=aes_key_wrap(kek, b"c" * 32),
            aad=aad,
            iv=b"i" * 12,
            tag=sealed[-16:],
        )
        if named is sender:
            assert jwe.decrypt(sealed[:-16], parts, key=key) == b"secret"
            continue
        with pytest.raises(IntegrityError):
            jwe.decrypt(sealed[:-16], parts, key=key)


@pytest.mark.parametrize("length", [0, 65, 67])
def test_coordinates_have_66_bytes(length: int) -> None:
    key = EphemeralKey.generate()
    with pytest.raises(FormatError) as caught:
        check_point(key.x[:length].ljust(length, b"\0"), key.y)
    assert caught.value.code == "key-point"


def test_points_off_the_curve_and_out_of_the_field() -> None:
    key = EphemeralKey.generate()
    bad = key.y[:-1] + bytes([key.y[-1] ^ 1])
    for x, y in ((key.x, bad), (bytes(66), bytes(66)), (b"\xff" * 66, key.y)):
        with pytest.raises(FormatError):
            key.exchange(x, y)


def test_leading_zeros_are_kept() -> None:
    # P-521's top byte is 0 or 1, so half of all keys have a leading zero byte.
    keys = [EphemeralKey.generate() for _ in range(8)]
    assert {len(key.x) for key in keys} | {len(key.y) for key in keys} == {66}
