"""Money in and out, and limits on their way down: pure histories, and the same through the ledger's books."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.accounts import Account, TokenStatus
from pos_gateway.ledger.balance import Balance
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.movements import Purpose, State
from pos_gateway.records import Verdict
from tests.ledger.shop import Clock, Shop

DAY_S = 24 * 3600

steps = st.lists(
    st.tuples(
        st.sampled_from(["owe", "repay", "clear", "bounce", "lock", "unlock", "line", "reserve", "free"]),
        st.integers(1, 50),
    ),
    max_size=60,
)


@given(steps)
def test_no_history_of_money_breaks_the_invariant(history: list[tuple[str, int]]) -> None:
    balance, reserve = Balance(limit_minor=100, target_line_minor=100), 0
    open_: list[tuple[str, int]] = []
    paid_out = 0
    for action, amount in history:
        committed = balance.committed_minor(reserve)
        if action == "owe" and amount <= reserve:
            balance, reserve = balance.owe(amount), reserve - amount
        elif action == "reserve" and amount <= balance.free_minor(reserve):
            reserve += amount
        elif action == "free":
            reserve = max(reserve - amount, 0)
        elif action == "repay":
            balance = balance.repaid(amount)
            open_.append(("repay", amount))
        elif action == "lock":
            balance = balance.locked(amount)
            open_.append(("lock", amount))
        elif action in ("clear", "bounce") and open_:
            what, came = open_.pop(amount % len(open_))
            if action == "clear":
                balance = balance.cleared(came)
            else:
                balance = balance.bounced(came) if what == "repay" else balance.lock_bounced(came)
        elif action == "unlock" and amount <= balance.vault_minor - balance.vault_leaving_minor:
            balance = balance.unlock(amount)
        elif action == "line":
            balance = balance.with_line(amount * 3)
        uncleared = sum(came for what, came in open_ if what == "lock")
        balance, paid = balance.complete(reserve_minor=reserve, vault_uncleared_minor=uncleared)
        paid_out += paid
        assert balance.committed_minor(reserve) <= balance.limit_minor
        assert balance.vault_minor >= max(balance.vault_leaving_minor, uncleared, 0)
        assert balance.line_minor >= balance.target_line_minor
        if action in ("repay", "bounce"):
            assert balance.committed_minor(reserve) <= committed
        # All that may go has gone.
        if balance.limit_minor > balance.committed_minor(reserve):
            assert balance.line_minor == balance.target_line_minor
    assert paid_out >= 0


def test_a_cut_comes_first_and_uncleared_funds_do_not_leave() -> None:
    balance = Balance(limit_minor=100, target_line_minor=100).locked(50)
    assert (balance.limit_minor, balance.free_minor(0)) == (150, 100)
    asked, paid = balance.unlock(50).complete(reserve_minor=0, vault_uncleared_minor=50)
    assert (paid, asked.vault_leaving_minor, asked.free_minor(0)) == (0, 50, 50)
    cut, paid = asked.cleared(50).with_line(60).complete(reserve_minor=130)
    assert (cut.limit_minor, paid, cut.free_minor(130)) == (130, 0, -70)
    done, paid = cut.complete(reserve_minor=20)
    assert (done.limit_minor, done.vault_minor, paid) == (60, 0, 50)


@pytest.fixture
def account(ledger: Ledger) -> Account:
    return ledger.open_account(holder="Li Na", limit_minor=10_000)


def spend(ledger: Ledger, account: Account, amount_minor: int, icc_key: rsa.RSAPrivateKey) -> Shop:
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    ledger.publish()
    shop = Shop.enrol(ledger)
    assert shop.verdict(shop.tap(card, amount_minor)) is Verdict.POSTED
    return shop


def test_a_repayment_frees_credit_only_when_it_is_final(
    ledger: Ledger, account: Account, icc_key: rsa.RSAPrivateKey
) -> None:
    spend(ledger, account, 10_000, icc_key)
    for reference in ("salary", "friend"):
        for _ in range(2):
            movement = ledger.receive(account.id, Purpose.REPAYMENT, reference=reference, amount_minor=4_000)
        assert movement.state is State.UNCLEARED
    with pytest.raises(Conflict, match="another movement"):
        ledger.receive(account.id, Purpose.REPAYMENT, reference="salary", amount_minor=4_001)
    paid = ledger.account(account.id)
    assert (paid.outstanding_minor, paid.uncleared_minor, paid.free_minor) == (2_000, 8_000, 0)
    for _ in range(2):
        assert ledger.settle_movement(account.id, "salary", final=True).state is State.FINAL
        assert ledger.settle_movement(account.id, "friend", final=False).state is State.BOUNCED
    with pytest.raises(Conflict, match="bounced already"):
        ledger.settle_movement(account.id, "friend", final=True)
    with pytest.raises(NotFound):
        ledger.settle_movement(account.id, "nobody", final=True)
    after = ledger.account(account.id)
    assert (after.outstanding_minor, after.uncleared_minor, after.free_minor) == (6_000, 0, 4_000)
    assert [m.state for m in ledger.movements(account.id)] == [State.BOUNCED, State.FINAL]
    ledger.check_books()
    assert sum(ledger.trial_balance().values()) == 0
    assert len(ledger.payments()) == 1


def test_a_cut_takes_effect_as_far_as_it_may_and_completes_by_itself(
    ledger: Ledger, account: Account, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    shop = spend(ledger, account, 1_000, icc_key)
    cut = ledger.set_line(account.id, 3_000)
    assert (cut.limit_minor, cut.target_limit_minor, cut.free_minor) == (10_000, 3_000, -7_000)
    ledger.publish()
    # Nothing more is given out beyond it, and nothing that was is taken back.
    assert ledger.account(account.id).reserve_minor == 9_000
    clock.now_s += 30 * DAY_S
    ledger.publish()
    done = ledger.account(account.id)
    assert (done.limit_minor, done.reserve_minor, done.free_minor) == (3_000, 2_000, 0)
    raised = ledger.set_line(account.id, 5_000)
    assert (raised.limit_minor, raised.free_minor) == (5_000, 2_000)
    with pytest.raises(InvalidInput, match="negative"):
        ledger.set_line(account.id, -1)
    with pytest.raises(NotFound):
        ledger.set_line("nobody", 1)
    ledger.check_books()
    assert shop.present() == []


def test_the_vault_gives_a_limit_and_pays_out_what_nothing_needs(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Student", limit_minor=0)
    ledger.receive(account.id, Purpose.VAULT_LOCK, reference="in", amount_minor=8_000)
    assert ledger.account(account.id).free_minor == 0
    ledger.settle_movement(account.id, "in", final=True)
    assert ledger.account(account.id).free_minor == 8_000
    ledger.set_policy(Policy(token_share_percent=50))
    spend(ledger, account, 1_000, icc_key)
    ledger.receive(account.id, Purpose.VAULT_UNLOCK, reference="out", amount_minor=7_000)
    ledger.receive(account.id, Purpose.VAULT_UNLOCK, reference="out", amount_minor=7_000)
    waiting = ledger.account(account.id)
    assert (waiting.vault_minor, waiting.vault_leaving_minor, waiting.limit_minor) == (4_000, 3_000, 4_000)
    assert (waiting.outstanding_minor, waiting.reserve_minor, waiting.free_minor) == (1_000, 3_000, -3_000)
    with pytest.raises(Conflict, match="does not hold"):
        ledger.receive(account.id, Purpose.VAULT_UNLOCK, reference="more", amount_minor=1_001)
    clock.now_s += 30 * DAY_S
    ledger.publish()
    done = ledger.account(account.id)
    assert (done.vault_minor, done.vault_leaving_minor, done.limit_minor) == (1_000, 0, 1_000)
    assert ledger.trial_balance()["bank_clearing"] == 1_000
    ledger.receive(account.id, Purpose.VAULT_LOCK, reference="again", amount_minor=500)
    ledger.settle_movement(account.id, "again", final=False)
    assert ledger.account(account.id) == done
    ledger.check_books()


def test_a_replaced_token_is_closed_and_its_reserve_stays(
    ledger: Ledger, account: Account, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    old = ledger.issue_token(account.id, icc_key=icc_key).token
    ledger.publish()
    new = ledger.replace_token(old.id, icc_key=icc_key).token
    assert ledger.token(old.id).status is TokenStatus.CLOSED
    with pytest.raises(Conflict, match="closed already"):
        ledger.replace_token(old.id, icc_key=icc_key)
    ledger.publish()
    assert [t.reserve_minor for t in (ledger.token(old.id), ledger.token(new.id))] == [10_000, 0]
    clock.now_s += 30 * DAY_S
    ledger.publish()
    assert [t.reserve_minor for t in (ledger.token(old.id), ledger.token(new.id))] == [0, 10_000]
    ledger.check_books()
