"""python-tuf's own client reads our repository, from the real ledger's server, with nothing of ours."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from pos_gateway.enrolment import EnrolmentRequest
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.signing import Role
from tests.gateway.test_with_ledger import MERCHANT, serving


class Plain(FetcherInterface):
    def __init__(self, certificate: Path) -> None:
        self._context = ssl.create_default_context(cafile=str(certificate))

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            answer = urllib.request.urlopen(url, context=self._context)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise DownloadHTTPError(str(error), error.code) from None
        with answer:
            return iter([answer.read()])


def updated(ledger: Ledger, url: str, folder: Path, root: bytes | None) -> Updater:
    folder.mkdir(exist_ok=True)
    updater = Updater(
        str(folder),
        f"{url}/v1/tuf/metadata/",
        str(folder),
        f"{url}/v1/tuf/targets/",
        fetcher=Plain(ledger.home / "keys" / "authority.crt"),
        bootstrap=root,
    )
    updater.refresh()
    return updater


def check(ledger: Ledger, updater: Updater, name: str) -> None:
    file = updater.get_targetinfo(name)
    assert file is not None, name
    path = Path(updater.download_target(file))
    assert path.read_bytes() == ledger.repository.target(file).read_bytes()


async def test_tufs_own_updater_follows_us(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger", issuer="Test Issuer") as ledger:
        account = ledger.open_account(holder="A. Customer", limit_minor=100_000)
        ledger.issue_token(account.id)
        request = EnrolmentRequest.make(ledger.invite(MERCHANT), Ed25519PrivateKey.generate())
        root = ledger.enrol(request).trusted_root
        async with serving(ledger) as url:
            folder = tmp_path / "client"
            updater = await asyncio.to_thread(updated, ledger, url, folder, root)
            assert updater.get_targetinfo("limits-1.snapshot") is None
            ledger.publish()
            updater = await asyncio.to_thread(updated, ledger, url, folder, root)
            await asyncio.to_thread(check, ledger, updater, "limits-1.snapshot")
            # Every key of the server's is replaced, and a root key too.
            for role in (Role.ROOT, Role.TARGETS, Role.SNAPSHOT, Role.TIMESTAMP, Role.LIMITS):
                old = next(state for state in ledger.ceremony.state().roles if state.role is role).keys[0]
                new, _ = ledger.ceremony.create(role)
                state = ledger.ceremony.rotate(new.public, old.id)
                assert state.draft is None, role
            ledger.publish()
            updater = await asyncio.to_thread(updated, ledger, url, folder, root)
            for name in ("limits-2.snapshot", "limits-1-2.delta", "limits-2.head"):
                await asyncio.to_thread(check, ledger, updater, name)
            assert ledger.ceremony.state().version == 6
