# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm broker`: what an owner types."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svsm.cli.main import main
from svsm.formats.launch_configuration import LaunchConfiguration

DIGEST = "ab" * 48
ROOT = "simulated:" + "12" * 32


def svsm(*words: str) -> int:
    return main(["broker", *words])


@pytest.fixture
def state(tmp_path: Path) -> str:
    return str(tmp_path / "state")


def test_a_volume_from_nothing_to_shown(state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "launch.json"
    words = ["--state", state, "--root", ROOT, "--name", "vm1", "--tpm", "tpm0:socket", "--tpm", "tpm1:svsm"]
    assert svsm("volume", "create", *words, "--allow", DIGEST, "--output", str(output), "--json") == 0
    created = json.loads(capsys.readouterr().out)
    configuration = LaunchConfiguration.parse(output.read_bytes())
    assert created["schema"] == 1
    assert created["volume"]["volume_id"] == configuration.volume_id
    assert created["volume"]["host_data"] == configuration.host_data().hex()
    assert (created["volume"]["state"], created["volume"]["allowed"]) == ("new", [DIGEST])

    assert svsm("volume", "allow", "--state", state, "vm1", "CD" * 48) == 0
    assert svsm("volume", "allow", "--state", state, configuration.volume_id, "cd" * 48) == 0
    assert capsys.readouterr().out.splitlines() == ["allowed", "was allowed already"]
    assert svsm("volume", "show", "--state", state, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [volume["allowed"] for volume in shown["volumes"]] == [[DIGEST, "cd" * 48]]
    assert svsm("volume", "show", "--state", state, "vm1") == 0
    text = capsys.readouterr().out
    assert "state          new" in text
    assert "wrapped" not in text

    assert svsm("key", "--state", state) == 0
    assert capsys.readouterr().out.startswith("-----BEGIN PUBLIC KEY-----\n")
    assert svsm("key", "--state", state, "--json") == 0
    assert len(bytes.fromhex(json.loads(capsys.readouterr().out)["public_key"])) == 120
    assert svsm("audit", "--state", state) == 0
    assert "3 lines, chain intact" in capsys.readouterr().err
    assert svsm("audit", "--state", state, "--json") == 0
    assert [line["event"] for line in json.loads(capsys.readouterr().out)["lines"]] == [
        "volume-create",
        "volume-allow",
        "volume-allow",
    ]


def test_a_volume_for_a_given_configuration_is_made_once(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "launch.json"
    words = ["volume", "create", "--state", state, "--root", "amd:Genoa"]
    assert svsm(*words, "--name", "vm1", "--output", str(output)) == 0
    assert svsm(*words, "--configuration", str(output)) == 1
    assert "broker-volume-exists" in capsys.readouterr().err
    assert svsm(*words, "--name", "vm2", "--output", str(output)) == 1
    assert "broker-file" in capsys.readouterr().err
    assert svsm("volume", "show", "--state", state, "vm2") == 1
    assert "broker-volume-unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["volume", "create", "--root", "amd"], "broker-usage"),
        (["volume", "create", "--root", "amd", "--name", "x", "--tpm", "t"], "broker-usage"),
        (["volume", "create", "--root", "amd", "--name", "../x"], "launch-configuration-invalid"),
        (["volume", "create", "--root", "amd", "--name", "x", "--volume-id", "y"], "launch-configuration-invalid"),
        (["volume", "create", "--root", "intel", "--name", "x"], "root-name"),
        (["volume", "create", "--root", "amd", "--name", "x", "--allow", "zz"], "broker-digest"),
        (["volume", "create", "--root", "amd", "--configuration", "/nonexistent"], "broker-file"),
        (["volume", "allow", "x", DIGEST], "broker-no-state"),
        (["volume", "allow", "x", "ab"], "broker-digest"),
        (["volume", "show"], "broker-no-state"),
        (["audit"], "broker-no-state"),
        (["key"], "broker-no-state"),
        (["serve", "--listen", "nowhere"], "broker-listen"),
        (["serve", "--listen", "127.0.0.1:99999"], "broker-listen"),
        (["serve", "--listen", "203.0.113.1:0"], "broker-listen"),
    ],
)
def test_what_is_refused(words: list[str], code: str, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    position = 2 if words[0] == "volume" else 1
    assert svsm(*words[:position], "--state", state, *words[position:]) == 1
    assert f"[{code}]" in capsys.readouterr().err


def test_what_is_only_counted_is_written_when_the_broker_ends(state: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Garbage costs one line; the rest is a number, on disk when the broker is told to end."""
    codes = set()
    with subprocess.Popen(
        [sys.executable, "-m", "svsm.cli.main", "broker", "serve", "--state", state], stdout=subprocess.PIPE, text=True
    ) as serving:
        try:
            assert serving.stdout is not None
            host, _, port = serving.stdout.readline().strip().removeprefix("http://").partition(":")
            client = http.client.HTTPConnection(host, int(port), timeout=10)
            for _ in range(20):
                client.request("POST", "/kbs/v0/auth", b'{"version":"0.4.0","tee":"snp","extra-params":""}')
                answer = client.getresponse()
                cookie = str(answer.headers["Set-Cookie"]).partition(";")[0]
                answer.read()
                client.request("POST", "/kbs/v0/attest", b"{}", headers={"Cookie": cookie})
                codes.add(json.loads(client.getresponse().read())["code"])
            client.close()
            assert svsm("audit", "--state", state, "--json") == 0
            assert len(json.loads(capsys.readouterr().out)["lines"]) == 1
        finally:
            serving.terminate()
        assert serving.wait(timeout=10) == 0
    assert codes == {"json-member-missing"}
    assert svsm("audit", "--state", state) == 0
    shown = capsys.readouterr()
    assert "attest refused json-member-missing count=19 since=20" in shown.out
    assert "2 lines, chain intact (19 decisions are only counted)" in shown.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a broker a user of its own")
def test_root_works_on_the_state_of_a_broker_that_has_its_own_user(tmp_path: Path) -> None:
    """As `svsm boot` leaves it: the folder is the role's, the folders above are root's and closed."""
    state = tmp_path / "state"

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "svsm.cli.main", "broker", *words, "--state", str(state)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("volume", "create", "--root", ROOT, "--name", "vm1")
    uid = 1398147072
    for path in (state / "broker", *(state / "broker").iterdir()):
        os.chown(path, uid, uid)
    assert command("volume", "allow", "vm1", DIGEST) == "allowed\n"
    assert DIGEST in command("volume", "show", "--json")
    command("volume", "create", "--root", ROOT, "--name", "vm2", "--output", str(tmp_path / "launch.json"))
    assert len(json.loads(command("audit", "--json"))["lines"]) == 3
    assert "PUBLIC KEY" in command("key")
    assert {path.stat().st_uid for path in (state / "broker").rglob("*")} == {uid}
    with subprocess.Popen(
        [sys.executable, "-m", "svsm.cli.main", "broker", "serve", "--state", str(state)],
        stdout=subprocess.PIPE,
        text=True,
    ) as serving:
        assert serving.stdout is not None
        host, _, port = serving.stdout.readline().strip().removeprefix("http://").partition(":")
        client = http.client.HTTPConnection(host, int(port), timeout=10)
        client.request("POST", "/kbs/v0/auth", b'{"version":"0.4.0","tee":"snp","extra-params":""}')
        assert client.getresponse().status == 200
        client.close()
        serving.terminate()
        assert serving.wait(timeout=10) == 0
