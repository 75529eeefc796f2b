"""`carry`: shops that never see a line, and a courier whose sticks get lost, mixed up, cut short, broken,
forged, full, and brought again long after."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import UUID

from pos_gateway.carrying import LIMITS, ROOT, TO_GATEWAY, TO_LEDGER
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.enrolment import Merchant
from pos_gateway.errors import NotFound, PosGatewayError, Unavailable
from pos_gateway.gateway.carry import (
    export_queue,
    read_letters,
    take_letter,
    take_letters,
    take_limits,
)
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import AMOUNT_MINOR, audit_all, copied
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.carry import take_queues, write_letters, write_limits
from pos_gateway.ledger.config import Policy
from pos_gateway.records import Kind, uuid7
from pos_gateway.stick import MANIFEST

SHORT_JOURNEYS: Final = 60
LONG_JOURNEYS: Final = 1500
_SHOPS: Final = 2
_STICKS: Final = 3
_LIMIT_MINOR: Final = 1_000_000
_MISHAP_PERCENT: Final = 45


class _World:
    """Two shops, one ledger, three sticks, and copies of sticks from long ago."""

    def __init__(self, folder: Path, ledger: Path | None, chance: random.Random) -> None:
        copied(ledger, folder)
        self.chance = chance
        policy = Policy(card_tc_rate_limit=1_000_000)
        self.shops = [
            Shop(
                folder,
                policy=policy,
                gateway=f"gateway-{number}",
                merchant=Merchant(id=f"CARRY-{number}", name=f"Island {number}", category="4111"),
            )
            for number in range(_SHOPS)
        ]
        self.ledger = self.shops[0].ledger
        self.sticks = [folder / f"stick-{number}" for number in range(_STICKS)]
        for stick in self.sticks:
            stick.mkdir()
        self.old = folder / "old"
        self.old.mkdir()
        self.cards = [VirtualCard(self._issue()) for _ in self.shops]
        for shop in self.shops:
            shop.publish()
        self.approved: list[UUID] = []
        self.happened: Counter[str] = Counter()

    def _issue(self) -> Personalisation:
        return self.shops[0].issue(limit_minor=_LIMIT_MINOR)[1]

    def pay(self, number: int) -> None:
        shop = self.shops[number]
        payment_id = uuid7(shop.ledger.now_unix_ms(), self.chance.randbytes(10))
        payment = shop.till.new_payment(payment_id, AMOUNT_MINOR, shop.journal.last_sequence + 1)
        outcome = shop.till.tap(payment, DirectChannel(self.cards[number]))
        if not isinstance(outcome, Approved):
            raise PosGatewayError(f"a payment was not approved: {outcome}")
        self.approved.append(payment_id)

    def out(self, shop: Shop, stick: Path) -> None:
        export_queue(shop.journal, shop.enrolment.gateway_id, shop.key, stick)

    def at_the_issuer(self, stick: Path, *, answer: bool) -> None:
        try:
            for queue in take_queues(self.ledger, stick):
                self.happened["damaged files at the issuer"] += len(queue.damaged)
                self.happened["refused batches"] += len(queue.refused)
        except NotFound:
            self.happened["empty sticks"] += 1
        if answer:
            write_limits(self.ledger, stick)
            write_letters(self.ledger, stick, [shop.enrolment.gateway_id for shop in self.shops])

    def back(self, shop: Shop, stick: Path) -> None:
        self.happened["limits not taken"] += bool(take_limits(shop.feed, stick)["problem"])
        try:
            letters, read = read_letters(
                stick,
                authority=shop.enrolment.authority,
                gateway_id=shop.enrolment.gateway_id,
                now_unix_ms=shop.ledger.now_unix_ms(),
            )
        except PosGatewayError:
            self.happened["nothing for this shop"] += 1
            return
        taken = take_letters(
            letters,
            read,
            lambda letter: take_letter(
                shop.journal, letter, now_unix_ms=shop.ledger.now_unix_ms(), deadline_s=None
            ),
        )
        self.happened["damaged letters"] += len(taken.damaged)
        self.happened["refused letters"] += len(taken.refused)
        self.happened["verdicts brought"] += taken.journalled
        self.happened["verdicts brought again"] += taken.passed_over

    def close(self) -> None:
        for shop in self.shops:
            shop.close()


def carry(folder: Path, seed: int, *, journeys: int, ledger: Path | None = None) -> Finding:
    """So many journeys of a stick, with a mishap on many of them; then each shop brings one in peace."""
    chance = random.Random(seed)
    wrong: list[str] = []
    world = _World(folder, ledger, chance)
    try:
        for number in range(journeys):
            _journey(world)
            if number % 20 == 19:
                world.ledger.publish()
        for shop in world.shops:
            stick = folder / "quiet"
            shutil.rmtree(stick, ignore_errors=True)
            stick.mkdir()
            world.out(shop, stick)
            world.at_the_issuer(stick, answer=True)
            world.back(shop, stick)
            if waiting := shop.journal.exposure.count:
                wrong.append(f"{waiting} payments of a shop still wait after a stick in peace")
            wrong += _acknowledged_once(shop)
        alarms = len(world.ledger.alarms())
        if alarms:
            wrong.append(f"{alarms} alarms")
        homes = [shop.home for shop in world.shops]
    finally:
        world.close()
    truth = audit_all(homes, folder / "ledger", world.approved)
    return Finding(
        scenario="carry",
        seed=seed,
        tried=f"{journeys} journeys of {_STICKS} sticks between {_SHOPS} shops and the issuer: lost, "
        "repeated, mixed up, cut short, damaged, forged, full, answered over the line meanwhile",
        times=journeys,
        acknowledged=len(world.approved),
        lost=truth.lost,
        posted_twice=truth.posted_twice,
        out_of_balance_minor=truth.out_of_balance_minor,
        wrong=tuple(wrong[:20]) + truth.wrong,
        details={"happened": dict(sorted(world.happened.items()))},
    )


def _journey(world: _World) -> None:
    chance = world.chance
    number = chance.randrange(_SHOPS)
    shop, stick = world.shops[number], chance.choice(world.sticks)
    for _ in range(chance.randint(0, 4)):
        world.pay(number)
    try:
        with _full(world, chance.random() < 0.05):
            world.out(shop, stick)
    except Unavailable:
        world.happened["full sticks at the shop"] += 1
    if chance.random() < 0.1:
        # The line was there for a moment, and its answer was lost.
        shop.present(shop.journal.queue())
        world.happened["answers lost on the line"] += 1
    stick = _on_the_way(world, stick)
    world.at_the_issuer(stick, answer=chance.random() < 0.8)
    stick = _on_the_way(world, stick)
    if chance.random() < 0.9:
        world.back(world.shops[chance.randrange(_SHOPS)] if chance.random() < 0.2 else shop, stick)
    if chance.random() < 0.3:
        world.back(shop, stick)
        world.happened["imported twice"] += 1


def _on_the_way(world: _World, stick: Path) -> Path:
    """What a courier and his pockets do; returns the stick that arrives."""
    chance = world.chance
    if chance.randrange(100) >= _MISHAP_PERCENT:
        return stick
    mishap = chance.choice(
        [_lose, _swap, _truncate, _forget_a_file, _flip, _tear_manifest, _forge, _keep, _bring_old, _mix_up]
    )
    world.happened[mishap.__name__.strip("_")] += 1
    return mishap(world, stick)


def _files(world: _World, stick: Path) -> list[Path]:
    """Of one of the stick's parts, so that the many files of the limits do not take all the blows."""
    part = stick / ROOT / world.chance.choice([TO_LEDGER, TO_GATEWAY, LIMITS])
    return sorted(path for path in part.rglob("*") if path.is_file())


def _lose(_world: _World, stick: Path) -> Path:
    shutil.rmtree(stick)
    stick.mkdir()
    return stick


def _swap(world: _World, _stick: Path) -> Path:
    return world.chance.choice(world.sticks)


def _truncate(world: _World, stick: Path) -> Path:
    if files := _files(world, stick):
        path = world.chance.choice(files)
        data = path.read_bytes()
        path.write_bytes(data[: world.chance.randrange(len(data) + 1)])
    return stick


def _forget_a_file(world: _World, stick: Path) -> Path:
    if files := _files(world, stick):
        world.chance.choice(files).unlink()
    return stick


def _flip(world: _World, stick: Path) -> Path:
    if files := [path for path in _files(world, stick) if path.stat().st_size]:
        path = world.chance.choice(files)
        data = bytearray(path.read_bytes())
        data[world.chance.randrange(len(data))] ^= 1 << world.chance.randrange(8)
        path.write_bytes(bytes(data))
    return stick


def _tear_manifest(world: _World, stick: Path) -> Path:
    """A carrier who fits the manifest to what he has changed: names and digests prove nothing."""
    for path in stick.rglob(MANIFEST):
        try:
            named = json.loads(path.read_bytes())
            named["files"] = named["files"][: world.chance.randrange(len(named["files"]) + 1)]
        except (ValueError, KeyError, TypeError):
            continue
        path.write_text(json.dumps(named))
    return stick


def _forge(world: _World, stick: Path) -> Path:
    """Changes a file, and gives it the name, the size and the digest that go with it."""
    for path in stick.rglob(MANIFEST):
        try:
            named = json.loads(path.read_bytes())
            file = world.chance.choice(named["files"])
            data = bytearray((path.parent / file["name"]).read_bytes())
            data[world.chance.randrange(len(data))] ^= 1 << world.chance.randrange(8)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        digest = hashlib.sha256(data).hexdigest()
        file |= {"name": f"{digest[:32]}.json", "sha256": digest}
        (path.parent / file["name"]).write_bytes(data)
        path.write_text(json.dumps(named))
    return stick


def _keep(world: _World, stick: Path) -> Path:
    shutil.copytree(stick, world.old / f"{len(list(world.old.iterdir()))}")
    return stick


def _bring_old(world: _World, stick: Path) -> Path:
    kept = sorted(world.old.iterdir())
    if not kept:
        return stick
    shutil.rmtree(stick)
    shutil.copytree(world.chance.choice(kept), stick)
    return stick


def _mix_up(world: _World, stick: Path) -> Path:
    """Every shop's folders take another shop's name."""
    names = [shop.enrolment.gateway_id for shop in world.shops]
    for part in (TO_LEDGER, TO_GATEWAY):
        place = stick / ROOT / part
        for name in names:
            if (place / name).exists():
                (place / name).rename(place / f"{name}-away")
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            if (place / f"{name}-away").exists():
                (place / f"{name}-away").rename(place / other)
    shutil.rmtree(stick / ROOT / LIMITS, ignore_errors=True)
    return stick


@contextmanager
def _full(world: _World, wanted: bool) -> Iterator[None]:
    """No file of this process may grow beyond a few bytes: the nearest to a full stick without a mount."""
    if not wanted:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (world.chance.randrange(2000), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _acknowledged_once(shop: Shop) -> list[str]:
    """Each payment has one paid word in the journal, and no more."""
    paid: Counter[str] = Counter()
    payments: list[str] = []
    after = 0
    while page := shop.journal.records(after):
        after = page[-1].sequence
        for record in page:
            if record.kind is Kind.AUTHORIZATION:
                payments.append(str(record.id))
            elif record.kind is Kind.ACKNOWLEDGEMENT and record.facts()["verdict"] in ("posted", "duplicate"):
                paid[record.facts()["about"]] += 1
    odd = [payment for payment in payments if paid[payment] != 1]
    return [f"{len(odd)} payments were not acknowledged as paid exactly once"] if odd else []
