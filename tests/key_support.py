# SPDX-License-Identifier: MIT OR Apache-2.0
"""What tests of the key exchange share: simulated chips, a kernel's report source, and relays, honest or not."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import uuid
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from svsm.abi.platform import AttestationReport
from svsm.broker.app import BrokerApp
from svsm.broker.http import Request, Response
from svsm.broker.service import Broker
from svsm.formats import kbs, negotiation
from svsm.formats.launch_configuration import LaunchConfiguration, TpmConfiguration, TpmFront
from svsm.formats.settings import Settings
from svsm.formats.snp.policy import GuestPolicy
from svsm.formats.snp.tcb import Line
from svsm.hardware.authority import MODELS, Authority, Machine
from svsm.kernel.attestation import AttestationClient, Release

DIGEST = bytes(range(48))
START = datetime.datetime.now(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0) - datetime.timedelta(
    days=60
)
"""When the chips were made; near today, because programs under test judge dates by the real clock."""


@functools.cache
def _rsa() -> rsa.RSAPrivateKey:
    # One key for all authorities of the tests: making one takes a second, and nothing here depends on their number.
    return rsa.generate_private_key(public_exponent=65537, key_size=4096)


@functools.cache
def machine(number: int = 0) -> Machine:
    """A simulated chip; each number has a root of its own."""
    born = START + datetime.timedelta(days=number)
    authority = Authority.create(Line.MILAN, now=born, keys=(_rsa(), _rsa()))
    key = ec.generate_private_key(ec.SECP384R1())
    chip_id, tcb = bytes([number + 1]) * 64, MODELS[Line.MILAN].tcb
    vcek = authority.issue_vcek(key.public_key(), chip_id=chip_id, tcb=tcb, now=born)
    der = Encoding.DER
    return Machine(
        line=Line.MILAN,
        chip_id=chip_id,
        tcb=tcb,
        vcek=vcek.public_bytes(der),
        ask=authority.ask.public_bytes(der),
        ark=authority.ark.public_bytes(der),
        key=key,
    )


def configuration(name: str = "vm") -> LaunchConfiguration:
    """A launch configuration with a random volume id."""
    tpms = (TpmConfiguration("tpm0", TpmFront.SOCKET), TpmConfiguration("tpm1", TpmFront.SVSM))
    return LaunchConfiguration(volume_id=str(uuid.uuid4()), name=name, tpms=tpms)


@dataclasses.dataclass
class Chip:
    """A kernel's report source: the platform, as far as attestation uses it."""

    host_data: bytes
    measurement: bytes = DIGEST
    vmpl: int = 0
    machine_number: int = 0
    policy: int = GuestPolicy.MUST_BE_ONE | GuestPolicy.SMT
    reports: int = 0
    """How many were asked for."""

    def report(self, report_data: bytes) -> AttestationReport:
        """A signed report."""
        self.reports += 1
        chip = machine(self.machine_number)
        report = chip.new_report(3).replace(
            report_data=report_data,
            host_data=self.host_data,
            measurement=self.measurement,
            vmpl=self.vmpl,
            policy=self.policy,
            report_id=bytes(32),
            report_id_ma=b"\xff" * 32,
        )
        return AttestationReport(report=chip.sign_report(report), certificates=chip.certificates())


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Desk:
    """A broker with one volume, whose owner allows `DIGEST` from `machine(0)`."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.folder = folder
        self.broker = self.open()
        self.configuration = configuration()
        self.volume = self.broker.create_volume(self.configuration, root=simulated_root(0), allowed=[DIGEST])

    def open(self) -> Broker:
        """The same state, opened anew."""
        return Broker.open(self.folder, now=lambda: START + datetime.timedelta(days=30), clock=self.clock)

    @property
    def settings(self) -> Settings:
        """What the image pins."""
        return Settings(broker_public_key=self.broker.public_key)

    def client(self) -> AttestationClient:
        """A kernel's attempt for the volume."""
        return AttestationClient(settings=self.settings, configuration_json=self.configuration.to_json())

    def chip(self) -> Chip:
        """A chip that launched the volume's VM."""
        return Chip(host_data=self.configuration.host_data())

    def relay(self) -> Relay:
        """An honest proxy to the broker."""
        return Relay(BrokerApp(self.broker))

    def attest(self) -> tuple[Release, Relay]:
        """One whole attestation by honest parties."""
        relay = self.relay()
        return run(self.client(), self.chip(), relay), relay

    def reasons(self) -> list[str | None]:
        """Reasons in the audit trail."""
        return [line.reason for line in self.broker.audit_trail()]


class Relay:
    """A proxy, reduced to what it does with messages. Subclasses misbehave."""

    def __init__(self, app: BrokerApp, *, extensions: tuple[str, ...] = ("channel",)) -> None:
        self.app = app
        self.extensions = extensions
        self.cookie = ""

    def negotiate(self, body: bytes) -> bytes:
        """Answer the kernel's first frame."""
        negotiation.NegotiationRequest.parse(body)
        answer = self.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack())
        return negotiation.NegotiationAnswer(
            challenge=kbs.AuthAnswer.parse(answer.body).nonce, extensions=self.extensions
        ).pack()

    def attest(self, body: bytes) -> bytes:
        """Answer the kernel's second frame."""
        request = negotiation.AttestationRequest.parse(body)
        answer = self.request("POST", kbs.ATTEST_PATH, kbs.AttestRequest.from_attestation(request).pack())
        if answer.status != 200:
            return negotiation.AttestationAnswer(success=False, reason=kbs.ErrorBody.code_of(answer.body)).pack()
        token = kbs.AttestAnswer.parse(answer.body).token
        jwe = kbs.Jwe.parse(self.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").body)
        return self.deliver(jwe, token).pack()

    def deliver(self, jwe: kbs.Jwe, token: str) -> negotiation.AttestationAnswer:
        """What the kernel gets."""
        return negotiation.AttestationAnswer(
            success=True, secret=jwe.ciphertext, decryption=jwe.decryption(), token=token
        )

    def channel(self, body: bytes) -> bytes:
        """Relay one frame of the run-time channel."""
        sealed = negotiation.ChannelFrame.parse(body).sealed
        answer = self.request("POST", kbs.CHANNEL_PATH, kbs.ChannelBody(frame=sealed).pack())
        assert answer.status == 200, answer.body
        return negotiation.ChannelFrame(sealed=kbs.ChannelBody.parse(answer.body).frame).pack()

    def request(self, method: str, target: str, body: bytes) -> Response:
        """One request with this relay's cookie."""
        answer = self.app(Request(method=method, target=target, cookie=self.cookie, body=body))
        for name, value in answer.headers:
            if name == "Set-Cookie":
                self.cookie = value.split(";")[0]
        return answer


def run(client: AttestationClient, chip: Chip, relay: Relay) -> Release:
    """Drive one attempt."""
    report_data = client.negotiated(relay.negotiate(client.start()))
    return client.answered(relay.attest(client.reported(chip.report(report_data))))


def simulated_root(number: int) -> str:
    """How a row names the root of `machine(number)`."""
    return f"simulated:{machine(number).root_fingerprint.hex()}"
