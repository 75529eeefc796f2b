"""`replace`: tills die with payments in them; another one of the shop, or the issuer, presents what is found
on the old disk or its backup, and takes over."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Final
from uuid import UUID

from pos_gateway.errors import AuthenticationFailed, PosGatewayError
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.old_journal import export_adopted, opened_copy
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import AMOUNT_MINOR, audit_all, copied
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import MERCHANT, Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.carry import take_queues
from pos_gateway.ledger.config import Policy
from pos_gateway.records import Verdict, presentment_body, sign_batch, uuid7

SHORT_DEATHS: Final = 9
LONG_DEATHS: Final = 150
_LIMIT_MINOR: Final = 1_000_000
_AT_ONCE: Final = 50


def replace(folder: Path, seed: int, *, deaths: int, ledger: Path | None = None) -> Finding:
    """So many tills die one after the other; each one's successor presents what it had left."""
    chance = random.Random(seed)
    copied(ledger, folder)
    wrong: list[str] = []
    approved: list[UUID] = []
    ways: Counter[str] = Counter()
    homes: list[Home] = []
    card: VirtualCard | None = None
    stranger = Shop(
        folder,
        gateway="stranger",
        merchant=MERCHANT.model_copy(update={"id": "STRANGER-1", "name": "Another"}),
    )
    stranger.close()
    till = _till(folder, 0)
    for number in range(deaths):
        homes.append(till.home)
        if card is None:
            card = VirtualCard(till.issue(limit_minor=_LIMIT_MINOR)[1])
        till.publish()
        approved += [_pay(till, card, chance) for _ in range(chance.randint(1, 8))]
        if chance.random() < 0.5:
            # Some had been presented; of these, some verdicts never arrived.
            till.present(till.journal.queue()[: chance.randint(1, 4)])
            ways["presented before it died"] += 1
        found = _what_is_found(till, folder / f"found-{number}", chance, ways)
        till.close()
        till = _till(folder, number + 1)
        refused = _by_a_stranger(stranger, till, found)
        if refused:
            wrong.append(refused)
        told: Counter[Verdict] = Counter()
        for way in chance.sample([_by_its_successor, _on_a_stick, _at_the_issuer], chance.randint(1, 3)):
            ways[way.__name__.strip("_")] += 1
            told += way(till, found, folder / f"stick-{number}")
        if odd := {verdict.value for verdict in told if not verdict.paid}:
            wrong.append(f"the ledger said {sorted(odd)}")
    if card is not None:
        # The lanes go on at the newest till.
        till.publish()
        approved.append(_pay(till, card, chance))
        till.present(till.journal.queue())
    homes.append(till.home)
    if alarms := len(till.ledger.alarms()):
        wrong.append(f"{alarms} alarms")
    till.close()
    truth = audit_all(homes, folder / "ledger", approved)
    return Finding(
        scenario="replace",
        seed=seed,
        tried=f"{deaths} tills died with payments in them; old disks, with their write-ahead log, and "
        "backups were presented by the successor, on a stick, by the issuer, or by all; a stranger tried",
        times=deaths,
        acknowledged=len(approved),
        lost=truth.lost,
        posted_twice=truth.posted_twice,
        out_of_balance_minor=truth.out_of_balance_minor,
        wrong=tuple(wrong[:20]) + truth.wrong,
        details={"ways": dict(sorted(ways.items()))},
    )


def _till(folder: Path, number: int) -> Shop:
    return Shop(folder, policy=Policy(card_tc_rate_limit=1_000_000), gateway=f"till-{number}")


def _pay(shop: Shop, card: VirtualCard, chance: random.Random) -> UUID:
    payment_id = uuid7(shop.ledger.now_unix_ms(), chance.randbytes(10))
    payment = shop.till.new_payment(payment_id, AMOUNT_MINOR, shop.journal.last_sequence + 1)
    outcome = shop.till.tap(payment, DirectChannel(card))
    if not isinstance(outcome, Approved):
        raise PosGatewayError(f"a payment was not approved: {outcome}")
    return payment_id


def _what_is_found(till: Shop, place: Path, chance: random.Random, ways: Counter[str]) -> Path:
    """What is left of a till: never its keys."""
    place.mkdir()
    journal = till.home.journal
    match chance.randrange(3):
        case 0:
            ways["the disk of a till that was on"] += 1
            for path in journal.parent.glob("journal.sqlite3*"):
                if path.suffix != ".lock" and not path.name.endswith("-shm"):
                    shutil.copy(path, place / path.name)
            return place
        case 1:
            ways["a backup"] += 1
            with JournalReader.open(journal) as reader:
                reader.backup(place / "backup", till.key.public_key())
            return place / "backup"
        case _:
            ways["a write-protected disk"] += 1
            for path in journal.parent.glob("journal.sqlite3*"):
                if path.suffix != ".lock" and not path.name.endswith("-shm"):
                    shutil.copy(path, place / path.name)
                    (place / path.name).chmod(0o400)
            place.chmod(0o500)
            return place


def _by_its_successor(till: Shop, found: Path, _stick: Path) -> Counter[Verdict]:
    told: Counter[Verdict] = Counter()
    with opened_copy(found) as journal:
        for records in journal.open_records(_AT_ONCE):
            body = presentment_body(journal.gateway_id, records)
            answers = till.ledger.adopt(till.enrolment.gateway_id, body, sign_batch(body, till.key))
            told.update(answer.verdict for answer in answers)
    return told


def _on_a_stick(till: Shop, found: Path, stick: Path) -> Counter[Verdict]:
    with opened_copy(found) as journal:
        export_adopted(journal, till.enrolment.gateway_id, till.key, stick)
    [queue] = take_queues(till.ledger, stick)
    if queue.damaged or queue.refused:
        raise PosGatewayError(f"the stick was not taken: {queue}")
    return Counter({Verdict(verdict): count for verdict, count in queue.verdicts.items()})


def _at_the_issuer(till: Shop, found: Path, _stick: Path) -> Counter[Verdict]:
    told: Counter[Verdict] = Counter()
    with opened_copy(found) as journal:
        for records in journal.open_records(_AT_ONCE):
            told.update(v.verdict for v in till.ledger.present_records(journal.gateway_id, records))
    return told


def _by_a_stranger(stranger: Shop, till: Shop, found: Path) -> str:
    """Another merchant's gateway has no say."""
    with opened_copy(found) as journal:
        for records in journal.open_records(_AT_ONCE):
            body = presentment_body(journal.gateway_id, records)
            try:
                till.ledger.adopt(stranger.enrolment.gateway_id, body, sign_batch(body, stranger.key))
            except AuthenticationFailed:
                continue
            return "another merchant's gateway presented them"
    return ""
