"""`tools/demo`: the main job, for real, told as a story.

The issuer's ledger and the shop's gateway run as processes of their own; cards tap over a real pcscd. The
ledger is really stopped, the gateway really killed. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from pos_gateway.emv.apdu import INS_GENERATE_AC
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.certificate import connect
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.local_client import ask, watch
from pos_gateway.lab.forged_card import with_another_icc_key
from pos_gateway.lab.programs import Program, command
from pos_gateway.lab.virtual_reader import ForeignCard, VirtualReader
from pos_gateway.lab.vpcd import Fault, FaultKind
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.money import Money, currency
from pos_gateway.records import Kind, Verdict, uuid7

_PAGE_PORT: Final = 8155
_WAIT_S: Final = 30.0
_SHARE_PERCENT: Final = 50
_POLL_S: Final = 0.1
_UNIT: Final = currency("CNY")
_STAFF: Final = (("Lin", "owner", "730925"), ("Chen", "manager", "481516"), ("Mei", "cashier", "2846"))
_MORNING_SEED: Final = 7
_MORNING_TAPS: Final = 8


class StoryFailed(PosGatewayError):
    """Something did not happen as it must."""


@dataclass(slots=True)
class Tally:
    """What the customers and the cashier saw."""

    approved: list[str] = field(default_factory=list)
    declined: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Customer:
    """One token in somebody's pocket."""

    name: str
    account_id: str
    token_id: str
    card: Path
    state: Path


class Teller:
    """Says what happens, and how long into the story."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def chapter(self, title: str) -> None:
        self._console.print(f"\n[bold]{title}[/bold]")

    def say(self, text: str, sign: str = "·") -> None:
        colour = {"✓": "green", "✕": "red", "↻": "yellow"}.get(sign, "dim")
        self._console.print(f"[dim]{self.seconds:6.1f} s[/dim]  [{colour}]{sign}[/{colour}] {text}")


class Story:
    """Everything that runs while the story is told, and what has come of it so far."""

    def __init__(self, folder: Path, reader: VirtualReader, teller: Teller) -> None:
        self.folder = folder
        self.reader = reader
        self.teller = teller
        self.tally = Tally()
        self.home = Home(folder / "gateway")
        self.ledger_home = folder / "ledger"
        self.ledger: Program | None = None
        self.gateway: Program | None = None
        self.ledger_port = _free_port()

    def close(self) -> None:
        for program in (self.gateway, self.ledger):
            if program is not None:
                program.stop()

    # The issuer

    def start_ledger(self) -> None:
        self.ledger = Program(
            "ledger",
            "serve",
            "--home",
            str(self.ledger_home),
            "--port",
            str(self.ledger_port),
            log=self.folder / "ledger.log",
        )

    def stop_ledger(self) -> None:
        if self.ledger is not None:
            self.ledger.stop()
            self.ledger = None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.ledger_port), 1):
            raise StoryFailed("the ledger still answers after it was stopped")

    def issue(self, name: str, limit: str) -> Customer:
        account = self.run_ledger("account", "open", "--holder", name, "--limit", limit)
        card = self.folder / f"{account['id']}.card.json"
        token = self.run_ledger("token", "issue", account["id"], "--out", str(card))
        return Customer(name, account["id"], token["id"], card, card.with_suffix(".state"))

    def publish(self) -> int:
        return int(self.run_ledger("snapshot", "publish")["version"])

    def run_ledger(self, *arguments: str) -> dict[str, Any]:
        return self.run("ledger", *arguments, "--home", str(self.ledger_home))

    # The shop

    def enroll(self) -> None:
        invitation = self.run_ledger(
            "gateway",
            "invite",
            "--merchant-id",
            "FERRY-PIER-9",
            "--merchant-name",
            "Harbour Ferry Kiosk",
            "--category",
            "4111",
        )
        self.run(
            "gateway",
            "enroll",
            "--ledger",
            f"https://127.0.0.1:{self.ledger_port}",
            "--code",
            invitation["code"],
            "--home",
            str(self.home.path),
        )
        one_reader = json.dumps(f"^{re.escape(self.reader.names[0])}$")
        self.home.overrides.write_text(
            f"[http]\nport = {_free_port(_PAGE_PORT)}\n[reader]\nname_pattern = {one_reader}\n"
        )

    def start_gateway(self) -> None:
        self.gateway = Program(
            "gateway",
            "serve",
            "--home",
            str(self.home.path),
            log=self.folder / "gateway.log",
            environment=self.reader.environment,
        )

    def kill_gateway(self) -> None:
        if self.gateway is None:
            raise StoryFailed("no gateway is running")
        self.gateway.kill()
        self.gateway = None

    def status(self) -> dict[str, Any]:
        return ask(self.home, "GET", "/v1/status")

    def synchronise(self) -> None:
        ask(self.home, "POST", "/v1/synchronise", {})

    def pay(
        self,
        who: str,
        amount: str,
        card: Customer | ForeignCard | Path,
        faults: Sequence[Fault] = (),
        stays_until: Callable[[], bool] = lambda: True,
    ) -> dict[str, Any]:
        """One sale at the till, from the cashier's amount to the result; tears are tapped again. The card
        stays in the field until then, and until `stays_until` holds."""
        order = {
            "id": str(uuid7(time.time_ns() // 1_000_000, os.urandom(10))),
            "amount_minor": _UNIT.parse(amount),
            "currency": _UNIT.code,
        }
        view = ask(self.home, "POST", "/v1/payments", order)
        self.insert(card, faults)

        def on_event(event: dict[str, Any]) -> bool:
            if event["state"] == "tap_again" and view["state"] != "tap_again":
                self.teller.say(
                    f"{who}: the card left before it had answered. The till asks to tap again.", "↻"
                )
                self.insert(card, ())
            view.update(event)
            return not event["final"]

        watch(self.home, f"/v1/payments/{order['id']}/events", on_event)
        self.until("what the card stays for", stays_until)
        self.reader.remove()
        self._count(who, view)
        return view

    def insert(self, card: Customer | ForeignCard | Path, faults: Sequence[Fault]) -> None:
        if isinstance(card, Customer):
            self.reader.insert(card.card, state=card.state, faults=faults)
        else:
            self.reader.insert(card, faults=faults)

    def _count(self, who: str, view: dict[str, Any]) -> None:
        if view["state"] == "approved":
            self.tally.approved.append(view["id"])
            self.teller.say(f"{who}: {view['amount']} approved, journal record {view['sequence']}.", "✓")
        elif view["state"] == "declined":
            self.tally.declined[view["reason"]] += 1
            self.teller.say(f"{who}: {view['amount']} declined. {view['english']}", "✕")
        else:
            raise StoryFailed(f"{who}: {view['state']} {view['message']}")

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not condition():
            if time.monotonic() > deadline:
                raise StoryFailed(f"{what}: did not happen within {_WAIT_S:g} s")
            time.sleep(_POLL_S)

    def run(self, *arguments: str) -> dict[str, Any]:
        answer = command(*arguments)
        if answer["exit"] != 0:
            raise StoryFailed(f"`pos-gateway {' '.join(arguments[:3])}`: {answer.get('error', answer)}")
        return answer


def expect(view: dict[str, Any], outcome: str) -> dict[str, Any]:
    """Hold a payment to how it must end.

    Raises:
        StoryFailed: it ended otherwise.
    """
    found = view["reason"] or view["state"]
    if found != outcome:
        raise StoryFailed(f"expected {outcome}, got {found}: {view['message']}")
    return view


def tell(story: Story) -> dict[str, Any]:
    """The story from beginning to end; returns its summary."""
    say, chapter = story.teller.say, story.teller.chapter

    chapter("1. The issuer")
    story.run_ledger("init", "--issuer", "Harbour Credit")
    with Ledger.open(story.ledger_home) as ledger:
        ledger.set_policy(ledger.policy.model_copy(update={"token_share_percent": _SHARE_PERCENT}))
    say("Made the ledger: CA and issuer keys, signing keys, an empty book.")
    say("Its policy: shops know half of each limit in advance; for the rest they must ask.")
    mei = story.issue("Mei", "300.00")
    tom = story.issue("Tom", "50.00")
    eve = story.issue("Eve", "500.00")
    story.run_ledger("token", "block", eve.token_id)
    say("Opened accounts for Mei (limit 300.00), Tom (50.00) and Eve (500.00; her card is blocked).")
    version = story.publish()
    story.start_ledger()
    say(f"Published signed limit snapshot {version}. The ledger serves at port {story.ledger_port}.")

    chapter("2. The shop")
    story.enroll()
    story.start_gateway()
    story.until("the first snapshot", lambda: story.status()["snapshot"] is not None)
    say(f"Enrolled the kiosk's gateway; it fetched and verified snapshot {version}.")
    before = {c.name: _headroom(story, c) for c in (mei, tom)}

    chapter("3. The ferry leaves: no network")
    story.stop_ledger()
    say("The ledger is stopped; nothing answers at its port.")
    expect(story.pay("Mei", "25.60", mei), "approved")
    expect(story.pay("Tom", "18.00", tom), "approved")
    expect(story.pay("Tom, over his ceiling", "40.00", tom), "over_ceiling")
    expect(story.pay("Eve, blocked", "12.00", eve), "blocked")

    expect(story.pay("a scheme's card", "9.90", ForeignCard.SCHEME), "card_not_supported")
    forged = story.folder / "forged.card.json"
    genuine = Personalisation.from_json(mei.card.read_text())
    forged.write_text(with_another_icc_key(genuine).to_json())
    expect(story.pay("a copy of Mei's card with another key", "30.00", forged), "authentication_failed")

    counter = _counter(mei)
    torn = Fault(FaultKind.REMOVE_AFTER, instruction=INS_GENERATE_AC)
    expect(story.pay("Mei, pulling her card out", "14.20", mei, [torn]), "approved")
    if _counter(mei) - counter != _UNIT.parse("14.20"):
        raise StoryFailed("the torn tap moved the card's counter more than once")
    say("Her card's counter moved once for the two taps.")

    chapter("4. The power fails right after an approval")
    last = expect(story.pay("Mei", "33.30", mei), "approved")
    story.kill_gateway()
    say("Killed the gateway with SIGKILL.")
    story.start_gateway()
    known = expect(ask(story.home, "GET", f"/v1/payments/{last['id']}"), "approved")
    say(f"Restarted. It knows: {known['amount']} approved, journal record {known['sequence']}.")
    again = {"id": last["id"], "amount_minor": last["amount_minor"], "currency": last["currency"]}
    expect(ask(story.home, "POST", "/v1/payments", again), "approved")
    say("The POS asks for the same payment again: the same answer, and no second charge.")
    verified = story.run("journal", "verify", "--home", str(story.home.path))["verified"]
    say(f"The journal verifies: {verified} records, gap-free, chained, signed.")

    chapter("5. The line is back")
    story.start_ledger()
    story.synchronise()
    story.until("presentment", lambda: story.status()["queue"]["count"] == 0)
    refused = story.status()["refused"]
    if refused:
        raise StoryFailed(f"the ledger refused {refused}")
    say(f"All {len(story.tally.approved)} approvals presented and posted.")
    verdicts = asyncio.run(_present_again(story.home))
    if set(verdicts) != {Verdict.DUPLICATE}:
        raise StoryFailed(f"the same batch again was answered {verdicts}")
    say(f"Presented the same batch again: {len(verdicts)} times “duplicate”, nothing posted twice.")

    version = story.publish()
    story.synchronise()
    story.until("the next snapshot", lambda: story.status()["snapshot"]["version"] == version)
    say(f"Snapshot {version} is on the till. What may still be spent off the network:")
    for customer in (mei, tom):
        left = _headroom(story, customer)
        if left >= before[customer.name]:
            raise StoryFailed(f"{customer.name} can spend as much as before")
        say(f"{customer.name}: {_money(before[customer.name])} → {_money(left)}")

    chapter("6. More than the shop knows of")
    paid = story.pay("Mei, beyond the till's limits", "150.00", mei, stays_until=lambda: _has_note(mei))
    view = expect(paid, "approved")
    if _source(story, view["id"]) != "grant":
        raise StoryFailed("it was approved without the issuer")
    say("The card wanted its issuer asked; the ledger granted it, and the card paid in the same tap.")
    say("After that the till handed the card a note: fresh limits, signed, for shops off the network.")
    story.until("presentment", lambda: story.status()["queue"]["count"] == 0)

    chapter("7. Off the network again")
    story.stop_ledger()
    expect(story.pay("Tom, beyond the till's limits", "30.00", tom), "over_ceiling")
    view = expect(story.pay("Mei, with her note", "20.00", mei), "approved")
    if _source(story, view["id"]) != "note":
        raise StoryFailed("it was approved without the note")
    say("The till's own limits for her are long spent; her card brought newer ones.")
    forecast = story.status()["forecast"]
    say(f"The till can still approve {forecast['amount_left']} on its own; first ends {forecast['first']}.")
    story.start_ledger()
    story.synchronise()
    story.until("presentment", lambda: story.status()["queue"]["count"] == 0)
    if refused := story.status()["refused"]:
        raise StoryFailed(f"the ledger refused {refused}")
    say("Presented and posted, too.")
    return _summary(story)


def _headroom(story: Story, customer: Customer) -> int:
    """How far the published ceiling lies above the card's counter, in minor units."""
    account = story.run_ledger("account", "show", customer.account_id)
    token = next(token for token in account["tokens"] if token["id"] == customer.token_id)
    return int(token["ceiling"]) - _counter(customer)


def _counter(customer: Customer) -> int:
    """The counter as the card itself holds it."""
    if customer.state.exists():
        return int(json.loads(customer.state.read_text())["counter"])
    return Personalisation.from_json(customer.card.read_text()).counter


def _source(story: Story, payment_id: str) -> str:
    """Which limit record a payment relied on."""
    with JournalReader.open(story.home.journal) as journal:
        records = [r for r in journal.records(0, 1000) if str(r.id) == payment_id]
    return str(records[0].facts()["limit_source"]) if records else ""


def _has_note(customer: Customer) -> bool:
    return bool(json.loads(customer.state.read_text())["note"])


def _money(amount_minor: int) -> str:
    return str(Money(amount_minor, _UNIT))


async def _present_again(home: Home) -> list[Verdict]:
    """Present every authorization of the journal once more, as the gateway itself would."""
    enrolled = load_enrolment(home.enrolment)
    with JournalReader.open(home.journal) as journal:
        records = [r for r in journal.records(0, 1000) if r.kind is Kind.AUTHORIZATION]
    async with connect(home) as client:
        answers = await client.present(
            enrolled.enrolment.gateway_id, records, load_identity(home.identity_key)
        )
    return [answer.verdict for answer in answers]


def _summary(story: Story) -> dict[str, Any]:
    """Counted in the ledger's own books, not by what the story believes."""
    with Ledger.open(story.ledger_home) as ledger:
        ledger.check_books()
        posted = Counter(str(payment.record_id) for payment in ledger.payments())
    return {
        "approved": len(story.tally.approved),
        "declined": dict(sorted(story.tally.declined.items())),
        "posted": len(posted),
        "lost": len(set(story.tally.approved) - posted.keys()),
        "posted_twice": sum(times - 1 for times in posted.values()),
        "seconds": round(story.teller.seconds, 1),
    }


def _morning(story: Story, customer: Customer) -> None:
    """So that the page has something to show: the same small sales every time."""
    amounts = random.Random(_MORNING_SEED)
    for _ in range(_MORNING_TAPS):
        story.pay("A customer", f"{amounts.randrange(3, 60)}.{amounts.choice('0258')}0", customer)


def keep_open(story: Story) -> None:
    """Until Ctrl-C, a customer with a fresh limit taps whenever the page asks for a card."""
    customer = story.issue("Ann", "2000.00")
    story.publish()
    story.synchronise()
    for name, role, pin in _STAFF:
        ask(story.home, "POST", "/v1/staff", {"name": name, "role": role, "pin": pin})
    story.teller.chapter("The shop opens; sign in at its page and take a payment")
    for name, role, pin in _STAFF:
        story.teller.say(f"{name}, {role}: PIN {pin}")
    _morning(story, customer)

    def on_event(event: dict[str, Any]) -> bool:
        if event.get("state") == "present_card":
            threading.Timer(1.0, story.insert, (customer, ())).start()
        elif event.get("final"):
            threading.Timer(1.0, story.reader.remove).start()
        return True

    with contextlib.suppress(KeyboardInterrupt):
        watch(story.home, "/v1/events", on_event)


@contextlib.contextmanager
def _staged(folder: Path | None) -> Iterator[Story]:
    with contextlib.ExitStack() as stack:
        if folder is None:
            scratch = tempfile.TemporaryDirectory(prefix="pos-gateway-demo-")
            folder = Path(stack.enter_context(scratch))
        reader = stack.enter_context(VirtualReader(slots=1))
        story = Story(folder, reader, Teller())
        try:
            yield story
        finally:
            story.close()


def _free_port(wanted: int = 0) -> int:
    """The wanted port of loopback if it is free, else any."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise StoryFailed("no free port on loopback")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end when the story is told")
    parser.add_argument("--folder", type=Path, help="keep everything in this empty folder")
    options = parser.parse_args()
    once: bool = options.once
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # both end it in order
    try:
        with _staged(options.folder) as story:
            summary = tell(story)
            well = summary["lost"] == 0 and summary["posted_twice"] == 0
            if not once and story.gateway is not None:
                story.teller.chapter(f"The till's page stays up at {story.gateway.address} until Ctrl-C")
                story.teller.say("Take a payment there: a virtual customer taps for you.")
            print(json.dumps(summary), flush=True)
            if not once:
                keep_open(story)
            return 0 if well else 1
    except PosGatewayError as error:
        print(f"The story went wrong: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
