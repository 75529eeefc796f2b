"""`replay`: old batches, foreign batches, changed content under an old id. Alarms, but never money."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.enrolment import EnrolmentRequest
from pos_gateway.errors import AuthenticationFailed, InvalidMessage, PosGatewayError
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import AMOUNT_MINOR, audit, copied
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import MERCHANT, Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.config import Policy
from pos_gateway.records import Record, Verdict, make_record, presentment_body, sign_batch, uuid7

SHORT_ATTACKS: Final = 40
LONG_ATTACKS: Final = 2000
_PAYMENTS: Final = 12
_LIMIT_MINOR: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class _Gateway:
    """Who presents: its id and key."""

    id: str
    key: Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class _Scene:
    """One shop whose payments are all posted, and a second gateway that the ledger knows."""

    shop: Shop
    records: Sequence[Record]
    own: _Gateway
    other: _Gateway
    chance: random.Random

    def present(self, gateway: _Gateway, records: Sequence[Record], key: Ed25519PrivateKey) -> set[Verdict]:
        body = presentment_body(gateway.id, records)
        answers = self.shop.ledger.present(gateway.id, body, sign_batch(body, key))
        return {answer.verdict for answer in answers}

    def some(self) -> list[Record]:
        return self.chance.sample(self.records, self.chance.randint(1, len(self.records)))

    def one(self) -> Record:
        return self.chance.choice(self.records)


def replay(folder: Path, seed: int, *, attacks: int, ledger: Path | None = None) -> Finding:
    """So many attempts to have a payment posted twice, changed, or for somebody else."""
    chance = random.Random(seed)
    wrong: list[str] = []
    silent = (_old_batch, _doubled_batch)
    loud = (
        _changed_amount,
        _changed_place,
        _broken_hash,
        _new_id,
        _foreign_records,
        _foreign_records_signed_anew,
        _foreign_signature,
        _unknown_gateway,
    )
    with Shop(copied(ledger, folder), policy=Policy(card_tc_rate_limit=1_000_000)) as shop:
        scene = _begin(shop, chance)
        books = shop.ledger.trial_balance()
        for number in range(attacks):
            attempt = (*silent, *loud)[number % (len(silent) + len(loud))]
            alarms = len(shop.ledger.alarms())
            try:
                complaint = attempt(scene)
            except PosGatewayError as error:
                complaint = f"{type(error).__name__}: {error.reason}"
            raised = len(shop.ledger.alarms()) - alarms
            if complaint:
                wrong.append(f"{attempt.__name__}: {complaint}")
            if attempt in silent and raised:
                wrong.append(f"{attempt.__name__} raised {raised} alarms")
            if shop.ledger.trial_balance() != books:
                wrong.append(f"{attempt.__name__} moved money")
                books = shop.ledger.trial_balance()
        kinds = sorted({alarm.kind.value for alarm in shop.ledger.alarms()})
        alarms = len(shop.ledger.alarms())
    acknowledged = [record.id for record in scene.records]
    truth = audit(Home(folder / "gateway"), folder / "ledger", acknowledged)
    return Finding(
        scenario="replay",
        seed=seed,
        tried="old batches, batches in themselves twice, changed amounts, places and ids, another "
        "gateway's records and signatures",
        times=attacks,
        acknowledged=len(acknowledged),
        lost=truth.lost,
        posted_twice=truth.posted_twice,
        out_of_balance_minor=truth.out_of_balance_minor,
        wrong=tuple(wrong[:20]) + truth.wrong,
        details={"alarms": alarms, "alarm_kinds": kinds},
    )


def _begin(shop: Shop, chance: random.Random) -> _Scene:
    _, personalisation = shop.issue(limit_minor=_LIMIT_MINOR)
    shop.publish()
    card = VirtualCard(personalisation)
    records = []
    for number in range(_PAYMENTS):
        payment_id = uuid7(shop.ledger.now_unix_ms() + number, chance.randbytes(10))
        payment = shop.till.new_payment(payment_id, AMOUNT_MINOR, shop.journal.last_sequence + 1)
        outcome = shop.till.tap(payment, DirectChannel(card))
        if not isinstance(outcome, Approved):
            raise PosGatewayError(f"a payment was not approved: {outcome}")
        records.append(outcome.record)
    key = Ed25519PrivateKey.generate()
    request = EnrolmentRequest.make(shop.ledger.invite(MERCHANT), key)
    other = _Gateway(shop.ledger.enrol(request).gateway_id, key)
    scene = _Scene(shop, records, _Gateway(shop.enrolment.gateway_id, shop.key), other, chance)
    if scene.present(scene.own, records, shop.key) != {Verdict.POSTED}:
        raise PosGatewayError("the payments were not posted to begin with")
    return scene


def _expect(verdicts: set[Verdict], *allowed: Verdict) -> str:
    return "" if verdicts <= set(allowed) else f"answered {sorted(verdict.value for verdict in verdicts)}"


def _alarmed(scene: _Scene, attack: Callable[[], set[Verdict]], *allowed: Verdict) -> str:
    before = len(scene.shop.ledger.alarms())
    complaint = _expect(attack(), *allowed)
    return complaint or ("" if len(scene.shop.ledger.alarms()) > before else "raised no alarm")


def _old_batch(scene: _Scene) -> str:
    return _expect(scene.present(scene.own, scene.some(), scene.own.key), Verdict.DUPLICATE)


def _doubled_batch(scene: _Scene) -> str:
    return _expect(scene.present(scene.own, scene.some() + scene.some(), scene.own.key), Verdict.DUPLICATE)


def _made_anew(record: Record, key: Ed25519PrivateKey, **changes: Any) -> Record:
    """The record with other facts or another place, its hash and signature in order."""
    record_id: UUID = changes.pop("record_id", record.id)
    sequence: int = changes.pop("sequence", record.sequence)
    return make_record(
        sequence=sequence,
        record_id=record_id,
        kind=record.kind,
        facts={**record.facts(), **changes},
        proof=record.proof,
        previous_hash=record.previous_hash,
        gateway_key=key,
    )


def _changed_amount(scene: _Scene) -> str:
    record = _made_anew(scene.one(), scene.own.key, amount_minor=AMOUNT_MINOR + 1)
    return _alarmed(scene, lambda: scene.present(scene.own, [record], scene.own.key), Verdict.CONFLICT)


def _changed_place(scene: _Scene) -> str:
    record = _made_anew(scene.one(), scene.own.key, sequence=scene.chance.randrange(1000, 1 << 40))
    return _alarmed(scene, lambda: scene.present(scene.own, [record], scene.own.key), Verdict.CONFLICT)


def _broken_hash(scene: _Scene) -> str:
    record = scene.one()
    changed = replace(record, body=record.body.replace(f'"amount_minor":{AMOUNT_MINOR}', '"amount_minor":9'))
    return _alarmed(scene, lambda: scene.present(scene.own, [changed], scene.own.key), Verdict.INVALID)


def _new_id(scene: _Scene) -> str:
    record_id = uuid7(scene.shop.ledger.now_unix_ms(), scene.chance.randbytes(10))
    record = _made_anew(scene.one(), scene.own.key, record_id=record_id, sale_id=str(record_id))
    return _alarmed(scene, lambda: scene.present(scene.own, [record], scene.own.key), Verdict.INVALID)


def _foreign_records(scene: _Scene) -> str:
    return _alarmed(scene, lambda: scene.present(scene.other, scene.some(), scene.other.key), Verdict.INVALID)


def _foreign_records_signed_anew(scene: _Scene) -> str:
    records = [
        _made_anew(record, scene.other.key, gateway_id=scene.other.id)
        for record in scene.chance.sample(scene.records, 2)
    ]
    return _expect(scene.present(scene.other, records, scene.other.key), Verdict.INVALID, Verdict.CONFLICT)


def _foreign_signature(scene: _Scene) -> str:
    try:
        return _expect(scene.present(scene.own, scene.some(), scene.other.key))
    except AuthenticationFailed:
        return ""


def _unknown_gateway(scene: _Scene) -> str:
    try:
        return _expect(scene.present(_Gateway("nobody", scene.other.key), scene.some(), scene.other.key))
    except (AuthenticationFailed, InvalidMessage):
        return ""
