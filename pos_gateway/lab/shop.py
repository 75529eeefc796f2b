"""A whole shop and its issuer in one process, for benchmarks and tests: real keys, real files, no network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final

from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.enrolment import EnrolmentRequest, Merchant
from pos_gateway.gateway.certificate import TlsFile
from pos_gateway.gateway.config import Home, load_settings
from pos_gateway.gateway.enrolling import keep_enrolment
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.identity import load_enrolment, load_or_create_identity
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.program import local_now, make_till, now_unix_ms
from pos_gateway.gateway.till import Clock
from pos_gateway.lab.direct_line import DirectLine
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.keys import ICC_KEY_BITS, generate_rsa_key
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.ledger.settlement import RecordVerdict
from pos_gateway.records import Record, presentment_body, sign_batch

_NO_NETWORK: Final = "https://127.0.0.1:1"
MERCHANT: Final = Merchant(id="FERRY-PIER-9", name="Harbour Ferry Kiosk", category="4111")


class Shop:
    """One enrolled gateway's journal, feed and till beside the ledger that it enrolled with.

    Its line to the issuer (`line`) is down until a test or story puts it up. `gateway` names the gateway's
    folder: several shops may stand in one folder, beside one ledger.

    What lies in the folder already is used: a ledger, whose keys take a second to make, or a whole shop
    that was killed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        policy: Policy | None = None,
        clock: Clock = local_now,
        gateway: str = "gateway",
        merchant: Merchant = MERCHANT,
    ) -> None:
        place = folder / "ledger"
        self.ledger = Ledger.open(place) if place.exists() else Ledger.create(place, issuer="Harbour Credit")
        if policy is not None:
            self.ledger.set_policy(policy)
        self._merchant = merchant
        self.home = Home(folder / gateway)
        self.home.create()
        self.key = load_or_create_identity(self.home.identity_key)
        if not self.home.enrolment.exists():
            self._enrol()
        self.enrolment = load_enrolment(self.home.enrolment).enrolment
        self.settings = load_settings(self.home)
        self.journal = Journal.open(
            self.home.journal, gateway_key=self.key, gateway_id=self.enrolment.gateway_id
        )
        self.feed = SnapshotFeed(self.home.snapshots, self.journal, self.enrolment, clock=now_unix_ms)
        self.feed.load()
        self.line = DirectLine(self.ledger, self.key)
        self.till = make_till(
            self.enrolment, self.settings, self.journal, self.feed, clock=clock, issuer=self.line
        )

    def _enrol(self) -> None:
        tls_key = TlsFile(self.home.credentials).new_key()
        request = EnrolmentRequest.make(self.ledger.invite(self._merchant), self.key, tls_key)
        keep_enrolment(self.home, _NO_NETWORK, self.ledger.enrol(request), tls_key)

    def issue(self, *, limit_minor: int, per_tap_cap_minor: int | None = None) -> tuple[str, Personalisation]:
        """A new account with one token; returns the token's id and its card's data."""
        account = self.ledger.open_account(holder="A. Customer", limit_minor=limit_minor)
        issued = self.ledger.issue_token(
            account.id, per_tap_cap_minor=per_tap_cap_minor, icc_key=self._icc_key
        )
        return issued.token.id, issued.personalisation

    @cached_property
    def _icc_key(self) -> rsa.RSAPrivateKey:
        """One key for all of this shop's cards: making one takes as long as hundreds of taps."""
        return generate_rsa_key(ICC_KEY_BITS)

    def publish(self) -> None:
        """Publish new limits and bring them to the gateway as the feed would."""
        self.ledger.publish()
        self.feed.refresh(FolderRepository(self.ledger.repository.folder))

    def present(self, records: Sequence[Record]) -> list[RecordVerdict]:
        """Present records to the ledger as the synchroniser would, and journal nothing."""
        gateway_id = self.enrolment.gateway_id
        body = presentment_body(gateway_id, records)
        return self.ledger.present(gateway_id, body, sign_batch(body, self.key))

    def close(self) -> None:
        self.feed.close()
        self.journal.close()
        self.ledger.close()

    def __enter__(self) -> Shop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
