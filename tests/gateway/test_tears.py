"""Cards pulled out at every APDU boundary, on both drivers, with the real till and journal: a clean decline
or a durable approval, never in between, never twice; tapping again repairs it. And what else happens in a
field, seen by a whole lane."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import INS_GENERATE_AC
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import NotFound
from pos_gateway.gateway.lane import Lane, PaymentView, State
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.indicator import Indicator
from pos_gateway.gateway.readers.models import ReaderModel, load_models
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.port import CardChannel, Indication, Reader
from pos_gateway.gateway.till import Approved, Outcome, Payment, TapAgain
from pos_gateway.lab.card_state import CardState
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.udp_card import Radio, UdpField
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.lab.vpcd import Fault, FaultKind
from tests.gateway.cables import Cable

PATIENCE_S = 20.0
AMOUNT = 1930


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        yield shop


class Site:
    """A card that can be held into one driver's field."""

    def __init__(self, shop: Shop, folder: Path) -> None:
        _, self.own = shop.issue(limit_minor=1_000_000)
        shop.publish()
        self.file, self.state_file = folder / "card.json", folder / "card.state"
        self.file.write_text(self.own.to_json())

    reader: Reader

    def insert(self, *faults: Fault) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        raise NotImplementedError

    @property
    def counter(self) -> int:
        if not self.state_file.exists():
            return self.own.counter
        return CardState.from_json(self.state_file.read_text()).counter

    def visit(self, shop: Shop, payment: Payment, *faults: Fault) -> Outcome:
        """One visit of the card to the field, from its arrival to the field being empty again."""
        self.insert(*faults)
        channel = self.reader.wait_for_card(PATIENCE_S)
        assert channel is not None
        outcome = shop.till.tap(payment, channel)
        channel.close()
        self.remove()
        assert self.reader.wait_for_removal(PATIENCE_S)
        return outcome


class PcscSite(Site):
    def __init__(self, shop: Shop, folder: Path, virtual: VirtualReader) -> None:
        super().__init__(shop, folder)
        self._virtual = virtual
        self.reader = PcscReader(virtual.names[0])

    def insert(self, *faults: Fault) -> None:
        self._virtual.insert(self.file, state=self.state_file, faults=faults)

    def remove(self) -> None:
        self._virtual.remove()


class UdpSite(Site):
    def __init__(self, shop: Shop, folder: Path, field: UdpField) -> None:
        super().__init__(shop, folder)
        self._field = field
        self.reader = FrontendReader("udp", lambda: field.path)

    def insert(self, *faults: Fault) -> None:
        self._field.insert(VirtualCard(self.own, state_path=self.state_file), faults=faults)

    def remove(self) -> None:
        self._field.remove()


@pytest.fixture
def field() -> Iterator[UdpField]:
    field = UdpField()
    yield field
    field.close()


@pytest.fixture(params=["pcsc", "nfcpy"])
def site(request: pytest.FixtureRequest, shop: Shop, tmp_path: Path) -> Iterator[Site]:
    site: Site
    if request.param == "pcsc":
        site = PcscSite(shop, tmp_path, request.getfixturevalue("virtual_reader"))
    else:
        site = UdpSite(shop, tmp_path, request.getfixturevalue("field"))
    yield site
    site.reader.close()


def sale(shop: Shop, amount_minor: int = AMOUNT) -> Payment:
    return shop.till.new_payment(uuid4(), amount_minor, shop.journal.last_sequence + 1)


def apdus_of_a_tap(shop: Shop, own: Personalisation) -> int:
    """How many there are, asked of a card beside the test's own."""
    channel = DirectChannel(VirtualCard(own))
    payment = sale(shop, 1)
    asked = shop.till.tap(payment, channel)
    assert isinstance(asked, Approved)
    return len(channel.commands)


@pytest.mark.parametrize("kind", [FaultKind.REMOVE_BEFORE, FaultKind.REMOVE_AFTER])
def test_pulled_at_every_boundary(shop: Shop, site: Site, kind: FaultKind) -> None:
    _, other = shop.issue(limit_minor=1000)
    shop.publish()
    boundaries = range(1, apdus_of_a_tap(shop, other) + 1)
    approved = shop.journal.exposure.count
    for apdu_number in boundaries:
        payment, before = sale(shop), site.counter
        torn = site.visit(shop, payment, Fault(kind, apdu_number=apdu_number))
        assert isinstance(torn, TapAgain), apdu_number
        assert torn.decline.reason is Reason.CARD_LEFT
        with pytest.raises(NotFound):
            shop.journal.get(payment.id)
        assert site.counter in (before, before + AMOUNT)  # one or the other, whatever was told

        repaired = site.visit(shop, payment)
        assert isinstance(repaired, Approved), apdu_number
        assert site.counter == before + AMOUNT, apdu_number  # charged once
        approved += 1
        assert shop.journal.exposure.count == approved
        facts = shop.journal.get(payment.id).facts()
        assert (facts["counter_before"], facts["counter_after"]) == (before, before + AMOUNT)


def test_torn_and_given_up_is_a_decline_and_the_next_sale_goes_on(shop: Shop, site: Site) -> None:
    payment = sale(shop)
    torn = site.visit(shop, payment, Fault(FaultKind.REMOVE_AFTER, instruction=INS_GENERATE_AC))
    assert isinstance(torn, TapAgain)
    shop.till.give_up(payment, torn.decline)
    assert shop.journal.exposure.count == 0
    assert isinstance(site.visit(shop, sale(shop)), Approved)
    assert shop.journal.exposure.amount_minor == AMOUNT


class Till:
    """A lane with its reader, and what it shows."""

    def __init__(self, shop: Shop, reader: Reader, *, card_timeout_s: float = PATIENCE_S) -> None:
        self.views: queue.SimpleQueue[PaymentView] = queue.SimpleQueue()
        self._shop = shop
        self.lane = Lane("lane-1", reader, shop.till, card_timeout_s=card_timeout_s, show=self.views.put)
        self.lane.start()

    def start(self, amount_minor: int = AMOUNT) -> Payment:
        payment = sale(self._shop, amount_minor)
        self.lane.take(payment)
        return payment

    def until(self, *states: State) -> PaymentView:
        while True:
            view = self.views.get(timeout=PATIENCE_S)
            if view.state in states:
                return view
            assert not view.state.final, view


def test_a_card_that_leaves_and_returns_finishes_its_payment_once(
    shop: Shop, field: UdpField, tmp_path: Path
) -> None:
    site = UdpSite(shop, tmp_path, field)
    till = Till(shop, site.reader)
    payment, before = till.start(), site.counter
    site.insert(Fault(FaultKind.REMOVE_AFTER, instruction=INS_GENERATE_AC))
    assert till.until(State.TAP_AGAIN).reason is Reason.CARD_LEFT
    site.insert()
    till.until(State.APPROVED)
    assert site.counter == before + AMOUNT
    assert shop.journal.get(payment.id).facts()["counter_after"] == before + AMOUNT
    # It stays where it is: the next sale does not take it without a look away.
    till.start(500)
    till.until(State.REMOVE_CARD)
    assert site.counter == before + AMOUNT
    site.remove()
    till.until(State.PRESENT_CARD)
    site.insert()
    till.until(State.APPROVED)
    assert site.counter == before + AMOUNT + 500
    till.lane.close()


def test_another_card_after_a_tear_pays_and_nobody_twice(shop: Shop, field: UdpField, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = UdpSite(shop, tmp_path / "a", field), UdpSite(shop, tmp_path / "b", field)
    till = Till(shop, one.reader)
    payment = till.start()
    one.insert(Fault(FaultKind.REMOVE_AFTER, instruction=INS_GENERATE_AC))
    till.until(State.TAP_AGAIN)
    two.insert()
    till.until(State.APPROVED)
    facts = shop.journal.get(payment.id).facts()
    assert facts["token_last4"] == two.own.pan[-4:]
    assert shop.journal.exposure.amount_minor == AMOUNT  # the first card has a gap in its counter, no charge
    till.lane.close()


def test_two_cards_in_the_field_pay_one_sale_once(shop: Shop, field: UdpField, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = UdpSite(shop, tmp_path / "a", field), UdpSite(shop, tmp_path / "b", field)
    one.insert()
    two.insert()
    till = Till(shop, one.reader)
    till.start()
    till.until(State.APPROVED)
    moved = (one.counter - one.own.counter, two.counter - two.own.counter)
    assert sorted(moved) == [0, AMOUNT]
    till.start()
    till.until(State.REMOVE_CARD)  # the other one is still there, and is not taken for a new customer
    field.remove()
    till.lane.close()


def test_a_phone_that_wakes_slowly_pays(shop: Shop, field: UdpField, tmp_path: Path) -> None:
    site = UdpSite(shop, tmp_path, field)
    field.insert(VirtualCard(site.own, state_path=site.state_file), radio=Radio(deaf_to=7, random_uid=True))
    till = Till(shop, site.reader)
    till.start()
    till.until(State.APPROVED)
    till.lane.close()


def test_a_reader_that_is_unplugged_in_mid_payment_comes_back(
    shop: Shop, field: UdpField, tmp_path: Path
) -> None:
    site = UdpSite(shop, tmp_path, field)
    cable = Cable()
    reader = FrontendReader("udp", lambda: field.path, open_device=cable.open)
    till = Till(shop, reader)
    till.start()
    till.until(State.PRESENT_CARD)
    cable.fail = OSError(19, "No such device")
    till.until(State.READER_MISSING)
    cable.fail = None
    till.until(State.PRESENT_CARD)
    site.insert()
    till.until(State.APPROVED)
    till.lane.close()


def test_pcscd_killed_in_mid_payment_comes_back(
    shop: Shop, virtual_reader: VirtualReader, tmp_path: Path
) -> None:
    site = PcscSite(shop, tmp_path, virtual_reader)
    till = Till(shop, site.reader)
    payment, before = till.start(), site.counter
    till.until(State.PRESENT_CARD)
    virtual_reader.kill_pcscd()
    till.until(State.READER_MISSING)
    virtual_reader.start_pcscd()
    till.until(State.PRESENT_CARD)
    site.insert()
    till.until(State.APPROVED)
    assert site.counter == before + AMOUNT
    assert shop.journal.get(payment.id).facts()["amount_minor"] == AMOUNT
    till.lane.close()


def test_several_readers_work_side_by_side(
    shop: Shop, virtual_reader: VirtualReader, field: UdpField, tmp_path: Path
) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    sites: list[Site] = [
        PcscSite(shop, tmp_path / "a", virtual_reader),
        PcscSite(shop, tmp_path / "b", virtual_reader),
        UdpSite(shop, tmp_path / "c", field),
    ]
    sites[1].reader.close()
    sites[1].reader = PcscReader(virtual_reader.names[1])
    tills = [Till(shop, site.reader) for site in sites]
    payments = [till.start() for till in tills]
    virtual_reader.insert(sites[0].file, state=sites[0].state_file, slot=0)
    virtual_reader.insert(sites[1].file, state=sites[1].state_file, slot=1)
    sites[2].insert()
    for till in tills:
        till.until(State.APPROVED)
    for payment, site in zip(payments, sites, strict=True):
        assert shop.journal.get(payment.id).facts()["token_last4"] == site.own.pan[-4:]
        assert site.counter == site.own.counter + AMOUNT
    for till in tills:
        till.lane.close()


class Beeping:
    """A reader whose light takes as long as it likes."""

    def __init__(self, reader: PcscReader | FrontendReader, model: ReaderModel) -> None:

        self._reader = reader
        self.name = reader.name
        self.free = threading.Event()
        self.asked: list[bytes] = []
        self._indicator = Indicator(model, self)

    def send(self, command: bytes) -> bytes | None:
        self.asked.append(command)
        assert self.free.wait(PATIENCE_S)
        return b"\x90\x00"

    def wait_for_card(self, timeout_s: float) -> CardChannel | None:
        return self._reader.wait_for_card(timeout_s)

    def wait_for_removal(self, timeout_s: float) -> bool:
        return self._reader.wait_for_removal(timeout_s)

    def interrupt(self) -> None:
        self._reader.interrupt()

    def indicate(self, indication: Indication) -> None:
        self._indicator.show(indication)

    def close(self) -> None:
        self._indicator.close()
        self._reader.close()


def test_a_beep_that_blocks_delays_no_answer(shop: Shop, field: UdpField, tmp_path: Path) -> None:
    site = UdpSite(shop, tmp_path, field)
    model = next(m for m in load_models() if m.name == "ACS ACR122U")
    assert isinstance(site.reader, FrontendReader)
    reader = Beeping(site.reader, model)
    till = Till(shop, reader)
    till.start()
    site.insert()
    till.until(State.APPROVED)  # told, although the reader has not even answered the first command
    assert len(reader.asked) == 1
    reader.free.set()
    till.lane.close()


def test_a_mute_reader_leaves_the_other_lane_alone(
    shop: Shop, virtual_reader: VirtualReader, field: UdpField, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stuck, free = PcscSite(shop, tmp_path / "a", virtual_reader), UdpSite(shop, tmp_path / "b", field)
    stuck.insert(Fault(FaultKind.MUTE, instruction=INS_GENERATE_AC))
    first, second = Till(shop, stuck.reader), Till(shop, free.reader)
    first.start()
    first.until(State.PROCESSING)
    second.start()
    free.insert()
    second.until(State.APPROVED)
    virtual_reader.remove()
    first.lane.close()
    second.lane.close()
