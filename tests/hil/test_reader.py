"""The reader: what it is, taps, tears, light, timing, unplugging."""

from __future__ import annotations

import statistics
from uuid import uuid4

import pytest

from pos_gateway.authorization.reasons import Reason
from pos_gateway.errors import NotFound, PosGatewayError, ReaderUnavailable
from pos_gateway.gateway.readers.indicator import run_start_command
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.till import Approved, Declined, Outcome, Payment, TapAgain
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.lab.vpcd import Fault, FaultKind
from tests.hil.rig import AttendedRig, Rig, moments, until_gone, until_there_again

AMOUNT = 100
TAPS_IN_A_ROW = 3


def sale(shop: Shop, amount_minor: int = AMOUNT) -> Payment:
    return shop.till.new_payment(uuid4(), amount_minor, shop.journal.last_sequence + 1)


def tap(rig: Rig, shop: Shop, payment: Payment) -> Outcome:
    channel = rig.take()
    try:
        outcome = shop.till.tap(payment, channel)
    finally:
        channel.close()
    if isinstance(outcome, Approved):
        rig.log.timings_us.setdefault("card and reader, whole tap", []).append(sum(channel.elapsed_us))
        for (command, _), took_us in zip(channel.exchanges, channel.elapsed_us, strict=True):
            rig.log.timings_us.setdefault(f"instruction {command[1]:02X}", []).append(took_us)
    return outcome


def test_it_says_what_it_is(rig: Rig) -> None:
    probed = rig.ask()
    rig.log.note(f"firmware {probed.firmware or 'not told'}, commands {probed.commands}")
    assert not probed.problem
    if rig.attended and probed.model is None:
        rig.log.note("no model of ours: add firmware_config/readers/….toml")


def test_an_empty_field_is_empty(rig: Rig) -> None:
    assert rig.reader.wait_for_card(0.5) is None
    assert rig.reader.wait_for_removal(5.0)


def test_a_card_is_seen_to_come_and_go(rig: Rig) -> None:
    for _ in range(2):
        rig.hold()
        channel = rig.take()
        # Any card answers a SELECT with a status word, whatever it thinks of it.
        answer = channel.transceive(bytes.fromhex("00A404000E") + b"2PAY.SYS.DDF01" + b"\0")
        assert len(answer) >= 2
        channel.close()
        assert not rig.reader.wait_for_removal(0.0)
        rig.withdraw()
        rig.emptied()


def test_taps_are_approved(rig: Rig, shop: Shop) -> None:
    for _ in range(TAPS_IN_A_ROW):
        payment, before = sale(shop), rig.counter
        rig.hold()
        outcome = tap(rig, shop, payment)
        assert isinstance(outcome, Approved), outcome
        assert shop.journal.get(payment.id) == outcome.record
        if before is not None:
            assert rig.counter == before + AMOUNT
        rig.withdraw()
        rig.emptied()
    times = rig.log.timings_us["card and reader, whole tap"]
    rig.log.note(f"{TAPS_IN_A_ROW} taps, {statistics.median(times) / 1000:.1f} ms each in card and reader")


def test_torn_taps_are_repaired_by_tapping_again(rig: Rig, shop: Shop) -> None:
    tears: list[Fault | None] = [None] * 3
    if not rig.attended:
        number_of_apdus = _apdus(shop)
        kinds = (FaultKind.REMOVE_BEFORE, FaultKind.REMOVE_AFTER)
        every = [Fault(kind, apdu_number=n) for n in range(1, number_of_apdus + 1) for kind in kinds]
        tears = [*every[::3], every[-1]]  # all of them: tests/gateway/test_tears.py
    for tear in tears:
        payment = sale(shop)
        approvals = shop.journal.exposure.count
        if isinstance(rig, AttendedRig):
            rig.brush()
        elif tear is not None:
            rig.hold(tear)
        torn = tap(rig, shop, payment)
        if isinstance(torn, Approved):
            rig.log.note("the tester was too slow: the tap went through")
        else:
            assert isinstance(torn, TapAgain), torn
            assert torn.decline.reason is Reason.CARD_LEFT
            with pytest.raises(NotFound):
                shop.journal.get(payment.id)
        rig.withdraw()
        rig.emptied()
        if isinstance(torn, TapAgain):
            rig.hold()
            assert isinstance(tap(rig, shop, payment), Approved), tear
            rig.withdraw()
            rig.emptied()
        assert shop.journal.exposure.count == approvals + 1


def _apdus(shop: Shop) -> int:
    _, other = shop.issue(limit_minor=1000)
    shop.publish()
    channel = DirectChannel(VirtualCard(other))
    assert isinstance(shop.till.tap(sale(shop, 1), channel), Approved)
    return len(channel.commands)


def test_a_card_that_stays_is_not_asked_twice_for_one_sale(rig: Rig, shop: Shop) -> None:
    payment = sale(shop)
    rig.hold()
    first = tap(rig, shop, payment)
    assert isinstance(first, Approved)
    before = rig.counter
    second = tap(rig, shop, payment)
    # The card gives the answer it gave; the journal refuses to count it again or says the same.
    assert isinstance(second, Approved | Declined)
    assert shop.journal.get(payment.id) == first.record
    assert rig.counter == before


def test_light_and_buzzer(rig: Rig) -> None:
    shown = moments(rig.model)
    if not shown:
        pytest.skip("no light of this reader is described")
    assert isinstance(rig.reader, PcscReader)
    assert rig.model is not None
    assert rig.model.indications is not None
    if rig.reader.commands.escape_allowed() is False:
        pytest.skip("escape commands are not allowed: pos-gateway doctor says how to enable them")
    for command in rig.model.start:
        assert run_start_command(rig.reader.commands, command), command.purpose
    for moment, looks in shown:
        sequence = rig.model.indications.of(moment)
        assert sequence is not None
        for step in sequence.step:
            answer = rig.reader.commands.send(bytes.fromhex(step.send))
            if answer is None:
                pytest.skip("the driver passes no commands on")
        assert rig.saw(looks) is not False, f"{moment.value}: {looks}"


def test_unplugged_and_plugged_in_again(rig: Rig) -> None:
    assert rig.reader.wait_for_card(0.0) is None
    rig.unplug()
    error = until_gone(rig)
    assert isinstance(error, ReaderUnavailable)
    assert error.advice
    rig.plug_in()
    until_there_again(rig)
    rig.hold()
    channel = rig.take()
    assert len(channel.transceive(bytes.fromhex("00A404000E") + b"2PAY.SYS.DDF01" + b"\0")) >= 2
    channel.close()
    rig.withdraw()
    rig.emptied()


def test_a_dialogue_cut_by_the_cable_charges_nothing(rig: Rig, shop: Shop) -> None:
    if rig.attended:
        pytest.skip("no tester unplugs a reader within milliseconds")
    payment, approvals = sale(shop), shop.journal.exposure.count
    rig.hold()
    channel = rig.take()
    sent = 0

    class Cut:
        def transceive(self, command: bytes) -> bytes:
            nonlocal sent
            sent += 1
            if sent == 4:
                rig.unplug()
            return channel.transceive(command)

        def close(self) -> None:
            channel.close()

    cut = Cut()
    # A cable says that the reader is gone, a driver may only see that the card is.
    try:
        outcome: Outcome | None = shop.till.tap(payment, cut)
    except PosGatewayError:
        outcome = None
    cut.close()
    assert not isinstance(outcome, Approved)
    assert shop.journal.exposure.count == approvals
    rig.plug_in()
    until_there_again(rig)
    rig.withdraw()
    rig.hold()
    assert isinstance(tap(rig, shop, payment), Approved)
    assert shop.journal.exposure.count == approvals + 1
