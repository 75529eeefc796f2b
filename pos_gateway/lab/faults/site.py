"""A shop and its issuer as real programs, a customer who pays as fast as she can, and the audit after it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID

from pos_gateway.errors import AuthenticationFailed, PosGatewayError, Unavailable
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import Enrolled, load_enrolment, load_identity, store_enrolment
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.local_client import address, authorization
from pos_gateway.lab.faults.servers import GatewayOfItsOwn, Server, start_gateway, start_ledger
from pos_gateway.lab.faults.shim import WrongClock
from pos_gateway.lab.shop import Shop
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.records import Kind, uuid7

AMOUNT_MINOR: Final = 7
_LIMIT_MINOR: Final = 100_000_000
# The gateway's certificate is renewed all the while: that may be what is interrupted.
_POLICY: Final = Policy(card_tc_rate_limit=1_000_000, certificate_life_s=60)
_POLL_S: Final = 0.002
_RETRY_S: Final = 0.02
_ANSWER_TIMEOUT_S: Final = 30.0
_DRAIN_TIMEOUT_S: Final = 120.0
_FINAL: Final = ("approved", "declined", "cancelled", "failed")


class Site:
    """The homes of one gateway and one ledger, and the running programs, which may be killed at any time."""

    def __init__(self, folder: Path, *, settings: str = "", clock: WrongClock | None = None) -> None:
        self.folder = folder
        self._clock = clock
        self.home = Home(folder / "gateway")
        self.ledger_home = folder / "ledger"
        self._card = folder / "card.json"
        self._port = 0
        with Shop(folder, policy=_POLICY) as shop:
            _, personalisation = shop.issue(limit_minor=_LIMIT_MINOR)
            shop.publish()
        self._card.write_text(personalisation.to_json())
        self.home.overrides.write_text("[http]\nport = 0\n[synchroniser]\ninterval_s = 1\n" + settings)
        self.ledger: Server | None = None
        self.gateway: Server | GatewayOfItsOwn | None = None

    def start_ledger(self) -> str:
        """Its address is the same whenever it is started again."""
        self.ledger = start_ledger(self.ledger_home, self._port, self.folder / "ledger.log")
        self._port = int(self.ledger.address.rpartition(":")[2])
        return self.ledger.address

    def start_gateway(self) -> None:
        state, log = self.folder / "card.state", self.folder / "gateway.log"
        if self._clock is None:
            self.gateway = start_gateway(self.home, self._card, state, log)
        else:
            environment = self._clock.environment()
            self.gateway = GatewayOfItsOwn(self.home, self._card, state, log, environment)

    def reach_ledger_at(self, url: str) -> None:
        """What a gateway that starts from now on takes for the ledger's address."""
        was = load_enrolment(self.home.enrolment)
        self.home.enrolment.unlink()
        store_enrolment(self.home.enrolment, Enrolled(ledger_url=url, enrolment=was.enrolment))

    def stop(self) -> None:
        """End both programs in order."""
        for server in (self.gateway, self.ledger):
            if server is not None:
                server.stop()

    def synchronise(self) -> None:
        self.ask("POST", "/v1/synchronise", {})

    def drain(self, *, to: int = 0, under_load: bool = False) -> None:
        """Wait until everything was presented, or all but so many; to a restored ledger again.
        `under_load`: a customer goes on paying, and what was paid before this call is enough.

        Raises:
            PosGatewayError: nothing moves any more.
        """
        fewest, deadline = -1, 0.0
        begun_unix_ms = time.time_ns() // 1_000_000
        while True:
            self.synchronise()
            status = self.ask("GET", "/v1/status")
            waiting = status["queue"]["count"] + status["synchronisation"]["again"]
            oldest_unix_ms = status["queue"]["oldest_at_unix_ms"] or 0
            younger = under_load and not status["synchronisation"]["again"] and oldest_unix_ms > begun_unix_ms
            if waiting <= to or younger:
                return
            if fewest < 0 or waiting < fewest:
                fewest, deadline = waiting, time.monotonic() + _DRAIN_TIMEOUT_S
            elif time.monotonic() > deadline:
                problem = status["line"]["problem"] or "no problem is told"
                raise PosGatewayError(f"{waiting} payments still wait for the ledger: {problem}")
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request to the gateway.

        Raises:
            Unavailable: it does not answer.
        """
        return asked(self.home, method, path, body)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in (self.gateway, self.ledger):
            if server is not None:
                server.__exit__(kind, error, trace)


def asked(home: Home, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to the running gateway; cheaper than `local_client`, for those who ask all the time.

    Raises:
        Unavailable: it does not answer.
    """
    host = address(home).partition("://")[2]
    connection = http.client.HTTPConnection(host, timeout=_ANSWER_TIMEOUT_S)
    try:
        headers = {"Content-Type": "application/json", **authorization(home)}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        raise Unavailable("the gateway does not answer") from None
    finally:
        connection.close()
    if not isinstance(answer, dict):
        raise Unavailable("the gateway answers nonsense")
    return answer


class Customer:
    """Pays again and again until she is stopped. What was in doubt is asked for again under its id."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="customer", daemon=True)
        self.approved: list[UUID] = []
        self.other: Counter[str] = Counter()
        """Final states that were no approval, or their reasons."""
        self.refusals: Counter[str] = Counter()
        """What she was told instead of a payment's state."""
        self.problem: BaseException | None = None

    def stop(self) -> None:
        """Finish what is under way, then stop.

        Raises:
            PosGatewayError: she could not pay any more.
        """
        self._stop.set()
        self._thread.join(_DRAIN_TIMEOUT_S)
        if self._thread.is_alive() or self.problem is not None:
            raise PosGatewayError(f"the customer is stuck: {self.problem}")

    def wait_for(self, approvals: int) -> None:
        """Until so many more were approved."""
        wanted = len(self.approved) + approvals
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        while len(self.approved) < wanted:
            if self.problem is not None or time.monotonic() > deadline:
                raise PosGatewayError(f"no more approvals: {self.problem or dict(self.other)}")
            time.sleep(_POLL_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_DRAIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._pay(uuid7(time.time_ns() // 1_000_000, os.urandom(10)))
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for her
            self.problem = error

    def _pay(self, payment_id: UUID) -> None:
        order = {"id": str(payment_id), "amount_minor": AMOUNT_MINOR, "currency": "CNY"}
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        view: dict[str, Any] = {}
        while view.get("state") not in _FINAL:
            if time.monotonic() > deadline:
                raise PosGatewayError(f"a payment never ended: {view}")
            try:
                view = self._site.ask("POST", "/v1/payments", order)
                if "error" in view:
                    self.refusals[str(view["error"]["reason"])] += 1
                    time.sleep(_RETRY_S)
                elif view["state"] not in _FINAL:
                    time.sleep(_POLL_S)
            except Unavailable:
                time.sleep(_RETRY_S)
        if view["state"] == "approved":
            self.approved.append(payment_id)
        else:
            self.other[str(view.get("reason") or view["state"])] += 1


@dataclass(frozen=True, slots=True)
class Audit:
    """The truth after a scenario, from the journal and the ledger's books themselves."""

    lost: int
    posted_twice: int
    out_of_balance_minor: int
    posted: int
    alarms: int
    wrong: tuple[str, ...]


def audit(home: Home, ledger_home: Path, acknowledged: Collection[UUID]) -> Audit:
    """Compare what was acknowledged, what is journalled and what was posted: each payment of
    `AMOUNT_MINOR`. Neither program runs any more."""
    return audit_all([home], ledger_home, acknowledged)


def audit_all(homes: Iterable[Home], ledger_home: Path, acknowledged: Collection[UUID]) -> Audit:
    """The same for several gateways of one ledger."""
    wrong: list[str] = []
    journalled: list[UUID] = []
    for home in homes:
        with JournalReader.open(home.journal) as journal:
            try:
                journal.verify(load_identity(home.identity_key).public_key())
            except AuthenticationFailed as error:
                wrong.append(f"the journal does not verify: {error}")
            after = 0
            while page := journal.records(after):
                after = page[-1].sequence
                journalled += [record.id for record in page if record.kind is Kind.AUTHORIZATION]
    with Ledger.open(ledger_home) as ledger:
        try:
            ledger.check_books()
        except AuthenticationFailed as error:
            wrong.append(f"the books do not hold: {error}")
        posted = Counter(payment.record_id for payment in ledger.payments())
        outstanding_minor = sum(account.outstanding_minor for account in ledger.accounts())
        off_minor = abs(sum(ledger.trial_balance().values()))
        alarms = len(ledger.alarms())
    if strangers := posted.keys() - set(journalled):
        wrong.append(f"{len(strangers)} postings of payments the journal does not know")
    return Audit(
        lost=len((set(acknowledged) | set(journalled)) - posted.keys()),
        posted_twice=sum(posted.values()) - len(posted),
        out_of_balance_minor=off_minor + abs(outstanding_minor - AMOUNT_MINOR * len(posted)),
        posted=len(posted),
        alarms=alarms,
        wrong=tuple(wrong),
    )


def copied(template: Path | None, folder: Path) -> Path:
    """A folder for a site, with a ledger copied into it where one was made before: its keys take a while."""
    folder.mkdir(exist_ok=True)
    if template is not None:
        shutil.copytree(template, folder / "ledger")
    return folder
