"""Receipts on every medium, and the decision receipt that anybody can check."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.authorization.receipt import (
    MAX_QR_BYTES,
    DecisionReceipt,
    Finding,
    genuine,
    qr_text,
    verify_qr,
    verify_receipt,
)
from pos_gateway.errors import AuthenticationFailed, InvalidMessage, PosGatewayError, Unavailable
from pos_gateway.gateway.feed import trusted_limit_keys
from pos_gateway.gateway.language import language
from pos_gateway.gateway.receipts.contents import Copy, Sale, Shop, receipt
from pos_gateway.gateway.receipts.escpos import as_escpos, send
from pos_gateway.gateway.receipts.paper import Centred, Pair, Paper, Rule, width, wrapped
from pos_gateway.gateway.receipts.pdf import as_pdf
from pos_gateway.gateway.receipts.text import as_text
from pos_gateway.gateway.staff import Role
from pos_gateway.instalments import Charge, Offer, quote
from pos_gateway.lab.counter import Counter
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.money import currency
from tests.gateway.dashboard.conftest import SignIn, pay

CNY = currency("CNY")
SHOP = Shop("Harbour Ferry Kiosk", "FERRY-PIER-9", "T1", "Harbour Credit", CNY)
FACTS = {
    "sale_id": "01943a5e-0000-7000-8000-000000000001",
    "amount_minor": 120_000,
    "at_unix_ms": 1_764_000_000_000,
    "token_last4": "1234",
    "aid": "f0504f53475701",
}
PLAN = quote(
    Offer(id="six", currency=CNY, charge=Charge.FLAT_FEE, periods=(6,), rate_per_period_bps=50), 120_000, 6
)


def trusted(till: Counter) -> tuple[dict[str, Ed25519PublicKey], int]:
    keys = trusted_limit_keys(till.shop.home.snapshots, till.shop.enrolment)
    return dict(keys.keys), keys.threshold


async def test_what_a_third_party_can_check_and_what_not(till: Counter, card: VirtualCard) -> None:
    view = await pay(till, card)
    given_receipt = till.parts.desk.decision_receipt(UUID(view["id"]))
    file = json.dumps(given_receipt.to_json()).encode()
    read = DecisionReceipt.parse(file)
    keys, threshold = trusted(till)
    steps = verify_receipt(read, keys, threshold, till.shop.key.public_key())
    assert genuine(steps)
    assert {s.name for s in steps if s.finding is Finding.NOT_COVERED} == {"card evidence", "no double claim"}
    assert {"record", "limits", "relied on", "validity", "counter"} <= {
        s.name for s in steps if s.finding is Finding.OK
    }
    assert card._personalisation.pan not in file.decode()


async def test_no_changed_receipt_passes(till: Counter, card: VirtualCard) -> None:
    view = await pay(till, card)
    good = till.parts.desk.decision_receipt(UUID(view["id"]))
    keys, threshold = trusted(till)
    changes: tuple[Callable[[dict[str, Any]], None], ...] = (
        lambda d: d["record"].update(
            body=d["record"]["body"].replace('"amount_minor":1930', '"amount_minor":930')
        ),
        lambda d: d["record"].update(sequence=d["record"]["sequence"] + 1),
        lambda d: d.update(limit_proof=d["limit_proof"][:400] + "AAAA" + d["limit_proof"][404:]),
    )
    for change in changes:
        document = good.to_json()
        change(document)
        with pytest.raises(InvalidMessage, match="digest"):
            DecisionReceipt.parse(json.dumps(document).encode())
        document["digest"] = DecisionReceipt(
            document["issuer"],
            document["merchant_name"],
            bytes.fromhex(document["gateway_key"]),
            good.record.from_wire(document["record"]),
            base64.b64decode(document["limit_proof"]),
        ).digest.hex()
        changed = DecisionReceipt.parse(json.dumps(document).encode())
        assert not genuine(verify_receipt(changed, keys, threshold, till.shop.key.public_key()))
    other = Ed25519PrivateKey.generate().public_key()
    renamed = replace(good, gateway_key=other.public_bytes_raw())
    assert not genuine(verify_receipt(renamed, keys, threshold, till.shop.key.public_key()))
    assert not genuine(verify_receipt(renamed, keys, threshold)), "nor by the key it names itself"
    strangers = {name: Ed25519PrivateKey.generate().public_key() for name in keys}
    assert not genuine(verify_receipt(good, strangers, threshold, till.shop.key.public_key()))


async def test_the_qr_fits_and_is_the_gateways_word_for_this_receipt(
    till: Counter, card: VirtualCard
) -> None:
    view = await pay(till, card)
    made = till.parts.desk.decision_receipt(UUID(view["id"]))
    text = qr_text(made, till.shop.key.sign)
    assert len(text.encode()) <= MAX_QR_BYTES
    paper = verify_qr(text, till.shop.key.public_key())
    assert (paper.digest, paper.amount_minor, str(paper.sale_id)) == (made.digest, 1930, view["id"])
    with pytest.raises(AuthenticationFailed, match="not signed"):
        verify_qr(text, Ed25519PrivateKey.generate().public_key())
    for cut in ("", "PGR1.", text[:-8], "X" + text):
        with pytest.raises(InvalidMessage):
            verify_qr(cut, till.shop.key.public_key())


@given(st.binary(max_size=400))
def test_whatever_is_handed_in_as_a_receipt_is_refused_clearly(data: bytes) -> None:
    with pytest.raises(PosGatewayError):
        DecisionReceipt.parse(data)


async def test_the_proof_is_kept_when_the_limits_have_moved_on(till: Counter, card: VirtualCard) -> None:
    view = await pay(till, card)
    before = till.parts.desk.decision_receipt(UUID(view["id"]))
    assert before.limit_proof
    till.shop.publish()
    assert till.parts.desk.decision_receipt(UUID(view["id"])) == before


@pytest.mark.parametrize("code", ["en", "zh"])
@pytest.mark.parametrize("copy", list(Copy))
def test_a_receipt_says_what_must_stand_on_it(code: str, copy: Copy) -> None:
    sale = Sale(FACTS, True, 4711, PLAN, proof="PGR1.abc", presented_by_unix_ms=1_765_000_000_000)
    paper = receipt(SHOP, sale, copy, language(code))
    text = as_text(paper)
    for needed in (
        "**** **** **** 1234",
        "F0504F53475701",
        "004711",
        "CNY 1200.00",
        "1236.00",
        "36.00",
        "6 × 206.00",
    ):
        assert needed in text, needed
    assert f"{PLAN.annual_percentage_rate_ppm / 10_000:.2f}%" in text
    assert ("Offline approval, guaranteed" if code == "en" else "离线批准") in text
    assert ("DUPLICATE" in text or "副本" in text) is False
    assert max(width(line) for line in text.splitlines()) <= 42


def test_a_duplicate_a_void_and_training_are_told() -> None:
    sale = Sale(FACTS, True, 1, None, voided=True, duplicate=True)
    shop = Shop("A", "B", "C", "D", CNY, training=True)
    paper = receipt(shop, sale, Copy.CUSTOMER, language("en"))
    text = as_text(paper)
    assert "DUPLICATE" in text
    assert "VOID" in text
    assert text.count("TRAINING – NO MONEY") == 2
    assert as_escpos(paper).count(b"TRAINING") == 2


def test_pdf_and_escpos_hold_the_amount_in_both_languages() -> None:
    for code in ("en", "zh"):
        paper = receipt(SHOP, Sale(FACTS, True, 1, PLAN, proof="PGR1.abc"), Copy.MERCHANT, language(code))
        pdf = as_pdf(paper)
        assert pdf.startswith(b"%PDF-")
        assert pdf == as_pdf(paper), "the same paper is the same file"
        data = as_escpos(paper)
        assert b"1200.00" in data
        assert data.endswith(b"\x1dVA\x03") or b"\x1dV" in data[-8:]
    assert "离线批准".encode("gb18030") in data


@given(st.text(max_size=120), st.integers(min_value=4, max_value=60))
def test_wrapping_loses_nothing_and_keeps_within_the_columns(text: str, columns: int) -> None:
    lines = wrapped(text, columns)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(width(line) <= columns for line in lines)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_words_can_be_drawn_everywhere(name: str, value: str) -> None:
    paper = Paper("t", "en", [Centred(name), Pair(name, value), Rule()])
    as_text(paper)
    as_escpos(paper)


@contextmanager
def printer() -> Iterator[tuple[str, list[bytes]]]:
    """A network printer: what comes is paper."""
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(65536):
                    got.append(data)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"tcp:127.0.0.1:{server.getsockname()[1]}", got
        thread.join(10)


async def test_receipts_are_printed_and_marked_from_the_second_on(
    till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    view = await pay(till, card)
    cashier = await sign_in(Role.CASHIER)
    order: dict[str, Any] = {"copy": "customer", "language": "en"}
    path = f"/v1/payments/{view['id']}/print"
    assert (await cashier.post(path, order))[0] == 503, "there is no printer"
    with printer() as (address, got):
        till.parts.desk.printer = address
        assert (await cashier.post(path, order))[0] == 200
    assert b"DUPLICATE" not in b"".join(got)
    _, text = await cashier.get(f"/transactions/{view['id']}/receipt?copy=customer&form=text")
    assert "DUPLICATE" in text
    _, text = await cashier.get(f"/transactions/{view['id']}/receipt?copy=merchant&form=text")
    assert "DUPLICATE" not in text
    assert (await cashier.get(f"/transactions/{uuid4()}/receipt"))[0] == 404


def test_a_printer_that_is_off_is_told_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Unavailable, match="printer"):
        send(f"tcp:127.0.0.1:{port}", b"x")
