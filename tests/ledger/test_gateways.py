"""Invitations and enrolments."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.enrolment import EnrolmentRequest, Merchant, compose_code, parse_code
from pos_gateway.errors import AuthenticationFailed, Conflict, InvalidInput, InvalidMessage, NotFound
from pos_gateway.ledger import Ledger, store
from pos_gateway.ledger.accounts import TokenStatus
from tests.ledger.shop import MERCHANT, Clock, Shop


def request(code: str) -> EnrolmentRequest:
    return EnrolmentRequest.make(code, Ed25519PrivateKey.generate())


def test_an_enrolment_says_whom_to_trust_and_whom_to_pay(ledger: Ledger) -> None:
    shop = Shop.enrol(ledger)
    given = shop.enrolment
    assert (given.merchant, given.issuer, given.currency) == (MERCHANT, "Test Issuer", "CNY")
    assert len(given.terminal_id) == 8
    assert given.ca_keys[0].index == 1
    assert len(given.ca_keys[0].modulus) == 248
    assert given.token_key_secret == ledger.keys.token_key.secret
    assert "token_key_secret" not in repr(given)
    [gateway] = ledger.gateways()
    assert (gateway.id, gateway.merchant, gateway.last_presented_unix_ms) == (
        given.gateway_id,
        MERCHANT,
        None,
    )


def test_a_code_carries_the_pin_and_is_forgiving_to_type(ledger: Ledger) -> None:
    code = ledger.invite(MERCHANT)
    assert parse_code(code)[1] == ledger.keys.authority.fingerprint
    ledger.enrol(request(code.lower().replace("-", " ")))


def test_a_code_works_once(ledger: Ledger) -> None:
    code = ledger.invite(MERCHANT)
    ledger.enrol(request(code))
    with pytest.raises(AuthenticationFailed, match=r"used already.*ask for a new code"):
        ledger.enrol(request(code))
    assert len(ledger.gateways()) == 1


def test_a_code_expires(ledger: Ledger, clock: Clock) -> None:
    code = ledger.invite(MERCHANT, life_s=60)
    clock.now_s += 60
    with pytest.raises(AuthenticationFailed, match="expired"):
        ledger.enrol(request(code))


def test_a_made_up_code_and_another_ledgers_are_refused(ledger: Ledger) -> None:
    secret, fingerprint = parse_code(ledger.invite(MERCHANT))
    with pytest.raises(AuthenticationFailed, match="not given out"):
        ledger.enrol(request(compose_code(bytes(len(secret)), fingerprint)))
    with pytest.raises(AuthenticationFailed, match="another ledger"):
        ledger.enrol(request(compose_code(secret, bytes(32))))
    with pytest.raises(InvalidMessage, match="not an enrolment code"):
        ledger.enrol(request("HELLO"))


@pytest.mark.parametrize("dialect", ["sqlite"])
def test_only_a_hash_of_a_code_is_kept(ledger: Ledger) -> None:
    secret, _ = parse_code(ledger.invite(MERCHANT))
    with ledger._database.read() as connection:
        [row] = connection.execute(sa.select(store.enrolment_codes))
    assert secret not in row.secret_hash
    ledger.close()
    assert secret not in (ledger.home / "ledger.db").read_bytes()


def test_one_key_is_one_gateway(ledger: Ledger) -> None:
    key = Ed25519PrivateKey.generate()
    ledger.enrol(EnrolmentRequest.make(ledger.invite(MERCHANT), key))
    second = ledger.invite(MERCHANT)
    with pytest.raises(Conflict, match="enrolled already"):
        ledger.enrol(EnrolmentRequest.make(second, key))
    with pytest.raises(InvalidMessage, match="public_key"):
        ledger.enrol(request(second).model_copy(update={"public_key": b"short"}))
    # Neither used the code up.
    ledger.enrol(request(second))


def test_a_merchant_id_stands_for_one_merchant(ledger: Ledger) -> None:
    ledger.invite(MERCHANT)
    ledger.invite(MERCHANT)
    with pytest.raises(Conflict, match="'Corner shop'"):
        ledger.invite(Merchant(id=MERCHANT.id, name="Someone else", category="5411"))


def test_accounts_and_tokens_refuse_what_makes_no_sense(ledger: Ledger) -> None:
    ledger.open_account(holder="Li Na", limit_minor=0, account_id="A-1")
    with pytest.raises(Conflict, match="exists already"):
        ledger.open_account(holder="Li Na", limit_minor=1, account_id="A-1")
    with pytest.raises(InvalidInput, match="limit"):
        ledger.open_account(holder="Li Na", limit_minor=-1)
    with pytest.raises(InvalidInput, match="holder"):
        ledger.open_account(holder="", limit_minor=1)
    with pytest.raises(InvalidInput, match="account id"):
        ledger.open_account(holder="Li Na", limit_minor=1, account_id="x" * 33)
    with pytest.raises(NotFound, match="no account A-2"):
        ledger.account("A-2")
    with pytest.raises(NotFound, match="no token tok-x"):
        ledger.set_token_status("tok-x", TokenStatus.BLOCKED)


def test_a_closed_token_stays_closed(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=1)
    token = ledger.issue_token(account.id, icc_key=icc_key).token
    ledger.set_token_status(token.id, TokenStatus.CLOSED)
    with pytest.raises(Conflict, match="closed"):
        ledger.set_token_status(token.id, TokenStatus.ACTIVE)
