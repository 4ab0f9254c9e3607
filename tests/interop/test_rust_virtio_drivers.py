# SPDX-License-Identifier: MIT OR Apache-2.0
"""What rcore-os/virtio-drivers 0.13.0, the driver beside ours, does with the same hostile device.

`rust-virtio-drivers` is a program over the crate's public interface, with a malicious transport; a case per process,
because some of them end in a panic. `CLAIMS` says what each must print; the table in docs/hostile.md is made of them.
A crate that has been mended makes this fail, and then the table must change.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from svsm.testing.hostile.attacks import ATTACKS
from tests.support import peer

pytestmark = pytest.mark.interop

_SOURCE = Path(__file__).parent / "rust-virtio-drivers"
_PAGE = Path(__file__).resolve().parents[2] / "docs" / "hostile.md"
_BUILD_SECONDS = 600
_CASE_SECONDS = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What a case must show.

    Attributes:
        case: Of the program; begins with the attack's number.
        shows: A regular expression that its whole output must contain.
        words: For the table: what the device does, and what the crate does then.
        ours: What this project's driver does with it: an outcome in the catalogue.
        panics: The crate panics.
    """

    case: str
    shows: str
    words: tuple[str, str]
    ours: str
    panics: bool = False

    @property
    def number(self) -> int:
        """The attack's."""
        return int(self.case.split("-")[0])


CLAIMS = (
    Claim(
        "1-stale-entry",
        r"^Ok\(\(\)\), then without the device Ok\(\(\)\), wrong contents$",
        ("used index one too far", 'accepted; the next read is "done" at once, without the device, with zeros'),
        "dead virtio-used-index",
    ),
    Claim(
        "2-identifier-beyond-ring",
        r"^Err\(WrongToken\)$",
        ("identifier 200 of 16, blocking call", "`WrongToken`, and then as 4"),
        "dead virtio-used-id",
    ),
    Claim(
        "2-identifier-beyond-ring-asynchronous",
        r"given token 200[\s\S]*index out of bounds: the len is 16 but the index is 200",
        ("identifier 200 of 16, asynchronous call", "handed to the caller as a token; panic (index) when it is used"),
        "dead virtio-used-id",
        panics=True,
    ),
    Claim(
        "3-upper-bits",
        r"^Ok\(\(\)\)$",
        ("identifier with bit 31 set", "accepted: cut to 16 bits"),
        "dead virtio-used-id",
    ),
    Claim(
        "4-one-bad-identifier",
        r"^Err\(WrongToken\), then with an honest device Err\(WrongToken\), Err\(WrongToken\), still lent 9$",
        (
            "one identifier of a chain's middle, honest afterwards",
            "every later request fails too; three buffers stay lent each time, though the call has returned",
        ),
        "dead virtio-used-unexpected",
    ),
    Claim(
        "5-twice-asynchronous",
        r"^token 0: Ok\(\(\)\)\n[\s\S]*called `Option::unwrap\(\)` on a `None` value",
        ("the same completion twice, asynchronous, indirect", "panic (unwrap)"),
        "dead virtio-used-unexpected",
        panics=True,
    ),
    Claim(
        "5-too-long-in-owned-buffer",
        r"range end index 65 out of range for slice of length 64",
        ("length 65 for a buffer of 64 in `OwningQueue` (vsock, console)", "panic (slice)"),
        "dead virtio-used-length",
        panics=True,
    ),
    Claim(
        "6-length-too-large",
        r"^Ok\(\(\)\)$",
        ("length 2³² − 1", "accepted: the disk driver ignores lengths"),
        "dead virtio-used-length",
    ),
    Claim(
        "7-nothing-written",
        r"^Ok\(\(\)\), wrong contents$",
        ("status OK, length 0, nothing written", "`Ok`"),
        "error block-io",
    ),
    Claim("9-unknown-status", r"^Err\(IoError\)$", ("status 255", "`IoError`; goes on"), "dead virtio-blk-status"),
    Claim(
        "11-descriptors-overwritten",
        r"^Ok\(\(\)\), right contents, returned unasked 0$",
        ("descriptor table overwritten", "not noticed and harmless: it has a copy of its own"),
        "dead virtio-needs-reset",
    ),
    Claim(
        "12-indirect-table-overwritten",
        r"^Ok\(\(\)\), returned unasked \[dead0000\]$",
        (
            "indirect table overwritten, memory lent in place",
            "`unshare` is called with the address that the device wrote there",
        ),
        "dead virtio-needs-reset",
    ),
    Claim(
        "14-features-not-kept",
        r"^Ok\(\(\)\), status read 0 times$",
        ("FEATURES_OK not kept", "never read again; works on"),
        "refused virtio-features-refused",
    ),
    Claim(
        "15-no-version-1",
        r"^Ok\(\(\)\), offered false, accepted false$",
        ("VERSION_1 not offered", "accepted"),
        "refused virtio-features-missing",
    ),
    Claim(
        "15-legacy-registers",
        r"^accepted as Legacy, legacy layout true$",
        ("registers of version 1", "accepted, with the legacy ring"),
        "refused virtio-legacy",
    ),
    Claim(
        "16-access-platform",
        r"^Ok\(\(\)\), offered true, accepted false$",
        ("ACCESS_PLATFORM", "the disk driver never accepts it, offered or not"),
        "refused virtio-features-missing",
    ),
    Claim(
        "17-read-only",
        r"^Ok\(\(\)\), read-only true, writes sent 1$",
        ("read-only disk", "writes are sent; the device decides"),
        "error block-read-only",
    ),
    Claim(
        "17-no-flush",
        r"^Ok\(\(\)\), requests sent 0$",
        ("FLUSH not offered", "`flush` returns `Ok` without a request"),
        "error block-io",
    ),
    Claim(
        "19-restless-configuration",
        r"^still reading the generation after 1000000 times$",
        ("generation never stands still", "endless loop"),
        "refused virtio-config-unstable",
    ),
    Claim(
        "20-beyond-capacity",
        r"^Ok\(\(\)\), capacity 2048, sector 1000000000 sent$",
        ("request beyond the capacity", "sent"),
        "survived",
    ),
    Claim(
        "23-small-queue",
        r"^Err\(InvalidParam\)$",
        ("queue of 8", "refused: it wants 16"),
        "refused virtio-queue-size",
    ),
    Claim(
        "25-reset-not-done",
        r"^Ok\(\(\)\), status read 0 times$",
        ("the reset does not take", "not waited for, not looked at"),
        "refused virtio-reset-stuck",
    ),
    Claim(
        "26-needs-reset",
        r"^Ok\(\(\)\), status read 0 times$",
        ("NEEDS_RESET and FAILED", "never looked at"),
        "dead virtio-needs-reset",
    ),
    Claim(
        "27-no-completion",
        r"^still waiting after two seconds$",
        ("no completion", "spins for ever"),
        "dead virtio-timeout",
    ),
    Claim(
        "29-kick-at-the-wrap",
        r"^kick wanted by the device true, given false$",
        ("avail_event 65534 and two requests (an honest device)", "the kick is lost: compared without the wrap"),
        "survived",
    ),
    Claim(
        "35-packed",
        r"^Ok\(\(\)\), offered true, accepted false$",
        ("packed rings", "not implemented"),
        "dead virtio-used-unexpected",
    ),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built outside the tree."""
    cargo = peer("cargo")
    folder = tmp_path_factory.mktemp("rust") / "source"
    shutil.copytree(_SOURCE, folder, ignore=shutil.ignore_patterns("target", "Cargo.lock"))
    target = folder.parent / "target"
    done = subprocess.run(
        [str(cargo), "build", "--quiet"],
        cwd=folder,
        env={**os.environ, "CARGO_TARGET_DIR": str(target)},
        capture_output=True,
        text=True,
        check=False,
        timeout=_BUILD_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return target / "debug" / "hostile-virtio"


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RUST_BACKTRACE": "0"}
    return subprocess.run(
        [str(program), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=_CASE_SECONDS,
    )


@pytest.mark.long
@pytest.mark.timeout(_BUILD_SECONDS)
def test_each_claim_is_still_true(program: Path) -> None:
    assert _run(program, "honest").stdout.strip() == "Ok(()), right contents, lent 0"
    listed = _run(program).stdout.split()
    assert sorted(listed) == sorted(["honest", *(claim.case for claim in CLAIMS)])
    for claim in CLAIMS:
        done = _run(program, claim.case)
        assert re.search(claim.shows, done.stdout.strip()), (claim.case, done.stdout)
        assert done.returncode == (101 if claim.panics else 0), (claim.case, done.stdout)
        assert ("panicked at" in done.stdout) == claim.panics


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.case)
def test_ours_is_what_the_catalogue_says(claim: Claim) -> None:
    numbers = {5: (5, 6), 23: (23,)}.get(claim.number, (claim.number,))
    outcomes = {str(outcome) for attack in ATTACKS if attack.number in numbers for outcome in attack.expected.values()}
    assert claim.ours in outcomes


def test_the_table_in_the_documentation() -> None:
    page = _PAGE.read_text(encoding="utf-8")
    for claim in CLAIMS:
        assert f"| {claim.number} | {claim.words[0]} | {claim.words[1]} | {claim.ours} |\n" in page
