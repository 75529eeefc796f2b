"""A whole shop with POS software before it: the real gateway as a process, cards at a virtual reader under
a real pcscd, a test CA's certificate of the name that terminals have."""

from __future__ import annotations

import os
import shutil
import socket
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pos_gateway.gateway.config import Home
from pos_gateway.gateway.nexo.setup import NexoFiles
from pos_gateway.lab.programs import Program
from pos_gateway.lab.virtual_reader import VirtualReader
from tests.gateway.nexo.counter import POI, SECOND_POI

PORT = 8443
API_KEY = "an api key for tests only"
PASSPHRASE = "a passphrase for tests only"
KEY_IDENTIFIER, KEY_VERSION = "test-key", 3
TERMINAL_NAME = f"{POI}.test.terminal.adyen.com"


class Site:
    """`host` is an address of this machine's own, so that the port that clients insist on is free."""

    def __init__(self, folder: Path, shop_folder: Path, reader: VirtualReader) -> None:
        self.folder = folder
        self.reader = reader
        self.host = free_host(PORT)
        self.home = Home(folder / "gateway")
        self.card = shop_folder / "card.json"
        self.card_state = folder / "card.state"
        shutil.copytree(shop_folder / "gateway", self.home.path)
        self.files = NexoFiles(self.home.nexo)
        self.files.folder.mkdir(mode=0o700)
        self.ca = folder / "ca.pem"
        make_certificates(self.files, self.ca, self.host)
        for path, text in ((self.files.passphrase, PASSPHRASE), (self.files.api_key, API_KEY)):
            path.write_text(text)
            path.chmod(0o600)
        self.home.overrides.write_text(
            f"""
            [http]
            port = 0
            [card]
            present_timeout_s = 30
            [nexo]
            enabled = true
            host = "{self.host}"
            port = {PORT}
            key_identifier = "{KEY_IDENTIFIER}"
            key_version = {KEY_VERSION}
            pois = {{ "{POI}" = "lane-1", "{SECOND_POI}" = "lane-2" }}
            """
        )
        self.gateway = self._start()

    def _start(self) -> Program:
        return Program(
            "gateway",
            "serve",
            "--home",
            str(self.home.path),
            log=self.folder / "gateway.log",
            environment={**os.environ, **self.reader.environment},
        )

    def kill_and_start_again(self) -> None:
        self.gateway.kill()
        self.gateway = self._start()

    def insert(self, *, slot: int = 0) -> None:
        self.reader.insert(self.card, state=self.card_state, slot=slot)

    def close(self) -> None:
        self.gateway.stop()


def free_host(port: int) -> str:
    """An address of the loopback network on which nobody listens at this port."""
    while True:
        host = f"127.{os.urandom(1)[0] % 200 + 20}.{os.urandom(1)[0]}.{os.urandom(1)[0] % 250 + 1}"
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return host


def make_certificates(files: NexoFiles, ca_file: Path, host: str) -> None:
    """A CA, and a terminal's certificate of it."""
    now = datetime.now(UTC)

    def certificate(
        name: str, issuer: str, key: ec.EllipticCurvePrivateKey, is_ca: bool
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )

    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = certificate("Test CA", "Test CA", ca_key, True).sign(ca_key, hashes.SHA256())
    names = x509.SubjectAlternativeName([x509.DNSName(TERMINAL_NAME), x509.IPAddress(ip_address(host))])
    own = certificate(TERMINAL_NAME, "Test CA", key, False).add_extension(names, critical=False)
    ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    signed = own.sign(ca_key, hashes.SHA256())
    files.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    files.key.chmod(0o600)
