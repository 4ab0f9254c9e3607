# SPDX-License-Identifier: MIT OR Apache-2.0
"""Messages of the key exchange: extensions, hostile JSON, and what must never escape as another exception."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats import kbs, negotiation
from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.strict_json import canonical, parse_object

PARSERS: list[Callable[[bytes], object]] = [
    negotiation.NegotiationRequest.parse,
    negotiation.NegotiationAnswer.parse,
    negotiation.AttestationRequest.parse,
    negotiation.AttestationAnswer.parse,
    negotiation.ChannelFrame.parse,
    kbs.AuthRequest.parse,
    kbs.AuthAnswer.parse,
    kbs.AttestRequest.parse,
    kbs.AttestAnswer.parse,
    kbs.Jwe.parse,
    kbs.ChannelBody.parse,
]

HOSTILE = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"{}x",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"[" * 500_000,
    b'{"a":' * 100_000,
    b'{"a":1,"a":1}',
    b'{"a":NaN}',
    b'{"a":' + b"9" * 10_000 + b"}",
    b'{"challenge":"\\ud800","params":["\\ud800"],"token":"\\ud800","nonce":"\\ud800","channel":"\\ud800"}',
    b'{"version":[0,1,1e999],"tee":"snp"}',
    b'{"version":[false,true,false],"tee":"snp"}',
    b'{"success":1,"decryption":null,"token":null}',
    b'{"success":true,"secret":5}',
    b'{"success":true,"decryption":[],"token":null}',
    b'{"success":true,"decryption":{},"token":null}',
    b'{"challenge":"","params":[' + b",".join([b'"a"'] * 17) + b"]}",
    b'{"challenge":"YQ==","params":[["a"]]}',
    b'{"challenge":"YR==","params":[]}',
    b'{"challenge":"YQ","params":[]}',
    b'{"nonce":"_-8=","extra-params":""}',
]


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_bodies_are_refused(parse: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(SvsmError):
        parse(body)


@given(st.binary(max_size=200), st.sampled_from(PARSERS))
def test_any_bytes_give_a_value_or_our_error(body: bytes, parse: Callable[[bytes], object]) -> None:
    with contextlib.suppress(SvsmError):
        parse(body)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["snp", "0.4.0", "P-521", "EC"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "tee",
                    "version",
                    "challenge",
                    "params",
                    "key",
                    "x",
                    "y",
                    "evidence",
                    "Snp",
                    "report",
                    "success",
                    "secret",
                    "decryption",
                    "epk",
                    "token",
                    "Jwt",
                    "nonce",
                    "runtime-data",
                    "tee-pubkey",
                    "tee-evidence",
                    "protected",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4) | st.just("version"), _JSON, max_size=6), st.sampled_from(PARSERS))
def test_any_object_gives_a_value_or_our_error(value: dict[str, object], parse: Callable[[bytes], object]) -> None:
    with contextlib.suppress(SvsmError):
        parse(canonical(value))


def test_a_body_over_its_limit_is_not_even_decoded() -> None:
    with pytest.raises(FormatError) as refused:
        parse_object(b"\xff" * 65, what="test", max_bytes=64)
    assert refused.value.code == "json-malformed"
    assert "too long" in str(refused.value)


def test_extensions_travel_both_ways_and_are_left_out_when_there_are_none() -> None:
    asked = negotiation.NegotiationRequest(extensions=("channel",))
    assert asked.pack() == b'{"version":[0,1,0],"tee":"snp","extensions":["channel"]}'
    assert negotiation.NegotiationRequest.parse(asked.pack()) == asked
    answered = negotiation.NegotiationAnswer(challenge=b"c" * 32, extensions=("channel",))
    assert negotiation.NegotiationAnswer.parse(answered.pack()) == answered
    assert b"extensions" not in negotiation.NegotiationAnswer(challenge=b"c").pack()


def test_a_reason_is_only_ever_a_plain_code() -> None:
    parse = negotiation.AttestationAnswer.parse
    assert parse(b'{"success":false,"reason":"broker-evidence-refused"}').reason == "broker-evidence-refused"
    for bad in (b'"\\u001b[2J"', b"5", b'"UPPER"', b'"' + b"a" * 65 + b'"', b"null", b'"a--b"'):
        assert parse(b'{"success":false,"reason":' + bad + b"}").reason is None
    assert kbs.ErrorBody.code_of(kbs.ErrorBody(variant="V", detail="d", code="a-b").pack()) == "a-b"
    assert kbs.ErrorBody.code_of(b"[") is None
    assert kbs.ErrorBody.code_of(b'{"code":"A"}') is None


def test_cookies() -> None:
    assert kbs.parse_cookie_header(kbs.format_cookie("ab12").split(";")[0]) == "ab12"
    assert kbs.parse_cookie_header("other=1; kbs-session-id=ab") == "ab"
    for bad in ("", "kbs-session-id=", "kbs-session-id=a; kbs-session-id=b", "kbs-session-id=" + "a" * 129, "x"):
        assert kbs.parse_cookie_header(bad) is None


def test_resource_paths() -> None:
    assert kbs.parse_resource_path(kbs.DEFAULT_RESOURCE_PATH) == ("default", "sample", "test")
    for bad in ("a", "a/b", "a/b/c/d", "a/../c", "a//c", "a/b/%2e", "a/b/c?x", "a/b/.c", "a/b/" + "c" * 600):
        assert kbs.parse_resource_path(kbs.RESOURCE_PREFIX + bad) is None


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "dir", "enc": "A256GCM"},
        {"alg": "ECDH-ES+A256KW", "enc": "A128GCM"},
        {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "apu": "AA"},
        {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "crit": ["x"]},
        {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "zip": "DEF"},
    ],
)
def test_headers_that_ask_for_other_processing(header: dict[str, object]) -> None:
    from svsm.formats.strict_json import base64_url

    epk = {"crv": "P-521", "kty": "EC", "x": "AA", "y": "AA"}
    with pytest.raises(SvsmError) as refused:
        kbs.JweHeader.parse(base64_url(canonical({**header, "epk": epk})))
    assert refused.value.code == "jwe-header"
