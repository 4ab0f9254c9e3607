# SPDX-License-Identifier: MIT OR Apache-2.0
"""One byte changed anywhere in the messages that carry trust: refused, or of no consequence; never another outcome."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from svsm.crypto.ephemeral import EphemeralKey
from svsm.formats import kbs
from svsm.formats.errors import SvsmError
from svsm.kernel.attestation import AttestationClient
from tests.key_support import Desk, Relay

SAMPLES = 250
_REPLACEMENTS = b'\x00\xff"{}[],:\\0A=-_.'


def mutate(body: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(body))
    kind = chance.randrange(4)
    if kind == 0:
        return body[:place] + bytes([body[place] ^ (1 << chance.randrange(8))]) + body[place + 1 :]
    if kind == 1:
        return body[:place] + bytes([chance.choice(_REPLACEMENTS)]) + body[place + 1 :]
    if kind == 2:
        return body[:place]
    return body[:place] + body[place : place + chance.randrange(1, 40)] + body[place:]


def test_the_answer_to_the_kernel(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "broker")
    chip = desk.chip()
    key = EphemeralKey.generate()
    settings, configuration = desk.settings, desk.configuration.to_json()

    def client() -> AttestationClient:
        return AttestationClient(settings=settings, configuration_json=configuration, key=key)

    first, relay = client(), desk.relay()
    challenge = relay.negotiate(first.start())
    evidence = chip.report(first.negotiated(challenge))
    answer = relay.attest(first.reported(evidence))
    honest = first.answered(answer)
    chance, refused = random.Random(1), 0
    for _ in range(SAMPLES):
        body = mutate(answer, chance)
        again = client()
        again.start()
        again.negotiated(challenge)
        again.reported(evidence)
        try:
            release = again.answered(body)
        except SvsmError:
            refused += 1
        else:
            assert (release.volume_key, release.session) == (honest.volume_key, honest.session)
    assert refused > SAMPLES * 0.9


def test_the_evidence_to_the_broker(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "broker")
    bodies: list[bytes] = []

    class Mutating(Relay):
        def request(self, method: str, target: str, body: bytes):  # type: ignore[no-untyped-def]
            if target == kbs.ATTEST_PATH:
                body = mutate(body, chance)
                bodies.append(body)
            return super().request(method, target, body)

    chance, refused = random.Random(2), 0
    for _ in range(SAMPLES):
        relay = Mutating(desk.relay().app)
        client = desk.client()
        request = client.reported(desk.chip().report(client.negotiated(relay.negotiate(client.start()))))
        answer = relay.attest(request)
        try:
            release = client.answered(answer)
        except SvsmError:
            refused += 1
        else:
            # only members that nobody believes were touched: the kernel's own checks still hold
            assert release.configuration == desk.configuration
            assert kbs.AttestRequest.parse(bodies[-1]).report is not None
    assert refused > SAMPLES * 0.9
    desk.broker.close()
    desk.broker = desk.open()
    attempts = [line for line in desk.broker.audit_trail() if line.event == "attest"]
    assert sum(line.decisions for line in attempts) == SAMPLES


@pytest.mark.parametrize("seed", range(3))
def test_the_negotiation(tmp_path: Path, seed: int) -> None:
    desk = Desk(tmp_path / "broker")
    answer = desk.relay().negotiate(desk.client().start())
    chance = random.Random(seed)
    for _ in range(SAMPLES):
        client, chip = desk.client(), desk.chip()
        client.start()
        try:
            chip.report(client.negotiated(mutate(answer, chance)))
        except SvsmError:
            assert chip.reports == 0
