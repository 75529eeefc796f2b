"""The run of a counter line: what need not be read again because all of it is posted."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import AuthenticationFailed
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, store
from pos_gateway.ledger.accounts import TokenLine
from pos_gateway.records import Verdict
from tests.ledger.shop import Shop


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_a_run_is_posted_in_any_order(order: list[int], torn: set[int]) -> None:
    """Twelve payments of 10 points each, some of which never arrive."""
    line = TokenLine(0, row=None, id="", account_id="")  # type: ignore[arg-type]
    posted: set[int] = set()
    for place in order:
        if place in torn:
            continue
        line.post((100 + 10 * place, 110 + 10 * place))
        posted.update(range(101 + 10 * place, 111 + 10 * place))
        start, end = line.run
        assert set(range(start + 1, end + 1)) <= posted
        assert end == max(posted)


def test_payments_in_order_make_one_run() -> None:
    line = TokenLine(0, row=None, id="", account_id="")  # type: ignore[arg-type]
    for place in range(5):
        line.post((100 + 10 * place, 110 + 10 * place))
    assert line.run == (100, 150)


def test_what_is_claimable_does_not_depend_on_runs(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    account = ledger.open_account(holder="A", limit_minor=100_000)
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    ledger.publish()
    shop = Shop.enrol(ledger)
    taps = [shop.tap(card, 100 + place) for place in range(9)]

    start = end = 0
    for batch in (
        [taps[0], taps[1]],
        [taps[4]],
        [taps[3], taps[6]],
        [taps[2]],
        [taps[8], taps[7]],
        [taps[5]],
    ):
        assert {item.verdict for item in shop.present(*batch)} == {Verdict.POSTED}
        ledger.check_books()
        kept = ledger.account(account.id)
        with ledger.database.write() as connection:
            start, end = connection.execute(
                store.tokens.select().with_only_columns(store.tokens.c.run_start, store.tokens.c.run_end)
            ).one()
            connection.execute(store.tokens.update().values(run_start=0, run_end=0))
        assert ledger.account(account.id) == kept
        with ledger.database.write() as connection:
            connection.execute(store.tokens.update().values(run_start=start, run_end=end))
    assert ledger.account(account.id).outstanding_minor == sum(range(100, 109))
    with ledger.database.write() as connection:
        connection.execute(store.tokens.update().values(run_end=end + 1))
    with pytest.raises(AuthenticationFailed, match="run is not what was posted"):
        ledger.check_books()
