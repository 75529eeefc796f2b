"""Certificates and SDADs made by the second issuer, at several key sizes; then every byte changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date

import pytest

from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.authentication import (
    AuthenticatedCard,
    CaPublicKey,
    Cryptogram,
    KnownIssuers,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.dialogue import (
    CardRead,
    CryptogramAnswer,
    RecordRead,
    card_from_records,
    cryptogram_answer,
)
from pos_gateway.errors import AuthenticationFailed, InvalidCardData
from tests.emv.making import TODAY, ask, ca_key, read
from tests.emv.second_issuer import UN_IN_CDOL1, RsaKey, SecondIssuer, pack, rsa_key, sha1

SIZES = [
    # CA, issuer, ICC, exponent; which remainders that leaves
    (248, 176, 144, 3),  # 9F48: the default of our cards
    (144, 144, 96, 3),  # 92
    (144, 128, 128, 3),  # 92 and 9F48
    (248, 176, 128, 65537),  # none
    (128, 96, 64, 3),  # both, short keys
    (248, 248, 205, 3),  # the longest
]


@pytest.mark.parametrize(("ca", "issuer", "icc", "e"), SIZES)
def test_a_genuine_card_and_its_tc_are_authentic(ca: int, issuer: int, icc: int, e: int) -> None:
    second = SecondIssuer(ca_size=ca, issuer_size=issuer, icc_size=icc, e=e)
    card = second.card()
    known = read(card)
    assert (0x92 in known.elements) is (issuer > ca - 36)
    assert (0x9F48 in known.elements) is (icc > issuer - 42)
    authentic = authenticate_card(known, [ca_key(second)], TODAY)
    assert authentic.icc_key.modulus == second.icc.n
    assert authentic.pan == second.pan
    cryptogram = authenticate_cryptogram(authentic, ask(card, known))
    assert cryptogram.authentic
    assert (cryptogram.kind, cryptogram.atc) == (CryptogramKind.TC, 1)
    assert cryptogram.iad.counter_after == 1930
    assert cryptogram.bound[0x9F02] == bytes.fromhex("000000001930")
    arqc = authenticate_cryptogram(authentic, ask(card, known, CryptogramKind.ARQC))
    assert arqc.authentic
    assert arqc.kind is CryptogramKind.ARQC


def test_an_aac_is_evidence_of_nothing() -> None:
    second, known, authentic, _ = dialogue()
    cryptogram = authenticate_cryptogram(authentic, ask(second.card(), known, CryptogramKind.AAC))
    assert not cryptogram.authentic
    assert cryptogram.kind is CryptogramKind.AAC


def dialogue(
    sizes: tuple[int, int, int, int] = SIZES[4],
) -> tuple[SecondIssuer, CardRead, AuthenticatedCard, CryptogramAnswer]:
    ca, issuer, icc, e = sizes
    second = SecondIssuer(ca_size=ca, issuer_size=issuer, icc_size=icc, e=e)
    card = second.card()
    known = read(card)
    return second, known, authenticate_card(known, [ca_key(second)], TODAY), ask(card, known)


def verify(
    known: CardRead,
    key: CaPublicKey,
    answer: bytes,
    cdol1_values: bytes,
    records: tuple[RecordRead, ...],
    aip: bytes,
) -> Cryptogram:
    again = card_from_records(known.aid, known.pdol_values, aip, known.afl, records)
    return authenticate_cryptogram(
        authenticate_card(again, [key], TODAY), cryptogram_answer(cdol1_values, answer)
    )


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def test_a_change_to_any_byte_is_noticed() -> None:
    second, known, _, answer = dialogue()
    key = ca_key(second)
    arguments = (known, key, answer.answer, answer.cdol1_values, known.records, known.aip)
    assert verify(*arguments).authentic
    steps = set()

    def refuse(run: Callable[[], object], what: str) -> None:
        try:
            run()
        except (AuthenticationFailed, InvalidCardData) as error:
            steps.add(getattr(error, "step", "card data"))
        else:
            pytest.fail(f"a change to {what} was accepted")

    for i, record in enumerate(known.records):
        for at in range(len(record.data)):
            records = list(known.records)
            records[i] = replace(record, data=changed(record.data, at))
            refuse(
                lambda records=records: verify(  # type: ignore[misc]
                    known, key, answer.answer, answer.cdol1_values, tuple(records), known.aip
                ),
                f"record {i}, byte {at}",
            )
    for at in range(len(answer.answer)):
        refuse(
            lambda at=at: verify(  # type: ignore[misc]
                known, key, changed(answer.answer, at), answer.cdol1_values, known.records, known.aip
            ),
            f"answer, byte {at}",
        )
    for at in range(len(answer.cdol1_values)):
        refuse(
            lambda at=at: verify(  # type: ignore[misc]
                known, key, answer.answer, changed(answer.cdol1_values, at), known.records, known.aip
            ),
            f"CDOL1 values, byte {at}",
        )
    for at in range(len(known.pdol_values)):
        other = replace(known, pdol_values=changed(known.pdol_values, at))
        refuse(
            lambda other=other: verify(  # type: ignore[misc]
                other, key, answer.answer, answer.cdol1_values, known.records, known.aip
            ),
            f"PDOL values, byte {at}",
        )
    for at in range(2):
        refuse(
            lambda at=at: verify(  # type: ignore[misc]
                known, key, answer.answer, answer.cdol1_values, known.records, changed(known.aip, at)
            ),
            f"AIP, byte {at}",
        )
    assert steps >= {
        "card data",
        "CA key",
        "issuer certificate",
        "ICC certificate",
        "static data",
        "SDAD",
        "transaction data hash",
    }


def failed_step(run: Callable[[], object]) -> str:
    with pytest.raises(AuthenticationFailed) as caught:
        run()
    return caught.value.step


def test_a_signed_cid_that_is_not_the_one_in_clear_is_its_own_step() -> None:
    _, _, authentic, answer = dialogue()
    clear = answer.answer.replace(bytes.fromhex("9F270140"), bytes.fromhex("9F270180"))
    arqc = cryptogram_answer(answer.cdol1_values, clear)
    assert failed_step(lambda: authenticate_cryptogram(authentic, arqc)) == "CID"


def test_a_signature_is_not_accepted_plus_its_modulus() -> None:
    second, known, authentic, answer = dialogue(SIZES[0])
    for tag, key in ((0x90, second.ca), (0x9F46, second.issuer), (0x9F4B, second.icc)):
        signature = answer.elements.get(tag) or known.elements[tag]
        shifted = int.from_bytes(signature, "big") + key.n
        if shifted >= 1 << 8 * key.size:
            continue
        data = shifted.to_bytes(key.size, "big")
        if tag == 0x9F4B:
            forged = cryptogram_answer(answer.cdol1_values, answer.answer.replace(signature, data))
            assert failed_step(lambda forged=forged: authenticate_cryptogram(authentic, forged)) == "SDAD"  # type: ignore[misc]
        else:
            records = tuple(replace(r, data=r.data.replace(signature, data)) for r in known.records)
            again = card_from_records(known.aid, known.pdol_values, known.aip, known.afl, records)
            step = failed_step(lambda again=again: authenticate_card(again, [ca_key(second)], TODAY))  # type: ignore[misc]
            assert step in ("issuer certificate", "ICC certificate")


def test_a_forged_card_under_other_keys_fails_at_the_issuer_certificate() -> None:
    second = SecondIssuer(ca_size=128, issuer_size=96, icc_size=64)
    forger = SecondIssuer(ca_size=128, issuer_size=96, icc_size=64)
    forger.ca = rsa_key("forger", 128)
    known = read(forger.card())
    assert failed_step(lambda: authenticate_card(known, [ca_key(second)], TODAY)) == "issuer certificate"


def test_a_ca_key_we_do_not_have_or_cannot_use_is_its_own_step() -> None:
    second, known, _, _ = dialogue()
    key = ca_key(second)
    for keys in (
        [],
        [replace(key, index=2)],
        [replace(key, rid=b"\xf0\0\0\0\0")],
        [replace(key, exponent=5)],
    ):
        assert failed_step(lambda keys=keys: authenticate_card(known, keys, TODAY)) == "CA key"  # type: ignore[misc]
    expired = replace(key, expires=date(2026, 11, 23))
    assert failed_step(lambda: authenticate_card(known, [expired], TODAY)) == "CA key"
    assert authenticate_card(known, [replace(key, expires=TODAY)], TODAY)


@pytest.mark.parametrize(
    "second",
    [
        SecondIssuer(128, 96, 64, issuer_expires="1026"),
        SecondIssuer(128, 96, 64, icc_expires="1026"),
        SecondIssuer(128, 96, 64, card_expires="261123"),
        SecondIssuer(128, 96, 64, card_effective="261125"),
    ],
)
def test_expiry_is_its_own_step(second: SecondIssuer) -> None:
    known = read(second.card())
    assert failed_step(lambda: authenticate_card(known, [ca_key(second)], TODAY)) == "expiry"


def test_the_last_day_is_still_valid() -> None:
    second = SecondIssuer(128, 96, 64, issuer_expires="1126", icc_expires="1126", card_expires="261124")
    assert authenticate_card(read(second.card()), [ca_key(second)], TODAY)


def test_expiry_is_told_only_of_genuine_cards() -> None:
    second = SecondIssuer(128, 96, 64, card_expires="250101")
    card = second.card()
    card.records[2, 1] = card.records[2, 1].replace(b"\x5f\x34\x01\x01", b"\x5f\x34\x01\x02")
    known = read(card)
    assert failed_step(lambda: authenticate_card(known, [ca_key(second)], TODAY)) == "static data"


@pytest.mark.parametrize("identifier", ["91560002", "9156FFFF", "91FFFFFF"])
def test_the_issuer_certificate_must_be_for_the_pan(identifier: str) -> None:
    second = SecondIssuer(128, 96, 64, identifier=identifier)
    known = read(second.card())
    if identifier == "9156FFFF":
        assert authenticate_card(known, [ca_key(second)], TODAY)
    else:
        step = failed_step(lambda: authenticate_card(known, [ca_key(second)], TODAY))
        assert step == "issuer certificate"


def test_a_revoked_certificate_is_refused() -> None:
    second, known, _, _ = dialogue()
    identifier = bytes.fromhex("91560001")
    key = [ca_key(second)]
    assert authenticate_card(known, key, TODAY, [(identifier, b"\0\0\x08")])
    step = failed_step(lambda: authenticate_card(known, key, TODAY, [(identifier, second.serial)]))
    assert step == "issuer certificate"


def test_known_issuers_are_remembered_but_not_their_expiry_or_revocation() -> None:
    second, known, _, _ = dialogue()
    remembered: KnownIssuers = {}
    key = [ca_key(second)]
    authenticate_card(known, key, TODAY, known_issuers=remembered)
    assert len(remembered) == 1
    authenticate_card(known, key, TODAY, known_issuers=remembered)
    assert len(remembered) == 1
    late = date(2031, 1, 1)
    assert failed_step(lambda: authenticate_card(known, key, late, known_issuers=remembered)) == "expiry"
    revoked = [(bytes.fromhex("91560001"), second.serial)]
    step = failed_step(lambda: authenticate_card(known, key, TODAY, revoked, known_issuers=remembered))
    assert step == "issuer certificate"
    other = [replace(key[0], modulus=rsa_key("forger", 128).n)]
    step = failed_step(lambda: authenticate_card(known, other, TODAY, known_issuers=remembered))
    assert step == "issuer certificate"


def test_an_answer_of_another_card_does_not_authenticate() -> None:
    _, _, authentic, answer = dialogue()
    stranger = AuthenticatedCard(
        authentic.card, authentic.icc_key._replace(modulus=rsa_key("other icc", 64).n), b""
    )
    assert failed_step(lambda: authenticate_cryptogram(stranger, answer)) == "SDAD"


def test_a_certificate_is_not_taken_for_a_signature_of_another_kind() -> None:
    """An issuer that signs its ICC certificates in format 05 has not certified a card."""
    second = SecondIssuer(128, 96, 64)
    card = second.card()
    known = read(card)
    block = pow(int.from_bytes(known.elements[0x9F46], "big"), 3, second.issuer.n).to_bytes(96, "big")
    forged = second.issuer.sign(block[:1] + b"\x05" + block[2:])
    records = tuple(replace(r, data=r.data.replace(known.elements[0x9F46], forged)) for r in known.records)
    again = card_from_records(known.aid, known.pdol_values, known.aip, known.afl, records)
    assert failed_step(lambda: authenticate_card(again, [ca_key(second)], TODAY)) == "ICC certificate"


def test_nothing_of_the_card_shows_in_reprs() -> None:
    _, _, authentic, answer = dialogue()
    shown = repr(authentic) + repr(authenticate_cryptogram(authentic, answer))
    assert "9156000112345672" not in shown


def resigned(known: CardRead, tag: int, signer: RsaKey, change: Callable[[bytes], bytes]) -> CardRead:
    """The card with one certificate altered inside and signed again by its genuine signer."""
    old = known.elements[tag]
    block = pow(int.from_bytes(old, "big"), signer.e, signer.n).to_bytes(signer.size, "big")
    new = signer.sign(change(block))
    records = tuple(replace(r, data=r.data.replace(old, new)) for r in known.records)
    return card_from_records(known.aid, known.pdol_values, known.aip, known.afl, records)


def test_a_certificate_with_a_wrong_hash_is_refused_even_if_signed() -> None:
    second, known, _, _ = dialogue()
    for tag, signer, step in (
        (0x90, second.ca, "issuer certificate"),
        (0x9F46, second.issuer, "static data"),
    ):
        forged = resigned(known, tag, signer, lambda block: changed(block, len(block) - 5))
        assert failed_step(lambda forged=forged: authenticate_card(forged, [ca_key(second)], TODAY)) == step  # type: ignore[misc]


def test_an_icc_certificate_for_another_pan_is_refused() -> None:
    second, known, _, _ = dialogue()
    forged = resigned(known, 0x9F46, second.issuer, lambda block: changed(block, 6))
    assert failed_step(lambda: authenticate_card(forged, [ca_key(second)], TODAY)) == "ICC certificate"


def test_another_unpredictable_number_fails_at_the_sdad() -> None:
    _, _, authentic, answer = dialogue()
    values = changed(answer.cdol1_values, UN_IN_CDOL1.start)
    replayed = cryptogram_answer(values, answer.answer)
    assert failed_step(lambda: authenticate_cryptogram(authentic, replayed)) == "SDAD"


def test_a_cryptogram_in_clear_must_be_the_signed_one() -> None:
    second = SecondIssuer(128, 96, 64)
    card = second.card()
    known = read(card)
    authentic = authenticate_card(known, [ca_key(second)], TODAY)

    answer = ask(card, known)
    values = answer.cdol1_values
    cid, atc = bytes.fromhex("9F270140"), bytes.fromhex("9F36020001")
    ac = sha1(b"not a real MAC", values)[:8]
    for beside, accepted in ((ac, True), (bytes(8), False)):
        before, after = cid + atc + pack("9F26", beside), pack("9F10", card.iad())
        sdad = pack("9F4B", card.sdad(b"\x40", ac, values, before + after))
        whole = cryptogram_answer(values, pack("77", before + sdad + after))
        if accepted:
            assert authenticate_cryptogram(authentic, whole).ac == ac
        else:
            assert failed_step(lambda whole=whole: authenticate_cryptogram(authentic, whole)) == "SDAD"  # type: ignore[misc]
