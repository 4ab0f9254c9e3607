# SPDX-License-Identifier: MIT OR Apache-2.0
"""The broker's decisions: whose evidence, for which volume, how often."""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svsm.broker.app import BrokerApp
from svsm.broker.audit import verify_chain
from svsm.broker.http import Request
from svsm.broker.service import Broker
from svsm.broker.sessions import Limits, Sessions
from svsm.broker.store import SCHEMA_VERSION
from svsm.crypto.digests import sha512
from svsm.crypto.ephemeral import EphemeralKey
from svsm.formats import kbs
from svsm.formats.errors import BackendError, IntegrityError, PolicyError, ProtocolError, StateError, SvsmError
from svsm.formats.release_token import VolumeState
from svsm.formats.snp.policy import GuestPolicy
from tests.key_support import DIGEST, Chip, Desk, Relay, configuration, machine, run, simulated_root


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "broker")


def attempt(
    desk: Desk,
    chip: Chip,
    *,
    key: EphemeralKey | None = None,
    report_data: bytes | None = None,
    **changes: bytes | None,
) -> tuple[int, str | None, bytes]:
    """One raw /auth and /attest. Returns status, code and session."""
    relay = desk.relay()
    nonce = kbs.AuthAnswer.parse(relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack()).body).nonce
    key = key or EphemeralKey.generate()
    evidence = chip.report(sha512(key.x, key.y, nonce) if report_data is None else report_data)
    request = kbs.AttestRequest(
        nonce=nonce, key_x=key.x, key_y=key.y, report=evidence.report, certificates=evidence.certificates
    )
    request = dataclasses.replace(request, **changes)  # type: ignore[arg-type]
    answer = relay.request("POST", kbs.ATTEST_PATH, request.pack())
    session = bytes.fromhex(kbs.parse_cookie_header(relay.cookie) or "")
    if answer.status != 200:
        assert relay.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").status == 401
    return answer.status, kbs.ErrorBody.code_of(answer.body), session


def last_reason(desk: Desk) -> str | None:
    return desk.broker.audit_trail()[-1].reason


def test_good_evidence_is_granted_and_audited(desk: Desk) -> None:
    status, _, session = attempt(desk, desk.chip())
    assert status == 200
    line = desk.broker.audit_trail()[-1]
    assert (line.event, line.decision, line.session) == ("attest", "granted", session.hex())
    assert line.details["measurement"] == DIGEST.hex()
    assert line.details["root"] == machine(0).root_fingerprint.hex()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vmpl": 1}, "report-vmpl"),
        ({"vmpl": 0xFFFFFFFF}, "report-vmpl"),
        ({"policy": GuestPolicy.MUST_BE_ONE | GuestPolicy.DEBUG}, "report-debug"),
        ({"machine_number": 1}, "root-unknown"),
    ],
)
def test_evidence_that_is_refused_without_saying_why(desk: Desk, change: dict[str, int], reason: str) -> None:
    chip = dataclasses.replace(desk.chip(), **change)  # type: ignore[arg-type]
    status, code, _ = attempt(desk, chip)
    assert (status, code) == (403, "broker-evidence-refused")
    assert last_reason(desk) == reason


def test_a_genuine_report_of_an_unlisted_image_is_told_apart(desk: Desk) -> None:
    chip = dataclasses.replace(desk.chip(), measurement=b"m" * 48)
    assert attempt(desk, chip)[:2] == (403, "broker-measurement-not-allowed")
    assert last_reason(desk) == "report-measurement"
    assert desk.broker.allow("vm", b"m" * 48)
    assert not desk.broker.allow("vm", b"m" * 48)
    assert attempt(desk, chip)[0] == 200


def test_an_unlisted_image_is_not_told_to_who_cannot_sign(desk: Desk) -> None:
    """Without a genuine report the caller learns nothing about the list."""
    chip = dataclasses.replace(desk.chip(), measurement=b"m" * 48, machine_number=1)
    assert attempt(desk, chip)[1] == "broker-evidence-refused"


def test_every_byte_of_the_report_counts(desk: Desk) -> None:
    chip = desk.chip()
    for place in (0, 8, 0x30, 0x50, 0x90, 0xC0, 0x1A0, 0x29F, 0x2A0, 0x2F0, 0x330, 0x49F):
        key = EphemeralKey.generate()
        relay = desk.relay()
        nonce = kbs.AuthAnswer.parse(relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack()).body).nonce
        evidence = chip.report(sha512(key.x, key.y, nonce))
        changed = bytearray(evidence.report)
        changed[place] ^= 1
        request = kbs.AttestRequest(
            nonce=nonce, key_x=key.x, key_y=key.y, report=bytes(changed), certificates=evidence.certificates
        )
        answer = relay.request("POST", kbs.ATTEST_PATH, request.pack())
        assert (answer.status, kbs.ErrorBody.code_of(answer.body)) == (403, "broker-evidence-refused"), hex(place)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"report": b""}, "record-length"),
        ({"report": bytes(1184)}, "broker-no-volume"),
        ({"certificates": None}, "evidence-no-certificate"),
        ({"certificates": b"x" * 100}, None),
        ({"nonce": b"n" * 32}, "broker-other-challenge"),
        ({"nonce": b""}, "broker-other-challenge"),
        ({"nonce": b"n" * 64}, "broker-other-challenge"),
        ({"key_x": b"\0" * 65}, "key-point"),
        ({"key_x": b"\0" * 67}, "key-point"),
        ({"key_y": b"\0" * 66}, "key-point"),
    ],
)
def test_malformed_evidence(desk: Desk, changes: dict[str, bytes | None], reason: str | None) -> None:
    status, code, _ = attempt(desk, desk.chip(), key=None, report_data=None, **changes)
    assert (status, code) == (403, "broker-evidence-refused")
    assert reason is None or last_reason(desk) == reason


def test_a_key_of_another_length_that_hashes_the_same(desk: Desk) -> None:
    """x ‖ y ‖ challenge is untagged: moving bytes between x and y must not pass."""
    key = EphemeralKey.generate()
    moved = {"key_x": key.x + key.y[:1], "key_y": key.y[1:]}
    assert attempt(desk, desk.chip(), key=key, **moved)[0] == 403
    assert last_reason(desk) == "key-point"


def test_a_report_that_the_guest_triggered_is_no_evidence(desk: Desk) -> None:
    """SVSM protocol 1 lets the guest OS have VMPL0 reports over SHA-512(nonce64 ‖ manifest)."""
    key = EphemeralKey.generate()
    for manifest in (b"", b"m" * 100, bytes(36) + b"n" * 64):
        report_data = sha512((key.x + key.y)[:64], manifest)
        assert attempt(desk, desk.chip(), key=key, report_data=report_data)[:2] == (403, "broker-evidence-refused")
        assert last_reason(desk) == "report-data"


def test_the_guests_report_needs_a_challenge_longer_than_the_broker_accepts(desk: Desk) -> None:
    """A guest that steers its manifest gets x ‖ y ‖ challenge hashed only if 64 + len(manifest) = 132 + 32."""
    key = EphemeralKey.generate()
    nonce_and_manifest = key.x + key.y + b"c" * 64
    report_data = sha512(nonce_and_manifest)
    status, _, _ = attempt(desk, desk.chip(), key=key, report_data=report_data, nonce=b"c" * 64)
    assert status == 403
    assert last_reason(desk) == "broker-other-challenge"


def test_a_second_attest_on_one_challenge(desk: Desk) -> None:
    relay = desk.relay()
    nonce = kbs.AuthAnswer.parse(relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack()).body).nonce
    key = EphemeralKey.generate()
    evidence = desk.chip().report(sha512(key.x, key.y, nonce))
    body = kbs.AttestRequest(
        nonce=nonce, key_x=key.x, key_y=key.y, report=evidence.report, certificates=evidence.certificates
    ).pack()
    assert relay.request("POST", kbs.ATTEST_PATH, body).status == 200
    for again in (body, b"", b"{}"):
        answer = relay.request("POST", kbs.ATTEST_PATH, again)
        assert (answer.status, kbs.ErrorBody.code_of(answer.body)) == (409, "broker-challenge-used")
    # the secret of the first one is still there, and the same each time
    first = relay.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"")
    assert relay.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").body == first.body


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b'{"runtime-data":1}'])
def test_a_failed_attempt_spends_the_challenge_too(desk: Desk, body: bytes) -> None:
    relay = desk.relay()
    relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())
    assert relay.request("POST", kbs.ATTEST_PATH, body).status == 400
    answer = relay.request("POST", kbs.ATTEST_PATH, body)
    assert kbs.ErrorBody.code_of(answer.body) == "broker-challenge-used"


def test_evidence_replayed_in_another_session(desk: Desk) -> None:
    recorded: list[bytes] = []

    class Recorder(Relay):
        def request(self, method: str, target: str, body: bytes):  # type: ignore[no-untyped-def]
            recorded.append(body)
            return super().request(method, target, body)

    run(desk.client(), desk.chip(), Recorder(BrokerApp(desk.broker)))
    relay = desk.relay()
    relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())
    assert relay.request("POST", kbs.ATTEST_PATH, recorded[1]).status == 403
    assert last_reason(desk) == "broker-other-challenge"


def test_one_challenge_and_many_threads_give_one_grant(desk: Desk) -> None:
    relay = desk.relay()
    nonce = kbs.AuthAnswer.parse(relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack()).body).nonce
    key = EphemeralKey.generate()
    evidence = desk.chip().report(sha512(key.x, key.y, nonce))
    body = kbs.AttestRequest(
        nonce=nonce, key_x=key.x, key_y=key.y, report=evidence.report, certificates=evidence.certificates
    ).pack()
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(relay.request("POST", kbs.ATTEST_PATH, body).status))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 7


# --- roots and rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["amd", "amd:Milan", "amd:Genoa"])
def test_a_simulated_root_must_not_reach_a_real_volumes_key(desk: Desk, root: str) -> None:
    """The holder of a simulated root can sign anything; a real volume must not listen."""
    real = configuration("real")
    desk.broker.create_volume(real, root=root, allowed=[DIGEST])
    for number in (0, 1):
        chip = Chip(host_data=real.host_data(), machine_number=number)
        assert attempt(desk, chip)[:2] == (403, "broker-evidence-refused")
        assert last_reason(desk) == "root-unknown"


def test_one_simulated_root_does_not_reach_another_ones_volume(desk: Desk) -> None:
    other = configuration("other")
    desk.broker.create_volume(other, root=simulated_root(1), allowed=[DIGEST])
    assert attempt(desk, Chip(host_data=other.host_data(), machine_number=1))[0] == 200
    assert attempt(desk, Chip(host_data=other.host_data(), machine_number=0))[0] == 403
    assert attempt(desk, Chip(host_data=desk.configuration.host_data(), machine_number=1))[0] == 403


def test_one_volumes_digests_do_not_count_for_another(desk: Desk) -> None:
    other = configuration("other")
    desk.broker.create_volume(other, root=simulated_root(0), allowed=[])
    chip = Chip(host_data=other.host_data())
    assert attempt(desk, chip)[1] == "broker-measurement-not-allowed"


def test_rows_are_chosen_by_host_data_and_have_keys_of_their_own(desk: Desk) -> None:
    first, _ = desk.attest()
    desk.configuration = configuration("second")
    desk.broker.create_volume(desk.configuration, root=simulated_root(0), allowed=[DIGEST])
    second, _ = desk.attest()
    assert first.volume_key != second.volume_key
    unknown = Chip(host_data=b"h" * 32)
    assert attempt(desk, unknown)[1] == "broker-evidence-refused"
    assert last_reason(desk) == "broker-no-volume"


def test_a_digest_struck_off_between_verification_and_grant(desk: Desk) -> None:
    with pytest.raises(PolicyError):
        desk.broker._store.attested(desk.volume.volume_id, session=b"s" * 16, measurement=b"m" * 48, details={})
    assert desk.broker.volume("vm").last_session is None


def test_volumes_are_created_once_and_named_well(desk: Desk) -> None:
    with pytest.raises(StateError) as exists:
        desk.broker.create_volume(desk.configuration, root=simulated_root(0))
    assert exists.value.code == "broker-volume-exists"
    for root in ("", "any", "simulated", "simulated:xx", "amd:Rome"):
        with pytest.raises(StateError) as bad_root:
            desk.broker.create_volume(configuration(), root=root)
        assert bad_root.value.code == "root-name"
    with pytest.raises(StateError):
        desk.broker.create_volume(configuration(), root="amd", volume_key=b"short")
    with pytest.raises(StateError):
        desk.broker.create_volume(configuration(), root="amd", allowed=[b"short"])
    with pytest.raises(StateError) as unknown:
        desk.broker.allow("nobody", DIGEST)
    assert unknown.value.code == "broker-volume-unknown"
    desk.broker.create_volume(configuration("vm"), root="amd")
    with pytest.raises(StateError) as ambiguous:
        desk.broker.volume("vm")
    assert ambiguous.value.code == "broker-volume-ambiguous"
    assert desk.broker.volume(desk.volume.volume_id).name == "vm"


def test_enrolment_allows_a_digest_only_with_a_new_row(desk: Desk) -> None:
    fresh = configuration("fresh")
    row, made = desk.broker.enrol(fresh, root=simulated_root(0), digest=DIGEST)
    assert made
    again, made_again = desk.broker.enrol(fresh, root=simulated_root(1), digest=b"m" * 48)
    assert not made_again
    assert (again.volume_id, again.root) == (row.volume_id, simulated_root(0))
    assert desk.broker.allowed_digests(row.volume_id) == [DIGEST]


_PATHS = [kbs.AUTH_PATH, kbs.ATTEST_PATH, kbs.CHANNEL_PATH, kbs.DEFAULT_RESOURCE_PATH, "/", "/kbs/v0/resource/"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "PUT"]),
    target=st.sampled_from(_PATHS) | st.text(max_size=40),
    cookie=st.text(max_size=60) | st.binary(min_size=16, max_size=16).map(lambda b: f"kbs-session-id={b.hex()}"),
    body=st.binary(max_size=120),
)
def test_any_request_has_an_answer(desk: Desk, method: str, target: str, cookie: str, body: bytes) -> None:
    answer = BrokerApp(desk.broker)(Request(method=method, target=target, cookie=cookie, body=body))
    assert 400 <= answer.status < 500
    assert kbs.ErrorBody.code_of(answer.body)


# --- sessions --------------------------------------------------------------------------------------------------


def test_challenges_and_secrets_expire(desk: Desk) -> None:
    relay = desk.relay()
    relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())
    desk.clock.seconds += 61
    answer = relay.request("POST", kbs.ATTEST_PATH, b"{}")
    assert (answer.status, kbs.ErrorBody.code_of(answer.body)) == (401, "broker-session-unknown")
    _, later = desk.attest()
    assert later.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").status == 200
    desk.clock.seconds += 61
    assert later.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").status == 401


def test_challenges_are_given_without_end_and_answered_within_bounds() -> None:
    sessions = Sessions(Limits(sessions=4096))
    first, _ = sessions.challenge(0.0)
    for _ in range(4096):
        session, challenge = sessions.challenge(0.0)
    assert (len(session), len(challenge)) == (16, 32)
    sessions.spend(first, 1.0)
    with pytest.raises(PolicyError) as busy:
        sessions.spend(session, 1.0)
    assert busy.value.code == "broker-busy"
    with pytest.raises(ProtocolError):
        sessions.spend(first, 1.0)
    session, challenge = sessions.challenge(61.0)
    assert sessions.spend(session, 62.0) == challenge


def test_a_broker_that_was_answered_too_often_says_so(tmp_path: Path) -> None:
    broker = Broker.open(tmp_path / "b", limits=Limits(sessions=1))
    first, _ = broker.challenge()
    for _ in range(4096):
        last, _ = broker.challenge()
    app = BrokerApp(broker)
    statuses = [
        app(Request("POST", kbs.ATTEST_PATH, f"kbs-session-id={session.hex()}", b"{}")).status
        for session in (first, last, first)
    ]
    assert statuses == [400, 429, 409]
    assert [line.reason for line in broker.audit_trail()][1:] == ["broker-busy", "broker-challenge-used"]
    broker.close()


def test_channels_per_volume_are_bounded(desk: Desk) -> None:
    first, relay = desk.attest()
    for _ in range(4):
        desk.attest()
    with pytest.raises(ProtocolError) as caught:
        desk.broker.channel(first.session, b"x" * 64)
    assert caught.value.code == "broker-session-unknown"
    assert relay.cookie


def test_a_broker_that_was_started_anew_knows_no_old_session(desk: Desk) -> None:
    release, _ = desk.attest()
    desk.broker.close()
    desk.broker = desk.open()
    with pytest.raises(ProtocolError):
        desk.broker.channel(release.session, b"x" * 64)
    assert desk.broker.volume("vm").last_session == release.session
    again, _ = desk.attest()
    assert (again.volume_key, again.state) == (release.volume_key, VolumeState.NEW)


# --- state on disk ---------------------------------------------------------------------------------------------


def test_the_database_holds_no_plain_key(desk: Desk) -> None:
    release, _ = desk.attest()
    desk.broker.close()
    for path in desk.folder.iterdir():
        content = path.read_bytes()
        assert release.volume_key not in content, path
        assert release.volume_key.hex().encode() not in content, path
        assert path.stat().st_mode & 0o077 == 0, path
    assert desk.folder.stat().st_mode & 0o777 == 0o700


def test_a_wrapped_key_moved_to_another_row_does_not_open(desk: Desk) -> None:
    other = configuration("other")
    desk.broker.create_volume(other, root=simulated_root(0), allowed=[DIGEST])
    edit(desk, "UPDATE volumes SET wrapped_key = (SELECT wrapped_key FROM volumes WHERE name = 'vm')")
    status, code, _ = attempt(desk, Chip(host_data=other.host_data()))
    assert (status, code) == (500, "broker-internal")


def test_an_unknown_newer_schema_is_refused(desk: Desk) -> None:
    desk.broker.close()
    edit(desk, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StateError) as caught:
        desk.open()
    assert caught.value.code == "broker-schema-newer"


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir(mode=0o700)
    desk = tmp_path / "b" / "broker.sqlite"
    with sqlite3.connect(desk) as connection:
        connection.execute("CREATE TABLE t (a)")
    connection.close()
    for name in ("vault.key", "signing.key"):
        (tmp_path / "b" / name).touch(mode=0o600)
    (tmp_path / "b" / "vault.key").write_bytes(bytes(32))
    with pytest.raises(StateError) as caught:
        Broker.open(tmp_path / "b")
    assert caught.value.code == "broker-schema-foreign"
    desk.write_bytes(b"not a database at all" * 100)
    with pytest.raises(BackendError):
        Broker.open(tmp_path / "b")


@pytest.mark.parametrize("name", ["vault.key", "signing.key"])
def test_key_files_that_are_gone_exposed_or_damaged(desk: Desk, name: str) -> None:
    desk.broker.close()
    path = desk.folder / name
    content = path.read_bytes()
    path.chmod(0o640)
    with pytest.raises(StateError) as exposed:
        desk.open()
    assert exposed.value.code == "broker-state-exposed"
    path.unlink()
    with pytest.raises(StateError) as missing:
        desk.open()
    assert missing.value.code == "broker-key-missing"
    path.symlink_to("/dev/zero")
    with pytest.raises(BackendError) as linked:
        desk.open()
    assert linked.value.code == "broker-state-io"
    assert linked.value.hint
    path.unlink()
    path.touch(mode=0o600)
    path.write_bytes(content[:-1])
    with pytest.raises(SvsmError):
        desk.open()
    path.write_bytes(content)
    desk.broker = desk.open()
    assert desk.attest()[0].state is VolumeState.NEW


def test_an_exposed_directory_is_refused(desk: Desk) -> None:
    desk.broker.close()
    desk.folder.chmod(0o750)
    with pytest.raises(StateError) as caught:
        desk.open()
    assert caught.value.code == "broker-state-exposed"


def test_the_audit_trail_notices_every_kind_of_change(desk: Desk) -> None:
    desk.attest()
    lines = desk.broker.audit_trail()
    assert [line.event for line in lines] == ["volume-create", "volume-allow", "attest", "release"]
    assert verify_chain(lines) == 4
    for changed in (
        lines[1:],
        [lines[0], *lines[2:]],
        [lines[1], lines[0], *lines[2:]],
        [dataclasses.replace(lines[0], decision="refused"), *lines[1:]],
        [dataclasses.replace(lines[0], details={}), *lines[1:]],
        [*lines, lines[-1]],
    ):
        with pytest.raises(IntegrityError):
            verify_chain(changed)
    edit(desk, "UPDATE audit SET reason = 'x' WHERE sequence = 2")
    with pytest.raises(IntegrityError) as caught:
        desk.broker.audit_trail()
    assert caught.value.code == "broker-audit-chain"


def test_two_brokers_on_one_state_take_turns(desk: Desk) -> None:
    """`svsm broker volume allow` works while another process serves."""
    other = desk.open()
    try:
        other.allow("vm", b"m" * 48)
        assert attempt(desk, dataclasses.replace(desk.chip(), measurement=b"m" * 48))[0] == 200
        assert verify_chain(other.audit_trail()) == 4
    finally:
        other.close()


def edit(desk: Desk, statement: str) -> None:
    connection = sqlite3.connect(desk.folder / "broker.sqlite")
    with connection:
        connection.execute(statement)
    connection.close()
