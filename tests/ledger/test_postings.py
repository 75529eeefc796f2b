"""Presentments with genuine cryptograms: what is posted, what is not, and never anything twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.enrolment import Merchant
from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidMessage
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, batch, bulk, store
from pos_gateway.ledger.accounts import Account, TokenStatus
from pos_gateway.ledger.evidence import examine
from pos_gateway.ledger.reserve import InvariantBroken
from pos_gateway.ledger.settlement import AlarmKind
from pos_gateway.records import Kind, Record, Verdict, open_proof, sign_batch
from tests.ledger.shop import Clock, Shop

LIMIT_MINOR = 50_000
DAY_S = 24 * 3600


@pytest.fixture
def account(ledger: Ledger) -> Account:
    return ledger.open_account(holder="Li Na", limit_minor=LIMIT_MINOR)


@pytest.fixture
def personalisation(ledger: Ledger, account: Account, icc_key: rsa.RSAPrivateKey) -> Personalisation:
    personalisation = ledger.issue_token(account.id, icc_key=icc_key).personalisation
    ledger.publish()
    return personalisation


@pytest.fixture
def card(personalisation: Personalisation) -> VirtualCard:
    return VirtualCard(personalisation)


@pytest.fixture
def shop(ledger: Ledger) -> Shop:
    return Shop.enrol(ledger)


def alarms(ledger: Ledger) -> list[AlarmKind]:
    return [alarm.kind for alarm in ledger.alarms()]


def owed(ledger: Ledger, account: Account) -> int:
    """Outstanding, after holding the whole ledger to double entry and to the reserve invariant."""
    ledger.check_books()
    balance = ledger.trial_balance()
    assert sum(balance.values()) == 0
    assert balance.get("customer_receivable", 0) == sum(a.outstanding_minor for a in ledger.accounts())
    return ledger.account(account.id).outstanding_minor


def test_a_tap_is_posted_to_customer_and_merchant(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    first, second = shop.tap(card, 1930), shop.tap(card, 70)
    verdicts = shop.present(first, second)
    assert [(v.record_id, v.verdict) for v in verdicts] == [
        (str(first.id), Verdict.POSTED),
        (str(second.id), Verdict.POSTED),
    ]
    assert owed(ledger, account) == 2000
    assert ledger.trial_balance() == {"customer_receivable": 2000, "merchant_payable": -2000}
    after = ledger.account(account.id)
    assert after.reserve_minor == LIMIT_MINOR - 2000
    assert after.free_minor == 0
    assert after.tokens[0].highest_counter == card.state.counter
    assert ledger.alarms() == ()


def test_the_same_batch_again_posts_nothing_again(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    records = [shop.tap(card, 100 + i) for i in range(5)]
    assert {v.verdict for v in shop.present(*records)} == {Verdict.POSTED}
    again = shop.present(*records, *records)
    assert {v.verdict for v in again} == {Verdict.DUPLICATE}
    assert len(ledger.payments()) == 5
    assert owed(ledger, account) == sum(100 + i for i in range(5))
    assert ledger.alarms() == ()


def test_a_record_twice_in_one_batch_is_posted_once(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    record = shop.tap(card, 500)
    assert [v.verdict for v in shop.present(record, record)] == [Verdict.POSTED, Verdict.DUPLICATE]
    assert owed(ledger, account) == 500


def test_other_content_under_a_known_id_is_a_conflict_and_an_alarm(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    record = shop.tap(card, 500)
    assert shop.verdict(record) is Verdict.POSTED
    changed = shop.record(record.id, {**record.facts(), "amount_minor": 501}, record.proof)
    assert shop.verdict(changed) is Verdict.CONFLICT
    assert alarms(ledger) == [AlarmKind.CHANGED_CONTENT]
    assert shop.verdict(record) is Verdict.DUPLICATE
    assert owed(ledger, account) == 500


def test_one_cryptogram_is_one_payment_whatever_id_it_comes_under(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    record, other_id = shop.tap(card, 500), uuid.uuid4()
    facts = {**record.facts(), "sale_id": str(other_id)}
    [verdict] = shop.present(shop.record(other_id, facts, record.proof, sequence=2))
    assert (verdict.verdict, "sale id" in verdict.reason) == (Verdict.INVALID, True)
    assert shop.verdict(record) is Verdict.POSTED
    assert owed(ledger, account) == 500


def test_another_gateways_record_is_not_posted_for_this_one(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    thief = Shop.enrol(ledger, Merchant(id="THIEF", name="Thief", category="5999"))
    record = shop.tap(card, 500)
    # As it is, and signed anew with the thief's own name in it.
    assert thief.verdict(record) is Verdict.INVALID
    facts = {
        **record.facts(),
        "gateway_id": thief.enrolment.gateway_id,
        "terminal_id": thief.enrolment.terminal_id,
        "merchant_id": "THIEF",
        "merchant_category": "5999",
    }
    [verdict] = thief.present(thief.record(record.id, facts, record.proof, sequence=1))
    assert verdict.verdict is Verdict.INVALID
    assert "terminal" in verdict.reason
    assert alarms(ledger) == [AlarmKind.CHANGED_RECORD, AlarmKind.FALSE_EVIDENCE]
    assert owed(ledger, account) == 0
    # The honest shop is not hindered by it.
    assert shop.verdict(record) is Verdict.POSTED
    assert owed(ledger, account) == 500


@pytest.mark.parametrize(
    ("fact", "lie"),
    [
        ("amount_minor", 501),
        ("amount_minor", 0),
        ("amount_minor", "500"),
        ("amount_minor", True),
        ("currency", "USD"),
        ("merchant_id", "OTHER"),
        ("merchant_category", "5999"),
        ("terminal_id", "T9999999"),
        ("gateway_id", "gw-other"),
        ("sale_id", str(uuid.uuid4())),
        ("unpredictable_number", "00000000"),
        ("sequence_counter", 77),
        ("ceiling", 1 << 47),
        ("limit_digest", "00" * 16),
        ("plan_digest", "11" * 16),
        ("counter_after", 1),
        ("counter_before", 0),
        ("atc", 9),
        ("ac", "00" * 8),
        ("token_key", "00" * 16),
        ("token_last4", "0000"),
        ("at_unix_ms", 1_700_000_000_000),
    ],
)
def test_a_fact_that_the_card_did_not_sign_is_not_believed(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, fact: str, lie: Any
) -> None:
    record = shop.tap(card, 500, lies={fact: lie})
    [verdict] = shop.present(record)
    assert verdict.verdict is Verdict.INVALID, verdict
    assert verdict.reason.startswith("The payment is not proven: ")
    assert alarms(ledger) == [AlarmKind.FALSE_EVIDENCE]
    assert owed(ledger, account) == 0
    # The same answer the next time, and no second alarm.
    assert shop.present(record) == [verdict]
    assert len(ledger.alarms()) == 1


@pytest.mark.parametrize("more_minor", [1, -1])
def test_an_amount_changed_in_keeping_with_the_counter_is_not_believed(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, more_minor: int
) -> None:
    lies = {"amount_minor": 500 + more_minor, "counter_before": card.state.counter - more_minor}
    [verdict] = shop.present(shop.tap(card, 500, lies=lies))
    assert (verdict.verdict, "the amount" in verdict.reason) == (Verdict.INVALID, True)
    assert owed(ledger, account) == 0


def test_a_missing_fact_is_named(shop: Shop, card: VirtualCard) -> None:
    record = shop.tap(card, 500)
    facts = record.facts()
    del facts["counter_after"]
    [verdict] = shop.present(shop.record(uuid.uuid4(), facts, record.proof))
    assert (verdict.verdict, "counter_after" in verdict.reason) == (Verdict.INVALID, True)


def test_every_byte_of_the_proof_counts(ledger: Ledger, shop: Shop, card: VirtualCard) -> None:
    record, gateway = shop.tap(card, 500), ledger.gateways()[0]
    clear = open_proof(record.proof, ledger.keys.sealing)
    examine(record, gateway, ledger.issuer)
    for at in range(len(clear)):
        changed = clear[:at] + bytes([clear[at] ^ 0x01]) + clear[at + 1 :]
        tampered = shop.record(record.id, record.facts(), shop.seal(changed))
        with pytest.raises((AuthenticationFailed, InvalidInput)):
            examine(tampered, gateway, ledger.issuer)


def test_a_tampered_proof_is_invalid(ledger: Ledger, account: Account, shop: Shop, card: VirtualCard) -> None:
    record = shop.tap(card, 500)
    clear = open_proof(record.proof, ledger.keys.sealing)
    changed = clear[:-1] + bytes([clear[-1] ^ 0x01])
    tampered = shop.record(record.id, record.facts(), shop.seal(changed))
    assert shop.verdict(tampered) is Verdict.INVALID
    assert alarms(ledger) == [AlarmKind.FALSE_EVIDENCE]
    assert owed(ledger, account) == 0


def test_a_proof_sealed_to_nobody_is_invalid(shop: Shop, card: VirtualCard) -> None:
    record = shop.tap(card, 500)
    [verdict] = shop.present(shop.record(record.id, record.facts(), bytes(200)))
    assert (verdict.verdict, "proof seal" in verdict.reason) == (Verdict.INVALID, True)


def test_a_cryptogram_by_another_key_than_the_cards_is_invalid(
    ledger: Ledger, account: Account, shop: Shop, personalisation: Personalisation
) -> None:
    """CDA alone is not believed: a card with genuine certificates but not the issuer's symmetric key."""
    card = VirtualCard(replace(personalisation, mk_ac=bytes.fromhex("0123456789ABCDEF" * 2)))
    [verdict] = shop.present(shop.tap(card, 500))
    assert (verdict.verdict, "application cryptogram" in verdict.reason) == (Verdict.INVALID, True)
    assert owed(ledger, account) == 0


def test_one_bad_record_does_not_spoil_the_batch(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    good, other = shop.tap(card, 500), shop.tap(card, 300)
    broken = {**shop.tap(card, 200).to_wire(), "hash": "00" * 32}
    nonsense: list[Any] = [{"id": "x" * 500}, 7, None, {"id": 5}]
    verdicts = shop.present(good, broken, *nonsense, other)
    assert [v.verdict for v in verdicts] == [
        Verdict.POSTED,
        *[Verdict.INVALID] * 5,
        Verdict.POSTED,
    ]
    assert verdicts[1].record_id == broken["id"]
    assert owed(ledger, account) == 800


def test_a_record_damaged_on_the_way_can_come_again_whole(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    record = shop.tap(card, 500)
    damaged = record.to_wire()
    damaged["body"] = str(damaged["body"]).replace("500", "900")
    assert shop.present(damaged)[0].verdict is Verdict.INVALID
    assert shop.verdict(record) is Verdict.POSTED
    assert owed(ledger, account) == 500


def test_a_clone_is_seen_when_both_are_presented(
    ledger: Ledger, account: Account, shop: Shop, personalisation: Personalisation
) -> None:
    genuine, clone = VirtualCard(personalisation), VirtualCard(personalisation)
    elsewhere = Shop.enrol(ledger)
    assert shop.verdict(shop.tap(genuine, 500)) is Verdict.POSTED
    [verdict] = elsewhere.present(elsewhere.tap(clone, 400))
    # The shop served in good faith and kept the rules; the customer owes for neither card more than once.
    assert (verdict.verdict, "issuer" in verdict.reason) == (Verdict.POSTED, True)
    assert alarms(ledger) == [AlarmKind.OVERLAP]
    assert owed(ledger, account) == 500
    assert ledger.trial_balance()["issuer_fraud"] == 400


def test_clones_never_take_the_customer_over_the_limit(
    ledger: Ledger, account: Account, shop: Shop, personalisation: Personalisation
) -> None:
    clones = [VirtualCard(personalisation) for _ in range(4)]
    records = [shop.tap(card, 20_000) for card in clones for _ in range(2)]
    verdicts = [v.verdict for v in shop.present(*records)]
    assert verdicts == [Verdict.POSTED] * 8
    assert owed(ledger, account) == 40_000
    assert ledger.trial_balance()["issuer_fraud"] == 120_000


def test_what_comes_after_the_deadline_is_late_and_not_charged(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    on_time, late = shop.tap(card, 500), shop.tap(card, 300)
    clock.now_s += 21 * DAY_S + 300
    assert shop.verdict(on_time) is Verdict.POSTED
    clock.now_s += 1
    ledger.set_line(account.id, 500)  # no credit is free for it
    [verdict] = shop.present(late)
    assert verdict.verdict is Verdict.LATE
    assert "late" in verdict.reason
    assert shop.present(late) == [verdict]
    assert owed(ledger, account) == 500
    # Its authentic counter is known all the same: new ceilings count from there.
    assert ledger.account(account.id).tokens[0].highest_counter == card.state.counter


def test_credit_given_away_again_is_not_paid_twice_when_the_clock_goes_back(
    ledger: Ledger,
    account: Account,
    shop: Shop,
    card: VirtualCard,
    clock: Clock,
    icc_key: rsa.RSAPrivateKey,
) -> None:
    old = shop.tap(card, LIMIT_MINOR)
    ledger.set_token_status(ledger.account(account.id).tokens[0].id, TokenStatus.BLOCKED)
    other = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    clock.now_s += 22 * DAY_S
    ledger.publish()
    new = shop.tap(other, LIMIT_MINOR)
    clock.now_s -= 22 * DAY_S
    assert [v.verdict for v in shop.present(old, new)] == [Verdict.LATE, Verdict.POSTED]
    assert owed(ledger, account) == LIMIT_MINOR


def test_what_was_approved_before_a_block_is_paid_and_nothing_after(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    record = shop.tap(card, 500)
    token = ledger.account(account.id).tokens[0]
    ledger.set_token_status(token.id, TokenStatus.BLOCKED)
    assert shop.verdict(record) is Verdict.POSTED
    assert owed(ledger, account) == 500


def test_a_card_the_ledger_does_not_know_is_judged_again_when_it_does(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    record = shop.tap(card, 500)
    key = bytes.fromhex(record.facts()["token_key"])
    with ledger._database.write() as connection:
        connection.execute(store.tokens.update().values(token_key=bytes(16)))
    assert shop.verdict(record) is Verdict.UNKNOWN
    assert shop.verdict(record) is Verdict.UNKNOWN
    assert owed(ledger, account) == 0
    with ledger._database.write() as connection:
        connection.execute(store.tokens.update().values(token_key=key))
    assert shop.verdict(record) is Verdict.POSTED
    assert shop.verdict(record) is Verdict.DUPLICATE
    assert owed(ledger, account) == 500


def test_a_limit_that_was_never_given_out_buys_nothing(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, personalisation: Personalisation
) -> None:
    limit, _ = shop.limit(personalisation.pan, personalisation.psn)
    invented = limit._replace(ceiling=limit.ceiling + 1_000_000)
    [verdict] = shop.present(shop.tap(card, 60_000, limit=(invented, bytes(range(16)))))
    assert verdict.verdict is Verdict.INVALID
    assert "never gave out" in verdict.reason
    assert owed(ledger, account) == 0


def test_a_raised_ceiling_under_a_genuine_digest_buys_nothing(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, personalisation: Personalisation
) -> None:
    limit, digest = shop.limit(personalisation.pan, personalisation.psn)
    raised = limit._replace(ceiling=limit.ceiling + 1_000_000)
    assert shop.verdict(shop.tap(card, 60_000, limit=(raised, digest))) is Verdict.INVALID
    assert owed(ledger, account) == 0


def test_a_journal_place_used_twice_raises_an_alarm_and_the_merchant_is_paid(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    first, second = shop.tap(card, 500, sequence=7), shop.tap(card, 300, sequence=7)
    assert [v.verdict for v in shop.present(first, second)] == [Verdict.POSTED, Verdict.POSTED]
    assert alarms(ledger) == [AlarmKind.SEQUENCE_REUSED]
    assert owed(ledger, account) == 800


def test_one_sale_id_at_two_gateways_is_two_payments(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    elsewhere, sale_id = Shop.enrol(ledger), uuid.uuid4()
    one, other = shop.tap(card, 500, record_id=sale_id), elsewhere.tap(card, 300, record_id=sale_id)
    assert shop.verdict(one) is Verdict.POSTED
    assert elsewhere.verdict(other) is Verdict.POSTED
    assert owed(ledger, account) == 800


def test_a_batch_is_only_taken_from_its_gateway(ledger: Ledger, shop: Shop, card: VirtualCard) -> None:
    body, signature = shop.batch([shop.tap(card, 500)])
    gateway_id = shop.enrolment.gateway_id
    with pytest.raises(AuthenticationFailed, match="batch signature"):
        ledger.present(gateway_id, body + b" ", signature)
    with pytest.raises(AuthenticationFailed, match="batch signature"):
        ledger.present(gateway_id, body, sign_batch(body, Ed25519PrivateKey.generate()))
    with pytest.raises(AuthenticationFailed, match="not enrolled"):
        ledger.present("gw-nobody", body, signature)
    other = Shop.enrol(ledger)
    with pytest.raises(InvalidMessage, match="gateway_id"):
        ledger.present(other.enrolment.gateway_id, body, sign_batch(body, other.key))
    assert ledger.payments() == ()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"records":{}}', b'{"records":7}', b"[" * 100_000]
)
def test_a_malformed_batch_gets_a_clear_error(ledger: Ledger, shop: Shop, body: bytes) -> None:
    body = body.replace(b'{"', f'{{"gateway_id":"{shop.enrolment.gateway_id}","'.encode())
    with pytest.raises(InvalidMessage):
        ledger.present(shop.enrolment.gateway_id, body, sign_batch(body, shop.key))


def test_too_many_records_at_once_are_refused(ledger: Ledger, shop: Shop) -> None:
    body, signature = shop.batch([{}] * 1001)
    with pytest.raises(InvalidMessage, match="at most 1000"):
        ledger.present(shop.enrolment.gateway_id, body, signature)


def test_the_same_batch_from_several_threads_is_posted_once(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    body, signature = shop.batch([shop.tap(card, 100) for _ in range(10)])
    start = threading.Barrier(4)

    def send() -> list[Verdict]:
        start.wait()
        return [v.verdict for v in ledger.present(shop.enrolment.gateway_id, body, signature)]

    with ThreadPoolExecutor(4) as pool:
        answers = [sent.result() for sent in [pool.submit(send) for _ in range(4)]]
    assert sorted(a[0].value for a in answers) == ["duplicate"] * 3 + ["posted"]
    assert all(len(set(a)) == 1 for a in answers)
    assert owed(ledger, account) == 1000


def test_presenting_and_publishing_at_once_keep_the_invariant(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    records = [shop.tap(card, 1000) for _ in range(20)]

    def publish() -> list[int]:
        return [ledger.publish().version for _ in range(10)]

    with ThreadPoolExecutor() as pool:
        versions = pool.submit(publish)
        verdicts = [shop.verdict(record) for record in records]
    assert versions.result() == list(range(2, 12))
    assert verdicts == [Verdict.POSTED] * 20
    assert owed(ledger, account) == 20_000


def test_a_broken_invariant_undoes_the_whole_batch(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours: more is charged than was claimed."""
    record = shop.tap(card, 500)

    def one_too_many(connection: sa.Connection, table: sa.Table, name: str, values: Any, **how: Any) -> None:
        more = 1 if name == "outstanding_minor" else 0
        bulk.update_each(connection, table, name, {key: value + more for key, value in values.items()}, **how)

    with monkeypatch.context() as faulty:
        faulty.setattr(batch, "update_each", one_too_many)
        with pytest.raises(InvariantBroken):
            shop.present(record)
    assert ledger.payments() == ()
    assert ledger.verdicts() == {}
    assert shop.verdict(record) is Verdict.POSTED


def test_what_is_guaranteed_is_paid_though_the_account_is_over_its_limit(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    record = shop.tap(card, 500)
    with ledger._database.write() as connection:
        connection.execute(store.accounts.update().values(limit_minor=400))
    assert shop.verdict(record) is Verdict.POSTED
    assert shop.verdict(shop.correct(Kind.REVERSAL, record, 500)) is Verdict.POSTED
    assert ledger.account(account.id).outstanding_minor == 0


CHILD = """
import json, sys
from pathlib import Path
from pos_gateway.ledger import Ledger
from tests.ledger.shop import Clock
ledger = Ledger.open(Path(sys.argv[1]), clock=Clock())
for line in sys.stdin:
    gateway_id, body, signature = json.loads(line)
    verdicts = ledger.present(gateway_id, body.encode(), bytes.fromhex(signature))
    print(json.dumps([v.to_wire() for v in verdicts]), flush=True)
"""


def test_sigkill_at_any_point_loses_and_doubles_nothing(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    records = [shop.tap(card, 100) for _ in range(24)]
    waiting = list(records)
    posted: list[str] = []
    for kill_after in (1, 3, 6, None):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ledger.home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            for record in waiting:
                body, signature = shop.batch([record])
                line = json.dumps([shop.enrolment.gateway_id, body.decode(), signature.hex()])
                child.stdin.write(line + "\n")
            child.stdin.flush()
            if kill_after is None:
                child.stdin.close()
            for answered, answer in enumerate(child.stdout, start=1):
                [verdict] = json.loads(answer)
                assert verdict["verdict"] in ("posted", "duplicate")
                posted.append(verdict["id"])
                waiting = [r for r in waiting if str(r.id) != verdict["id"]]
                if answered == kill_after:
                    child.send_signal(signal.SIGKILL)
                    break
            child.stdout.read()
    assert waiting == []
    assert sorted(str(p.record_id) for p in ledger.payments()) == sorted(str(r.id) for r in records)
    assert set(posted) == {str(r.id) for r in records}
    assert owed(ledger, account) == 2400


def test_what_is_booked_cannot_be_changed(ledger: Ledger, shop: Shop, card: VirtualCard) -> None:
    shop.present(shop.tap(card, 500))
    for statement in (
        store.entries.update().values(amount_minor=1),
        store.entries.delete(),
        store.transfers.update().values(kind="x"),
        store.transfers.delete(),
    ):
        with pytest.raises(sa.exc.IntegrityError, match="immutable"), ledger._database.write() as connection:
            connection.execute(statement)


def test_crooked_books_are_noticed(ledger: Ledger, account: Account, shop: Shop, card: VirtualCard) -> None:
    shop.present(shop.tap(card, 500))
    ledger.check_books()
    with ledger._database.write() as connection:
        connection.execute(store.accounts.update().values(outstanding_minor=499))
    with pytest.raises(AuthenticationFailed, match="owes another sum"):
        ledger.check_books()


@pytest.mark.parametrize("dialect", ["sqlite"])
def test_no_token_number_and_no_key_stands_in_the_database(
    ledger: Ledger, account: Account, shop: Shop, personalisation: Personalisation, card: VirtualCard
) -> None:
    records: list[Record] = [shop.tap(card, 500), shop.tap(card, 300, lies={"amount_minor": 1})]
    shop.present(*records)
    ledger.close()
    content = b"".join(p.read_bytes() for p in ledger.home.iterdir() if p.is_file())
    for secret in (
        personalisation.pan.encode(),
        bytes.fromhex(personalisation.pan),
        personalisation.mk_ac,
        personalisation.mk_ac.hex().encode(),
        shop.enrolment.token_key_secret,
        shop.enrolment.token_key_secret.hex().encode(),
    ):
        assert secret not in content
