"""A TLS server on which a test scripts what the real ledger would never do: lie, stall, stop half-way."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.records import Record

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LedgerStub:
    """Its routes can be replaced while it runs: set `on_present`, `on_file`, `on_other`; `repository` is
    the folder it serves."""

    def __init__(self) -> None:
        self.repository: Path | None = None
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.on_present: Handler = self.post_all
        self.on_file: Handler = self.file
        self.on_other: Handler = self.health
        self.url = ""
        self.authority = b""

    async def post_all(self, request: web.Request) -> web.StreamResponse:
        records = await self.records(request)
        return web.json_response(
            {"verdicts": [{"id": str(r.id), "verdict": "posted", "reason": ""} for r in records]}
        )

    async def records(self, request: web.Request) -> list[Record]:
        self.bodies.append(await request.read())
        return [Record.from_wire(raw) for raw in (await request.json())["records"]]

    async def file(self, request: web.Request) -> web.StreamResponse:
        path = self.path(request)
        if path is None or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)

    def path(self, request: web.Request) -> Path | None:
        return self.repository / request.match_info["path"] if self.repository else None

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok", "time_unix_ms": 1})

    def client(self) -> LedgerClient:
        return LedgerClient(self.url, self.authority)

    @asynccontextmanager
    async def serving(self, folder: Path, port: int = 0) -> AsyncIterator[int]:
        async def present(request: web.Request) -> web.StreamResponse:
            return await self.on_present(request)

        async def file(request: web.Request) -> web.StreamResponse:
            self.requests.append((request.match_info["path"], request.headers.get("Range", "")))
            return await self.on_file(request)

        async def other(request: web.Request) -> web.StreamResponse:
            return await self.on_other(request)

        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/presentments", present)
        app.router.add_get("/v1/tuf/{path:.+}", file)
        app.router.add_route("*", "/{tail:.*}", other)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        context, self.authority = _tls(folder)
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        bound: int = runner.addresses[0][1]
        self.url = f"https://127.0.0.1:{bound}"
        try:
            yield bound
        finally:
            await runner.cleanup()


def strange_authority(folder: Path) -> bytes:
    """The certificate of an authority that nobody here has to do with."""
    (folder / "stranger").mkdir()
    return _tls(folder / "stranger")[1]


def _tls(folder: Path) -> tuple[ssl.SSLContext, bytes]:
    """A server context with the folder's self-signed certificate, its own authority; and that (DER)."""
    path = folder / "tls.pem"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ledger")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
            )
            .sign(key, hashes.SHA256())
        )
        path.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + certificate.public_bytes(Encoding.PEM)
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    certificate = x509.load_pem_x509_certificate(path.read_bytes().split(b"-----END PRIVATE KEY-----\n")[1])
    return context, certificate.public_bytes(Encoding.DER)
